"""Pseudo numerical methods (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models")."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.lms import adams_weights
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, Steps
from diffusion_jax.errors import ConfigError, unknown_name

VALUES = ("eps", "v")

# Adams-Bashforth on equal steps, newest first; row m for m + 1 values.
_ADAMS = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [3.0 / 2.0, -1.0 / 2.0, 0.0, 0.0],
        [23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0, 0.0],
        [55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    ]
)


def pndm(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    prk: bool | None = None,
    stride: Count | None = None,
    values: str = "eps",
    corrected: bool = False,
) -> Result:
    """PNDM (`prk`; None from 4 steps on), or PLMS: linear multistep in eps, moved as DDIM moves x.

    x_s = (alpha_s/alpha_t) x_t + (sigma_s - sigma_t alpha_s/alpha_t) e (Liu et al. 2022, equation
    11), e = (55 e_k - 59 e_(k-1) + 37 e_(k-2) - 9 e_(k-3))/24 (equation 12): Adams-Bashforth for
    equal steps, on whatever steps there are. Uses eps of the denoiser, the one predicted even where
    x0 is clipped. Deterministic, key and noise unused. values="v" combines v = alpha eps - sigma x0
    instead, as libraries do for networks that predict it; since the transfer turns v by itself,
    this is of first order.

    Start-up rule. With `prk` the first three steps are pseudo Runge-Kutta (algorithm 1): four
    evaluations each, two of them half a step of t on, weights 1/6, 1/3, 1/3, 1/6; the rest take
    one. Without, the first step is repeated with the mean of eps at both its ends (two evaluations,
    an Euler step if it is the only one), the second uses two values, the third three. A first step
    from alpha_t = 0, where eps alone does not move the state, is DDIM's, of one evaluation. The
    step to sigma_s = 0 is as any other: the result is not itself an x0 of the denoiser.

    The published weights are of fourth order for equal steps of sigma/alpha alone, elsewhere of
    second where neighbouring steps are nearly equal. `corrected` takes those of the steps there
    are, `lms`'s, and the half step at half of sigma/alpha: fourth order, or third without `prk`.

    `stride`, entries of the schedule's table: libraries transfer over this many entries, whatever
    the next time is, and halve steps to whole entries. None takes the times as they are.

    Raises ConfigError for bad times, fewer than 4 steps with `prk`, a stride below 1, unknown
    values, or `corrected` with a stride, with values="v" or from alpha = 0.
    """
    del key, noise
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    prk = len(steps.t) >= 4 if prk is None else prk
    _check(steps, prk, stride, values, corrected)
    return _run(_Parts(denoiser, schedule, values, corrected), steps, x, prk, stride, trajectory)


def _check(steps: Steps, prk: bool, stride: Count | None, values: str, corrected: bool) -> None:
    if values not in VALUES:
        raise ConfigError(unknown_name("values", values, VALUES))
    count = len(steps.t)
    if prk and count < 4:
        raise ConfigError(f"prk=True takes 4 steps or more, times has {count}: set prk=False")
    if corrected and (stride is not None or values != "eps"):
        raise ConfigError(
            f"corrected=True takes values='eps' and no stride, got values={values!r}, "
            f"stride={stride}"
        )
    if corrected and steps.xp is np and steps.alpha_t[0] <= 0.0:
        raise ConfigError(
            f"corrected=True divides by alpha, which is 0 at times[0]={steps.t[0]:g}: use a time "
            "grid that starts below"
        )


def _run(
    parts: _Parts, steps: Steps, x: Array, prk: bool, stride: Count | None, trajectory: bool
) -> Any:
    xp, count = steps.xp, len(steps.t)
    plain = (steps.alpha_t <= 0.0) & (parts.values == "eps")
    signal = steps._replace(alpha_t=xp.where(plain, 1.0, steps.alpha_t))
    correct, start_rows = (parts.runge_kutta if prk else parts.repeated)(signal, x, stride)
    signal = stepping.strided(parts.schedule, signal, stride)

    def update(x: Array, history: Any, row: Any) -> Any:
        (t, alpha, sigma, alpha_s, sigma_s, *move), weights, slot, starts, plain, start_row = row
        carry, known = history
        denoised, carry = parts.denoiser.step(x, t, carry)
        value = parts.value(denoised, alpha, sigma)
        known = stepping.remember(known, value, slot)

        def multistep(carry: Any) -> Any:
            x_s = _transfer(x, stepping.combined(weights, known), *move)
            return jnp.where(plain, alpha_s * denoised.x0 + sigma_s * denoised.eps, x_s), carry

        def first(carry: Any) -> Any:
            return correct(x, value, carry, move, start_row)

        x, carry = jax.lax.cond(starts, first, multistep, carry)
        return x, (carry, known)

    def init(x: Array) -> Any:
        return parts.denoiser.init(x), stepping.blank(x, 4)

    levels = (steps.t, steps.alpha_t, steps.sigma_t, signal.alpha_s, signal.sigma_s)
    weights, slots = stepping.by_slot(steps, parts.weights(signal))
    starts = xp.asarray(np.arange(count) < (3 if prk else int(count > 1)))
    rows = (
        stepping.cast(x, *levels, *parts.transfers(signal)),
        *stepping.cast(x, weights),
        slots,
        starts & ~plain,
        plain,
        start_rows,
    )
    return stepping.scan_steps(update, x, init, rows, trajectory)


def _transfer(x: Array, value: Array, to_x: Any, to_value: Any) -> Array:
    return to_x * x + to_value * value


class _Parts(NamedTuple):
    """What a step is made of."""

    denoiser: Denoiser
    schedule: Schedule
    values: str
    corrected: bool

    def value(self, denoised: Denoised, alpha: Any, sigma: Any) -> Array:
        """eps, or v."""
        if self.values == "eps":
            return denoised.eps
        return alpha * denoised.eps - sigma * denoised.x0

    def evaluated(self, x: Array, t: Any, alpha: Any, sigma: Any, carry: Any) -> tuple[Array, Any]:
        """The value of the denoiser at (x, t)."""
        denoised, carry = self.denoiser.step(x, t, carry)
        return self.value(denoised, alpha, sigma), carry

    def transfers(self, steps: Steps) -> tuple[Any, Any]:
        """What multiplies x and the value in equation 11, each [steps]."""
        if self.values == "eps":
            ratio = steps.alpha_s / steps.alpha_t
            return ratio, steps.sigma_s - steps.sigma_t * ratio
        size = steps.alpha_t**2 + steps.sigma_t**2
        along = steps.alpha_s * steps.alpha_t + steps.sigma_s * steps.sigma_t
        across = steps.sigma_s * steps.alpha_t - steps.sigma_t * steps.alpha_s
        return along / size, across / size

    def weights(self, steps: Steps) -> Any:
        """[steps, 4], what multiplies this value and those before it; the sum is 1."""
        if not self.corrected:
            return _ADAMS[np.minimum(np.arange(len(steps.t)), 3)]
        u_t, u_s = steps.sigma_t / steps.alpha_t, steps.sigma_s / steps.alpha_s
        return adams_weights(steps.xp, u_t, u_s, 4) / (u_s - u_t)[:, None]

    def repeated(self, steps: Steps, x: Array, stride: Count | None) -> Any:
        """The first step again, with the mean of the values at both ends."""
        back = steps
        if stride is not None:
            # Libraries go back one stride from the second time to redo the step.
            t = steps.xp.minimum(steps.s + stride / self.schedule.num_steps, 1.0)
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            back = steps._replace(t=t, alpha_t=alpha, sigma_t=sigma)

        def correct(x: Array, value: Array, carry: Any, move: Any, row: Any) -> Any:
            s, alpha, sigma, *redo = row
            second, carry = self.evaluated(_transfer(x, value, *move), s, alpha, sigma, carry)
            return _transfer(x, 0.5 * (value + second), *redo), carry

        levels = (steps.s, steps.alpha_s, steps.sigma_s)
        return correct, stepping.cast(x, *levels, *self.transfers(back))

    def runge_kutta(self, steps: Steps, x: Array, stride: Count | None) -> Any:
        """Algorithm 1: two values in the middle of t and one at the end, then the step."""
        half = 0.5 * (steps.t - steps.s)
        if stride is not None:
            # Steps after the third have no use for theirs, but must not leave the schedule.
            half = steps.xp.minimum((stride // 2) / self.schedule.num_steps, steps.t)

        def to(s: Any) -> Steps:
            return steps._replace(
                s=s, alpha_s=self.schedule.alpha(s), sigma_s=self.schedule.sigma(s)
            )

        # In whole entries the first half step may end one entry above where it is evaluated.
        middle, reached = to(steps.xp.minimum(steps.s + half, 1.0)), to(steps.t - half)
        if self.corrected:
            u = 0.5 * (steps.sigma_t / steps.alpha_t + steps.sigma_s / steps.alpha_s)
            middle = reached = to(self.schedule.t_from_logsnr(-2.0 * steps.xp.log(u)))
        stages = [(reached, middle), (middle, middle), (steps, steps)]
        columns = [
            (*self.transfers(end), level.s, level.alpha_s, level.sigma_s) for end, level in stages
        ]

        def correct(x: Array, value: Array, carry: Any, move: Any, row: Any) -> Any:
            def stage(state: Any, row: Any) -> Any:
                to_x, to_value, t, alpha, sigma, weight = row
                value, total, carry = state
                ahead = _transfer(x, value, to_x, to_value)
                value, carry = self.evaluated(ahead, t, alpha, sigma, carry)
                return (value, total + weight * value, carry), None

            (_, total, carry), _ = jax.lax.scan(stage, (value, value / 6.0, carry), row)
            return _transfer(x, total, row[0][-1], row[1][-1]), carry

        stacked = [steps.xp.stack(values, axis=1) for values in zip(*columns, strict=True)]
        weights = np.tile([1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0], (len(steps.t), 1))
        return correct, stepping.cast(x, *stacked, weights)
