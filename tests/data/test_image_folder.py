"""Folders of pictures: what is found, what is a class, which caption belongs where."""

from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path, made):
    """30 pictures in the classes a, b and c; folders within them make no difference."""
    for number in range(30):
        folder = tmp_path / "set" / "abc"[number % 3] / ("deep/er" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((6, 6, 3), made.Examples.colour(number), np.uint8)
        suffix = "PNG" if number % 2 else "png"
        (folder / f"{number}.{suffix}").write_bytes(made.encoded(pixels))
    return tmp_path / "set"


def load(root, split="train", **options):
    return data.load("image_folder", split, **{"path": root, "validation_share": 0.2, **options})


def everything(*sources):
    batches = [source.fetch(np.arange(len(source))) for source in sources]
    x, ids = (np.concatenate([batch[key] for batch in batches]) for key in ("x", "id"))
    entries = batches[0]["conditioning"]
    return x, ids, {k: np.concatenate([b["conditioning"][k] for b in batches]) for k in entries}


def both(root, **options):
    return everything(load(root, **options), load(root, "validation", **options))


def write_lines(root, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text)


def lines_for(root, **changes):
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
    return [{"file_name": name, "text": f"text of {name}", **changes} for name in names]


def test_the_class_is_the_first_subfolder(root, made):
    x, _, entries = both(root)
    numbers = made.numbers_of(x)
    assert sorted(numbers) == list(range(30))
    assert entries["label"].tolist() == [number % 3 for number in numbers]
    assert load(root).spec.classes == ("a", "b", "c")


def test_ids_are_hashes_of_the_path_below_the_folder(root, made):
    from diffusion_jax.data.identity import stable_ids

    x, ids, _ = both(root)
    names = [
        f"{'abc'[n % 3]}/{'deep/er/' if n % 2 else ''}{n}.{'PNG' if n % 2 else 'png'}"
        for n in made.numbers_of(x)
    ]
    np.testing.assert_array_equal(ids, stable_ids(names))
    # Another place, another way to spell it: the same.
    moved = root.parent / "moved"
    shutil.copytree(root, moved)
    np.testing.assert_array_equal(both(str(moved) + "/./")[1], ids)
    (root.parent / "link").symlink_to(root)
    np.testing.assert_array_equal(both(root.parent / "link")[1], ids)


def test_new_files_move_nobody(root, made):
    before = {split: set(everything(load(root, split))[1]) for split in ("train", "validation")}
    for number in range(20):
        pixels = np.full((6, 6, 3), number, np.uint8)
        (root / "a" / f"0new{number}.png").write_bytes(made.encoded(pixels))
    (root / "b" / "2.png").unlink(missing_ok=True)
    (root / "b" / "4.png").unlink()
    after = {split: set(everything(load(root, split))[1]) for split in ("train", "validation")}
    assert not before["train"] & after["validation"]
    assert not before["validation"] & after["train"]
    common = (before["train"] | before["validation"]) & (after["train"] | after["validation"])
    assert len(common) == 29


def test_loose_pictures_have_no_classes_unless_they_are_asked_for(root, made):
    shutil.copy(root / "a" / "0.png", root / "loose.png")
    assert load(root).spec.num_classes == 0
    with pytest.raises(DataError, match=r"1 pictures lie in no subfolder, the first 'loose\.png'"):
        load(root, labels="folders")
    assert both(root, labels="none")[2] == {}


def test_one_subfolder_is_no_class(root):
    shutil.rmtree(root / "b")
    shutil.rmtree(root / "c")
    assert load(root).spec.num_classes == 0
    with pytest.raises(ConfigError, match="one subfolder 'a'; expected two classes"):
        load(root, labels="folders")


def test_folders_named_after_splits_are_no_classes(root):
    (root / "a").rename(root / "train")
    (root / "b").rename(root / "val")
    shutil.rmtree(root / "c")
    with pytest.raises(ConfigError, match="holds train, val, which are no classes") as error:
        load(root)
    assert f"--config.data.path={root / 'train'}" in str(error.value)
    assert load(root, labels="none").spec.num_classes == 0
    assert load(root / "train").spec.num_classes == 0
    (root / "val").rename(root / "test")
    with pytest.raises(ConfigError, match="test, train.*path=" + str(root / "train")):
        load(root)


def test_a_class_without_training_pictures_is_named(root, made, caplog):
    from diffusion_jax.data.identity import held_out, stable_ids

    name = next(n for n in map(str, range(99)) if held_out(stable_ids([f"d/{n}.png"]), 0.2)[0])
    (root / "d").mkdir()
    (root / "d" / f"{name}.png").write_bytes(made.encoded(np.zeros((6, 6, 3), np.uint8)))
    load(root)
    assert "class 'd' has no picture in training" in caplog.text


@pytest.mark.parametrize("value", [1e39, 10**400, float("inf")])
def test_numbers_beyond_float32_are_refused(root, value):
    lines = lines_for(root, w=1)
    lines[2]["w"] = value
    write_lines(root, lines)
    with pytest.raises(DataError, match=r"line 3: w=.*expected a finite number of float") as error:
        load(root, scalars=("w",))
    assert len(str(error.value)) < 400


def test_numbers_without_captions_are_told_of_the_option(root):
    write_lines(root, [{**line, "text": None} for line in lines_for(root)])
    with pytest.raises(DataError, match=r"expected text \(or captions='none'\)"):
        load(root)


def test_what_is_no_picture_is_counted(root, caplog):
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "more.txt").write_text("x")
    (root / "b" / "README").write_text("x")
    (root / ".DS_Store").write_text("x")
    (root / "a" / "._0.png").write_text("a companion that macOS leaves")
    load(root)
    (message,) = [m for m in caplog.messages if "no pictures" in m]
    assert all(part in message for part in ("2 .txt", "1 without suffix", "2 hidden"))


