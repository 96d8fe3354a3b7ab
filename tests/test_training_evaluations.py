"""Scores at intervals of a training, the best checkpoint, and machines that are wanted back."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from toys import one_device, tiny

import diffusion_jax
from diffusion_jax import api, best_checkpoint, workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError, Preempted
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.collected import TooFewFinite
from diffusion_jax.training_evaluations import OURS, TrainingEvaluation


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


def config(**changes):
    made = tiny(steps=8, data__points__size=64, data__points__held_out=32, **changes)
    made.checkpoint.update(every=4, keep_last=1)
    made.logging.every = 2
    made.optimizer.learning_rate = 1e-2
    made.evaluation.update(metrics="bpd", every=2, num=16, best="bpd")
    return made


def scored(folder):
    """(step, score, value) of every row of a training."""
    rows = [row for row in report.read(folder) if row.get(OURS)]
    return [(row["step"], row["score"], row["value"]) for row in rows]


def state_of(folder):
    run = api.Run.build(workdir.read_config(folder), folder)
    with run.checkpoints as checkpoints:
        return checkpoints.restore(run.compiled.abstract_state)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    diffusion_jax.train(config(), folder)
    return folder


def test_scores_at_intervals(whole):
    found = [(step, value) for step, score, value in scored(whole) if score == "bits/dim"]
    assert [step for step, _ in found] == [2, 4, 6, 8]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    written = {r["step"]: r["eval/bits/dim"] for r in rows if "eval/bits/dim" in r}
    assert written == dict(found)
    best = best_checkpoint.read(whole)
    assert best is not None
    assert (best["step"], best["value"]) == min(found, key=lambda pair: pair[1])
    # The same that `evaluate` finds afterwards.
    again = api.evaluate(whole, ["bpd"], num=16, loading={"checkpoint": "best"})
    assert again[0]["step"] == best["step"]
    np.testing.assert_allclose(again[0]["value"], best["value"], rtol=1e-5)
    assert OURS not in again[0]


@pytest.mark.parametrize("polls", [2, 6])
def test_preempted_anywhere_ends_the_same(whole, tmp_path, monkeypatch, polls):
    """Wherever the machine is wanted back, in an evaluation too, nothing is lost or doubled."""
    asked = [0]

    def reached(step):
        asked[0] += 1
        assert step == asked[0], "questions are counted one by one"
        return step == polls

    with monkeypatch.context() as patch:
        patch.setattr("diffusion_jax.parallel.distributed.reached_preemption", reached)
        with pytest.raises(Preempted, match=r"saved step \d+"):
            diffusion_jax.train(config(), tmp_path / "run")
    assert asked[0] == polls
    before = scored(tmp_path / "run")
    assert before == scored(whole)[: len(before)]
    diffusion_jax.train(config(), tmp_path / "run")
    assert scored(tmp_path / "run") == scored(whole)
    assert best_checkpoint.read(tmp_path / "run") == best_checkpoint.read(whole)
    for ours, theirs in zip(
        jax.tree.leaves(state_of(tmp_path / "run")), jax.tree.leaves(state_of(whole)), strict=True
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_the_last_evaluation_is_made_up_for(tmp_path, monkeypatch):
    """Also where the training itself has no step left."""
    late = config()
    late.evaluation.every = 0
    with monkeypatch.context() as patch:
        # Seven steps ask; the eighth is the last, and its evaluation asks.
        patch.setattr(
            "diffusion_jax.parallel.distributed.reached_preemption",
            lambda step: step == 8,
        )
        with pytest.raises(Preempted, match="saved step 8"):
            diffusion_jax.train(late, tmp_path)
    assert not scored(tmp_path)
    diffusion_jax.train(late, tmp_path)
    assert [row[0] for row in scored(tmp_path) if row[1] == "bits/dim"] == [8]
    lines = (tmp_path / "eval.jsonl").read_text()
    diffusion_jax.train(late, tmp_path)
    assert (tmp_path / "eval.jsonl").read_text() == lines


def test_rows_past_the_state_are_written_again(whole, tmp_path):
    """A kill after an evaluation, before the next save: the run repeats it, once."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    steps = Checkpointer(folder / "checkpoints", read_only=True).steps()
    assert 8 in steps
    assert len(steps) > 1, "the best is another than the newest, or was kept on the way"
    shutil.rmtree(folder / "checkpoints" / "8")
    diffusion_jax.train(config(), folder)
    assert scored(folder) == scored(whole)


