"""Averages against their sum and their profile; any length from two, against direct tracking."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError
from diffusion_jax.training import ema
from diffusion_jax.training.ema import Snapshot


def test_average_is_the_weighted_sum_of_all_parameters():
    values = np.random.default_rng(0).normal(size=30)
    tree = {"a": {"w": jnp.asarray(values[0])}}
    for n, value in enumerate(values[1:]):
        tree = ema.update(tree, {"w": jnp.asarray(value)}, n, {"a": 0.8}, warmup=False)
    powers = 0.8 ** np.arange(len(values))[::-1]
    weights = powers * np.where(np.arange(len(values)) == 0, 1.0, 0.2)
    np.testing.assert_allclose(weights.sum(), 1.0)
    np.testing.assert_allclose(tree["a"]["w"], weights @ values, rtol=1e-5)


def test_warmup_forgets_the_start_and_then_keeps_its_length():
    """With d_n = (1+n)/(10+n) the start has the weight prod d_n = 9! n! / (n + 9)! after n + 1."""
    tree, weight = {"a": jnp.ones(())}, 1.0
    for n in range(40):
        tree = ema.update(tree, jnp.zeros(()), n, {"a": 0.9999})
        weight *= (1 + n) / (10 + n)
    np.testing.assert_allclose(tree["a"], weight, rtol=1e-4)
    assert float(ema.decay_at(10**6, 0.99)) == pytest.approx(0.99)


def test_widths_and_exponents_of_the_paper():
    """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert ema.gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert ema.gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for gamma in (0.0, 0.3, 2.0, 6.94, 50.0, 400.0):
        width = ema.sigma_rel_of(gamma)
        assert ema.gamma_of(width) == pytest.approx(gamma, rel=1e-6, abs=1e-5)
        # The standard deviation of p over (0, 1], by summation.
        tau = (np.arange(200000) + 0.5) / 200000
        p = (gamma + 1) * tau**gamma / 200000
        mean = p @ tau
        assert width == pytest.approx(np.sqrt(p @ (tau - mean) ** 2), rel=1e-5)
    assert ema.gamma_of(ema.WIDEST) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ConfigError, match="sigma_rel="):
        ema.gamma_of(width)


def track(path, widths, at=()):
    """Power function averages of `path` [updates, d] at the end, and their states at `at`."""
    powers = {f"{w}": w for w in widths}

    def step(trees, item):
        n, value = item
        trees = ema.update(trees, value, n, {}, powers=powers)
        return trees, trees

    # What the averages begin with must not matter.
    start = {name: jnp.full(path.shape[1], 1e6) for name in powers}
    items = (jnp.arange(len(path)), jnp.asarray(path, jnp.float32))
    last, every = jax.jit(lambda s, i: jax.lax.scan(step, s, i))(start, items)
    last = {name: np.asarray(tree) for name, tree in last.items()}
    states = {(t, w): np.asarray(every[f"{w}"][t - 1]) for t in at for w in widths}
    return last, states


def test_power_average_has_its_profile_exactly():
    """Unit vectors as parameters: the average is the profile itself."""
    count = 400
    profiles, _ = track(np.eye(count), (0.05, 0.15))
    for width in (0.05, 0.15):
        gamma, profile = ema.gamma_of(width), profiles[f"{width}"]
        edges = (np.arange(count + 1) / count) ** (gamma + 1)
        np.testing.assert_allclose(profile, np.diff(edges), atol=2e-6)
        middle = (np.arange(count) + 0.5) / count
        assert profile.sum() == pytest.approx(1.0, abs=1e-4)
        assert profile @ middle == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
        spread = np.sqrt(profile @ (middle - profile @ middle) ** 2)
        assert spread == pytest.approx(width, rel=5e-3)


def snapshots_of(states, loaded=None):
    def load(key):
        if loaded is not None:
            loaded.append(key)
        return {"w": jnp.asarray(states[key])}

    return [
        Snapshot(updates=t, gamma=ema.gamma_of(w), load=lambda key=(t, w): load(key))
        for t, w in states
    ]


COUNT = 2048
STORED = range(64, COUNT + 1, 64)


@pytest.fixture(scope="module")
def tracked():
    """A random walk that drifts far from where it began, as weights do, with five lengths."""
    steps = np.random.default_rng(0).normal(size=(COUNT, 32))
    path = 5.0 + np.cumsum(steps, axis=0) / np.sqrt(COUNT)
    wanted, _ = track(path, (0.03, 0.075, 0.15, 0.2))
    _, states = track(path, (0.05, 0.10), STORED)
    return path, wanted, states


@pytest.mark.parametrize(
    ("width", "bound"), [(0.03, 2e-2), (0.075, 1e-3), (0.15, 2e-3), (0.2, 5e-3)]
)
def test_any_length_is_recovered_from_two(tracked, width, bound):
    """Against tracking that length itself, as a share of how far the weights moved in the run."""
    path, wanted, states = tracked
    tree = ema.reconstruct(snapshots_of(states), width)
    error = np.linalg.norm(tree["w"] - wanted[f"{width}"])
    nearest = min(np.linalg.norm(states[COUNT, w] - wanted[f"{width}"]) for w in (0.05, 0.10))
    assert error < bound * np.linalg.norm(path[-1] - path[0])
    assert error < 0.2 * nearest


