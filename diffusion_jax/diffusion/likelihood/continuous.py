"""The variational bound of a Gaussian process in infinitely many steps (Kingma et al. 2021, VDM).

    -log p(x0) <= KL(q(x_1 | x0) || p(x_1)) + E[-log p(x0 | x_first)]
                  + 1/2 int E |x0 - x0_hat(x_t, t)|^2 d snr,      snr = alpha^2 / sigma^2      (1)

from the snr of t = 1 to that of the first time (their equations 11, 15 and 18): besides the ends it
knows nothing of the schedule. With x0_hat = E[x0 | x_t] it is the entropy (I-MMSE, Guo et al. 2005)
but for what the decoder at the first time says too little.

The integral is a mean over noise levels, drawn by one of three proposals that give each interval of
t the share that some S(snr) rises over it:

    time      uniform in t, whatever the schedule makes of that                        (eq. 17)
    logsnr    S = log snr; both ends must be finite
    gaussian  S = log(1 + c^2 snr), c = `sigma_data`: a term without variance between noise levels
              for Gaussian data of that width, and finite at snr = 0

In the latter two, t is where the schedule has the level drawn: importance sampling in t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.likelihood.arguments import check_count, check_positive, given_keys
from diffusion_jax.diffusion.likelihood.decoders import Decoder, Density
from diffusion_jax.diffusion.likelihood.discrete import prior_term, sum_elements
from diffusion_jax.diffusion.processes.gaussian import Gaussian
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.errors import ConfigError, unknown_name

PROPOSALS = ("time", "logsnr", "gaussian")
"""Names of the ways in which noise levels are drawn."""

SPREADS = ("independent", "stratified", "batch")
"""Names of the ways in which `uniforms` spreads its numbers."""


class ContinuousBound(NamedTuple):
    """The bound (1) term by term, nats per example; each row of `diffusion` estimates its term."""

    prior: Float[Array, " batch"]
    diffusion: Float[Array, "draws batch"]
    reconstruction: Float[Array, " batch"]

    @property
    def total(self) -> Float[Array, " batch"]:
        """The bound on -log p(x0)."""
        return self.prior + self.diffusion.mean(0) + self.reconstruction


class Levels(NamedTuple):
    """Noise levels drawn, and what makes squared errors a mean of (1)."""

    t: Array
    factor: Array
    """On |x0 - x0_hat|^2; of the shape of t."""


def levels(
    u: Float[Array, "*shape"],
    schedule: Schedule,
    *,
    first_time: Any = 1e-3,
    proposal: str = "gaussian",
    sigma_data: Number = 1.0,
) -> Levels:
    """Levels between the first time and t = 1 for numbers u, uniform in [0, 1).

    Raises:
      ValueError: numbers that are not in [0, 1]; an unknown proposal; a first time that is not
        between 0 and 1, or without noise; "logsnr" where alpha(1) = 0; a `sigma_data` that is not
        positive.
    """
    check_levels(schedule, first_time, proposal, sigma_data)
    _check_numbers(u)
    if proposal == "time":
        t = first_time + (1.0 - first_time) * u
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        slope = alpha * (alpha * schedule.dsigma(t) - sigma * schedule.dalpha(t)) / sigma**3
        return Levels(t, (1.0 - first_time) * jnp.asarray(slope, u.dtype))
    ends = [_rise(schedule, t, proposal, sigma_data) for t in (1.0, first_time)]
    low, high = (e if isinstance(e, jax.Array) else float(e) for e in ends)
    rise = low + (high - low) * u
    logsnr = rise
    if proposal == "gaussian":
        # log(e^S - 1) - log c^2, without overflow.
        logsnr = rise + jnp.log(-jnp.expm1(-rise)) - 2.0 * jnp.log(sigma_data)
    t = jnp.asarray(schedule.t_from_logsnr(logsnr), u.dtype)
    alpha, sigma = jnp.asarray(schedule.alpha(t)), jnp.asarray(schedule.sigma(t))
    per_rise = (alpha / sigma) ** 2
    if proposal == "gaussian":
        per_rise = per_rise + sigma_data**-2.0
    return Levels(t, 0.5 * (high - low) * per_rise)


def uniforms(
    key: Array, batch: Count, draws: Count, spread: str = "stratified", dtype: Any = jnp.float32
) -> Float[Array, "draws batch"]:
    """Numbers uniform in [0, 1) for `levels`, `draws` of them for each example.

    Args:
      key: as for the solvers: one, or one for each example.
      spread: "independent"; "stratified", one draw of an example in each of `draws` cells; "batch",
        evenly over all examples and draws from one number (Kingma et al. 2021, appendix I.1), where
        the numbers of an example depend on the others.

    Raises:
      ValueError: an unknown spread, or fewer than one draw.
    """
    check_count("draws", draws)
    if spread not in SPREADS:
        raise ConfigError(unknown_name("spread", spread, SPREADS))
    keys = given_keys("uniforms", key, int(batch))
    if spread == "batch":
        places = jnp.arange(draws * batch, dtype=dtype).reshape(draws, batch) / (draws * batch)
        return jnp.mod(places + jax.random.uniform(keys[0], (), dtype), 1.0)
    u = jax.vmap(lambda k: jax.random.uniform(k, (int(draws),), dtype))(keys).T
    if spread == "independent":
        return u
    cells = (jnp.arange(draws, dtype=dtype)[:, None] + u) / draws
    return jnp.minimum(cells, 1.0 - float(jnp.finfo(dtype).epsneg))


def continuous_bound(
    denoise: stepping.Denoise,
    schedule: Schedule,
    x0: stepping.Start,
    *,
    key: Array,
    first_time: Any = 1e-3,
    draws: Count = 1,
    spread: str = "stratified",
    u: Float[Array, "draws batch"] | None = None,
    proposal: str = "gaussian",
    sigma_data: Number = 1.0,
    decoder: Decoder | None = None,
) -> ContinuousBound:
    """The bound (1) of `x0` [batch, ...], by `draws` noise levels an example.

    `denoise` gives x0_hat = E[x0 | x_t], called once a draw. `decoder` is that at the first time,
    `Density` by default, with which the bound may be negative; its noise is drawn once. `u` are
    numbers in [0, 1) of one's own in place of those that `draws` and `spread` tell. The value is
    unbiased whatever the proposal; how much it varies is not. One scan over the draws.

    Raises:
      ValueError: see `levels` and `uniforms`; `u` of another batch.
    """
    x0 = stepping.start(x0)
    check_levels(schedule, first_time, proposal, sigma_data)
    keys = given_keys("continuous_bound", key, len(x0))
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    dtype = stepping.compute_dtype(x0)
    x0 = x0.astype(dtype)
    if u is None:
        u = uniforms(keys[0], len(x0), draws, spread, dtype)
    elif u.ndim != 2 or u.shape[1] != len(x0):
        raise ConfigError(f"u has shape {u.shape}; expected [draws, {len(x0)}]")
    else:
        _check_numbers(u)
    process, denoiser = Gaussian(schedule), as_denoiser(denoise)

    def normal(keys: Array, fold: Any) -> Array:
        def one(k: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(k, fold), x0.shape[1:], dtype)

        return jax.vmap(one)(keys)

    def term(carry: None, row: Any) -> tuple[None, Array]:
        number, u = row
        t, factor = levels(
            u, schedule, first_time=first_time, proposal=proposal, sigma_data=sigma_data
        )
        x_t = jnp.asarray(process.forward(x0, t, normal(keys[1], number)))
        squared = (x0 - denoiser(x_t, t).x0) ** 2
        return carry, factor * sum_elements(squared)

    rows = (jnp.arange(len(u)), u.astype(dtype))
    _, diffusion = jax.lax.scan(term, None, rows)
    ends = schedule.alpha(first_time), schedule.sigma(first_time)
    last = (decoder or Density())(x0, normal(keys[2], 0), *ends)
    prior = jnp.broadcast_to(jnp.asarray(prior_term(process, x0), dtype), (len(x0),))
    return ContinuousBound(prior, diffusion, sum_elements(last))


def check_levels(schedule: Schedule, first_time: Any, proposal: str, sigma_data: Any) -> None:
    """Raises what `levels` raises, on the host; what is traced is not looked into."""
    if proposal not in PROPOSALS:
        raise ConfigError(unknown_name("proposal", proposal, PROPOSALS))
    check_positive("sigma_data", sigma_data)
    if isinstance(first_time, jax.Array):
        return
    if not isinstance(first_time, Number) or not 0.0 < first_time < 1.0:
        raise ConfigError(f"first_time={first_time!r}; expected a time between 0 and 1")
    ends: list[Any] = [schedule.sigma(first_time), schedule.alpha(1.0)]
    if any(isinstance(end, jax.Array) for end in ends):
        return
    if not ends[0] > 0.0:
        raise ConfigError(f"first_time={first_time} has no noise; expected a later one")
    if proposal == "logsnr" and not ends[1] > 0.0:
        raise ConfigError(
            "proposal='logsnr': this schedule has alpha(1) = 0, where log snr is infinite; "
            "expected 'gaussian' or 'time'"
        )


def _check_numbers(u: Any) -> None:
    """Raises ConfigError for `u` outside [0, 1]; what is traced is not looked into."""
    if isinstance(u, Tracer):
        return
    wrong = ~((np.asarray(u) >= 0.0) & (np.asarray(u) <= 1.0))
    if wrong.any():
        raise ConfigError(f"u={np.asarray(u)[wrong][0]:.4g}; expected numbers from 0 to 1")


def _rise(schedule: Schedule, t: Any, proposal: str, sigma_data: Number) -> Any:
    """S at t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    xp: Any = jnp if isinstance(alpha, jax.Array) else np
    if proposal == "logsnr":
        return 2.0 * (xp.log(alpha) - xp.log(sigma))
    return xp.log1p((sigma_data * alpha / sigma) ** 2)
