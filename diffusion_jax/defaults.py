"""Every field of a config with its default, by section; `config.base()` puts them together."""

from __future__ import annotations

from typing import Any

from ml_collections.config_dict import placeholder


def data() -> dict[str, Any]:
    """Where examples come from."""
    return {
        "name": "digits",
        # Where prepared TFDS data sets lie.
        "data_dir": "",
        # Of one's own data: a folder of pictures, shards by a pattern, or a text file.
        "path": "",
        "prefetch": 4,
        # True: black and white pixels, as tokens 0 and 1.
        "digits": {"binarise": False},
        # `held_out` examples beside the `size` of the training are for validation.
        "points": {"distribution": "swiss_roll", "size": 65536, "held_out": 10000, "seed": 0},
        "heartbeat": {"size": 50000, "held_out": 1000},
        # Windows of `length` tokens of the file `path`: "text8" (a to z and the space) or "bytes".
        "text": {"alphabet": "text8", "length": 256},
        # Letters of a random chain, whose entropy is known.
        "markov": {"states": 27, "length": 64, "size": 20000, "held_out": 1000, "seed": 0},
        "tfds": {
            "name": "mnist",
            "train": "train",
            "validation": "test",
            "image_size": placeholder(int),
            "crop": "center",
            "flip": False,
            # Threads that decode; none: one a core.
            "workers": placeholder(int),
            # Bytes up to which a set is decoded once and held in memory.
            "memory": 2 << 30,
            # Damaged records of a set held in memory that are left out; one more is an error.
            "max_unreadable": 0,
        },
        # 0.18215 is the scale of Stable Diffusion's autoencoder.
        "latents": {"shape": (32, 32, 4), "num_classes": 0, "scale": 1.0, "shift": 0.0},
        "image_folder": _pictures(labels="auto", captions="auto"),
        "webdataset": _pictures(labels="auto", captions="auto", image_suffix=""),
        "parquet": _pictures(
            labels="auto", captions="auto", image_column="image", label_column="label"
        ),
    }


def _pictures(**own: Any) -> dict[str, Any]:
    """What all sources of one's own pictures have in common, and `own` options of one."""
    return {
        "image_size": placeholder(int),
        "channels": 3,
        "crop": "center",
        "flip": False,
        # Colour below transparent pixels.
        "background": "white",
        "text_column": "text",
        # Bytes of a caption at most.
        "text_length": 128,
        "scalars": (),
        "validation_share": 0.05,
        "max_unreadable": 0,
        "memory": 2 << 30,
        "workers": placeholder(int),
        **own,
    }


def process() -> dict[str, Any]:
    """The noising process."""
    return {
        "name": "gaussian",
        "gaussian": {
            # What the network puts out: x0, eps, v, score, velocity or edm.
            "prediction": "v",
            # Standard deviation of the data, for the preconditioning and weighting "edm".
            "sigma_data": 0.5,
            "schedule": {
                "name": "cosine",
                "cosine": {"s": 0.0},
                "linear_beta": {"beta_min": 0.1, "beta_max": 20.0},
                "scaled_linear": {"beta_min": 0.85, "beta_max": 12.0},
                "edm": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
                "rectified_flow": {"shift": 1.0},
                "sigmoid": {"start": -3.0, "end": 3.0, "tau": 1.0},
                # betas: "linear", "scaled_linear" or "cosine".
                "table": {"betas": "linear", "steps": 1000},
            },
        },
        "binomial": {},
        # Of tokens. keep: "linear" or "cosine", the probability that a token is kept up to t.
        "masked": {"keep": "linear"},
        "uniform": {"keep": "linear"},
    }


