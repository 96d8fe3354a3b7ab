"""Start-up, agreement on SIGTERM and global batches, with real processes."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

PRELUDE = """
import os, signal, time
from diffusion_jax import errors
from diffusion_jax.parallel import arrays, distributed, mesh
"""


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DIFFUSION_JAX_")}
    return {**kept, **{name: str(value) for name, value in changes.items()}}


def start(body, **changes):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(body):
    port = free_port()
    return [
        start(
            body,
            DIFFUSION_JAX_COORDINATOR=f"127.0.0.1:{port}",
            DIFFUSION_JAX_NUM_PROCESSES=2,
            DIFFUSION_JAX_PROCESS_ID=i,
            DIFFUSION_JAX_CPU_DEVICES=4,
        )
        for i in range(2)
    ]


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_process_alone_may_be_suspended_for_longer_than_a_heartbeat():
    body = """
distributed.initialize(heartbeat_timeout=1)
print("up", flush=True)
time.sleep(4)
import jax
print(jax.device_count())
"""
    process = start(body, DIFFUSION_JAX_CPU_DEVICES=1)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    code, out, err = finish(process)
    assert (code, out) == (0, "1\n"), err


def test_one_process_starts_on_localhost_past_a_proxy_and_only_once():
    body = """
distributed.initialize(cpu_devices=3, initialization_timeout=10)
distributed.initialize()
import jax
print(jax.distributed.is_initialized(), jax.process_count(), jax.device_count())
"""
    code, out, err = finish(
        start(body, http_proxy="http://127.0.0.1:9", grpc_proxy="http://127.0.0.1:9")
    )
    assert (code, out.split(), err) == (0, ["True", "1", "3"], "")


def test_sigterm_ends_in_a_step_that_was_agreed_on():
    body = """
distributed.initialize()
for step in range(1000):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if distributed.reached_preemption(step):
        print("agreed")
        raise SystemExit(75)
    time.sleep(0.01)
"""
    code, out, _ = finish(start(body))
    assert (code, out) == (75, "agreed\n")


def test_sigterm_ends_a_program_that_does_not_agree():
    body = """
distributed.initialize(agree_on_sigterm=False)
assert not distributed.reached_preemption(0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""
    code, _, _ = finish(start(body))
    assert code == -15


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import jax; jax.devices(); distributed.initialize()", "too late"),
        ("distributed.initialize('localhost', 1, 0)", "expected host:port"),
        ("distributed.initialize('localhost:1', 2)", "PROCESS_ID"),
        ("distributed.initialize('localhost:1', 2, 2)", "process_id=2 is outside 0..1"),
        ("distributed.initialize('localhost:1', 0, 0)", "num_processes=0"),
        (
            "import socket; s = socket.create_server(('127.0.0.1', 0))\n"
            "distributed.initialize(f'127.0.0.1:{s.getsockname()[1]}', 1, 0)",
            "expected a free port",
        ),
        (
            "os.environ['DIFFUSION_JAX_CPU_DEVICES'] = 'x'; distributed.initialize()",
            "DIFFUSION_JAX_CPU_DEVICES='x' (cpu_devices) is no whole number",
        ),
        (
            "os.environ['DIFFUSION_JAX_CPU_DEVICES'] = '0'; distributed.initialize()",
            "cpu_devices=0 (DIFFUSION_JAX_CPU_DEVICES) must be at least 1",
        ),
        ("distributed.initialize(cpu_devices=-2)", "cpu_devices=-2 "),
    ],
)
def test_mistakes_end_in_one_line(body, words):
    code, _, err = finish(start(body))
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("diffusion_jax.errors.ConfigError: ")
    assert words in last


def test_two_processes_share_batches_and_agree_on_a_step():
    body = """
distributed.initialize(heartbeat_timeout=10)
import jax
import numpy as np
me = jax.process_index()
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
both = mesh.make_mesh(data=2, fsdp=4)
rows = mesh.process_rows(both, 16)
np.testing.assert_array_equal(rows, np.arange(8) + 8 * me)
# Devices of both processes hold each row: each supplies all of them.
assert len(mesh.process_rows(mesh.make_mesh(data=1, tensor=8), 16)) == 16
# On a torus of hosts the rows of a process are no single block.
devices = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(8, 1, 1, 1)
torus = jax.sharding.Mesh(devices, mesh.AXES)
apart = mesh.process_rows(torus, 16)
np.testing.assert_array_equal(apart, np.arange(16).reshape(4, 2, 2)[:, me].ravel())
dealt = arrays.global_batch({"x": apart.astype(np.float32)}, torus)
np.testing.assert_array_equal(arrays.gather(dealt)["x"], np.arange(16))
import time
from jax.experimental import multihost_utils
def make():
    time.sleep(0.0 if me else 0.3)
    return int(time.monotonic() * 1e3) % 10**9
values = [{"a": None}, {"b": ["long" * 50, 2**40, "\\u00e9"]}]
assert distributed.gather_json(values[me]) == values
times = multihost_utils.process_allgather(np.int32(distributed.main_first(make)))
assert times[0] <= times[1], times
# What process 0 computed, bit for bit, though no device has 64 bits; the other is not asked.
found = distributed.by_main(lambda: {"a": np.arange(3) / 3, "b": np.zeros((0, 2), np.uint8)})
assert (found["a"] == np.arange(3) / 3).all() and found["b"].shape == (0, 2)
assert distributed.by_main(lambda: {"me": np.asarray(me)})["me"] == 0
def fails():
    raise errors.DataError("cannot be read")
try:
    distributed.by_main(fails)
except errors.DataError as error:
    assert str(error) == "process 0 of the run: " * me + "cannot be read"
else:
    raise AssertionError("the error is lost")
batch = arrays.global_batch({"x": rows.astype(np.float32), "id": rows}, both)
assert batch["x"].shape == (16,)
np.testing.assert_array_equal(arrays.gather(batch)["x"], np.arange(16))
total = jax.jit(lambda x: x.sum())(batch["x"])
assert arrays.to_host(total) == 120
try:
    arrays.to_host(batch)
except ValueError as error:
    assert "x with shape (16,)" in str(error)
else:
    raise AssertionError("read a part of an array as the whole")
for step in range(1000):
    if step == 3 and me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if distributed.reached_preemption(step):
        print("agreed on", step)
        raise SystemExit(75)
    time.sleep(0.01)
"""
    results = [finish(process) for process in start_two(body)]
    agreed = [out.splitlines()[-1] if out else err for _, out, err in results]
    assert [code for code, _, _ in results] == [75, 75], results
    assert agreed[0].startswith("agreed on")
    assert agreed[0] == agreed[1]
