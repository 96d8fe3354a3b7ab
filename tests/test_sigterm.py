"""SIGTERM before there is a step to agree on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from diffusion_jax import sigterm

CODE = """
import os, signal, sys, time
from diffusion_jax import sigterm
def end():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
{body}
"""


def run(body):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(body=body)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("with sigterm.leaves_at_once(): end()", 75),
        # Who takes it over keeps it; here nobody does.
        (
            "with sigterm.leaves_at_once():\n"
            "    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\nend()",
            3,
        ),
        ("try:\n    with sigterm.leaves_at_once(): 1 / 0\nexcept ZeroDivisionError: end()", -15),
    ],
)
def test_whose_signal_it_is(body, code):
    got, err = run(body)
    assert got == code
    assert err == (sigterm.MESSAGE if code == 75 else "")


def test_a_process_that_waits_for_the_others_leaves_at_once(start_door, tmp_path):
    """The main thread is deep in the runtime, where no handler of Python's would run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    door = start_door(
        "main",
        "--config=configs/toy2d.py:smoke",
        f"--workdir={tmp_path}/run",
        DIFFUSION_JAX_COORDINATOR=f"127.0.0.1:{port}",
        DIFFUSION_JAX_NUM_PROCESSES=2,
        DIFFUSION_JAX_PROCESS_ID=0,
    )
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert door.running
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    assert door.running
    door.signal(signal.SIGTERM)
    began = time.monotonic()
    code, _, err = door.wait()
    assert code == 75, err
    assert err == sigterm.MESSAGE
    assert time.monotonic() - began < 10
    assert not os.path.exists(tmp_path / "run")
