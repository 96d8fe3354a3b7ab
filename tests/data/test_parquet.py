"""Parquet files: columns, their types, and row groups that are kept or read again."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import row_groups
from diffusion_jax.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def root(tmp_path, made):
    made.WRITERS["parquet"](tmp_path, made.Examples.made())
    return tmp_path


def load(path, split="train", **options):
    return data.load("parquet", split, path=path, validation_share=0.2, **options)


def write(path, made, **columns):
    """One file of the pictures of the examples, with further columns."""
    pictures = pa.array(made.Examples.made().pictures, pa.binary())
    pq.write_table(pa.table({"image": pictures, **columns}), path, row_group_size=11)


def labels_by_number(source, made):
    batch = source.fetch(np.arange(len(source)))
    return dict(zip(made.numbers_of(batch["x"]), batch["conditioning"]["label"], strict=True))


def test_names_of_classes_come_from_hugging_face_s_own_description(root):
    assert load(root).spec.classes == ("bird", "cat", "dog")


def test_labels_may_be_integers_or_names(tmp_path, made):
    write(tmp_path / "a.parquet", made, label=pa.array([n % 4 for n in range(60)], pa.uint8()))
    source = load(tmp_path)
    assert (source.spec.num_classes, source.spec.classes) == (4, ())
    assert all(label == n % 4 for n, label in labels_by_number(source, made).items())
    write(tmp_path / "a.parquet", made, kind=["zoo" if n % 2 else "ant" for n in range(60)])
    source = load(tmp_path / "a.parquet", label_column="kind")
    assert source.spec.classes == ("ant", "zoo")
    assert all(label == n % 2 for n, label in labels_by_number(source, made).items())
    assert load(tmp_path / "a.parquet").spec.num_classes == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "img"}, r"^data\.parquet\.image_column='img' is unknown.*image, label"),
        ({"image_column": "imagee"}, "did you mean 'image'"),
        ({"labels": "column", "label_column": "lable"}, r"label_column='lable'.*'label'"),
        ({"captions": "column", "text_column": "caption"}, r"text_column='caption'"),
        ({"scalars": ("height",)}, r"data\.parquet\.scalars='height'.*weight"),
    ],
)
def test_a_column_that_is_not_there(root, options, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(root, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "text"}, "the column 'text' holds string; expected the bytes"),
        ({"label_column": "weight"}, "'weight' holds double; expected integers or names"),
        ({"text_column": "weight"}, "'weight' holds double; expected text"),
        ({"scalars": ("text",)}, "'text' holds string; expected numbers"),
    ],
)
def test_a_column_of_another_type(root, options, words):
    with pytest.raises(DataError, match=words):
        load(root, **options)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0, -1] * 30}, r"a\.parquet, row 1: label=-1; expected 0, 1, 2"),
        ({"label": [0, None] * 30}, r"row 1: 'label' is null \(30 such rows\)"),
        ({"text": ["x"] * 59 + [None]}, r"row 59: 'text' is null \(1 such rows\)"),
    ],
)
def test_rows_that_lack_something(tmp_path, made, columns, words):
    write(tmp_path / "a.parquet", made, **columns)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "a.parquet")


def test_pictures_that_are_null_are_unreadable(tmp_path, made):
    pictures = made.Examples.made().pictures
    pictures[8] = None
    pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 8: it has no bytes \(null\)"):
        load(tmp_path)


def test_damaged_and_unlike_files(root, made):
    content = (root / "data-1.parquet").read_bytes()
    for damaged in (b"", b"no parquet", content[: len(content) // 2]):
        (root / "data-1.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"data-1\.parquet cannot be read as Parquet") as error:
            load(root)
        assert "\n" not in str(error.value)
    write(root / "data-1.parquet", made)
    with pytest.raises(DataError, match=r"data-1\.parquet has other columns \(image\) than"):
        load(root)


def test_a_damaged_row_group_is_named(root, made):
    path = root / "data-1.parquet"
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data-1\.parquet cannot be read as Parquet"):
        load(root)


def test_no_rows(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="have no rows"):
        load(tmp_path)


def test_row_groups_are_read_once_while_they_fit_and_forgotten_when_not(root, made, monkeypatch):
    def opened():
        return row_groups.open_row_groups(sorted(map(str, root.glob("*"))), "image", "field")

    groups = opened()
    loads, load_group = [], groups._load
    monkeypatch.setattr(groups, "_load", lambda number: loads.append(number) or load_group(number))
    pictures = made.Examples.made().pictures
    order = np.random.default_rng(0).permutation(60)
    for row in order:
        assert groups.read(np.array([row])) == [pictures[row]]
    assert sorted(loads) == list(range(10))
    # One group is always kept; nothing more fits into a byte.
    monkeypatch.setattr(row_groups, "_LEAST", 1)
    groups, loads = opened(), []
    load_group = groups._load
    monkeypatch.setattr(groups, "_load", lambda number: loads.append(number) or load_group(number))
    for row in np.repeat(order, 2):
        assert groups.read(np.array([row])) == [pictures[row]]
    assert 30 < len(loads) <= 60
    assert len(groups._kept) == 1


def test_sets_whose_row_groups_do_not_fit_are_told_how_to_write_them(
    tmp_path, made, caplog, monkeypatch
):
    monkeypatch.setattr(row_groups, "_LEAST", 1)
    examples = made.Examples.made()
    made.WRITERS["parquet"](tmp_path, examples, row_group_size=20)
    source = load(tmp_path, memory=0)
    source.fetch(np.arange(len(source)))
    source.fetch(np.arange(len(source)))
    warnings = [m for m in caplog.messages if "are read whole for one picture" in m]
    assert len(warnings) == 1
    assert "groups of 20 rows" in warnings[0]
    assert f"row_group_size={row_groups._LARGE}" in warnings[0]


def test_without_pyarrow_one_line_says_what_to_type(root):
    program = f"""
import sys
sys.modules["pyarrow"] = None
from diffusion_jax import data
try:
    data.load("parquet", "train", path={str(root)!r})
except data.registry.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = "data.name='parquet' needs pyarrow; type: pip install 'diffusion-jax[parquet]'\n"
    assert done.stdout == expected, done.stderr


def test_labels_beyond_32_bits_are_no_other_class(tmp_path, made):
    write(tmp_path / "a.parquet", made, label=pa.array([2**32 + n % 2 for n in range(60)]))
    with pytest.raises(DataError, match=r"row 1: label=4294967297; expected 0 to 999999999"):
        load(tmp_path)


def test_columns_whose_types_differ_between_files(tmp_path, made):
    write(tmp_path / "a.parquet", made, label=pa.array([n % 2 for n in range(60)], pa.int64()))
    write(tmp_path / "b.parquet", made, label=["ant" if n % 2 else "zoo" for n in range(60)])
    with pytest.raises(DataError, match=r"b\.parquet: .*'label' holds string; expected int64, as"):
        load(tmp_path)
