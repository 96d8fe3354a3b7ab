"""Networks: Flax NNX modules as constructors, pure functions of a plain parameter tree."""

from __future__ import annotations

from diffusion_jax.networks.compiling import compiler_options
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.functional import Network, functional
from diffusion_jax.networks.mlp import MLP
from diffusion_jax.networks.unet import UNet

NETWORKS = {"dit": DiT, "mlp": MLP, "unet": UNet}

__all__ = ["MLP", "NETWORKS", "DiT", "Network", "UNet", "compiler_options", "functional"]
