"""What all solvers share: the coefficients' ingredients, the noise, and the one scan over steps.

A step goes from t to s < t. Everything a solver multiplies with is made of four ratios that stay
finite where alpha_t = 0 (pure noise) and where sigma_s = 0 (data):

    sigma_s/sigma_t,  alpha_s,  e^-h = alpha_t sigma_s / (alpha_s sigma_t),  1 - e^-2h,

h being the rise of log(alpha/sigma) over the step. They are computed on the host in float64, and
cast once; where the schedule's parameters are traced they are computed by JAX instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.processes.categorical import TokenProcess
from diffusion_jax.diffusion.processes.protocol import Process
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError

Denoise = Denoiser | Callable[[Any, Any], Any]
State = Float[Array, "batch *shape"]
Start = Float[Array | np.ndarray, "..."]
Tokens = Int[Array, "batch *shape"]
TokenStart = Int[Array | np.ndarray, "..."]
# (step, draw, shape) -> a standard normal draw; step and draw are Python integers.
Noise = Callable[[int, int, tuple[int, ...]], Any]
Result = State | tuple[State, Float[Array, "steps_plus_1 batch *shape"]]
TokenResult = Tokens | tuple[Tokens, Int[Array, "steps_plus_1 batch *shape"]]


class Steps(NamedTuple):
    """The levels of all steps, each [steps]: NumPy float64, or JAX for a traced schedule."""

    t: Any
    s: Any
    alpha_t: Any
    alpha_s: Any
    sigma_t: Any
    sigma_s: Any

    @property
    def xp(self) -> ModuleType:
        """The module that computed the levels, and computes with them."""
        return np if isinstance(self.sigma_t, np.ndarray) else jnp

    @property
    def sigma_ratio(self) -> Any:
        """sigma_s/sigma_t."""
        return self.sigma_s / self.sigma_t

    @property
    def decay(self) -> Any:
        """e^-h: 0 on a step from alpha_t = 0 or to sigma_s = 0."""
        return (self.alpha_t * self.sigma_s) / (self.alpha_s * self.sigma_t)

    @property
    def fresh(self) -> Any:
        """1 - e^-2h, the share of a state's noise that a stochastic step renews."""
        return (1.0 - self.decay) * (1.0 + self.decay)

    @property
    def rise(self) -> Any:
        """h, infinite where `decay` is 0."""
        xp = self.xp
        decay = self.decay
        return xp.where(decay > 0.0, -xp.log(xp.where(decay > 0.0, decay, 1.0)), xp.inf)


def steps_of(denoiser: Denoiser, schedule: Schedule, times: Any) -> Steps:
    """Checks `times`, and that the denoiser can start there; evaluates the schedule there once."""
    if not isinstance(times, Tracer):
        times = check_times(times)
        denoiser.check_start(times[0])
    alpha: Any = schedule.alpha(times)
    sigma: Any = schedule.sigma(times)
    if isinstance(alpha, jax.Array) or isinstance(sigma, jax.Array):
        alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
    elif not (sigma[:-1] > 0.0).all():
        k = int(np.argmin(sigma[:-1] > 0.0))
        raise ConfigError(f"times[{k}]={times[k]} has sigma={sigma[k]}; only the last may have 0")
    return Steps(times[:-1], times[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:])


def prepare(
    denoise: Denoise, schedule: Schedule, times: Any, x: Start
) -> tuple[State, Denoiser, Steps]:
    """What a solver begins with: `x` by `start`, the denoiser, and its steps by `steps_of`."""
    state = start(x)
    denoiser = as_denoiser(denoise, schedule)
    return state, denoiser, steps_of(denoiser, schedule, times)


def strided(schedule: Schedule, steps: Steps, stride: Count | None) -> Steps:
    """`steps` ending `stride` entries of the schedule's table below their start, not at the next
    time; below the first entry, at the last time. None leaves them."""
    if stride is None:
        return steps
    if not (stride >= 1 and stride % 1 == 0):
        raise ConfigError(f"stride={stride}; expected 1 or more whole entries of the table")
    xp, size = steps.xp, schedule.num_steps
    entries = xp.round(steps.t * size) - int(stride)
    s = xp.where(entries >= 1.0, entries / size, steps.s[-1])
    return steps._replace(s=s, alpha_s=schedule.alpha(s), sigma_s=schedule.sigma(s))


