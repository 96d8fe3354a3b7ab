"""Networks: Flax NNX modules as constructors, pure functions of a plain parameter tree."""

from __future__ import annotations

from diffusion_jax.networks.compiling import compiler_options
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.functional import Network, functional
from diffusion_jax.networks.mlp import MLP
from diffusion_jax.networks.text import TextConfig
from diffusion_jax.networks.unet import UNet
from diffusion_jax.networks.uvit import UViT

NETWORKS = {"dit": DiT, "mlp": MLP, "unet": UNet, "uvit": UViT}

__all__ = [
    "MLP",
    "NETWORKS",
    "DiT",
    "Network",
    "TextConfig",
    "UNet",
    "UViT",
    "compiler_options",
    "functional",
]
