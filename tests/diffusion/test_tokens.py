"""Masked and uniform diffusion of tokens against transition matrices, Bayes and enumeration."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes, solvers, time_grids
from diffusion_jax.diffusion.likelihood import variational_bound
from diffusion_jax.diffusion.processes import (
    KEEPS,
    Categorical,
    CosineKeep,
    LinearKeep,
    Masked,
    Process,
    Uniform,
)

K, LENGTH = 3, 2
# All sequences of two tokens of three, with a distribution whose tokens hang together.
SEQUENCES = np.array(list(itertools.product(range(K), repeat=LENGTH)), np.int32)
WEIGHTS = np.array([0.3, 0.02, 0.05, 0.01, 0.2, 0.1, 0.02, 0.25, 0.05])
ENTROPY = float(-(WEIGHTS * np.log(WEIGHTS)).sum())
PROCESSES = [kind(K, keep) for kind in (Masked, Uniform) for keep in KEEPS.values()]
NAMES = [f"{type(p).__name__}-{type(p.schedule).__name__}" for p in PROCESSES]
# Two of each kind are alike but for how tokens are kept: the second is a slow test.
each = pytest.mark.parametrize(
    "process",
    [pytest.param(p, marks=pytest.mark.slow) if i % 2 else p for i, p in enumerate(PROCESSES)],
    ids=NAMES,
)


def kernel(process, kept):
    """One step's matrix [from, to], which keeps a token with chance `kept`; from its words."""
    if isinstance(process, Masked):
        matrix = kept * np.eye(K + 1)
        matrix[:, K] += 1.0 - kept
        return matrix
    return kept * np.eye(K) + (1.0 - kept) / K


def transition(process, s, t, parts=7):
    """From s to t as a product of the matrices of shorter steps."""
    times = np.linspace(s, t, parts + 1)
    steps = [
        kernel(process, process.keep(b) / process.keep(a)) for a, b in itertools.pairwise(times)
    ]
    return functools.reduce(np.matmul, steps)


def likelihoods(process, t):
    """q(x_t | x0) for all pairs of sequences of states and of tokens; the former in C order."""
    one = transition(process, 0.0, t) if t < 1.0 else kernel(process, 0.0)
    states = np.array(list(itertools.product(range(process.states), repeat=LENGTH)), np.int32)
    chance = np.prod(one[SEQUENCES[None], states[:, None]], axis=-1)
    return states, chance


def exact_table(process, t):
    """States [n, L], their chance [n], and the exact x0_hat [n, L, K], by Bayes' rule."""
    states, chance = likelihoods(process, t)
    joint = chance * WEIGHTS
    mass = joint.sum(1)
    posterior = joint / np.where(mass > 0.0, mass, 1.0)[:, None]
    one_hot = np.eye(K)[SEQUENCES]
    return states, mass, np.einsum("nx,xlk->nlk", posterior, one_hot), posterior


@pytest.mark.parametrize("keep", KEEPS.values(), ids=list(KEEPS))
def test_keep_is_exact_at_its_ends_and_agrees_with_what_it_erased(keep):
    for xp in (np, jnp):
        assert float(keep.keep(xp.asarray(0.0))) == 1.0
        assert float(keep.keep(xp.asarray(1.0))) == 0.0
        assert float(keep.erased(xp.asarray(0.0))) == 0.0
        assert float(keep.erased(xp.asarray(1.0))) == 1.0
    t = np.linspace(0.0, 1.0, 10_001)
    kept = keep.keep(t)
    assert (np.diff(kept) < 0.0).all()
    np.testing.assert_allclose(kept + keep.erased(t), 1.0, atol=1e-15)
    inner = np.linspace(0.01, 0.99, 50)
    slope = (np.log(keep.erased(inner + 1e-6)) - np.log(keep.erased(inner - 1e-6))) / 2e-6
    np.testing.assert_allclose(keep.rate(inner), slope, rtol=1e-6)
    # Near the end float32 keeps its relative accuracy: the posterior divides by keep(s).
    late = jnp.float32(0.9999)
    np.testing.assert_allclose(keep.keep(late), keep.keep(np.float64(late)), rtol=1e-4)


def test_cosine_reveals_late():
    assert abs(CosineKeep().keep(np.float64(0.5)) - (1.0 - np.sqrt(0.5))) < 1e-15
    assert LinearKeep().keep(0.25) == 0.75


@each
def test_the_protocol_is_met(process):
    assert isinstance(process, Process)
    assert process.prior((2, 4)).probabilities.shape == (2, 4, process.states)


@each
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_forward_draws_from_the_product_of_transitions(process, t):
    count = 40_000
    expected = transition(process, 0.0, t) if t < 1.0 else kernel(process, 0.0)
    for x0 in range(K):
        key = jax.random.fold_in(jax.random.key(0), x0)
        tokens = jnp.full((count,), x0)
        x_t = process.forward(tokens, t, process.noise(key, (count,)))
        assert x_t.dtype == tokens.dtype
        shares = np.bincount(x_t, minlength=process.states) / count
        error = np.sqrt(expected[x0] * (1.0 - expected[x0]) / count)
        assert (np.abs(shares - expected[x0]) <= 4.5 * error + 1e-9).all()
    if isinstance(process, Uniform):
        tokens = np.arange(K)
        np.testing.assert_allclose(process.marginal(tokens, t).probabilities, expected, atol=1e-12)


