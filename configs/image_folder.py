"""Your own pictures: any folder of them, at 64 x 64.

    python -m diffusion_jax.main --config=configs/image_folder.py --config.data.path=DIR \\
        --workdir=runs/pictures

Subfolders are classes; without any the model is unconditional. With captions, in a
`metadata.jsonl` of lines {"file_name": ..., "text": ...}, take the variant `captions`; then
`sample --prompt="..."` draws what is described. `shards` reads tar files (WebDataset), `parquet`
reads Parquet files with image bytes: --config.data.path="DIR/*.tar", "DIR/*.parquet".
--config.data.image_folder.image_size=128 and the like change the size, `flip` mirrors.

Made for one GPU; on a few CPU cores take --config.data.image_folder.image_size=32. What to expect
depends on the pictures.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from diffusion_jax import config as configs

SOURCES = ("image_folder", "webdataset", "parquet")


def get_config(variant: str = "") -> ConfigDict:
    """The config; `smoke` runs in seconds."""
    config = configs.base()
    config.data.name = "image_folder"
    for name in SOURCES:
        config.data[name].image_size = 64
    config.steps = 50000
    config.batch_size = 64
    config.network.name = "unet"
    config.network.unet.channels = 64
    config.network.unet.multipliers = (1, 2, 3, 4)
    config.network.unet.blocks = 2
    config.network.unet.attention_resolutions = (16, 8)
    config.network.unet.head_dim = 64
    config.network.unet.dropout = 0.1
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 1000
    config.ema.decays.default = 0.9995
    config.checkpoint.every = 2000
    config.validation.every = 2000
    config.sampling.every = 2000
    config.sampling.num = 36
    config.sampling.batch_size = 36
    variants = {"smoke": _smoke, "captions": _captions, "shards": partial(_source, "webdataset")}
    configs.apply_variant(config, variant, variants | {"parquet": partial(_source, "parquet")})
    return config


def _captions(config: ConfigDict) -> None:
    config.text.name = "bytes"
    config.network.use_labels = False
    config.sampling.guidance = 3.0


def _source(name: str, config: ConfigDict) -> None:
    config.data.name = name


def _smoke(config: ConfigDict) -> None:
    config.steps = 4
    config.batch_size = 8
    for name in SOURCES:
        config.data[name].image_size = 16
    config.network.unet.channels = 8
    config.network.unet.multipliers = (1, 2)
    config.network.unet.blocks = 1
    config.network.unet.attention_resolutions = (8,)
    config.network.unet.head_dim = 8
    config.optimizer.warmup_steps = 1
    config.logging.every = 2
    config.validation.examples = 8
    config.sampling.num = 4
    config.sampling.steps = 2
