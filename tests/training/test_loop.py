"""The loop with a real step of a small objective: what is logged, saved, called, and when."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import data
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.spec import DataSpec
from diffusion_jax.errors import Aborted, Preempted
from diffusion_jax.objectives.base import Aux, Objective, masked_mean
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.loop import Hook, Loop, LoopOptions
from diffusion_jax.training.progress import Progress
from diffusion_jax.training.state import position
from diffusion_jax.training.step import Trainer
from diffusion_jax.training.validation import Validator
from diffusion_jax.training.writers import Writer

BATCH = 4


def objective(params, batch, key, context):
    """Mean of |x - w|^2 with noise on x."""
    noise = jax.vmap(jax.random.normal)(key)
    error = jnp.sum((batch["x"] + 0.1 * noise[:, None] - params["w"]) ** 2, axis=-1)
    loss, total, count = masked_mean(error, batch.get("mask"))
    return loss, Aux({"error": (total, count)}, context.extra, error)


class Recorder(Writer):
    """Keeps what it is given."""

    def __init__(self):
        self.rows = []

    def scalars(self, step, values):
        self.rows.append((step, dict(values)))


def source(bad=()):
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    x[list(bad)] = np.nan
    spec = DataSpec(shape=(3,), kind="points")
    return ArraySource(spec=spec, x=x, example_ids=np.arange(500, 540), labels=None)


class Bench:
    """A loop put together, with a record of everything it did."""

    def __init__(self, steps=10, examples=None, hooks=(), stop_at=None, **options):
        self.mesh = make_mesh(devices=jax.devices()[:1])
        trainer = Trainer(
            objective=Objective(function=objective),
            init_params=lambda key: {"w": jnp.zeros(3)},
            optimizer=optax.sgd(0.05),
            learning_rate=lambda count: 0.05,
            ema_decays={"default": 0.9, "long": 0.99},
        )
        self.trainer = trainer
        compiled = CompiledTrainer(trainer, self.mesh)
        self.examples = examples or source()
        loader = data.Loader(source=self.examples, batch_size=BATCH, seed=0)
        first = {k: v for k, v in loader.batch(0).items() if k != "id"}
        batch = compiled.abstract_batch(first, BATCH)
        self.state = compiled.init()
        self.batches = data.Prefetcher(
            loader.batch, 0, BATCH, transfer=lambda b: global_batch(b, self.mesh)
        )
        self.writer, self.saved, self.stream = Recorder(), [], io.StringIO()
        self.rows_at_save = []
        self.loop = Loop(
            options=LoopOptions(
                steps=steps,
                batch_size=BATCH,
                **{"log_every": 4, "save_every": 100, "guard_limit": 2, **options},
            ),
            step=compiled.lower(batch, {}).compile(),
            frozen={},
            batches=self.batches,
            ids=loader.ids,
            metric_names=compiled.metric_names(batch, {}),
            save=self.save,
            should_stop=lambda step: step == stop_at,
            hooks=hooks,
            writer=self.writer,
            progress=Progress(steps, 0, stream=self.stream),
            workdir="",
        )

    def save(self, state, step):
        self.saved.append((step, int(state.step), position(state.examples)))
        self.rows_at_save.append(len(self.writer.rows))

    def run(self):
        try:
            return self.loop.run(self.state)
        finally:
            self.batches.close()


def test_rows_hold_the_means_since_the_last():
    every, each = Bench(log_every=4), Bench(log_every=1)
    every.run()
    each.run()
    assert [step for step, _ in every.writer.rows] == [4, 8, 10]
    assert [step for step, _ in each.writer.rows] == list(range(1, 11))
    single = [row["train/loss"] for _, row in each.writer.rows]
    expected = [np.mean(single[0:4]), np.mean(single[4:8]), np.mean(single[8:10])]
    got = [row["train/loss"] for _, row in every.writer.rows]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    row = every.writer.rows[0][1]
    assert row["train/error"] == pytest.approx(row["train/loss"])
    assert row["train/learning_rate"] == pytest.approx(0.05)
    assert row["train/skipped"] == 0
    assert row["train/images_per_second"] == pytest.approx(BATCH * row["train/steps_per_second"])
    assert 0 <= row["train/data_wait_share"] <= 1
    assert "step 10/10 loss" in every.stream.getvalue()


def test_hooks_run_when_due_with_the_state_of_that_step():
    calls = []

    def hook(name, every):
        def run(state, step):
            calls.append((name, step, int(state.step)))
            return {f"{name}/value": 1.0} if name == "a" else {}

        return Hook(name=name, every=every, run=run)

    bench = Bench(hooks=[hook("a", 4), hook("b", 0)])
    bench.run()
    assert calls == [("a", 4, 4), ("a", 8, 8), ("a", 10, 10), ("b", 10, 10)]
    assert [step for step, row in bench.writer.rows if "a/value" in row] == [4, 8, 10]


def test_a_checkpoint_n_holds_n_updates():
    bench = Bench(save_every=3)
    state = bench.run()
    assert [step for step, *_ in bench.saved] == [3, 6, 9, 10]
    for step, updates, examples in bench.saved:
        assert updates == step
        assert examples == step * BATCH
    assert int(state.step) == 10


def test_preemption_saves_and_leaves():
    bench = Bench(stop_at=5, save_every=3)
    with pytest.raises(Preempted, match="saved step 5"):
        bench.run()
    assert bench.saved == [(3, 3, 12), (5, 5, 20)]


def test_preemption_at_a_logged_step_writes_no_second_row():
    bench = Bench(stop_at=4, log_every=4, save_every=100)
    with pytest.raises(Preempted, match="saved step 4"):
        bench.run()
    assert [step for step, _ in bench.writer.rows] == [4]
    assert bench.writer.rows[0][1]["train/images_per_second"] > 0
    assert bench.saved == [(4, 4, 16)]


def test_all_that_is_known_is_written_before_a_save():
    """What lies between a log line and a checkpoint would be lost to a run that starts from it."""
    bench = Bench(stop_at=5, save_every=3)
    with pytest.raises(Preempted):
        bench.run()
    assert [step for step, _ in bench.writer.rows] == [3, 4, 5]
    assert bench.rows_at_save == [1, 3]


@pytest.mark.parametrize(
    ("at", "start", "expected"),
    [
        (4, 0, "start 4, stop 6"),
        (4, 4, "start 5, stop 6"),
        (4, 6, ""),
        (9, 0, "start 9, stop 10"),
        (0, 0, ""),
    ],
)
def test_a_profile_covers_what_is_left_of_its_window(monkeypatch, at, start, expected):
    """A run resumed inside the window traces the rest; one that ends inside it keeps the trace."""
    bench = Bench(profile_at=at, profile_steps=3)
    events = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda where: events.append(f"start {bench.at + 1}")
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(f"stop {bench.at}"))
    inner = bench.loop.step
    bench.at = start

    def counted(*arguments):
        bench.at += 1
        return inner(*arguments)

    bench.loop.step = counted
    bench.state = dataclasses.replace(bench.state, step=bench.state.step + start)
    bench.run()
    assert ", ".join(events) == expected
    passed = "config.logging.profile_at=4: steps 4..6 lie before the resumed step 6; no profile"
    assert (passed in bench.stream.getvalue()) == (start == 6)


def test_a_skipped_step_is_named_and_the_run_goes_on():
    loader = data.Loader(source=source(), batch_size=BATCH, seed=0)
    bad = int(loader.ids(2 * BATCH)[1])
    bench = Bench(examples=source(bad=[bad - 500]), log_every=1, steps=8)
    state = bench.run()
    notes = [line for line in bench.stream.getvalue().splitlines() if "skipped" in line]
    assert notes == [f"step 3 skipped: non-finite update; non-finite examples: id {bad}"]
    rows = dict(bench.writer.rows)
    assert rows[3]["train/skipped"] == 1
    assert "train/loss" not in rows[3]
    assert np.isfinite(rows[4]["train/loss"])
    assert int(state.opt_state["guard"]["skipped"]) == 1
    assert np.isfinite(state.params["w"]).all()


def test_too_many_skipped_steps_abort_and_name_their_examples():
    bench = Bench(examples=source(bad=range(40)), steps=50, guard_limit=2, log_every=50)
    with pytest.raises(Aborted, match="3 steps in a row were not finite") as error:
        bench.run()
    assert error.value.exit_code == 70
    notes = [line for line in bench.stream.getvalue().splitlines() if "skipped" in line]
    loader = data.Loader(source=source(), batch_size=BATCH, seed=0)
    for number, line in enumerate(notes[:3]):
        ids = ", ".join(map(str, loader.ids(number * BATCH)))
        assert line == (
            f"step {number + 1} skipped: non-finite update; non-finite examples: id {ids}"
        )
    assert len(notes) == 3
    assert "config.guard.limit=2" in str(error.value)


def test_a_row_of_skips_is_not_forgotten_for_a_good_step_read_with_it():
    loader = data.Loader(source=source(), batch_size=BATCH, seed=0)
    bad = np.concatenate([loader.ids(n * BATCH) for n in range(1, 4)]) - 500
    bench = Bench(examples=source(bad=bad), steps=10, guard_limit=2, log_every=5)
    with pytest.raises(Aborted, match="3 steps in a row"):
        bench.run()


def test_a_row_of_skips_before_a_restart_counts():
    bench = Bench(examples=source(bad=range(40)), steps=50, guard_limit=5)
    with pytest.raises(Aborted):
        bench.run()
    again = Bench(examples=source(bad=range(40)), steps=50, guard_limit=5)
    guard = {"skipped": jnp.int32(4), "consecutive": jnp.int32(4)}
    again.state.opt_state["guard"].update(guard)
    with pytest.raises(Aborted, match="6 steps in a row"):
        again.run()
    assert again.stream.getvalue().count("skipped:") == 2


def test_validation_is_the_same_twice_and_changes_nothing():
    bench = Bench(steps=6)
    state = bench.run()
    held_out = source()

    def batches():
        return [
            global_batch(batch, bench.mesh)
            for batch in data.sequential_batches(held_out, 16, limit=38)
        ]

    validator = Validator(trainer=bench.trainer, batches=batches, count=38, mesh=bench.mesh)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    first, second = validator(state, {}), validator(state, {})
    assert first == second
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] == before
    assert set(first) == {"val/error", "val/error_ema", "val/error_ema_long"}
    # Padding does not count: the noise has mean 0 and variance .01 in each of 3 dimensions.
    for suffix, weights in (("", state.params), ("_ema_long", state.ema["long"])):
        clean = np.sum((held_out.x[:38] - np.asarray(weights["w"])) ** 2, axis=-1).mean()
        assert first[f"val/error{suffix}"] == pytest.approx(clean + 0.03, abs=0.15)
    assert first["val/error"] != first["val/error_ema_long"]


def test_training_validation_and_start_share_no_noise():
    bench = Bench(steps=1)
    bench.batches.close()
    keys = [bench.trainer.key(stream) for stream in (0, 1, 2)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3
