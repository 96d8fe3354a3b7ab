"""Which noise levels held-out examples are judged at, together and one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.objectives.base import Aux, Objective, masked_mean
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import Trainer
from diffusion_jax.training.validation import Validator, cells


@pytest.mark.parametrize("count", [1, 2, 5, 38, 397, 1000, 10_000, 65_536])
def test_every_example_has_a_cell_of_its_own(count):
    size = min(256, count)
    found = np.concatenate([cells(first, size, count) for first in range(0, count, size)])[:count]
    np.testing.assert_array_equal(np.sort(found), (np.arange(count) / count).astype(np.float32))


def test_cells_do_not_follow_the_order_of_the_examples():
    found = cells(0, 1000, 1000)
    apart = np.abs(np.diff(found))
    assert ((apart > 0.35) & (apart < 0.65)).all()
    # Any tenth of the set covers all levels.
    for part in found.reshape(10, 100):
        assert np.histogram(part, 10, (0.0, 1.0))[0].tolist() == pytest.approx([10] * 10, abs=4)


def squares(params, batch, key, context):
    """A metric of all, one of some, and what all examples should have alone."""
    values = params * batch["x"] ** 2 + context.stratum + jax.vmap(jax.random.uniform)(key)
    mask = batch["mask"]
    some = masked_mean(values, mask & (batch["x"] > 3))[1:]
    return jnp.sum(values), Aux({"loss": masked_mean(values, mask)[1:], "some": some}, {}, values)


def test_examples_alone_are_those_of_the_means():
    x = np.arange(1.0, 9.0, dtype=np.float32)
    mask, wild = np.arange(8) < 6, np.where(np.arange(8) < 6, x, np.nan)

    def batches():
        for start in (0, 4):
            rows = slice(start, start + 4)
            yield global_batch({"x": wild[rows], "mask": mask[rows]}, mesh)

    mesh = make_mesh(devices=jax.devices()[:2])
    trainer = Trainer(
        objective=Objective(function=squares),
        init_params=lambda key: jnp.ones(()),
        optimizer=optax.sgd(0.1),
    )
    validator = Validator(trainer=trainer, batches=batches, count=6, mesh=mesh)
    state = TrainState(jnp.int32(0), None, jnp.float32(100.0), None, {}, {})
    found = validator.examples(state.params, state, {})
    values, counts = found["loss"].T
    np.testing.assert_array_equal(counts, np.ones(6))
    # Times 100 the squares stand out; what is left is the cell and a number below 1.
    rest = values - 100.0 * x[:6] ** 2 - np.concatenate([cells(0, 4, 6), cells(4, 2, 6)])
    assert ((rest > 0.0) & (rest < 1.0)).all()
    assert len(np.unique(rest.round(3))) == 6
    np.testing.assert_array_equal(found["some"][:, 1], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(found["some"][3:], found["loss"][3:])
    whole = validator(state, {})
    assert whole["val/loss"] == pytest.approx(values.mean())
    assert whole["val/some"] == pytest.approx(values[3:].mean())
