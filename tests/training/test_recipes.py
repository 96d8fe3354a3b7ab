"""All options of a recipe at once, through `Trainer.train_step`: in micro-batches, over eight
devices, and stopped and resumed, they come to the same."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.checkpoints import Checkpointer, describe_mismatch
from diffusion_jax.diffusion import schedules, time_sampling, weightings
from diffusion_jax.networks import functional
from diffusion_jax.networks.dit import DiT
from diffusion_jax.objectives.adaptive_time import AdaptiveTime
from diffusion_jax.objectives.alignment import Alignment
from diffusion_jax.objectives.base import Context, network_params
from diffusion_jax.objectives.denoising import Denoising
from diffusion_jax.objectives.uncertainty import Uncertainty
from diffusion_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.optimizer import adamw, muon, rate_groups, warmup_schedule
from diffusion_jax.training.precision import Precision
from diffusion_jax.training.step import Trainer

DIM, WIDTH, DEPTH, BATCH = 6, 16, 2, 16
FROZEN = {"alignment": {"kernel": jnp.linspace(-1, 1, DIM * 4).reshape(DIM, 4)}}


def init_params(key):
    keys = iter(jax.random.split(key, 4))

    def kernel(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    blocks = {"kernel": kernel(DEPTH, WIDTH, WIDTH), "bias": jnp.zeros((DEPTH, WIDTH))}
    return {
        "stem": {"kernel": kernel(DIM + 1, WIDTH)},
        "blocks": {"fc1": blocks},
        "head": {"kernel": kernel(WIDTH, DIM)},
    }


def apply(params, x, noise, conditioning, *, key=None, return_features=False):
    assert set(params) == {"stem", "blocks", "head"}
    inputs = jnp.concatenate([x, noise[:, None] / 20.0], axis=-1)
    h = inputs @ params["stem"]["kernel"].astype(jnp.float32)
    for block in range(DEPTH):
        layer = {k: v[block].astype(jnp.float32) for k, v in params["blocks"]["fc1"].items()}
        h = h + jax.nn.silu(h @ layer["kernel"] + layer["bias"])
        features = h if block == 0 else features
    output = h @ params["head"]["kernel"].astype(jnp.float32)
    return (output, features) if return_features else output


def sample_time(u, stratum, cells):
    return time_sampling.logit_normal(
        time_sampling.stratified(u, stratum, cells), schedules.cosine(), mean=0.0, std=1.0
    )


def make_objective(**options):
    return Denoising(
        **{
            "apply": apply,
            "noise_input": "logsnr",
            "schedule": schedules.cosine(),
            "prediction": "v",
            "sample_time": sample_time,
            "weight": functools.partial(weightings.weight, "uniform", "v"),
            **options,
        }
    )


EVERYTHING = {
    "adaptive": AdaptiveTime(cells=8, decay=0.9),
    "uncertainty": Uncertainty(channels=16),
    "alignment": Alignment(
        encode=lambda frozen, x: (x @ frozen["kernel"])[:, None],
        feature_dim=WIDTH,
        target_dim=4,
        hidden=8,
    ),
}


def make_trainer(optimizer=muon, precision="float32", accumulation=1, **options):
    rate = warmup_schedule("inverse_sqrt", 1e-2, steps=100, warmup_steps=2, cooldown_steps=10)
    groups = rate_groups({"head": {"pattern": "^head/", "rate": 1e-3, "decay": 0.1}}, rate)
    return Trainer(
        objective=make_objective(**(options or EVERYTHING)).objective(),
        init_params=init_params,
        optimizer=optimizer(rate, weight_decay=0.01, adaptive_clip=0.1, groups=groups),
        learning_rate=rate,
        ema_decays={"default": 0.9},
        ema_powers={"short": 0.05, "long": 0.10},
        precision=Precision(precision),
        accumulation=accumulation,
    )


def make_batch(number):
    generator = np.random.default_rng(number)
    return {"x": generator.normal(size=(BATCH, DIM)).astype(np.float32)}


@functools.cache
def programs(precision, optimizer, accumulation=1):
    trainer = make_trainer(optimizer, precision, accumulation)
    return trainer, jit(trainer.init), jit(trainer.train_step)


@functools.cache
def plain():
    """Without any option of the objective."""
    trainer = make_trainer(adamw, drop={})
    return jit(trainer.init), jit(trainer.train_step)


def run(programs, steps=4, state=None, first=0):
    _, init, step = programs
    state = init() if state is None else state
    for n in range(first, first + steps):
        state, metrics = step(state, FROZEN, make_batch(n))
    assert float(metrics.scalars["skipped"][0]) == 0
    return state, metrics


def compare(a, b, **tolerance):
    def one(path, x, y):
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)

    jax.tree_util.tree_map_with_path(one, a, b)


SHARDED = [
    pytest.param("stochastic", adamw, id="stochastic", marks=pytest.mark.slow),
    pytest.param("masters", adamw, id="masters", marks=pytest.mark.slow),
    pytest.param("float32", muon, id="float32", marks=pytest.mark.slow),
]
RESUMED = [("masters", muon), pytest.param("stochastic", adamw, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("precision", "optimizer"), SHARDED)
def test_micro_batches_and_eight_devices_change_nothing(precision, optimizer):
    """With rounding by chance too: a number that differs in its last bit rounds otherwise only
    where the random number falls into that bit."""
    trainer = programs(precision, optimizer)[0]
    whole, _ = run(programs(precision, optimizer))
    parts, _ = run(programs(precision, optimizer, accumulation=4))
    mesh = make_mesh(data=2, fsdp=4)
    compiled = CompiledTrainer(trainer, mesh, min_size=16)
    state = compiled.init()
    frozen = jax.device_put(FROZEN, replicated(mesh))
    program = compiled.lower(make_batch(0), frozen).compile()
    for n in range(4):
        batch = jax.device_put(make_batch(n), batch_sharding(mesh))
        state, _, _ = program(state, frozen, batch)
    kernel = state.params["blocks"]["fc1"]["kernel"]
    assert kernel.dtype == (jnp.float32 if precision == "float32" else jnp.bfloat16)
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    # A gradient is a sum of micro-batches' gradients, each of them rounded to bfloat16.
    low = {"rtol": 0.02, "atol": 1e-2} if precision != "float32" else {"atol": 2e-5}
    for other, options in ((parts, low), (state, low)):
        for field in ("params", "ema", "extra"):
            compare(getattr(whole, field), getattr(other, field), **options)
    changed = np.mean(np.asarray(whole.params["blocks"]["fc1"]["kernel"]) != np.asarray(kernel))
    assert precision == "float32" or changed < 0.02


@pytest.mark.parametrize(("precision", "optimizer"), RESUMED, ids=["masters", "stochastic"])
def test_a_resumed_run_has_the_same_bits(precision, optimizer, tmp_path):
    compiled = programs(precision, optimizer)
    straight, _ = run(compiled, 4)
    half, _ = run(compiled, 2)
    trainer = compiled[0]
    abstract = jax.eval_shape(trainer.init)
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        assert describe_mismatch(abstract, checkpoints.stored(2)) == []
        restored, _ = checkpoints.restore(abstract)
        # A sampler asks for the network's part of an average and nothing else.
        network = network_params(abstract.ema["default"])
        part = checkpoints.restore_subtree({"ema": {"default": network}})["ema"]["default"]
    resumed, _ = run(compiled, 2, restored, first=2)
    compare(straight, resumed, rtol=0)
    assert set(part) == {"stem", "blocks", "head"}
    compare(part, network_params(half.ema["default"]), rtol=0)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(straight.ema))


def test_the_objectives_parameters_are_beside_the_networks():
    """Same network, same noise: turning options on moves no path and no initial weight."""
    without = plain()[0]()
    full = programs("stochastic", adamw)[1]()
    assert set(full.params) == {*without.params, "objective"}
    assert set(full.params["objective"]) == {"uncertainty", "alignment"}
    compare(without.ema["default"], network_params(full.ema["default"]), rtol=1e-5)
    assert set(full.opt_state["optimizer"].inner_states) == {
        "uncertainty",
        "alignment",
        "default",
    }


def test_a_network_may_not_take_the_objectives_name():
    trainer = dataclasses.replace(
        make_trainer(), init_params=lambda key: {"objective": jnp.zeros(())}
    )
    with pytest.raises(ValueError, match="called 'objective'"):
        trainer.init()


def test_averages_need_names_of_their_own():
    with pytest.raises(ValueError, match=r"ema.powers.default"):
        dataclasses.replace(make_trainer(), ema_powers={"default": 0.1})
    with pytest.raises(ValueError, match=r"ema.powers.far: sigma_rel=0.4"):
        dataclasses.replace(make_trainer(), ema_powers={"far": 0.4})


def test_power_averages_in_a_run_are_the_sum_of_its_parameters():
    """The first update has weight one, whatever the weights were before it; skipped ones none."""
    init, step = plain()
    state, path = init(), []
    for n in range(6):
        batch = make_batch(n)
        if n == 2:
            batch["x"][0] = np.nan
        state, _ = step(state, FROZEN, batch)
        path += [np.asarray(state.params["head"]["kernel"])] if n != 2 else []
    edges = (np.arange(6) / 5.0) ** (16.97 + 1)
    expected = np.tensordot(np.diff(edges), np.stack(path), axes=1)
    np.testing.assert_allclose(state.ema["short"]["head"]["kernel"], expected, atol=1e-5)


def exact_network(schedule, spread):
    """The exact v of data N(0, spread^2), which no parameter changes."""

    def network(params, x, noise, conditioning, *, key=None):
        logsnr = noise[:, None]
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))
        x0 = alpha * spread**2 * x / (alpha**2 * spread**2 + sigma**2)
        eps = sigma * x / (alpha**2 * spread**2 + sigma**2)
        return alpha * eps - sigma * x0

    return network


def gaussian_trainer(spread, **options):
    objective = make_objective(apply=exact_network(schedules.cosine(), spread), **options)
    return Trainer(
        objective=objective.objective(),
        init_params=lambda key: {"unused": jnp.zeros(())},
        optimizer=adamw(warmup_schedule("cosine", 0.1, steps=400), clip_norm=None),
    )


def gaussian_batch(n, spread, size=256):
    x = spread * np.random.default_rng(n).normal(size=(size, 16))
    return {"x": x.astype(np.float32)}


def exact_loss(logsnr, spread):
    """E |v_hat - v|^2 = c^2 / (alpha^2 c^2 + sigma^2) with alpha^2 + sigma^2 = 1."""
    alpha2 = 1.0 / (1.0 + np.exp(-logsnr))
    return spread**2 / (alpha2 * spread**2 + 1.0 - alpha2)


@pytest.mark.slow
def test_uncertainty_learns_the_logarithm_of_the_loss_in_training():
    spread, part = 0.2, Uncertainty(channels=32)
    trainer = gaussian_trainer(spread, uncertainty=part)
    state, step = jit(trainer.init)(), jit(trainer.train_step)
    for n in range(400):
        state, metrics = step(state, {}, gaussian_batch(n, spread))
    logsnr = np.linspace(-4.0, 4.0, 17).astype(np.float32)
    u = part(state.params["objective"]["uncertainty"], jnp.asarray(logsnr))
    np.testing.assert_allclose(u, np.log(exact_loss(logsnr, spread)), atol=0.12)
    # Held-out data are judged by the loss itself.
    assert {"loss", "uncertainty_loss"} <= set(metrics.scalars)
    keys = jax.random.split(jax.random.key(0), 256)
    batch = {"x": jnp.asarray(gaussian_batch(0, spread)["x"])}
    args = (state, {}, batch, keys, jnp.arange(256) / 256, 256)
    held_out = trainer.evaluate(state.params, *args)
    assert "loss" in held_out
    assert "uncertainty_loss" not in held_out


@pytest.mark.parametrize("reweight", [True, False])
def test_the_logged_loss_is_that_of_the_given_time_sampling(reweight):
    """Drawn by importance, `loss` still means the same, and so do its bins; the gradient's loss
    does only where it is reweighted."""
    spread = 0.2
    adaptive = AdaptiveTime(cells=16, reweight=reweight)
    trainer = gaussian_trainer(spread, adaptive=adaptive)
    state, step = jit(trainer.init)(), jit(trainer.train_step)
    sums, bins = [], []
    for n in range(40):
        state, metrics = step(state, {}, gaussian_batch(n, spread, 512))
        if n >= 10:
            sums.append([float(v) for v in metrics.scalars["loss"]])
            bins.append([float(v) for v in metrics.scalars["loss_logsnr/-2..+0"]])
    (total, count), (bin_total, bin_count) = (np.sum(s, axis=0) for s in (sums, bins))
    places = sample_time(jnp.arange(20000) / 20000, jnp.zeros(20000), 1)
    logsnr = np.asarray(schedules.cosine().logsnr(places))
    exact = exact_loss(logsnr, spread)
    assert total / count == pytest.approx(exact.mean(), rel=0.01)
    inside = (logsnr >= -2) & (logsnr < 0)
    assert bin_total / bin_count == pytest.approx(exact[inside].mean(), rel=0.02)
    p = np.asarray(adaptive.probabilities(state.extra["time"]))
    assert p.max() > 2.0 / 16
    keys = jax.random.split(jax.random.key(5), 4096)
    context = Context(state.step, {}, state.extra, {}, jnp.arange(4096) / 4096, 4096)
    batch = {"x": jnp.asarray(gaussian_batch(77, spread, 4096)["x"])}
    loss, _ = jit(lambda b, k: trainer.objective({}, b, k, context))(batch, keys)
    cells = exact.reshape(16, -1).mean(axis=1)
    expected = exact.mean() if reweight else p @ cells
    assert float(loss) == pytest.approx(expected, rel=0.02)
    assert abs(p @ cells - exact.mean()) > 0.1 * exact.mean()


@pytest.mark.slow
def test_a_transformer_trains_with_bfloat16_parameters():
    network = functional(
        functools.partial(DiT, (8, 8, 1), patch=4, dim=32, depth=2, heads=2, features_after=1)
    )
    trainer = Trainer(
        objective=make_objective(
            apply=network.apply,
            uncertainty=Uncertainty(),
            alignment=Alignment(
                encode=lambda frozen, x: x.reshape(x.shape[0], 4, 16)[..., :4],
                feature_dim=32,
                target_dim=4,
                hidden=16,
            ),
        ).objective(),
        init_params=network.init,
        optimizer=muon(warmup_schedule("constant", 3e-3, steps=100)),
        ema_decays={"default": 0.9},
        precision=Precision("stochastic"),
    )
    state, step = jit(trainer.init)(), jit(trainer.train_step)
    batch = {"x": np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32) * 0.1}
    losses = []
    for _ in range(40):
        state, metrics = step(state, {"alignment": {}}, batch)
        losses.append([float(metrics.scalars[k][0]) / 32 for k in ("loss", "alignment_loss")])
    assert state.params["blocks"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert last[0] < 0.5 * first[0]
    assert last[1] < first[1] - 0.1
