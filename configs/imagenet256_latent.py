"""ImageNet, 256 x 256, in the latent space of Stable Diffusion's autoencoder: DiT-XL/2.

    python -m diffusion_jax.main --config=configs/imagenet256_latent.py --config.data.path=DIR \\
        --workdir=runs/imagenet256

DIR holds the latents, 32 x 32 x 4 (see `diffusion_jax.data.latents`); `python -m
diffusion_jax.prepare` writes them. Table of 1,000 linear betas, eps, AdamW at 1e-4 without decay,
as Peebles & Xie 2023; the variance is not learned here. Published for DiT-XL/2 (with a learned
variance): FID-50K 19.47 after 400,000 steps without guidance; 9.62, and 2.27 at guidance 1.5, after
7 million. Made for a pod or a host of eight GPUs; not run to its end here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` is a network of two blocks."""
    config = configs.base()
    config.data.name = "latents"
    config.data.latents.shape = (32, 32, 4)
    config.data.latents.num_classes = 1000
    config.data.latents.scale = 0.18215
    config.process.gaussian.schedule.name = "table"
    config.process.gaussian.schedule.table.betas = "linear"
    config.process.gaussian.prediction = "eps"
    config.steps = 400000
    config.batch_size = 256
    config.network.name = "dit"
    config.network.dit.preset = "DiT-XL/2"
    config.network.dit.remat = "dots"
    config.network.noise_input = "timestep"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.ema.decays.default = 0.9999
    config.ema.warmup = False
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every = 5000
    config.validation.every = 10000
    config.sampling.every = 20000
    config.sampling.solver = "ddim"
    config.sampling.steps = 50
    config.sampling.guidance = 1.5
    config.sampling.num = 32
    config.sampling.batch_size = 32
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 8
    config.network.dit.preset = ""
    config.network.dit.patch = 4
    config.network.dit.dim = 32
    config.network.dit.depth = 2
    config.network.dit.heads = 2
    config.logging.every = 2
    config.validation.examples = 8
    config.sampling.num = 8
    config.sampling.batch_size = 8
    config.sampling.steps = 2
