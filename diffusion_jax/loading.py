"""From a trained workdir to its sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusion_jax import averages, builders, start, workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.pixel import PixelPipeline


def load(
    path: str | Path,
    *,
    ema: str | None = None,
    ema_length: float | None = None,
    note: Callable[[str], None] | None = None,
) -> PixelPipeline:
    """The sampler of a trained workdir, with the averaged weights its config names.

    Needs neither the data nor the devices of the training: where the config's mesh does not fit
    the devices at hand, samples are split over all of them.

    Args:
        path: the workdir.
        ema: another stored average; "" takes the raw weights.
        ema_length: makes an average of this relative length (sigma_rel, a share of the run) from
            the power function averages (`config.ema.powers`) in all checkpoints that were kept.
        note: takes a line about what that average is made from.

    Raises:
        ConfigError: no workdir there, nothing to restore in it, or no such average.
    """
    if ema is not None and ema_length is not None:
        raise ConfigError(f"ema={ema!r}, ema_length={ema_length!r}: expected one of them")
    config = workdir.read_config(path)
    start.enable_cache(config)
    built = builders.model(config, workdir.read_spec(path))
    on = builders.sampling_mesh(config)
    compiled = builders.compiled(config, built, on)
    with Checkpointer(workdir.folder_of(path) / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        params = averages.stored_weights(
            checkpoints,
            compiled.abstract_state,
            name=config.sampling.ema if ema is None else ema,
            length=ema_length,
            powers=config.ema.powers.to_dict(),
            note=note,
        )
    return builders.pipeline(config, built, params, on)
