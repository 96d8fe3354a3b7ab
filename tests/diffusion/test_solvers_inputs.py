"""What every solver accepts of its denoiser, its times and its state, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion import guidance, likelihood, schedules, solvers, thresholding
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser, from_network
from diffusion_jax.diffusion.processes import Gaussian

SCHEDULE = schedules.cosine()
TIMES = np.array([1.0, 0.8, 0.5, 0.2, 0.0])
every_solver = pytest.mark.parametrize("name", solvers.SOLVERS)
# One of each way to run, where all of them read the input alike; the others are slow tests.
KINDS = {
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2s",
    "lms",
    "heun",
    "pndm",
    "unipc",
    "ancestral",
    "bdia",
}
solver_of_each_kind = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in KINDS else [pytest.mark.slow]) for n in solvers.SOLVERS],
)


X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
DRAWS = np.random.default_rng(1).uniform(size=(4, 3, 4))


def run(name, denoise, times=TIMES, x=X, schedule=SCHEDULE):
    target = Gaussian(schedule) if name == "ancestral" else schedule
    return solvers.get(name)(denoise, target, times, x, noise=lambda step, draw, shape: DRAWS[step])


def run_all(name, *denoisers, **options):
    """The results of one compilation."""
    return jit(lambda: [run(name, denoise, **options) for denoise in denoisers])()


@solver_of_each_kind
def test_x0_of_a_function_is_broadcast_and_cast(name):
    for x0 in (0.7, jnp.arange(4), np.arange(3.0)[:, None]):
        full = jnp.asarray(np.broadcast_to(x0, (3, 4)), jnp.float32)
        expected, *others = run_all(
            name,
            lambda x, t, full=full: full,
            lambda x, t, x0=x0: x0,
            lambda x, t, x0=x0: Denoised(x0),
        )
        for actual in others:
            assert actual.dtype == jnp.float32
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@every_solver
def test_an_x0_that_does_not_broadcast_is_refused(name):
    with pytest.raises(ValueError, match=r"gives shape \(3, 5\) for a state of shape \(3, 4\)"):
        run(name, lambda x, t: jnp.zeros((3, 5)))


@every_solver
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_numbers_of_the_host_widen_no_state(name, dtype):
    constants = np.array([0.5, 0.6, 0.7, 0.8])
    with jax.enable_x64(True):
        plain, wide = (
            Denoiser(lambda x, t, carry, c=c: (Denoised(c * x, c * x), carry))
            for c in (0.1, constants)
        )
        for denoise in (
            lambda x, t: constants * x,
            guidance.classifier_free(wide, plain, 3.0, interval=(0.2, 0.8)),
            guidance.classifier_free(plain, wide, 3.0, interval=(0.2, 0.8)),
        ):
            result = jax.eval_shape(lambda x, d=denoise: run(name, d, x=x), jnp.ones((3, 4), dtype))
            assert result.dtype == dtype


@every_solver
def test_eps_follows_from_x0_where_a_denoiser_gives_none(name):
    denoise = Denoiser(lambda x, t, carry: (Denoised(0.5 * x), carry))
    guided = guidance.classifier_free(denoise, denoise, 3.0, interval=(0.1, 0.9))
    expected, *others = run_all(name, lambda x, t: 0.5 * x, denoise, guided)
    for actual in others:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@every_solver
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_carries_of_low_precision_states(name, dtype):
    # A running mean of x, made of the first one, must have the type of the states of the steps.
    def step(x, t, carry):
        return Denoised(0.5 * carry, x), 0.5 * carry + 0.5 * x

    denoise, x = Denoiser(step, init=lambda x: x), X.astype(dtype)
    low, exact = (run_all(name, denoise, x=jnp.asarray(x, d))[0] for d in (dtype, jnp.float32))
    assert low.dtype == dtype
    np.testing.assert_array_equal(low, exact.astype(dtype))


@solver_of_each_kind
def test_times_of_any_library(name):
    def half(x, t):
        return 0.5 * x

    expected = run(name, half)
    for times in (jnp.asarray(TIMES), [np.float32(t) for t in TIMES]):
        np.testing.assert_allclose(run(name, half, times), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(name, half, [1, 0]), run(name, half, [1.0, 0.0]))


def test_eta_may_be_a_number_of_numpy():
    low, high = (
        solvers.ddim(
            lambda x, t: 0.5 * x, SCHEDULE, TIMES, X, noise=lambda k, *_: DRAWS[k], eta=eta
        )
        for eta in (0.5, np.float32(0.5))
    )
    np.testing.assert_array_equal(low, high)


def network(prediction, schedule=SCHEDULE):
    return from_network(lambda x, noise: 0.5 * x, schedule, prediction)


@every_solver
def test_predictions_that_leave_x0_open_are_refused_at_alpha_0(name):
    eps, score, v = map(network, ("eps", "score", "v"))
    for refused in (
        eps,
        score,
        as_denoiser(eps),
        thresholding.clip_x0(eps),
        guidance.classifier_free(eps, v, 2.0),
        guidance.classifier_free(v, eps, 2.0),
    ):
        message = r"^prediction='\w+' leaves x0 open at times\[0\]=1, where alpha is 0: use 'v'.*"
        with pytest.raises(ValueError, match=message + "starts below 1$"):
            run(name, refused)
    edm = schedules.edm()
    (elsewhere,) = run_all(name, network("eps", edm), schedule=edm)
    below = run_all(name, eps, score, times=[0.99, 0.5, 0.0])
    accepted = run_all(name, v, guidance.classifier_free(v, eps, 2.0, interval=(0.0, 0.9)))
    assert np.isfinite([elsewhere, *below, *accepted]).all()


def test_the_bound_refuses_them_too_and_a_traced_schedule_is_not_looked_into():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="prediction='eps' leaves x0 open"):
        likelihood.variational_bound(
            network("eps"), Gaussian(SCHEDULE), TIMES, x, key=jax.random.key(0)
        )

    def sample(shift):
        schedule = schedules.rectified_flow(shift)
        return run("ddim", network("eps", schedule), schedule=schedule)

    assert jit(sample)(2.0).shape == (3, 4)
