"""Analytic FLOPs of a JAX function and the peak rates they are held against.

XLA's own cost analysis counts the body of a scan once, so a scanned network would look many times
cheaper than it is. Here the jaxpr is walked and scan lengths are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

# cuDNN attention is one opaque operation: two products forwards; backwards four, and one computed
# again, which is not counted.
CUDNN_ATTENTION = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 4,
}


def count_flops(fn: Callable[..., Any], *args: Any, recomputation: bool = False) -> int:
    """FLOPs of matrix products and convolutions in one call of `fn(*args)`, over all devices.

    A multiply-add counts as two. Element-wise work is left out, as is customary for model FLOPs
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). A scan counts length times its body, a
    conditional its dearest branch, a while loop one turn (its length is not known).

    Args:
      fn: a function that JAX can trace; nothing is compiled or run.
      *args: arrays or `jax.ShapeDtypeStruct`.
      recomputation: whether to count what rematerialisation computes again: False gives the FLOPs
        of the model (for model FLOPs utilisation), True those of the hardware.
    """
    closed = jax.make_jaxpr(fn)(*args)
    return _count(closed.jaxpr, recomputation)


def _count(jaxpr: Any, recomputation: bool) -> int:
    return sum(_count_equation(eqn, recomputation) for eqn in jaxpr.eqns)


def _count_equation(eqn: Any, recomputation: bool) -> int:
    if not recomputation and "rematted_computation" in str(eqn.source_info.name_stack):
        return 0
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name in CUDNN_ATTENTION:
        return CUDNN_ATTENTION[name] * _attention_product(eqn)
    inner = [_count(jaxpr, recomputation) for jaxpr in _inner_jaxprs(eqn.params)]
    if not inner:
        return 0
    if name == "cond":
        return max(inner)
    return sum(inner) * _repeats(name, eqn.params)


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is written for one device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":  # its body is written for one cell of the grid
        return math.prod(int(size) for size in params["grid_mapping"].grid)
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot_flops(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def _attention_product(eqn: Any) -> int:
    """FLOPs of one of the two products (queries with keys, weights with values)."""
    batch, queries, heads, dim = eqn.invars[0].aval.shape
    return 2 * batch * heads * queries * eqn.invars[1].aval.shape[1] * dim


def _conv_flops(eqn: Any) -> int:
    """Counts padding as work (the convention) but not the holes that dilating the input makes.

    So the gradients of a strided convolution cost what the convolution itself costs.
    """
    params, (_, kernel) = eqn.params, eqn.invars
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval.shape
    kernel_shape = kernel.aval.shape
    flops = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    flops *= kernel_shape[numbers.rhs_spec[1]]  # input channels of one group
    for i, (out_axis, kernel_axis) in enumerate(
        zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
    ):
        position = (
            np.arange(out[out_axis])[:, None] * params["window_strides"][i]
            + np.arange(kernel_shape[kernel_axis]) * params["rhs_dilation"][i]
            - params["padding"][i][0]
        )
        flops *= int(np.count_nonzero(position % params["lhs_dilation"][i] == 0))
    return flops


# Dense bfloat16 peaks of one JAX device, in FLOP/s. TPU: the page of each generation under
# cloud.google.com/tpu/docs. NVIDIA: the data sheets of A100, H100 and H200, without sparsity.
# The first entry that the device kind starts with applies.
PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s; None where unknown (CPU among them)."""
    for prefix, peak in PEAKS:
        if device_kind.startswith(prefix):
            return peak
    return None
