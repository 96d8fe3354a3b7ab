"""How good the samples of a digits run are, judged by the real digits it never saw.

    python benchmarks/digits_quality.py runs/digits [runs/digits_seed1 ...]

Prints for each workdir, and as a mean:
- recognised: share of 1,000 class-conditional samples that an SVM trained on the 1,400 real
  training digits takes for the class asked for (its accuracy on the held-out digits stands beside);
- distance: mean distance of a sample to the nearest training image of its class, over that of the
  held-out digits, averaged over classes (1 is as far as new real digits are; 0 is copying);
- variance: total variance of the samples of a class over that of the held-out digits of the class,
  averaged over classes.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.svm import SVC

import diffusion_jax
from diffusion_jax import data


def real_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out images [N, 64] in [0, 1] with labels."""
    arrays = []
    for split in ("train", "validation"):
        source = data.load("digits", split)
        batch = source.fetch(np.arange(len(source)))
        images = (batch["x"].reshape(len(source), -1) + 1.0) / 2.0
        arrays += [images, batch["conditioning"]["label"]]
    return tuple(arrays)


def nearest(images: np.ndarray, others: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest of `others`."""
    squared = ((images[:, None] - others[None]) ** 2).sum(-1)
    return float(np.sqrt(squared.min(1)).mean())


def quality(workdir: str, count: int, seed: int) -> dict[str, float]:
    """The three figures of one run."""
    train, train_label, held, held_label = real_digits()
    svm = SVC(C=10, gamma="scale").fit(train, train_label)
    samples = diffusion_jax.load(workdir).sample(count, seed=seed)
    images = samples.x.reshape(count, -1) / 255.0
    distances, variances = [], []
    for label in range(10):
        mine = images[samples.label == label]
        real, known = held[held_label == label], train[train_label == label]
        distances.append(nearest(mine, known) / nearest(real, known))
        variances.append(mine.var(0).sum() / real.var(0).sum())
    return {
        "svm_held_out": float(svm.score(held, held_label)),
        "recognised": float((svm.predict(images) == samples.label).mean()),
        "distance": float(np.mean(distances)),
        "variance": float(np.mean(variances)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows = [quality(w, arguments.count, arguments.seed) for w in arguments.workdirs]
    for workdir, row in zip(arguments.workdirs, rows, strict=True):
        print(workdir, " ".join(f"{name} {value:.4f}" for name, value in row.items()))
    if len(rows) > 1:
        mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        print("mean", " ".join(f"{name} {value:.4f}" for name, value in mean.items()))


if __name__ == "__main__":
    main()
