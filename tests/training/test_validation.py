"""Which noise levels held-out examples are judged at."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax.training.validation import cells


@pytest.mark.parametrize("count", [1, 2, 5, 38, 397, 1000, 10_000, 65_536])
def test_every_example_has_a_cell_of_its_own(count):
    size = min(256, count)
    found = np.concatenate([cells(first, size, count) for first in range(0, count, size)])[:count]
    np.testing.assert_array_equal(np.sort(found), (np.arange(count) / count).astype(np.float32))


def test_cells_do_not_follow_the_order_of_the_examples():
    found = cells(0, 1000, 1000)
    apart = np.abs(np.diff(found))
    assert ((apart > 0.35) & (apart < 0.65)).all()
    # Any tenth of the set covers all levels.
    for part in found.reshape(10, 100):
        assert np.histogram(part, 10, (0.0, 1.0))[0].tolist() == pytest.approx([10] * 10, abs=4)
