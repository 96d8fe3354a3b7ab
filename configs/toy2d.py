"""Points in the plane: rectified flow on the swiss roll, or another set by a variant.

    python -m diffusion_jax.main --config=configs/toy2d.py --workdir=runs/toy2d
    python -m diffusion_jax.main --config=configs/toy2d.py:moons --workdir=runs/moons

1 min 21 s on two cores of an AMD EPYC (November 2026), start-up and compilation included: the
error of the velocity `val/loss_ema` is 0.984 for the swiss roll, samples are in
docs/images/toy2d.png.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from diffusion_jax import config as configs

KINDS = ("swiss_roll", "moons", "checkerboard", "gaussian_mixture", "spiral")


def get_config(variant: str = "") -> ConfigDict:
    """The config; a variant names the set of points, `smoke` runs in seconds."""
    config = configs.base()
    config.data.name = "points"
    config.process.gaussian.schedule.name = "rectified_flow"
    config.network.name = "mlp"
    config.network.mlp.width = 128
    config.network.mlp.depth = 4
    config.network.use_labels = False
    config.network.noise_input = "t"
    config.process.gaussian.prediction = "velocity"
    config.steps = 5000
    config.batch_size = 512
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.ema.decays.default = 0.998
    config.logging.every = 250
    config.validation.every = 1000
    config.validation.examples = 4096
    config.checkpoint.every = 2500
    config.sampling.solver = "heun"
    config.sampling.steps = 50
    config.sampling.num = 4096
    config.sampling.batch_size = 4096
    configs.apply_variant(
        config, variant, {kind: partial(_kind, kind) for kind in KINDS} | {"smoke": _smoke}
    )
    return config


def _kind(kind: str, config: ConfigDict) -> None:
    config.data.points.distribution = kind


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 16
    config.optimizer.warmup_steps = 1
    config.network.mlp.width = 16
    config.network.mlp.depth = 1
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 16
    config.sampling.batch_size = 16
    config.sampling.steps = 2
