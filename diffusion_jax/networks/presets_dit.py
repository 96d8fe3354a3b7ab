"""Published sizes of transformers, by name: `DiT-XL/2` is a DiT of size XL with patches of 2.

A preset is a dict of constructor options; what it does not name stays as the config has it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import ConfigError, unknown_name

_JIT: dict[str, Any] = {"positions": "rope", "qk_norm": True, "mlp": "swiglu"}

# Peebles & Xie 2023, table 1; Li & He 2025 ("Back to Basics", JiT, of large patches of pixels,
# for prediction of x0; without its tokens of the class among the patches).
DIT: Mapping[str, dict[str, Any]] = types.MappingProxyType(
    {
        "DiT-S": {"dim": 384, "depth": 12, "heads": 6},
        "DiT-B": {"dim": 768, "depth": 12, "heads": 12},
        "DiT-L": {"dim": 1024, "depth": 24, "heads": 16},
        "DiT-XL": {"dim": 1152, "depth": 28, "heads": 16},
        "JiT-B": {"dim": 768, "depth": 12, "heads": 12, "bottleneck": 128, **_JIT},
        "JiT-L": {"dim": 1024, "depth": 24, "heads": 16, "bottleneck": 128, **_JIT},
        "JiT-H": {"dim": 1280, "depth": 32, "heads": 16, "bottleneck": 256, **_JIT},
    }
)

# Bao et al. 2023, table 1. The depth counts the block in the middle.
UVIT: Mapping[str, dict[str, Any]] = types.MappingProxyType(
    {
        "U-ViT-S": {"dim": 512, "depth": 13, "heads": 8},
        "U-ViT-S-deep": {"dim": 512, "depth": 17, "heads": 8},
        "U-ViT-M": {"dim": 768, "depth": 17, "heads": 12},
        "U-ViT-L": {"dim": 1024, "depth": 21, "heads": 16},
        "U-ViT-H": {"dim": 1152, "depth": 29, "heads": 16},
    }
)


def dit_preset(name: str) -> dict[str, Any]:
    """Options of `DiT` for a name such as `DiT-XL/2` or `JiT-B/16`: a size of `DIT`, a patch.

    Raises:
        ConfigError: no such size, or no patch; names `network.dit.preset`.
    """
    return _preset("network.dit.preset", name, DIT)


def uvit_preset(name: str) -> dict[str, Any]:
    """Options of `UViT` for a name such as `U-ViT-H/2`: a size of `UVIT`, a patch.

    Raises:
        ConfigError: no such size, or no patch; names `network.uvit.preset`.
    """
    return _preset("network.uvit.preset", name, UVIT)


def _preset(field: str, name: str, table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    size, _, patch = name.partition("/")
    if size not in table:
        raise ConfigError(unknown_name(field, size, table))
    if not patch.isdecimal() or int(patch) < 1:
        raise ConfigError(f"{field}={name!r}: expected a size and a patch, such as '{size}/2'")
    return {**table[size], "patch": int(patch)}
