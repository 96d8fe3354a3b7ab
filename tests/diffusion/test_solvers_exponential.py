"""Exponential integrators: exactness, identities, the ends, bad arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from closed_forms import gaussian_denoiser

from diffusion_jax.diffusion import schedules, solvers, time_grids
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.solvers import exponential, exponential_plans
from diffusion_jax.errors import ConfigError

RNG = np.random.default_rng(11)
TIMES = np.array([1.0, 0.83, 0.55, 0.3, 0.12, 0.0])
FLOW = schedules.rectified_flow()

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
    ("deis", {"order": 3, "corrected": True}, 3),
    *(
        ("unipc", {"order": order, "solver_type": solver_type, "predict_x0": predict_x0}, order)
        for order in (1, 2, 3)
        for solver_type in ("bh1", "bh2")
        for predict_x0 in (True, False)
    ),
    ("unipc", {"order": 2, "corrector": False}, 2),
    # The same, without the corrector.
    ("unipc", {"order": 3, "corrector": False}, 2),
    ("unipc", {"order": 3, "corrector": False, "corrected": True}, 3),
]
SDES = [("dpmpp_sde", {"order": order}) for order in (1, 2, 3)] + [
    ("dpmpp_sde", {"solver_type": "heun"}),
    ("dpmpp_sde", {"order": 3, "corrected": False}),
    ("dpmpp_sde_singlestep", {"order": 2}),
    ("dpmpp_sde_singlestep", {"order": 3}),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def name_of(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def solve(name, options, denoise, schedule, times, x, **more):
    return solvers.get(name)(denoise, schedule, times, x, **options, **more)


def replay(shape):
    draws = np.random.default_rng(5).normal(size=(len(TIMES), *shape))
    return lambda step, draw, shape: draws[step]


@pytest.mark.parametrize(
    "schedule",
    [
        FLOW,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (schedules.cosine(), schedules.edm())),
    ],
)
def test_a_point_mass_is_reached_exactly_along_straight_lines(schedule):
    x, mean = jnp.asarray(RNG.normal(size=(3, 4))), 0.7
    eps = (x - schedule.alpha(1.0) * mean) / schedule.sigma(1.0)
    expected = np.stack([schedule.alpha(t) * mean + schedule.sigma(t) * eps for t in TIMES])
    known = lambda x, t: jnp.full_like(x, mean)  # noqa: E731
    results = jax.jit(
        lambda: [solve(n, o, known, schedule, TIMES, x, trajectory=True)[1] for n, o, _ in ODES]
    )()
    for case, states in zip(ODES, results, strict=True):
        np.testing.assert_allclose(states, expected, rtol=1e-9, atol=1e-9, err_msg=name_of(case))


@pytest.mark.parametrize("schedule", [schedules.cosine(), FLOW])
def test_noise_keeps_the_marginals_of_a_point_mass(schedule):
    mean, steps = 0.7, len(TIMES) - 1
    unit = lambda step, draw, shape: np.eye(shape[0])[:, step + 1 : step + 2]  # noqa: E731
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    x = jnp.eye(steps + 1)[:, :1] * sigma[0] + alpha[0] * mean
    known = lambda x, t: jnp.full_like(x, mean)  # noqa: E731
    for states in jax.jit(
        lambda: [
            solve(*case, known, schedule, TIMES, x, noise=unit, trajectory=True)[1] for case in SDES
        ]
    )():
        centred = np.asarray(states)[..., 0] - alpha[:, None] * mean
        np.testing.assert_allclose((centred**2).sum(1), sigma**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [schedules.cosine(), FLOW])
def test_methods_of_order_1_are_ddim_or_ddpm(schedule):
    x, denoise, noise = RNG.normal(size=(3, 4)), gaussian_denoiser(schedule), replay((3, 4))
    ones = [case for case in ODES if case[2] == 1 and "unipc" not in case]
    ones.append(("unipc", {"order": 1, "corrector": False}, 1))
    expected = solvers.ddim(denoise, schedule, TIMES, x, trajectory=True)[1]
    for name, options, _ in ones:
        actual = solve(name, options, denoise, schedule, TIMES, x, trajectory=True)[1]
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(
        solvers.dpmpp_sde(denoise, schedule, TIMES, x, noise=noise, order=1, trajectory=True)[1],
        solvers.ddpm(denoise, schedule, TIMES, x, noise=noise, trajectory=True)[1],
        rtol=1e-12,
        atol=1e-12,
    )


def test_methods_that_share_their_polynomial_agree():
    schedule, x = schedules.cosine(), RNG.normal(size=(3, 4))
    times, denoise = [0.95, 0.8, 0.55, 0.3, 0.12], gaussian_denoiser(schedule)
    same = [
        [("deis", {"order": 2}), ("dpmsolver", {"solver_type": "heun"})],
        [("dpmpp_2m", {}), ("unipc", {"corrector": False})],
        [
            ("dpmpp_3m", {"corrected": True}),
            ("unipc", {"order": 3, "disable_corrector": [1, 2, 3]}),
            ("unipc", {"order": 3, "corrector": False, "corrected": True}),
        ],
        [("dpmpp_2s", {"order_list": [1, 2, 1, 1]}), ("dpmpp_2s", {"lower_order_final": True})],
        [("dpmpp_3s", {"order_list": [1, 2, 1, 2]}), ("dpmpp_3s", {}), ("dpmpp_2s", {})],
        [("dpmpp_2m", {"euler_at_final": True}), ("dpmpp_2m", {"lower_order_final": True})],
    ]
    results = jax.jit(
        lambda: [[solve(*case, denoise, schedule, times, x) for case in group] for group in same]
    )()
    for group, (expected, *others) in zip(same, results, strict=True):
        for actual in others:
            np.testing.assert_allclose(actual, expected, rtol=1e-10, err_msg=name_of(group[0]))


def test_deis_integrates_the_parabola_in_log_rho():
    # eps depends on the time alone: every x_s is x_t with an integral by quadrature.
    schedule, x = schedules.cosine(), RNG.normal(size=3)
    times, values = np.array([0.9, 0.7, 0.5, 0.4]), np.array([0.3, -1.1, 0.8])
    alpha, rho = schedule.alpha(times), schedule.sigma(times) / schedule.alpha(times)

    def denoise(x, t):
        return (x - schedule.sigma(t) * jnp.interp(-t, -times[:3], values)) / schedule.alpha(t)

    scaled = x / alpha[0]
    for k in range(3):
        known = slice(0, k + 1)
        polynomial = np.polyfit(np.log(rho[known]), values[known], k)
        integrand = lambda r, p=polynomial: np.polyval(p, np.log(r))  # noqa: E731
        scaled = scaled + scipy.integrate.quad(integrand, rho[k], rho[k + 1], epsabs=1e-12)[0]
    actual = solvers.deis(denoise, schedule, times, x, order=3)
    np.testing.assert_allclose(actual, alpha[-1] * scaled, rtol=1e-9)


def test_steps_are_lowered_where_options_say_so():
    schedule, x = schedules.cosine(), RNG.normal(size=(3, 4))
    times, denoise = np.array([0.95, 0.8, 0.55, 0.3, 0.12]), gaussian_denoiser(schedule)

    def states(**options):
        return solvers.dpmpp_3m(denoise, schedule, times, x, trajectory=True, **options)[1]

    full, euler, lower = states(), states(euler_at_final=True), states(lower_order_final=True)
    np.testing.assert_array_equal(euler[:-1], full[:-1])
    np.testing.assert_array_equal(lower[:-2], full[:-2])
    for result, k in ((euler, 3), (lower, 3)):
        step = solvers.euler(denoise, schedule, times[k : k + 2], result[k])
        np.testing.assert_allclose(result[k + 1], step, rtol=1e-10)
    assert abs(lower[-2] - full[-2]).max() > 1e-6


def test_a_step_from_pure_noise_leaves_no_history():
    # From alpha = 0 to x_0.6 by DDIM whatever the method, and from there as if begun there.
    x, denoise = RNG.normal(size=(3, 4)), gaussian_denoiser(FLOW)
    times = np.array([1.0, 0.6, 0.45, 0.3, 0.2])
    as_after = [
        ("dpmpp_3m", {"corrected": True}),
        ("dpmpp_3m", {"corrected": True, "solver_type": "heun"}),
        ("dpmsolver", {"order": 3, "corrected": True}),
        ("deis", {"order": 3, "corrected": True}),
        *(
            ("unipc", {"order": 3, "corrector": False, "corrected": True, "predict_x0": predict_x0})
            for predict_x0 in (True, False)
        ),
        ("dpmsolver", {"order": 3}),
        ("deis", {"order": 3}),
        ("unipc", {"corrector": False}),
    ]
    cases = [
        *((name, options, options) for name, options in as_after),
        ("dpmpp_2m", {}, {}),
        ("dpmpp_3m", {}, {}),
        ("dpmpp_2s", {}, {"order_list": [1, 1, 2]}),
        ("dpmpp_3s", {"order_list": [1, 2, 3, 1]}, {"order_list": [1, 2, 1]}),
        ("dpmsolver_singlestep", {"order": 2}, {"order_list": [1, 1, 2]}),
    ]

    @jax.jit
    def run():
        middle = solvers.ddim(denoise, FLOW, times[:2], x)
        whole = [solve(n, o, denoise, FLOW, times, x, trajectory=True)[1] for n, o, _ in cases]
        uncorrected = solvers.dpmpp_3m(denoise, FLOW, times[1:], middle)
        rest = [solve(n, o, denoise, FLOW, times[1:], middle) for n, _, o in cases]
        return uncorrected, middle, whole, rest

    uncorrected, middle, *results = run()
    for (name, *_), whole, rest in zip(cases, *results, strict=True):
        np.testing.assert_allclose(whole[1], middle, rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(whole[-1], rest, rtol=1e-10, err_msg=name)
    assert abs(results[1][0] - uncorrected).max() > 1e-4


def test_the_correction_after_pure_noise_is_the_limit_of_finite_steps():
    x, denoise = RNG.normal(size=(3, 4)), gaussian_denoiser(FLOW)
    times = np.array([1.0, 0.6, 0.3])
    at_end = solvers.unipc(denoise, FLOW, times, x, order=1)
    times[0] -= 1e-9
    np.testing.assert_allclose(solvers.unipc(denoise, FLOW, times, x, order=1), at_end, rtol=1e-6)
    # For eps, or B(h) = h, there is no limit, and the step from alpha = 0 is left as it is.
    for options in ({"predict_x0": False}, {"solver_type": "bh1"}):
        times[0] = 1.0
        off = solvers.unipc(denoise, FLOW, times, x, disable_corrector=[0], **options)
        np.testing.assert_array_equal(solvers.unipc(denoise, FLOW, times, x, **options), off)


def test_few_steps_of_a_flow_improve_on_order_1():
    x = RNG.normal(size=200)
    denoise = gaussian_denoiser(FLOW, 0.4, 0.2)
    exact = 0.4 + 0.2 * x
    times = time_grids.uniform(12)
    error = {
        name: np.sqrt(
            np.mean((np.asarray(solvers.get(name)(denoise, FLOW, times, x)) - exact) ** 2)
        )
        for name in ("euler", "dpmpp_2m", "dpmpp_2s", "dpmsolver", "deis", "unipc")
    }
    assert all(error[name] < 0.9 * error["euler"] for name in error if name != "euler"), error


def test_x0_that_was_altered_counts_in_all_forms():
    schedule, x = schedules.edm(), RNG.normal(size=(3, 4)) * 50.0
    plain = gaussian_denoiser(schedule)

    def clipped(x, t):
        x0 = plain(x, t)
        return Denoised(jnp.clip(x0, -0.1, 0.1), (x - x0) / schedule.sigma(t))

    expected = solvers.euler(clipped, schedule, [0.6, 0.5], x)
    for name in ("dpmpp_2m", "dpmsolver", "deis", "dpmsolver_singlestep", "unipc"):
        actual = solvers.get(name)(clipped, schedule, [0.6, 0.5], x)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, err_msg=name)


def test_a_long_step_after_a_short_one_keeps_its_precision():
    """Passed on in one array, two values would be told apart by a difference of near equals."""
    x, times = np.linspace(-3.0, 3.0, 64).reshape(64, 1), [0.9, 0.8999, 0.3, 0.1, 0.02]

    def end(dtype):
        schedule, start = schedules.cosine(), jnp.asarray(x, dtype)
        return solvers.dpmpp_2m(lambda x, t: 0.3 * x + 0.2 * jnp.sin(3 * x), schedule, times, start)

    np.testing.assert_allclose(end(jnp.float32), end(jnp.float64), atol=1e-3)


def test_one_evaluation_a_step_in_the_order_of_time():
    def step(x, t, carry):
        return Denoised(jnp.full_like(x, 1.0) * carry), carry + 1

    counter = Denoiser(step, lambda x: jnp.int32(0))
    for name in ("dpmpp_3s", "dpmsolver_singlestep", "unipc", "dpmpp_3m"):
        end = solvers.get(name)(counter, schedules.cosine(), TIMES, np.zeros((2, 2)))
        np.testing.assert_allclose(end, 4.0, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    for z in [*RNG.uniform(-12.0, 8.0, 5), *RNG.uniform(-0.6, 0.6, 5), 1e-7, 0.0]:
        nodes, weights = np.polynomial.legendre.leggauss(40)
        u, weights = 0.5 * (nodes + 1.0), 0.5 * weights
        integral = (
            weights
            @ (np.exp((1.0 - u) * z) * u ** (k - 1))
            / float(np.prod(range(1, k), initial=1))
        )
        actual = exponential.phi(np, k, np.float64(z))
        np.testing.assert_allclose(actual, integral, rtol=1e-11)


@pytest.mark.parametrize(
    ("order", "steps", "lower", "expected"),
    [
        (1, 2, True, [1, 1]),
        (2, 4, False, [1, 2, 1, 2]),
        (2, 4, True, [1, 2, 1, 1]),
        (2, 5, True, [1, 2, 1, 2, 1]),
        (3, 6, False, [1, 2, 3, 1, 2, 3]),
        (3, 6, True, [1, 2, 3, 1, 2, 1]),
        (3, 7, True, [1, 2, 3, 1, 2, 3, 1]),
        (3, 7, False, [1, 2, 3, 1, 2, 1, 2]),
        (3, 8, False, [1, 2, 3, 1, 2, 3, 1, 2]),
    ],
)
def test_the_published_order_list(order, steps, lower, expected):
    assert exponential_plans.order_list(order, steps, lower) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unipc", {"order": 4}, "order=4; expected a whole number from 1 to 3"),
        ("deis", {"order": 0}, "order=0; expected a whole number from 1 to 3"),
        ("dpmsolver", {"order": 3}, "order=3 needs as many steps; times has 2"),
        ("dpmsolver_singlestep", {"order": 3}, "order=3 needs as many steps; times has 2"),
        ("dpmpp_sde", {"order": 3}, "order=3 needs as many steps; times has 2"),
        ("dpmsolver_sde", {"order": 3}, "order=3; expected a whole number from 1 to 2"),
        ("dpmpp_2m", {"solver_type": "hein"}, "solver_type='hein' is unknown.*'heun'"),
        ("dpmpp_3s", {"solver_type": "bh1"}, "solver_type='bh1' is unknown"),
        ("unipc", {"solver_type": "bh3"}, "solver_type='bh3' is unknown"),
        ("unipc", {"disable_corrector": [-1]}, "disable_corrector=-1; expected numbers of steps"),
        ("unipc", {"disable_corrector": [0, 2]}, "disable_corrector=2; expected .* from 0 to 1"),
        ("dpmpp_2s", {"order_list": [1]}, "order_list has 1 orders; times has 2 steps"),
        ("dpmpp_2s", {"order_list": [2, 1]}, r"order_list\[0\]=2; expected 1, or one more"),
        ("dpmpp_2s", {"times": [0.9, 0.5, 0.3, 0.1], "order_list": [1, 2, 3]}, "at most 2"),
        ("dpmsolver_singlestep", {"order": 9, "order_list": [1, 2]}, "order=9; expected a whole"),
        (
            "dpmpp_3s",
            {"lower_order_final": True, "order_list": [1, 2]},
            "lower_order_final=True beside order_list",
        ),
        ("dpmpp_2s", {"times": [0.0, 1.0]}, r"times\[1\]=1.0 does not lie below"),
        ("dpmpp_sde", {}, "key=None; dpmpp_sde draws noise"),
        ("dpmpp_sde_singlestep", {}, "key=None; dpmpp_sde_singlestep draws noise"),
    ],
)
def test_bad_arguments_are_named(name, options, message):
    times = options.pop("times", [0.9, 0.5, 0.1])
    with pytest.raises(ConfigError, match=message) as error:
        solvers.get(name)(lambda x, t: x, schedules.cosine(), times, jnp.ones((2, 3)), **options)
    assert "\n" not in str(error.value)