@each
@pytest.mark.parametrize(("t", "s"), [(0.7, 0.4), (1.0, 0.5), (0.2, 0.0), (1.0, 0.0), (0.9, 0.89)])
def test_posterior_is_bayes_rule(process, t, s):
    """q(x_s | x_t, x0) = q(x_t | x_s) q(x_s | x0) / q(x_t | x0), from transition matrices."""
    start = transition(process, 0.0, s)
    step = kernel(process, process.keep(t) / process.keep(s))
    for x0 in range(K):
        for x_t in range(process.states):
            joint = start[x0] * step[:, x_t]
            if joint.sum() == 0.0:
                continue
            found = process.posterior(np.array([x_t]), np.array([x0]), t, s).probabilities[0]
            np.testing.assert_allclose(found, joint / joint.sum(), atol=1e-12)


@each
def test_posterior_mixes_over_the_prediction(process):
    rng = np.random.default_rng(0)
    x_t = rng.integers(0, process.states, (5, 4))
    x0_hat = rng.dirichlet(np.ones(K), (5, 4))
    t, s = rng.uniform(0.5, 1.0, 5), rng.uniform(0.0, 0.5, 5)
    found = process.posterior(x_t, x0_hat, t, s).probabilities
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-12)
    parts = [process.posterior(x_t, np.full((5, 4), k), t, s).probabilities for k in range(K)]
    np.testing.assert_allclose(found, sum(x0_hat[..., k, None] * parts[k] for k in range(K)))


@each
def test_divergence_by_its_definition(process):
    """Nonnegative, 0 at the truth, and sum q log q/p over the posteriors of the test above."""
    rng = np.random.default_rng(1)
    x0 = rng.integers(0, K, (200,))
    t, s = rng.uniform(0.5, 1.0, 200), rng.uniform(0.01, 0.5, 200)
    x_t = process.forward(x0, t, rng.random(200))
    x0_hat = rng.dirichlet(np.ones(K), 200)
    nats = process.kl(x0, x_t, x0_hat, t, s)
    q = process.posterior(x_t, x0, t, s).probabilities
    p = process.posterior(x_t, x0_hat, t, s).probabilities
    ratio = np.log(np.where(q > 0.0, q, 1.0)) - np.log(np.where(q > 0.0, p, 1.0))
    np.testing.assert_allclose(nats, (q * ratio).sum(-1), atol=1e-12)
    assert (nats >= -1e-12).all()
    assert nats.max() > 0.1
    np.testing.assert_allclose(process.kl(x0, x_t, np.eye(K)[x0], t, s), 0.0, atol=1e-12)
    surprise = process.kl(x0, x_t, x0_hat, t, 0.0)
    hidden = (x_t == K) | isinstance(process, Uniform)
    expected = np.where(hidden, -np.log(x0_hat[np.arange(200), x0]), 0.0)
    np.testing.assert_allclose(surprise, expected, atol=1e-9)
    np.testing.assert_array_equal(process.prior_kl(x0), 0.0)


@each
def test_what_is_certain_and_wrong_costs_a_finite_amount(process):
    x0, x_t = jnp.array([0]), jnp.array([process.states - 1])
    logits = jnp.array([[-1e4, 0.0, 0.0]])

    def nats(logits):
        return process.kl(x0, x_t, jax.nn.softmax(logits), 0.5, 0.0).sum()

    value, slope = jax.value_and_grad(nats)(logits)
    assert 80.0 < float(value) < 90.0
    assert jnp.isfinite(slope).all()


def exact_bound(process, times):
    """E of the bound over data and x_t with the exact x0_hat, by enumeration."""
    total = 0.0
    for t, s in itertools.pairwise(times):
        states, _, x0_hat, _ = exact_table(process, t)
        _, chance = likelihoods(process, t)
        for number, x0 in enumerate(SEQUENCES):
            tokens = np.broadcast_to(x0, states.shape)
            nats = process.kl(tokens, states, x0_hat, t, s).sum(1)
            # Where q(x_t | x0) is 0 the divergence is of nothing.
            seen = chance[:, number] > 0.0
            total += WEIGHTS[number] * (chance[seen, number] * nats[seen]).sum()
    return total


@each
def test_exact_bound_falls_to_the_entropy(process):
    gaps = [exact_bound(process, time_grids.uniform(steps)) - ENTROPY for steps in (4, 16, 64)]
    assert gaps[0] > gaps[1] > gaps[2] > 0.0
    # The gap is that of tokens drawn at once, which falls with the length of a step.
    assert gaps[2] < 0.35 * gaps[1]


