"""Recorded loops of diffusers: `DIFFUSION_JAX_GOLDEN`, or else tests/golden, against our solvers.

The network of a case is its formula; steps run one by one, without compilation, since every case
has coefficients, and so a program, of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop
from diffusion_jax.diffusion import predictions
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.errors import ConfigError

OURS = (Path(__file__).parents[1] / "golden").resolve()
GOLDEN = Path(os.environ.get("DIFFUSION_JAX_GOLDEN") or OURS).resolve()
INDEX = json.loads((GOLDEN / "index.json").read_text())["cases"]
CASES = [case["name"] for case in INDEX if case["kind"] == "scheduler"]

PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}

# What of diffusers is refused: cases of other folders may ask for these, and for nothing else.
UNSUPPORTED = re.compile(
    r"(DDPM|UnCLIP)Scheduler: variance_type='(learned|fixed_large_log)' is not supported"
    r"|DPMSolverMultistepScheduler: solver_order=3 is not supported"
    r"|FlowMatchEulerDiscreteScheduler: stochastic_sampling=True is not supported"
    r"|FlowMatchHeunDiscreteScheduler: s_churn=[^;]*; expected 0$"
    r"|(LMSDiscrete|PNDM)Scheduler: begin_index=\d+; expected 0$"
    r"|UniPCMultistepScheduler: solver_p="
)

# Options that those of schedulers/ do not have take long; another folder's cases are all run.
LONG = {name for name in CASES if GOLDEN == OURS and name.startswith("options/")}
every_case = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in CASES]
)


def channels_last(array):
    """[..., B, C, H, W] or the like as [..., B, H, W, C]; the batch axis of states comes first."""
    return np.moveaxis(array, 1, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A recorded loop, its arrays with channels last, and our plan of it."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    plan: interop.SchedulerPlan

    @property
    def spec(self):
        return self.facts["spec"]

    def tolerance(self, kind):
        given = self.facts["tolerance"]
        return {"atol": given[f"{kind}_atol"], "rtol": given[f"{kind}_rtol"]}

    def states(self, key):
        """[n, B, ..., C]"""
        return np.moveaxis(self.arrays[key], 2, -1)

    def noise(self, step, draw, shape):
        """The draw that diffusers made there."""
        count = sum(self.plan.draws[:step]) + draw
        assert draw < self.plan.draws[step]
        return channels_last(self.arrays[f"noise/{count:03d}"])

    def scales(self):
        """What our states are multiplied with to be those of diffusers, [n + 1]."""
        end = self.plan.schedule.alpha(float(self.plan.times[-1]))
        alphas = np.append(self.plan.alphas, end)
        scales = self.plan.sample_scale(alphas) * np.ones(len(alphas))
        return scales.reshape(-1, *[1] * (self.arrays["x"].ndim - 1))


@functools.cache
def read(name):
    """The case, or the line that says what of it is not supported."""
    facts = json.loads((GOLDEN / name / "case.json").read_text())
    spec = facts["spec"]
    arguments = {**spec["set_timesteps"], **spec["step"]}
    steps = arguments.pop("num_inference_steps", None)
    if "begin_index" in spec:
        arguments["begin_index"] = spec["begin_index"]
    config = json.loads((GOLDEN / name / "scheduler/scheduler_config.json").read_text())
    try:
        plan = interop.plan(config, steps, **arguments)
    except ConfigError as error:
        return str(error)
    return Case(facts, dict(np.load(GOLDEN / name / "reference.npz")), plan)


def case_of(name):
    case = read(name)
    if isinstance(case, str):
        if GOLDEN == OURS or not UNSUPPORTED.match(case):
            pytest.fail(f"{name} is refused: {case}")
        pytest.skip(case)
    return case


def toy(case, x, count):
    """The network of evaluation `count` at our state x, in float64: the formula of case.json."""
    a, s = case.arrays["toy_alpha"][count], case.arrays["toy_sigma"][count]
    mean, std, weight = (case.arrays[f"toy_{key}"] for key in ("mean", "std", "weight"))
    variance = a**2 * std**2 + s**2
    offset = x[..., None, :] - a * mean
    log_weight = np.log(weight) - 0.5 * x.shape[-1] * np.log(variance)
    log_weight = log_weight - 0.5 * np.sum(offset**2, -1) / variance
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    x0 = np.sum(weight[..., None] * (mean + (a * std**2 / variance)[:, None] * offset), -2)
    return x0, (x - a * x0) / s, a, s


def toy_output(case, model_input, count):
    """What the recorded network gives for an input."""
    x = np.asarray(model_input, np.float64)
    data = case.plan.sigma_data
    if case.spec["family"] == "edm":
        x = x * np.sqrt(case.arrays["toy_sigma"][count] ** 2 + data**2)
    x0, eps, a, s = toy(case, x, count)
    kind = "edm" if case.spec["family"] == "edm" else PREDICTIONS[case.spec["toy_output"]]
    output = predictions.from_x0_eps(kind, x0, eps, a, s, sigma_data=data)
    if case.spec["family"] == "edm" and case.plan.flipped:
        output = -output
    if case.plan.learned_variance:
        output = np.concatenate([output, np.tanh(0.7 * np.asarray(model_input) + 0.1)], -1)
    return output


class Loop:
    """A run of a case's plan with a network (model input, count of evaluations) -> output."""

    def __init__(self, case, network, dtype):
        self.case, self.network, self.dtype = case, network, dtype
        self.scales = case.scales()
        self.states = []

    def predict(self, model_input, timestep):
        plan, count = self.case.plan, len(self.states)
        assert timestep.shape == model_input.shape[:1]
        assert (np.asarray(timestep) == np.float32(plan.timesteps[count])).all()
        self.keep(np.asarray(model_input, np.float64) / plan.input_scales[count])
        return jnp.asarray(self.network(model_input, count), self.dtype)

    def keep(self, state):
        self.states.append(np.asarray(state, np.float64) * self.scales[len(self.states)])

    def recorded(self):
        """The state that diffusers had at this point, in our units."""
        count = len(self.states)
        return jnp.asarray(self.case.states("x")[count] / self.scales[count], self.dtype)

    def run(self):
        """All states in diffusers' units [n + 1, ...]: those that the network saw, and the end."""
        with jax.disable_jit():
            end = interop.sample(
                self.case.plan, self.predict, self.recorded(), noise=self.case.noise
            )
        assert end.dtype == self.dtype
        self.keep(end)
        return np.stack(self.states)

    def run_forced(self, monkeypatch):
        """The same, but that every step starts from the recorded state; its end is kept."""

        def scan_steps(update, x, init, rows, trajectory):
            history, ends = init(x), {}
            for k in range(len(self.case.plan.times) - 1):
                row = jax.tree.map(lambda values, k=k: values[k], rows)
                x, history = update(self.recorded(), history, row)
                count = len(self.states)
                ends[count] = np.asarray(x, np.float64) * self.scales[count]
            del ends[count]
            for count, end in ends.items():
                self.states[count] = end
            return x

        monkeypatch.setattr(stepping, "scan_steps", scan_steps)
        return self.run()


