"""What a sample costs: evaluations of the network, counted and not looked up."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.pipelines.options import Program
from diffusion_jax.pipelines.pixel import PixelPipeline


def network_evaluations(
    pipeline: PixelPipeline, *, negative: bool = False, also: int = 0, **options: Any
) -> int:
    """Evaluations of networks for one sample, all branches of guidance and a weaker model counted;
    with a negative condition and `also` further ones.

    The solver is run with something that costs nothing in place of the networks. Of an adaptive
    solver it is a rough guide: its steps depend on the network.

    Raises:
        ConfigError: as `PixelPipeline.options`.
    """
    chosen = pipeline.options(negative=negative, **options)
    calls: list[None] = []

    def nothing(x: Any, t: Any) -> Denoised:
        # Where the program runs, not where it is traced: loops and branches as they are taken.
        jax.debug.callback(lambda: calls.append(None))
        learned = 0.5 * jnp.ones_like(x) if pipeline.learns_variance else None
        return Denoised(0.5 * x, variance_fraction=learned)

    def counted(params: Any, conditioning: Mapping[str, Any]) -> Denoiser:
        return as_denoiser(nothing, pipeline.schedule)

    weak = pipeline.weak and dataclasses.replace(pipeline.weak, denoiser=counted)
    perturbed = pipeline.perturbed and counted
    # A learned schedule changes no count, and its parameters may be spread over processes.
    stand_in = dataclasses.replace(
        pipeline, denoiser=counted, weak=weak, perturbed=perturbed, process_of=None
    )
    one = functools.partial(stand_in.solve_one, Program(chosen), negative=negative, also=also)
    jax.block_until_ready(jax.jit(one)())
    jax.effects_barrier()
    return len(calls)
