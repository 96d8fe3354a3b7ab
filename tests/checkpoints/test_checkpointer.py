import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quick import jit

from diffusion_jax.checkpoints import Checkpointer, describe_mismatch
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import shardings_for, with_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    extra: Any


def make_state(seed=0, width=256):
    """Every kind of leaf and container that a train state may hold."""
    key = jax.random.key(seed)
    params = {
        "blocks": {"fc1": {"kernel": jax.random.normal(key, (4, 64, width))}},
        "head": {"kernel": jax.random.normal(key, (width, 128)), "bias": jnp.zeros(3)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    extra = {
        "key": key,
        "keys": jax.random.split(key, 3),
        "half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
        "mask": jnp.array([True, False]),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "empty": {},
        "nothing": None,
        "pair": (jnp.int32(1), [jnp.zeros((1, 3))]),
    }
    return State(
        jnp.int32(7), params, optimizer.init(params), {"default": params, "long": params}, extra
    )


def placed(mesh, **kw):
    abstract = jax.eval_shape(lambda: make_state(**kw))
    return with_shardings(abstract, shardings_for(abstract, mesh, min_size=64))


def born(mesh, **kw):
    shardings = jax.tree.map(lambda a: a.sharding, placed(mesh, **kw))
    return jit(lambda: make_state(**kw), out_shardings=shardings)()


def bits(tree):
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return leaf.dtype, leaf.shape, np.array(leaf).tobytes()

    return jax.tree.map(raw, tree)


ON_8 = {"data": 1, "fsdp": 8}


def one_device_mesh():
    return make_mesh(devices=jax.devices()[:1])


def small(value, size=4):
    return {"w": jnp.asarray(np.full(size, value, np.float32)), "step": jnp.int32(value)}


SMALL = jax.eval_shape(lambda: small(0))


@pytest.mark.parametrize("first", [ON_8, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_restores_the_same_bits_on_any_mesh(tmp_path, first):
    state = born(make_mesh(**first))
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.save(7, state, {"position": 2**70, "seed": 0})
    for mesh in (make_mesh(**first), one_device_mesh(), make_mesh(data=2, fsdp=4)):
        with Checkpointer(tmp_path / "c") as checkpointer:
            restored, metadata = checkpointer.restore(placed(mesh))
        assert metadata == {"position": 2**70, "seed": 0}
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        for leaf, abstract in zip(
            jax.tree.leaves(restored), jax.tree.leaves(placed(mesh)), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


@pytest.mark.parametrize("devices", [1, 8])
def test_state_may_be_donated_as_soon_as_save_returns(tmp_path, devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, P("data"))
    state = {f"w{i}": jax.device_put(jnp.full(2**20, i, jnp.uint32), sharding) for i in range(8)}
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1000, t), donate_argnums=0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state, {})
            for _ in range(4):
                previous, state = state, bump(state)
            assert previous["w0"].is_deleted()
            jax.block_until_ready(state)
        checkpointer.wait()
        for step in range(3):
            restored, _ = checkpointer.restore(abstract, step)
            for i in range(8):
                assert (np.unique(restored[f"w{i}"]) == [i + 4000 * step]).all()


def test_keeps_the_last_and_every_nth(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in range(1, 12):
            checkpointer.save(step, small(step), {"position": step})
        checkpointer.wait()
        assert checkpointer.steps() == [4, 8, 10, 11]
        assert checkpointer.latest_step() == 11
        assert checkpointer.read_metadata(4) == {"position": 4}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(12, small(12), {})
        checkpointer.wait()
        assert checkpointer.steps() == [12]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(5, small(5), {"position": 5})
        assert not checkpointer.save(5, small(6), {"position": 6})
    with Checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.save(5, small(7), {"position": 7})
        restored, metadata = checkpointer.restore(SMALL)
        assert metadata == {"position": 5}
        assert restored["step"] == 5
        # An earlier step can still be filled in, and the newest stays the newest.
        assert checkpointer.save(3, small(3), {"position": 3})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 5]
        assert checkpointer.restore(SMALL)[1] == {"position": 5}


def test_saving_takes_no_part_in_the_agreement_on_sigterm(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {})
    assert asked == []


def test_metadata_must_be_json_and_is_checked_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError):
            checkpointer.save(1, small(1), {"position": np.int64(1)})
        assert checkpointer.steps() == []
        assert list(tmp_path.iterdir()) == []


def test_subtree_reads_only_its_own_bytes(tmp_path):
    state = born(make_mesh(**ON_8), width=4096)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state, {})
    of_params = jax.eval_shape(lambda: make_state(width=4096)).params
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(of_params))
    reader = Checkpointer(tmp_path, read_only=True)
    before = bytes_read()
    restored = reader.restore_subtree({"ema": {"long": of_params}})
    used = bytes_read() - before
    assert bits(restored) == {"ema": {"long": bits(state.ema["long"])}}
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(restored))
    # The state holds params, two moments and two EMAs: five times this size.
    assert used < 1.5 * size
    sharded = with_shardings(of_params, shardings_for(of_params, make_mesh(**ON_8)))
    restored = reader.restore_subtree({"params": sharded})
    assert restored["params"]["head"]["kernel"].sharding.spec == P("fsdp")
    assert bits(restored["params"]) == bits(state.params)


