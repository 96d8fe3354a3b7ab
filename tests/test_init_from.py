"""Runs that start from the weights of another: what is taken, and that it is said."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffusion_jax import api, data, transfer, workdir
from diffusion_jax import config as configs
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.base import network_params

pytestmark = pytest.mark.usefixtures("quick_programs")


class Pictures:
    """Random pictures of any shape and classes."""

    def __init__(self, **spec):
        self.spec = DataSpec(kind="image", **spec)

    def __len__(self):
        return 64

    def ids(self, indices):
        return np.asarray(indices, np.int64)

    def fetch(self, indices, positions=None):
        n, conditioning = len(indices), {}
        if self.spec.num_classes:
            conditioning["label"] = np.asarray(indices, np.int32) % self.spec.num_classes
        if self.spec.text_length:
            conditioning["text"] = np.ones((n, self.spec.text_length), np.int32)
        x = np.zeros((n, *self.spec.shape), np.float32)
        return {"x": x, "conditioning": conditioning, "id": self.ids(indices)}


def named(*names: str) -> dict:
    return {"num_classes": len(names), "classes": names}


def small(network="uvit", **changes):
    """A transformer of one block; `a__b=v` sets `config.a.b`."""
    config = configs.base()
    config.data.name, config.network.name = "digits", network
    for name in ("dit", "uvit"):
        config.network[name].update({"dim": 16, "heads": 2, "depth": 1, "patch": 4, "expansion": 1})
    config.network.unet.update({"channels": 32, "multipliers": (1,), "blocks": 1, "head_dim": 32})
    config.network.edm2.update({"channels": 16, "multipliers": (1,), "blocks": 1, "head_dim": 16})
    config.network.edm2.attention_resolutions = ()
    config.text.bytes.update({"dim": 16, "depth": 1, "heads": 2})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 4, 8, 1
    config.sampling.update({"num": 8, "steps": 1})
    config.mesh.fsdp_min_size = 64
    return toys.changed(config, **changes)


def build(config, folder: Path, monkeypatch, **spec) -> api.Run:
    """The run of these data, not started; free for another."""
    if spec:
        monkeypatch.setattr(data, "load", lambda *args, **options: Pictures(**spec))
    run = api.Run.build(config, folder)
    monkeypatch.undo()
    run.checkpoints.close()
    run.held.release()
    return run


def save(run: api.Run, state) -> Path:
    run._saves.save(state, int(state.step))
    run._saves.close()
    spec = run.model.spec
    workdir.write_config(
        run.path, run.config, spec, len(run.train_data), run.train_ids, run.frozen.hashes
    )
    return run.path


def blank(run: api.Run):
    """A state of zeros, where only names and shapes count: an initial one is compiled first."""

    def zeros(leaf):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree.map(zeros, run.compiled.abstract_state)


RGB = {"shape": (8, 8, 3), **named("cat", "dog", "owl")}


def flat(state) -> dict:
    return {k: np.asarray(v) for k, v in transfer.paths(network_params(state.params)).items()}


def test_a_path_is_the_same_in_a_state_and_in_its_file():
    tree = {"a": {"b": np.zeros(2)}, "c": [np.zeros(1)]}
    assert list(transfer.paths(tree)) == ["a/b", "c/0"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A U-ViT of three classes of RGB, saved after "three updates", its average unlike its
    weights: (folder, the average by path)."""
    monkeypatch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("first") / "run"
    run = build(small(mesh__data=2, mesh__fsdp=4), folder, monkeypatch, **RGB)
    state = run.compiled.init()
    average = jax.tree.map(lambda a: a + 0.5, state.ema["default"])
    state = dataclasses.replace(state, step=state.step + 3, ema={"default": average})
    save(run, state)
    return folder, {k: np.asarray(v) for k, v in transfer.paths(average).items()}


def planned(first, tmp_path, monkeypatch, spec, **changes) -> transfer.Beginning:
    """The start from `first` of a run of these data; nothing is read yet."""
    config = small(init_from=str(first[0]), **changes)
    return build(config, tmp_path / "run", monkeypatch, **spec).begin


