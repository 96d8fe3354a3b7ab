"""Tar shards: where members lie, what makes a sample, and shards that are damaged."""

from __future__ import annotations

import gzip
import json
import tarfile

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path, made):
    made.WRITERS["webdataset"](tmp_path, made.Examples.made())
    return tmp_path


def load(path, split="train", **options):
    return data.load("webdataset", split, path=path, validation_share=0.2, **options)


def shown(path, made, **options):
    """Numbers of all examples of both splits, and their labels."""
    sources = [load(path, split, **options) for split in ("train", "validation")]
    batches = [source.fetch(np.arange(len(source))) for source in sources]
    x = np.concatenate([batch["x"] for batch in batches])
    return sorted(made.numbers_of(x)), batches


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("part-{00..02}.tar", 3),
        ("part-{0..02}.tar", 3),
        ("part-0{1,2}.tar", 2),
        ("*.tar", 3),
        ("part-0[02].tar", 2),
        ("part-01.tar", 1),
        ("", 3),
        ("{part-00,part-0{1..1}}.tar", 2),
    ],
)
def test_patterns_name_shards(root, made, pattern, shards):
    numbers, _ = shown(root / pattern, made)
    assert len(numbers) == 20 * shards


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_all_dialects_of_tar(tmp_path, made, format_):
    examples = made.Examples.made()
    with tarfile.open(tmp_path / "long.tar", "w", format=format_) as tar:
        tar.addfile(tarfile.TarInfo("./"))
        for number in range(made.COUNT):
            key = f"./{'long' * 20}/{'name' * 20}{number}"
            made.add_member(tar, f"{key}.json", json.dumps({"text": f"no. {number}"}).encode())
            made.add_member(tar, f"{key}.PNG", examples.pictures[number])
    numbers, batches = shown(tmp_path / "long.tar", made)
    assert numbers == list(range(made.COUNT))
    batch = batches[0]
    for number, tokens in zip(
        made.numbers_of(batch["x"]), batch["conditioning"]["text"], strict=True
    ):
        assert bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode() == f"no. {number}"


def test_ids_stay_when_shards_are_added_or_moved(root, made, tmp_path):
    from diffusion_jax.data.identity import stable_ids

    source = load(root / "part-01.tar")
    numbers = made.numbers_of(source.fetch(np.arange(len(source)))["x"])
    names = [f"part-01.tar/inner/{number % 20:04d}" for number in numbers]
    np.testing.assert_array_equal(source.ids(np.arange(len(source))), stable_ids(names))
    everyone = load(root)
    assert set(source.ids(np.arange(len(source)))) <= set(everyone.ids(np.arange(len(everyone))))


def test_two_shards_of_one_name_do_not_share_ids(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "part-00.tar").write_bytes((root / "part-00.tar").read_bytes())
    with pytest.raises(DataError, match=r"'part-00\.tar/inner/00.*have the same name \(20 such"):
        load(f"{{{root},{other}}}/part-00.tar")


