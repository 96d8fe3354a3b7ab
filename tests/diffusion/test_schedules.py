"""Every schedule against the contract of `Schedule`, and each against its own closed form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import broadcasting, schedule_base, schedules

SCHEDULES = {
    "cosine": schedules.cosine(),
    "cosine_offset": schedules.cosine(0.008),
    "linear_beta": schedules.linear_beta(),
    "scaled_linear": schedules.scaled_linear(),
    "edm": schedules.edm(),
    "edm_linear": schedules.edm(sigma_min=0.01, sigma_max=20, rho=1),
    "rectified_flow": schedules.rectified_flow(),
    "rectified_flow_shift": schedules.rectified_flow(3.0),
    "sigmoid": schedules.sigmoid(),
    "sigmoid_steep": schedules.sigmoid(0.0, 3.0, 0.3),
    "table_linear": schedules.table(schedules.linear_betas()),
    "table_cosine": schedules.table(schedules.cosine_betas(50)),
    "learned": schedules.learned(units=5),
    "table_zero_snr": schedules.table(
        schedules.zero_terminal_snr(schedules.scaled_linear_betas(100))
    ),
}
NO_SIGNAL_AT_1 = {
    "cosine",
    "cosine_offset",
    "rectified_flow",
    "rectified_flow_shift",
    "sigmoid",
    "sigmoid_steep",
    "table_zero_snr",
}
# No multiple of 1/1000, 1/50 or 1/100, where tables have kinks, and not EDM's t_min.
INNER = np.array([1.3e-4, 3.7e-3, 0.0213, 0.1047, 0.3331, 0.5253, 0.7777, 0.9137, 0.99173])
METHODS = ("alpha", "sigma", "logsnr", "dalpha", "dsigma", "drift", "diffusion_squared")

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def _difference_quotient(function: Any, t: np.ndarray, step: float) -> np.ndarray:
    """Central differences of order 4, with steps relative to the distance from the ends."""
    h = step * np.minimum(t, 1.0 - t)
    near = function(t + h) - function(t - h)
    far = function(t + 2 * h) - function(t - 2 * h)
    return (8.0 * near - far) / (12.0 * h)


@every_schedule
def test_whole_numbers_are_times_too(name: str) -> None:
    function = SCHEDULES[name].alpha
    for ends in (np.array([0, 1]), np.array([0, 1], np.uint8)):
        np.testing.assert_array_equal(function(ends), function(np.array([0.0, 1.0])))
    np.testing.assert_array_equal(function(np.int64(1)), function(1.0))
    np.testing.assert_array_equal(function(jnp.array([0, 1])), function(jnp.array([0.0, 1.0])))


@every_schedule
def test_ends_are_exact(name: str) -> None:
    schedule = SCHEDULES[name]
    assert schedule.alpha(0.0) == 1.0
    assert schedule.sigma(0.0) == 0.0
    assert schedule.logsnr(0.0) == np.inf
    assert (schedule.alpha(1.0) == 0.0) == (name in NO_SIGNAL_AT_1)
    if name in NO_SIGNAL_AT_1:
        assert schedule.sigma(1.0) == pytest.approx(1.0, abs=1e-15)
        assert schedule.logsnr(1.0) == -np.inf
        assert schedule.drift(1.0) == -np.inf
        assert schedule.diffusion_squared(1.0) == np.inf


@every_schedule
def test_logsnr_and_its_inverse(name: str) -> None:
    schedule = SCHEDULES[name]
    t = np.concatenate([np.geomspace(1e-9, 0.1, 200), np.linspace(0.101, 1.0, 300)])
    t = t[np.isfinite(schedule.logsnr(t))]
    logsnr = schedule.logsnr(t)
    assert np.all(np.diff(logsnr) < 0)
    np.testing.assert_allclose(schedule.t_from_logsnr(logsnr), t, rtol=0, atol=1e-10)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    np.testing.assert_allclose(np.exp(logsnr), snr, rtol=1e-12)
    # The other way about, where t can still resolve the value.
    grid = np.linspace(max(-8.0, schedule.logsnr(0.9999)), 25.0, 100)
    np.testing.assert_allclose(schedule.logsnr(schedule.t_from_logsnr(grid)), grid, atol=1e-10)
    assert schedule.t_from_logsnr(np.inf) == 0.0


@every_schedule
def test_derivatives_match_difference_quotients(name: str) -> None:
    schedule = SCHEDULES[name]
    # Steps that stay within one cell of a table.
    t, step = (INNER[3:], 2e-5) if "table" in name else (INNER, 1e-3)
    for derivative, function in (
        (schedule.dalpha, schedule.alpha),
        (schedule.dsigma, schedule.sigma),
    ):
        expected = _difference_quotient(function, t, step)
        np.testing.assert_allclose(derivative(t), expected, rtol=2e-9, atol=2e-9)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if "table" not in n])
def test_drift_and_diffusion_have_the_marginals(name: str) -> None:
    """Mean and variance of dx = f x dt + g dw, integrated, are alpha m and alpha^2 v + sigma^2."""
    schedule = SCHEDULES[name]
    times = np.linspace(0.1, 0.9, 401)
    h = times[1] - times[0]
    halves = np.linspace(0.1, 0.9, 801)
    drift, diffusion = schedule.drift(halves), schedule.diffusion_squared(halves)

    def rate(i: int, state: np.ndarray) -> np.ndarray:
        return np.array([drift[i] * state[0], 2 * drift[i] * state[1] + diffusion[i]])

    state = np.array([schedule.alpha(0.1), schedule.sigma(0.1) ** 2])
    for i in range(0, 800, 2):
        k1 = rate(i, state)
        k2 = rate(i + 1, state + h / 2 * k1)
        k3 = rate(i + 1, state + h / 2 * k2)
        k4 = rate(i + 2, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert state[0] == pytest.approx(schedule.alpha(0.9), rel=1e-7)
    assert state[1] == pytest.approx(schedule.sigma(0.9) ** 2, rel=1e-7)


# Fields are float64 constants of the program if closed over, float32 inputs if passed.
@pytest.mark.parametrize(
    ("name", "as_argument"),
    [
        *((name, False) for name in SCHEDULES),
        ("edm", True),
        ("sigmoid", True),
        ("table_linear", True),
    ],
)
def test_float32_under_jit_is_accurate(name: str, as_argument: bool) -> None:
    schedule = SCHEDULES[name]
    t = np.float32(np.concatenate([[0.0, 1e-8, 1e-6], INNER, [0.9999, 1.0]]))

    def evaluate(schedule: Any, t: Any) -> Any:
        logsnr = schedule.logsnr(t)
        return schedule.alpha(t), schedule.sigma(t), logsnr, schedule.t_from_logsnr(logsnr)

    run = jax.jit(evaluate) if as_argument else jax.jit(lambda _, t: evaluate(schedule, t))
    results = run(schedule, jnp.asarray(t))
    assert all(result.dtype == jnp.float32 for result in results)
    alpha, sigma, logsnr, again = results
    for actual, expected in zip((alpha, sigma, logsnr), evaluate(schedule, t)[:3], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=5e-6)
    np.testing.assert_allclose(again, t, atol=3e-6)
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert (alpha[-1] == 0.0) == (name in NO_SIGNAL_AT_1)


@every_schedule
def test_jax_derivatives_equal_those_of_numpy(name: str) -> None:
    schedule = SCHEDULES[name]

    def evaluate(t: Any) -> Any:
        return [getattr(schedule, method)(t) for method in METHODS]

    with jax.enable_x64(True):
        results = jax.jit(evaluate)(jnp.asarray(INNER))
        for actual, expected in zip(results, evaluate(INNER), strict=True):
            assert actual.dtype == jnp.float64
            np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


@every_schedule
def test_numpy_in_numpy_out_without_jax(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden:
        def __getattr__(self, attribute: str) -> Any:
            raise AssertionError(f"jax.numpy.{attribute} used for NumPy input")

    for module in (broadcasting, schedule_base):
        monkeypatch.setattr(module, "jnp", Forbidden())
    monkeypatch.setattr(jax, "jvp", None)
    schedule = SCHEDULES[name]
    array = np.array([[0.1, 0.2, 0.7]], np.float32)
    for method in (*METHODS, "t_from_logsnr"):
        function = getattr(schedule, method)
        for scalar in (0.5, np.float32(0.5), 1):
            assert isinstance(function(scalar), np.float64)
        result = function(array)
        assert isinstance(result, np.ndarray)
        assert (result.dtype, result.shape) == (np.float64, (1, 3))
    assert schedule.velocity(np.ones((3, 2)), np.ones((3, 2)), array[0]).dtype == np.float64


@every_schedule
def test_velocity_is_the_slope_of_the_path(name: str) -> None:
    schedule = SCHEDULES[name]
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 4, 3, 2))
    t = np.array([0.1047, 0.3331, 0.5253, 0.9137])

    def path(t: np.ndarray) -> np.ndarray:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha[:, None, None] * x0 + sigma[:, None, None] * eps

    h = 1e-6
    slope = (path(t + h) - path(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.velocity(x0, eps, t), slope, rtol=1e-6, atol=1e-6)


@every_schedule
def test_is_a_pytree_of_its_parameters(name: str) -> None:
    schedule = SCHEDULES[name]
    leaves, structure = jax.tree.flatten(schedule)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(schedule)
    assert again.alpha(0.37) == schedule.alpha(0.37)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.num_steps = 3  # type: ignore[misc]


def test_roots_have_infinite_slopes_and_finite_rates() -> None:
    vp = schedules.linear_beta(0.3, 10.0)
    for t in (0.0, jnp.float32(0.0)):
        assert vp.dsigma(t) == np.inf
        assert vp.diffusion_squared(t) == pytest.approx(0.3, rel=1e-6)
    steep = schedules.sigmoid()
    assert steep.dalpha(1.0) == -np.inf
    assert steep.dsigma(0.0) == np.inf
    assert schedules.cosine().dsigma(0.0) == pytest.approx(np.pi / 2)
    assert schedules.cosine(0.01).dsigma(0.0) == np.inf
    assert schedules.cosine(0.01).dalpha(1.0) < -1.5


def test_linear_beta_closed_forms() -> None:
    schedule = schedules.linear_beta()
    assert np.log(schedule.alpha(1.0)) == pytest.approx(-5.025, abs=1e-12)
    beta = 0.1 + INNER * 19.9
    np.testing.assert_allclose(schedule.drift(INNER), -beta / 2, rtol=1e-12)
    np.testing.assert_allclose(schedule.diffusion_squared(INNER), beta, rtol=1e-11)


def test_scaled_linear_is_the_quadrature_of_its_rate() -> None:
    schedule = schedules.scaled_linear(0.5, 9.0)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for t in INNER:
        times = t / 2 * (nodes + 1)
        beta = (np.sqrt(0.5) * (1 - times) + np.sqrt(9.0) * times) ** 2
        integral = t / 2 * np.sum(weights * beta)
        assert schedule.alpha(t) == pytest.approx(np.exp(-integral / 2), rel=1e-13)
        beta_now = (np.sqrt(0.5) * (1 - t) + np.sqrt(9.0) * t) ** 2
        assert schedule.diffusion_squared(t) == pytest.approx(beta_now, rel=1e-11)


def test_cosine_is_the_limit_of_its_table() -> None:
    """Without clipping, the products of the paper's betas are the schedule at t = (i + 1) / T."""
    for s in (0.008, 0.1):
        betas = schedules.cosine_betas(200, s=s, max_beta=1.0)
        times = np.arange(1, 200) / 200
        alphabars = np.cumprod(1 - betas)[:-1]
        np.testing.assert_allclose(schedules.cosine(s).alpha(times) ** 2, alphabars, rtol=1e-10)
    assert schedules.cosine().alpha(1 / 3) == pytest.approx(np.sqrt(3) / 2, rel=1e-15)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (0, 3, 0.3), (-2.0, 5.0, 2.0)])
