"""What the loop costs: the full loop against the bare train step on one resident batch.

    python benchmarks/framework_tax.py --config=configs/digits.py [--config.data.data_dir=DIR]

Blocks of the two alternate, so that a machine whose speed drifts slows both. The full loop makes
its batches, moves them to the device, reads metrics back, logs to metrics.jsonl and TensorBoard
and saves a checkpoint at the config's interval; moving averages are part of the step in both.
Prints the ratio (loop rate over bare rate, 1 is no tax) of each pair, their median, and the
blocking time of a save as a share of the time between two saves.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from diffusion_jax import api, doors
from diffusion_jax.training import writers
from diffusion_jax.training.loop import Loop
from diffusion_jax.training.progress import Progress
from diffusion_jax.training.state import TrainState, position

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
STEPS = flags.DEFINE_integer("steps", 40, "Steps a block.")
BLOCKS = flags.DEFINE_integer("blocks", 7, "Pairs of blocks.")


def timed(function: Callable[[TrainState], TrainState], state: TrainState) -> tuple[Any, float]:
    """The result and its seconds, the device included."""
    began = time.perf_counter()
    state = jax.block_until_ready(function(state))
    return state, time.perf_counter() - began


def bare(loop: Loop, batch: Any, steps: int) -> Callable[[TrainState], TrainState]:
    """`steps` train steps on one batch, dispatched as fast as the device takes them."""

    def run(state: TrainState) -> TrainState:
        for _ in range(steps):
            state, packed, _ = loop.step(state, loop.frozen, batch)
            packed.block_until_ready()
        return state

    return run


def full(loop: Loop, steps: int) -> Callable[[TrainState], TrainState]:
    """The loop itself over `steps` steps, without the hooks of the config; ends in a log row."""

    def run(state: TrainState) -> TrainState:
        options = dataclasses.replace(loop.options, steps=int(state.step) + steps)
        return dataclasses.replace(loop, options=options, hooks=()).run(state)

    return run


def measure() -> None:
    config = CONFIG.value
    with tempfile.TemporaryDirectory() as workdir:
        run = api.Run.build(config, workdir)
        state = run.compiled.init()
        writer = writers.create(workdir, start_step=0, tensorboard=True, process_index=0)
        batches = run.batches(position(state.examples))
        progress = Progress(config.steps, 0, enabled=False)
        saves: list[float] = []

        def save(state: TrainState, step: int) -> None:
            if step % config.checkpoint.every == 0:
                run.save(state, step)

        loop = dataclasses.replace(run.loop(batches, writer, progress), save=save)
        _, batch = next(batches)
        # Two saves: the first pays for orbax's start.
        for number in (1, 2):
            began = time.perf_counter()
            run.checkpoints.save(number, state, {"step": number, "examples": 0})
            saves.append(time.perf_counter() - began)
            run.checkpoints.wait()
        state, _ = timed(full(loop, 5), state)
        state, _ = timed(bare(loop, batch, 5), state)
        ratios, seconds = [], []
        for _ in range(BLOCKS.value):
            state, with_loop = timed(full(loop, STEPS.value), state)
            state, without = timed(bare(loop, batch, STEPS.value), state)
            ratios.append(without / with_loop)
            seconds.append(with_loop / STEPS.value)
            print(f"loop/bare rate {ratios[-1]:.3f}  ({seconds[-1] * 1e3:.1f} ms a step)")
        batches.close()
        writer.close()
        run.checkpoints.close()
    between = statistics.median(seconds) * config.checkpoint.every
    print(f"median loop/bare rate {statistics.median(ratios):.3f}")
    print(
        f"save blocks {saves[1]:.3f} s (first {saves[0]:.3f} s): {saves[1] / between:.2%} of time"
    )


if __name__ == "__main__":
    doors.enter(measure, required=("config",))
