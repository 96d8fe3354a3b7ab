"""CIFAR-10, 32 x 32, class-conditional: EDM with the DDPM++ U-Net.

    python -m diffusion_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

The data set is downloaded at the first start; --config.data.data_dir=DIR names a folder where it is
prepared already. Recipe of Karras et al. 2022 (table 7), but for their augmentation of the
training pictures, of which only the mirror image is here. Published with it: FID 1.79 at 35
evaluations after 200 million pictures. Made for a host of eight GPUs; not run to its end here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs

PICTURES = 200_000_000


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` runs in seconds, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "cifar10"
    config.data.tfds.flip = True
    config.process.gaussian.prediction = "edm"
    config.process.gaussian.schedule.name = "edm"
    config.batch_size = 512
    config.steps = PICTURES // config.batch_size
    config.network.name = "unet"
    config.network.unet.preset = "DDPM++"
    config.network.unet.dropout = 0.13
    config.network.noise_input = "c_noise"
    config.objective.denoising.time.name = "log_normal"
    config.objective.denoising.weighting.name = "edm"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10_000_000 // config.batch_size
    # Half of the weight lies on the last 500,000 pictures.
    config.ema.decays.default = 0.5 ** (config.batch_size / 500_000)
    config.checkpoint.every = 5000
    config.validation.every = 5000
    config.validation.examples = 4096
    config.sampling.every = 10000
    config.sampling.solver = "heun"
    config.sampling.grid.name = "karras"
    config.sampling.steps = 18
    config.sampling.num = 100
    config.sampling.batch_size = 100
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 8
    config.network.unet.preset = ""
    config.network.unet.channels = 8
    config.network.unet.head_dim = 8
    config.network.unet.blocks = 1
    config.optimizer.warmup_steps = 1
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 4
    config.sampling.steps = 2