def test_the_same_data_take_everything(first, tmp_path, monkeypatch, capsys):
    """From another mesh, into bfloat16 with masters; averages, moments and step begin afresh."""
    state = planned(first, tmp_path, monkeypatch, RGB, optimizer__precision="masters")()
    count = len(first[1])
    assert capsys.readouterr().out.splitlines() == [
        f"starts from {first[0]}, step 3, average 'default'",
        f"taken: {count} of {count} parameters, 100.0% of the values",
    ]
    masters = transfer.paths(state.opt_state["masters"])
    averages = transfer.paths(state.ema["default"])
    for path, value in flat(state).items():
        np.testing.assert_array_equal(masters[path], first[1][path])
        np.testing.assert_array_equal(averages[path], first[1][path])
        np.testing.assert_allclose(value.astype(np.float32), first[1][path], rtol=0.01)
    assert int(state.step) == 0
    assert not np.any(state.examples)
    optimizer = jax.tree.leaves(state.opt_state["optimizer"])
    assert not any(np.any(np.asarray(leaf)) for leaf in optimizer)


def test_new_classes_size_channels_and_captions_at_once(first, tmp_path, monkeypatch, capsys):
    classes = named("ant", "owl", "bee", "cat")
    spec = {"shape": (16, 8, 4), "text_length": 6, **classes}
    config = small(init_from=str(first[0]), text__name="bytes")
    run = build(config, tmp_path / "run", monkeypatch, **spec)
    start, old = run.begin, first[1]
    new, initial = flat(start()), run.compiled.initial_params()
    fresh = {path: np.asarray(value) for path, value in transfer.paths(initial).items()}
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(start.report)
    assert lines[2:4] == [
        "resized: positions (2x2 -> 4x2)",
        "in part: label/table (2 of 4 classes have a row, by name)",
    ]
    assert "stem/kernel ((48, 16) -> (64, 16))" in ", ".join(
        f"{path} ({why})" for path, why in start.found.fresh.items()
    )
    assert start.found.fresh["smooth/kernel"] == "(3, 3, 3, 3) -> (3, 3, 4, 4)"
    assert start.found.fresh["text/null"] == "new"
    assert "head/kernel" in lines[5]
    assert lines[5].startswith("dropped: ")
    table = new.pop("label/table")
    np.testing.assert_array_equal(table[[1, 3]], old["label/table"][[2, 0]])
    np.testing.assert_array_equal(table[[0, 2]], fresh["label/table"][[0, 2]])
    new.pop("positions")
    assert {"middle/blocks/attention/qkv/kernel", "label/null"} <= set(start.found.taken)
    for path, value in new.items():
        source = old if path in start.found.taken else fresh
        np.testing.assert_array_equal(value, source[path])


def test_learned_positions_are_interpolated_and_that_of_the_noise_level_kept(
    first, tmp_path, monkeypatch
):
    start = planned(first, tmp_path, monkeypatch, {"shape": (16, 8, 3)})
    assert list(start.report[2:]) == [
        "resized: positions (2x2 -> 4x2)",
        "dropped: label/null, label/table",
    ]
    old = first[1]["positions"]
    new = start.found.changed["positions"].apply(old, jnp.zeros((1 + 8, 16)))
    np.testing.assert_array_equal(new[0], old[0])
    above, below = old[2:4], old[4:6]  # rows of the 2 x 2 grid, behind noise and label
    expected = [above, 0.75 * above + 0.25 * below, 0.25 * above + 0.75 * below, below]
    np.testing.assert_allclose(new[1:].reshape(4, 2, 16), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (named("ant", "bee", "fly"), "label/table (other classes)"),
        ({"num_classes": 5}, "label/table ((3, 16) -> (5, 16))"),
    ],
)
def test_other_classes(classes, reason, first, tmp_path, monkeypatch):
    start = planned(first, tmp_path, monkeypatch, {"shape": (8, 8, 3), **classes})
    assert list(start.report[2:]) == [f"fresh: {reason}", "dropped: label/table"]
    assert "label/null" in start.found.taken


