"""TFDS image sets, on a small one that is written here record by record."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError, DataError

NAME = "tiny_shapes"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (16, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(0, 3, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_tfds, images, labels):
    path = tmp_path_factory.mktemp("tfds")
    write_tfds(path, images, labels)
    return path


def load(root, split="train", **options):
    return data.load("tfds", split, **({"name": NAME, "data_dir": root} | options))


def everything(source):
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_records_come_back_with_their_labels_and_ids(root, images, labels, memory):
    for split, ids in (("train", np.arange(4, 16)), ("validation", np.arange(4))):
        source = load(root, split, memory=memory)
        assert isinstance(source, data.Source)
        batch = everything(source)
        np.testing.assert_array_equal(batch["id"], ids)
        np.testing.assert_allclose(batch["x"] * 127.5 + 127.5, images[ids], atol=1e-4)
        np.testing.assert_array_equal(batch["conditioning"]["label"], labels[ids])
        assert (batch["x"].dtype, batch["conditioning"]["label"].dtype) == (np.float32, np.int32)
    assert source.spec == data.DataSpec(
        shape=(6, 5, 3), kind="image", num_classes=3, classes=("disc", "ring", "bar")
    )


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_examples_keep_their_ids_in_parts_of_splits(root, images, memory):
    options = {"train": "train[25%:]+test[:1]", "validation": "train[:25%]", "memory": memory}
    train, held_out = load(root, **options), load(root, "validation", **options)
    assert everything(train)["id"].tolist() == [*range(7, 16), 0]
    assert everything(held_out)["id"].tolist() == [4, 5, 6]
    picked = train.fetch(np.array([9, 0, 4]))
    assert picked["id"].tolist() == [0, 7, 11]
    np.testing.assert_allclose(picked["x"] * 127.5 + 127.5, images[[0, 7, 11]], atol=1e-4)


def test_image_size_and_flip(root, images):
    source = load(root, image_size=3, flip=True)
    assert source.spec.shape == (3, 3, 3)
    plain = source.fetch(np.zeros(64, int))["x"]
    flipped = source.fetch(np.zeros(64, int), np.arange(64))["x"]
    mirrored = (flipped == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 10 < mirrored.sum() < 54
    held_out = load(root, "validation", flip=True)
    np.testing.assert_array_equal(
        held_out.fetch(np.arange(4), np.arange(4))["x"], everything(held_out)["x"]
    )


def test_images_of_mixed_sizes_need_a_size(write_tfds, tmp_path, labels):
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 20, (16, 2))
    mixed = [rng.integers(0, 256, (h, w), dtype=np.uint8) for h, w in sizes]
    write_tfds(tmp_path, mixed, labels, shape=("-1", "-1", "3"))
    with pytest.raises(ConfigError, match=r"data\.tfds\.image_size is not set"):
        load(tmp_path)
    batch = everything(load(tmp_path, image_size=8))
    assert batch["x"].shape == (12, 8, 8, 3)
    # Grey pictures in a set of three channels are grey, not red.
    np.testing.assert_array_equal(batch["x"][..., 0], batch["x"][..., 2])


def test_neither_tensorflow_is_imported_nor_is_it_needed(root):
    program = f"""
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
        None if name.split(".")[0] == "tensorflow" else find(name, path, target)
)
import numpy as np
from diffusion_jax import data
source = data.load("tfds", "train", name={NAME!r}, data_dir={str(root)!r})
assert source.fetch(np.arange(3))["x"].shape == (3, 6, 5, 3)
try:
    import tensorflow
except ImportError:
    print("read without")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "read without", result.stderr[-2000:]


def test_tensorflow_stays_out_where_it_is_installed(root):
    program = f"""
import sys
from diffusion_jax import data
data.load("tfds", "train", name={NAME!r}, data_dir={str(root)!r})
print("tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "tiny_shape"}, ["data.tfds.name='tiny_shape'", "no TFDS data set"]),
        ({"name": "mnits"}, ["data.tfds.name='mnits'", "did you mean 'mnist'"]),
        ({"train": "trian"}, ["data.tfds.train='trian'", "did you mean 'train'"]),
        ({"validation": "train[:1"}, ["data.tfds.validation='train[:1'", "test, train"]),
        ({"validation": "train[90%:]"}, ["overlaps", "train='train[:95%]'"]),
        ({"train": "train[:0]"}, ["data.tfds.train='train[:0]' has no examples"]),
        ({"image_size": 0}, ["data.tfds.image_size=0", "at least 1"]),
    ],
)
def test_mistakes_in_options_end_in_one_line(root, options, words):
    with pytest.raises(ConfigError) as error:
        load(root, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("damage", ["short", "empty", "missing"])
def test_a_damaged_shard_is_named(root, tmp_path, damage, memory):
    shutil.copytree(root / NAME, tmp_path / NAME)
    (shard,) = (tmp_path / NAME / "1.0.0").glob("*train*-00001-of-*")
    if damage == "missing":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2] if damage == "short" else b"")
    with pytest.raises(DataError, match=str(shard)) as error:
        everything(load(tmp_path, memory=memory))
    assert "\n" not in str(error.value)
    assert len(everything(load(tmp_path, "validation"))["id"]) == 4


def test_records_without_an_image_are_counted_named_and_limited(
    write_tfds, tmp_path, images, labels, caplog
):
    write_tfds(tmp_path, images, labels, damaged=(6, 13))
    with pytest.raises(DataError, match="max_unreadable=0") as error:
        load(tmp_path)
    assert "train.array_record-00000-of-00002, record 2" in str(error.value)
    with pytest.raises(DataError, match="2 unreadable pictures"):
        load(tmp_path, max_unreadable=1)

    with caplog.at_level("WARNING"):
        load(tmp_path, max_unreadable=2)
    assert "00000-of-00002, record 2" in caplog.text
    assert "00001-of-00002, record 2" in caplog.text
    # The next one stands in the place of each, so that the number of examples does not change.
    expected = [i + (i in (6, 13)) for i in range(4, 16)]
    for memory in (1 << 20, 0):
        batch = everything(load(tmp_path, max_unreadable=2, memory=memory))
        assert batch["id"].tolist() == expected
        np.testing.assert_allclose(batch["x"] * 127.5 + 127.5, images[expected], atol=1e-4)
        np.testing.assert_array_equal(batch["conditioning"]["label"], labels[expected])

    with pytest.raises(DataError, match="00001-of-00002, record 2"):
        load(tmp_path, memory=0, max_unreadable=1).fetch(np.array([2, 9]))


def test_a_label_outside_the_classes_is_refused(write_tfds, tmp_path, images, labels):
    write_tfds(tmp_path, images, np.where(np.arange(16) == 9, -1, labels))
    with pytest.raises(DataError, match=r"record 5: label=\[-1\]; expected one of 0 to 2"):
        load(tmp_path)


@pytest.mark.slow
def test_what_another_file_format_is_told_converts_it(tmp_path):
    """TFDS writes a set as TFRecord; the command of the message is typed; nothing has changed."""
    program = f"""
