"""Every mistake of a user ends in one line that names it, before anything is compiled."""

from __future__ import annotations

import jax
import pytest
from ml_collections import ConfigDict
from toys import tiny

import diffusion_jax
from diffusion_jax import api, builders
from diffusion_jax.errors import ConfigError, DataError


def unet(**changes):
    return tiny(data__name="digits", network__name="unet", **changes)


def dit(**changes):
    small = {"network__dit__dim": 16, "network__dit__heads": 2, "network__dit__depth": 1}
    return tiny(data__name="digits", network__name="dit", **small, **changes)


def bits(**changes):
    binomial = {"process__name": "binomial", "network__noise_input": "t"}
    fixed = {"objective__name": "variational", "sampling__solver": "ancestral", **binomial}
    return tiny(data__name="heartbeat", **fixed, **changes)


def without(*paths: str) -> ConfigDict:
    """A config of another making, which lacks some fields."""
    values = tiny().to_dict()
    for path in paths:
        *parents, key = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        del section[key]
    return ConfigDict(values)


@pytest.fixture
def no_compiling(monkeypatch):
    """Fails a test that would start to compile a program of ours."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


MISTAKES = {
    "component": (
        lambda: tiny(network__name="mpl"),
        ["config.network.name='mpl'", "did you mean 'mlp'?", "mlp, multiscale, unet, uvit"],
    ),
    "schedule": (
        lambda: tiny(process__gaussian__schedule__name="cosin"),
        ["config.process.gaussian.schedule.name='cosin'", "'cosine'"],
    ),
    "weighting": (
        lambda: tiny(objective__denoising__weighting__name="snrr"),
        ["config.objective.denoising.weighting.name='snrr'", "'snr'"],
    ),
    "prediction": (
        lambda: tiny(process__gaussian__prediction="epss"),
        ["config.process.gaussian.prediction='epss'", "'eps'"],
    ),
    "prediction of no x0": (
        lambda: tiny(
            process__gaussian__prediction="eps",
            process__gaussian__schedule__name="rectified_flow",
        ),
        ["config.process.gaussian.prediction='eps'", "use 'v'"],
    ),
    "noise input": (
        lambda: tiny(network__noise_input="logsn"),
        ["config.network.noise_input='logsn'", "'logsnr'"],
    ),
    "solver": (
        lambda: tiny(sampling__solver="dpmpp"),
        ["config.sampling.solver='dpmpp'", "dpmpp_2m"],
    ),
    "solver option": (
        lambda: tiny(sampling__solver="ddim", sampling__ddim__eta=5.0),
        ["eta=5.0", "from 0"],
    ),
    "guidance": (
        lambda: tiny(sampling__guidance=2.0),
        ["config.sampling.guidance=2.0", "unconditional"],
    ),
    "guidance of a model that never drops its labels": (
        lambda: unet(sampling__guidance=2.0, objective__denoising__label_dropout=0.0),
        ["config.sampling.guidance=2.0", "label_dropout=0", "expected 1"],
    ),
    "time grid": (
        lambda: tiny(sampling__grid__name="karas"),
        ["config.sampling.grid.name='karas'", "did you mean 'karras'?"],
    ),
    "time grid of bits": (
        lambda: bits(sampling__grid__name="karas"),
        ["config.sampling.grid.name='karas'", "did you mean 'karras'?"],
    ),
    "noise levels of bits": (
        lambda: bits(sampling__grid__name="karras"),
        ["config.sampling.grid.name='karras'", "'binomial'", "expected 'uniform'"],
    ),
    "shifted times of bits": (
        lambda: bits(sampling__grid__name="shifted"),
        ["config.sampling.grid.name='shifted'", "'binomial'", "expected 'uniform'"],
    ),
    "threshold": (
        lambda: tiny(sampling__threshold="dynamc"),
        ["config.sampling.threshold='dynamc'", "did you mean 'dynamic'?"],
    ),
    "threshold of points": (
        lambda: tiny(sampling__threshold="dynamic"),
        ["config.sampling.threshold='dynamic'", "points", "expected 'auto' or 'none'"],
    ),
    "threshold of bits": (
        lambda: bits(sampling__threshold="static"),
        ["config.sampling.threshold='static'", "bits", "expected 'auto' or 'none'"],
    ),
    "batch and mesh": (
        lambda: tiny(batch_size=12),
        ["config.batch_size=12", "8 batch shards", "nearest: 8 or 16"],
    ),
    "batch and accumulation": (
        lambda: tiny(batch_size=8, accumulation=3),
        ["config.batch_size=8", "config.accumulation=3", "6 and 9"],
    ),
    "validation batch": (
        lambda: tiny(validation__batch_size=12),
        ["config.validation.batch_size=12", "nearest: 8 or 16"],
    ),
    "mesh": (
        lambda: tiny(mesh__data=3),
        ["config.mesh.data=3", "device count 8", "nearest: mesh.data=8"],
    ),
    "mesh of two axes": (
        lambda: tiny(mesh__data=2, mesh__fsdp=2),
        ["mesh.data=2 x mesh.fsdp=2 = 4", "device count 8"],
    ),
    "image too small": (
        lambda: unet(network__unet__multipliers=(1, 2, 2, 2, 2)),
        ["config.network.unet.multipliers=(1, 2, 2, 2, 2)", "8x8 cannot be halved 4 times"],
    ),
    "patch": (
        lambda: dit(network__dit__patch=3),
        ["config.network.dit.patch=3", "8", "nearest: 2"],
    ),
    "points for a U-Net": (
        lambda: tiny(network__name="unet"),
        ["config.network.unet", "mlp"],
    ),
    "type in a tuple": (
        lambda: unet(network__unet__multipliers=("1", "a")),
        ["config.network.unet.multipliers=('1', 'a')", "expected numbers"],
    ),
    "steps": (lambda: tiny(steps=0), ["config.steps=0", "at least 1"]),
    "seed": (lambda: tiny(seed=-1), ["config.seed=-1", "at least 0"]),
    "large seed": (lambda: tiny(seed=2**32), ["config.seed=4294967296", "less than 2**32"]),
    "learning rate": (
        lambda: tiny(optimizer__learning_rate=float("nan")),
        ["config.optimizer.learning_rate=nan", "finite"],
    ),
    "warm-up": (
        lambda: tiny(optimizer__warmup_steps=10),
        ["config.optimizer.warmup_steps=10", "0..1"],
    ),
    "average": (
        lambda: tiny(sampling__ema="slow"),
        ["config.sampling.ema='slow'", "default"],
    ),
    "decay": (
        lambda: tiny(ema__decays__default=1.0),
        ["config.ema.decays.default=1.0", "< 1"],
    ),
    "bits under a Gaussian process": (
        lambda: tiny(data__name="heartbeat"),
        ["config.process.name='gaussian'", "'binomial'"],
    ),
    "attention kernel": (
        lambda: dit(network__dit__attention="cudnn"),
        ["config.network.dit.attention='cudnn'", "computes on cpu", "expected 'auto'"],
    ),
    "length of an interval": (
        lambda: unet(sampling__guidance_interval=(0.5,)),
        ["config.sampling.guidance_interval=(0.5,)", "0 <= low < high <= 1"],
    ),
    "guidance interval of an unconditional model": (
        lambda: tiny(sampling__guidance_interval=(0.2, 0.5)),
        ["config.sampling.guidance_interval=(0.2, 0.5)", "unconditional"],
    ),
    "percentile": (
        lambda: unet(sampling__threshold_percentile=1.5),
        ["config.sampling.threshold_percentile=1.5", "between 0 and 1"],
    ),
    "exponent of a grid": (
        lambda: tiny(sampling__grid__name="karras", sampling__grid__karras__rho=0.0),
        ["config.sampling.grid.karras.rho=0.0"],
    ),
    "exponent of a grid beyond floating point": (
        lambda: tiny(sampling__grid__name="karras", sampling__grid__karras__rho=1e-30),
        ["config.sampling.grid.karras.rho=1e-30"],
    ),
    "shift of a grid": (
        lambda: tiny(sampling__grid__name="shifted", sampling__grid__shifted__shift=-1.0),
        ["config.sampling.grid.shifted.shift=-1.0"],
    ),
    "option of another solver": (
        lambda: tiny(sampling__solver="heun", sampling__ddpm__variance="smal"),
        ["config.sampling.ddpm.variance='smal'", "small, large"],
    ),
    "width of the time sampling": (
        lambda: tiny(
            objective__denoising__time__name="log_normal",
            objective__denoising__time__log_normal__std=0.0,
        ),
        ["config.objective.denoising.time.log_normal.std=0.0", "above 0"],
    ),
    "profile after the end": (
        lambda: tiny(logging__profile_at=2),
        ["config.logging.profile_at=2", "at most config.steps=1"],
    ),
    "held-out points": (
        lambda: tiny(data__points__held_out=0),
        ["config.data.points.held_out=0", "at least 1"],
    ),
    "nothing where a number belongs": (
        lambda: tiny(optimizer__clip_norm=None),
        ["config.optimizer.clip_norm=None", "expected float, such as 1.0"],
    ),
    "fields that are missing": (
        lambda: without("guard", "logging__every"),
        ["config.guard.limit, config.logging.every: missing", "diffusion_jax.config.base()"],
    ),
    "many fields that are missing": (
        lambda: without("network"),
        ["config.network.dit.attention, ", " more: missing", "diffusion_jax.config.base()"],
    ),
    "a field that is unknown": (
        lambda: ConfigDict({**tiny().to_dict(), "stepz": 3}),
        ["config.stepz=3 is not a field", "did you mean config.steps?"],
    ),
    "a text in place of a section": (
        lambda: ConfigDict({**tiny().to_dict(), "network": "mlp"}),
        ["config.network='mlp'", "expected a section, with fields such as dit"],
    ),
    "a text in place of a number": (
        lambda: ConfigDict({**tiny().to_dict(), "steps": "3"}),
        ["config.steps='3'", "expected int, such as 1000"],
    ),
    "no config": (lambda: {"steps": 3}, ["config={'steps': 3}", "diffusion_jax.config.base()"]),
    "set of points": (
        lambda: tiny(data__points__distribution="swiss"),
        ["config.data.points.distribution='swiss'", "'swiss_roll'"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config(mistake, tmp_path, no_compiling):
    make, words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        diffusion_jax.train(make(), tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_tiny_config_itself_is_right(tmp_path):
    for number, config in enumerate(
        (tiny(), unet(network__unet__attention_resolutions=()), dit(), bits())
    ):
        api.Run.build(config, tmp_path / str(number)).checkpoints.close()


@pytest.mark.parametrize(
    ("make", "threshold", "expected"),
    [
        (unet, "auto", "static"),
        (unet, "none", "none"),
        (unet, "dynamic", "dynamic"),
        (tiny, "auto", "none"),
        (tiny, "none", "none"),
        (bits, "auto", "none"),
    ],
)
def test_thresholds(make, threshold, expected):
    config = make(sampling__threshold=threshold)
    built = builders.model(config, builders.source(config, "train").spec)
    assert builders.sampling_options(config, built).threshold == expected


def test_missing_data(tmp_path):
    config = tiny(data__name="tfds", data__data_dir=str(tmp_path / "nothing"))
    with pytest.raises(DataError) as error:
        diffusion_jax.train(config, tmp_path / "run")
    assert str(tmp_path / "nothing") in str(error.value)
    assert "\n" not in str(error.value)
