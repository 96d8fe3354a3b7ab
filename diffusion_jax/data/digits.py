"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8, part of the package, no download.

Source: the test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak,
UCI repository, 1998; sixteen grey levels.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.spec import DataSpec, Split

TRAIN_EXAMPLES = 1400
INK = 8.0
"""Of 16 levels: a binarised pixel is 1 from here on."""


def digits(split: Split, *, binarise: bool = False) -> ArraySource:
    """Digits of shape (8, 8, 1) in [-1, 1], labels 0..9; the id is the index in scikit-learn's set.

    A permutation by `numpy.random.default_rng(0)` gives 1,400 to training and holds out 397. With
    `binarise` they are tokens 0 and 1 of shape (8, 8): 1 where a pixel has half the ink or more.
    """
    # Importing scikit-learn takes seconds, and only this source needs it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels)).astype(np.int64)
    chosen = order[:TRAIN_EXAMPLES] if split == "train" else order[TRAIN_EXAMPLES:]
    names = tuple(str(digit) for digit in range(10))
    if binarise:
        x = (pixels[chosen] >= INK).astype(np.int32).reshape(-1, 8, 8)
        spec = DataSpec(
            shape=(8, 8),
            kind="tokens",
            vocabulary=2,
            range=(0.0, 1.0),
            num_classes=10,
            classes=names,
        )
    else:
        x = (pixels[chosen] / 8.0 - 1.0).astype(np.float32).reshape(-1, 8, 8, 1)
        spec = DataSpec(shape=(8, 8, 1), kind="image", num_classes=10, classes=names)
    return ArraySource(spec=spec, x=x, example_ids=chosen, labels=labels[chosen].astype(np.int32))
