"""How well an SVM that was fitted to real pictures recognises the samples of a run (MNIST and kin).

    python benchmarks/class_quality.py runs/mnist [--data_dir=DIR]

Reads from the workdir which TFDS data set it was trained on; `--data_dir` where that has moved.
Prints the SVM's accuracy on real held-out pictures, and the share of class-conditional samples
(guidance 1, the solver of the config) that it takes for the class asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

import diffusion_jax
from diffusion_jax import data

FITTED, HELD_OUT = 10_000, 2_000


def flat(x: np.ndarray) -> np.ndarray:
    """Rows of pixels in [0, 1], from images in [-1, 1]."""
    return (x.reshape(len(x), -1) + 1.0) / 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--data_dir")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    trained_on = json.loads(Path(args.workdir, "config.json").read_text())["config"]["data"]
    if trained_on["name"] != "tfds":
        parser.error(
            f"{args.workdir} was trained on {trained_on['name']!r}; expected a TFDS data set"
        )
    name = trained_on["tfds"]["name"]
    data_dir = args.data_dir or trained_on["data_dir"] or None
    real = {}
    for split, count in (("train", FITTED), ("validation", HELD_OUT)):
        source = data.load("tfds", split, name=name, data_dir=data_dir)
        batch = source.fetch(np.arange(count))
        real[split] = flat(batch["x"]), batch["conditioning"]["label"]
    svm = SVC(C=5.0, gamma=0.01).fit(*real["train"])
    samples = diffusion_jax.load(args.workdir).sample(args.num, seed=args.seed, guidance=1.0)
    pixels = samples.x.reshape(len(samples), -1) / 255.0
    print(f"{name}: real {svm.score(*real['validation']):.4f}")
    print(f"{name}: samples {svm.score(pixels, samples.label):.4f} of {len(samples)}")


if __name__ == "__main__":
    main()
