"""CIFAR-10, 32 x 32, class-conditional: rectified flow with a DiT-S of patches of 2.

    python -m diffusion_jax.main --config=configs/cifar10_dit.py --workdir=runs/cifar10_dit

The data set is downloaded at the first start; --config.data.data_dir=DIR names a folder where it is
prepared already. Made for one GPU or a small TPU; not trained to its end here, so no score is
claimed.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` runs in seconds, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "cifar10"
    config.data.tfds.flip = True
    config.process.gaussian.schedule.name = "rectified_flow"
    config.process.gaussian.prediction = "velocity"
    config.steps = 200000
    config.batch_size = 256
    config.network.name = "dit"
    config.network.dit.preset = "DiT-S/2"
    config.network.dit.qk_norm = True
    config.network.dit.dropout = 0.1
    config.network.noise_input = "t"
    config.objective.denoising.time.name = "logit_normal"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 5000
    config.optimizer.cooldown_steps = 40000
    config.optimizer.adamw.b2 = 0.99
    config.optimizer.adamw.weight_decay = 0.01
    config.ema.decays.default = 0.9999
    config.checkpoint.every = 5000
    config.validation.every = 5000
    config.validation.examples = 4096
    config.sampling.every = 10000
    config.sampling.solver = "heun"
    config.sampling.steps = 25
    config.sampling.num = 100
    config.sampling.batch_size = 100
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
    config.optimizer.warmup_steps = 1
    config.optimizer.cooldown_steps = 0
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 4
    config.sampling.steps = 2
