"""Every kind of guidance against exact Gaussian fields, and what all of them keep."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import guidance, schedules, solvers, thresholding, time_grids
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.diffusion.guidance_tokens import classifier_free_tokens
from diffusion_jax.errors import ConfigError

SCHEDULE = schedules.edm(sigma_max=300.0)
COSINE = schedules.cosine()
RNG = np.random.default_rng(4)
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
T = jnp.array([0.3, 0.5, 0.8])


def normal(mean: Any, std: Any, schedule: Any = COSINE) -> Denoiser:
    """The exact denoiser of N(mean, std^2)."""

    def x0(x: Any, t: Any) -> Any:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        precision = (alpha / sigma) ** 2 + 1.0 / std**2
        return (alpha * x / sigma**2 + mean / std**2) / precision

    return as_denoiser(x0, schedule)


def constant(x0: Any) -> Denoiser:
    """Estimates `x0` of all states."""
    return as_denoiser(lambda x, t: jnp.broadcast_to(jnp.asarray(x0, x.dtype), x.shape), COSINE)


def flow(velocity: Any) -> Denoiser:
    """Has the velocity eps - x0 in all states of the cosine schedule."""

    def step(x: Any, t: Any, carry: Any) -> Any:
        alpha, sigma = (expand(a, x) for a in (COSINE.alpha(t), COSINE.sigma(t)))
        x0 = (x - sigma * velocity) / (alpha + sigma)
        return Denoised(x0, x0 + velocity), carry

    return Denoiser(step)


def near(actual: Denoised, expected: Denoised, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(actual.x0, expected.x0, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(actual.eps, expected.eps, rtol=1e-5, atol=atol)


def observed(y: Any, prior: Denoiser, std: Any, spread: Any, schedule: Any = SCHEDULE) -> Any:
    """log p(y | x_t) for y = x0 + noise of the standard deviation `spread`, x0 of `std`."""

    def log_probability(x: Any, t: Any) -> Any:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        # Of x0 given x_t, whose variance is that of the two together.
        variance = 1.0 / (1.0 / std**2 + (alpha / sigma) ** 2) + spread**2
        return jnp.sum(-0.5 * (y - prior(x, t).x0) ** 2 / variance, axis=-1)

    return log_probability


@jax.jit
def slopes(stds: Any, weights: Any, mean: Any) -> Any:
    """How far two states are apart at the end, over the start, for all kinds of the form
    prod p_i^weight_i; the weights are those of (s0 | s1, s2).

    In one dimension all of a difference is parallel to x0 of the condition, and the best multiple
    of the unconditional velocity is the conditional one: what APG and CFG-Zero* then are is known.
    """
    parts = [normal(mean, std, SCHEDULE) for std in stds]
    base, first, second = parts
    w1, w2 = weights
    kinds = [
        guidance.classifier_free(first, base, w1),
        guidance.autoguidance(first, base, w1),
        guidance.composed([first, second], base, [w1, w2]),
        guidance.perturbed_attention(first, second, w2),
        guidance.perturbed_attention(first, second, w2, unconditional=base, guidance=w1),
        guidance.projected(first, base, w1, SCHEDULE, parallel=0.3, momentum=0.0),
        guidance.cfg_zero(first, base, w1, SCHEDULE),
        guidance.classifier(base, observed(mean, base, stds[0], stds[1]), SCHEDULE, w2),
    ]
    times = time_grids.karras(SCHEDULE, 600, 1e-2, 300.0, final_zero=False)
    x = mean + jnp.array([[-300.0], [300.0]])
    ends = [solvers.heun(kind, SCHEDULE, times, x) - mean for kind in kinds]
    return jnp.stack([(end[1, 0] - end[0, 0]) / 600.0 for end in ends])


def test_linear_equations_end_at_the_product_of_the_stds():
    """dx/dsigma is linear: its map has the slope prod ((c_i^2 + b^2) / (c_i^2 + a^2))^(k_i / 2),
    k_i the share of each denoiser in the guided one."""
    start, end = 300.0, 1e-2
    for stds, (w1, w2) in (
        ((1.0, 0.5, 0.8), (3.0, 0.7)),
        (RNG.uniform(0.4, 1.5, 3), RNG.uniform(0.5, 3.0, 2)),
        (RNG.uniform(0.4, 1.5, 3), (RNG.uniform(1.0, 3.0), -RNG.uniform(0.2, 0.8))),
    ):
        # Of the posterior of an observation the precisions add.
        posterior = (stds[0] ** -2 + stds[1] ** -2) ** -0.5
        factors = [((s**2 + end**2) / (s**2 + start**2)) ** 0.5 for s in (*stds, posterior)]
        shares = [
            (1.0 - w1, w1, 0.0, 0.0),
            (1.0 - w1, w1, 0.0, 0.0),
            (1.0 - w1 - w2, w1, w2, 0.0),
            (0.0, 1.0 + w2, -w2, 0.0),
            (1.0 - w1, w1 + w2, -w2, 0.0),
            (0.3 * (1.0 - w1), 1.0 - 0.3 * (1.0 - w1), 0.0, 0.0),
            (0.0, 1.0, 0.0, 0.0),
            (1.0 - w2, 0.0, 0.0, w2),
        ]
        expected = [np.prod(np.power(factors, share)) for share in shares]
        with jax.enable_x64(True):
            found = slopes(jnp.asarray(stds), jnp.array([w1, w2]), RNG.normal())
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        if w2 == 0.7:
            # The published number: std .125 for w = 3.
            assert 300.0 * float(found[0]) == pytest.approx(0.125, rel=2e-3)


def test_composed_scores_add():
    """The score of N(a m, a^2 c^2 + s^2) is -(x - a m) / (a^2 c^2 + s^2), of products their sum."""
    means, stds, weights = RNG.normal(size=4), RNG.uniform(0.3, 2.0, 4), [1.7, -0.6, 0.9]
    parts = [normal(m, s) for m, s in zip(means, stds, strict=True)]
    found = jax.jit(guidance.composed(parts[1:], parts[0], weights).__call__)(X, T)
    alpha, sigma = (np.asarray(a)[:, None] for a in (COSINE.alpha(T), COSINE.sigma(T)))
    shares = [1.0 - sum(weights), *weights]
    score = -sum(
        k * (X - alpha * m) / (alpha**2 * s**2 + sigma**2)
        for k, m, s in zip(shares, means, stds, strict=True)
    )
    np.testing.assert_allclose(found.eps, -sigma * score, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alpha * found.x0 + sigma * found.eps, X, atol=1e-5)
    one = guidance.composed(parts[1:2], parts[0], [1.7])(X, T)
    near(one, guidance.classifier_free(parts[1], parts[0], 1.7)(X, T))


def test_classifier_guidance_of_a_gaussian_observation_is_the_posterior():
    """y = x0 + noise: precisions add, and the posterior is one more Gaussian with an exact field.
    The guided field must be that at every time."""
    mean, std, spread, y = RNG.normal(), 0.8, 0.6, jnp.asarray(RNG.normal(size=4), jnp.float32)
    prior = normal(mean, std)
    log_probability = observed(y, prior, std, spread, COSINE)
    precision = 1.0 / std**2 + 1.0 / spread**2
    posterior = normal((mean / std**2 + y / spread**2) / precision, precision**-0.5)
    guided = guidance.classifier(prior, log_probability, COSINE)
    near(jax.jit(guided.__call__)(X, T), posterior(X, T))
    near(guidance.classifier(prior, log_probability, COSINE, 0.0)(X, T), prior(X, T))
    # Where alpha is 0 the shift of x0 is 0 / 0; an interval leaves it out.
    with pytest.raises(ConfigError, match="log_probability leaves x0 open at times"):
        guided.check_start(1.0)
    limited = guidance.classifier(prior, log_probability, COSINE, interval=(0.0, 0.6))
    limited.check_start(1.0)
    both = limited(X, T)
    np.testing.assert_allclose(both.x0[:2], posterior(X, T).x0[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(both.x0[2], prior(X, T).x0[2])


def test_apg_with_all_of_the_parallel_part_is_classifier_free():
    pair = normal(1.0, 0.5), normal(-0.5, 2.0)
    options = {"parallel": 1.0, "momentum": 0.0}
    w = jnp.array([0.5, 3.0, 7.0])
    found = guidance.projected(*pair, w, COSINE, **options)(X, T)
    near(found, guidance.classifier_free(*pair, w)(X, T))
    # A bound far out of reach changes nothing.
    near(guidance.projected(*pair, w, COSINE, threshold=1e4, **options)(X, T), found)


def test_apg_projects_and_bounds():
    a, b = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
    pair = constant(a), constant(b)
    w = 4.0

    def moved(**options: Any) -> Any:
        denoised = guidance.projected(*pair, w, COSINE, momentum=0.0, **options)(X, T)
        alpha, sigma = (expand(f(T), X) for f in (COSINE.alpha, COSINE.sigma))
        np.testing.assert_allclose(alpha * denoised.x0 + sigma * denoised.eps, X, atol=2e-5)
        return (denoised.x0 - a) / (w - 1.0)

    orthogonal = moved(parallel=0.0)
    np.testing.assert_allclose((orthogonal * a).sum(-1), 0.0, atol=1e-5)
    # What was taken away lies along x0 of the condition.
    left = (a - b) - orthogonal
    cosine = (left * a).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(a, axis=-1)
    np.testing.assert_allclose(np.abs(cosine), 1.0, rtol=1e-5)
    np.testing.assert_allclose(moved(parallel=0.3), orthogonal + 0.3 * left, atol=1e-5)
    sizes = np.linalg.norm(a - b, axis=-1)
    bound = float(np.sort(sizes)[1])
    short = np.linalg.norm(moved(parallel=1.0, threshold=bound), axis=-1)
    np.testing.assert_allclose(short, np.minimum(sizes, bound), rtol=1e-5)


def test_apg_momentum_is_carried_through_a_solver():
    """A constant difference d is d (1 - b^n) / (1 - b) after n calls, and DDIM ends at its last
    estimate. Outside the interval nothing is added up."""
    a, b = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
    beta, w, n = -0.7, 3.0, 5
    times = time_grids.uniform(n)

    def run(count: int, **limits: Any) -> None:
        options = {"parallel": 1.0, "momentum": beta, **limits}
        denoise = guidance.projected(constant(a), constant(b), w, COSINE, **options)
        end = solvers.ddim(denoise, COSINE, times, X)
        expected = a + (w - 1.0) * (a - b) * (1.0 - beta**count) / (1.0 - beta)
        np.testing.assert_allclose(end, np.broadcast_to(expected, X.shape), rtol=1e-4, atol=1e-5)

    run(n)
    run(2, interval=(0.0, 0.5))


def test_cfg_zero_takes_the_best_multiple_of_the_unconditional_velocity():
    c, u = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
    w = jnp.array([2.0, 5.0, 0.0])

    def velocity(conditional: Any, unconditional: Any) -> Any:
        pair = flow(conditional), flow(unconditional)
        x0, eps, _ = guidance.cfg_zero(*pair, w, COSINE)(X, T)
        alpha, sigma = (expand(f(T), X) for f in (COSINE.alpha, COSINE.sigma))
        np.testing.assert_allclose(alpha * x0 + sigma * eps, X, atol=2e-5)
        return eps - x0

    found = velocity(c, u)
    # Of the multiples of u the one nearest c is subtracted: what is added is orthogonal to u.
    added = (found - c) / np.asarray(w - 1.0)[:, None]
    np.testing.assert_allclose((added * u).sum(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(velocity(c, -3.0 * u), found, atol=2e-5)
    np.testing.assert_allclose(velocity(c, c), c, atol=1e-5)
    np.testing.assert_allclose(velocity(c, 0.0 * u), np.asarray(w)[:, None] * c, atol=2e-5)


def test_cfg_zero_of_equal_branches_is_plain_and_its_first_steps_rest():
    plain, times = normal(0.5, 0.7), time_grids.uniform(6)
    denoise = guidance.cfg_zero(plain, plain, 6.0, COSINE, zero_above=times[2])
    states = solvers.ddim(denoise, COSINE, times, X, trajectory=True)[1]
    total = np.asarray(COSINE.alpha(times) + COSINE.sigma(times))[:, None, None]
    still = states / total
    np.testing.assert_allclose(still[1:3], np.broadcast_to(still[0], (2, 3, 4)), rtol=1e-5)
    rest = solvers.ddim(plain, COSINE, times[2:], states[2], trajectory=True)[1]
    np.testing.assert_allclose(states[2:], rest, rtol=1e-4, atol=1e-5)


def forbidden(x: Any, t: Any) -> Any:
    raise AssertionError


def test_weights_that_leave_nothing_are_the_guide_itself():
    """Nothing else is evaluated, nor refuses a start at alpha = 0."""
    a, b, nothing = normal(0.5, 0.8), normal(-0.2, 1.5), Denoiser(forbidden)
    assert guidance.classifier(a, forbidden, COSINE, 0.0) is a
    assert guidance.classifier(a, forbidden, COSINE, 0) is a
    assert guidance.perturbed_attention(a, nothing, 0.0) is a
    assert guidance.perturbed_attention(a, nothing, 0, unconditional=nothing, guidance=1.0) is a
    found = guidance.perturbed_attention(a, nothing, 0.0, unconditional=b, guidance=3.0)
    near(found(X, T), guidance.classifier_free(a, b, 3.0)(X, T))
    found = guidance.perturbed_attention(a, b, 2.0, unconditional=nothing, guidance=1.0)
    near(found(X, T), guidance.perturbed_attention(a, b, 2.0)(X, T))


def quadratic(x: Any, t: Any) -> Any:
    return -0.5 * jnp.sum(x**2, axis=-1)


# Name -> (three denoisers) -> the guided one.
KINDS = {
    "classifier_free": lambda a, b, c, **o: guidance.classifier_free(a, b, 2.0, **o),
    "autoguidance": lambda a, b, c, **o: guidance.autoguidance(a, b, 2.0, **o),
    "perturbed": lambda a, b, c, **o: guidance.perturbed_attention(
        a, b, 2.0, unconditional=c, guidance=3.0, **o
    ),
    "composed": lambda a, b, c, **o: guidance.composed([a, b], c, [2.0, 1.0], **o),
    "projected": lambda a, b, c, **o: guidance.projected(a, b, 2.0, COSINE, **o),
    "cfg_zero": lambda a, b, c, **o: guidance.cfg_zero(a, b, 2.0, COSINE, **o),
    "classifier": lambda a, b, c, **o: guidance.classifier(a, quadratic, COSINE, 2.0, **o),
}
OTHERS = {"perturbed": 2, "composed": 2, "classifier": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_all_keep_carries_starts_and_the_variance_of_the_guide(kind):
    asked = []

    def counter(number: int) -> Denoiser:
        def step(x: Any, t: Any, carry: Any) -> Any:
            return Denoised(carry * x, 0.5 * x, jnp.full_like(x, number)), carry + 1.0

        return Denoiser(step, lambda x: jnp.float32(10 * number), lambda t: asked.append(number))

    make, others = KINDS[kind], OTHERS.get(kind, 1)
    guided = make(counter(1), counter(2), counter(3), interval=(0.2, 0.9), rescale=0.5)
    carry = guided.init(X)
    for t in (0.95, 0.5, 0.4):
        denoised, carry = guided.step(X, t, carry)
        np.testing.assert_array_equal(denoised.variance_fraction, 1.0)
    counts = [c for c in jax.tree.leaves(carry) if jnp.ndim(c) == 0]
    assert counts[0] == 13.0
    assert sorted(int(c) % 10 for c in counts[1:]) == [2] * others
    guided.check_start(0.95)
    assert asked == [1]
    guided.check_start(0.9)
    assert sorted(asked) == [1, 1, 2, 3][: 2 + others]
    if kind == "projected":
        # The difference of the two guided calls alone.
        np.testing.assert_allclose(carry[-1], (-9.0 - 0.5 * -9.0) * X, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_all_keep_the_type_of_the_state_through_a_multistep_solver(kind, dtype):
    with jax.enable_x64(True):
        parts = normal(0.5, 0.8), normal(-0.2, 1.5), normal(0.1, 0.6)
        guided = KINDS[kind](*parts, interval=(0.1, 0.9), rescale=0.5)
        times = time_grids.uniform(4, 0.95)
        x = jax.ShapeDtypeStruct((3, 4), dtype)
        result = jax.eval_shape(lambda x: solvers.dpmpp_2m(guided, COSINE, times, x), x)
        assert result.dtype == dtype


def test_functions_are_lifted():
    a, b = (lambda x, t: 0.7 * x), (lambda x, t: -0.2 * x)
    found = guidance.classifier_free(a, b, 3.0)(X, 0.5)
    np.testing.assert_allclose(found.x0, 2.5 * X, rtol=1e-5)
    np.testing.assert_allclose(guidance.classifier_free(a, b, 1.0)(X, 0.5).x0, 0.7 * X, rtol=1e-5)
    moved = guidance.cfg_zero(a, b, 1.0, COSINE, zero_above=0.9)(X, 0.5)
    np.testing.assert_allclose(moved.x0, 0.7 * X, rtol=1e-5)


def test_thresholds_bound_what_guidance_made():
    """One step of DDIM to t = 0 returns x0 itself; eps keeps the guided direction."""
    high, low = jnp.array([0.9, -0.9, 0.3, 0.0]), jnp.array([0.1, -0.2, 0.2, 0.4])
    guided = guidance.classifier_free(constant(high), constant(low), 3.0)
    for denoise, expected in (
        (thresholding.clip_x0(guided), np.clip(3.0 * high - 2.0 * low, -1.0, 1.0)),
        (thresholding.dynamic_threshold(guided, 0.999, 10.0), (3.0 * high - 2.0 * low) / 2.5),
    ):
        end = solvers.ddim(denoise, COSINE, np.array([0.7, 0.0]), X)
        np.testing.assert_allclose(end, np.broadcast_to(expected, X.shape), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(denoise(X, 0.7).eps, guided(X, 0.7).eps, rtol=1e-6)


BOTH = normal(0.0, 1.0), normal(1.0, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guidance.projected(*BOTH, 2.0, COSINE, parallel=1.5), "parallel=1.5 must be"),
        (lambda: guidance.projected(*BOTH, 2.0, COSINE, threshold=-1.0), "threshold=-1.0"),
        (lambda: guidance.projected(*BOTH, 2.0, COSINE, momentum=-1.0), "momentum=-1.0 must lie"),
        (lambda: guidance.cfg_zero(*BOTH, 2.0, COSINE, zero_above=1.2), "zero_above=1.2 must"),
        (lambda: guidance.composed(BOTH, None, [1.0, 2.0]), "unconditional=None: expected a"),
        (lambda: guidance.composed([], BOTH[0], []), "weights has 0 entries for 0 conditions"),
        (lambda: guidance.composed(BOTH, BOTH[0], [1.0]), "weights has 1 entries for 2"),
        (
            lambda: guidance.perturbed_attention(*BOTH, 1.0, guidance=3.0),
            "guidance=3.0 needs the unconditional denoiser; expected 1",
        ),
        (
            lambda: guidance.classifier(BOTH[0], lambda x, t: x, COSINE)(X, 0.5),
            "log_probability gives shape (3, 4); expected (3,), one number an example",
        ),
        (lambda: classifier_free_tokens(*BOTH, 2.0, rescale=0.5), "guidance_rescale=0.5"),
        (lambda: classifier_free_tokens(*BOTH, 2.0, interval=(0.6, 0.3)), "interval=(0.6, 0.3)"),
        *(
            (lambda make=make: make(*BOTH, BOTH[0], interval=(0.6, 0.3)), "interval=(0.6, 0.3)")
            for make in KINDS.values()
        ),
        *(
            (lambda make=make: make(*BOTH, BOTH[0], rescale=2.0), "rescale=2.0 must be")
            for make in KINDS.values()
        ),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)
