"""Where the time of an evaluation goes: samples, their features, or the scores.

    python benchmarks/evaluation_share.py runs/digits [--num=10000] [--metrics=fd,kid]
    python benchmarks/evaluation_share.py --scores [--num=10000] [--dimensions=64,2048]

The first form evaluates a copy of the workdir (nothing is written into the workdir itself) and
prints the share of the wall time that goes into sampling and features; the feature network and the
reference are there before. Samples alone are drawn once more: the next ones are under way while
features are waited for, which blurs the split. The second form prints the seconds of each metric,
of random features and without a workdir.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import diffusion_jax
from diffusion_jax import evaluations
from diffusion_jax.evaluation import metrics, neighbours
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.metrics import Reference
from diffusion_jax.evaluation.moments import MomentStream


def share(workdir: str, names: list[str], num: int, **options: Any) -> None:
    """Prints the split of one evaluation."""
    batch = {"batch_size": options.get("batch_size")}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(workdir, copy)
        evaluations.evaluate(copy, names, num=200, **options)
        rows = evaluations.evaluate(copy, names, num=num, **options)
        pipeline = diffusion_jax.load(copy)
    for _ in pipeline.stream(min(num, 200), **batch):
        pass
    began = time.perf_counter()
    for _ in pipeline.stream(num, **batch):
        pass
    sampling = time.perf_counter() - began
    total, told = rows[0]["seconds"], rows[0]["sampling_and_features_share"]
    print(f"{num} samples of {workdir}, {rows[0]['solver']}, {rows[0]['evaluations']} evaluations")
    for name, seconds in (
        ("sampling", sampling),
        ("features", told * total - sampling),
        ("scores", (1.0 - told) * total),
    ):
        print(f"{name:10} {seconds:8.2f} s  {seconds / total:7.2%}")
    print(f"share of sampling and features {told:.4f} (aim 0.9)")


def seconds_of_scores(num: int, dimensions: list[int], names: list[str]) -> None:
    """Prints what each metric costs, of `num` random features on both sides."""
    for size in dimensions:
        random = np.random.default_rng(0)
        x, y = (np.maximum(random.normal(size=(num, size)), 0).astype(np.float32) for _ in "xy")
        collected, streams = Collected(num), [MomentStream(), MomentStream()]
        for stream, features in zip(streams, (x, 1.05 * y), strict=True):
            for part in np.array_split(features, max(1, num // 256)):
                stream.add(part)
        collected.moments["features"] = streams[0]
        collected.features = lambda x=x: x
        collected.count = num
        totals = {"features": streams[1].total()}
        reference = Reference(name="", hash="", count=num, moments=totals, features=y)
        for name in names:
            began = time.perf_counter()
            if name == "nearest":
                nearest(x, y)
            else:
                metrics.METRICS[name](collected, reference)
            print(f"{num} x {size:5} {name:18} {time.perf_counter() - began:8.2f} s", flush=True)


def nearest(x: np.ndarray, y: np.ndarray) -> neighbours.Nearest:
    """The nearest of all y, which come in batches."""
    stream = neighbours.NearestStream(x)
    for part in np.array_split(y, max(1, len(y) // 256)):
        stream.add(part)
    return stream.result()


PLAIN = "fd,fd_infinity,kid,cmmd,precision_recall,density_coverage,nearest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", nargs="?")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--metrics")
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--dimensions", default="64,2048")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--features", default="self")
    arguments = parser.parse_args()
    if arguments.scores == (arguments.workdir is not None):
        parser.error("expected a workdir, or --scores")
    if arguments.scores:
        sizes = [int(size) for size in arguments.dimensions.split(",")]
        seconds_of_scores(arguments.num, sizes, (arguments.metrics or PLAIN).split(","))
        return
    names = (arguments.metrics or "fd,kid,precision_recall").split(",")
    options = {"batch_size": arguments.batch_size, "features": arguments.features}
    share(arguments.workdir, names, arguments.num, **options)


if __name__ == "__main__":
    main()
