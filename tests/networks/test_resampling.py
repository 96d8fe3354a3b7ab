"""Fixed filters: what they do to constants, ramps and impulses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.networks.conv import Conv, strided
from diffusion_jax.networks.resampling import FILTERS, blur_all, enlarge, halve


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("rank", [1, 2])
def test_constants_and_ramps_keep_their_place_inside(kind, rank):
    ramp = jnp.arange(16.0)
    line = jnp.broadcast_to(ramp.reshape(1, 16, *(1,) * rank), (1, 16, *(4,) * (rank - 1), 1))
    half = halve(line, kind)
    assert half.shape == (1, 8, *(2,) * (rank - 1), 1)
    # Centres of cells: entry i of the half stands between 2i and 2i + 1.
    row = half[0, :, 0, 0] if rank > 1 else half[0, :, 0]
    scale = row[3] / 6.5  # zeros lie around the short axis
    np.testing.assert_allclose(row[1:-1], scale * (2 * np.arange(1, 7) + 0.5), rtol=1e-5)
    double = enlarge(jnp.asarray(np.arange(8.0))[None, :, None], kind)[0, :, 0]
    centres = (np.arange(16) - 0.5) / 2
    expected = np.floor(np.arange(16) / 2) if kind == "box" else centres
    np.testing.assert_allclose(double[1:-1], expected[1:-1], rtol=1e-5)


def test_fir_is_its_taps_by_impulse():
    impulse = jnp.zeros((1, 8, 1)).at[0, 3].set(1.0)
    np.testing.assert_allclose(halve(impulse, "fir")[0, :, 0], [0, 3 / 8, 1 / 8, 0], atol=1e-7)
    doubled = enlarge(impulse, "fir")[0, :, 0]
    np.testing.assert_allclose(doubled[5:9], np.array([1, 3, 3, 1]) / 4, atol=1e-7)
    assert float(doubled.sum()) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", FILTERS)
def test_blurred_strided_convolution_halves_and_stays_centred(kind):
    conv = Conv(1, 1, rank=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 1))
    out = strided(conv, blur_all(x, kind))
    np.testing.assert_allclose(out, halve(x, kind), atol=1e-6)