def test_the_misfit_says_how_near_the_profile_comes():
    """Against profiles summed up update by update."""
    stored = [(float(t), ema.gamma_of(w)) for t in (1000, 2000) for w in (0.05, 0.10)]
    wanted = (2000.0, ema.gamma_of(0.2))

    def profile(t, gamma):
        return np.diff(np.minimum(np.arange(2001) / t, 1.0) ** (gamma + 1))

    weights = ema.solve_weights(stored, wanted)
    difference = sum(x * profile(*s) for x, s in zip(weights, stored, strict=True))
    difference = difference - profile(*wanted)
    share = np.linalg.norm(difference) / np.linalg.norm(profile(*wanted))
    assert share > 0.1
    assert ema.misfit(stored, wanted) == pytest.approx(share, rel=1e-2)
    assert ema.misfit(stored, stored[3]) < 1e-6


def test_earlier_averages_need_earlier_snapshots_only(tracked):
    path, _, states = tracked
    loaded = []
    tree = ema.reconstruct(snapshots_of(states, loaded), 0.075, 1024)
    assert max(t for t, _ in loaded) == 1024
    wanted, _ = track(path[:1024], (0.075,))
    np.testing.assert_allclose(tree["w"], wanted["0.075"], atol=2e-3)


def test_a_tracked_length_comes_back_with_its_bits_and_one_load(tracked):
    _, _, states = tracked
    loaded = []
    tree = ema.reconstruct(snapshots_of(states, loaded), 0.10, 1024)
    assert loaded == [(1024, 0.10)]
    np.testing.assert_array_equal(tree["w"], states[1024, 0.10])


def test_parameters_that_stood_still_come_out_as_they_are():
    """However few snapshots there are and however poor their fit."""
    states = {(t, w): np.full(3, 7.0, np.float32) for t in (500, 1000) for w in (0.05, 0.10)}
    for width in (0.01, 0.07, 0.28):
        tree = ema.reconstruct(snapshots_of(states), width)
        np.testing.assert_allclose(tree["w"], 7.0, rtol=1e-4)


def test_one_tree_is_held_at_a_time(tracked):
    """Each load happens after the tree before it was let go."""
    _, _, states = tracked
    alive, most = set(), 0

    class Tree(dict):
        def __del__(self):
            alive.discard(id(self))

    def load(key):
        nonlocal most
        tree = Tree(w=jnp.asarray(states[key]))
        alive.add(id(tree))
        most = max(most, len(alive))
        return tree

    jax.tree_util.register_pytree_node(
        Tree, lambda t: (tuple(t.values()), tuple(t)), lambda k, v: dict(zip(k, v, strict=True))
    )
    pairs = [key for key in states if key[0] > 1024]
    snapshots = [
        Snapshot(updates=t, gamma=ema.gamma_of(w), load=lambda key=(t, w): load(key))
        for t, w in pairs
    ]
    ema.reconstruct(snapshots, 0.075)
    assert most == 1


def test_no_snapshot_is_one_line():
    with pytest.raises(ConfigError, match=r"config\.ema\.powers"):
        ema.reconstruct([], 0.1)
    snapshot = Snapshot(updates=10, gamma=5.0, load=dict)
    with pytest.raises(ConfigError, match=r"at update 11; stored: \[10\]"):
        ema.reconstruct([snapshot], 0.1, 11)


def test_snapshots_are_read_from_the_checkpoints_that_are_kept(tmp_path, tracked):
    """Skipped updates do not age an average: t is the step less those."""
    _, wanted, states = tracked
    powers = {"short": 0.05, "long": 0.10}
    with Checkpointer(tmp_path / "c", keep_last=100) as checkpoints:
        for t in (1024, 1536, 2048):
            state = {
                "step": jnp.int32(t + 3),
                "ema": {name: {"w": jnp.asarray(states[t, w])} for name, w in powers.items()},
                "opt_state": {"guard": {"skipped": jnp.int32(3)}},
            }
            checkpoints.save(t + 3, state, {})
        checkpoints.wait()
        abstract = {"w": jax.ShapeDtypeStruct((32,), jnp.float32)}
        snapshots = ema.stored_snapshots(checkpoints, powers, abstract)
        assert [s.updates for s in snapshots] == [1024, 1024, 1536, 1536, 2048, 2048]
        tree = ema.reconstruct(snapshots, 0.075)
        few = {key: states[key] for key in states if key[0] in (1024, 1536, 2048)}
        expected = ema.reconstruct(snapshots_of(few), 0.075)
    np.testing.assert_allclose(tree["w"], expected["w"], rtol=1e-6)
    np.testing.assert_allclose(tree["w"], wanted["0.075"], atol=2e-2)
