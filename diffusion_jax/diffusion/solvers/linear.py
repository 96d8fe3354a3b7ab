"""The scan of the solvers whose steps are linear in what is known at their start."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Draws, State


def scan_linear(
    denoiser: Denoiser,
    x: State,
    coefficients: tuple[Any, Any, Any, Any],
    draws: Draws | None,
    trajectory: bool,
    *,
    of_eps: bool = False,
) -> Any:
    """x_s = a x_t + b x0 + std z, or with `of_eps` a eps + b x0 + std z, eps of the denoiser.

    `coefficients` are t, a, b and std, [steps] each; without `draws` no noise is added.
    """

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, a, b, std), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        x_s = a * (denoised.eps if of_eps else x) + b * denoised.x0
        if draws is not None:
            x_s = x_s + std * draws.draw(drawn, x.shape, x.dtype)
        return x_s, carry

    drawn = None if draws is None else draws.rows(len(coefficients[0]))
    rows = (stepping.cast(x, *coefficients), drawn)
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)
