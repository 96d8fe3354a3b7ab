"""The variational bound on -log p(x0), for any noising process, in nats.

    -log p(x0) <= KL(q(x_1 | x0) || prior)
                  + sum over steps of E_q(x_t | x0) KL(q(x_s | x_t, x0) || p(x_s | x_t))

(Sohl-Dickstein et al. 2015, equations 10-14; Ho et al. 2020, equation 5), the last step to s = 0
being -log p(x0 | x_t). Each expectation is estimated at one x_t of its own, which is unbiased.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Elements
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.processes.binomial import Binomial
from diffusion_jax.diffusion.processes.protocol import Process
from diffusion_jax.diffusion.schedule_base import Values as Time
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError

MOST_STATES = 2**18
"""Beyond this `factorised_bound` refuses; so many of 20 bits take 100 MB and a second a step."""


class Bound(NamedTuple):
    """A bound term by term, nats per example; `steps[k]` belongs to times[k] -> times[k + 1]."""

    prior: Float[Array, " batch"]
    steps: Float[Array, "steps batch"]

    @property
    def total(self) -> Float[Array, " batch"]:
        """The bound on -log p(x0)."""
        return self.prior + self.steps.sum(0)


def variational_term(
    process: Process, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time
) -> Float[Array | np.ndarray, " batch"]:
    """One step's term [batch], summed over the elements of an example; t and s scalars or [batch].

    With (t, s) from `random_step` over K steps, K times this plus `prior_term` is an unbiased
    estimate of the bound, and so a training loss.
    """
    return sum_elements(process.kl(x0, x_t, x0_hat, t, s))


def prior_term(process: Process, x0: Elements) -> Float[Array | np.ndarray, " batch"]:
    """KL(q(x_1 | x0) || prior) [batch], summed over the elements of an example."""
    return sum_elements(process.prior_kl(x0))


def random_step(
    times: Any, u: Float[Array, " batch"]
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """The (t, s) of steps of `times` chosen with equal chance by u, uniform in [0, 1)."""
    grid = jnp.asarray(check_times(times), u.dtype)
    count = len(grid) - 1
    # u * count may round up to count.
    k = jnp.minimum((u * count).astype(int), count - 1)
    return grid[k], grid[k + 1]


def variational_bound(
    denoise: stepping.Denoise,
    process: Process,
    times: Any,
    x0: stepping.Start | stepping.TokenStart,
    *,
    key: Array | None = None,
    noise: stepping.Noise | None = None,
) -> Bound:
    """The bound of `x0` [batch, ...] over all steps of `times`, one draw of x_t a step.

    `denoise` gives x0_hat = E[x0 | x_t]; it is called once a step and without memory of the others.
    `key` and `noise` are those of the solvers. Over a Gaussian process the term of a step to t=0 is
    a density's, so that the bound may be negative. One scan; raises ValueError for bad times.
    """
    state = stepping.start_of(process, x0)
    denoiser, times = as_denoiser(denoise), check_times(times)
    denoiser.check_start(times[0])
    draws = stepping.draws("variational_bound", state, len(times) - 1, key, noise)
    dtype = stepping.compute_dtype(state)
    state = state.astype(stepping.state_dtype(state))

    def term(carry: None, row: Any) -> Any:
        (t, s), drawn = row
        x_t = process.forward(state, t, draws.draw(drawn, state.shape, dtype, process.noise))
        return carry, variational_term(process, state, x_t, denoiser(x_t, t).x0, t, s)

    rows = (stepping.cast(state, times[:-1], times[1:]), draws.rows(len(times) - 1))
    _, steps = jax.lax.scan(term, None, rows)
    return Bound(jnp.asarray(prior_term(process, state), dtype), steps)


def factorised_bound(
    sequences: Float[np.ndarray, "count bits"],
    process: Binomial,
    times: Any,
    chances: Float[np.ndarray, " count"] | None = None,
) -> float:
    """The expected bound of the best bitwise model of bit `sequences`, exactly.

    Nats a sequence, in float64: what `variational_bound` averages to with the exact marginals
    x0_hat = p(x0 = 1 | x_t), the optimum for reverse kernels that are independent between bits. It
    exceeds their entropy by the floor that such kernels cannot go below at these times. `chances`
    are those of the sequences, 1 in sum; None for equal ones, of entropy log(count).

    Bits that agree over all sequences are exchangeable, so that the expectation runs over counts of
    ones, not over 2^bits states. Raises ValueError where even those are too many to enumerate, see
    `noisy_states`.
    """
    times = check_times(times)
    if chances is None:
        chances = np.full(len(sequences), 1.0 / len(sequences))
    number = noisy_states(sequences)
    if number > MOST_STATES:
        raise ConfigError(
            f"sequences have {number:.3g} distinguishable noisy states; expected at most"
            f" {MOST_STATES} (estimate the bound by variational_bound instead)"
        )
    columns, sizes = np.unique(np.asarray(sequences, np.float64), axis=1, return_counts=True)
    axes = np.meshgrid(*(np.arange(n + 1.0) for n in sizes), indexing="ij")
    ones = np.stack([axis.ravel() for axis in axes], axis=1)
    data = columns, sizes, np.log(chances)
    terms = [_expected_term(*data, ones, process, t, s) for t, s in itertools.pairwise(times)]
    return float(sum(terms) + chances @ (process.prior_kl(columns) @ sizes))


def noisy_states(sequences: Float[np.ndarray, "count bits"]) -> float:
    """How many states `factorised_bound` of these sequences goes through."""
    _, sizes = np.unique(np.asarray(sequences), axis=1, return_counts=True)
    return float(np.prod(sizes + 1.0))


def _expected_term(
    columns: np.ndarray,
    sizes: np.ndarray,
    log_chances: np.ndarray,
    ones: np.ndarray,
    process: Binomial,
    t: float,
    s: float,
) -> float:
    """E KL over x_t and x0. columns [count, groups], sizes [groups], ones [states, groups]."""
    zeros = sizes - ones
    probability = process.marginal(columns, t).mean
    log_joint = ones @ np.log(probability).T + zeros @ np.log1p(-probability).T
    log_joint += _log_choose(sizes, ones).sum(1, keepdims=True) + log_chances
    joint = np.exp(log_joint)
    mass = joint.sum(1, keepdims=True)
    x0_hat = (joint / mass) @ columns
    total = 0.0
    for x_t, count in ((1.0, ones), (0.0, zeros)):
        state = np.full_like(x0_hat, x_t)
        for x0, share in ((1.0, x0_hat), (0.0, 1.0 - x0_hat)):
            nats = process.kl(np.full_like(x0_hat, x0), state, x0_hat, t, s)
            total += float((mass * share * count * nats).sum())
    return total


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n.max() + 1.0)))])
    n, k = n.astype(int), k.astype(int)
    return log_factorial[n] - log_factorial[k] - log_factorial[n - k]


def sum_elements(nats: Any) -> Any:
    """[batch] sums over the elements of each example."""
    return nats.reshape(nats.shape[0], -1).sum(1)