@pytest.mark.parametrize(
    ("names", "rows"), [(("owl", "cow"), {0: 2, 2: 3}), (("ant", "bee"), {2: 3})]
)
def test_a_null_that_ends_the_table_of_classes_stays_the_null(names, rows, tmp_path, monkeypatch):
    """EDM2 has no `label/null`: its null is the row behind those of the classes."""
    run = build(small("edm2"), tmp_path / "old", monkeypatch, **RGB)
    save(run, blank(run))
    config = small("edm2", init_from=str(run.path))
    again = build(config, tmp_path / "new", monkeypatch, shape=(8, 8, 3), **named(*names))
    shared = len(rows) - 1
    path = "condition/label/table"
    assert again.begin.report[2] == (
        f"in part: {path} ({shared} of 2 classes have a row, by name; so has no class)"
    )
    old = jnp.arange(1.0, 5.0)[:, None]
    new = again.begin.found.changed[path].apply(old, jnp.zeros((3, 1)))
    expected = [[old[rows[i], 0] if i in rows else 0.0] for i in range(3)]
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("network", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_fixed_positions_and_convolutions_lose_nothing(network, tmp_path, monkeypatch):
    run = build(small(network), tmp_path / "old", monkeypatch, **RGB)
    folder = save(run, blank(run))
    config = small(network, init_from=str(folder), network__unet__attention_resolutions=(16,))
    again = build(config, tmp_path / "new", monkeypatch, **{**RGB, "shape": (16, 16, 3)})
    assert len(again.begin.report) == 2
    assert "100.0%" in again.begin.report[1]


def test_a_folder_is_needed_for_the_first_start_alone(first, tmp_path, monkeypatch, capsys):
    source = Path(shutil.copytree(first[0], tmp_path / "source"))
    config = small(init_from=str(source))
    run = build(config, tmp_path / "run", monkeypatch, **RGB)
    save(run, blank(run))
    shutil.rmtree(source)
    run = build(config, tmp_path / "run", monkeypatch, **RGB)
    assert run.begin is None
    assert "is left" not in capsys.readouterr().out
    for other in ("", "/nowhere"):
        config.init_from = other
        run = build(config, tmp_path / "run", monkeypatch, **RGB)
        assert run.begin is None
        assert run.config.init_from == str(source)
        said = f"config.init_from={other!r} is left: {tmp_path}/run began from {source}\n"
        assert said in capsys.readouterr().out


def test_the_door_of_the_run_makes_the_state_from_it(first, tmp_path, monkeypatch, capsys):
    config = small(init_from=str(first[0]))
    run = build(config, tmp_path / "run", monkeypatch, **RGB)
    monkeypatch.setattr(api.Run, "_train_from", lambda self, state, step: state)
    run.held = None
    state = run.train()
    assert f"starts from {first[0]}, step 3" in capsys.readouterr().out
    np.testing.assert_array_equal(flat(state)["positions"], first[1]["positions"])


def test_mistakes(first, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    bare = Path(shutil.copytree(first[0], tmp_path / "bare"))
    shutil.rmtree(bare / "checkpoints" / "3")
    itself = Path(shutil.copytree(first[0], tmp_path / "itself"))
    shutil.rmtree(itself / "checkpoints" / "3")
    start = f"config.init_from={first[0]}: "
    cases = [
        (small(init_from="/nowhere"), "run", "config.init_from=/nowhere: no such folder"),
        (small(init_from=str(tmp_path / "empty")), "run", "empty is no workdir"),
        (small(init_from=str(bare)), "run", "holds no checkpoint"),
        (small(init_from=str(itself)), "itself", "is the workdir itself"),
        (small("dit", init_from=str(first[0])), "run", f"{start}its network is 'uvit', this one"),
        (small(init_from=str(first[0]), network__uvit__scan=False), "run", "kept with scan=True"),
        (small(init_from="gs://bucket/run"), "run", "object stores are not supported"),
    ]
    for config, folder, words in cases:
        with pytest.raises(ConfigError) as error:
            build(config, tmp_path / folder, monkeypatch, **RGB)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert "config." in str(error.value)
    config = small(init_from=str(first[0]), network__uvit__dim=8)
    with pytest.raises(ConfigError, match=f"{start}none of its {len(first[1])} parameters fits"):
        build(config, tmp_path / "run", monkeypatch, shape=(8, 8, 4))
