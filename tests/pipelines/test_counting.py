"""What a sample costs, against the evaluations that each method's definition has."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from toys import one_device

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.diffusion import processes, schedules, time_grids
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines import guiding
from diffusion_jax.pipelines.counting import network_evaluations
from diffusion_jax.pipelines.options import SamplingOptions
from diffusion_jax.pipelines.pixel import PixelPipeline

SCHEDULE = schedules.cosine()


def never(params, conditioning):
    def denoise(x, t):
        raise AssertionError("the network itself was asked")

    return as_denoiser(denoise, SCHEDULE)


def pipeline(**changes):
    parts = {
        "params": {"w": jnp.zeros(3)},
        "denoiser": never,
        "process": processes.Gaussian(schedule=SCHEDULE),
        "schedule": SCHEDULE,
        "spec": DataSpec(shape=(4, 4, 1), kind="image", num_classes=3),
        "conditions": ("label",),
        "times": lambda steps: time_grids.uniform(steps),
        "mesh": make_mesh(),
        "defaults": SamplingOptions.of(solver="ddim", steps=4),
        "weak": guiding.Weak(params={}, denoiser=never, conditions=("label",)),
        "perturbed": never,
    }
    return PixelPipeline(**{**parts, **changes})


# Evaluations of n = 5 steps to data: a step to sigma = 0 is an Euler step, of one evaluation.
COUNTS = {
    "ddim": 5,
    "ddpm": 5,
    "euler": 5,
    "ancestral": 5,
    "dpmpp_2m": 5,
    "dpmpp_3m": 5,
    "deis": 5,
    "lms": 5,
    "heun": 2 * 5 - 1,
    "midpoint": 2 * 5 - 1,
    "kdpm2": 2 * 5 - 1,
    "rk4": 4 * 5 - 3,
}


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    pass


@pytest.mark.parametrize("solver", COUNTS)
def test_solvers_cost_what_their_definition_says(solver):
    assert network_evaluations(pipeline(), solver=solver, steps=5) == COUNTS[solver]


def test_more_steps_cost_as_much_more():
    for steps in (1, 9):
        assert network_evaluations(pipeline(), solver="heun", steps=steps) == 2 * steps - 1


@pytest.mark.parametrize(
    ("options", "branches"),
    [
        ({"guidance": 2.0}, 2),
        ({"guidance": 0.0}, 2),
        ({"guidance": 2.0, "guidance_by": "apg"}, 2),
        ({"guidance": 2.0, "guidance_by": "autoguidance"}, 2),
        ({"guidance_by": "perturbed_attention"}, 2),
        ({"guidance": 2.0, "guidance_by": "perturbed_attention"}, 3),
    ],
)
def test_every_branch_of_guidance_counts(options, branches):
    found = network_evaluations(pipeline(), solver="heun", steps=4, **options)
    assert found == 7 * branches


def test_steps_outside_the_interval_are_not_guided():
    """Of the times 1, 0.75, 0.5, 0.25 those from 0.4 to 0.8 are."""
    interval = {"guidance": 2.0, "guidance_interval": (0.4, 0.8)}
    times = np.asarray(time_grids.uniform(4))[:-1]
    assert ((times >= 0.4) & (times <= 0.8)).sum() == 2
    assert network_evaluations(pipeline(), solver="ddim", steps=4, **interval) == 4 + 2


def test_a_learned_variance_is_given_to_its_solver():
    learned = processes.LearnedGaussian(schedule=SCHEDULE)
    assert network_evaluations(pipeline(process=learned), solver="ddpm", steps=3) == 3
    assert network_evaluations(pipeline(process=learned), solver="ancestral", steps=3) == 3


def test_an_adaptive_solver_is_counted_as_it_runs():
    assert network_evaluations(pipeline(), solver="dopri5", steps=1) > 6


def test_mistakes_are_those_of_sampling():
    with one_device(), pytest.raises(ConfigError, match="solver='dim' is unknown"):
        network_evaluations(pipeline(), solver="dim")


def test_negative_and_further_conditions_are_counted():
    plain = network_evaluations(pipeline(), steps=4, guidance=2.0)
    assert plain == 2 * 4
    # The negative one stands in the place of the unconditional one.
    assert network_evaluations(pipeline(), steps=4, guidance=2.0, negative=True) == plain
    # Given, unconditional and each further one.
    assert network_evaluations(pipeline(), steps=4, also=1) == 3 * 4
    assert network_evaluations(pipeline(), steps=4, guidance=2.0, also=2) == 4 * 4
