"""Which settings of the sampler are best: all combinations, their table and their picture."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pytest
from PIL import Image
from toys import one_device

import diffusion_jax
from diffusion_jax import config as configs
from diffusion_jax import judged, start, sweeps
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import self_trained
from diffusion_jax.feature_networks import feature_network
from diffusion_jax.pipelines.pixel import PixelPipeline


def digits():
    config = configs.base()
    config.data.name = "digits"
    config.network.name = "dit"
    config.network.dit.update(patch=4, dim=16, depth=1, heads=2)
    config.optimizer.warmup_steps = 0
    config.steps, config.batch_size = 4, 32
    config.logging.update(every=2, tensorboard=False)
    config.validation.examples = 32
    config.sampling.update(solver="ddim", steps=3, num=4, batch_size=4)
    with config.unlocked():
        config.ema.powers = {"short": 0.1, "long": 0.25}
    config.checkpoint.every = config.checkpoint.keep_every = 2
    return config


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _short(monkeypatch, cache):
    """A short training of the feature network, kept apart from the user's own."""
    monkeypatch.setattr(self_trained, "STEPS", 20)
    monkeypatch.setattr(start, "default_cache", lambda: cache / "diffusion_jax" / "xla")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "run"
    diffusion_jax.train(digits(), folder)
    return folder