import numpy as np, tensorflow as tf, tensorflow_datasets as t
rng = np.random.default_rng(0)
features = t.features.FeaturesDict({{
    "image": t.features.Image(shape=(6, 5, 3), encoding_format="jpeg"),
    "label": t.features.ClassLabel(names=["disc", "ring", "bar"]),
}})
splits = {{
    name: tf.data.Dataset.from_tensor_slices({{
        "image": rng.integers(0, 255, (count, 6, 5, 3)).astype("uint8"),
        "label": np.arange(count) % 3,
    }}) for name, count in (("train", 12), ("test", 4))
}}
t.dataset_builders.store_as_tfds_dataset(
    "stored", "1.0.0", features, splits, data_dir={str(tmp_path / "old")!r},
    file_format="tfrecord", disable_shuffling=True)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)
    with pytest.raises(DataError, match="is stored as tfrecord; expected array_record") as error:
        load(tmp_path / "old", name="stored")
    assert "\n" not in str(error.value)
    command = re.search(r"type: (python -c \".*?\");", str(error.value))[1]
    command = command.replace("python", sys.executable, 1)
    command = command.replace("'DIR'", f"'{tmp_path / 'new'}'")
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=300)
    source = load(tmp_path / "new", name="stored")
    assert len(source) == 12
    assert everything(source)["conditioning"]["label"].tolist() == [0, 1, 2] * 4
    assert source.spec.classes == ("disc", "ring", "bar")


class Unprepared:
    """A builder that has nothing yet; preparing it brings the data set of the fixture."""

    url_infos = {"https://data.example.org/images.zip": None}  # noqa: RUF012

    def __init__(self, builder, failure=None):
        self.builder, self.failure, self.calls = builder, failure, []

    def __getattr__(self, name):
        return getattr(self.builder, name)

    def is_prepared(self):
        return False

    def download_and_prepare(self, **options):
        self.calls.append(options)
        if self.failure:
            raise self.failure


@pytest.fixture
def unprepared(root, monkeypatch):
    import tensorflow_datasets

    builder = Unprepared(tensorflow_datasets.builder(NAME, data_dir=root))
    monkeypatch.setattr(tensorflow_datasets, "builder", lambda name, data_dir: builder)
    # Exceptions from a proxy that is not there, as the start of a distributed run leaves them.
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    return builder


def answer(server, timeout):
    assert server == ("data.example.org", 443)
    return socket.socket()


def refuse(server, timeout):
    raise OSError("no address")


def test_a_missing_data_set_is_prepared_where_there_is_a_network(unprepared, root, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", answer)
    assert len(load(root)) == 12
    assert unprepared.calls == [{"file_format": "array_record"}]


def test_a_missing_data_set_without_a_network_says_what_to_type(unprepared, root, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(DataError, match="no server of it answers") as error:
        load(root)
    assert "--config.data.data_dir=DIR" in str(error.value)
    assert unprepared.calls == []
    # What it says can be typed.
    program = re.search(r'type: python -c "(.*?)"', str(error.value))[1]
    exec(program)
    assert unprepared.calls == [{"file_format": "array_record"}]


def test_behind_a_proxy_the_download_is_tried(unprepared, root, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert len(load(root)) == 12
    assert len(unprepared.calls) == 1


def test_a_failing_download_says_why_and_what_to_type(unprepared, root, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", answer)
    unprepared.failure = RuntimeError("checksum\ndiffers")
    with pytest.raises(DataError, match=r"download failed \(checksum differs\); .*python -c"):
        load(root)


@pytest.mark.slow
def test_the_mnist_config_takes_a_step(start_door, root, tmp_path):
    """Its own network and sizes, on the small set of this file."""
    code, out, err = start_door(
        "main",
        "--config=configs/mnist.py:smoke",
        f"--config.data.data_dir={root}",
        f"--config.data.tfds.name={NAME}",
        "--config.data.tfds.image_size=28",
        "--config.batch_size=4",
        "--config.steps=1",
        "--config.logging.tensorboard=False",
        f"--workdir={tmp_path / 'run'}",
    ).wait(240)
    assert code == 0, err
    assert "1 steps done" in out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert np.isfinite(rows[0]["train/loss"])
    assert np.isfinite(rows[1]["val/loss_ema"])