def test_an_empty_folder_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match="holds no pictures; expected files such as"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no pictures \(but: 1 \.txt\)"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt is no folder"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("a/up", "..", "leads back to a folder that it lies in"),
        ("a/self", ".", "leads back to a folder that it lies in"),
        ("a/again", "../b", "leads to the same folder as"),
        ("a/knot", "knot", "leads to itself"),
    ],
)
def test_links_that_loop_are_named(root, link, target, words):
    (root / link).symlink_to(target)
    with pytest.raises(DataError, match=words) as error:
        load(root)
    assert f"{root}/" in str(error.value)
    assert "\n" not in str(error.value)


def test_links_to_elsewhere_are_followed(root, made, tmp_path):
    (tmp_path / "far").mkdir()
    for number in range(30, 50):
        pixels = np.full((6, 6, 3), made.Examples.colour(number), np.uint8)
        (tmp_path / "far" / f"{number}.png").write_bytes(made.encoded(pixels))
    (root / "d").symlink_to(tmp_path / "far")
    (root / "a" / "50.png").symlink_to(root / "a" / "0.png")
    source = load(root)
    assert source.spec.classes == ("a", "b", "c", "d")
    assert len(both(root)[1]) == 51


def test_links_that_lead_nowhere_and_lost_files_are_unreadable(root):
    (root / "a" / "gone.png").symlink_to("nothing")
    with pytest.raises(DataError, match=r"gone\.png: it cannot be read \(No such file"):
        both(root)
    source = load(root, memory=0, max_unreadable=1)
    (root / "a" / "0.png").unlink()
    (root / "a" / "6.png").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        everything(source)


def test_captions_belong_to_their_files_whatever_their_order(root, made):
    lines = lines_for(root, weight=2)
    lines[3]["file_name"] = "./" + lines[3]["file_name"]
    lines[4]["text"] = ""
    write_lines(root, [*lines[::-1], "", "  "])
    source = load(root, scalars=["weight"], labels="folders")
    assert (source.spec.text_length, source.spec.scalars) == (128, ("weight",))
    x, _, entries = both(root, scalars=["weight"], labels="folders")
    for number, tokens in zip(made.numbers_of(x), entries["text"], strict=True):
        deep = "deep/er/" if number % 2 else ""
        name = f"{'abc'[number % 3]}/{deep}{number}.{'PNG' if number % 2 else 'png'}"
        text = bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode()
        assert text == ("" if name == lines[4]["file_name"] else f"text of {name}")
    assert (entries["scalar"] == 2.0).all()
    # Captions are there: subfolders are classes only on request.
    assert load(root).spec.num_classes == 0
    assert load(root, captions="none").spec.num_classes == 3


