"""What sampling costs beside its network: 64 images, 50 steps, against 50 network calls.

    python benchmarks/sampling.py runs/digits

The network calls are one compiled scan over the same batch of 64. Both are warm, blocks alternate;
prints the ratio of each pair and their median (1 is no cost beside the network).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import diffusion_jax
from diffusion_jax.networks import compiler_options


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--solver", default="ddim")
    arguments = parser.parse_args()
    pipeline = diffusion_jax.load(arguments.workdir)
    num, steps = arguments.num, arguments.steps
    labels = np.arange(num, dtype=np.int32) % max(pipeline.spec.num_classes, 1)
    conditioning = {"label": jnp.asarray(labels)} if pipeline.conditional else {}
    times = jnp.linspace(1.0, 1.0 / steps, steps)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def calls(params: object, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            return pipeline.denoiser(params, conditioning)(x, t).x0, None

        return jax.lax.scan(body, x, times)[0]

    x = jax.random.normal(jax.random.key(0), (num, *pipeline.spec.shape))

    def network() -> None:
        np.asarray(calls(pipeline.params, x))

    def sample() -> None:
        pipeline.sample(
            num,
            labels=labels if pipeline.conditional else None,
            guidance=1.0 if pipeline.conditional else None,
            steps=steps,
            solver=arguments.solver,
            batch_size=num,
        )

    network(), sample()
    ratios = []
    for _ in range(arguments.blocks):
        ratios.append(seconds(sample) / seconds(network))
        print(f"sampling/network time {ratios[-1]:.3f}")
    print(f"median sampling/network time {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