def network() -> dict[str, Any]:
    """The score network."""
    return {
        "name": "unet",
        "mlp": {"width": 128, "depth": 3, "dropout": 0.0},
        "unet": _unet(),
        "edm2": _edm2(),
        "dit": {
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
        },
        "uvit": {
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
        },
        # Channels of a token before the network, for data of tokens.
        "token_dim": 64,
        # What the network is told of the noise: logsnr, t, c_noise or timestep.
        "noise_input": "logsnr",
        # Whether the labels of the data, where it has them, condition the network.
        "use_labels": True,
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


def text() -> dict[str, Any]:
    """The encoder of captions, trained with the network."""
    return {"name": "none", "none": {}, "bytes": {"dim": 128, "depth": 2, "heads": 4}}


def objective() -> dict[str, Any]:
    """What is minimised."""
    return {
        "name": "denoising",
        "denoising": {
            # Share of the examples that train without label, caption or numbers; guidance needs it.
            "label_dropout": 0.1,
            "text_dropout": 0.1,
            "scalar_dropout": 0.1,
            "time": {
                "name": "uniform",
                "stratified": True,
                "uniform": {},
                "log_normal": {"mean": -1.2, "std": 1.2},
                "logit_normal": {"mean": 0.0, "std": 1.0},
            },
            "weighting": {
                "name": "uniform",
                "min_snr": {"gamma": 5.0},
                "sigmoid": {"bias": -1.0},
            },
            # "loss": noise levels are drawn by how much loss they cause, from the run's own
            # running means in cells of time.
            "adaptive": {
                "name": "none",
                "none": {},
                "loss": {
                    "cells": 64,
                    "decay": 0.99,
                    "floor": 0.1,
                    "prior": 10.0,
                    "reweight": True,
                },
            },
            # "mlp": the loss is divided by its own expectation at each noise level, learned.
            "uncertainty": {"name": "none", "none": {}, "mlp": {"channels": 128}},
            "alignment": alignment(),
        },
        "variational": {
            "num_steps": 100,
            "label_dropout": 0.0,
            "text_dropout": 0.0,
            "scalar_dropout": 0.0,
        },
        # The bound of masked diffusion in infinitely many steps; `bound_steps` of the one on the
        # held-out examples (0: none).
        "continuous": {
            "bound_steps": 100,
            "label_dropout": 0.0,
            "text_dropout": 0.0,
            "scalar_dropout": 0.0,
        },
    }


def alignment() -> dict[str, Any]:
    """Features of the network drawn to those of a frozen encoder of clean data (REPA)."""
    return {
        # "workdir": the network of a finished run encodes; "given": what `train` is given.
        "name": "none",
        "weight": 0.5,
        # Width of the projection from the ones to the others.
        "hidden": 2048,
        "none": {},
        "workdir": {
            "path": "",
            # Noise level that the encoder is told, 0 to 1: what it sees is clean.
            "time": 0.0,
            # Blocks of a DiT before the features; none: as in the encoder's own config.
            "features_after": placeholder(int),
        },
        "given": {},
    }


def optimizer() -> dict[str, Any]:
    """How parameters move."""
    return {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "final_scale": 0.0,
        # Last updates, in which "constant" and "inverse_sqrt" fall to the final scale.
        "cooldown_steps": 0,
        # Updates after which "inverse_sqrt" begins to fall; 0: after the warm-up.
        "reference_steps": 0,
        # Largest global norm of a gradient; 0: no clipping.
        "clip_norm": 1.0,
        # Largest norm of a unit's gradient over that of its weights; 0: no clipping.
        "adaptive_clip": 0.0,
        # "masters": bfloat16 parameters with float32 copies in the optimizer; "stochastic":
        # bfloat16 parameters, rounded at random.
        "precision": "float32",
        "muon": {
            "beta": 0.95,
            "nesterov": True,
            "newton_schulz_steps": 5,
            "rms": 0.2,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
        },
        "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    }


def sampling() -> dict[str, Any]:
    """How grids and `sample` draw."""
    return {
        # Grids during training (0: at the end only), from the weights named by `ema`.
        "every": 0,
        "num": 64,
        "seed": 0,
        "ema": "default",
        "batch_size": 64,
        "solver": "dpmpp_2m",
        "steps": 20,
        "guidance": 1.0,
        "guidance_interval": (0.0, 1.0),
        "guidance_rescale": 0.0,
        # Of images: "none", "static" (to the range of the data) or "dynamic" (percentile, Imagen);
        # "auto" is static for images and none for other data.
        "threshold": "auto",
        "threshold_percentile": 0.995,
        "grid": {
            "name": "uniform",
            "uniform": {},
            "karras": {"rho": 7.0},
            "shifted": {"shift": 1.0},
        },
        "ddim": {"eta": 0.0},
        "ddpm": {"variance": "small"},
    }