def test_numbers_without_captions(root):
    write_lines(root, [{k: v for k, v in li.items() if k != "text"} for li in lines_for(root, w=1)])
    source = load(root, captions="none", scalars=("w",))
    assert (source.spec.text_length, source.spec.num_classes) == (0, 3)
    with pytest.raises(DataError, match="line 1: no 'text'"):
        load(root)


def test_names_match_in_every_unicode_form(root, made):
    name = unicodedata.normalize("NFD", "a/é.png")
    (root / name).write_bytes(made.encoded(np.zeros((6, 6, 3), np.uint8)))
    lines = lines_for(root)
    for line in lines:
        line["file_name"] = unicodedata.normalize("NFC", line["file_name"])
    write_lines(root, lines)
    assert len(both(root)[1]) == 31
    (root / "a" / "é.png").write_bytes(made.encoded(np.zeros((6, 6, 3), np.uint8)))
    with pytest.raises(DataError, match="have the same name"):
        load(root, captions="none")


def test_text_files_beside_the_pictures(root, made):
    for path in [p for p in root.rglob("*") if p.suffix.lower() == ".png"]:
        path.with_suffix(".txt").write_text(f" of {path.stem}\n")
    x, _, entries = both(root, captions="files")
    for number, tokens in zip(made.numbers_of(x), entries["text"], strict=True):
        assert bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode() == f"of {number}"
    (root / "a" / "0.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a/0\.txt cannot be read as UTF-8"):
        load(root, captions="files")
    (root / "a" / "0.txt").unlink()
    with pytest.raises(DataError, match=r"a/0\.txt is missing"):
        load(root, captions="files")
    with pytest.raises(ConfigError, match=r"data\.image_folder\.scalars needs metadata\.jsonl"):
        load(root, captions="files", scalars=("w",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ls: ls[2].update(file_name="a/12.pgn"), "names 1 files .*'a/12.pgn' .line 3.*mean"),
        (lambda ls: ls.pop(5), "has no line for 1 of 30 pictures, the first '.*'; add lines"),
        (lambda ls: ls.append(ls[0]), "line 31: file_name='a/0.png' stands in line 1 already"),
        (lambda ls: ls[1].pop("text"), r"line 2: no 'text'; expected text"),
        (lambda ls: ls[1].update(txt=ls[1].pop("text")), "no 'text' .did you mean 'txt'"),
        (lambda ls: ls[1].update(text=5), "line 2: text=5; expected text"),
        (lambda ls: ls[1].update(text=None), "line 2: text=None; expected text"),
        (lambda ls: ls[1].pop("file_name"), "line 2: no 'file_name'"),
        (lambda ls: ls.insert(1, "{'text': 1}"), "line 2: not JSON"),
        (lambda ls: ls.insert(1, "[1, 2]"), "line 2: expected an object"),
        (lambda ls: ls[7].update(w="heavy"), "line 8: w='heavy'; expected a finite number"),
        (lambda ls: ls[7].update(w=True), "line 8: w=True; expected a finite number"),
        (lambda ls: ls[7].pop("w"), "line 8: no 'w'"),
    ],
)
def test_caption_files_with_mistakes(root, change, words):
    lines = lines_for(root, w=1.5)
    change(lines)
    write_lines(root, lines)
    with pytest.raises(DataError, match=words) as error:
        load(root, scalars=("w",))
    assert str(error.value).startswith(f"{root}/metadata.jsonl")
    assert "\n" not in str(error.value)


