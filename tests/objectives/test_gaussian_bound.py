"""The bound in continuous time as an objective, and schedules that learn from it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.learned_schedule import learned
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.objectives.base import Context
from diffusion_jax.objectives.gaussian_bound import GaussianBound, least_variance
from diffusion_jax.objectives.variational import Variational

WIDTH, SIZE, FEW = 0.4, 2048, 512
X = WIDTH * np.random.default_rng(0).normal(size=(SIZE, 2)).astype(np.float32)
ENTROPY = float(np.log2(np.sqrt(2 * np.pi * np.e) * WIDTH))  # bits per dimension
FIRST = learned(logsnr_max=6.0, logsnr_min=-4.0, units=8)


def estimate(params, x_t, t, conditioning, key, schedule):
    """E[x0 | x_t] of Gaussian data."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return alpha * WIDTH**2 * x_t / (alpha**2 * WIDTH**2 + sigma**2)


LEARNING = GaussianBound(estimate=estimate, schedule_of=FIRST.with_params)


def context(size=SIZE):
    return Context(jnp.int32(0), {}, {}, {}, jnp.arange(size) / size, size)


@functools.partial(quick.jit, static_argnames="function")
def evaluate(function, params, seed):
    keys = jax.random.split(jax.random.key(seed), SIZE)
    return function(params, {"x": jnp.asarray(X)}, keys, context())


def means(aux):
    return {name: float(total / count) for name, (total, count) in aux.metrics.items()}


def test_exact_denoiser_meets_the_entropy_and_terms_add_up():
    fixed = GaussianBound(
        estimate=estimate,
        schedule_of=lambda params: schedules.cosine(),
        sigma_data=WIDTH,
        first_time=0.05,
    )
    loss, aux = evaluate(fixed, {}, 1)
    found = means(aux)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    parts = found["prior"] + found["diffusion"] + found["reconstruction"]
    assert found["loss"] == pytest.approx(parts, rel=1e-4)
    assert found["bits_per_example"] == pytest.approx(2 * found["loss"], rel=1e-5)
    error = float(np.std(np.asarray(aux.example_loss))) / np.sqrt(SIZE)
    # What the decoder leaves unsaid: the posterior is narrower than its normal.
    unsaid = 0.5 * np.log2(1.0 + np.tan(0.025 * np.pi) ** 2 / WIDTH**2)
    assert abs(found["loss"] - ENTROPY - unsaid) < 3 * error < 0.2


def test_the_shape_has_the_gradient_of_the_variance_and_the_rest_that_of_the_bound():
    """Against plain differentiation of both, term by term."""
    random = np.random.default_rng(1)
    weights, place, slope = (jnp.asarray(random.uniform(0.5, 2.0, 6)) for _ in range(3))

    def terms(params, shape):
        return params * weights * shape[1] ** 2 * jnp.exp(-params * shape[0])

    def values(params, shape):
        return least_variance(terms, params, shape).mean()

    params = jnp.float32(0.7)
    to_params, to_shape = quick.run(jax.grad(values, (0, 1)), params, (place, slope))
    plain = jax.grad(lambda p: terms(p, (place, slope)).mean())(params)
    np.testing.assert_allclose(to_params, plain, rtol=1e-5)
    mean = float(terms(params, (place, slope)).mean())
    second = jax.grad(lambda shape: (terms(params, shape) ** 2).mean() / mean)((place, slope))
    for actual, expected in zip(to_shape, second, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_masked_rows_are_in_no_mean_and_no_gradient():
    """Their values may be anything. With halves of a batch alike the gradient is that of a half."""
    half = FEW // 2
    keys = jnp.tile(jax.random.split(jax.random.key(2), half), 2)
    real = jnp.asarray(X[:half])
    mask = jnp.arange(FEW) < half
    stratum = jnp.tile(jnp.arange(half) / half, 2)

    @quick.jit
    def gradient(x, mask):
        def loss(params):
            shared = Context(jnp.int32(0), {}, {}, {}, stratum, half)
            return LEARNING(params, {"x": x, "mask": mask}, keys, shared)[0]

        return jax.grad(loss)(initial())

    whole = gradient(jnp.concatenate([real, real]), jnp.ones(FEW, bool))
    for padding in (real, 30.0 * real, jnp.full_like(real, jnp.nan)):
        found = gradient(jnp.concatenate([real, padding]), mask)
        for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def train(function, params, steps, rate=0.03):
    optimizer = optax.adam(rate)

    def body(carry, step):
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step), FEW)
        batch = {"x": jnp.asarray(X[:FEW])}
        grads = jax.grad(lambda p: function(p, batch, keys, context(FEW))[0])(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    run = quick.jit(lambda params: jax.lax.scan(body, params, jnp.arange(steps))[0][0])
    return run((params, optimizer.init(params)))


def initial():
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), FIRST.params)


