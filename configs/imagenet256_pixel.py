"""ImageNet, 256 x 256, in pixels: a plain transformer of large patches that predicts x0 (JiT-B/16).

    python -m diffusion_jax.main --config=configs/imagenet256_pixel.py --workdir=runs/imagenet256

TFDS's imagenet2012 has to be prepared by hand from the archives of image-net.org;
--config.data.data_dir=DIR names where it lies. The recipe is that of Li & He 2025 ("Back to
Basics"): the error is weighted as one of the velocity, logit-normal times, guidance on an interval.
Their tokens of the class among the patches are not part of our network. Made for a pod; not run to
its end here, so no score is claimed.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs

EPOCH = 1281167


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` is a network of two blocks, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "imagenet2012"
    config.data.tfds.validation = "validation"
    config.data.tfds.image_size = 256
    config.data.tfds.flip = True
    config.process.gaussian.schedule.name = "rectified_flow"
    config.process.gaussian.prediction = "x0"
    config.batch_size = 1024
    config.steps = 200 * EPOCH // config.batch_size
    config.network.name = "dit"
    config.network.dit.preset = "JiT-B/16"
    config.network.noise_input = "t"
    # Their t runs from noise to data and is drawn around sigmoid(-0.8).
    config.objective.denoising.time.name = "logit_normal"
    config.objective.denoising.time.logit_normal.mean = 0.8
    config.objective.denoising.time.logit_normal.std = 0.8
    config.objective.denoising.weighting.name = "uniform_velocity"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 5 * EPOCH // config.batch_size
    config.optimizer.adamw.b2 = 0.95
    config.ema.decays.default = 0.9999
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every = 5000
    config.validation.every = 10000
    config.sampling.every = 20000
    config.sampling.solver = "heun"
    config.sampling.steps = 50
    config.sampling.guidance = 3.0
    config.sampling.guidance_interval = (0.0, 0.9)
    config.sampling.num = 32
    config.sampling.batch_size = 32
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 8
    config.data.tfds.image_size = 32
    config.network.dit.preset = ""
    config.network.dit.patch = 8
    config.network.dit.bottleneck = 16
    config.network.dit.dim = 32
    config.network.dit.depth = 2
    config.network.dit.heads = 2
    config.network.dit.positions = "rope"
    config.network.dit.qk_norm = True
    config.network.dit.mlp = "swiglu"
    config.optimizer.warmup_steps = 1
    config.logging.every = 2
    config.validation.examples = 8
    config.sampling.num = 8
    config.sampling.batch_size = 8
    config.sampling.steps = 2
