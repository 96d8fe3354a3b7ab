"""The background thread: order, errors, waiting time, and leaving."""

from __future__ import annotations

import threading
import time

import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError, DataError


def test_items_come_in_order_and_end():
    with data.Prefetcher(lambda q: q * 10, 6, 3, stop=20, depth=2) as batches:
        assert list(batches) == [(q, q * 10) for q in (6, 9, 12, 15, 18)]
        assert list(batches) == []


def test_transfer_runs_in_the_background_thread():
    consumer = threading.get_ident()
    with data.Prefetcher(
        lambda q: q, 0, 1, stop=3, transfer=lambda item: (item, threading.get_ident())
    ) as batches:
        items = [item for _, item in batches]
    assert [item for item, _ in items] == [0, 1, 2]
    assert all(thread != consumer for _, thread in items)


def fail_at_four(item):
    if item == 4:
        raise KeyError("the fifth\nbatch")
    return item


def test_a_failure_arrives_at_its_position_after_the_good_ones():
    with data.Prefetcher(fail_at_four, 0, 2) as batches:
        assert next(batches) == (0, 0)
        assert next(batches) == (2, 2)
        for _ in range(2):
            with pytest.raises(DataError, match="position 4 failed: KeyError") as error:
                next(batches)
            assert "\n" not in str(error.value)
            assert isinstance(error.value.__cause__, KeyError)


def test_a_failed_transfer_is_no_fault_of_the_data():
    with data.Prefetcher(lambda q: q, 0, 2, transfer=fail_at_four) as batches:
        assert [next(batches)[0], next(batches)[0]] == [0, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="the fifth"):
                next(batches)


@pytest.mark.parametrize("error", [DataError("the shard is cut short"), ConfigError("no")])
def test_errors_of_the_house_pass_unchanged(error):
    def make(position):
        raise error

    with data.Prefetcher(make, 0, 1) as batches, pytest.raises(type(error)) as raised:
        next(batches)
    assert raised.value is error


def test_no_more_is_made_than_fits_the_queue():
    made = []
    with data.Prefetcher(lambda q: made.append(q), 0, 1, depth=3):
        deadline = time.monotonic() + 5.0
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.25)
        assert len(made) == 4  # three in the queue, one in the hand of the thread


@pytest.mark.parametrize("taken", [0, 2])
def test_closing_ends_the_thread_with_the_queue_full(taken):
    before = threading.active_count()
    batches = data.Prefetcher(lambda q: q, 0, 1, depth=1)
    for _ in range(taken):
        next(batches)
    began = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - began < 2.0
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_waiting_time_is_the_consumers():
    def slow(position):
        time.sleep(0.1)
        return position

    with data.Prefetcher(slow, 0, 1, stop=3) as batches:
        list(batches)
        assert 0.25 < batches.waited < 3.0
    with data.Prefetcher(lambda q: q, 0, 1, stop=3, depth=3) as batches:
        time.sleep(0.3)
        list(batches)
        assert batches.waited < 0.1


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 1, "depth": 0}])
def test_strides_and_depths_are_positive(options):
    with pytest.raises(ValueError, match="at least 1"):
        data.Prefetcher(lambda q: q, 0, **options)