class Faked:
    """Stands in for an evaluation: the scores of a list, by step."""

    names = ("fd",)

    def __init__(self, values, name="FD-self", **circumstances):
        self.values, self.name, self.circumstances = values, name, circumstances

    def rows(self, pipeline, num, folder, under, options, watch):
        value = self.values[under.step]
        if isinstance(value, Exception):
            raise value
        row = {"score": self.name, "metric": "fd", "value": value}
        # Fewer than were asked for: there are no more, or some were not finite.
        more = {"standard_error": 0.1, "n": num // 2, "step": under.step, "ema": "", "remark": ""}
        own = {**row, **more, "reference": "", **self.circumstances, **under.more}
        return [own, {**own, "score": "part of it", "value": -100.0}]


def evaluation(folder, values, name="FD-self", **circumstances):
    kept = []
    made = TrainingEvaluation(
        build=lambda: Faked(values, name, **circumstances),
        pipeline=lambda state: None,
        folder=folder,
        ema="default",
        every=1,
        num=50,
        seed=0,
        best="fd",
        keep=kept.append,
    )
    return made, kept


def best_steps(folder, values, name="FD-self"):
    made, kept = evaluation(folder, values, name)
    made.start(0, [])
    found = [made.run(None, step, lambda: False).best for step in values]
    assert [step for step, best in zip(values, found, strict=True) if best] == kept
    return kept


def test_best(tmp_path):
    nan = float("nan")
    values = {1: 5.0, 2: nan, 3: 4.0, 4: 4.0, 5: 4.5, 6: float("inf"), 7: 3.0}
    assert best_steps(tmp_path, values) == [1, 3, 7]
    assert best_checkpoint.read(tmp_path)["step"] == 7
    # A run that goes on from 6 knows the best of what is kept.
    made, kept = evaluation(tmp_path, {7: 3.9})
    made.start(6, [3, 6])
    assert kept == [3]
    assert best_checkpoint.read(tmp_path)["step"] == 3
    assert list(dict.fromkeys(row["step"] for row in report.read(tmp_path))) == [1, 2, 3, 4, 5, 6]
    assert made.run(None, 7, lambda: False).best
    assert kept == [3, 7]


@pytest.mark.parametrize(
    "change",
    [{"weights_hash": "other"}, {"reference_hash": "other"}, {"sampling": "x"}, {"name": "FID"}],
)
def test_best_begins_anew_where_scores_cannot_be_compared(tmp_path, change):
    assert best_steps(tmp_path, {1: 5.0, 2: 4.0}) == [1, 2]
    made, kept = evaluation(tmp_path, {3: 9.0, 4: 8.0, 5: 8.5}, **change)
    made.start(2, [1, 2])
    assert kept == [1, 2]
    found = [made.run(None, step, lambda: False).best for step in (3, 4, 5)]
    assert found == [True, True, False]
    assert best_checkpoint.read(tmp_path)["step"] == 4


def test_samples_that_cannot_be_judged_do_not_end_a_training(tmp_path):
    said = []
    values = {1: 5.0, 2: TooFewFinite("3 of 50 samples are finite: fd needs 20"), 3: 4.0}
    made, kept = evaluation(tmp_path, values)
    made.note = said.append
    made.start(0, [])
    found = [made.run(None, step, lambda: False) for step in values]
    assert [one.best for one in found] == [True, False, True]
    assert found[1].scalars == {}
    (row,) = (row for row in report.read(tmp_path) if row["step"] == 2)
    assert (row["score"], row["value"]) == ("fd", "nan")
    assert row["remark"].startswith("3 of 50 samples")
    assert said == ["Warning: step 2 has no scores: 3 of 50 samples are finite: fd needs 20"]
    assert not made.owed(2, 100), "not tried again at each start"
    made, kept = evaluation(tmp_path, {4: 4.5})
    made.start(3, [1, 3])
    assert kept == [1, 3]


def test_best_of_what_is_better_when_larger(tmp_path):
    assert best_steps(tmp_path, {1: 0.2, 2: 0.1, 3: 0.3}, "precision-self") == [1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "fdd"}, r"config\.evaluation\.metrics='fdd'.*fd"),
        ({"metrics": "bpd", "best": "kid"}, r"config\.evaluation\.best='kid'.*bpd"),
        ({"metrics": "", "best": "bpd"}, r"config\.evaluation\.best='bpd': metrics=''"),
        (
            {"metrics": "fd", "num": 20},
            r"config\.evaluation\.metrics=fd: the data are points.*expected bpd",
        ),
        ({"metrics": "fd", "num": 10}, r"config\.evaluation\.num=10: fd needs at least 20 samples"),
        ({"metrics": "fid"}, r"config\.evaluation\.metrics=fid: FID is that of the Inception"),
        ({"reference": "tran"}, r"config\.evaluation\.reference='tran'.*train"),
        ({"num": 0}, r"config\.evaluation\.num=0: expected at least 1"),
        ({"metrics": ""}, r"config\.evaluation\.every=2: metrics=''"),
        ({"metrics": "fd", "features": "clip:/none"}, r"config\.evaluation\.features='clip:/none'"),
    ],
)
def test_refused_before_anything_is_compiled(tmp_path, changes, message):
    made = config()
    made.evaluation.update(best="")
    made.evaluation.update(changes)
    with pytest.raises(ConfigError, match=message):
        api.Run.build(made, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (3, r"checkpoint=3: step 3 was not kept; there are .*8"),
        ("last", r"checkpoint='last': expected a step, best or newest"),
    ],
)
def test_no_such_checkpoint(whole, asked, message):
    with pytest.raises(ConfigError, match=message):
        diffusion_jax.load(whole, checkpoint=asked)


def test_checkpoint_by_step(whole):
    newest = diffusion_jax.load(whole).sample(4).x
    np.testing.assert_array_equal(diffusion_jax.load(whole, checkpoint="8").sample(4).x, newest)
    steps = Checkpointer(whole / "checkpoints", read_only=True).steps()
    other = diffusion_jax.load(whole, checkpoint=steps[0]).sample(4).x
    assert (steps[0] == 8) == np.array_equal(other, newest)
    with pytest.raises(ConfigError, match=r"checkpoint=8, ema_length=0\.1: expected one of them"):
        diffusion_jax.load(whole, checkpoint=8, ema_length=0.1)
