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


def check_refused(given, steps, arguments, words):
    with pytest.raises(ConfigError) as error:
        interop.plan(given, steps, **arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


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
            ["EulerDiscreteScheduler", "sigma=99", "sigma_max", "at most 14.6"],
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
    check_refused(given, steps, arguments, words)


ONE_EVALUATION_A_STEP = [
    "DDPM",
    "DDIM",
    "UnCLIP",
    "LCM",
    "TCD",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DEISMultistep",
    "UniPCMultistep",
    "EDMEuler",
    "EDMDPMSolverMultistep",
    "FlowMatchEulerDiscrete",
]
TWO_EVALUATIONS_A_STEP = [
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "FlowMatchHeunDiscrete",
]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        *((name, 4) for name in ONE_EVALUATION_A_STEP),
        *((name, 8) for name in TWO_EVALUATIONS_A_STEP),
    ],
)
def test_a_loop_begins_at_one_of_its_steps(name, last):
    assert len(interop.plan(config(name), 5, begin_index=last).times) == 2
    for index in (-2, last + 2):
        words = [f"{name}Scheduler", f"begin_index={index}", f"0 to {last}"]
        check_refused(config(name), 5, {"begin_index": index}, words)


def test_a_loop_begins_at_a_whole_index():
    check_refused(config("DDIM"), 5, {"begin_index": 1.5}, ["begin_index=1.5", "whole"])


FLOW_UNIPC = config("UniPCMultistep", use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        (config("EulerDiscrete"), {"timesteps": [1500, 500]}, "at most 999"),
        (config("EulerDiscrete"), {"timesteps": [500, -20]}, "at least 0"),
        (config("EulerDiscrete"), {"timesteps": [100, 500]}, "falling"),
        (config("HeunDiscrete"), {"timesteps": [500, 500]}, "falling"),
        (config("EulerDiscrete"), {"sigmas": [1, 10, 0]}, "falling"),
        (config("EulerDiscrete"), {"sigmas": [10, 1, 5]}, "falling"),
        (config("EulerDiscrete", **SD), {"sigmas": [99.0, 1.0, 0.0]}, "at most 14.6"),
        (config("EulerDiscrete"), {"sigmas": [5.0]}, "the last level too"),
        (config("EulerDiscrete"), {"sigmas": [5.0, float("nan")]}, "falling"),
        (config("FlowMatchEulerDiscrete"), {"sigmas": [2, 0.5]}, "at most 1"),
        (config("FlowMatchEulerDiscrete"), {"sigmas": [1, 0.5, 0.0]}, "above 0"),
        (config("FlowMatchEulerDiscrete"), {"timesteps": [1500, 500]}, "at most 1000"),
        (FLOW_UNIPC, {"sigmas": [2, 0.5]}, "at most 1"),
        (FLOW_UNIPC, {"sigmas": [1, 0.5, 0.0]}, "above 0"),
        (config("DPMSolverMultistep"), {"timesteps": []}, "falling"),
        (config("DPMSolverMultistep"), {"timesteps": [500.5, 2.7]}, "whole"),
        (config("DPMSolverSinglestep"), {"timesteps": [1000, 2]}, "at most 999"),
        (config("DDPM"), {"timesteps": [500.5, 2.7]}, "whole"),
        (config("LCM"), {"timesteps": "abc"}, "falling"),
        (config("TCD"), {"timesteps": [1000, 3]}, "at most 999"),
    ],
)
def test_given_lists_fall_within_their_range(given, arguments, expected):
    (name,) = arguments
    check_refused(given, None, arguments, [given["_class_name"], f"{name}=", expected])


@pytest.mark.parametrize(
    ("given", "steps", "arguments", "words"),
    [
        (config("FlowMatchEulerDiscrete"), 5, {"mu": 1.0}, ["mu=1.0", "use_dynamic_shifting"]),
        (config("DPMSolverMultistep"), 5, {"mu": 1.0}, ["mu=1.0", "use_dynamic_shifting"]),
        (config("DDPM"), 30, {"timesteps": [500, 100]}, ["steps=30", "timesteps"]),
        (config("EulerDiscrete"), 2, {"sigmas": [5.0, 1.0, 0.0]}, ["steps=2", "sigmas"]),
        (config("FlowMatchEulerDiscrete"), 30, {"sigmas": [1.0, 0.5]}, ["steps=30", "or 2"]),
        (
            config("EulerDiscrete"),
            None,
            {"timesteps": [5, 3], "sigmas": [5.0, 3.0]},
            ["sigmas=[5.0, 3.0]", "timesteps"],
        ),
        (
            config("HeunDiscrete", **KARRAS),
            None,
            {"timesteps": [5, 3]},
            ["timesteps=[5, 3]", "use_karras_sigmas=True"],
        ),
        (config("UniPCMultistep"), None, {"sigmas": [0.9]}, ["sigmas=[0.9]", "use_flow_sigmas"]),
        (config("UniPCMultistep", shift_terminal=0.1), 5, {}, ["shift_terminal=0.1"]),
        (config("DDIM"), 2.9, {}, ["steps=2.9", "whole"]),
        (config("DDIM"), "ten", {}, ["steps='ten'", "whole"]),
        (
            config("EulerDiscrete"),
            5,
            {"s_churn": 1.0, "s_tmin": 5.0, "s_tmax": 1.0},
            ["s_tmax=1.0", "s_tmin=5"],
        ),
        (config("LMSDiscrete"), 6, {"order": 9}, ["order=9", "at most 4"]),
        (config("DPMSolverMultistep"), 1000, {}, ["steps=1000", "1 to 999"]),
        (
            config("EulerDiscrete", timestep_spacing="leading", steps_offset=1),
            1000,
            {},
            ["steps_offset=1", "at most 0"],
        ),
        (
            config("DDIM", timestep_spacing="trailing"),
            61,
            {},
            ["timestep=-1", "0 to 999", "another number of steps"],
        ),
        (config("LCM"), 4, {"strength": 0}, ["strength=0", "above 0"]),
        (config("LCM"), 4, {"strength": 1.5}, ["strength=1.5", "at most 1"]),
        (config("LCM"), 4, {"strength": 0.01}, ["strength=0.01", "1/50"]),
        (config("TCD"), 4, {"original_inference_steps": 0}, ["original_inference_steps=0"]),
    ],
)
def test_no_argument_is_dropped_in_silence(given, steps, arguments, words):
    check_refused(given, steps, arguments, words)