def rewrite(path, change, made):
    """Writes a shard again with its members passed through `change(name, content)`."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            for changed in change(name, content):
                made.add_member(tar, *changed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, c: [(n, c)] * (1 + (n == "inner/0003.png")), "0003' has two members of kind"),
        (lambda n, c: [] if n == "inner/0003.png" else [(n, c)], "1 of 60 samples have no pict"),
        (lambda n, c: [] if n == "inner/0003.cls" else [(n, c)], "1 of 60 samples have no cls"),
        (lambda n, c: [] if n == "inner/0003.txt" else [(n, c)], "no txt, the first part-01.tar/"),
        (lambda n, c: [(n, b"-1" if n == "inner/0003.cls" else c)], "0003.cls holds '-1'"),
        (lambda n, c: [(n, b"cat" if n == "inner/0003.cls" else c)], "0003.cls holds 'cat'"),
        (lambda n, c: [(n, b"\xff" if n == "inner/0003.txt" else c)], "text is not UTF-8"),
        (lambda n, c: [(n, c)] + [(n[:-3] + "jpg", c)] * n.endswith("3.png"), "by image_suffix"),
    ],
)
def test_samples_that_are_not_whole(root, made, change, words):
    rewrite(root / "part-01.tar", change, made)
    with pytest.raises(DataError, match=words) as error:
        load(root)
    assert "part-01.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_json_that_is_none(root, made):
    for content, words in ((b"{'a': 1}", "is not JSON"), (b"[]", "expected an object")):

        def change(name, old, content=content):
            return [(name, content if name == "inner/0003.json" else old)]

        rewrite(root / "part-01.tar", change, made)
        with pytest.raises(DataError, match=words):
            load(root, scalars=("weight",))
        # Without a need for it, it is not read.
        assert load(root).spec.scalars == ()


def test_several_pictures_a_sample_and_other_members(root, made, caplog):
    def change(name, content):
        extra = [(name[:-3] + "seg.png", content), (name[:-3] + "npy", b"x")]
        return [(name, content), *(extra if name.endswith(".png") else [])]

    for shard in root.glob("*.tar"):
        rewrite(shard, change, made)
    assert shown(root, made)[0] == list(range(made.COUNT))
    assert "60 seg.png, 60 npy" in caplog.text
    assert shown(root, made, image_suffix=".seg.png")[0] == list(range(made.COUNT))
    with pytest.raises(DataError, match=r"hold no pictures .* that end in \.webp"):
        load(root, image_suffix="webp")


@pytest.mark.parametrize("end", [100, 512, 700, 5000, -10240, -10241, -12000])
def test_a_shard_cut_short_is_named(root, end):
    path = root / "part-01.tar"
    content = path.read_bytes()
    # The last block that is not of zeros ends the members; from there on nothing is lost.
    members = -(-len(content.rstrip(b"\0")) // 512) * 512
    cut = end if end > 0 else members + end + 10240
    path.write_bytes(content[: min(cut, members)])
    with pytest.raises(DataError, match=r"part-01\.tar (is damaged or cut short|is cut short)"):
        load(root)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (gzip.compress(b"x" * 2000, mtime=0), "is compressed, which allows no random access"),
        (b"no tar file at all" * 100, "is damaged or cut short"),
        (bytes(10240), "has no members"),
    ],
)
def test_what_is_no_shard(root, content, words):
    (root / "part-01.tar").write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        load(root)
    assert "part-01.tar" in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("part-{00..05}.tar", r"part-03\.tar does not exist \(one of 6"),
        ("nothing-*.tar", r"nothing-\*\.tar does not exist"),
        ("empty", r"empty holds no \.tar files"),
    ],
)
def test_patterns_that_name_nothing(root, pattern, words):
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=words):
        load(root / pattern)


def test_a_range_that_counts_down(root):
    with pytest.raises(ConfigError, match=r"\{02\.\.00\} counts down"):
        load(root / "part-{02..00}.tar")


def test_a_shard_that_shrinks_during_a_run_is_named(root):
    source = load(root, memory=0)
    content = (root / "part-02.tar").read_bytes()
    (root / "part-02.tar").write_bytes(content[:3000])
    with pytest.raises(DataError, match=r"part-02\.tar ends before byte"):
        source.fetch(np.arange(len(source)))


def test_what_follows_the_end_mark_is_not_left_aside(root):
    content = (root / "part-00.tar").read_bytes()
    whole = root / "part-00.tar"
    whole.write_bytes(content + bytes(3 << 20))
    load(whole)
    whole.write_bytes(content + (root / "part-01.tar").read_bytes())
    with pytest.raises(DataError, match=r"part-00\.tar goes on after its end mark at byte \d+"):
        load(whole)


def test_links_in_a_shard_are_counted(tmp_path, made, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, picture in enumerate(made.Examples.made().pictures):
            made.add_member(tar, f"{number:03d}.png", picture)
        for name, kind in (("100.png", tarfile.LNKTYPE), ("101.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "000.png"
            tar.addfile(link)
    load(tmp_path)
    assert "left aside: 2 links or special files" in caplog.text


def with_labels(folder, made, highest):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, picture in enumerate(made.Examples.made().pictures):
            made.add_member(tar, f"{number:03d}.png", picture)
            made.add_member(tar, f"{number:03d}.cls", str(highest * (number % 2)).encode())


def test_labels_far_between_make_one_warning(tmp_path, made, caplog):
    with_labels(tmp_path, made, 49_999)
    assert load(tmp_path).spec.num_classes == 50_000
    (message,) = [m for m in caplog.messages if "no picture in training" in m]
    assert "class 1 has no picture in training (nor 49997 others)" in message


def test_labels_far_beyond_the_pictures_are_refused(tmp_path, made):
    with_labels(tmp_path, made, 999_999_998)
    message = r"data\.webdataset\.path: labels of the 60 pictures of .* go up to 999999998; number"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)
