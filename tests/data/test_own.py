"""What folders, tar shards and Parquet files have in common, on the same pictures in each."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.held import FrameSource
from diffusion_jax.data.picture_source import PictureSource
from diffusion_jax.errors import ConfigError, DataError

NAMES = ("image_folder", "webdataset", "parquet")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def load(name, made, tmp_path):
    """load(split, **options) of the 60 examples, stored in each of the ways."""
    stored: dict = {}

    def from_disk(split="train", examples=None, **options):
        if not stored:
            stored.update(made.WRITERS[name](tmp_path / "set", examples or made.Examples.made()))
        return data.load(name, split, **{"scalars": ("weight",), **stored, **options})

    return from_disk


def everything(source, positions=None):
    return source.fetch(np.arange(len(source)), positions)


def text_of(tokens):
    return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode()


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_each_picture_comes_with_what_belongs_to_it(load, made, memory):
    seen = []
    for split in ("train", "validation"):
        source = load(split, memory=memory, validation_share=0.3, captions="auto")
        assert isinstance(source, data.Source)
        assert isinstance(source, ArraySource if memory else PictureSource)
        batch = everything(source)
        numbers = made.numbers_of(batch["x"])
        seen += numbers
        for row, number in enumerate(numbers):
            colour = (batch["x"][row] + 1) * 127.5
            np.testing.assert_allclose(colour - made.Examples.colour(number), 0, atol=1e-4)
            assert text_of(batch["conditioning"]["text"][row]) == f"picture {number}, naïve"
        np.testing.assert_array_equal(batch["conditioning"]["label"], np.array(numbers) % 3)
        np.testing.assert_array_equal(
            batch["conditioning"]["scalar"], np.array(numbers, np.float32)[:, None] / 8
        )
        types = {key: value.dtype for key, value in batch["conditioning"].items()}
        assert types == {"label": np.int32, "text": np.int32, "scalar": np.float32}
        assert batch["conditioning"]["text"].shape == (len(numbers), 128)
        assert (batch["x"].dtype, batch["id"].dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(batch["id"], source.ids(np.arange(len(source))))
        picked = source.fetch(np.array([3, 0, 3, 1]))
        assert made.numbers_of(picked["x"]) == [numbers[i] for i in (3, 0, 3, 1)]
        np.testing.assert_array_equal(picked["id"], batch["id"][[3, 0, 3, 1]])
    assert sorted(seen) == list(range(made.COUNT))
    assert source.spec.shape == (6, 6, 3)
    assert (source.spec.num_classes, source.spec.text_length) == (3, 128)
    assert source.spec.scalars == ("weight",)


def test_about_the_given_share_is_held_out_with_ids_of_its_own(load):
    train, held = (load(split, validation_share=0.3) for split in ("train", "validation"))
    assert abs(len(held) - 18) < 4 * np.sqrt(60 * 0.3 * 0.7)
    ids = np.concatenate([everything(train)["id"], everything(held)["id"]])
    assert len(set(ids.tolist())) == 60
    assert ids.min() >= 0
    # A larger share holds out more, and none of the others less.
    wider = set(load("validation", validation_share=0.5).ids(np.arange(18)).tolist())
    assert len(wider) == 18
    assert set(everything(held)["id"].tolist()) <= set(
        everything(load("validation", validation_share=0.5))["id"].tolist()
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_held_in_memory_or_not_and_however_many_workers_the_batches_are_the_same(
    load, made, workers
):
    examples = made.Examples.made(size=(6, 9))
    rng = np.random.default_rng(0)
    for number in range(made.COUNT):
        size = (8, int(rng.integers(8, 30)))
        pixels = rng.integers(0, 256, (*size[:: 1 if number % 2 else -1], 3), dtype=np.uint8)
        examples.pictures[number] = made.encoded(pixels)
    examples.pictures[7] = examples.pictures[7][:60]
    options = {"image_size": 6, "crop": "random", "flip": True, "max_unreadable": 3}
    streamed = load(examples=examples, memory=0, workers=workers, **options)
    held = load(memory=1 << 20, **options)
    assert isinstance(held.source, FrameSource)
    assert isinstance(streamed.source, PictureSource)
    loaders = [data.Loader(source=s, batch_size=16, seed=3) for s in (streamed, held)]
    for position in (0, 16, 320):
        one, other = (loader.batch(position) for loader in loaders)
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(one["id"], other["id"])
        for key, value in one["conditioning"].items():
            np.testing.assert_array_equal(value, other["conditioning"][key])
    parts = [
        data.Loader(source=streamed, batch_size=16, seed=3, rows=rows).batch(320)["x"]
        for rows in (np.arange(0, 16, 2), np.arange(1, 16, 2))
    ]
    np.testing.assert_array_equal(np.stack(parts, 1).reshape(one["x"].shape), one["x"])


def test_random_windows_move_along_the_longer_side_in_training_alone(load, made):
    examples = made.Examples.made()
    ramp = np.tile(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (6, 1, 3))
    examples.pictures = [made.encoded(ramp)] * made.COUNT
    source = load(examples=examples, image_size=6, crop="random", memory=0)
    # The left edge of the window, in pixels: 30 columns leave 25 places.
    x = source.fetch(np.zeros(500, int), np.arange(500))["x"]
    lefts = np.rint((x[:, 0, 0, 0] + 1) * 127.5 / 8).astype(int)
    np.testing.assert_allclose(np.diff(x, axis=2) * 127.5, 8, atol=1e-3)
    counts = np.bincount(lefts, minlength=25)
    assert len(counts) == 25
    assert abs(counts - 20).max() < 4.5 * np.sqrt(20)
    np.testing.assert_array_equal(source.fetch(np.array([0]), np.array([7]))["x"][0], x[7])
    held_out = load("validation", image_size=6, crop="random", flip=True, memory=0)
    middle = everything(held_out)["x"]
    assert np.rint((middle[:, 0, 0, 0] + 1) * 127.5 / 8).tolist() == [12] * len(middle)


def test_training_alone_is_flipped(load, made):
    examples = made.Examples.made()
    ramp = np.tile(np.arange(0, 48, 8, dtype=np.uint8)[None, :, None], (6, 1, 3))
    examples.pictures = [made.encoded(ramp)] * made.COUNT
    for split, flipped in (("train", True), ("validation", False)):
        source = load(split, examples=examples, flip=True, validation_share=0.3)
        x = source.fetch(np.zeros(60, int), np.arange(60))["x"]
        mirrored = x[:, 0, 0, 0] > x[:, 0, -1, 0]
        assert 15 < mirrored.sum() < 45 if flipped else not mirrored.any()


def test_a_set_that_turns_out_too_large_is_decoded_when_asked_for(load, made):
    examples = made.Examples.made(size=(6, 24))
    options = {"image_size": 6, "crop": "random", "labels": "none", "validation_share": 0.3}
    size = len(load(examples=examples, memory=0, **options)) * 6 * 24 * 3
    assert isinstance(load(memory=size, **options), FrameSource)
    # Squares of 6 x 6 would fit four times into this.
    assert isinstance(load(memory=size - 1, **options), PictureSource)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_unreadable_pictures_are_named_counted_replaced_and_limited(load, made, memory, caplog):
    examples = made.Examples.made()
    examples.pictures[12] = b""
    examples.pictures[11] = examples.pictures[11][:50]
    examples.pictures[40] = b"no picture"

    def shown(**options):
        source = load(examples=examples, image_size=6, memory=memory, **options)
        batch = everything(source)
        return source, batch, made.numbers_of(batch["x"])

    with pytest.raises(DataError, match="max_unreadable=0") as error:
        shown()
    assert "\n" not in str(error.value)
    if memory:
        assert "3 unreadable pictures" in str(error.value)
        assert "empty (0 bytes)" in str(error.value)
    with pytest.raises(DataError, match="3 unreadable pictures"):
        shown(max_unreadable=2)
    caplog.clear()
    with caplog.at_level("WARNING"):
        source, batch, numbers = shown(max_unreadable=3)
    assert caplog.text.count("unreadable, replaced by the next in order") == 3
    assert "it is empty (0 bytes)" in caplog.text
    assert "it is no picture of a known format" in caplog.text
    assert "it cannot be decoded" in caplog.text
    # Every example is still there, and a replacement comes with its own label, caption and id.
    held = load("validation", image_size=6, memory=memory)
    total = len(source) + len(held)
    assert total == 60
    assert not {11, 12, 40} & set(numbers)
    np.testing.assert_array_equal(batch["conditioning"]["label"], np.array(numbers) % 3)
    own = {number: id_ for number, id_ in zip(numbers, batch["id"].tolist(), strict=True)}
    for row, number in enumerate(numbers):
        assert own[number] == batch["id"][row]
    # Meeting them again is no news.
    caplog.clear()
    everything(source)
    assert "unreadable" not in caplog.text


def test_where_nothing_can_be_read_this_is_said(load, made):
    examples = made.Examples.made()
    examples.pictures = [b"nothing"] * made.COUNT
    for memory in (0, 1 << 20):
        with pytest.raises(DataError, match=r"none of the .* pictures can be read"):
            everything(load(examples=examples, image_size=4, max_unreadable=99, memory=memory))
    with pytest.raises(DataError, match="none of its 60 pictures can be read"):
        load(max_unreadable=99)


def test_mixed_sizes_need_a_size(load, made, name):
    examples = made.Examples.made()
    examples.pictures[33] = made.encoded(np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ConfigError, match=rf"^data\.{name}\.image_size is not set: ") as error:
        load(examples=examples)
    assert "is 6 x 6" in str(error.value)
    assert "is 5 x 7" in str(error.value)
    assert "\n" not in str(error.value)
    assert load(image_size=4).spec.shape == (4, 4, 3)


def test_long_captions_are_cut_between_characters_and_counted_once(load, caplog):
    with caplog.at_level("WARNING"):
        # "picture 7, naï" is 15 bytes, of which the last two make one character.
        batch = everything(load(text_length=14))
    assert text_of(batch["conditioning"]["text"][0]).startswith("picture ")
    assert {len(text_of(row).encode()) for row in batch["conditioning"]["text"]} <= {13, 14}
    warnings = [r.getMessage() for r in caplog.records if "captions are longer" in r.getMessage()]
    assert len(warnings) == 1
    assert "60 of 60 captions are longer than text_length=14 bytes" in warnings[0]


def test_captions_and_labels_can_be_left_out(load):
    source = load(captions="none", labels="none", scalars=())
    assert everything(source)["conditioning"] == {}
    assert (source.spec.num_classes, source.spec.text_length, source.spec.scalars) == (0, 0, ())


def test_grey_and_opacity(load, made):
    grey = everything(load(channels=1))["x"]
    assert grey.shape[1:] == (6, 6, 1)
    opaque = everything(load(channels=4))["x"]
    assert opaque.shape[1:] == (6, 6, 4)
    assert (opaque[..., 3] == 1.0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, ["image_size=0", "at least 1"]),
        ({"channels": 2}, ["channels=2", "1, 3 or 4"]),
        ({"crop": "centre"}, ["crop='centre'", "did you mean 'center'"]),
        ({"crop": "random"}, ["crop='random' needs", "image_size"]),
        ({"background": "whit"}, ["background='whit'", "'white'"]),
        ({"labels": "nune"}, ["labels='nune'", "did you mean 'none'"]),
        ({"captions": "atuo"}, ["captions='atuo'", "did you mean 'auto'"]),
        ({"text_length": 0}, ["text_length=0"]),
        ({"validation_share": 0.0}, ["validation_share=0.0", "between 0 and 1"]),
        ({"validation_share": 1.5}, ["validation_share=1.5"]),
        ({"validation_share": 1e-9}, ["leaves none of the 60 pictures", "for validation"]),
        ({"max_unreadable": -1}, ["max_unreadable=-1"]),
        ({"memory": -1}, ["memory=-1"]),
        ({"workers": 0}, ["workers=0", "or None"]),
        ({"scalars": ("weight", "weight")}, ["scalars", "twice"]),
    ],
)
def test_mistakes_in_options_end_in_one_line(load, name, options, words):
    with pytest.raises(ConfigError) as error:
        load(**options)
    assert str(error.value).startswith(f"data.{name}.")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("", ConfigError, "data.path is not set: name"),
        ("gs://bucket/pictures", ConfigError, "object stores are not supported"),
        ("/no/such/place", DataError, "/no/such/place does not exist"),
    ],
)
def test_paths_that_lead_nowhere(name, path, error, words):
    with pytest.raises(error, match=words) as raised:
        data.load(name, "train", path=path)
    assert "--config.data.path=" in str(raised.value) or "mount it" in str(raised.value)


def test_a_set_of_one_class_is_refused_where_classes_are_asked_for(load, made, name):
    examples = made.Examples.made()
    examples.labels = [1] * made.COUNT
    asked = {"image_folder": "folders", "webdataset": "cls", "parquet": "column"}[name]
    with pytest.raises(ConfigError, match=rf"data\.{name}\.labels='{asked}'") as error:
        load(examples=examples, labels=asked)
    assert "two classes or more" in str(error.value)
    source = load(labels="auto")
    assert source.spec.num_classes == 0
    assert "label" not in everything(source)["conditioning"]


def test_numbers_that_are_no_numbers_or_not_there(load, made):
    examples = made.Examples.made()
    examples.weights[5] = float("nan")
    with pytest.raises(DataError, match=r"weight=nan; expected.* finite number"):
        load(examples=examples)
    with pytest.raises((DataError, ConfigError), match=r"weigth.*did you mean 'weight'"):
        load(scalars=("weigth",))
