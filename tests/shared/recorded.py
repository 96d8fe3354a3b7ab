"""What `benchmarks/feature_references_hf.py` recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from drawn_tensors import draw

FOLDER = Path(__file__).parents[1] / "golden" / "features"


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(weights as in a file of transformers, recorded arrays)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    about = json.loads(str(arrays.pop("about")))
    return draw(about["shapes"], about["seed"]), arrays


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
