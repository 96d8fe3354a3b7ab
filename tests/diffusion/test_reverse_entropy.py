"""The entropy bounds of the reverse kernels against true conditional entropies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.diffusion.processes import Binomial, Gaussian, Masked
from diffusion_jax.diffusion.reverse_entropy import reverse_entropy_bounds

TIMES = time_grids.uniform(12)


def true_entropy(schedule, c, times):
    """H(x_s | x_t) of data N(0, c^2), from the determinant of the joint covariance."""
    found = []
    for t, s in itertools.pairwise(times):
        a, b = schedule.alpha(t), schedule.sigma(t)
        a_s, b_s = schedule.alpha(s), schedule.sigma(s)
        own, cross = a_s**2 * c**2 + b_s**2, a / a_s * (a_s**2 * c**2 + b_s**2)
        joint = np.linalg.det([[own, cross], [cross, a**2 * c**2 + b**2]])
        found.append(0.5 * np.log(2 * np.pi * np.e * joint / (a**2 * c**2 + b**2)))
    return np.array(found)


@pytest.mark.parametrize("c", [0.03, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("schedule", [schedules.linear_beta(), schedules.cosine()])
def test_they_bracket_the_entropy_of_gaussian_data(schedule, c):
    lower, upper = reverse_entropy_bounds(Gaussian(schedule), TIMES)
    true = true_entropy(schedule, c, TIMES)
    assert (lower <= true + 1e-9).all()
    assert (true <= upper + 1e-9).all()
    assert lower[-1] == -np.inf
    if c == 1.0:
        np.testing.assert_allclose(true, upper, atol=1e-9)
    else:
        assert (true[1:-1] < upper[1:-1]).all()
        assert (lower < true)[1:].all()


def test_wide_data_lose_entropy_and_need_the_other_bound():
    schedule, wide = schedules.linear_beta(), 3.0
    bounds = reverse_entropy_bounds(Gaussian(schedule), TIMES)
    assert (true_entropy(schedule, wide, TIMES) > bounds.upper).any()
    general = reverse_entropy_bounds(Gaussian(schedule), TIMES, any_data=True)
    for c in (0.1, 1.0, wide, 300.0):
        assert (true_entropy(schedule, c, TIMES) <= general.upper + 1e-9).all()
    # Met in the limit of infinite width.
    np.testing.assert_allclose(true_entropy(schedule, 3e4, TIMES), general.upper, atol=1e-4)


@pytest.mark.parametrize("c", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("schedule", [schedules.linear_beta(), schedules.rectified_flow()])
def test_the_variance_of_the_data_tells_which_bound_holds(schedule, c):
    """Rectified flow, which does not preserve the variance, needs the other one for narrow data."""
    true = true_entropy(schedule, c, TIMES)
    plain = reverse_entropy_bounds(Gaussian(schedule), TIMES).upper
    found = reverse_entropy_bounds(Gaussian(schedule), TIMES, variance=c**2).upper
    general = reverse_entropy_bounds(Gaussian(schedule), TIMES, any_data=True).upper
    assert (true <= found + 1e-9).all()
    assert (found <= general + 1e-9).all()
    assert np.isfinite(found).all()
    preserved = isinstance(schedule, type(schedules.linear_beta()))
    if preserved and c <= 1.0:
        np.testing.assert_allclose(found, plain, rtol=1e-12)
    else:
        assert (true > plain).any()
    # What is above the true variance bounds too.
    more = reverse_entropy_bounds(Gaussian(schedule), TIMES, variance=2 * c**2).upper
    assert (found <= more + 1e-9).all()


def test_they_bracket_the_entropy_of_bits():
    """Three dependent bits, with the joint of x_s and x_t by enumeration of all their states."""
    rng = np.random.default_rng(1)
    states = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    process, times = Binomial(), time_grids.uniform(6)
    data = rng.dirichlet(np.full(8, 0.4))

    def kernel(kept):
        """[from, to]."""
        same = states[:, None] == states[None]
        return np.where(same, 0.5 * (1 + kept), 0.5 * (1 - kept)).prod(-1)

    bounds = reverse_entropy_bounds(process, times)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        joint = (data @ kernel(1.0 - s))[:, None] * kernel((1.0 - t) / (1.0 - s))
        positive = joint[joint > 0]
        at_t = joint.sum(0)
        true = -(positive * np.log(positive)).sum() + (at_t * np.log(at_t)).sum()
        assert 3 * bounds.lower[k] <= true + 1e-12
        assert true <= 3 * bounds.upper[k] + 1e-12
    np.testing.assert_allclose(bounds.lower[-1], 0.0, atol=1e-12)


def test_other_processes_are_refused_in_one_line():
    with pytest.raises(ValueError, match="expected a Gaussian or binomial one"):
        reverse_entropy_bounds(Masked(5), TIMES)
