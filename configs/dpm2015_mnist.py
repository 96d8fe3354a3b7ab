"""MNIST by the bound of the 2015 paper, with its multi-scale convolutional network.

    python -m diffusion_jax.main --config=configs/dpm2015_mnist.py --workdir=runs/dpm_mnist

As `configs/dpm2015_digits.py`, at 28 x 28 with 256 grey levels: `val/bound_bits_per_dim` bounds
-log2 P of the discrete picture in bits a pixel. The data set is downloaded at the first start;
--config.data.data_dir=DIR names a folder where it is prepared already.

10,000 steps, the last 6,000 of which took 55 minutes of processor time on two cores of an AMD EPYC
that other programs shared (November 2026): val/bound_bits_per_dim over 256 test pictures falls from
2.887 at step 1,000 over 2.159 at 4,000 to 1.899 +- 0.021 (before a correction of the last step; the
figure of this code is the next). Over 512, by
`bits_per_dim(workdir, num=512, method="discrete", steps=128)`, 1.877 +- 0.015. The bound still
falls by then, and the samples have strokes and parts of digits, few whole ones: give it more
--config.steps. The paper's own figure is a Parzen-window estimate of a density, not comparable.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` runs in seconds, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "mnist"
    config.process.gaussian.prediction = "v"
    config.process.gaussian.variance = "learned"
    config.process.gaussian.schedule.name = "betas"
    config.process.gaussian.schedule.betas.first = 1e-4
    config.process.gaussian.schedule.betas.begin = "logsnr"
    config.network.name = "multiscale"
    config.network.noise_input = "t"
    config.network.use_labels = False
    config.network.multiscale.full_width = 500
    config.network.multiscale.full_channels = 4
    config.objective.name = "variational"
    # A divisor of the batch: each batch holds every step as often.
    config.objective.variational.num_steps = 128
    config.objective.variational.decoder.name = "dequantised"
    config.objective.variational.decoder.dequantised.count = 256
    config.steps = 10_000
    config.batch_size = 128
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 200
    config.ema.decays.default = 0.998
    config.logging.every = 100
    config.validation.every = 1000
    config.validation.examples = 256
    config.checkpoint.every = 1000
    config.sampling.solver = "ddpm"
    config.sampling.ddpm.variance = "learned"
    config.sampling.steps = 128
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
