"""Solvers: from the state at times[0] to the state at times[-1], one function a method.

All share one signature, `solver(denoise, schedule, times, x, *, key=None, noise=None,
trajectory=False, **options)`. `denoise` is a Denoiser or a function (x, t) -> x0, which need only
broadcast to x; t is a scalar, in `dopri5` [batch, 1, ...] of the rank of x. `times`, [steps + 1],
decreases within [0, 1]; `x` is [batch, ...] in the process's own units, at the start alpha x0 +
sigma eps. The result is the state at times[-1], or with `trajectory` that and all states
[steps + 1, batch, ...], `x` first. Each is one scan, with a while loop in that of `dopri5`, to be
jitted by the caller with its network. ConfigError where the denoiser has no x0 at times[0].

Randomness: `key` is one key, from which example i takes fold_in(key, i), or a key array [batch];
draw j of step k uses fold_in(fold_in(key_i, k), j), so that a sample does not depend on its batch.
`noise(step, draw, shape)` replays recorded standard draws instead; it is called with Python
integers, before the scan, for the steps that add noise.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusion_jax.diffusion.solvers.adaptive import dopri5
from diffusion_jax.diffusion.solvers.ancestral import ancestral
from diffusion_jax.diffusion.solvers.bdia import bdia, bdia_inversion, bdia_pair
from diffusion_jax.diffusion.solvers.consistency import lcm, tcd
from diffusion_jax.diffusion.solvers.ddim import ddim
from diffusion_jax.diffusion.solvers.ddpm import ddpm
from diffusion_jax.diffusion.solvers.dpmpp import (
    dpmpp_1m,
    dpmpp_1s,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3s,
)
from diffusion_jax.diffusion.solvers.dpmpp_sde import dpmpp_sde, dpmpp_sde_singlestep, dpmsolver_sde
from diffusion_jax.diffusion.solvers.dpmsolver import deis, dpmsolver, dpmsolver_singlestep
from diffusion_jax.diffusion.solvers.euler import euler, euler_ancestral
from diffusion_jax.diffusion.solvers.flow import flow_euler, flow_heun
from diffusion_jax.diffusion.solvers.heun import heun
from diffusion_jax.diffusion.solvers.inversion import ddim_inversion, ddim_round_trip
from diffusion_jax.diffusion.solvers.lms import lms
from diffusion_jax.diffusion.solvers.pndm import pndm
from diffusion_jax.diffusion.solvers.runge_kutta import kdpm2, kdpm2_ancestral, midpoint, rk4
from diffusion_jax.diffusion.solvers.unipc import unipc
from diffusion_jax.errors import ConfigError, unknown_name

SOLVERS: dict[str, Callable] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "dopri5": dopri5,
    "kdpm2": kdpm2,
    "kdpm2_ancestral": kdpm2_ancestral,
    "lms": lms,
    "pndm": pndm,
    "bdia": bdia,
    "lcm": lcm,
    "tcd": tcd,
    "flow_euler": flow_euler,
    "flow_heun": flow_heun,
    "dpmpp_1m": dpmpp_1m,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_sde_singlestep": dpmpp_sde_singlestep,
    "dpmsolver": dpmsolver,
    "dpmsolver_singlestep": dpmsolver_singlestep,
    "dpmsolver_sde": dpmsolver_sde,
    "deis": deis,
    "unipc": unipc,
    "ancestral": ancestral,
}

__all__ = [
    "SOLVERS",
    "ancestral",
    "bdia",
    "bdia_inversion",
    "bdia_pair",
    "ddim",
    "ddim_inversion",
    "ddim_round_trip",
    "ddpm",
    "deis",
    "dopri5",
    "dpmpp_1m",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3s",
    "dpmpp_sde",
    "dpmpp_sde_singlestep",
    "dpmsolver",
    "dpmsolver_sde",
    "dpmsolver_singlestep",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "get",
    "heun",
    "kdpm2",
    "kdpm2_ancestral",
    "lcm",
    "lms",
    "midpoint",
    "pndm",
    "rk4",
    "tcd",
    "unipc",
]


def get(name: str) -> Callable:
    """The solver called `name`; ConfigError naming the nearest one if there is none."""
    if name not in SOLVERS:
        raise ConfigError(unknown_name("solver", name, SOLVERS))
    return SOLVERS[name]