def lines_of(run):
    path = run / "eval.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_combination_once(run, monkeypatch):
    drawn, stream = [], PixelPipeline.stream

    def counted(self, num, **options):
        batches = stream(self, num, **options)
        return (
            drawn.append(options) or batch if first else batch for first, batch in _firsts(batches)
        )

    monkeypatch.setattr(PixelPipeline, "stream", counted)
    said = []
    axes = {"solver": ["ddim", "heun"], "steps": [2, 3]}
    metrics = ["kid", "precision_recall"]
    common = {"num": 20, "batch_size": 20, "prompts": [], "labels": None}
    rows = sweeps.sweep(run, axes, metrics, note=said.append, **common)
    assert len(drawn) == 4  # one set of samples for all metrics of a combination
    assert len(rows) == 4 * 3
    first = [row for row in rows if row["score"] == "KID-self"]
    found = {(row["solver"], row["steps"]): row["evaluations"] for row in first}
    # Two evaluations a step of heun, but for the last.
    assert found == {("ddim", 2): 2, ("ddim", 3): 3, ("heun", 2): 3, ("heun", 3): 5}
    assert {row["ema"] for row in rows} == {"default"}
    assert said.count("batch_size=20, solver='ddim', steps=2") == 1
    assert not any("prompts" in line or "labels" in line for line in said)
    assert [r["value"] for r in lines_of(run)[-12:]] == [r["value"] for r in rows]
    marked = [row for row in first if row["remark"].endswith("best at its cost")]
    costs = np.array([[row["evaluations"], row["value"]] for row in first])
    for row in first:
        cost, value = costs.T
        cheaper, lower = cost < row["evaluations"], value < row["value"]
        better = lower & (cost <= row["evaluations"]) | cheaper & (value <= row["value"])
        assert (row in marked) == (not better.any())
    assert sweeps.best(rows)["value"] == costs[:, 1].min()
    table = (run / "evaluation" / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    with Image.open(run / "evaluation" / "sweep.png") as picture:
        assert picture.width > 560


def _firsts(batches):
    for number, batch in enumerate(batches):
        yield number == 0, batch


def test_averages_and_lengths_made_afterwards(run):
    raw = sweeps.sweep(run, {"ema": ["", "long"]}, num=20, batch_size=20)
    assert [row["ema"] for row in raw] == ["", "long"]
    made = sweeps.sweep(run, {"ema_length": [0.25, 0.15], "steps": [3]}, num=20, batch_size=20)
    assert [row["ema"] for row in made] == ["length 0.25", "length 0.15"]
    values = [row["value"] for row in (*raw, *made)]
    assert values[1] == pytest.approx(values[2], rel=1e-6)
    assert len({f"{value:.9g}" for value in values}) == 3


def test_a_combination_that_diverges_is_named_and_left_out(run, monkeypatch):
    rows = judged.Judged.rows

    def diverging(self, pipeline, num, folder, under, options, note):
        if options["steps"] == 2:
            none = judged.Collected(num)
            none.add(np.zeros((num, 8, 8, 1), np.uint8), dict, None, np.zeros(num, bool))
            none.features()
        return rows(self, pipeline, num, folder, under, options, note)

    monkeypatch.setattr(judged.Judged, "rows", diverging)
    before = len(lines_of(run))
    found = sweeps.sweep(run, {"steps": [1, 2, 3]}, num=20, batch_size=20)
    assert [row["steps"] for row in found] == [1, 3]
    assert len(lines_of(run)) == before + 2
    said = "Left out: batch_size=20, steps=2: none of 20 samples is finite"
    assert said in (run / "evaluation" / "sweep.md").read_text()
    with pytest.raises(ConfigError, match="sweep: no combination is left; batch_size=20, steps=2"):
        sweeps.sweep(run, {"steps": [2]}, num=20, batch_size=20)


def test_a_combination_with_too_few_numbers_is_left_out(run, monkeypatch):
    stream = PixelPipeline.stream

    def partly(self, num, **options):
        for samples in stream(self, num, **options):
            finite = np.arange(len(samples)) % 7 > 0 if options["steps"] == 2 else None
            yield dataclasses.replace(samples, finite=finite)

    monkeypatch.setattr(PixelPipeline, "stream", partly)
    found = sweeps.sweep(run, {"steps": [2, 3]}, num=20, batch_size=20)
    assert [row["steps"] for row in found] == [3]
    said = "Left out: batch_size=20, steps=2: 17 of 20 samples are finite: fd needs at least 20"
    assert said in (run / "evaluation" / "sweep.md").read_text()


def test_the_front_of_points():
    nan = float("nan")
    costs = [1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0]
    values = [9.0, 5.0, 6.0, 5.0, 1.0, 1.0, nan]
    assert sweeps.front(costs, values, high=False) == [True, True, False, False, True, True, False]
    assert sweeps.front(costs, values, high=True) == [True] + [False] * 6
    assert sweeps.front([1.0, 1.0], [nan, 2.0], high=True) == [False, True]
    assert sweeps.front([], [], high=True) == []


def test_the_best_row():
    nan = float("nan")
    low = [{"score": "FD-self", "value": value} for value in (nan, 2.0, 1.0, 3.0)]
    assert sweeps.best([*low, {"score": "KID-self", "value": 0.0}])["value"] == 1.0
    high = [{"score": "recall-self", "value": value} for value in (0.1, nan, 0.4, 0.2)]
    assert sweeps.best(high)["value"] == 0.4
    assert sweeps.best(low[:1]) is low[0]


@pytest.mark.parametrize(
    ("axes", "more", "words"),
    [
        ({"solvr": ["ddim"]}, {}, "sweep='solvr' is unknown .did you mean 'solver'"),
        ({}, {}, "sweep: nothing to sweep"),
        ({"steps": []}, {}, "sweep: steps has no values; expected some, such as steps=1|2"),
        ({"steps": [2, 2]}, {}, "sweep: steps=2 is there twice"),
        ({"steps": [2, 3]}, {"steps": 4}, "steps=4: the sweep has steps, too; leave one"),
        ({"ema": ["", "long"], "ema_length": [0.1]}, {}, "ema and ema_length both choose"),
        ({"steps": [2]}, {"metrics": ["bpd"]}, "metrics=bpd: the sampler has no part in it"),
        ({"steps": [2]}, {"num": 10}, "num=10: fd needs at least 20"),
        ({"steps": [2]}, {"metrics": ["sfid"]}, "sfid: 'spatial' are not among the features"),
        # What only the last combination has:
        ({"solver": ["ddim", "heunn"], "steps": [2, 3]}, {}, "solver='heunn' is unknown"),
        ({"steps": [2, 3, 0]}, {}, "steps=0: expected at least 1"),
        ({"guidance": [1.0, "x"]}, {}, "guidance='x': expected a finite number"),
        ({"ema": ["", "none"]}, {}, "ema='none' is unknown"),
        ({"ema_length": [0.15, 3.0]}, {}, r"ema_length=3\.0: expected a share of the run"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_sampled(run, monkeypatch, axes, more, words):
    def never(*arguments, **options):
        raise AssertionError("a combination was sampled")

    monkeypatch.setattr(judged.Judged, "rows", never)
    before = lines_of(run)
    with pytest.raises(ConfigError, match=words) as raised:
        inspect.unwrap(sweeps.sweep)(run, axes, **more)
    assert "\n" not in str(raised.value)
    assert lines_of(run) == before


def test_the_command_line(run, cache, start_door):
    # What the door would learn for a minute is there already.
    config = digits()
    kept = cache / "diffusion_jax" / "evaluation"
    training = diffusion_jax.builders.source(config, "train")
    feature_network("self", config, training, kept, lambda text: None)
    flags = [f"--workdir={run}", "--num=20", "--batch_size=20"]
    doors = [
        start_door("evaluate", *flags, f"--sweep={sweep}", *more, XDG_CACHE_HOME=cache)
        for sweep, more in (
            ("solver=ddim|heun,steps=2|3", ["--ema=long"]),
            ("solver=ddim|heunn,steps=2|3", []),
            ("steps=2,steps=3", []),
            ("steps=2|3", ["--bpd_options=method=flow"]),
            ("steps=2|3", ["--steps=2"]),
        )
    ]
    results = [door.wait(120) for door in doors]
    code, out, err = results[0]
    assert code == 0, err
    lines = [line for line in out.splitlines() if "FD-self" in line]
    assert len(lines) == 5
    for cost, line in zip((2, 3, 3, 5), lines, strict=False):
        assert f"with {cost} evaluations, ema='long', solver=" in line
    assert lines[-1].startswith("best: ")
    assert "learns" not in out
    for (code, _, err), words in zip(
        results[1:],
        (
            "solver='heunn' is unknown (did you mean 'heun'?)",
            "--sweep='steps=2,steps=3': steps is given twice",
            "--bpd_options: bits do not depend on the sampler",
            "steps=2: the sweep has steps, too",
        ),
        strict=True,
    ):
        assert code == 78
        assert err.startswith(f"ConfigError: {words}")
        assert err.count("\n") == 1
