"""Log-likelihoods and bounds on them, in nats; every mean comes with its standard error.

`discrete`: the variational bound of any process over the steps of a time grid. `continuous`: that
of a Gaussian process in infinitely many steps. `flow`: the log-density of the probability-flow ODE.
`dequantisation`: from a density to the probability of discrete data. `decoders`: the last term of a
bound. `estimates`: means with standard errors, bits per dimension.
"""

from __future__ import annotations

from diffusion_jax.diffusion.likelihood.continuous import (
    PROPOSALS,
    SPREADS,
    ContinuousBound,
    Levels,
    check_levels,
    continuous_bound,
    levels,
    uniforms,
)
from diffusion_jax.diffusion.likelihood.decoders import Decoder, Density, Pixels
from diffusion_jax.diffusion.likelihood.dequantisation import (
    bin_width,
    cell_nats,
    dequantise,
    dequantised_log_probability,
)
from diffusion_jax.diffusion.likelihood.discrete import (
    MOST_STATES,
    Bound,
    factorised_bound,
    noisy_states,
    prior_term,
    random_step,
    sum_elements,
    variational_bound,
    variational_term,
)
from diffusion_jax.diffusion.likelihood.estimates import Estimate, bits_per_dim, estimate
from diffusion_jax.diffusion.likelihood.flow import METHODS as FLOW_METHODS
from diffusion_jax.diffusion.likelihood.flow import FlowDensity, flow_log_density
from diffusion_jax.diffusion.likelihood.traces import TRACES

__all__ = [
    "FLOW_METHODS",
    "MOST_STATES",
    "PROPOSALS",
    "SPREADS",
    "TRACES",
    "Bound",
    "ContinuousBound",
    "Decoder",
    "Density",
    "Estimate",
    "FlowDensity",
    "Levels",
    "Pixels",
    "bin_width",
    "bits_per_dim",
    "cell_nats",
    "check_levels",
    "continuous_bound",
    "dequantise",
    "dequantised_log_probability",
    "estimate",
    "factorised_bound",
    "flow_log_density",
    "levels",
    "noisy_states",
    "prior_term",
    "random_step",
    "sum_elements",
    "uniforms",
    "variational_bound",
    "variational_term",
]
