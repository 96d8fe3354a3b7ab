"""What a solver costs beside its network: 50 steps over a denoiser that costs next to nothing.

    python benchmarks/solver_cost.py

The denoiser is x0 = x/2. A solver's time is divided by that of a scan of 50 steps that only reads
and writes as much: arrays of the batch's shape, as many as the solver keeps from step to step (its
state, and what a multistep method remembers), each multiplied by a number. Both are compiled, warm
and alternate; printed are the median of the ratios and their range. Methods of several evaluations
a step are divided by as many evaluations' worth of the scan.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion import schedules, solvers, time_grids
from diffusion_jax.networks import compiler_options

# Solver -> (options, arrays kept from step to step or stage to stage, evaluations a step).
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "ddim": ({}, 1, 1),
    "euler": ({}, 1, 1),
    "flow_euler": ({}, 1, 1),
    "dpmpp_1m": ({}, 1, 1),
    "dpmpp_2m": ({}, 2, 1),
    "dpmpp_3m": ({}, 3, 1),
    "deis": ({}, 3, 1),
    "unipc": ({}, 4, 1),
    "lms": ({}, 4, 1),
    "pndm": ({"prk": False}, 5, 1),
    "heun": ({}, 1, 2),
    "midpoint": ({}, 1, 2),
    "rk4": ({}, 3, 4),
}


def seconds(function: Callable[[Any], jax.Array], x: jax.Array) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function(x).block_until_ready()
    return time.perf_counter() - began


def solver(name: str, options: dict[str, Any], steps: int) -> Callable[[Any], jax.Array]:
    """The compiled solver; from a level and to one where every method can divide."""
    schedule = schedules.cosine()
    times = time_grids.uniform(steps, 0.98, 0.02)

    def run(x: jax.Array) -> jax.Array:
        return solvers.get(name)(lambda x, t: 0.5 * x, schedule, times, x, **options)

    return jax.jit(run, compiler_options=compiler_options())


@functools.cache
def plain(arrays: int, steps: int) -> Callable[[Any], jax.Array]:
    """A scan that reads and writes `arrays` of the shape of x in every step."""

    def run(x: jax.Array) -> jax.Array:
        def body(state: tuple[jax.Array, ...], factor: Any) -> tuple[Any, None]:
            return tuple(factor * a for a in state), None

        start = tuple(x + k for k in range(arrays))
        return sum(jax.lax.scan(body, start, jnp.linspace(0.9, 1.1, steps))[0])

    return jax.jit(run, compiler_options=compiler_options())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(256, 64, 64, 3))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--solvers", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    x = jax.random.normal(jax.random.key(0), tuple(arguments.shape))
    for name in arguments.solvers:
        options, arrays, evaluations = CASES[name]
        ours = solver(name, options, arguments.steps)
        theirs = plain(arrays, arguments.steps * evaluations)
        ours(x).block_until_ready(), theirs(x).block_until_ready()
        ratios, times = [], []
        for _ in range(arguments.turns):
            times.append(seconds(ours, x))
            ratios.append(times[-1] / seconds(theirs, x))
        print(
            f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of "
            f"a scan over {arrays} arrays; {statistics.median(times):.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
