"""Networks: Flax NNX modules as constructors, pure functions of a plain parameter tree."""

from __future__ import annotations

from diffusion_jax.networks.compiling import compiler_options
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.edm2 import EDM2
from diffusion_jax.networks.functional import Network, functional
from diffusion_jax.networks.mlp import MLP
from diffusion_jax.networks.multiscale import MultiScale
from diffusion_jax.networks.text import TextConfig
from diffusion_jax.networks.tokens import TokenNetwork
from diffusion_jax.networks.unet import UNet
from diffusion_jax.networks.uvit import UViT

NETWORKS = {
    "dit": DiT,
    "edm2": EDM2,
    "mlp": MLP,
    "multiscale": MultiScale,
    "unet": UNet,
    "uvit": UViT,
}

__all__ = [
    "EDM2",
    "MLP",
    "NETWORKS",
    "DiT",
    "MultiScale",
    "Network",
    "TextConfig",
    "TokenNetwork",
    "UNet",
    "UViT",
    "compiler_options",
    "functional",
]
