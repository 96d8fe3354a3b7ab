"""Solvers: identities between them, the ends of the schedules, randomness, and bad arguments."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian_denoiser

from diffusion_jax.diffusion import beta_tables, schedules, solvers
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.errors import ConfigError

DETERMINISTIC = ["ddim", "euler", "heun", "dpmpp_2m"]
STOCHASTIC = ["ddpm", "dpmpp_sde"]
SCHEDULES = [
    schedules.cosine(),
    schedules.rectified_flow(),
    schedules.edm(),
    beta_tables.table(beta_tables.cosine_betas(50)),
]
TIMES = np.array([1.0, 0.83, 0.55, 0.3, 0.12, 0.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def start(shape=(3, 4), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def replay(shape=(3, 4), steps=8, seed=5):
    draws = np.random.default_rng(seed).normal(size=(steps, *shape))
    return lambda step, draw, shape: draws[step]


def run(name, schedule, times, x, denoise=None, **options):
    denoise = denoise or gaussian_denoiser(schedule)
    return solvers.get(name)(denoise, schedule, times, x, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_mass_is_reached_exactly_along_straight_lines(schedule):
    # With x0 known, x_s = alpha_s x0 + sigma_s eps with the eps of the start, at every time.
    x, mean = start(), 0.7
    eps = (x - schedule.alpha(1.0) * mean) / schedule.sigma(1.0)
    expected = [schedule.alpha(t) * mean + schedule.sigma(t) * eps for t in TIMES]
    for name in DETERMINISTIC:
        x_end, states = run(
            name, schedule, TIMES, x, lambda x, t: jnp.full_like(x, mean), trajectory=True
        )
        np.testing.assert_allclose(states, np.stack(expected), rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(x_end, mean, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stochastic_solvers_keep_the_marginals_of_a_point_mass(schedule):
    # Linear in the noise: a step's state is alpha_s x0 + sigma_s (a unit normal).
    mean, steps = 0.7, len(TIMES) - 1
    x = jnp.eye(steps + 1)[:, :1] * schedule.sigma(1.0) + schedule.alpha(1.0) * mean
    for name, options in [("ddpm", {}), ("dpmpp_sde", {}), ("ddim", {"eta": 0.6})]:
        unit = lambda step, draw, shape: np.eye(shape[0])[:, step + 1 : step + 2]  # noqa: E731
        states = run(
            name,
            schedule,
            TIMES,
            x,
            lambda x, t: jnp.full_like(x, mean),
            noise=unit,
            trajectory=True,
            **options,
        )[1]
        centred = np.asarray(states)[..., 0] - schedule.alpha(TIMES)[:, None] * mean
        # Example 0 carries the start's unit, example k the unit drawn in step k - 1.
        variance = (centred**2).sum(1)
        np.testing.assert_allclose(variance, schedule.sigma(TIMES) ** 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_order_deterministic_solvers_agree(schedule):
    x = start()
    expected = run("ddim", schedule, TIMES, x, trajectory=True)[1]
    actual = run("euler", schedule, TIMES, x, trajectory=True)[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


def test_flow_matching_euler_is_ddim():
    schedule, x = schedules.rectified_flow(), start()
    denoise, state = gaussian_denoiser(schedule), np.asarray(start())
    for t, s in itertools.pairwise(TIMES):
        x0 = np.asarray(denoise(state, t))
        state = state + (s - t) * (state - x0) / t  # dx/dt = eps - x0 = (x - x0)/t
    for name in ("ddim", "euler"):
        np.testing.assert_allclose(run(name, schedule, TIMES, x), state, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm_is_first_order_sde_dpmpp(schedule):
    x, noise = start(), replay()
    expected = run("ddpm", schedule, TIMES, x, noise=noise, trajectory=True)[1]
    others = {
        "ddim": run("ddim", schedule, TIMES, x, noise=noise, trajectory=True, eta=1.0)[1],
        "sde": run("dpmpp_sde", schedule, TIMES, x, noise=noise, trajectory=True, order=1)[1],
        "ancestral": solvers.ancestral(
            gaussian_denoiser(schedule), Gaussian(schedule), TIMES, x, noise=noise, trajectory=True
        )[1],
    }
    for name, states in others.items():
        np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_ancestral_draws_the_same_noise_as_ddpm():
    schedule, x, key = schedules.cosine(), start(), jax.random.key(3)
    expected = run("ddpm", schedule, TIMES, x, key=key)
    denoise = gaussian_denoiser(schedule)
    actual = solvers.ancestral(denoise, Gaussian(schedule), TIMES, x, key=key)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_history_is_dropped_at_infinite_rises():
    # From alpha = 0 over one inner step to sigma = 0 no step has a history: order 2 is order 1.
    schedule, x = schedules.rectified_flow(), start()
    short, long = [1.0, 0.6, 0.0], [1.0, 0.6, 0.3, 0.0]
    for order_2, order_1 in [("dpmpp_2m", "euler"), ("dpmpp_sde", "ddpm")]:
        differences = [
            run(order_2, schedule, times, x, noise=replay())
            - run(order_1, schedule, times, x, noise=replay())
            for times in (short, [0.9, 0.0], long[:3])
        ]
        np.testing.assert_allclose(np.stack(differences), 0.0, atol=1e-12)
        different = run(order_2, schedule, [0.9, 0.6, 0.3], x, noise=replay())
        assert (
            abs(different - run(order_1, schedule, [0.9, 0.6, 0.3], x, noise=replay())).max() > 1e-3
        )


def test_altered_x0_keeps_the_eps_of_ddim_but_not_of_euler():
    # Clipping changes x0 alone; DDIM goes on with eps, Euler takes its slope from the clipped x0.
    schedule, x = schedules.edm(), start() * 50.0
    plain = gaussian_denoiser(schedule)

    def clipped(x, t):
        x0 = plain(x, t)
        return Denoised(jnp.clip(x0, -0.1, 0.1), (x - x0) / schedule.sigma(t))

    t, s = 0.6, 0.5
    sigma_t, sigma_s = float(schedule.sigma(t)), float(schedule.sigma(s))
    x0, eps = clipped(x, t)[:2]
    np.testing.assert_allclose(run("ddim", schedule, [t, s], x, clipped), x0 + sigma_s * eps)
    expected = x0 + sigma_s / sigma_t * (x - x0)
    np.testing.assert_allclose(run("euler", schedule, [t, s], x, clipped), expected)


def test_the_eps_of_a_clipped_x0_follows_the_same_curve_as_heun():
    """An estimate that leaves the range of the data, clipped to it; not so with the own eps."""
    schedule, x = schedules.cosine(), start() * 2.0
    plain = gaussian_denoiser(schedule)

    def clipped(x, t):
        x0 = plain(x, t)
        eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
        return Denoised(jnp.clip(x0, -0.4, 0.4), eps)

    ends = {}
    for count in (100, 400):
        times = np.linspace(0.99, 0.01, count + 1)
        ends[count] = run("ddim", schedule, times, x, clipped, eps_from_x0=True)
    exact = run("heun", schedule, times, x, clipped)
    far, near = (abs(ends[count] - exact).max() for count in (100, 400))
    assert near < far / 3 < 0.01
    assert abs(run("ddim", schedule, times, x, clipped) - exact).max() > 5 * near


def test_learned_variance_lies_between_small_and_large_in_the_logarithm():
    schedule, x = schedules.linear_beta(), jnp.zeros((2, 3))
    fraction = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 3)))

    def denoise(x, t):
        return Denoised(jnp.zeros_like(x), jnp.zeros_like(x), fraction)

    def std(**options):
        ones = lambda step, draw, shape: np.ones(shape)  # noqa: E731
        return run("ddpm", schedule, [0.6, 0.5], x, denoise, noise=ones, **options)

    small, large = std(variance="small"), std(variance="large")
    expected = np.exp(fraction * np.log(large) + (1 - fraction) * np.log(small))
    np.testing.assert_allclose(std(variance="learned"), expected, rtol=1e-10)
    ended = run("ddpm", schedule, [0.1, 0.0], x, denoise, key=jax.random.key(0), variance="learned")
    np.testing.assert_array_equal(ended, 0.0)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "ancestral"])
def test_a_sample_does_not_depend_on_its_batch(name):
    schedule, key, x = schedules.cosine(), jax.random.key(7), start((5, 2, 3))
    options = {"eta": 0.5} if name == "ddim" else {}
    target = Gaussian(schedule) if name == "ancestral" else schedule
    denoise, solver = gaussian_denoiser(schedule), solvers.get(name)
    whole = solver(denoise, target, TIMES, x, key=key, **options)
    chosen = np.array([3, 1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, chosen)
    part = solver(denoise, target, TIMES, x[chosen], key=keys, **options)
    np.testing.assert_allclose(part, whole[chosen], rtol=1e-12)


def test_draws_follow_the_stated_keys():
    schedule, key, x = schedules.rectified_flow(), jax.random.key(2), jnp.zeros((3, 2))
    times = [0.9, 0.5, 0.4]
    steps = []
    for name_of_key in (key, jax.random.key_data(key)):
        states = run(
            "ddpm",
            schedule,
            times,
            x,
            lambda x, t: jnp.zeros_like(x),
            key=name_of_key,
            trajectory=True,
        )[1]
        steps.append(states)
    np.testing.assert_array_equal(*steps)
    for i in range(3):
        example = jax.random.fold_in(key, i)
        for k, (t, s) in enumerate([(0.9, 0.5), (0.5, 0.4)]):
            z = jax.random.normal(jax.random.fold_in(jax.random.fold_in(example, k), 0), (2,))
            decay = (1 - t) * s / ((1 - s) * t)
            mean = decay * s / t * steps[0][k][i]
            np.testing.assert_allclose(
                steps[0][k + 1][i], mean + s * np.sqrt(1 - decay**2) * z, rtol=1e-10
            )


def test_recorded_noise_is_asked_for_only_where_it_is_added():
    schedule, asked = schedules.cosine(), []

    def noise(step, draw, shape):
        asked.append((step, draw, shape))
        return np.zeros(shape)

    run("ddpm", schedule, TIMES, start(), noise=noise)
    assert asked == [(k, 0, (3, 4)) for k in range(4)]


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_trajectory_starts_at_x_and_ends_at_the_result(name):
    schedule, x, key = schedules.cosine(), start((2, 3)), jax.random.key(0)
    end, states = run(name, schedule, TIMES, x, key=key, trajectory=True)
    assert states.shape == (6, 2, 3)
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_array_equal(states[-1], end)
    np.testing.assert_array_equal(run(name, schedule, TIMES, x, key=key), end)
    part = run(name, schedule, TIMES[:3], x, key=key)
    np.testing.assert_allclose(part, states[2], rtol=1e-10)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_a_jitted_solver_traces_its_denoiser_once_per_use(name):
    schedule, traces = schedules.cosine(), []
    plain = gaussian_denoiser(schedule)

    def denoise(x, t):
        traces.append(t)
        return plain(x, t)

    sample = jax.jit(lambda x, key: run(name, schedule, TIMES, x, denoise, key=key))
    sample(start(), jax.random.key(0))
    count = len(traces)
    assert count <= (2 if name == "heun" else 1)
    sample(start(seed=1), jax.random.key(1))
    assert len(traces) == count


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_sde", "ancestral"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_states_keep_their_type_and_the_accuracy_of_float32(name, dtype):
    schedule, x = schedules.rectified_flow(), start().astype(dtype)
    target = Gaussian(schedule) if name == "ancestral" else schedule
    solver, denoise = solvers.get(name), gaussian_denoiser(schedule)
    end, states = solver(denoise, target, TIMES, x, noise=replay(), trajectory=True)
    assert end.dtype == states.dtype == dtype
    exact = solver(denoise, target, TIMES, x.astype(jnp.float64), noise=replay())
    np.testing.assert_allclose(end.astype(np.float64), exact, atol=4 * jnp.finfo(dtype).eps)


def test_a_denoiser_carries_its_state_through_all_evaluations():
    # x0 is the number of evaluations so far; a last step to t=0 returns it.
    def step(x, t, carry):
        x0 = jnp.full_like(x, 1.0) * carry
        return Denoised(x0, jnp.zeros_like(x)), carry + 1

    denoiser = Denoiser(step, lambda x: jnp.int32(10))
    # These end in a mixture of what they have seen.
    mixing = {"lms", "pndm", "bdia", "dopri5", "lcm"}
    # From alpha = 0 the ancestral step is an Euler step as well.
    counts = {"heun": 9, "midpoint": 9, "kdpm2": 9, "kdpm2_ancestral": 8, "flow_heun": 9, "rk4": 17}
    for name in solvers.SOLVERS.keys() - mixing:
        schedule = schedules.cosine()
        target = Gaussian(schedule) if name == "ancestral" else schedule
        end = run(name, target, TIMES, start(), denoiser, noise=replay())
        np.testing.assert_allclose(end, 10 + counts.get(name, 5) - 1, err_msg=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpmpp_2m", {}),  # and two values against slots of them
        ("dpmpp_sde", {}),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("heun", {}), ("ddim", {"eta": 1.0}))),
    ],
)
def test_a_traced_schedule_gives_the_same_and_is_differentiable(name, options):
    x, noise = start(), replay()

    def end(shift):
        schedule = schedules.rectified_flow(shift)
        return run(name, schedule, TIMES, x, noise=noise, **options).sum()

    value, gradient = jax.jit(jax.value_and_grad(end))(jnp.float64(1.7))
    np.testing.assert_allclose(value, end(1.7), rtol=1e-9)
    difference = (end(1.7 + 1e-5) - end(1.7 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, difference, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {}, "key=None; ddpm draws noise"),
        ("ddim", {"eta": 0.1}, "key=None; ddim with eta > 0 draws noise"),
        ("ddim", {"eta": 1.5}, "eta=1.5; expected a number from 0"),
        ("ddim", {"eta": -0.1}, "eta=-0.1"),
        ("ddpm", {"variance": "lerned"}, "variance='lerned' is unknown"),
        ("ddpm", {"variance": "learned", "key": 0}, "gives no variance_fraction"),
        ("dpmpp_sde", {"order": 4}, "order=4; expected a whole number from 1 to 3"),
        ("euler", {"times": [0.0, 1.0]}, r"times\[1\]=1.0 does not lie below"),
        ("heun", {"times": [1.0, -0.1]}, r"times\[1\]=-0.1 lies outside"),
        ("ddpm", {"keys": 2}, r"key has shape \(2,\); expected one key or one for each of 3"),
        ("ddpm", {"noise": lambda *_: np.zeros(5)}, r"noise\(0, 0, ...\) has shape \(5,\)"),
        ("dpmpp_2m", {"x": np.array(1.0)}, r"x has shape \(\)"),
        ("euler", {"times": [0.5]}, r"times has shape \(1,\)"),
    ],
)
def test_bad_arguments_are_named(name, options, message):
    options = {"times": TIMES, "x": start(), **options}
    if "key" in options:
        options["key"] = jax.random.key(options["key"])
    if "keys" in options:
        options["key"] = jax.random.split(jax.random.key(0), options.pop("keys"))
    times, x = options.pop("times"), options.pop("x")
    with pytest.raises(ConfigError, match=message) as error:
        run(name, schedules.cosine(), times, x, **options)
    assert "\n" not in str(error.value)


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'dpmpp_2m'"):
        solvers.get("dpmpp2m")
