"""Handwritten digits by the bound of the 2015 paper, with its multi-scale convolutional network.

    python -m diffusion_jax.main --config=configs/dpm2015_digits.py --workdir=runs/dpm_digits

Gaussian diffusion of learned mean, diagonal variance and betas (Sohl-Dickstein et al. 2015). The
8 x 8 pixels have 17 grey levels: noise fills the distance between them, and `val/bound_bits` and
`val/bound_bits_per_dim` bound -log2 P of the discrete picture, over the 397 held-out ones. One that
knows nothing gives each level the same probability: log2(17) = 4.09 bits a pixel.

3,000 steps take 7 minutes of processor time on two cores of an AMD EPYC that other programs shared
(November 2026): val/bound_bits_per_dim 1.972 +- 0.013; with other draws, by
`bits_per_dim(workdir, method="discrete", steps=100)`, 1.967 +- 0.014. Longer training overfits the
1,400 pictures.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` runs in seconds."""
    config = configs.base()
    config.data.name = "digits"
    config.process.gaussian.prediction = "v"
    config.process.gaussian.variance = "learned"
    config.process.gaussian.schedule.name = "betas"
    config.process.gaussian.schedule.betas.first = 1e-3
    config.process.gaussian.schedule.betas.begin = "logsnr"
    config.network.name = "multiscale"
    config.network.noise_input = "t"
    config.network.use_labels = False
    config.network.multiscale.full_width = 128
    config.network.multiscale.full_channels = 16
    config.network.multiscale.dropout = 0.1
    config.objective.name = "variational"
    config.objective.variational.num_steps = 100
    config.objective.variational.decoder.name = "dequantised"
    config.objective.variational.decoder.dequantised.count = 17
    config.steps = 3000
    config.batch_size = 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 200
    config.ema.decays.default = 0.998
    config.logging.every = 250
    config.validation.every = 1000
    config.validation.examples = 397
    config.checkpoint.every = 1000
    config.sampling.solver = "ddpm"
    config.sampling.ddpm.variance = "learned"
    config.sampling.steps = 100
    config.sampling.num = 100
    config.sampling.batch_size = 100
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 16
    config.optimizer.warmup_steps = 1
    config.objective.variational.num_steps = 4
    config.network.multiscale.channels = 8
    config.network.multiscale.layers = 1
    config.network.multiscale.full_width = 8
    config.network.multiscale.dense_channels = 8
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 8
    config.sampling.steps = 2