def bytes_read():
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("needs /proc/self/io")
    return int(counters.read_text().splitlines()[0].split()[1])


def test_stored_describes_the_tree_without_reading_arrays(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state, {})
        checkpointer.wait()
        stored = checkpointer.stored()
    assert set(stored) == {"step", "params", "opt_state", "ema", "extra"}
    assert set(stored["ema"]) == {"default", "long"}
    kernel = stored["params"]["blocks"]["fc1"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((4, 64, 256), jnp.float32)
    assert stored["extra"]["half"].dtype == jnp.bfloat16


def test_other_architecture_names_the_arrays(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}}, {})
        checkpointer.wait()
        other = {
            "params": {
                "a": jax.ShapeDtypeStruct((2, 4), jnp.float32),
                "c": jax.ShapeDtypeStruct((5,), jnp.int32),
            }
        }
        assert describe_mismatch(other, checkpointer.stored()) == [
            "params/a: stored float32(2, 3), expected float32(2, 4)",
            "params/c: not stored, expected int32(5,)",
            "params/b: stored float32(2,), not expected",
        ]
        with pytest.raises(ConfigError, match=r"another architecture: params/a: stored") as error:
            checkpointer.restore(other)
        assert "\n" not in str(error.value)
        half = {"params": {"b": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}}
        with pytest.raises(ConfigError, match=r"b: stored float32\(2,\), expected bfloat16\(2,\)"):
            checkpointer.restore_subtree(half)
        many = {f"x{i}": jax.ShapeDtypeStruct((), jnp.float32) for i in range(9)}
        with pytest.raises(ConfigError, match="and 8 more"):
            checkpointer.restore(many)


def test_a_missing_step_names_the_nearest(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            checkpointer.restore(SMALL)
        for step in (10, 20):
            checkpointer.save(step, small(step), {})
        checkpointer.wait()
        with pytest.raises(ConfigError, match=r"step=17 is not among .*nearest: 20"):
            checkpointer.restore(SMALL, 17)


def test_options_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ConfigError, match="keep_every=0"):
        Checkpointer(tmp_path, keep_every=0)


def test_reading_changes_nothing_and_needs_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*/none' does not exist"):
        Checkpointer(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, small(1), {})
    torn = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    with Checkpointer(tmp_path / "c", read_only=True) as reader:
        assert reader.restore(SMALL)[0]["step"] == 1
        with pytest.raises(ValueError, match="read_only"):
            reader.save(2, small(2), {})
    assert torn.exists()


def test_metadata_is_plain_json_on_disk(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {"position": 3, "nested": {"a": [1, 2.5, None]}})
    text = (tmp_path / "1" / "metadata" / "metadata").read_text()
    assert json.loads(text) == {"position": 3, "nested": {"a": [1, 2.5, None]}}
