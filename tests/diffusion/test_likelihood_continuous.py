"""The bound in continuous time against entropies: the exact denoiser loses nothing (I-MMSE)."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture_denoiser

from diffusion_jax.diffusion import likelihood, schedules
from diffusion_jax.diffusion.likelihood import Density, Pixels, continuous_bound, levels, uniforms
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.errors import ConfigError

WEIGHTS, MEANS, STDS = np.array([[0.3, 0.5, 0.2], [-1.2, 0.4, 1.5], [0.25, 0.35, 0.3]])
SCHEDULES = [schedules.cosine(), schedules.linear_beta(), schedules.edm(), schedules.sigmoid()]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_mixture(x, weights=WEIGHTS, means=MEANS, stds=STDS):
    """log p of a mixture of Gaussians, in NumPy."""
    z = (x[..., None] - means) / stds
    return np.log((weights * np.exp(-0.5 * z**2) / (stds * np.sqrt(2 * np.pi))).sum(-1))


def mixture_entropy():
    x = np.linspace(-6.0, 6.0, 20001)
    log_p = log_mixture(x)
    return np.trapezoid(-np.exp(log_p) * log_p, x)


def fisher_information():
    x = np.linspace(-6.0, 6.0, 20001)
    log_p = log_mixture(x)
    return np.trapezoid(np.exp(log_p) * np.gradient(log_p, x) ** 2, x)


def draw_mixture(seed, count):
    random = np.random.default_rng(seed)
    part = random.choice(3, count, p=WEIGHTS)
    return random.normal(MEANS[part], STDS[part])[:, None]


@functools.cache
def mixture_mmse(snr):
    """E |x0 - E[x0 | sqrt(snr) x0 + eps]|^2, by quadrature over the state."""
    std = np.sqrt(1.0 + snr * STDS**2)
    centre = np.sqrt(snr) * MEANS
    x = np.linspace((centre - 9 * std).min(), (centre + 9 * std).max(), 6001)
    z = (x[:, None] - centre) / std
    joint = WEIGHTS * np.exp(-0.5 * z**2) / std
    share = joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)
    mean = (share * (MEANS + np.sqrt(snr) * STDS**2 / std * z)).sum(1)
    density = joint.sum(1) / np.sqrt(2 * np.pi)
    second = (WEIGHTS * (MEANS**2 + STDS**2)).sum()
    return second - np.trapezoid(density * mean**2, x)


@pytest.mark.parametrize("proposal", ["gaussian", "time"])
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=lambda s: type(s).__name__)
def test_exact_bound_is_the_entropy_both_ways(schedule, proposal):
    """All three terms by quadrature, noise levels by Gauss-Legendre over the numbers u."""
    first, entropy = 1e-3, mixture_entropy()
    assert abs(entropy - 1.184240) < 1e-6
    # Uniform times crowd at the first one, where the quadrature must follow.
    nodes, weights = np.polynomial.legendre.leggauss(200 if proposal == "time" else 40)
    u = jnp.asarray(0.5 * (nodes + 1.0))
    t, factor = levels(u**3, schedule, first_time=first, proposal=proposal)
    factor = np.asarray(factor * 3 * u**2)
    snr = np.asarray((schedule.alpha(t) / schedule.sigma(t)) ** 2)
    diffusion = sum(
        0.5 * w * f * mixture_mmse(float(s)) for w, f, s in zip(weights, factor, snr, strict=True)
    )
    second = (WEIGHTS * (MEANS**2 + STDS**2)).sum()
    prior = Gaussian(schedule).prior_kl(np.array([np.sqrt(second)]))[0]
    alpha, sigma = schedule.alpha(first), schedule.sigma(first)
    last = float(Density()(jnp.zeros(1), jnp.zeros(1), alpha, sigma)[0])
    # What the decoder leaves unsaid: half the Fisher information times (sigma / alpha)^2.
    unsaid = 0.5 * fisher_information() * (sigma / alpha) ** 2
    assert unsaid < 1e-3
    assert abs(prior + diffusion + last - unsaid - entropy) < 1e-5


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEDULES[1:])],
    ids=lambda s: type(s).__name__,
)
def test_estimated_bound_of_an_exact_denoiser_is_the_log_density(schedule):
    x0 = draw_mixture(1, 1500)
    first = float(schedule.t_from_logsnr(9.0))
    run = jax.jit(
        lambda x0: (
            continuous_bound(
                mixture_denoiser(schedule, WEIGHTS, MEANS, STDS),
                schedule,
                x0,
                key=jax.random.key(0),
                first_time=first,
                draws=8,
                sigma_data=0.5,
            ).total
        )
    )
    excess = likelihood.estimate(run(x0) + log_mixture(x0[:, 0]))
    assert excess.n == 1500
    assert excess.standard_error < 0.1
    assert abs(excess.value) < 3 * excess.standard_error


@pytest.mark.slow
def test_every_proposal_and_spread_estimates_the_same_integral():
    schedule, x0 = schedules.linear_beta(), draw_mixture(2, 1000)
    found = {}

    @functools.partial(jax.jit, static_argnames=("proposal", "spread"))
    def run(x0, key, proposal, spread):
        return continuous_bound(
            mixture_denoiser(schedule, WEIGHTS, MEANS, STDS),
            schedule,
            x0,
            key=key,
            first_time=0.05,
            draws=4,
            spread=spread,
            proposal=proposal,
            sigma_data=0.7,
        ).diffusion.mean(0)

    for number, (proposal, spread) in enumerate(
        [("time", "batch"), ("logsnr", "independent"), ("gaussian", "stratified")]
    ):
        key = jax.random.key(number)
        found[proposal] = likelihood.estimate(run(x0, key, proposal, spread))
    snr = [float((schedule.alpha(t) / schedule.sigma(t)) ** 2) for t in (1.0, 0.05)]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    logs = 0.5 * (np.log(snr[1] / snr[0]) * nodes + np.log(snr[1] * snr[0]))
    integrand = [0.5 * np.exp(v) * mixture_mmse(float(np.exp(v))) for v in logs]
    exact = 0.5 * np.log(snr[1] / snr[0]) * (weights * integrand).sum()
    for proposal, value in found.items():
        assert abs(value.value - exact) < 3 * value.standard_error, proposal
    assert found["gaussian"].standard_error < found["time"].standard_error


def test_the_gaussian_proposal_has_no_variance_between_levels_of_gaussian_data():
    """snr c^2 / (1 + c^2 snr) is the least error in eps, times dim: the mean term is constant."""
    width, schedule = 0.3, schedules.rectified_flow()
    u = uniforms(jax.random.key(0), 50, 4, "independent", jnp.float64)
    t, factor = levels(u, schedule, first_time=0.01, sigma_data=width)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    terms = factor * width**2 / (1.0 + width**2 * snr)
    expected = 0.5 * np.log1p(width**2 * 99.0**2)
    np.testing.assert_allclose(terms, expected, rtol=1e-9)


def test_stratified_numbers_lie_one_in_each_cell():
    for spread in ("stratified", "batch"):
        u = np.asarray(uniforms(jax.random.key(3), 5, 4, spread, jnp.float64))
        assert u.shape == (4, 5)
        np.testing.assert_array_equal(
            np.sort(np.floor(4 * u), axis=0), np.arange(4)[:, None] * np.ones(5)
        )
    gaps = np.diff(np.sort(u.ravel()))
    np.testing.assert_allclose(gaps, 1 / 20, rtol=1e-9)


@pytest.mark.slow
def test_given_numbers_are_used_and_an_example_does_not_depend_on_its_batch():
    schedule, x0 = schedules.cosine(), draw_mixture(4, 6)
    u = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 6)))
    keys = jax.random.split(jax.random.key(1), 6)
    denoise = mixture_denoiser(schedule, WEIGHTS, MEANS, STDS)
    whole = continuous_bound(denoise, schedule, x0, key=keys, u=u)
    part = continuous_bound(denoise, schedule, x0[3:], key=keys[3:], u=u[:, 3:])
    np.testing.assert_allclose(whole.total[3:], part.total, rtol=1e-9)
    # A denoiser that knows the answer leaves nothing but the ends.
    blind = continuous_bound(lambda x, t: jnp.zeros_like(x), schedule, x0, key=keys, u=u)
    factor = levels(u, schedule).factor
    np.testing.assert_allclose(blind.diffusion, factor * x0[:, 0] ** 2, rtol=1e-9)


def test_pixels_are_probabilities_of_the_posterior_with_equal_chances():
    decoder, random = Pixels(7, -1.0, 2.0), np.random.default_rng(5)
    alpha, sigma = 0.9, 0.4
    x0, noise = decoder.values[[0, 3, 6, 3]], random.normal(size=4)
    z = alpha * x0 + sigma * noise
    chances = np.exp(-0.5 * ((z[:, None] - alpha * decoder.values) / sigma) ** 2)
    chances /= chances.sum(1, keepdims=True)
    expected = -np.log(chances[np.arange(4), [0, 3, 6, 3]])
    actual = decoder(jnp.asarray(x0), jnp.asarray(noise), alpha, sigma)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_bound_of_pixels_is_the_entropy_of_their_law():
    """Values -1, 0, 1 with unequal chances; the denoiser knows them."""
    chances, decoder, schedule = np.array([0.6, 0.3, 0.1]), Pixels(3), schedules.cosine()
    values = decoder.values
    x0 = np.random.default_rng(6).choice(values, (1500, 1), p=chances)

    def denoise(x, t):
        distance = x[..., None] - schedule.alpha(t)[:, None, None] * values
        scaled = distance / schedule.sigma(t)[:, None, None]
        return jax.nn.softmax(jnp.log(chances) - 0.5 * scaled**2) @ values

    bound = continuous_bound(
        denoise, schedule, x0, key=jax.random.key(0), first_time=0.02, draws=8, decoder=decoder
    )
    log_p = np.log(chances[np.round(x0[:, 0] + 1).astype(int)])
    excess = likelihood.estimate(bound.total + log_p)
    assert excess.standard_error < 0.1
    assert abs(excess.value) < 3 * excess.standard_error
    assert float(bound.reconstruction.max()) < 1e-9  # 1 / 0.03 of noise apart


def test_estimates_and_their_units():
    values = np.random.default_rng(7).normal(3.0, 2.0, 400)
    found = likelihood.estimate(values)
    assert found.n == 400
    assert abs(found.value - 3.0) < 4 * found.standard_error
    assert abs(found.standard_error - 0.1) < 0.02
    bits = likelihood.bits_per_dim(found, 8)
    np.testing.assert_allclose(bits[:2], np.array(found[:2]) / (8 * np.log(2)))
    assert likelihood.estimate(values[:1]).standard_error == np.inf
    assert found.shifted(1.0) == (found.value + 1.0, found.standard_error, 400)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_time": 0.0}, "first_time=0.0; expected a time between 0 and 1"),
        ({"first_time": 1.0}, "first_time=1.0"),
        ({"first_time": "a"}, "first_time='a'; expected a time between 0 and 1"),
        ({"key": None}, "key=None; continuous_bound draws noise: give key"),
        ({"u": jnp.full((2, 3), -0.2)}, "u=-0.2; expected numbers from 0 to 1"),
        ({"u": np.full((2, 3), np.nan)}, "u=nan; expected numbers from 0 to 1"),
        ({"sigma_data": "a"}, "sigma_data='a'; expected a positive"),
        ({"proposal": "snr"}, "proposal='snr' is unknown"),
        ({"proposal": "logsnr"}, "alpha.1. = 0"),
        ({"spread": "even"}, "spread='even' is unknown"),
        ({"draws": 0}, "draws=0; expected at least 1"),
        ({"sigma_data": 0.0}, "sigma_data=0.0; expected a positive"),
        ({"u": jnp.zeros((2, 5))}, r"u has shape \(2, 5\); expected \[draws, 3\]"),
    ],
)
def test_mistakes_are_one_line(options, words):
    options = {"key": jax.random.key(0), **options}
    with pytest.raises(ConfigError, match=words) as raised:
        # The check of annotations that the tests turn on would come first.
        inspect.unwrap(continuous_bound)(
            lambda x, t: x, schedules.cosine(), jnp.ones((3, 2)), **options
        )
    assert "\n" not in str(raised.value)


def test_other_mistakes_are_one_line_too():
    for bad, words in [
        (lambda: Pixels(1), "count=1"),
        (lambda: levels(jnp.array([0.2, 1.5]), schedules.cosine()), "u=1.5; expected numbers from"),
        (
            lambda: inspect.unwrap(uniforms)(jax.random.key(0), 3, 2.5),
            "draws=2.5; expected a whole number",
        ),
        (lambda: inspect.unwrap(uniforms)(None, 3, 2), "key=None; uniforms draws noise: give key"),
        (
            lambda: inspect.unwrap(likelihood.dequantise)(np.zeros((2, 3)), None, 0.1),
            "key=None; dequantise draws noise: give key",
        ),
        (
            lambda: inspect.unwrap(likelihood.dequantise)(np.zeros((2, 3)), jax.random.key(0), "a"),
            "width='a'; expected a positive number",
        ),
        (lambda: Pixels(4, 1.0, -1.0), "low=1.0, high=-1.0"),
        (lambda: likelihood.estimate(np.zeros((2, 2))), r"values has shape \(2, 2\)"),
        (lambda: likelihood.bits_per_dim(likelihood.Estimate(1.0, 1.0, 2), 0), "dimensions=0"),
    ]:
        with pytest.raises(ConfigError, match=words) as raised:
            bad()
        assert "\n" not in str(raised.value)
