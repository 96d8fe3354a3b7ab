"""The density of the probability-flow ODE against exact ones, and dequantisation of known laws."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtr
from jax.scipy.stats import norm

from diffusion_jax.diffusion import likelihood, schedules, time_grids
from diffusion_jax.diffusion.likelihood import (
    bin_width,
    dequantise,
    dequantised_log_probability,
    flow_log_density,
)

RNG = np.random.default_rng(11)
DIM = 3
MEAN = RNG.normal(size=DIM)
FACTOR = RNG.normal(size=(DIM, DIM)) * 0.4 + np.diag(RNG.uniform(0.3, 1.0, DIM))
COVARIANCE = FACTOR @ FACTOR.T
X = MEAN + RNG.normal(size=(4, DIM)) @ FACTOR.T
SCHEDULES = [schedules.cosine(), schedules.rectified_flow(), schedules.edm(sigma_max=1e5)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_denoiser(schedule, mean=MEAN, covariance=COVARIANCE):
    """E[x0 | x_t] of correlated Gaussian data; its Jacobian is not diagonal."""
    widths, axes = np.linalg.eigh(covariance)

    def denoise(x, t):
        # t is a scalar or [batch].
        alpha, sigma = (jnp.asarray(f(t))[..., None] for f in (schedule.alpha, schedule.sigma))
        gain = alpha * widths / (alpha**2 * widths + sigma**2)
        return mean + (gain * ((x - alpha * mean) @ axes)) @ axes.T

    return denoise


def log_gaussian(x, mean, covariance):
    centred = x - mean
    squares = (centred @ np.linalg.inv(covariance) * centred).sum(-1)
    return -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])


@pytest.mark.parametrize(
    ("schedule", "method"),
    [*((schedule, "rk4") for schedule in SCHEDULES), (SCHEDULES[1], "heun")],
    ids=lambda s: s if isinstance(s, str) else type(s).__name__,
)
def test_gaussian_density_to_a_ten_thousandth_of_a_nat(schedule, method):
    steps = {"heun": 1000, "rk4": 60}[method]
    top, low = (float(schedule.t_from_logsnr(v)) for v in (-14.0, 12.0))
    inner = time_grids.uniform_logsnr(schedule, steps, top, low)
    times = np.concatenate([[1.0], inner, [0.0]])
    run = jax.jit(
        lambda x: flow_log_density(
            gaussian_denoiser(schedule), schedule, times, x, trace="exact", method=method
        )[:2]
    )
    log_density, latent = run(jnp.asarray(X))
    np.testing.assert_allclose(log_density, log_gaussian(X, MEAN, COVARIANCE), atol=1e-4)
    assert latent.shape == X.shape
    part = flow_log_density(
        gaussian_denoiser(schedule), schedule, times[-4:], X, trace="exact", method=method
    )
    assert part.evaluations == {"heun": 6, "rk4": 12}[method]


def test_a_state_with_noise_has_the_density_of_the_noisy_data():
    schedule, t = schedules.linear_beta(), 0.3
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * X + sigma * RNG.normal(size=X.shape)
    times = time_grids.uniform_logsnr(schedule, 40, 1.0, t)
    actual = flow_log_density(gaussian_denoiser(schedule), schedule, times, x, trace="exact")
    state = alpha**2 * COVARIANCE + sigma**2 * np.eye(DIM)
    expected = log_gaussian(x, alpha * MEAN, state)
    # What is left of the data at t = 1 is not quite the prior: alpha(1) is 0.0066.
    np.testing.assert_allclose(actual.log_density, expected, atol=2 * schedule.alpha(1.0) * 4)
    end = alpha_end, sigma_end = schedule.alpha(1.0), schedule.sigma(1.0)
    assert all(end)
    latent = np.asarray(actual.latent) * np.hypot(alpha_end, sigma_end)
    whole = alpha_end**2 * COVARIANCE + sigma_end**2 * np.eye(DIM)
    prior = log_gaussian(latent, np.zeros(DIM), np.eye(DIM) * (alpha_end**2 + sigma_end**2))
    true_prior = log_gaussian(latent, alpha_end * MEAN, whole)
    np.testing.assert_allclose(actual.log_density - prior + true_prior, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "order"),
    [("rk4", 4), *(pytest.param(*m, marks=pytest.mark.slow) for m in (("euler", 1), ("heun", 2)))],
)
def test_orders_on_a_uniform_logsnr_grid(method, order):
    schedule = schedules.cosine()
    # A mixture, so that the divergence depends on the state.
    means = np.array([[0.8, -0.3, 0.1], [-0.6, 0.4, 0.2]])

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = 0.09 * alpha**2 + sigma**2
        centred = x[:, None] - alpha * means
        share = jax.nn.softmax(-0.5 * (centred**2).sum(-1) / variance)
        part = means + alpha * 0.09 / variance * centred
        return (share[..., None] * part).sum(1)

    @functools.partial(jax.jit, static_argnames="steps")
    def run(x, steps):
        times = time_grids.uniform_logsnr(schedule, steps, 0.98, 0.05)
        return flow_log_density(
            denoise, schedule, times, x, trace="exact", method=method
        ).log_density

    steps = {1: (400, 800), 2: (40, 80), 4: (20, 40)}[order]
    exact = TRUTH.setdefault("x", None)
    if exact is None:
        times = time_grids.uniform_logsnr(schedule, 320, 0.98, 0.05)
        exact = TRUTH["x"] = flow_log_density(denoise, schedule, times, X, trace="exact")[0]
    errors = [float(jnp.abs(run(jnp.asarray(X), n) - exact).max()) for n in steps]
    assert np.log2(errors[0] / errors[1]) > order - 0.25
    assert errors[1] > 1e-12


TRUTH: dict = {}


@pytest.mark.parametrize("trace", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_hutchinson_is_unbiased(trace):
    """Of Gaussian data the way does not depend on the draws, and the estimate is linear in them."""
    schedule, count = schedules.linear_beta(), 1200
    times = time_grids.uniform_logsnr(schedule, 10, 1.0, 0.02)
    x = jnp.tile(jnp.asarray(X[:1]), (count, 1))
    denoise = gaussian_denoiser(schedule)
    key = jax.random.key(5)

    @functools.partial(jax.jit, static_argnames="probes")
    def run(x, probes):
        return flow_log_density(
            denoise, schedule, times, x, key=key, trace=trace, probes=probes, method="heun"
        ).log_density

    exact = flow_log_density(denoise, schedule, times, X[:1], trace="exact", method="heun")
    one, four = (likelihood.estimate(run(x[:n], k)) for n, k in ((count, 1), (count // 2, 4)))
    for found in (one, four):
        assert abs(found.value - float(exact.log_density[0])) < 3 * found.standard_error
    spread = [e.standard_error * np.sqrt(e.n) for e in (one, four)]
    assert 1.7 < spread[0] / spread[1] < 2.3
    assert spread[0] > 0.05


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=lambda s: type(s).__name__)
def test_adaptive_steps_meet_the_density_with_few_evaluations(schedule):
    times = np.array([1.0, 0.5, float(schedule.t_from_logsnr(14.0))])
    run = jax.jit(
        functools.partial(
            flow_log_density,
            gaussian_denoiser(schedule),
            schedule,
            times,
            trace="exact",
            method="dopri5",
        )
    )
    alpha = schedule.alpha(times[-1])
    found = run(jnp.asarray(X) * alpha)
    log_density = np.asarray(found.log_density) + DIM * np.log(alpha)
    np.testing.assert_allclose(log_density, log_gaussian(X, MEAN, COVARIANCE), atol=1e-4)
    assert 20 < int(found.evaluations) < 250


def test_one_key_and_a_key_for_each_example_agree_and_batches_do_not_matter():
    schedule = schedules.cosine()
    times = time_grids.uniform_logsnr(schedule, 4, 0.9, 0.1)
    run = functools.partial(
        flow_log_density, gaussian_denoiser(schedule), schedule, times, method="euler"
    )
    key = jax.random.key(2)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
    whole = run(X, key=key).log_density
    np.testing.assert_allclose(whole[2:], run(X[2:], key=keys[2:]).log_density, rtol=1e-9)


CELLS = np.array([-1.0, 0.0, 1.0])


def cell_law(width=1.0):
    """Probability of each of the values -1, 0, 1 under a narrow normal density."""
    edges = np.asarray(ndtr((CELLS[:, None] + width * np.array([-0.5, 0.5]) - 0.2) / 0.35))
    return edges[:, 1] - edges[:, 0]


def narrow(x, keys):
    del keys
    return norm.logpdf(x, 0.2, 0.35).sum(1)


@pytest.mark.slow
def test_dequantisation_bounds_a_known_law_and_more_draws_are_tighter():
    x0 = jnp.tile(jnp.asarray(CELLS[[0, 1, 2, 1]])[None], (3000, 1))
    exact = np.log(cell_law())[[0, 1, 2, 1]].sum()
    gaps = []
    for draws in (1, 4, 64):
        run = jax.jit(
            functools.partial(
                dequantised_log_probability, narrow, key=jax.random.key(draws), width=1, draws=draws
            )
        )
        found = likelihood.estimate(run(x0))
        gaps.append(exact - found.value)
        assert gaps[-1] > -3 * found.standard_error
    # By Jensen's inequality; one draw loses E log of the density within a cell.
    u = np.linspace(-0.5, 0.5, 20001)
    inside = [np.trapezoid(norm.logpdf(c + u, 0.2, 0.35), u) for c in CELLS[[0, 1, 2, 1]]]
    assert abs(gaps[0] - (exact - np.sum(inside))) < 0.15
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_one_draw_of_a_flat_density_is_exact():
    width = bin_width(256)
    assert abs(width - 2 / 255) < 1e-12
    x0 = jnp.asarray(RNG.integers(0, 256, (5, 2, 2)) * width - 1.0)
    density = lambda x, keys: jnp.full(len(x), -4 * np.log(256 * width))  # noqa: E731
    actual = dequantised_log_probability(density, x0, key=jax.random.key(0), width=width, draws=3)
    np.testing.assert_allclose(actual, -4 * np.log(256), rtol=1e-9)


def test_noise_fills_the_cell_of_its_value():
    x0 = jnp.asarray([[-1.0, 1.0]] * 5000)
    x = np.asarray(dequantise(x0, jax.random.key(1), 0.5)) - np.asarray(x0)
    assert np.abs(x).max() <= 0.25
    np.testing.assert_allclose(x.mean(0), 0.0, atol=3 * 0.5 / np.sqrt(12 * 5000))
    np.testing.assert_allclose(x.var(0), 0.25 / 12, rtol=0.06)
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.05


TIMES = time_grids.uniform(3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace": "hutchinson"}, "trace='hutchinson' is unknown"),
        ({"method": "rk5"}, "method='rk5' is unknown .did you mean 'rk4'"),
        ({"key": None}, "key=None; trace='rademacher' draws vectors"),
        ({"probes": 0}, "probes=0; expected at least 1"),
        ({"method": "dopri5", "rtol": 0.0}, "rtol=0.0, atol=1e-05; expected positive"),
        ({"times": TIMES[::-1]}, "does not lie below"),
        ({"x": jnp.ones((2, 4097)), "trace": "exact"}, "each of 4097 dimensions"),
    ],
)
def test_mistakes_are_one_line(options, words):
    given = {"key": jax.random.key(0), "times": TIMES, "x": jnp.ones((2, 3)), **options}
    times, x = given.pop("times"), given.pop("x")
    with pytest.raises(ValueError, match=words) as raised:
        flow_log_density(lambda x, t: x, schedules.cosine(), times, x, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"), [({"width": 0.0}, "width=0.0"), ({"draws": 0}, "draws=0")]
)
def test_mistakes_of_dequantisation_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        dequantised_log_probability(
            narrow, X, **{"key": jax.random.key(0), "width": 1.0, **options}
        )