@every_case
def test_timesteps_start_and_added_noise(name):
    case = case_of(name)
    begin = case.spec.get("begin_index", 0)
    timesteps = case.arrays["timesteps"][begin:]
    if case.plan.integer_timesteps:
        np.testing.assert_array_equal(case.plan.timesteps, timesteps)
    else:
        # diffusers computes fractional ones in single precision, from logarithms.
        np.testing.assert_allclose(case.plan.timesteps, timesteps, rtol=1e-6, atol=1e-3)
    assert sum(case.plan.draws) == len(case.facts["noise_sources"])
    first = case.plan.sample_scale(case.plan.alphas[0]) * case.plan.initial_scale
    if case.spec.get("scale_start", True):
        np.testing.assert_allclose(first, case.facts["init_noise_sigma"], rtol=1e-6)
    added = {"train_add_noise", "train_scale_noise"} & set(case.arrays)
    for key in added:
        alpha, sigma = case.plan.noise_levels(case.arrays["train_t"])
        scale = case.plan.sample_scale(alpha)
        noise = case.arrays["train_noise"]
        expand = (-1, *[1] * (noise.ndim - 1))
        noisy = (scale * sigma).reshape(expand) * noise
        noisy = (scale * alpha).reshape(expand) * case.arrays["train_x0"] + noisy
        np.testing.assert_allclose(noisy, case.arrays[key], rtol=2e-6, atol=2e-6)


@every_case
def test_the_network_is_the_recorded_one(name):
    case = case_of(name)
    inputs, outputs = case.states("model_input"), case.states("model_output")
    for count, (model_input, output) in enumerate(zip(inputs, outputs, strict=True)):
        actual = toy_output(case, model_input, count)
        np.testing.assert_allclose(actual, output, rtol=1e-4, atol=2e-5)


@every_case
def test_every_step_from_the_recorded_state_and_outputs(name, monkeypatch):
    case = case_of(name)
    outputs = case.states("model_output")
    loop = Loop(case, lambda model_input, count: outputs[count], jnp.float32)
    actual = loop.run_forced(monkeypatch)
    np.testing.assert_allclose(actual, case.states("x"), **case.tolerance("step"))


@every_case
def test_states_of_the_whole_loop(name):
    case = case_of(name)
    actual = Loop(case, functools.partial(toy_output, case), jnp.float32).run()
    np.testing.assert_allclose(actual, case.states("x"), **case.tolerance("loop"))


@every_case
def test_the_end_in_double_precision(name):
    case = case_of(name)
    with jax.enable_x64(True):
        actual = Loop(case, functools.partial(toy_output, case), jnp.float64).run()
    gap = np.abs(actual[-1] - case.states("x")[-1]).max()
    assert gap <= 10.0 * case.facts["float64_gap"]


def test_every_case_is_covered():
    reasons = {name: reason for name in CASES if isinstance(reason := read(name), str)}
    print(f"{len(CASES) - len(reasons)} of {len(INDEX)} recorded cases are compared here")
    others = {
        case["name"]: f"of kind {case['kind']}, no loop of a scheduler"
        for case in INDEX
        if case["kind"] != "scheduler"
    }
    for name, reason in {**reasons, **others}.items():
        print(f"not covered: {name}: {reason}")
    unknown = {name: reason for name, reason in reasons.items() if not UNSUPPORTED.match(reason)}
    assert not (reasons if GOLDEN == OURS else unknown)
    assert any(isinstance(read(name), Case) for name in CASES)


def test_only_what_is_known_to_be_refused_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path)
    with pytest.raises(FileNotFoundError):
        read.__wrapped__("schedulers/none")
    refusals = {
        "UniPCMultistepScheduler: solver_p='x' is not supported; supported: None": pytest.skip,
        "UniPCMultistepScheduler: solver_order=4 is not supported": pytest.fail,
        "LMSDiscreteScheduler: begin_index=2; expected 0": pytest.skip,
        "EulerDiscreteScheduler: begin_index=2; expected 0": pytest.fail,
    }
    for reason, outcome in refusals.items():
        monkeypatch.setitem(globals(), "read", lambda name, reason=reason: reason)
        with pytest.raises(outcome.Exception):
            case_of("any")
