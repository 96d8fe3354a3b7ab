"""Threads that take tasks side by side and hand results and errors back in order."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from diffusion_jax.data.workers import Workers, cores, workers


def test_results_come_in_the_order_of_the_tasks():
    pool = Workers(3)
    gates = [threading.Event() for _ in range(3)]

    def task(number):
        # The last to start is the first to end.
        if number < 2:
            assert gates[number + 1].wait(10)
        gates[number].set()
        return number * number

    assert pool.run(task, range(3)) == [0, 1, 4]
    assert pool.run(task, []) == []


def test_as_many_run_at_once_as_there_are_workers():
    pool, meet = Workers(4), threading.Barrier(4, timeout=10)
    assert sorted(pool.run(lambda _: meet.wait(), range(4))) == [0, 1, 2, 3]


def test_the_first_error_in_the_order_of_the_tasks_arrives_after_all_have_ended():
    pool, done = Workers(2), []

    def task(number):
        if number in (2, 5):
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError, match="2"):
        pool.run(task, range(8))
    assert sorted(done) == [0, 1, 3, 4, 6, 7]
    # The threads live on.
    assert pool.run(lambda number: number + 1, range(5)) == [1, 2, 3, 4, 5]


def test_several_threads_may_ask_at_once():
    pool, results = Workers(2), {}

    def ask(name):
        results[name] = pool.run(lambda number: (name, number), range(50))

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {name: [(name, n) for n in range(50)] for name in "abcd"}


def test_equal_numbers_share_their_threads():
    assert workers(2) is workers(2)
    assert workers(2) is not workers(3)
    assert workers().count == min(cores(), 16)


def test_a_read_that_hangs_does_not_keep_the_process_from_leaving():
    program = """
import threading
from diffusion_jax.data.workers import Workers
pool = Workers(1)
started = threading.Event()
hang = lambda _: (started.set(), threading.Event().wait())
threading.Thread(target=pool.run, args=(hang, [0]), daemon=True).start()
started.wait()
print("leaving")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("leaving\n", 0), done.stderr
