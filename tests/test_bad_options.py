"""Mistakes in the fields of own data, text, networks, optimisation: one line each, uncompiled.

Built through `Run.build`, in this process: a case costs a tenth of a second.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import api
from diffusion_jax import config as configs
from diffusion_jax.errors import ConfigError, DataError

D, N, O = "data__image_folder__", "network__", "optimizer__"  # noqa: E741
T = "objective__denoising__"


def small(**changes):
    """A DiT of one block on digits; `a__b=v` sets `config.a.b`, new names too."""
    config = configs.base()
    config.data.name, config.network.name = "digits", "dit"
    for name in ("dit", "uvit"):
        config.network[name].update({"dim": 16, "heads": 2, "depth": 1, "expansion": 1})
    config.network.mlp.update({"width": 8, "depth": 1})
    config.text.bytes.update({"dim": 16, "depth": 1, "heads": 2})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 4, 8, 1
    config.sampling.update({"num": 8, "steps": 1})
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        with section.unlocked():
            section[key] = value
    return config


def points(**changes):
    return small(data__name="points", network__name="mlp", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two classes with captions and a number each."""
    root = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(40):
        name = f"{'ab'[number % 2]}/{number}.png"
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 6 * number, np.uint8)).save(root / name)
        lines.append(json.dumps({"file_name": name, "text": f"grey {number}", "size": number}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def own(folder, **changes):
    return small(**{"data__name": "image_folder", "data__path": str(folder), **changes})


def assert_one_line(config, tmp_path, words, kind=ConfigError):
    with pytest.raises(kind) as error:
        api.Run.build(config, tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    if kind is ConfigError:
        assert message.startswith("config.")
    for word in words:
        assert word in message


GROUPS = "parameter_groups__"
MUON = {f"{O}name": "muon"}
LOSS = {f"{T}adaptive__name": "loss"}
MLP = {f"{T}uncertainty__name": "mlp"}
OF_POINTS = [
    ({**MUON, f"{O}muon__beta": 1.0}, ["optimizer.muon.beta=1.0", "[0, 1)"]),
    ({**MUON, f"{O}muon__newton_schulz_steps": 0}, ["newton_schulz_steps=0", "at least 1"]),
    ({**MUON, f"{O}muon__rms": 0.0}, ["optimizer.muon.rms=0.0", "above 0"]),
    ({**MUON, f"{O}muon__b2": 1.5}, ["optimizer.muon.b2=1.5", "[0, 1)"]),
    ({**MUON, f"{O}muon__eps": 0.0}, ["optimizer.muon.eps=0.0", "above 0"]),
    ({**MUON, f"{O}muon__weight_decay": -1.0}, ["muon.weight_decay=-1.0", "at least 0"]),
    ({f"{O}name": "mion"}, ["optimizer.name='mion'", "did you mean 'muon'?"]),
    ({f"{O}adaptive_clip": -1.0}, ["optimizer.adaptive_clip=-1.0", "at least 0"]),
    ({f"{O}cooldown_steps": 2}, ["optimizer.cooldown_steps=2", "'cosine'", "set 0"]),
    (
        {f"{O}cooldown_steps": 4, f"{O}schedule": "constant"},
        ["optimizer.cooldown_steps=4", "0..3"],
    ),
    ({f"{O}reference_steps": -1}, ["optimizer.reference_steps=-1", "at least 0"]),
    ({f"{O}schedule": "inverse"}, ["optimizer.schedule='inverse'", "'inverse_sqrt'"]),
    ({f"{O}precision": "bf16"}, ["optimizer.precision='bf16'", "masters, stochastic"]),
    ({"ema__powers__long": 0.5}, ["ema.powers.long: sigma_rel=0.5", "(0, 0.2886]"]),
    ({"ema__powers__long": "x"}, ["ema.powers.long='x'", "a number"]),
    ({"ema__powers__default": 0.1}, ["ema.powers.default", "ema.decays", "rename one"]),
    (
        {"ema__powers__long": 0.1, "sampling__ema": "lon"},
        ["sampling.ema='lon'", "did you mean 'long'?", "default, long", "''"],
    ),
    ({**LOSS, f"{T}adaptive__loss__cells": 0}, ["denoising.adaptive.loss.cells=0", "at least 1"]),
    ({**LOSS, f"{T}adaptive__loss__decay": 1.0}, ["adaptive.loss.decay=1.0", "[0, 1)"]),
    ({**LOSS, f"{T}adaptive__loss__floor": 0.0}, ["adaptive.loss.floor=0.0", "(0, 1]"]),
    ({**LOSS, f"{T}adaptive__loss__prior": 0.0}, ["adaptive.loss.prior=0.0", "above 0"]),
    ({f"{T}adaptive__name": "lss"}, ["denoising.adaptive.name='lss'", "'loss'"]),
    ({**MLP, f"{T}uncertainty__mlp__channels": 0}, ["mlp.channels=0", "at least 1"]),
    ({f"{T}text_dropout": 1.5}, ["denoising.text_dropout=1.5", "between 0 and 1"]),
    ({f"{T}scalar_dropout": -0.1}, ["denoising.scalar_dropout=-0.1", "between 0 and 1"]),
    (
        {f"{GROUPS}g": {"pattern": "haed", "rate": 1.0}},
        ["parameter_groups.g.pattern='haed' matches no parameter", "such as"],
    ),
    (
        {
            f"{GROUPS}f": {"pattern": "kernel", "rate": 1.0},
            f"{GROUPS}g": {"pattern": "head/kernel", "rate": 1.0},
        },
        ["parameter_groups.g.pattern='head/kernel'", "not in a group before it"],
    ),
    (
        {f"{GROUPS}g": {"pattern": "head", "rat": 1.0}},
        ["parameter_groups.g field='rat'", "did you mean 'rate'?", "decay, pattern, rate"],
    ),
    ({f"{GROUPS}g": {"pattern": 3, "rate": 1.0}}, ["groups.g.pattern=3", "a text"]),
    ({f"{GROUPS}g": {"pattern": "head", "rate": "x"}}, ["groups.g.rate='x'", "a number"]),
    ({f"{GROUPS}g": {"pattern": "head", "decay": -1.0}}, ["g.decay=-1.0", "at least 0"]),
    ({f"{GROUPS}g": {"pattern": "(", "rate": 1.0}}, ["g.pattern='('", "no regular expression"]),
    ({f"{GROUPS}g": {"pattern": "head"}}, ["parameter_groups.g=", "rate or decay or both"]),
    ({f"{GROUPS}g": {"rate": 1.0}}, ["parameter_groups.g=", "expected pattern"]),
    ({f"{GROUPS}g": 1e-4}, ["parameter_groups.g=0.0001", "expected a section, such as {"]),
]


@pytest.mark.parametrize(("changes", "words"), OF_POINTS, ids=lambda v: ",".join(v))
def test_optimisation(changes, words, tmp_path):
    assert_one_line(points(**changes), tmp_path, words)


DIT, UVIT, UNET = f"{N}dit__", {f"{N}name": "uvit"}, {f"{N}name": "unet"}
OF_NETWORKS = [
    (
        {**UNET, f"{N}unet__heads": 8},
        ["network.unet.heads=8", "decides their number", "head_dim=0"],
    ),
    (
        {**UNET, f"{N}unet__resample_projection": True},
        ["network.unet.resample_projection=True", "resample='block'"],
    ),
    (
        {**UNET, f"{N}unet__preset": "ADM-64", f"{N}unet__channels": 32},
        ["network.unet.channels=32", "'ADM-64' has 192", "preset=''"],
    ),
    ({f"{DIT}preset": "DiT-M/2"}, ["network.dit.preset='DiT-M'", "DiT-S"]),
    ({f"{DIT}preset": "DiT-S"}, ["network.dit.preset='DiT-S'", "'DiT-S/2'"]),
    ({f"{DIT}patch": 3}, ["network.dit.patch=3", "nearest: 2"]),
    ({f"{DIT}dim": 0}, ["network.dit.dim=0", "at least 1"]),
    ({f"{DIT}heads": 3}, ["network.dit.heads=3", "does not divide", "nearest: 2"]),
    ({f"{DIT}depth": 0}, ["network.dit.depth=0", "at least 1"]),
    ({f"{DIT}expansion": 0}, ["network.dit.expansion=0", "at least 1"]),
    ({f"{DIT}positions": "rop"}, ["network.dit.positions='rop'", "'rope'"]),
    ({f"{DIT}mlp": "swiglo"}, ["network.dit.mlp='swiglo'", "'swiglu'"]),
    ({f"{DIT}text_by": "x"}, ["network.dit.text_by='x'", "cross, in_context"]),
    ({f"{DIT}registers": -1}, ["network.dit.registers=-1", "0 (none) or more"]),
    ({f"{DIT}bottleneck": -1}, ["network.dit.bottleneck=-1", "0 (none) or more"]),
    ({f"{DIT}features_after": 2}, ["network.dit.features_after=2", "to 1 blocks"]),
    ({f"{DIT}remat": "all"}, ["network.dit.remat='all'", "dots, full, none"]),
    ({f"{DIT}attention": "flash"}, ["network.dit.attention='flash'", "auto, cudnn, xla"]),
    # That of the perturbed network, which is not for training.
    ({f"{DIT}attention": "identity"}, ["network.dit.attention='identity'", "auto, cudnn, xla"]),
    ({f"{DIT}dropout": 1.0}, ["network.dit.dropout=1.0", "[0, 1)"]),
    ({**UVIT, f"{N}uvit__depth": 2}, ["network.uvit.depth=2", "nearest: 3"]),
    ({**UVIT, f"{N}uvit__patch": 3}, ["network.uvit.patch=3", "nearest: 2"]),
    ({**UVIT, f"{N}uvit__preset": "U-ViT-X/2"}, ["network.uvit.preset='U-ViT-X'", "U-ViT-S"]),
    ({"text__name": "bytes"}, ["text.name='bytes'", "no captions", "'none'"]),
    ({"text__name": "byte"}, ["text.name='byte'", "did you mean 'bytes'?"]),
]


@pytest.mark.parametrize(("changes", "words"), OF_NETWORKS, ids=lambda v: ",".join(v))
def test_networks(changes, words, tmp_path):
    assert_one_line(small(**changes), tmp_path, words)


TEXT = {"text__name": "bytes"}
OF_PICTURES = [
    ({f"{D}image_size": 0}, ["data.image_folder.image_size=0", "at least 1"]),
    ({f"{D}channels": 2}, ["data.image_folder.channels=2", "1, 3 or 4"]),
    ({f"{D}crop": "middle"}, ["data.image_folder.crop='middle'", "center, random"]),
    ({f"{D}background": "whit"}, ["background='whit'", "'white' or '#808080'"]),
    ({f"{D}text_length": 0}, ["data.image_folder.text_length=0", "at least 1"]),
    ({f"{D}scalars": ("size", "size")}, ["scalars=('size', 'size')", "twice"]),
    ({f"{D}scalars": (1,)}, ["data.image_folder.scalars=(1,)", "names"]),
    ({f"{D}validation_share": 1.0}, ["validation_share=1.0", "between 0 and 1"]),
    ({f"{D}max_unreadable": -1}, ["max_unreadable=-1", "at least 0"]),
    ({f"{D}memory": -1}, ["data.image_folder.memory=-1", "at least 0"]),
    ({f"{D}workers": 0}, ["data.image_folder.workers=0", "at least 1"]),
    ({f"{D}labels": "folder"}, ["labels='folder'", "did you mean 'folders'?"]),
    ({f"{D}captions": "file"}, ["captions='file'", "did you mean 'files'?"]),
    ({"data__path": ""}, ["data.path is not set", "--config.data.path=DIR"]),
    ({"data__name": "webdataset", "data__webdataset__channels": 2}, ["webdataset.channels=2"]),
    ({"data__name": "parquet", "data__parquet__crop": "x"}, ["data.parquet.crop='x'"]),
    ({**TEXT, "text__bytes__depth": 0}, ["text.bytes.depth=0", "at least 1"]),
    ({**TEXT, "text__bytes__dim": 0}, ["text.bytes.dim=0", "at least 1"]),
    ({**TEXT, "text__bytes__heads": 3}, ["config.text.bytes.heads=3", "nearest: 2"]),
    (
        {**TEXT, f"{T}text_dropout": 0.0, "sampling__guidance": 2.0},
        ["sampling.guidance=2.0", "text_dropout=0", "expected 1"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), OF_PICTURES, ids=lambda v: ",".join(v))
def test_own_data_and_captions(changes, words, folder, tmp_path):
    assert_one_line(own(folder, **changes), tmp_path, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{D}text_column": "txt"}, ["metadata.jsonl", "no 'txt'", "did you mean 'text'?"]),
        ({f"{D}scalars": ("siz",)}, ["metadata.jsonl", "no 'siz'", "did you mean 'size'?"]),
        ({"data__path": "/nowhere"}, ["/nowhere does not exist", "--config.data.path=DIR"]),
    ],
)
def test_data_that_are_not_there(changes, words, folder, tmp_path):
    assert_one_line(own(folder, **changes), tmp_path, words, DataError)


@pytest.mark.parametrize("name", ["dit", "uvit", "unet", "mlp"])
def test_every_network_takes_labels_captions_and_numbers(name, folder, tmp_path):
    config = own(folder, network__name=name, **{f"{D}labels": "folders"}, **TEXT)
    config.data.image_folder.scalars = ("size",)
    config.network.unet.update({"channels": 32, "multipliers": (1,), "head_dim": 32})
    run = api.Run.build(config, tmp_path / "run")
    run.checkpoints.close()
    run.held.release()
    assert run.model.conditions == ("label", "text", "scalar")
