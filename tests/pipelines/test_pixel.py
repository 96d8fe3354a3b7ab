"""The pipeline with exact denoisers in place of a network: its samples have known moments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import OPTIONS

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.diffusion import denoiser, processes, schedules, time_grids
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines import output, pixel
from diffusion_jax.pipelines.options import SamplingOptions, label_list
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.pipelines.samples import Samples

MEANS = np.array([[1.0, -0.5], [-1.0, 0.25], [0.5, 0.75]], np.float32)
STD = 0.3
PRIOR_MEAN, PRIOR_STD = np.array([0.2, 0.1], np.float32), 0.8
SCHEDULE = schedules.cosine()


def gaussian_x0(x, alpha, sigma, mean, std):
    """E[x0 | x_t] of N(mean, std^2): the weighted mean of prior and observation."""
    precision = alpha**2 / sigma**2 + 1.0 / std**2
    return (alpha * x / sigma**2 + mean / std**2) / precision


def exact(params, conditioning):
    """Label y is N(MEANS[y], STD^2); without a label the data are N(PRIOR_MEAN, PRIOR_STD^2)."""

    def predict(x, t):
        alpha = jnp.reshape(SCHEDULE.alpha(t), (-1, 1))
        sigma = jnp.maximum(jnp.reshape(SCHEDULE.sigma(t), (-1, 1)), 1e-4)
        if "label" in conditioning:
            return gaussian_x0(x, alpha, sigma, params["means"][conditioning["label"]], STD)
        return gaussian_x0(x, alpha, sigma, PRIOR_MEAN, PRIOR_STD)

    return denoiser.as_denoiser(predict, SCHEDULE)


def make(mesh=None, **changes):
    fields = {
        "params": {"means": jnp.asarray(MEANS)},
        "denoiser": exact,
        "process": processes.Gaussian(SCHEDULE),
        "schedule": SCHEDULE,
        "spec": DataSpec(shape=(2,), kind="points", num_classes=3, range=(-2.0, 2.0)),
        "conditions": ("label",),
        "times": time_grids.uniform,
        "mesh": mesh or make_mesh(devices=jax.devices()[:1]),
        "defaults": SamplingOptions(solver="ddim", steps=20, batch_size=64),
    }
    return PixelPipeline(**{**fields, **changes})


@pytest.fixture(autouse=True)
def _quick_to_compile(monkeypatch):
    """These programs compute little; how they are optimised is not under test."""
    monkeypatch.setattr(pixel, "compiler_options", lambda: OPTIONS)


@functools.cache
def shared():
    """One pipeline for all tests that change nothing of it: its programs are compiled once."""
    return make()


@pytest.mark.parametrize(("solver", "steps"), [("heun", 30), ("dpmpp_2m", 40), ("ddpm", 200)])
def test_moments_of_the_classes(solver, steps):
    samples = shared().sample(6000, labels=[2, 0], solver=solver, steps=steps, batch_size=6000)
    for label in (0, 2):
        x = samples.x[samples.label == label]
        assert len(x) == 3000
        np.testing.assert_allclose(x.mean(axis=0), MEANS[label], atol=5 * STD / 3000**0.5 + 0.01)
        np.testing.assert_allclose(x.std(axis=0), STD, rtol=0.06)
    correlation = np.corrcoef(x.T)[0, 1]
    assert abs(correlation) < 5 / 3000**0.5


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_sde"])
def test_a_sample_depends_on_seed_and_index_alone(solver):
    pipeline = shared()
    options = {"solver": solver, "steps": 5, "seed": 7}
    whole = pipeline.sample(24, batch_size=24, **options)
    for size in (1, 7, 64) if solver == "ddpm" else (7,):
        parts = pipeline.sample(24, batch_size=size, **options)
        np.testing.assert_allclose(parts.x, whole.x, atol=1e-4)
        np.testing.assert_array_equal(parts.label, whole.label)
    few = pipeline.sample(7, **options)
    np.testing.assert_allclose(few.x, whole.x[:7], atol=1e-4)
    spread = make(make_mesh(data=4, fsdp=2)).sample(24, batch_size=20, **options)
    np.testing.assert_allclose(spread.x, whole.x, atol=1e-4)
    other = pipeline.sample(24, **{**options, "seed": 8})
    assert np.abs(other.x - whole.x).max() > 0.1


def test_a_stream_is_the_same_samples_batch_by_batch():
    whole = shared().sample(150, labels=[2, 0], seed=3)
    parts = list(shared().stream(150, labels=[2, 0], seed=3, batch_size=64))
    assert [len(part) for part in parts] == [64, 64, 22]
    np.testing.assert_array_equal(np.concatenate([part.x for part in parts]), whole.x)
    np.testing.assert_array_equal(np.concatenate([part.label for part in parts]), whole.label)
    assert all(part.finite.all() for part in parts)
    # Mistakes come before the first batch is asked for.
    with pytest.raises(ConfigError, match="label"):
        shared().stream(2, labels=[7])


def test_samples_that_are_no_numbers_are_told():
    means = np.where(np.arange(3)[:, None] == 1, np.nan, MEANS)
    pipeline = make(params={"means": jnp.asarray(means)})
    np.testing.assert_array_equal(pipeline.sample(3).finite, [True, False, True])


def test_labels_are_cycled():
    sample = functools.partial(shared().sample, steps=1, batch_size=2)
    assert sample(7, labels=[2, 0, 0]).label.tolist() == [2, 0, 0, 2, 0, 0, 2]
    assert sample(4).label.tolist() == [0, 1, 2, 0]
    assert sample(2, labels=[1, 2, 0]).label.tolist() == [1, 2]
    assert make(conditions=()).sample(2, steps=1).label is None


NAMES = ("red", "green", "7")


def test_labels_by_name():
    spec = dataclasses.replace(make().spec, classes=NAMES)
    pipeline = make(spec=spec)
    assert pipeline.sample(3, labels=["green", 0], steps=1).label.tolist() == [1, 0, 1]
    assert pipeline.sample(2, labels="red", steps=1).label.tolist() == [0, 0]
    # A text is a name, a number is a number.
    assert label_list(["7", 0], 3, NAMES).tolist() == [2, 0]
    assert label_list(np.array(["red", "7"]), 3, NAMES).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        (["rde"], NAMES, "labels='rde' is no class (did you mean 'red'?); known: red, green, 7"),
        (["red"], (), "labels='red': the classes have no names; expected 0..2"),
        ([7], NAMES, "labels=7: out of range; expected 0..2; the class of that name is 2"),
        ([4], NAMES, "labels=4: out of range; expected 0..2"),
        (["x"], tuple(f"n{i}" for i in range(40)), "n10, n11 and 28 more"),
        ([True], NAMES, "labels=[True]: expected a list of whole numbers or names"),
        (np.zeros((2, 2), int), NAMES, "expected a list of whole numbers or names"),
    ],
)
def test_labels_that_are_none(labels, names, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        label_list(labels, 3, names)
    assert "\n" not in str(raised.value)


def test_guidance_against_its_closed_form():
    """One Euler-like step of DDIM from t = 1 (alpha = 0) to 0 returns x0_hat itself, which is
    linear in the guidance: unconditional + guidance (conditional - unconditional)."""
    for guidance in (0.0, 1.0, 3.0):
        samples = shared().sample(6, steps=1, guidance=guidance)
        expected = PRIOR_MEAN + guidance * (MEANS[samples.label] - PRIOR_MEAN)
        np.testing.assert_allclose(samples.x, expected, atol=1e-4)


def test_guidance_and_seed_compile_nothing_new():
    pipeline = make()
    pipeline.sample(8, guidance=2.0, seed=1)
    (program,) = pipeline._programs.values()
    pipeline.sample(8, guidance=3.0, seed=2, labels=[1])
    assert list(pipeline._programs.values()) == [program]
    assert program._cache_size() == 1


def test_trajectories_go_from_noise_to_the_samples():
    samples = shared().sample(5, steps=6, trajectory=True, batch_size=4)
    assert samples.trajectory.shape == (7, 5, 2)
    np.testing.assert_array_equal(samples.trajectory[-1], samples.x)
    plain = shared().sample(5, steps=6)
    np.testing.assert_allclose(plain.x, samples.x, atol=1e-4)
    assert plain.trajectory is None
    starts = shared().sample(4000, steps=1, trajectory=True, batch_size=4000).trajectory[0]
    np.testing.assert_allclose(starts.std(), 1.0, rtol=0.05)
    np.testing.assert_allclose(starts.mean(), 0.0, atol=0.06)


def test_progress_counts_samples():
    seen = []
    shared().sample(10, steps=1, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [3]}, "labels=3: out of range; expected 0..2"),
        ({"labels": [-1]}, "labels=-1: out of range"),
        ({"num": 0}, "num=0: expected at least 1"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"seed": 2**32}, "seed=4294967296: expected 0 <= seed < 4294967296"),
        ({"solver": "dim"}, "did you mean 'ddim'"),
        ({"guidance": float("nan")}, "guidance=nan: expected a finite number"),
        ({"guidance": [1, 2]}, "guidance=[1, 2]: expected a finite number"),
        ({"guidance": "2"}, "guidance='2': expected a finite number"),
        ({"labels": [[0], [1, 2]]}, "labels=[[0], [1, 2]]: expected a list of whole numbers"),
        ({"labels": [0.5]}, "labels=[0.5]: expected a list of whole numbers"),
        ({"num": 2.0}, "num=2.0: expected a whole number"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"solver": ["ddim"]}, "solver=['ddim']: expected a name"),
        ({"solver": ["ddim"], "solver_options": {"eta": 0.5}}, "solver=['ddim']: expected a name"),
        ({"guidance_interval": (0.5,)}, "guidance_interval=(0.5,): expected times"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval=(0.8, 0.2): expected times"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0: expected 0..1"),
        ({"threshold": "dynamik"}, "did you mean 'dynamic'"),
        ({"threshold_percentile": 1.0}, "threshold_percentile=1.0: expected a number between"),
        ({"threshold": "static"}, "threshold='static': points are not clipped; expected 'none'"),
        ({"solver": "ancestral", "solver_options": {"eta": 0.5}}, "ancestral option 'eta'"),
        ({"solver": "ddim", "solver_options": {"eta": 3.0}}, "ddim.eta=3.0"),
        ({"solver": "ddim", "solver_options": {"eta": "x"}}, "ddim.eta='x': expected a finite"),
        ({"solver": "ddpm", "solver_options": {"variance": 1}}, "ddpm.variance=1: expected a str"),
        (
            {"solver": "pndm", "solver_options": {"corrected": 1}},
            "pndm.corrected=1: expected a bool",
        ),
        ({"solver": "dopri5", "solver_options": {"evaluations": True}}, "'evaluations' is unknown"),
        ({"solver": "unipc", "solver_options": {"order": 3}, "steps": 2}, "unipc.order=3 needs"),
        ({"solver_options": 3}, "solver_options=3: expected a mapping"),
        ({"guidance_options": 3}, "guidance_options=3: expected a mapping"),
        ({"solver": "ddpm", "solver_options": {"variance": "learned"}}, "ddpm.variance"),
        ({"solver": "ddim", "solver_options": {"eat": 1.0}}, "eat"),
        ({"guidence": 2.0}, "did you mean 'guidance'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        # The check of annotations that the tests turn on would come first.
        inspect.unwrap(PixelPipeline.sample)(shared(), **options)
    assert "\n" not in str(raised.value)


def test_an_unconditional_model_takes_neither_labels_nor_guidance():
    pipeline = make(conditions=())
    with pytest.raises(ConfigError, match=r"labels=\[1\]: the model is unconditional"):
        pipeline.sample(2, labels=[1])
    with pytest.raises(ConfigError, match=r"guidance=2\.0: the model is unconditional"):
        pipeline.sample(2, guidance=2.0)
    with pytest.raises(ConfigError, match=r"guidance_rescale=0\.5: the model is unconditional"):
        pipeline.sample(2, guidance_rescale=0.5)
    with pytest.raises(ConfigError, match="no ODE; expected 'ancestral'"):
        make(schedule=None).sample(2)


def test_guidance_needs_a_model_that_dropped_labels_in_training():
    pipeline = make(always=("label",))
    assert len(pipeline.sample(2, steps=1, guidance=1.0)) == 2
    with pytest.raises(ConfigError, match=r"guidance=2\.0: .*label_dropout=0"):
        pipeline.sample(2, guidance=2.0)


def test_trace_judges_solvers_that_are_not_in_use():
    good = make(params={"means": jax.ShapeDtypeStruct((3, 2), jnp.float32)})
    good.trace()
    options = dataclasses.replace(good.defaults, solver="heun", solver_options={"ddim": {"eta": 3}})
    with pytest.raises(ConfigError, match=r"ddim\.eta=3"):
        dataclasses.replace(good, defaults=options).trace()


def test_options_of_the_solver_go_over_the_pipelines_own():
    defaults = SamplingOptions(solver="ddim", steps=5, solver_options={"ddim": {"eta": 1.0}})
    pipeline = make(defaults=defaults)
    noisy = pipeline.sample(4)
    plain = pipeline.sample(4, solver_options={"eta": 0.0})
    assert np.abs(noisy.x - plain.x).max() > 1e-2
    np.testing.assert_array_equal(plain.x, shared().sample(4, steps=5).x)


def test_guidance_acts_inside_its_interval_alone():
    """DDIM from t = 1 in two steps: guided at t = 1, or only below it."""
    pipeline = shared()
    free = pipeline.sample(6, steps=2)
    early = pipeline.sample(6, steps=2, guidance=3.0, guidance_interval=(0.9, 1.0))
    never = pipeline.sample(6, steps=2, guidance=3.0, guidance_interval=(0.6, 0.9))
    np.testing.assert_allclose(never.x, free.x, atol=1e-5)
    assert np.abs(early.x - free.x).max() > 0.1


def test_rescaled_guidance_has_the_deviation_of_the_conditional_branch():
    """One step to t = 0 returns x0_hat; Lin et al. 2024, eq. 15-16, by hand."""
    pipeline = shared()
    free = pipeline.sample(6, steps=1).x
    full = pipeline.sample(6, steps=1, guidance=3.0).x
    half = pipeline.sample(6, steps=1, guidance=3.0, guidance_rescale=0.5).x
    ratio = free.std(axis=1, keepdims=True) / full.std(axis=1, keepdims=True)
    np.testing.assert_allclose(half, full * (0.5 * ratio + 0.5), atol=1e-4)


def test_images_are_clipped_and_rounded_to_bytes(tmp_path):
    spec = DataSpec(shape=(4, 4, 1), kind="image", num_classes=2)

    def constant(params, conditioning):
        level = jnp.where(conditioning["label"] == 0, 7.0, 0.25)[:, None, None, None]
        return denoiser.as_denoiser(lambda x, t: jnp.zeros_like(x) + level, SCHEDULE)

    options = SamplingOptions(solver="ddim", steps=3, threshold="static")
    pipeline = make(spec=spec, denoiser=constant, defaults=options, params={})
    samples = pipeline.sample(3, trajectory=True)
    assert samples.x.dtype == np.uint8
    np.testing.assert_array_equal(samples.x[0], 255)
    np.testing.assert_array_equal(samples.x[1], 159)  # 1.25 * 127.5 = 159.4

    folder = output.prepare(tmp_path / "out")
    output.write(folder, samples, spec)
    fewer = pipeline.sample(2)
    output.write(folder, fewer, spec)
    names = {path.name for path in folder.iterdir()}
    assert names == {"samples.npz", "grid.png", "00000.png", "00001.png"}
    output.write(folder, samples, spec)
    names = {path.name for path in folder.iterdir()}
    images = {f"0000{i}.png" for i in range(3)}
    assert names == {"samples.npz", "grid.png", "trajectory.gif", *images}
    with np.load(folder / "samples.npz") as stored:
        assert sorted(stored) == ["label", "trajectory", "x"]
        np.testing.assert_array_equal(stored["x"], samples.x)
        np.testing.assert_array_equal(stored["label"], [0, 1, 0])
        assert stored["trajectory"].shape == (4, 3, 4, 4, 1)


def test_samples_without_labels_round_trip(tmp_path):
    samples = Samples(x=np.ones((3, 2), np.float32))
    np.savez(tmp_path / "s.npz", **samples.arrays())
    with np.load(tmp_path / "s.npz") as stored:
        assert list(stored) == ["x"]
        np.testing.assert_array_equal(stored["x"], samples.x)
    assert len(samples) == 3
    np.testing.assert_array_equal(np.asarray(samples), samples.x)
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        output.prepare(tmp_path / "s.npz" / "out")


def test_other_weights_compile_nothing_again():
    """Grids during training take the weights of the moment; the program stays."""
    traced = []

    def counted(params, conditioning):
        traced.append(1)
        return exact(params, conditioning)

    pipeline = make(denoiser=counted)
    first = pipeline.sample(6, seed=3)
    before = len(traced)
    moved = pipeline.with_params({"means": jnp.asarray(MEANS + 10.0)})
    second = moved.sample(6, seed=3)
    assert len(traced) == before
    assert np.all(second.x - first.x > 5.0)
