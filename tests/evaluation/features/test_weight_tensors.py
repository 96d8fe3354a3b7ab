"""Tensors of a file: what is refused in one line, and the parameters that come of the others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import params_hash
from diffusion_jax.evaluation.features.weight_tensors import COUNTERS, Tensors

HELD = {
    "a.0.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 1, 2),
    "a.0.bias": np.ones(4, jnp.bfloat16),
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bn.num_batches_tracked": np.array(3),
}
SHAPES = {"a.0.weight": (4, 3, 1, 2), "a.0.bias": (4,), "b.weight": (2, 3)}


def test_a_tree_with_channels_last():
    held = Tensors(HELD, "w", "a network")
    held.check(SHAPES, COUNTERS)
    tree = held.tree(SHAPES)
    assert tree["a"]["0"]["weight"].shape == (1, 2, 3, 4)
    assert tree["a"]["0"]["weight"][0, 1, 2, 3] == HELD["a.0.weight"][3, 2, 0, 1]
    np.testing.assert_array_equal(tree["b"]["weight"], HELD["b.weight"].T)
    dtypes = {tree["a"]["0"]["bias"].dtype, tree["b"]["weight"].dtype}
    assert dtypes == {np.dtype(np.float32)}


def test_all_differences_in_one_line():
    wrong = {**HELD, "b.weight": np.ones((2, 3), np.int8), "a.0.bias": np.ones(5, np.float32)}
    del wrong["a.0.weight"]
    with pytest.raises(ConfigError) as raised:
        Tensors(wrong, "some/w.pth", "a network").check(SHAPES, "nothing")
    assert str(raised.value) == (
        "some/w.pth: not the weights of a network: missing: a.0.weight; "
        "unexpected: bn.num_batches_tracked; of another shape: a.0.bias [5] instead of [4]; "
        f"not of finite floats: b.weight (3 tensors, hash {params_hash(wrong)})"
    )


def test_many_names_are_counted():
    with pytest.raises(ConfigError, match="missing: 0, 1, 2, and 7 more "):
        Tensors({}, "w", "a network").check({str(n): (1,) for n in range(10)}, "nothing")


def test_a_tensor_that_tells_sizes():
    held = Tensors(HELD, "w", "a network")
    assert held.shape("b.weight", 2) == (2, 3)
    assert held.count(r"a\.(\d+)\.") == 1
    with pytest.raises(ConfigError, match="w: not the weights of a network: there is no c "):
        held.shape("c", 2)
    with pytest.raises(ConfigError, match=r"b\.weight is \[2, 3\], not of rank 3"):
        held.shape("b.weight", 3)