def test_sigmoid_is_the_published_formula(start: float, end: float, tau: float) -> None:
    def logistic(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    low, high = logistic(start / tau), logistic(end / tau)
    value = logistic((INNER * (end - start) + start) / tau)
    alphabar = (high - value) / (high - low)
    schedule = schedules.sigmoid(start, end, tau)
    np.testing.assert_allclose(schedule.alpha(INNER) ** 2, alphabar, rtol=1e-9)
    np.testing.assert_allclose(schedule.sigma(INNER) ** 2, 1 - alphabar, rtol=1e-9)


def test_rectified_flow_shift_multiplies_the_noise() -> None:
    plain, shifted = schedules.rectified_flow(), schedules.rectified_flow(3.0)
    np.testing.assert_allclose(plain.sigma(INNER), INNER, rtol=1e-15)
    np.testing.assert_allclose(plain.alpha(INNER) + plain.sigma(INNER), 1.0, rtol=1e-15)
    np.testing.assert_allclose(shifted.alpha(INNER) + shifted.sigma(INNER), 1.0, rtol=1e-15)
    ratio = shifted.sigma(INNER) / shifted.alpha(INNER)
    np.testing.assert_allclose(ratio, 3.0 * INNER / (1 - INNER), rtol=1e-13)


def test_edm_is_the_published_ramp_with_a_smooth_start() -> None:
    schedule = schedules.edm()
    published = [80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195]
    published += [3.256822, 1.923340, 1.088171, 0.5853481, 0.2964423, 0.1395165, 0.05994731]
    published += [0.02293452, 0.00752802, 0.002]
    times = np.linspace(1.0, schedule.t_min, 18)
    np.testing.assert_allclose(schedule.sigma(times), published, rtol=1e-6)
    assert np.all(schedule.alpha(times) == 1.0)
    assert 0.0 < schedule.t_min < 0.05
    below, above = schedule.t_min * (1 - 1e-9), schedule.t_min * (1 + 1e-9)
    assert schedule.dsigma(below) == pytest.approx(schedule.dsigma(above), rel=1e-6)
    np.testing.assert_allclose(
        schedule.sigma(schedule.t_min * np.array([0.25, 0.5])), [0.0005, 0.001], rtol=1e-14
    )


def test_edm_goes_on_beyond_sigma_max() -> None:
    schedule = schedules.edm()
    t = schedule.t_from_logsnr(-2 * np.log(500.0))
    assert t > 1.0
    assert schedule.sigma(t) == pytest.approx(500.0, rel=1e-12)


def test_learned_parameters_are_differentiated() -> None:
    def log_alpha(beta_max: Any) -> Any:
        schedule = schedules.linear_beta(0.1, beta_max)
        return jnp.log(schedule.alpha(0.5))  # A host time: the parameter alone decides.

    # log alpha(1/2) = -(beta_max - beta_min) / 16 - beta_min / 4
    assert jax.jit(jax.grad(log_alpha))(20.0) == pytest.approx(-1 / 16, rel=1e-5)
    assert isinstance(schedules.edm(sigma_max=jnp.float32(50.0)).sigma(1.0), jax.Array)
    traced = jax.jit(lambda p: schedules.edm(*p).t_from_logsnr(jnp.float32(2.0)))
    expected = schedules.edm(0.01, 30.0, 5.0).t_from_logsnr(2.0)
    assert traced((0.01, 30.0, 5.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        ("cosine", {"s": -0.1}, "s=-0.1"),
        ("linear_beta", {"beta_min": 0.0}, "beta_min=0.0"),
        ("linear_beta", {"beta_min": 2.0, "beta_max": 1.0}, "beta_max=1.0 must be at least"),
        ("scaled_linear", {"beta_max": np.nan}, "beta_max=nan"),
        ("edm", {"sigma_min": -1}, "sigma_min=-1.0"),
        ("edm", {"sigma_min": 3.0, "sigma_max": 3.0}, "sigma_max=3.0 must be above"),
        ("edm", {"rho": 0.5}, "rho=0.5 must be >= 1"),
        ("rectified_flow", {"shift": 0}, "shift=0.0 must be > 0"),
        ("sigmoid", {"start": 1, "end": 1}, "end=1.0 must be above start=1.0"),
        ("sigmoid", {"tau": np.inf}, "tau=inf"),
    ],
)
def test_bad_parameters_are_named(make: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        schedules.SCHEDULES[make](**arguments)
    assert "\n" not in str(caught.value)
