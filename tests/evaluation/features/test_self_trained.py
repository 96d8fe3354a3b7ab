"""The feature network that learns from the data at hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import self_trained
from diffusion_jax.evaluation.features.extract import three_channels


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return np.ascontiguousarray(three_channels(pixels)), labels.astype(np.int32)


def right(network, pixels, labels):
    logits = jax.jit(network.apply)(network.params, pixels)["logits"]
    return (np.asarray(logits).argmax(1) == labels).mean()


@pytest.mark.parametrize("by_class", [True, False])
def test_it_knows_pictures_that_it_did_not_learn_from(digits, by_class):
    pixels, labels = digits
    seen, held = slice(0, 1500), slice(1500, None)
    learned = labels[seen] if by_class else None
    network = self_trained.train(pixels[seen], learned, 10, steps=150)
    shown = (pixels[held], labels[held]) if by_class else self_trained.turned(pixels[held])
    assert right(network, *shown) > 0.85
    again = self_trained.train(pixels[seen], learned, 10, steps=150)
    assert again.weights_hash == network.weights_hash
    other = self_trained.train(pixels[seen], learned, 10, steps=5)
    assert other.weights_hash != network.weights_hash


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((8, 8), [8, 4, 2]),
        ((28, 28), [14, 7, 4, 2]),
        ((12, 64), [32, 16, 8, 4, 2]),
        ((2, 2), [2, 2, 1]),
    ],
)
def test_a_feature_sees_the_whole_picture(shape, sides):
    """Whatever its resolution: each of its pixels changes what the last convolution puts out."""
    params = self_trained.init(jax.random.key(0), 10, max(shape))
    x = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    count = shape[0] * shape[1]
    changed = np.repeat(x.reshape(1, count, 3), count, 0)
    changed[np.arange(count), np.arange(count)] ^= 255
    found = jax.jit(self_trained.maps)(params, jnp.asarray(changed.reshape(count, *shape, 3)))
    assert [max(part.shape[1:3]) for part in found] == sides
    (before,) = self_trained.maps(params, jnp.asarray(x[None]))[-1]
    assert (np.abs(found[-1] - before).max((1, 2, 3)) > 1e-3).all()


def test_too_few_pictures():
    with pytest.raises(ConfigError, match=r"99 examples: .* at least 100"):
        self_trained.train(np.zeros((99, 8, 8, 3), np.uint8), None, 4)
    with pytest.raises(ConfigError, match="8 x 9 without classes"):
        self_trained.train(np.zeros((100, 8, 9, 3), np.uint8), None, 4)