def write_rows(root, rows, head=("file_name", "text", "w")):
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([head, *rows])


def rows_for(root):
    return [[line["file_name"], f'a "b", ü\n{number}', number / 8]
            for number, line in enumerate(lines_for(root))]  # fmt: skip


def test_a_table_of_captions_and_numbers(root):
    """As a spreadsheet writes it: with a byte order mark, quoted commas and line breaks."""
    rows = rows_for(root)
    lines = [{"file_name": name, "text": text, "w": number} for name, text, number in rows]
    write_lines(root, lines)
    expected = both(root, scalars=("w",))
    (root / "metadata.jsonl").unlink()
    write_rows(root, rows)
    found = both(root, scalars=("w",))
    np.testing.assert_array_equal(found[1], expected[1])
    for name in ("text", "scalar"):
        np.testing.assert_array_equal(found[2][name], expected[2][name])
    assert found[2]["scalar"].max() == 29 / 8
    # Numbers without captions, and a caption by another name.
    write_rows(root, [row[::2] for row in rows], head=("file_name", "w"))
    assert set(both(root, captions="none", scalars=("w",))[2]) == {"label", "scalar"}
    write_rows(root, rows, head=("file_name", "caption", "w"))
    assert both(root, text_column="caption")[2]["text"].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[2].__setitem__(0, "a/12.pgn"), "names 1 files .*'a/12.pgn' .line 6"),
        (lambda rows: rows.pop(5), "has no line for 1 of 30 pictures"),
        (lambda rows: rows.append(rows[0]), "line 62: file_name='a/0.png' stands in line 2"),
        (lambda rows: rows[1].append("more"), "line 4: 4 values; expected 3.* need quotes"),
        (lambda rows: rows[1].pop(), "line 4: 2 values; expected 3"),
        (lambda rows: rows[7].__setitem__(2, "heavy"), "line 16: w='heavy'; expected a finite"),
        (lambda rows: rows[7].__setitem__(2, "nan"), "line 16: w=nan; expected a finite"),
        (lambda rows: rows[7].__setitem__(2, ""), "line 16: w=''; expected a finite"),
    ],
)
def test_tables_with_mistakes(root, change, words):
    rows = rows_for(root)
    change(rows)
    write_rows(root, rows)
    with pytest.raises(DataError, match=words) as error:
        load(root, scalars=("w",))
    assert str(error.value).startswith(f"{root}/metadata.csv")
    assert "\n" not in str(error.value)


def test_tables_that_are_none(root):
    for content, words in (
        (b'file_name,text\na,"b', "line 2: not CSV"),
        (b"file_name,text,text\n", "line 1: the column 'text' stands there twice"),
        (b"file_name,\xff\n", "is not UTF-8"),
        (b"", "has no line for 30 of 30"),
        (b"name,text\na.png,b\n", "line 2: no 'file_name'"),
    ):
        (root / "metadata.csv").write_bytes(content)
        with pytest.raises(DataError, match=words):
            load(root)
    write_lines(root, lines_for(root))
    with pytest.raises(DataError, match=r"holds metadata\.jsonl and metadata\.csv; expected one"):
        load(root)


def test_a_caption_file_that_is_missing_or_not_utf_8(root):
    for options in ({"captions": "metadata"}, {"scalars": ("w",)}):
        with pytest.raises(
            DataError, match=r"has no metadata\.jsonl or metadata\.csv, which .* needs"
        ):
            load(root, **options)
    (root / "metadata.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"metadata\.jsonl is not UTF-8"):
        load(root)


def test_a_folder_that_may_not_be_read(root, without_rights):
    (root / "b").chmod(0)
    with (
        without_rights(),
        pytest.raises(DataError, match="b cannot be read: Permission denied"),
    ):
        load(root)
    (root / "b").chmod(0o755)


def test_names_that_are_not_utf_8(root, made):
    path = os.fsencode(root / "a") + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(made.encoded(np.full((6, 6, 3), made.Examples.colour(55), np.uint8)))
    assert 55 in made.numbers_of(both(root)[0])