def with_parts(params, **parts):
    return {**params, **parts}


def between_levels(params):
    """Mean over u of the estimate's mean at u, and deviation over it: 0 for the best shape."""
    u = jnp.linspace(0.0, 1.0, 401)

    def at(params):
        schedule = FIRST.with_params(params)
        s, slope = schedule.inner(u)
        snr = jnp.exp(schedule.at(s))
        return slope * WIDTH**2 * snr / (1.0 + WIDTH**2 * snr)

    rate = quick.run(at, params)
    mean = float(jnp.trapezoid(rate, u))
    return mean, float(rate.std()) / mean


@pytest.mark.slow
def test_the_variance_falls_while_the_bound_stays():
    before = initial()
    shape = train(LEARNING, before, 250)["shape"]
    after = with_parts(before, shape=shape)
    (first, wide), (second, narrow) = between_levels(before), between_levels(after)
    assert narrow < 0.4 * wide
    # The integral does not know the shape (I-MMSE).
    assert second == pytest.approx(first, rel=1e-3)
    found = [[means(evaluate(LEARNING, p, seed)[1]) for seed in range(5)] for p in (before, after)]
    loss = [np.array([f["loss"] for f in each]) for each in found]
    variance = [
        np.mean([f["diffusion_square"] - f["diffusion"] ** 2 for f in each]) for each in found
    ]
    assert variance[1] < 0.8 * variance[0]
    error = np.sqrt(sum(np.var(v, ddof=1) / 5 for v in loss))
    assert abs(loss[0].mean() - loss[1].mean()) < 3 * error < 0.2
    # Ends of the shape are where they were.
    schedule = FIRST.with_params(after)
    np.testing.assert_allclose(schedule.inner(jnp.array([0.0, 1.0]))[0], [0.0, 1.0], atol=1e-6)


def test_the_ends_follow_the_bound():
    before = initial()
    before["ends"] = {"logsnr_max": jnp.float32(2.0), "logsnr_min": jnp.float32(1.0)}
    after = train(LEARNING, before, 150)
    assert after["ends"]["logsnr_max"] > 4.0
    assert after["ends"]["logsnr_min"] < -1.0
    loss = [means(evaluate(LEARNING, p, 3)[1])["loss"] for p in (before, after)]
    assert loss[1] < loss[0] - 0.1
    assert abs(loss[1] - ENTROPY) < 0.1
    metrics = means(evaluate(LEARNING, after, 3)[1])
    assert metrics["logsnr_max"] == pytest.approx(float(after["ends"]["logsnr_max"]))


@pytest.mark.slow
def test_the_discrete_bound_trains_a_schedule_too():
    """With few steps the shape counts: the bound falls to the entropy by the schedule alone."""

    def process_of(params):
        return Gaussian(FIRST.with_params(params))

    def at_time(params, x_t, t, conditioning, key):
        return estimate(params, x_t, t, conditioning, key, FIRST.with_params(params))

    function = Variational(
        estimate=at_time,
        process=Gaussian(FIRST),
        process_of=process_of,
        times=np.linspace(1.0, 0.0, 5),
    )
    before = initial()
    after = train(function, before, 150)
    loss = [float(evaluate(function, p, 5)[0]) for p in (before, after)]
    assert ENTROPY - 0.02 < loss[1] < loss[0] - 0.05
