"""Every field of a config with its default, by section; `config.base()` puts them together."""

from __future__ import annotations

from typing import Any

from ml_collections.config_dict import placeholder

from diffusion_jax.defaults_network import network

__all__ = [
    "alignment",
    "data",
    "evaluation",
    "grid",
    "guidance_by",
    "network",
    "objective",
    "optimizer",
    "process",
    "sampling",
    "text",
]


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
            # Of the bound's reverse kernels: "small" (the posterior's), "large" (the forward
            # kernel's), or "learned": the network puts them out besides, by the objective
            # "variational" with steps.
            "variance": "small",
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
                # By the objective "variational". logsnr at t_min and at t = 1, nats: where they
                # begin; `units` of the shape between.
                "learned": {"logsnr_max": 13.3, "logsnr_min": -5.0, "units": 32, "t_min": 1e-3},
                # One beta for each step of the objective "variational", learned but for the first.
                # They begin as 1/(T - i + 1), "fraction", or even in logsnr down to logsnr_min.
                "betas": {"first": 1e-4, "begin": "fraction", "logsnr_min": -5.0},
            },
        },
        # keep: "linear" or "cosine", the probability that a bit or token is kept up to t; of bits
        # also "learned", a share for each step of the objective "variational", beginning as linear.
        "binomial": {"keep": "linear"},
        "masked": {"keep": "linear"},
        "uniform": {"keep": "linear"},
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
        "variational": variational(),
        # The bound of masked diffusion in infinitely many steps; `bound_steps` of the one on the
        # held-out examples (0: none).
        "continuous": {
            "bound_steps": 100,
            "label_dropout": 0.0,
            "text_dropout": 0.0,
            "scalar_dropout": 0.0,
        },
    }


def variational() -> dict[str, Any]:
    """The bound of any process."""
    return {
        # 0: infinitely many, of a gaussian process.
        "num_steps": 100,
        # The rest for num_steps=0. The time at which the data are decoded (a learned schedule
        # has its own), and how noise levels are drawn: time, logsnr or gaussian.
        "first_time": 1e-3,
        "proposal": "gaussian",
        # "pixels": data of `count` values in equal steps; "density": any.
        # "dequantised": noise fills the distance between `count` values (for any num_steps).
        "decoder": {
            "name": "density",
            "density": {},
            "pixels": {"count": 256},
            "dequantised": {"count": 256},
        },
        "label_dropout": 0.0,
        "text_dropout": 0.0,
        "scalar_dropout": 0.0,
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
        "guidance_by": guidance_by(),
        # Of images: "none", "static" (to the range of the data) or "dynamic" (percentile, Imagen);
        # "auto" is static for images and none for other data.
        "threshold": "auto",
        "threshold_percentile": 0.995,
        "grid": grid(),
        # eps that goes with the thresholded x0: with that of the network, which libraries take,
        # samples get worse with more steps.
        "ddim": {"eta": 0.0, "eps_from_x0": True},
        "ddpm": {"variance": "small"},
    }


def evaluation() -> dict[str, Any]:
    """Scores during training, of the average that `sampling.ema` names."""
    return {
        # Such as "fd,kid"; "" for none.
        "metrics": "",
        # Interval in steps (0: at the end only).
        "every": 0,
        "num": 1000,
        # "self", or NAME:FILE with the file of its weights.
        "features": "self",
        # "train", "validation", a folder of pictures or an .npz of statistics.
        "reference": "train",
        "seed": 0,
        # One of `metrics`: the checkpoint where its first score is best is kept beside the newest.
        "best": "",
    }


def guidance_by() -> dict[str, Any]:
    """What `guidance` turns away from, and how."""
    return {
        "name": "classifier_free",
        "classifier_free": {},
        # First steps that rest (Fan et al. 2025).
        "cfg_zero": {"zero_steps": 1},
        # Share of the parallel part, greatest norm of a difference (0: none), momentum (Sadat et
        # al. 2024).
        "apg": {"parallel": 0.0, "threshold": 0.0, "momentum": -0.5},
        # A weaker model (Karras et al. 2024): of another workdir, or ("", in `sample` alone) an
        # earlier `step` or another average of the run's own.
        "autoguidance": {"workdir": "", "ema": placeholder(str), "step": placeholder(int)},
        # Weight of the difference from the network without its attention maps (Ahn et al. 2024),
        # beside the classifier-free `guidance`.
        "perturbed_attention": {"scale": 3.0},
    }


def grid() -> dict[str, Any]:
    """The times of the steps."""
    return {
        "name": "uniform",
        "uniform": {},
        # These go from the noise at t = 1 to sigma/alpha = 0.002, then to 0.
        "karras": {"rho": 7.0},
        "exponential": {},
        "beta": {"a": 0.6, "b": 0.6},
        # Entries of the schedule's table, of 1000 where it is none.
        "leading": {"offset": 0},
        "linspace": {},
        "trailing": {},
        # shift / (shift + (1/t - 1)^power). `base_size`: numbers of an example (pixels, without
        # channels) that `shift` is meant for, at others it goes with the root; 0: at any.
        # `terminal`: where the last call is; 0: where it falls.
        "shifted": {"shift": 1.0, "power": 1.0, "base_size": 0, "terminal": 0.0},
        # All steps + 1 of them.
        "given": {"times": ()},
    }