@pytest.mark.parametrize("keep", KEEPS.values(), ids=list(KEEPS))
def test_continuous_bound_of_the_exact_prediction_is_the_entropy(keep):
    """Masked diffusion in continuous time is autoregression in every order (Hoogeboom et al. 2022,
    section 3): by quadrature over t, nothing is left of the gap."""
    process = Masked(K, keep)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = 0.0
    for t, weight in zip(0.5 + 0.5 * nodes, 0.5 * weights, strict=True):
        states, _, x0_hat, _ = exact_table(process, t)
        _, chance = likelihoods(process, t)
        for number, x0 in enumerate(SEQUENCES):
            tokens = np.broadcast_to(x0, states.shape)
            nats = process.kl_rate(tokens, states, x0_hat, t).sum(1)
            total += weight * WEIGHTS[number] * (chance[:, number] * nats).sum()
    assert abs(total - ENTROPY) < 1e-9


def jax_denoiser(process):
    """p(x0 | x_t) of a batch by enumerating the nine sequences, in JAX."""

    def denoise(x, t):
        kept = process.keep(jnp.asarray(t))
        same = x[:, None, :] == SEQUENCES[None]
        if isinstance(process, Masked):
            chance = jnp.where(x[:, None, :] == K, 1.0 - kept, kept * same)
        else:
            chance = kept * same + (1.0 - kept) / K
        joint = chance.prod(-1) * WEIGHTS
        return jnp.einsum("bn,nlk->blk", joint / joint.sum(1, keepdims=True), np.eye(K)[SEQUENCES])

    return denoise


@each
def test_ancestral_sampling_with_the_exact_prediction_draws_the_data(process):
    """400 steps; 20,000 draws have a standard error below .0033 in each of nine shares, and tokens
    revealed in one step move a share by less than the same."""
    count = 20_000
    x = process.prior((count, LENGTH)).sample(jax.random.key(1))
    run = functools.partial(solvers.ancestral, jax_denoiser(process), process)
    times = time_grids.uniform(400)
    x0 = jax.jit(lambda x: run(times, x, key=jax.random.key(2)))(x)
    assert x0.dtype == jnp.int32
    assert int(x0.max()) < K
    shares = np.bincount(np.asarray(x0) @ np.array([K, 1]), minlength=K**LENGTH) / count
    error = np.sqrt(WEIGHTS * (1.0 - WEIGHTS) / count)
    assert (np.abs(shares - WEIGHTS) < 4.0 * error + 0.002).all()


@each
def test_estimated_bound_meets_the_enumerated_one(process):
    times, count = time_grids.uniform(8), 20_000
    x0 = SEQUENCES[np.random.default_rng(3).choice(len(SEQUENCES), count, p=WEIGHTS)]
    bound = variational_bound(jax_denoiser(process), process, times, x0, key=jax.random.key(4))
    error = float(bound.total.std()) / np.sqrt(count)
    assert abs(float(bound.total.mean()) - exact_bound(process, times)) < 4.0 * error


def test_a_masked_token_once_seen_stays():
    process, times = Masked(K), time_grids.uniform(20)
    x = process.prior((50, 6)).sample(jax.random.key(0))
    _, states = solvers.ancestral(
        lambda x, t: jnp.full((*x.shape, K), 1.0 / K),
        process,
        times,
        x,
        key=jax.random.key(1),
        trajectory=True,
    )
    states = np.asarray(states)
    assert (states[0] == K).all()
    assert (states[-1] < K).all()
    for before, after in itertools.pairwise(states):
        seen = before != K
        np.testing.assert_array_equal(after[seen], before[seen])
    # As many are revealed in every step of the linear schedule.
    assert 0.4 < (states[10] == K).mean() < 0.6


def test_categorical_never_takes_what_has_no_probability():
    """The cumulative sum of float32 need not rise in order; u is the largest below 1."""
    p = np.random.default_rng(0).dirichlet(np.full(500, 0.05), 64).astype(np.float32)
    p[:, -3:] = 0.0
    p[:, 0] = 0.0
    for u in (0.0, 0.5, 1.0 - 2.0**-24):
        for given in (p, jnp.asarray(p)):
            token = np.asarray(Categorical(given).transform(np.full(64, u, np.float32)))
            assert (p[np.arange(64), token] > 0.0).all()
    best = p.argmax(-1)
    np.testing.assert_allclose(Categorical(p).log_prob(best), np.log(p.max(-1)), rtol=1e-6)


def test_bad_processes_and_states():
    with pytest.raises(ValueError, match="vocabulary=1: expected at least 2"):
        Masked(1)

    class Half(LinearKeep):
        def keep(self, t):
            return 1.0 - 0.5 * t

    with pytest.raises(ValueError, match=r"goes from 1.0 to 0.5; expected from 1 to 0"):
        Uniform(3, Half())
    times = time_grids.uniform(2)
    with pytest.raises(ValueError, match="of an integer type"):
        solvers.ancestral(
            lambda x, t: x, processes.Masked(2), times, jnp.ones((2, 3)), key=jax.random.key(0)
        )
