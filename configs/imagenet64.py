"""ImageNet, 64 x 64, class-conditional: EDM2-S in pixels.

    python -m diffusion_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64

TFDS's imagenet_resized/64x64 is downloaded at the first start; --config.data.data_dir=DIR names a
folder where it is prepared already. Recipe of Karras et al. 2024 (table 6): magnitude-preserving
network, inverse square root of the learning rate, learned weight of the loss, averages of relative
length 0.05 and 0.10, from which `sample --ema_length=0.075` makes others. Published: FID 1.58 at 63
evaluations after 2^30 pictures. Made for a pod or some hosts of eight GPUs; not run to its end
here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` is a small network, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "imagenet_resized/64x64"
    config.data.tfds.validation = "validation"
    config.process.gaussian.prediction = "edm"
    config.process.gaussian.schedule.name = "edm"
    config.batch_size = 2048
    config.steps = 2**30 // config.batch_size
    config.network.name = "edm2"
    config.network.edm2.preset = "EDM2-S"
    config.network.noise_input = "c_noise"
    config.objective.denoising.time.name = "log_normal"
    config.objective.denoising.time.log_normal.mean = -0.8
    config.objective.denoising.time.log_normal.std = 1.6
    config.objective.denoising.weighting.name = "edm"
    config.objective.denoising.uncertainty.name = "mlp"
    config.optimizer.learning_rate = 0.013
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 10_000_000 // config.batch_size
    config.optimizer.reference_steps = 35000
    config.optimizer.clip_norm = 0.0
    config.optimizer.adamw.b2 = 0.99
    with config.ema.powers.unlocked():
        config.ema.powers.update({"short": 0.05, "long": 0.1})
    config.sampling.ema = "long"
    config.checkpoint.every = 4096
    # The lengths between are made from the averages of many checkpoints.
    config.checkpoint.keep_every = 4096
    config.validation.every = 8192
    config.sampling.every = 16384
    config.sampling.solver = "heun"
    config.sampling.grid.name = "karras"
    config.sampling.steps = 32
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 8
    config.data.tfds.image_size = 16
    config.network.edm2.preset = ""
    config.network.edm2.channels = 16
    config.network.edm2.multipliers = (1, 2)
    config.network.edm2.blocks = 1
    config.network.edm2.attention_resolutions = (8,)
    config.network.edm2.head_dim = 16
    config.optimizer.warmup_steps = 1
    config.optimizer.reference_steps = 2
    config.logging.every = 2
    config.checkpoint.every = 2
    config.checkpoint.keep_every = 2
    config.validation.examples = 8
    config.sampling.num = 4
    config.sampling.steps = 2
