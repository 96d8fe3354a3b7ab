"""Batches as pure functions of (seed, position, global batch size)."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.spec import DataSpec
from diffusion_jax.errors import ConfigError, DataError


def numbered(count: int, first_id: int = 1000) -> ArraySource:
    """Examples whose values, labels and ids all tell which they are."""
    indices = np.arange(count)
    return ArraySource(
        spec=DataSpec(shape=(2,), kind="points", num_classes=3),
        x=np.stack([indices, -indices], axis=-1).astype(np.float32),
        example_ids=indices + first_id,
        labels=(indices % 3).astype(np.int32),
    )


# How a 2 x 2 torus of hosts of four devices deals a batch of 16 rows.
INTERLEAVED = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.fixture
def loader():
    return data.Loader(source=numbered(50), batch_size=16, seed=7)


@pytest.mark.parametrize("deal", [[range(16)], [range(8), range(8, 16)], INTERLEAVED])
def test_parts_make_the_global_batch(loader, deal):
    order = np.concatenate([np.array(rows) for rows in deal])
    for position in (0, 16, 40, 1_000_003):
        parts = [
            data.Loader(
                source=loader.source,
                batch_size=16,
                seed=7,
                rows=np.array(rows),
            ).batch(position)
            for rows in deal
        ]
        whole = loader.batch(position)
        for key in ("x", "id"):
            joined = np.concatenate([p[key] for p in parts])
            np.testing.assert_array_equal(joined, whole[key][order])
        labels = np.concatenate([p["conditioning"]["label"] for p in parts])
        np.testing.assert_array_equal(labels, whole["conditioning"]["label"][order])


def test_rows_of_a_batch_belong_together(loader):
    batch = loader.batch(32)
    np.testing.assert_array_equal(batch["x"][:, 0], batch["id"] - 1000)
    np.testing.assert_array_equal(batch["conditioning"]["label"], (batch["id"] - 1000) % 3)
    assert batch["x"].dtype == np.float32
    assert batch["id"].dtype == np.int64


def test_another_batch_size_goes_on_in_the_same_sequence(loader):
    whole = np.concatenate([loader.ids(q) for q in range(0, 320, 16)])
    other = data.Loader(source=loader.source, batch_size=40, seed=7)
    np.testing.assert_array_equal(
        np.concatenate([loader.ids(0), loader.ids(16), *(other.ids(q) for q in (32, 72))]),
        whole[:112],
    )


def test_epochs_show_every_example_once_and_batches_span_them(loader):
    sequence = np.concatenate([loader.ids(q) for q in range(0, 160, 16)])
    epochs = sequence[:150].reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(1000, 1050))
    assert not np.array_equal(epochs[0], epochs[1])


def test_ids_name_the_examples_of_the_batch(loader):
    for position in (0, 48, 1600):
        np.testing.assert_array_equal(loader.ids(position), loader.batch(position)["id"])


def test_seeds_differ(loader):
    other = data.Loader(source=loader.source, batch_size=16, seed=8)
    assert not np.array_equal(loader.ids(0), other.ids(0))


def test_position_is_a_python_int_of_any_size(loader):
    assert loader.batch(2**40)["x"].shape == (16, 2)


def test_an_empty_batch_is_refused():
    with pytest.raises(ConfigError, match=r"^config\.batch_size=0: expected at least 1$"):
        data.Loader(source=numbered(5), seed=0, batch_size=0)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="no examples"):
        data.Loader(source=numbered(0), batch_size=2, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_pass_in_training_and_are_named_in_validation(value):
    source = numbered(20)
    source.x[3, 1] = value
    source.x[11, 0] = value
    # In training the step itself skips such a batch, counts it and names its ids.
    batch = data.Loader(source=source, batch_size=20, seed=0).batch(0)
    bad = ~np.isfinite(batch["x"]).all(axis=1)
    assert sorted(batch["id"][bad]) == [1003, 1011]
    with pytest.raises(DataError, match="2 of 20 examples") as error:
        list(data.sequential_batches(source, 20))
    assert "1003" in str(error.value)
    assert "1011" in str(error.value)


def test_sequential_batches_pad_and_mask_the_last():
    batches = list(data.sequential_batches(numbered(10), 4))
    assert [batch["mask"].tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    ids = np.concatenate([batch["id"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(1000, 1010))
    assert {batch["x"].shape for batch in batches} == {(4, 2)}


def test_sequential_limit_holds_exactly():
    batches = list(data.sequential_batches(numbered(10), 4, 5))
    assert [int(batch["mask"].sum()) for batch in batches] == [4, 1]
    assert [int(b["mask"].sum()) for b in data.sequential_batches(numbered(3), 4, 99)] == [3]


@pytest.mark.parametrize("deal", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
def test_sequential_parts_make_the_global_batches(deal):
    whole = list(data.sequential_batches(numbered(9), 4))
    parts = [list(data.sequential_batches(numbered(9), 4, rows=np.array(rows))) for rows in deal]
    order = np.concatenate(deal)
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        for key in ("x", "id", "mask"):
            joined = np.concatenate([part[number][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key][order])


def test_sequential_arguments_are_checked_at_once():
    with pytest.raises(ConfigError, match="limit=0"):
        data.sequential_batches(numbered(9), 4, 0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        data.sequential_batches(numbered(9), 0)
