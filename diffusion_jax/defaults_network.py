"""Every field of the section `network` of a config, with its default."""

from __future__ import annotations

from typing import Any

from ml_collections.config_dict import placeholder


def network() -> dict[str, Any]:
    """The score network."""
    return {
        "name": "unet",
        "mlp": {"width": 128, "depth": 3, "dropout": 0.0},
        "multiscale": _multiscale(),
        "unet": _unet(),
        "edm2": _edm2(),
        "dit": _dit(),
        "uvit": _uvit(),
        # Channels of a token before the network, for data of tokens.
        "token_dim": 64,
        # What the network is told of the noise: logsnr, t, c_noise or timestep.
        "noise_input": "logsnr",
        # Whether the labels of the data, where it has them, condition the network.
        "use_labels": True,
    }


def _multiscale() -> dict[str, Any]:
    """The network of the 2015 paper; told the time ("t") in its last step alone."""
    return {
        "channels": 32,
        "layers": 3,
        # Of an image of even sizes: 1, 1/2, 1/4, ...
        "scales": 3,
        "kernel": 3,
        # At every pixel alike, before the readout by `bumps` functions of time.
        "dense_channels": 64,
        "dense_layers": 2,
        "bumps": 10,
        # Hidden size of a dense pathway over the whole image beside (0: none), and what it
        # gives to every pixel.
        "full_width": 0,
        "full_channels": 2,
        "dropout": 0.0,
    }


def _unet() -> dict[str, Any]:
    """The U-Net of DDPM, DDPM++, NCSN++ and ADM."""
    return {
        # "DDPM++", "NCSN++", "ADM-64" and others: goes over the options below, but for dropout
        # and how it is computed.
        "preset": "",
        "channels": 64,
        "multipliers": (1, 2, 2),
        "blocks": 2,
        "attention_resolutions": (8,),
        "up_attention": "all",
        # 0: `heads` of them, of any size.
        "head_dim": 64,
        "heads": 4,
        "dropout": 0.0,
        "scale_shift": True,
        "resample": "conv",
        "resample_projection": False,
        "resampling": "box",
        "rescale_skips": False,
        "encoder": "standard",
        "noise_embedding": "positional",
        # None: as many as `channels`.
        "noise_features": placeholder(int),
        "norm_groups": 32,
        "norm_epsilon": 1e-5,
        "scan": False,
        "remat": "none",
        "attention": "auto",
    }


def _edm2() -> dict[str, Any]:
    """The magnitude-preserving U-Net."""
    return {
        # "EDM2-XS" to "EDM2-XXL": goes over the sizes below.
        "preset": "",
        "channels": 128,
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention_resolutions": (16, 8),
        "head_dim": 64,
        "dropout": 0.0,
        # Shares of class, of a block's branch, of attention and of a skip in what they join.
        "label_balance": 0.5,
        "residual_balance": 0.3,
        "attention_balance": 0.3,
        "skip_balance": 0.5,
        "scan": True,
        "remat": "none",
        "attention": "auto",
    }


def _dit() -> dict[str, Any]:
    """The diffusion transformer, and JiT."""
    return {
        # "DiT-S/2" to "DiT-XL/8", "JiT-B/16" to "JiT-H/32": goes over the sizes below.
        "preset": "",
        "patch": 2,
        # Width between the patches and the blocks; 0: none.
        "bottleneck": 0,
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "expansion": 4,
        "mlp": "gelu",
        "positions": "sincos",
        "qk_norm": False,
        "registers": 0,
        "dropout": 0.0,
        "text_by": "cross",
        # Number of blocks after which features are taken for an alignment; 0: none.
        "features_after": 0,
        "scan": True,
        "remat": "none",
        "attention": "auto",
    }


def _uvit() -> dict[str, Any]:
    """The U-ViT."""
    return {
        "preset": "",
        "patch": 2,
        "dim": 512,
        "depth": 13,
        "heads": 8,
        "expansion": 4,
        "mlp": "gelu",
        "positions": "learned",
        "qk_norm": False,
        "smooth": True,
        "dropout": 0.0,
        "scan": True,
        "remat": "none",
        "attention": "auto",
    }