@pytest.mark.parametrize(
    ("name", "fields", "arguments", "words"),
    [
        ("DDIM", {"trained_betas": [0.01] * 500}, {}, ["500 entries", "num_train_timesteps=1000"]),
        ("DDIM", {"trained_betas": [0.01] * 999 + [2.0]}, {}, ["trained_betas[999]=2.0"]),
        ("DDIM", {"num_train_timesteps": "x"}, {}, ["num_train_timesteps='x'", "whole"]),
        ("DDIM", {"beta_start": None}, {}, ["beta_start=None", "above 0"]),
        ("DDIM", {"beta_end": 3.0}, {}, ["beta_end=3.0", "below 1"]),
        ("DDIM", {"beta_end": 0.9}, {}, ["beta_end", "alpha is 0 from timestep"]),
        ("UniPCMultistep", {"disable_corrector": 0}, {}, ["disable_corrector=0", "a list"]),
        ("UniPCMultistep", {"disable_corrector": ["x"]}, {}, ["disable_corrector='x'", "whole"]),
        ("EDMEuler", {"rho": 0}, {}, ["rho=0", "above 0"]),
        ("EDMEuler", {"sigma_min": 0}, {}, ["sigma_min=0", "above 0"]),
        ("EDMEuler", {"sigma_max": 0.001}, {}, ["sigma_max=0.001", "above 0.002"]),
        ("FlowMatchEulerDiscrete", {"shift": 0}, {}, ["shift=0", "above 0"]),
        ("FlowMatchHeunDiscrete", {"shift": -1.0}, {}, ["shift=-1.0", "above 0"]),
        (
            "FlowMatchEulerDiscrete",
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"mu": -1},
            ["mu=-1", "above 0"],
        ),
        (
            "FlowMatchEulerDiscrete",
            {"use_dynamic_shifting": True},
            {"mu": 1000},
            ["mu=1000", "at most 700"],
        ),
        ("DPMSolverMultistep", {"lambda_min_clipped": "x"}, {}, ["lambda_min_clipped='x'"]),
        ("DPMSolverMultistep", {"lambda_min_clipped": 9.0}, {}, ["lambda_min_clipped=9.0"]),
        ("DPMSolverMultistep", {"algorithm_type": ["sde"]}, {}, ["algorithm_type=['sde']"]),
        (
            "EulerDiscrete",
            {"sigma_min": 0.01, **KARRAS, **SD, "final_sigmas_type": "sigma_min"},
            {},
            ["final_sigmas_type='sigma_min'", "'zero'", "0.0291", "0.01"],
        ),
    ],
)
def test_numbers_of_a_config_are_checked_where_they_are_read(name, fields, arguments, words):
    words = [f"{name}Scheduler", *words]
    check_refused(config(name, **fields), 5, arguments, words)


def test_one_step_has_no_level_to_stretch_to():
    given = config("FlowMatchEulerDiscrete", shift_terminal=0.1)
    check_refused(given, 1, {}, ["shift_terminal=0.1", "one step"])
    np.testing.assert_allclose(interop.plan(given, 2).times, [1.0, 0.1, 0.0], rtol=1e-6)


def test_a_class_name_is_a_string():
    check_refused({"_class_name": ["DDIM"]}, 5, {}, ["_class_name=['DDIM']"])


@pytest.mark.parametrize(
    ("name", "fields", "arguments"),
    [
        ("LCM", {}, {"timesteps": [999, 500]}),
        ("TCD", {}, {"timesteps": [999, 500]}),
        ("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
        ("DDIM", {"timestep_spacing": "linspace"}, {}),
        ("DDPM", {"timestep_spacing": "trailing"}, {}),
    ],
)
def test_noise_is_not_asked_for_where_there_is_no_signal(name, fields, arguments):
    steps = None if arguments else 5
    given = config(name, rescale_betas_zero_snr=True, **fields)
    words = [f"{name}Scheduler", "prediction_type='epsilon'", "rescale_betas_zero_snr", "999"]
    check_refused(given, steps, arguments, [*words, "v_prediction"])
    plan = interop.plan({**given, "prediction_type": "v_prediction"}, steps, **arguments)
    assert plan.alphas[0] == 0.0
    plan = interop.plan(given, None if arguments else 5, **{**arguments, "begin_index": 1})
    assert plan.alphas[0] > 0.0


def test_what_diffusers_takes_as_well_is_taken():
    flow = config("FlowMatchEulerDiscrete")
    beside = interop.plan(flow, 2, sigmas=[1.0, 0.5])
    np.testing.assert_array_equal(beside.times, interop.plan(flow, sigmas=[1.0, 0.5]).times)
    # The first steps have no more slopes than that.
    assert interop.plan(config("LMSDiscrete"), 3, order=4).options["order"] == 3
    # Ends with its last level once more.
    given = config("EulerDiscrete", timestep_spacing="leading", final_sigmas_type="sigma_min")
    last = interop.plan(given, 10).times[-2:]
    assert 0.0 < last[0] - last[1] < 1e-11


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
