"""Scheduler configs in our terms: what is refused, and the loop under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop
from diffusion_jax.errors import ConfigError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS = {"use_karras_sigmas": True}


def config(name, **fields):
    return {"_class_name": f"{name}Scheduler", "_diffusers_version": "0.42.1", **fields}


def gaussian_network(plan, mean=0.3, std=0.5):
    """The eps of N(mean, std^2) data, for a network that is told timesteps, fractional ones too."""
    logs = jnp.asarray(np.log(plan.schedule.sigmas[1:] / plan.schedule.alphas[1:]))

    def predict(x, timestep):
        level = jnp.exp(jnp.interp(timestep[0], jnp.arange(len(logs)), logs))
        alpha = 1.0 / jnp.sqrt(1.0 + level**2)
        return level * alpha * (x - alpha * mean) / (alpha**2 * (std**2 + level**2))

    return predict


@pytest.mark.parametrize(
    ("given", "steps", "arguments", "words"),
    [
        (config("DDIMM"), 5, {}, ["_class_name='DDIMMScheduler'", "did you mean", "DDIMScheduler"]),
        ({"beta_start": 1e-4}, 5, {}, ["_class_name=None"]),
        (config("DDIM", beta_schedul="linear"), 5, {}, ["'beta_schedul'", "'beta_schedule'"]),
        (config("DDIM", beta_schedule="cubic"), 5, {}, ["beta_schedule='cubic'", "scaled_linear"]),
        (config("DDIM", timestep_spacing="lead"), 5, {}, ["timestep_spacing='lead'", "leading"]),
        (
            config("DDPM", variance_type="learned"),
            5,
            {},
            ["variance_type='learned'", "fixed_small"],
        ),
        (config("DDIM", prediction_type="flow_prediction"), 5, {}, ["prediction_type", "epsilon"]),
        (config("DDIM"), 2000, {}, ["steps=2000", "1 to 1000"]),
        (config("DDIM"), None, {}, ["steps=None"]),
        (config("DDIM"), 5, {"s_churn": 1.0}, ["s_churn", "eta"]),
        (config("DDPM"), None, {"timesteps": [3, 5]}, ["timesteps=[3, 5]", "falling"]),
        (config("DPMSolverMultistep", solver_order=4), 5, {}, ["solver_order=4", "1, 2, 3"]),
        (config("DPMSolverMultistep", algorithm_type="dpmsolver"), 5, {}, ["final_sigmas_type"]),
        (
            config("DEISMultistep", use_karras_sigmas=True, use_beta_sigmas=True),
            5,
            {},
            ["use_beta_sigmas=True", "use_karras_sigmas"],
        ),
        (
            config("EulerDiscrete", **SD, sigma_max=99.0, use_karras_sigmas=True),
            5,
            {},
            ["sigma=99"],
        ),
        (
            config("FlowMatchEulerDiscrete", invert_sigmas=True, stochastic_sampling=True),
            5,
            {},
            ["stochastic_sampling=True", "False with invert_sigmas"],
        ),
        (config("FlowMatchHeunDiscrete"), 5, {"s_churn": 1.0}, ["s_churn=1.0"]),
        (config("HeunDiscrete"), 5, {"begin_index": 3}, ["begin_index=3", "even"]),
        (config("LMSDiscrete"), 5, {"begin_index": 3}, ["begin_index=3"]),
        (config("PNDM"), 5, {"begin_index": 3}, ["begin_index=3"]),
        (config("FlowMatchEulerDiscrete", use_dynamic_shifting=True), 5, {}, ["mu=None"]),
        (config("UniPCMultistep", solver_p={"a": 1}), 5, {}, ["solver_p"]),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(given, steps, arguments, words):
    with pytest.raises(ConfigError) as error:
        interop.plan(given, steps, **arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_fields_of_other_classes_are_left_out_as_in_published_configs():
    # Stable Diffusion's own file has fields that PNDM does not read.
    published = config("PNDM", **SD, skip_prk_steps=True, steps_offset=1, clip_sample=False)
    plan = interop.plan(published, 10)
    assert (plan.solver, plan.prediction, plan.clip) == ("pndm", "eps", None)


def test_levels_and_timesteps_of_karras_grids_are_carried_apart():
    plan = interop.plan(config("DPMSolverMultistep", **SD, **KARRAS), 7)
    levels = plan.sigmas / plan.alphas
    at_timesteps = plan.schedule.sigma((plan.timesteps + 1.0) / 1000.0)
    assert (plan.timesteps == plan.timesteps.round()).all()
    np.testing.assert_allclose(np.diff(levels ** (1 / 7), 2), 0.0, atol=1e-6)
    assert np.abs(plan.sigmas - at_timesteps).max() > 1e-5
    np.testing.assert_allclose(plan.schedule.sigma(plan.times[:-1]), plan.sigmas, rtol=1e-9)


def test_noise_is_added_at_the_second_of_levels_whose_timesteps_are_one():
    plan = interop.plan(config("UniPCMultistep", **SD, use_exponential_sigmas=True), 40)
    doubled = np.flatnonzero(np.diff(plan.timesteps) == 0.0)
    assert len(doubled)
    alpha, sigma = plan.noise_levels(plan.timesteps[doubled[0]])
    assert (alpha[0], sigma[0]) == (plan.alphas[doubled[0] + 1], plan.sigmas[doubled[0] + 1])
    with pytest.raises(ConfigError, match="is none of UniPC"):
        plan.noise_levels(7.5)


def test_a_loop_under_jit_is_the_loop_step_by_step():
    plan = interop.plan(config("UniPCMultistep", **SD, thresholding=True, sample_max_value=2.0), 6)
    predict = gaussian_network(plan)
    x = plan.initial_scale * jax.random.normal(jax.random.key(0), (2, 3, 4))
    compiled = jax.jit(lambda x: interop.sample(plan, predict, x, trajectory=True))(x)
    with jax.disable_jit():
        expected = interop.sample(plan, predict, x, trajectory=True)
    for actual, wanted in zip(compiled, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
    assert compiled[1].shape == (7, 2, 3, 4)


def test_many_steps_follow_the_ode_to_the_data():
    # The probability-flow ODE takes a normal distribution to one, quantile to quantile.
    plan = interop.plan(config("HeunDiscrete", **SD, **KARRAS), 40)
    x = plan.initial_scale * jnp.linspace(-2.0, 2.0, 9)[None]
    end = np.asarray(jax.jit(lambda x: interop.sample(plan, gaussian_network(plan), x))(x))
    alpha, sigma = plan.alphas[0], plan.sigmas[0]
    spread = np.sqrt(alpha**2 * 0.25 + sigma**2)
    np.testing.assert_allclose(end, 0.3 + 0.5 * (np.asarray(x) - alpha * 0.3) / spread, atol=3e-3)


def test_a_learned_variance_needs_twice_the_channels():
    plan = interop.plan(config("DDPM", variance_type="learned_range"), 3)
    with pytest.raises(ValueError, match="learned_variance"):
        interop.sample(plan, lambda x, t: x, jnp.zeros((1, 2, 3)), key=jax.random.key(0))
