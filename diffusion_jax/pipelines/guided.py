"""The denoiser that a pipeline samples with: guided, and clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion import thresholding
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.pipelines import guiding
from diffusion_jax.pipelines.options import Program

PyTree = Any


def guided(
    pipeline: Any,
    static: Program,
    trees: Mapping[str, PyTree],
    conditioning: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> Denoiser:
    """The denoiser of a program, traced.

    Args:
        pipeline: the `PixelPipeline`, with the process that its parameters tell.
        static: the options.
        trees: its parameters, and the weaker model's.
        conditioning: by branch: given, negative, also.
        numbers: the guidance, and the weights of further conditions.
    """
    options, params, given = static.options, trees["params"], conditioning["given"]
    denoise = pipeline.denoiser(params, given)
    if options.guided or conditioning["also"]:
        branches = guiding.Branches(
            conditional=denoise,
            other=lambda: pipeline.denoiser(params, conditioning["negative"] or {}),
            also=[pipeline.denoiser(params, one) for one in conditioning["also"]],
            weak=lambda: _weak(pipeline, trees["weak"], given),
            perturbed=lambda: _perturbed(pipeline, params, given),
            schedule=pipeline.schedule,
            tokens=pipeline.spec.kind == "tokens",
        )
        weights = numbers["guidance"], numbers["also"]
        denoise = guiding.combine(options, branches, pipeline.times(options.steps), *weights)
    denoise = guiding.by_log_probability(options, denoise, pipeline.schedule)
    if options.threshold == "static":
        denoise = thresholding.clip_x0(denoise, *pipeline.spec.range)
    elif options.threshold == "dynamic":
        denoise = thresholding.dynamic_threshold(denoise, options.threshold_percentile)
    return denoise


def _weak(pipeline: Any, params: PyTree, given: Mapping[str, Array]) -> Denoiser:
    assert pipeline.weak is not None
    read = {name: given[name] for name in pipeline.weak.conditions if name in given}
    return pipeline.weak.denoiser(params, read)


def _perturbed(pipeline: Any, params: PyTree, given: Mapping[str, Array]) -> Denoiser:
    assert pipeline.perturbed is not None
    return pipeline.perturbed(params, given)
