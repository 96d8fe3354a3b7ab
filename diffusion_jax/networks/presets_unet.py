"""Published sizes of U-Nets, by name.

A preset is a dict of constructor options; what it does not name (dropout among it) stays as the
config has it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import ConfigError, unknown_name

_DDPMPP: dict[str, Any] = {
    "channels": 128,
    "blocks": 4,
    "attention_resolutions": (16,),
    "up_attention": "last",
    "heads": 1,
    "head_dim": None,
    "scale_shift": False,
    "resample": "block",
    "resample_projection": True,
    "resampling": "box",
    "rescale_skips": True,
    "encoder": "standard",
    "noise_embedding": "positional",
    "noise_features": 128,
    "norm_epsilon": 1e-6,
}

_NCSNPP: dict[str, Any] = {
    **_DDPMPP,
    "resampling": "fir",
    "encoder": "residual",
    "noise_embedding": "fourier",
    "noise_features": 256,
}

_ADM: dict[str, Any] = {
    "attention_resolutions": (32, 16, 8),
    "up_attention": "all",
    "heads": 4,
    "head_dim": 64,
    "scale_shift": True,
    "resample": "block",
    "resample_projection": False,
    "resampling": "box",
    "rescale_skips": False,
    "encoder": "standard",
    "noise_embedding": "positional",
    "noise_features": None,
    "norm_epsilon": 1e-5,
}

# DDPM++ and NCSN++: Song et al. 2021 as trained by Karras et al. 2022 (EDM, table 7), for CIFAR-10
# and, with "-64", for faces of 64 x 64. ADM: Dhariwal & Nichol 2021 (table 4 and appendix I), by
# the side of the ImageNet pictures; at 128 with four heads, of any size. Theirs put out a
# variance besides, as `out_channels` = 2 x channels does.
UNET: Mapping[str, dict[str, Any]] = types.MappingProxyType(
    {
        "DDPM++": {**_DDPMPP, "multipliers": (2, 2, 2)},
        "DDPM++-64": {**_DDPMPP, "multipliers": (1, 2, 2, 2)},
        "NCSN++": {**_NCSNPP, "multipliers": (2, 2, 2)},
        "NCSN++-64": {**_NCSNPP, "multipliers": (1, 2, 2, 2)},
        "ADM-64": {**_ADM, "channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3},
        "ADM-128": {
            **_ADM,
            "channels": 256,
            "multipliers": (1, 1, 2, 3, 4),
            "blocks": 2,
            "head_dim": None,
        },
        "ADM-256": {**_ADM, "channels": 256, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2},
    }
)

_EDM2: dict[str, Any] = {
    "multipliers": (1, 2, 3, 4),
    "blocks": 3,
    "attention_resolutions": (16, 8),
    "head_dim": 64,
}

# Karras et al. 2024, table 6: ImageNet of 64 x 64 pixels, and of 512 x 512 as 64 x 64 x 4 latents.
EDM2: Mapping[str, dict[str, Any]] = types.MappingProxyType(
    {
        "EDM2-XS": {**_EDM2, "channels": 128},
        "EDM2-S": {**_EDM2, "channels": 192},
        "EDM2-M": {**_EDM2, "channels": 256},
        "EDM2-L": {**_EDM2, "channels": 320},
        "EDM2-XL": {**_EDM2, "channels": 384},
        "EDM2-XXL": {**_EDM2, "channels": 448},
    }
)


def unet_preset(name: str) -> dict[str, Any]:
    """Options of `UNet` for a name of `UNET`, such as `ADM-64`.

    Raises:
        ConfigError: no such size; names `network.unet.preset`.
    """
    return _preset("network.unet.preset", name, UNET)


def edm2_preset(name: str) -> dict[str, Any]:
    """Options of `EDM2` for a name of `EDM2`, such as `EDM2-S`.

    Raises:
        ConfigError: no such size; names `network.edm2.preset`.
    """
    return _preset("network.edm2.preset", name, EDM2)


def _preset(field: str, name: str, table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in table:
        raise ConfigError(unknown_name(field, name, table))
    return dict(table[name])
