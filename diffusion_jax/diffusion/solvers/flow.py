"""The samplers of flow matching: Euler's and Heun's methods on the velocity, with noise or without.

For a rectified flow, alpha = 1 - t and sigma = t, they step x along v = eps - x0 from t to s. They
are written for any schedule, over sigma/(alpha + sigma), and start where alpha = 0.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.heun import heun_steps
from diffusion_jax.diffusion.solvers.linear import scan_linear
from diffusion_jax.diffusion.solvers.noising import check_noise, lowered
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start
from diffusion_jax.errors import ConfigError


def flow_euler(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    renewal: Number = 0.0,
) -> Result:
    """x_s = alpha_s x0 + sigma_s (sqrt(1 - renewal^2) eps + renewal z), eps that of x0.

    renewal=0 is Euler's method, x_s = x_t + (s - t) v for a rectified flow (Liu et al. 2023, "Flow
    Straight and Fast"); renewal=1 draws all noise anew, the `stochastic_sampling` of libraries
    and consistency sampling; between, the noise of DDIM's equation 12 (Song et al. 2021) with a
    share that does not depend on the step. First order for 0; a fixed renewal r > 0 does not lead
    to the data: of a Gaussian, many steps leave (1 + sqrt(1 - r^2))/2 of the variance near
    sigma = 0. One evaluation and one draw a step; none on a step to sigma_s = 0.

    Raises ConfigError for renewal outside [0, 1], bad times, or renewal > 0 without key
    and noise.
    """
    if not 0.0 <= renewal <= 1.0:
        raise ConfigError(f"renewal={renewal}; expected a number from 0 (deterministic) to 1")
    renewal = float(renewal)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    kept, std = ((1.0 - renewal) * (1.0 + renewal)) ** 0.5, renewal * steps.sigma_s
    draws = None
    if renewal > 0.0:
        draws = stepping.draws("flow_euler", x, len(steps.t), key, noise, std > 0.0)

    to_x0 = steps.alpha_s * (1.0 - kept * steps.decay)
    columns = (steps.t, kept * steps.sigma_ratio, to_x0, std)
    return scan_linear(denoiser, x, columns, draws, trajectory)


def flow_heun(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    eta: Number = 0.0,
    s_noise: Number = 1.0,
) -> Result:
    """Heun's method on the velocity; with eta > 0 to a lower level, and noise back up.

    x_s = x_t + (s - t) (v_t + v_s)/2 for a rectified flow: `heun` in its "flow" coordinates. With
    eta the step goes to u_down and noise of u_up is added, as in `euler_ancestral`, so that the
    process is the SDE of DDPM (eta=1) or slower. A step to sigma_s = 0, or from alpha_t = 0 with
    eta=1, is an Euler step. Second order for eta=0; two evaluations and, for eta > 0, one draw a
    step.

    Raises ConfigError for eta outside [0, 1], a negative s_noise, bad times, or eta > 0
    without key and noise.
    """
    check_noise(s_noise)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    lower = lowered(schedule, steps, eta, s_noise)
    draws = lower.draws("flow_heun with eta > 0", x, key, noise) if eta else None
    return heun_steps(denoiser, lower, steps.xp.asarray(True), x, draws, trajectory)
