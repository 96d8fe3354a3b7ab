"""Solvers: from the state at times[0] to the state at times[-1], one function a method.

All share one signature, `solver(denoise, schedule, times, x, *, key=None, noise=None,
trajectory=False, **options)`. `denoise` is a Denoiser or a function (x, t) -> x0, which need only
broadcast to x; `times`, [steps + 1], decreases within [0, 1]; `x` is [batch, ...] in the process's
own units, at the start alpha x0 + sigma eps. The result is the state at times[-1], or with
`trajectory` that and all states [steps + 1, batch, ...], `x` first. Each is one scan, to be jitted
by the caller with its network. ValueError where the denoiser has no x0 at times[0].

Randomness: `key` is one key, from which example i takes fold_in(key, i), or a key array [batch];
draw j of step k uses fold_in(fold_in(key_i, k), j), so that a sample does not depend on its batch.
`noise(step, draw, shape)` replays recorded standard draws instead; it is called with Python
integers, before the scan, for the steps that add noise.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusion_jax.diffusion.solvers.ancestral import ancestral
from diffusion_jax.diffusion.solvers.ddim import ddim
from diffusion_jax.diffusion.solvers.ddpm import ddpm
from diffusion_jax.diffusion.solvers.dpmpp import dpmpp_2m, dpmpp_sde
from diffusion_jax.diffusion.solvers.euler import euler, heun
from diffusion_jax.errors import unknown_name

SOLVERS: dict[str, Callable] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "ancestral": ancestral,
}

__all__ = [
    "SOLVERS",
    "ancestral",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_sde",
    "euler",
    "get",
    "heun",
]


def get(name: str) -> Callable:
    """The solver called `name`; ValueError naming the nearest one if there is none."""
    if name not in SOLVERS:
        raise ValueError(unknown_name("solver", name, SOLVERS))
    return SOLVERS[name]
