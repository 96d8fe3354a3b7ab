"""What the loop costs: the full loop against the bare train step on one resident batch.

    python benchmarks/framework_tax.py --config=configs/digits.py [--steps=40 --blocks=7]

Three kinds of blocks of as many steps take turns, so that a machine whose speed drifts slows all:

- bare: the train step alone, moving averages included, with as many steps in flight as the loop
  has; waits for the device at the end of the block only;
- loop: the loop itself. It makes its batches, moves them to the device, reads metrics back and logs
  to metrics.jsonl and TensorBoard;
- loop and save: the same with one checkpoint in the middle, its row and its writing to the end. It
  takes longer than a run would notice, where the writing goes on beside later steps.

Prints for each turn, and as a median, the rate of the loop over that of the bare step (1 is no tax)
without saves and with as many as the config makes: a save costs the seconds between the last two
kinds of blocks, once in `config.checkpoint.every` steps. Neither validation nor sample grids are in
it, and the first save, which pays for orbax's start, is made before.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from diffusion_jax import api, config_flag, doors
from diffusion_jax.errors import ConfigError
from diffusion_jax.training import writers
from diffusion_jax.training.loop import Loop
from diffusion_jax.training.metrics import MetricBuffer
from diffusion_jax.training.progress import Progress
from diffusion_jax.training.state import TrainState, position

CONFIG = config_flag.define("A file of configs/.")
STEPS = flags.DEFINE_integer("steps", 40, "Steps a block.")
BLOCKS = flags.DEFINE_integer("blocks", 7, "Turns of the three kinds of blocks.")


def timed(function: Callable[[TrainState], TrainState], state: TrainState) -> tuple[Any, float]:
    """The result and its seconds, the device included."""
    began = time.perf_counter()
    state = jax.block_until_ready(function(state))
    return state, time.perf_counter() - began


def bare(loop: Loop, batch: Any, steps: int) -> Callable[[TrainState], TrainState]:
    """`steps` train steps on one batch, as far ahead of the device as the loop is."""

    def run(state: TrainState) -> TrainState:
        ahead: collections.deque[Any] = collections.deque()
        for _ in range(steps):
            state, packed, _ = loop.step(state, loop.frozen, batch)
            ahead.append(packed)
            if len(ahead) > MetricBuffer.delay:
                ahead.popleft().block_until_ready()
        return state

    return run


def full(
    loop: Loop, steps: int, save: Callable[[TrainState, int], None] | None = None
) -> Callable[[TrainState], TrainState]:
    """The loop itself over `steps` steps, without the hooks of the config; ends in a log row.

    `save` is called once, after half of them.
    """

    def run(state: TrainState) -> TrainState:
        first = int(state.step)
        middle = first + max(steps // 2, 1)

        def once(state: TrainState, step: int) -> None:
            # The loop also saves its last step, which is not the last of the run here.
            if save is not None and step == middle:
                save(state, step)

        options = dataclasses.replace(
            loop.options,
            steps=first + steps,
            save_every=middle if save else first + steps,
            profile_at=0,
        )
        return dataclasses.replace(loop, options=options, hooks=(), save=once).run(state)

    return run


def measure() -> None:
    """Builds the run of the config and lets the three kinds of blocks take turns."""
    config, steps = CONFIG.value, STEPS.value
    if steps < 2:
        raise ConfigError(f"--steps={steps}: expected at least 2, to save in the middle of a block")
    with tempfile.TemporaryDirectory() as workdir, contextlib.ExitStack() as stack:
        run = api.Run.build(config, workdir)
        stack.callback(run.checkpoints.close)
        state = run.compiled.init()
        writer = writers.create(workdir, start_step=0, tensorboard=True, process_index=0)
        stack.callback(writer.close)
        batches = run.batches(position(state.examples))
        stack.callback(batches.close)
        loop = run.loop(batches, writer, Progress(config.steps, 0, enabled=False))
        _, batch = next(batches)

        def save(state: TrainState, step: int) -> None:
            run.save(state, step)
            saving.append(step)

        def with_save(state: TrainState) -> TrainState:
            state = full(loop, steps, save)(state)
            run.checkpoints.wait()
            return state

        saving: list[int] = []
        blocks = (with_save, full(loop, steps), bare(loop, batch, steps))
        rows = []
        for turn in range(BLOCKS.value + 1):
            seconds = []
            for block in blocks:
                state, took = timed(block, state)
                seconds.append(took)
            if turn:  # the first warms up
                rows.append(report(*seconds, steps, config.checkpoint.every))
        assert len(saving) == BLOCKS.value + 1
    for name, column in zip(NAMES, zip(*rows, strict=True), strict=True):
        print(f"median {name} {statistics.median(column):.3f}")


NAMES = ("loop/bare rate without saves", "with saves", "seconds of a save")


def report(
    with_save: float, with_loop: float, without: float, steps: int, every: int
) -> tuple[float, float, float]:
    """The rates of one turn, from the seconds of its three blocks; prints them."""
    saving = with_save - with_loop
    row = without / with_loop, without / (with_loop + saving * steps / every), saving
    shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, row, strict=True))
    print(f"{shown} ({without / steps * 1e3:.1f} ms a bare step)", flush=True)
    return row


if __name__ == "__main__":
    doors.enter(measure, required=("config",))
