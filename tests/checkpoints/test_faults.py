"""Checkpoints under kill -9, a full disk and another number of processes, with real processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from diffusion_jax.checkpoints import Checkpointer

WIDTH, ARRAYS = 2**18, 6

# The state is a pure function of the step: every word follows x -> 1664525 x + 1013904223.
TRAINER = """
import os, sys, time
import jax, jax.numpy as jnp
from diffusion_jax.checkpoints import Checkpointer

WIDTH, ARRAYS = 2**18, 6

def init():
    return {f"w{i}": jnp.arange(WIDTH, dtype=jnp.uint32) + i for i in range(ARRAYS)}

def train(directory):
    update = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 1664525 + 1013904223, state), donate_argnums=0
    )
    checkpointer = Checkpointer(directory, keep_last=2)
    step, state = checkpointer.latest_step() or 0, init()
    if step:
        state, metadata = checkpointer.restore(jax.eval_shape(init))
        assert metadata == {"position": step * 2**40}, metadata
    print("ready", flush=True)
    while True:
        state, step = update(state), step + 1
        checkpointer.save(step, state, {"position": step * 2**40})
"""

ZYGOTE = (
    TRAINER
    + """
# Imports cost more than a life does: every life is forked before JAX starts a device.
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        train(sys.argv[1])
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""
)


def expected(step):
    factor, offset = 1, 0
    for _ in range(step):
        factor, offset = factor * 1664525 % 2**32, (offset * 1664525 + 1013904223) % 2**32
    start = np.arange(WIDTH, dtype=np.uint64)
    return {f"w{i}": ((start + i) * factor + offset).astype(np.uint32) for i in range(ARRAYS)}


def abstract():
    return {f"w{i}": jax.ShapeDtypeStruct((WIDTH,), np.uint32) for i in range(ARRAYS)}


def run(code, *args, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_at_any_moment_leaves_the_newest_whole_step(tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    draw = random.Random(seed)
    zygote = run(ZYGOTE, tmp_path)
    newest, torn = 0, 0
    for life in range(60):
        if life >= 12 and newest and torn:
            break
        zygote.stdin.write("live\n")
        zygote.stdin.flush()
        lines = sorted([zygote.stdout.readline(), zygote.stdout.readline()])
        assert lines[1] == "ready\n", zygote.stderr.read()
        # Lives grow longer where a loaded machine has not saved within the first ones.
        time.sleep(draw.uniform(0, 0.25 + 0.05 * max(life - 11, 0)))
        os.kill(int(lines[0]), signal.SIGKILL)
        assert zygote.stdout.readline() == "dead\n"
        torn += any("tmp" in name for name in os.listdir(tmp_path))
        if not any(name.isdigit() for name in os.listdir(tmp_path)):
            continue
        with Checkpointer(tmp_path, read_only=True) as reader:
            step = reader.latest_step()
            assert step >= newest
            newest = step
            restored, metadata = reader.restore(abstract())
        assert metadata == {"position": step * 2**40}
        for name, value in expected(step).items():
            np.testing.assert_array_equal(restored[name], value)
    zygote.communicate(timeout=30)
    assert newest > 0
    assert torn > 0  # otherwise no kill fell into a save


FULL_DISK = (
    TRAINER
    + """
import resource, signal
import jax.numpy as jnp
from diffusion_jax.errors import ConfigError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpointer = Checkpointer(sys.argv[1])
state = init()
checkpointer.save(1, state, {"position": 1})
checkpointer.wait()
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
for attempt in ("wait", "save"):
    try:
        checkpointer.save(2, state, {"position": 2})
        if attempt == "wait":
            checkpointer.wait()
        else:
            time.sleep(1)
            checkpointer.save(3, state, {"position": 3})
    except ConfigError as error:
        print(attempt, error)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
assert checkpointer.save(4, state, {"position": 4})
checkpointer.close()
print(sorted(os.listdir(sys.argv[1])), checkpointer.restore(jax.eval_shape(init))[1])
"""
)


def test_full_disk_is_reported_in_one_line_and_training_may_go_on(tmp_path):
    process = run(FULL_DISK, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 3, out
    for attempt, line in zip(("wait", "save"), lines[:2], strict=True):
        assert line.startswith(f"{attempt} checkpoint in '{tmp_path}' could not be written: ")
        assert "File too large; earlier steps [1] are untouched" in line
    assert lines[2] == "['1', '4'] {'position': 4}"
    assert "orbax" not in err


QUIET = (
    TRAINER
    + """
checkpointer = Checkpointer(sys.argv[1])
for step in range(3):
    checkpointer.save(step, init(), {})
checkpointer.close()
reader = Checkpointer(sys.argv[1], read_only=True)
reader.restore(jax.eval_shape(init))
reader.restore_subtree({"w1": jax.eval_shape(init)["w1"]})
reader.stored()
"""
)


def test_nothing_is_printed_when_all_is_well(tmp_path):
    process = run(QUIET, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


TWO_PROCESSES = (
    TRAINER
    + """
from diffusion_jax.parallel import arrays, distributed
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import shardings_for, with_shardings
distributed.initialize(heartbeat_timeout=20)
mesh = make_mesh(data=2, fsdp=4)
shardings = shardings_for(jax.eval_shape(init), mesh)
bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
    state, metadata = checkpointer.restore(with_shardings(jax.eval_shape(init), shardings))
    assert metadata == {"position": 5}
    assert state["w0"].sharding == shardings["w0"]
    assert state["w0"].addressable_shards[0].data.shape == (WIDTH // 4,)
    for step in range(6, 10):
        state = bump(state)
        checkpointer.save(step, state, {"position": step})
    checkpointer.wait()
    assert checkpointer.steps() == [8, 9], checkpointer.steps()
"""
)


def test_one_process_and_two_restore_what_the_other_saved(tmp_path):
    first = expected(0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, jax.tree.map(jax.numpy.asarray, first), {"position": 5})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [
        run(
            TWO_PROCESSES,
            tmp_path,
            DIFFUSION_JAX_COORDINATOR=f"127.0.0.1:{port}",
            DIFFUSION_JAX_NUM_PROCESSES="2",
            DIFFUSION_JAX_PROCESS_ID=str(i),
            DIFFUSION_JAX_CPU_DEVICES="4",
        )
        for i in range(2)
    ]
    for process in pair:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    with Checkpointer(tmp_path) as checkpointer:
        restored, metadata = checkpointer.restore(abstract())
    assert metadata == {"position": 9}
    for name, value in first.items():
        np.testing.assert_array_equal(restored[name], value + 4)
