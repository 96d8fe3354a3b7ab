"""Exponential integrators: the orders observed on a mixture, and with noise on Gaussian data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from diffusion_jax.diffusion import schedules, solvers, time_grids

WEIGHTS, MEANS, STDS = np.array([[0.3, 0.5, 0.2], [-1.2, 0.4, 1.5], [0.25, 0.35, 0.3]])
RNG = np.random.default_rng(11)

# (name, options, order)
ODES = [
    ("dpmpp_1m", {}, 1),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_3m", {}, 2),
    ("dpmpp_3m", {"corrected": True}, 3),
    ("dpmpp_1s", {}, 1),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_3s", {}, 3),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpmsolver", {"order": 1}, 1),
    ("dpmsolver", {"order": 2}, 2),
    ("dpmsolver", {"order": 3}, 2),
    ("dpmsolver", {"order": 3, "corrected": True}, 3),
    ("dpmsolver_singlestep", {"order": 2}, 2),
    ("dpmsolver_singlestep", {"order": 3}, 3),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    # Its start-up leaves order 2.
    ("deis", {"order": 3}, 2),
    *(
        ("unipc", {"order": order, "solver_type": solver_type, "predict_x0": predict_x0}, order)
        for order in (1, 2, 3)
        for solver_type in ("bh1", "bh2")
        for predict_x0 in (True, False)
    ),
    ("unipc", {"order": 2, "corrector": False}, 2),
    # The same, without the corrector.
    ("unipc", {"order": 3, "corrector": False}, 2),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def name_of(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def solve(name, options, denoise, schedule, times, x, **more):
    return solvers.get(name)(denoise, schedule, times, x, **options, **more)


def mixture_denoiser(schedule):
    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * STDS**2 + sigma**2
        centred = x[..., None] - alpha * MEANS
        log_weight = jnp.log(WEIGHTS) - 0.5 * jnp.log(variance) - 0.5 * centred**2 / variance
        means = MEANS + alpha * STDS**2 / variance * centred
        return (jax.nn.softmax(log_weight) * means).sum(-1)

    return denoise


def gaussian_denoiser(schedule, mean=0.4, std=0.6):
    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (sigma**2 * mean + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)

    return denoise


def mixture_problem(steps):
    """(schedule, x, exact x_s, times of `steps`), logsnr from -4 to 4; exact by 2000 of rk4."""
    schedule = schedules.cosine()
    t, s = schedule.t_from_logsnr(np.array([-4.0, 4.0]))
    x = np.random.default_rng(3).normal(size=20)
    times = time_grids.uniform_logsnr(schedule, steps, t, s)
    return schedule, x, times


@pytest.fixture(scope="module")
def exact():
    """The mixture's ODE in the level u = sigma/alpha, by an adaptive method of order 8."""
    with jax.enable_x64(True):
        schedule, x, times = mixture_problem(80)
        alpha, sigma = schedule.alpha(times[[0, -1]]), schedule.sigma(times[[0, -1]])

        def slope(u, y):
            variance = STDS**2 + u**2
            centred = y[:, None] - MEANS
            likelihood = WEIGHTS / np.sqrt(variance) * np.exp(-0.5 * centred**2 / variance)
            share = likelihood / likelihood.sum(1, keepdims=True)
            return (share * u * centred / variance).sum(1)

        solution = scipy.integrate.solve_ivp(
            slope, sigma / alpha, x / alpha[0], "DOP853", rtol=1e-13, atol=1e-13
        )
        return alpha[1] * solution.y[:, -1]


def errors_on_the_mixture(cases, exact, counts=(80, 640)):
    """{case: root mean square errors at both counts}: one compilation a count."""
    out = []
    for steps in counts:
        schedule, x, times = mixture_problem(steps)
        denoise = mixture_denoiser(schedule)
        ends = jax.jit(lambda: [solve(n, o, denoise, schedule, times, x) for n, o, *_ in cases])()  # noqa: B023
        out.append([np.sqrt(np.mean((np.asarray(end) - exact) ** 2)) for end in ends])
    return np.array(out).T


def test_observed_orders_on_a_mixture(exact):
    errors = errors_on_the_mixture(ODES, exact)
    observed = np.log2(errors[:, 0] / errors[:, 1]) / 3
    orders = np.array([order for *_, order in ODES])
    low = {name_of(c): o for c, o, p in zip(ODES, observed, orders, strict=True) if o < p - 0.25}
    assert not low, low
    # As published, the multistep methods of order 3 are of order 2.
    found = {name_of(c): (o, e[1]) for c, o, e in zip(ODES, observed, errors, strict=True)}
    for published, corrected in [
        ("dpmpp_3m", "dpmpp_3m-corrected=True"),
        ("dpmsolver-order=3", "dpmsolver-order=3-corrected=True"),
    ]:
        assert found[published][0] < 2.6
        assert found[corrected][1] < 0.1 * found[published][1]


def test_stochastic_solvers_approach_the_variance_of_gaussian_data():
    # Exact: with a linear denoiser the end is linear in the start and in every draw.
    schedule, std = schedules.cosine(), RNG.uniform(0.4, 0.8)
    t, s = schedule.t_from_logsnr(np.array([-5.0, 3.0]))
    denoise = gaussian_denoiser(schedule, 0.0, std)
    cases = [
        ("dpmpp_sde", {"order": 1}, 0.75),
        ("dpmpp_sde", {"order": 2}, 1.25),
        ("dpmpp_sde", {"order": 2, "solver_type": "heun"}, 1.25),
        ("dpmpp_sde", {"order": 3}, 1.25),
        ("dpmsolver_sde", {"order": 1}, 0.75),
        ("dpmsolver_sde", {"order": 2}, 1.25),
    ]
    errors = []
    for steps in (40, 160):
        times, unit = time_grids.uniform_logsnr(schedule, steps, t, s), np.eye(steps + 1)
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        variance = alpha**2 * std**2 + sigma**2
        draw = lambda step, draw, shape, unit=unit: unit[:, step + 1 : step + 2]  # noqa: E731
        x = unit[:, :1] * np.sqrt(variance[0])
        ends = jax.jit(
            lambda: [solve(n, o, denoise, schedule, times, x, noise=draw) for n, o, _ in cases]  # noqa: B023
        )()
        errors.append([abs(float((end**2).sum()) - variance[-1]) for end in ends])
    observed = np.log2(np.divide(*errors)) / 2
    low = {name_of(c): o for c, o in zip(cases, observed, strict=True) if o < c[2]}
    assert not low, (low, errors)
    assert errors[1][3] < errors[1][1] < errors[1][0]