def start(x: Start) -> State:
    """`x` as a JAX array with a batch axis."""
    x = jnp.asarray(x)
    if x.ndim < 1:
        raise ConfigError(f"x has shape {x.shape}; expected [batch, ...]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ConfigError(f"x has dtype {x.dtype}; expected a floating-point type")
    return x


def start_of(process: Process, x: Any) -> Any:
    """`start`; for a process of tokens, whole numbers with a batch axis."""
    if not isinstance(process, TokenProcess):
        return start(x)
    x = jnp.asarray(x)
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ConfigError(
            f"x has shape {x.shape} and dtype {x.dtype}; expected tokens [batch, ...], of an "
            "integer type"
        )
    return x


def compute_dtype(x: State | Tokens) -> Any:
    """The type of the coefficients and of a step's arithmetic: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def state_dtype(x: State | Tokens) -> Any:
    """The type of the state between steps: that of the arithmetic; tokens stay whole numbers."""
    return compute_dtype(x) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


class Draws(NamedTuple):
    """Where a solver's noise comes from: `keys` [batch], or else `recorded` [steps, batch, ...]."""

    keys: Array | None
    recorded: Array | None

    def rows(self, steps: int) -> tuple[Array, Array | None]:
        """What the scan hands to `draw`, one row a step."""
        return jnp.arange(steps), self.recorded

    def draw(
        self,
        row: tuple[Array, Array | None],
        shape: tuple[int, ...],
        dtype: Any,
        sampler: Callable[..., Array] = jax.random.normal,
    ) -> Array:
        """The step's noise: recorded, or sampler(key, example shape, dtype) for every example."""
        step, recorded = row
        if recorded is not None:
            return recorded.astype(dtype)

        def one(key: Any) -> Array:
            return sampler(jax.random.fold_in(jax.random.fold_in(key, step), 0), shape[1:], dtype)

        return jax.vmap(one)(self.keys)


def draws(
    solver: str,
    x: State | Tokens,
    steps: int,
    key: Array | None,
    noise: Noise | None,
    needed: Any = None,
) -> Draws:
    """Checks the noise arguments. A recorded draw is asked for, on the host and before the scan,
    only for the steps that add noise (`needed` [steps], where known), and is held in memory."""
    if noise is None:
        if key is None:
            raise ConfigError(f"key=None; {solver} draws noise: give key (or noise, to replay it)")
        return Draws(example_keys(key, x.shape[0]), None)
    ask = needed if isinstance(needed, np.ndarray) else np.ones(steps, bool)
    dtype = compute_dtype(x)
    recorded = []
    for step in range(steps):
        value = jnp.asarray(noise(step, 0, x.shape) if ask[step] else jnp.zeros(x.shape), dtype)
        if value.shape != x.shape:
            raise ConfigError(f"noise({step}, 0, ...) has shape {value.shape}; expected {x.shape}")
        recorded.append(value)
    return Draws(None, jnp.stack(recorded))


def example_keys(key: Array, batch: int) -> Array:
    """[batch] typed keys: `key` itself if it is one per example, else fold_in(key, i)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == (batch,):
        return key
    if key.shape != ():
        raise ConfigError(f"key has shape {key.shape}; expected one key or one for each of {batch}")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def scan_steps(
    update: Callable, x: Any, init: Callable[[Any], Any], rows: Any, trajectory: bool
) -> Any:
    """Runs update(x, history, row) -> (x, history) over the rows; the final x, or (x, states).

    The first history is init(x). Both see `x` in `state_dtype`; it is returned, like `states`
    [steps + 1, ...], in its own type.
    """
    return scan_history(update, x, init, rows, trajectory)[0]


def scan_history(
    update: Callable, x: Any, init: Callable[[Any], Any], rows: Any, trajectory: bool
) -> tuple[Any, Any]:
    """`scan_steps`, and the last history."""
    dtype = x.dtype
    first = x.astype(state_dtype(x))

    def body(carry: Any, row: Any) -> Any:
        state, history = update(carry[0], carry[1], row)
        state = state.astype(carry[0].dtype)
        return (state, history), (state.astype(dtype) if trajectory else None)

    (final, history), states = jax.lax.scan(body, (first, init(first)), rows)
    final = final.astype(dtype)
    if not trajectory:
        return final, history
    return (final, jnp.concatenate([x[None], states])), history


def cast(x: State | Tokens, *coefficients: Any) -> tuple[Array, ...]:
    """Coefficients as JAX arrays of the step's type."""
    dtype = compute_dtype(x)
    return tuple(jnp.asarray(c, dtype) for c in coefficients)


def by_slot(steps: Steps, weights: Any) -> tuple[Any, np.ndarray]:
    """Weights [steps, K] of the newest value, the one before, ... as those of the slots that
    `remember` keeps them in, and the slot [steps] of each step's own value."""
    count = weights.shape[-1]
    slots = np.arange(len(weights)) % count
    ages = (slots[:, None] - np.arange(count)) % count
    return steps.xp.take_along_axis(weights, steps.xp.asarray(ages), axis=-1), slots


def remember(past: tuple[Array, ...], value: Array, slot: Any) -> tuple[Array, ...]:
    """`past` with `value` in this slot, in place of the oldest. The values stay where they are:
    handing each one on to the next would make XLA copy them all in every step."""
    return tuple(jnp.where(slot == j, value, old) for j, old in enumerate(past))


def blank(x: Array, count: int) -> tuple[Array, ...]:
    """What `remember` begins with."""
    return (jnp.zeros_like(x),) * count


def combined(weights: Any, values: tuple[Array, ...]) -> Array:
    """The sum of weights[j] values[j]."""
    total = weights[0] * values[0]
    for j, value in enumerate(values[1:], 1):
        total = total + weights[j] * value
    return total
