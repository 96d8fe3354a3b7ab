"""The denoising loss against its closed form for Gaussian data, whose best denoiser is known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, normal

from diffusion_jax.diffusion import denoiser, schedules, time_sampling, weightings
from diffusion_jax.diffusion.predictions import from_x0_eps
from diffusion_jax.objectives.base import Context
from diffusion_jax.objectives.denoising import Denoising, drop_conditioning, loss_by_noise

C = 0.6
SIZE = 4096


def gaussian_network(schedule, prediction, sigma_data=0.5):
    """The exact denoiser of N(0, C^2), put out in the given prediction; told t as its noise."""

    def apply(params, x, noise, conditioning, *, key=None):
        t = noise.reshape(-1, 1)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if prediction == "edm":
            x = x * jnp.sqrt(sigma**2 + alpha**2 * sigma_data**2)
        x0 = alpha * C**2 * x / (alpha**2 * C**2 + sigma**2)
        eps = (x - alpha * x0) / sigma
        return from_x0_eps(prediction, x0, eps, alpha, sigma, sigma_data=sigma_data)

    return apply


def make_objective(schedule, prediction, weighting="uniform", **kwargs):
    def sample_time(u, stratum, cells):
        return 0.05 + 0.9 * time_sampling.stratified(u, stratum, cells)

    options = {
        "apply": gaussian_network(schedule, prediction),
        "noise_input": "t",
        "schedule": schedule,
        "prediction": prediction,
        "sample_time": sample_time,
        "weight": functools.partial(weightings.weight, weighting, prediction, sigma_data=0.5),
    }
    return Denoising(**{**options, **kwargs})


def evaluate(objective, dim=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), SIZE)
    x = C * normal(SIZE, dim, seed=seed + 1)
    stratum = jnp.arange(SIZE) / SIZE
    context = Context(jnp.int32(0), {}, {}, {}, stratum, SIZE)
    return jit(lambda x, keys: objective({}, {"x": x}, keys, context))(x, keys)


@pytest.mark.parametrize(
    "make", [schedules.cosine, schedules.rectified_flow, schedules.linear_beta]
)
def test_loss_of_the_exact_denoiser(make):
    """E |eps_hat - eps|^2 = alpha^2 C^2 / (alpha^2 C^2 + sigma^2), averaged over t."""
    schedule = make()
    loss, aux = evaluate(make_objective(schedule, "eps"))
    t = 0.05 + 0.9 * (np.arange(20000) + 0.5) / 20000
    signal, noise = schedule.alpha(t) ** 2 * C**2, schedule.sigma(t) ** 2
    expected = np.mean(signal / (signal + noise))
    standard_error = np.std(np.asarray(aux.example_loss)) / np.sqrt(SIZE)
    assert abs(float(loss) - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected


@functools.cache
def reference_loss(weighting):
    return float(evaluate(make_objective(schedules.cosine(), "x0", weighting))[0])


@pytest.mark.parametrize("prediction", ["eps", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("weighting", ["uniform_x0", "uniform_eps", "min_snr"])
def test_a_weighting_means_the_same_in_every_prediction(prediction, weighting):
    """The same denoiser, the same noise: the loss may not depend on what the network puts out."""
    schedule = schedules.cosine()
    reference = reference_loss(weighting)
    loss, _ = evaluate(make_objective(schedule, prediction, weighting))
    np.testing.assert_allclose(loss, reference, rtol=2e-3)


def test_bins_partition_the_loss():
    loss, aux = evaluate(make_objective(schedules.cosine(), "v"))
    bins = [pair for name, pair in aux.metrics.items() if name.startswith("loss_logsnr/")]
    assert len(bins) == 8
    np.testing.assert_allclose(sum(float(total) for total, _ in bins), SIZE * loss, rtol=1e-4)
    assert sum(float(count) for _, count in bins) == SIZE


def test_bins_are_named_by_their_edges():
    bins = loss_by_noise(jnp.array([1.0, 2.0, 4.0]), jnp.array([-7.0, 0.5, 0.6]), None)
    filled = {name: float(total) for name, (total, count) in bins.items() if count}
    assert filled == {"loss_logsnr/-inf..-6": 1.0, "loss_logsnr/+0..+2": 6.0}


def test_masked_examples_count_for_nothing():
    objective = make_objective(schedules.cosine(), "v")
    keys = jax.random.split(jax.random.key(0), 8)
    x = normal(8, 3, seed=1)
    mask = jnp.arange(8) < 5
    context = Context(jnp.int32(0), {}, {}, {}, jnp.arange(8) / 8, 8)
    evaluate = jit(lambda batch: objective({}, batch, keys, context))
    _, whole = evaluate({"x": x, "mask": mask | True})
    loss, aux = evaluate({"x": x.at[6].set(jnp.nan), "mask": mask})
    np.testing.assert_allclose(loss, np.mean(np.asarray(whole.example_loss)[:5]), rtol=1e-5)
    assert float(aux.metrics["loss"][1]) == 5


def test_dropped_conditioning_is_per_example_and_at_the_asked_rate():
    keys = jax.random.split(jax.random.key(0), 20000)
    label = {"label": jnp.zeros(20000, jnp.int32)}
    drop = jit(lambda label, keys: drop_conditioning(label, {"label": 0.2}, keys))
    result = drop(label, keys)
    rate = 1.0 - float(jnp.mean(result["label_keep"]))
    assert abs(rate - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 20000)
    again = drop({"label": label["label"][7:]}, keys[7:])
    np.testing.assert_array_equal(again["label_keep"], result["label_keep"][7:])
    assert "label_keep" not in drop_conditioning(label, {"label": 0.0}, keys)
    with pytest.raises(KeyError, match="'text'"):
        drop_conditioning(label, {"text": 0.1}, keys)


def test_network_sees_the_declared_noise_input():
    """logsnr of the schedule, not t, when the network asks for it."""
    seen = []

    def apply(params, x, noise, conditioning, *, key=None):
        seen.append(noise)
        return x

    schedule = schedules.cosine()
    objective = make_objective(
        schedule, "v", apply=apply, noise_input="logsnr", sample_time=lambda u, s, n: u
    )
    keys = jax.random.split(jax.random.key(0), 4)
    context = Context(jnp.int32(0), {}, {}, {}, jnp.zeros(4), 4)
    objective({}, {"x": jnp.ones((4, 2))}, keys, context)
    t = jax.vmap(jax.random.uniform)(jax.vmap(lambda k: jax.random.split(k, 4)[0])(keys))
    expected = 2.0 * np.log(1.0 / np.tan(np.pi * np.asarray(t, np.float64) / 2))
    np.testing.assert_allclose(seen[0], np.clip(expected, -20, 20), rtol=1e-4, atol=1e-4)
    assert "logsnr" in denoiser.NOISE_INPUTS


def test_held_out_data_are_judged_without_dropout():
    """Neither the network's dropout nor dropped labels belong in a validation loss."""
    seen = []

    def apply(params, x, noise, conditioning, *, key=None):
        seen.append((key is None, sorted(conditioning)))
        return x

    objective = make_objective(schedules.cosine(), "v", apply=apply, drop={"label": 0.5})
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {"x": jnp.ones((4, 2)), "conditioning": {"label": jnp.zeros(4, jnp.int32)}}
    for training in (True, False):
        context = Context(jnp.int32(0), {}, {}, {}, jnp.zeros(4), 4, training)
        objective({}, batch, keys, context)
    assert seen == [(False, ["label", "label_keep"]), (True, ["label"])]
