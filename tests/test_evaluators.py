"""What the evaluators of likelihoods know of learned processes, of pixels and of what fails."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data import DataSpec
from diffusion_jax.diffusion import likelihood, schedules, time_grids
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.learned_betas import learned_betas
from diffusion_jax.diffusion.learned_schedule import learned
from diffusion_jax.diffusion.processes import (
    Binomial,
    Gaussian,
    LearnedGaussian,
    Masked,
    learned_keep,
)
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.bound import BoundEvaluator, floor_bits
from diffusion_jax.evaluation.likelihood import LikelihoodEvaluator, LikelihoodOptions
from diffusion_jax.evaluation.pixel_levels import check_grid, off_grid
from diffusion_jax.evaluation.shared import on_host
from diffusion_jax.parallel.mesh import make_mesh

POINTS = DataSpec(shape=(3,), kind="points", range=(-2.0, 2.0))
TIMES = time_grids.uniform(4)


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    return None


def one():
    return make_mesh(1, 1, 1, 1, devices=jax.devices()[:1])


def on_device(part):
    return part.with_params(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), part.params))


def batch(x):
    return {"x": jnp.asarray(x, jnp.float32), "mask": jnp.ones(len(x), bool)}


def evaluate(process, x, denoise, levels=0, **options):
    evaluator = LikelihoodEvaluator(
        denoiser=lambda params, conditioning: as_denoiser(denoise),
        process_of=lambda params: process,
        spec=POINTS,
        conditions=(),
        options=LikelihoodOptions(**options),
        levels=levels,
        mesh=one(),
    )
    return evaluator({}, [batch(x)])


def test_what_was_learned_comes_to_the_host_in_float64():
    keep, betas = on_device(learned_keep(4)), on_device(learned_betas(4))
    for process, part in (
        (Binomial(keep), "keep"),
        (Gaussian(betas, "large"), "schedule"),
        (LearnedGaussian(on_device(learned(units=4))), "schedule"),
    ):
        found = on_host(process)
        assert type(found) is type(process)
        assert getattr(found, "variance", None) == getattr(process, "variance", None)
        pairs = zip(*(jax.tree.leaves(getattr(p, part)) for p in (found, process)), strict=True)
        for leaf, before in pairs:
            assert isinstance(leaf, np.ndarray)
            assert leaf.dtype == np.float64
            np.testing.assert_array_equal(leaf, before)
    fixed = Gaussian(schedules.cosine())
    assert on_host(fixed) is fixed


def zero(x, t):
    return jnp.zeros_like(x)


def test_a_learned_schedule_has_the_steps_that_it_learned():
    bits, keep = np.random.default_rng(0).integers(0, 2, (600, 3)), learned_keep(4)

    def fair(x, t):
        """p(x0 = 1 | x_t) of fair bits."""
        return 0.5 + expand(keep(t), x) * (x - 0.5)

    cases = [(Binomial(on_device(keep)), bits, fair)]
    cases.append((Gaussian(on_device(learned_betas(4))), bits - 0.5, zero))
    for process, x, denoise in cases:
        own, given = (
            evaluate(process, x, denoise, method="discrete", **steps)
            for steps in ({}, {"steps": 4})
        )
        assert own == given
        with pytest.raises(ConfigError, match=r"^steps=8: the schedule has learned 4 steps, and"):
            evaluate(process, x, denoise, method="discrete", steps=8)
    found = evaluate(*cases[0], method="discrete").bits
    assert abs(found.value - 3.0) < 3 * found.standard_error < 0.3
    with pytest.raises(ConfigError, match=r"^steps=None: learned variances belong to the steps"):
        evaluate(LearnedGaussian(schedules.cosine()), bits, zero, method="discrete")


def test_pixels_of_learned_betas_are_decoded_where_the_first_step_ends():
    """The zero denoiser makes the bound a sum of known numbers."""
    betas, x = learned_betas(4, first=1e-4), np.full((2, 3), 2.0)
    process = Gaussian(on_device(betas))
    found = evaluate(process, x, zero, levels=3, method="discrete")
    snr = (betas.alpha(TIMES[:-1]) / betas.sigma(TIMES[:-1])) ** 2
    steps = 0.5 * 4.0 * (snr[-1] - snr[0]) / np.log(2)
    np.testing.assert_allclose(found.terms["steps"].value, steps, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"^first_time=0.1: the first of the learned steps"):
        evaluate(process, x, zero, levels=3, method="discrete", first_time=0.1)


@pytest.mark.parametrize("method", ["continuous", "flow"])
def test_processes_of_tokens_have_steps_alone(method):
    with pytest.raises(ConfigError, match=f"^method='{method}': this process is not Gaussian"):
        evaluate(Masked(5), np.zeros((2, 3)), zero, method=method)


def test_a_flow_cannot_begin_or_end_just_anywhere():
    process = Gaussian(schedules.cosine())
    words = r"^first_time=0.9999: 'flow' takes equal steps in logsnr below t=0.99\d*; expected an"
    with pytest.raises(ConfigError, match=words):
        evaluate(process, np.zeros((2, 3)), zero, method="flow", first_time=0.9999)
    with pytest.raises(ConfigError, match=r"^steps=1: with alpha\(1\) = 0 .* at least 2"):
        evaluate(process, np.zeros((2, 3)), zero, method="flow", steps=1)


def test_values_that_are_not_finite_are_counted_and_refused():
    def denoise(x, t):
        return jnp.where(jnp.arange(5)[:, None] < 2, jnp.nan, zero(x, t))

    process, x = Gaussian(schedules.cosine()), np.zeros((5, 3))
    with pytest.raises(ConfigError, match=r"^method='continuous': 2 of 5 examples have a") as error:
        evaluate(process, x, denoise)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"2 of 5 .* rtol, atol above 1e-05, 1e-05, solver='rk4'"):
        evaluate(process, x, denoise, method="flow", solver="dopri5")


def test_many_values_of_a_pixel_are_found_among_rounded_ones():
    ends, count = (-1.0, 1.0), 65536
    x = np.linspace(*ends, count).astype(np.float32)
    check_grid(np.asarray(off_grid(jnp.asarray(x), count, ends, ())), count, count)
    for bad, levels in ((x[:-1] + 0.25 / count, count), (np.array([0.1, np.nan]), 21)):
        with pytest.raises(ConfigError, match=rf"levels={levels} .given.: some pixels lie between"):
            check_grid(np.asarray(off_grid(jnp.asarray(bad), levels, ends, ())), levels, levels)


def test_the_floor_knows_how_often_a_sequence_is_there_and_when_there_are_too_many_states():
    rng, process = np.random.default_rng(0), Binomial()
    assert floor_bits(rng.integers(0, 2, (20, 30)), process, TIMES) is None
    pair = np.array([[1, 1, 0, 0.0], [0, 0, 1, 1]])
    repeated = pair[[0, 0, 0, 1]]
    bound = likelihood.factorised_bound(repeated, process, TIMES) / np.log(2)
    entropy = 2.0 - 0.75 * np.log2(3.0)
    np.testing.assert_allclose(floor_bits(repeated, process, TIMES), bound - entropy, rtol=1e-9)
    assert floor_bits(pair, process, TIMES) > bound - entropy + 0.01


@pytest.mark.parametrize("width", [0.5, 3.0])
def test_the_upper_bound_of_the_reverse_entropy_holds_for_wide_data_too(width):
    schedule, x = schedules.linear_beta(), np.random.default_rng(0).normal(0.0, width, (4000, 3))

    def denoise(x, t):
        a, b = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return a * width**2 * x / (a**2 * width**2 + b**2)

    evaluator = BoundEvaluator(
        denoiser=lambda params, conditioning: denoise,
        process_of=lambda params: Gaussian(schedule),
        times=time_grids.uniform(8),
        seed=0,
        mesh=one(),
    )
    found = evaluator({}, [batch(x[:3000]), batch(x[1000:])])
    times = evaluator.times[:-1]
    a, b = schedule.alpha(times), schedule.sigma(times)
    total = a**2 * width**2 + b**2
    cross = a[:-1] / a[1:] * total[1:]
    true = 0.5 * np.log2(2 * np.pi * np.e * (total[1:] - cross**2 / total[:-1])).sum() * 3
    assert found["reverse_entropy_lower_bits"] < true < found["reverse_entropy_upper_bits"]
    assert "bound_bits_per_dim_stderr" not in found
