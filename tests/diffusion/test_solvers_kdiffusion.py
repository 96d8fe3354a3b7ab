"""Deterministic methods of k-diffusion and PNDM, exact inversion and adaptive steps."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian_denoiser, mixture_denoiser
from jax.scipy.stats import norm

from diffusion_jax.diffusion import schedules, solvers, time_grids
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.lms import adams_weights
from diffusion_jax.errors import ConfigError

WEIGHTS, MEANS, STDS = np.array([[0.3, 0.5, 0.2], [-1.2, 0.4, 1.5], [0.25, 0.35, 0.3]])
COSINE, FLOW, EDM = schedules.cosine(), schedules.rectified_flow(), schedules.edm(sigma_max=10.0)
TIMES = np.array([1.0, 0.83, 0.55, 0.3, 0.12, 0.0])
RNG = np.random.default_rng(12)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_map(schedule, x, t, s, mean=0.4, std=0.6):
    """The probability-flow ODE of Gaussian data keeps the number of standard deviations."""
    deviation = [np.hypot(schedule.alpha(r) * std, schedule.sigma(r)) for r in (t, s)]
    return schedule.alpha(s) * mean + deviation[1] / deviation[0] * (x - schedule.alpha(t) * mean)


def mixture_map(schedule, x, t, s):
    """Quantile to quantile, by bisection."""

    def cdf(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scale = np.sqrt(alpha**2 * STDS**2 + sigma**2)
        return np.asarray((WEIGHTS * norm.cdf((x[..., None] - alpha * MEANS) / scale)).sum(-1))

    target, low, high = cdf(x, t), np.full_like(x, -10.0), np.full_like(x, 10.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = cdf(middle, s) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def sample(name, schedule, times, x, denoise=None, **options):
    solver = solvers.get(name)
    denoise = denoise or gaussian_denoiser(schedule)
    return jax.jit(lambda x: solver(denoise, schedule, times, x, **options))(x)


@pytest.mark.slow
def test_orders_of_lms_pay_off():
    t, s = EDM.t_from_logsnr(np.array([-4.0, 4.0]))
    x = RNG.normal(size=20) * 10.0
    times = time_grids.uniform_logsnr(EDM, 80, t, s)
    exact = mixture_map(EDM, x, t, s)
    error = [
        np.sqrt(
            np.mean(
                (
                    sample(
                        "lms",
                        EDM,
                        times,
                        x,
                        mixture_denoiser(EDM, WEIGHTS, MEANS, STDS),
                        order=order,
                    )
                    - exact
                )
                ** 2
            )
        )
        for order in (1, 2, 3)
    ]
    assert error[2] < 0.2 * error[1] < 0.04 * error[0]


def test_adams_weights_integrate_polynomials_exactly():
    u = np.sort(RNG.uniform(0.1, 3.0, size=8))[::-1]
    for order in (1, 2, 3, 4):
        weights = adams_weights(np, u[:-1], u[1:], order)
        for k in range(len(u) - 1):
            known = min(k + 1, order)
            values = np.polynomial.Polynomial(RNG.normal(size=known))
            primitive = values.integ()
            total = sum(weights[k, j] * values(u[k - j]) for j in range(known))
            np.testing.assert_allclose(total, primitive(u[k + 1]) - primitive(u[k]), rtol=1e-9)
            assert not weights[k, known:].any()
    # Equal steps: Bashforth's own numbers.
    equal = np.linspace(2.0, 1.0, 6)
    last = adams_weights(np, equal[:-1], equal[1:], 4)[-1] / -0.2
    np.testing.assert_allclose(last, np.array([55, -59, 37, -9]) / 24, rtol=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, FLOW, EDM], ids=["cosine", "flow", "edm"])
def test_a_point_mass_is_reached_along_straight_lines(schedule):
    # From t = 1, where alpha is 0 for two of the three, to sigma = 0.
    x, mean = RNG.normal(size=(3, 4)), 0.7
    eps = (x - schedule.alpha(1.0) * mean) / schedule.sigma(1.0)
    expected = np.stack([schedule.alpha(t) * mean + schedule.sigma(t) * eps for t in TIMES])
    names = ["midpoint", "rk4", "kdpm2", "lms", "pndm", "bdia", "flow_heun", "flow_euler"]

    def run(x):
        known = lambda x, t: jnp.full_like(x, mean)  # noqa: E731
        return [solvers.get(name)(known, schedule, TIMES, x, trajectory=True) for name in names]

    for name, (end, states) in zip(names, jax.jit(run)(x), strict=True):
        np.testing.assert_allclose(states, expected, rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(states[-1], end)


@pytest.mark.parametrize("name", ["midpoint", "rk4", "kdpm2", "lms", "pndm"])
def test_pure_noise_to_data_in_few_steps(name):
    # Gaussian data, alpha(1) = 0: far closer to the exact map than Euler's method.
    x = RNG.normal(size=(2, 50))
    exact = gaussian_map(FLOW, x, 1.0, 0.0)
    errors = [
        float(np.abs(np.asarray(sample(n, FLOW, time_grids.uniform(20), x)) - exact).max())
        for n in (name, "euler")
    ]
    assert errors[0] < 0.4 * errors[1], errors


def test_pndm_steps_as_it_says():
    # PLMS by hand: the step repeated, then two, three and four values; DDIM's transfer.
    times, x = np.array([0.9, 0.8, 0.7, 0.55, 0.4, 0.2]), RNG.normal(size=(3, 4))
    denoise = gaussian_denoiser(COSINE)

    def eps(x, t):
        return (x - COSINE.alpha(t) * np.asarray(denoise(x, t))) / COSINE.sigma(t)

    def move(x, e, t, s):
        x0 = (x - COSINE.sigma(t) * e) / COSINE.alpha(t)
        return COSINE.alpha(s) * x0 + COSINE.sigma(s) * e

    e = [eps(x, times[0])]
    e1 = eps(move(x, e[0], *times[:2]), times[1])
    state = move(x, (e[0] + e1) / 2, *times[:2])
    combinations = [[3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    combinations += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * 2
    for k, combination in enumerate(combinations, 1):
        e.append(eps(state, times[k]))
        total = sum(w * value for w, value in zip(combination, e[::-1], strict=False))
        state = move(state, total, *times[k : k + 2])
    np.testing.assert_allclose(
        sample("pndm", COSINE, times, x, prk=False), state, rtol=1e-10, atol=1e-12
    )


def rough(x, t):
    """No denoiser of anything: exactness must not hang on accuracy."""
    return Denoised(jnp.tanh(3.0 * x) + 0.3 * expand(t, x), jnp.sin(2.0 * x))


@pytest.mark.parametrize("schedule", [COSINE, EDM], ids=["cosine", "edm"])
def test_bdia_is_inverted_to_rounding(schedule):
    x = RNG.normal(size=(3, 4))
    for gamma in (1.0, 0.9):

        def there_and_back(x, gamma=gamma):
            fall = TIMES
            pair = solvers.bdia_pair(rough, schedule, fall, x, gamma=gamma)
            up = solvers.bdia_inversion(
                rough, schedule, fall[::-1], pair.x, gamma=gamma, second=pair.before
            )
            high = solvers.bdia_inversion(rough, schedule, fall[::-1], x, gamma=gamma)
            down = solvers.bdia(rough, schedule, fall, high.x, gamma=gamma, second=high.before)
            return up.x, down

        for returned in jax.jit(there_and_back)(x):
            np.testing.assert_allclose(returned, x, rtol=1e-10, atol=1e-10)


def test_ddim_inversion_and_its_error():
    # In steps and, with iterations, in nothing: then it is the inverse of DDIM.
    t, s = COSINE.t_from_logsnr(np.array([-5.0, 5.0]))
    x, errors = RNG.normal(size=(2, 5)), []
    denoise = gaussian_denoiser(COSINE)

    def round_trip(steps, **options):
        rising = time_grids.uniform_logsnr(COSINE, steps, t, s)[::-1]
        run = jax.jit(lambda x: solvers.ddim_round_trip(denoise, COSINE, rising, x, **options))
        trip = run(x)
        assert trip.error.shape == (2,)
        expected = np.sqrt(((trip.returned - x) ** 2).mean(1) / (x**2).mean(1))
        np.testing.assert_allclose(trip.error, expected, rtol=1e-9)
        return trip

    errors = [float(round_trip(steps).error.max()) for steps in (20, 160)]
    assert np.log2(errors[0] / errors[1]) / 3 > 0.75
    solved = round_trip(20, iterations=40)
    assert solved.error.max() < 1e-9
    exact = gaussian_map(COSINE, x, s, t)
    np.testing.assert_allclose(round_trip(160).x, exact, atol=0.05)
    # From data, where eps is open: a point mass goes straight to the noise it is asked for.
    end = solvers.ddim_inversion(
        lambda x, t: Denoised(jnp.full_like(x, 0.7), jnp.full_like(x, -1.3)),
        FLOW,
        TIMES[::-1],
        np.full((1, 2), 0.7),
    )
    np.testing.assert_allclose(end, -1.3, rtol=1e-12)


def test_a_round_trip_is_measured_in_float32_and_that_of_zeros_in_units():
    times = [0.1, 0.5, 0.9]
    denoise = gaussian_denoiser(COSINE)
    x = jnp.asarray(RNG.normal(size=(2, 64)), jnp.bfloat16)
    trip = solvers.ddim_round_trip(denoise, COSINE, times, x)
    missed = np.asarray(trip.returned, np.float64) - np.asarray(x, np.float64)
    expected = np.sqrt((missed**2).mean(1) / (np.asarray(x, np.float64) ** 2).mean(1))
    np.testing.assert_allclose(trip.error, expected, rtol=1e-5)
    zeros = solvers.ddim_round_trip(denoise, COSINE, times, np.zeros((2, 3)))
    np.testing.assert_allclose(zeros.error, np.sqrt((zeros.returned**2).mean(1)), rtol=1e-12)
    assert (zeros.error > 0.0).all()
    nothing = solvers.ddim_round_trip(lambda x, t: 0.0 * x, COSINE, times, np.zeros((2, 3)))
    np.testing.assert_array_equal(nothing.error, 0.0)


def adaptive(schedule, times, x, tolerance, **options):
    def run(x):
        return solvers.dopri5(
            gaussian_denoiser(schedule),
            schedule,
            times,
            x,
            rtol=tolerance,
            atol=tolerance,
            **options,
        )

    return jax.jit(run)(x)


@pytest.mark.parametrize(
    "schedule",
    [FLOW, *(pytest.param(s, marks=pytest.mark.slow) for s in (COSINE, EDM))],
    ids=["flow", "cosine", "edm"],
)
def test_adaptive_steps_keep_their_tolerance(schedule):
    x = RNG.normal(size=(4, 6)) * schedule.sigma(1.0)
    exact, counts = gaussian_map(schedule, x, 1.0, 0.1), []
    for tolerance in (1e-3, 1e-6, 1e-9):
        end, count = adaptive(schedule, [1.0, 0.1], x, tolerance, evaluations=True)
        assert np.abs(end - exact).max() < 10 * tolerance
        counts.append(int(count))
    assert 7 <= counts[0] < counts[1] < counts[2]
    # A fifth-order method: 1000 times the accuracy for about 4 times the steps.
    assert counts[2] < 6 * counts[1]


def test_adaptive_steps_are_of_an_example_alone():
    # Each has its own: others in the batch, hard or far away, change nothing but the count.
    x = RNG.normal(size=(3, 4)) * np.array([1.0, 1.0, 40.0])[:, None]
    whole, many = adaptive(FLOW, [1.0, 0.2], x, 1e-6, evaluations=True)
    part, few = adaptive(FLOW, [1.0, 0.2], x[:1], 1e-6, evaluations=True)
    np.testing.assert_allclose(part, whole[:1], rtol=1e-12)
    assert few <= many


def test_adaptive_steps_give_a_function_times_that_broadcast():
    # Of a square x too, where [batch] would be taken for the last axis.
    x = RNG.normal(size=(4, 4))
    seen = []

    def of_time(x, t):
        seen.append((np.shape(t), expand(t, x).shape))
        return 0.3 * t + 0.5 * x

    def alike(x, t, carry):
        return Denoised(0.3 * expand(t, x) + 0.5 * x), carry

    run = jax.jit(lambda x, d: solvers.dopri5(d, FLOW, [1.0, 0.2], x), static_argnums=1)
    np.testing.assert_allclose(run(x, of_time), run(x, Denoiser(alike)), rtol=1e-12)
    assert set(seen) == {((4, 1), (4, 1))}


def test_adaptive_steps_to_the_data_end_in_an_estimate():
    # The last Euler step from sigma/alpha = .002 returns x0 of there.
    x = RNG.normal(size=(2, 5))
    states = adaptive(FLOW, [1.0, 0.5, 0.0], x, 1e-8, trajectory=True, last_sigma=0.02)[1]
    t = FLOW.t_from_logsnr(-2 * np.log(0.02))
    before = gaussian_map(FLOW, x, 1.0, t)
    np.testing.assert_allclose(states[-1], gaussian_denoiser(FLOW)(before, t), atol=1e-6)
    np.testing.assert_allclose(states[1], gaussian_map(FLOW, x, 1.0, 0.5), atol=1e-6)


def test_adaptive_steps_that_do_not_arrive_are_no_numbers():
    assert np.isnan(adaptive(EDM, [1.0, 0.1], RNG.normal(size=(2, 3)), 1e-9, max_tries=3)).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lms", {"order": 5}, "order=5; expected 1, 2, 3 or 4"),
        ("lms", {"times": TIMES[:4], "order": 4}, "order=4 needs as many steps, times has 3"),
        ("pndm", {"times": TIMES[:4], "prk": True}, "prk=True takes 4 steps or more, times has 3"),
        ("pndm", {"values": "x0"}, "values"),
        ("pndm", {"stride": 0}, "stride=0"),
        ("pndm", {"stride": 2, "corrected": True}, "corrected=True takes values='eps' and no str"),
        ("pndm", {"values": "v", "corrected": True}, "corrected=True takes values='eps'"),
        ("pndm", {"corrected": True}, r"corrected=True divides by alpha.*times\[0\]=1"),
        ("rk4", {"coordinates": "flou"}, "coordinates.*did you mean 'flow'"),
        ("rk4", {"coordinates": "sigma"}, "coordinates='sigma' divides by alpha"),
        ("midpoint", {"times": TIMES[::-1]}, r"times\[1\]=0.12 does not lie below"),
        ("bdia", {"gamma": 1.5}, "gamma=1.5"),
        ("bdia", {"second": np.zeros((2, 3))}, r"second has shape \(2, 3\); expected \(2, 4\)"),
        ("dopri5", {"rtol": 0.0}, "rtol=0.0; expected a positive number"),
        ("bdia_inversion", {}, r"times\[1\]=0.83 does not lie above times\[0\]=1.0"),
        ("bdia_inversion", {"gamma": 0.0}, "gamma=0.0; expected above 0"),
        ("bdia_inversion", {"times": [0.0, 1.0]}, "times has 2 entries"),
        ("ddim_inversion", {}, r"times\[1\]=0.83 does not lie above"),
        ("ddim_inversion", {"iterations": -1}, "iterations=-1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    options = {"times": TIMES, **options}
    times = options.pop("times")
    with pytest.raises(ConfigError, match=message) as error:
        getattr(solvers, name)(gaussian_denoiser(COSINE), COSINE, times, np.ones((2, 4)), **options)
    assert "\n" not in str(error.value)


def test_counts_that_are_not_whole_are_refused():
    # As they come without the types being checked, which these tests do.
    denoise, x = gaussian_denoiser(COSINE), np.ones((2, 4))
    dopri5, strided = map(inspect.unwrap, (solvers.dopri5, stepping.strided))
    with pytest.raises(ConfigError, match=r"max_tries=0\.5; expected a whole number"):
        dopri5(denoise, COSINE, TIMES, x, max_tries=0.5)
    steps = stepping.steps_of(as_denoiser(denoise), COSINE, TIMES)
    with pytest.raises(ConfigError, match=r"stride=1\.5; expected 1 or more whole"):
        strided(COSINE, steps, 1.5)
