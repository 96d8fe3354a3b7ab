"""Freed host memory is kept: a compiled program on CPU asks for the same buffers every step."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to reuse large freed buffers instead of returning them to the kernel.

    XLA:CPU frees its temporary buffers after each run, and by default each step faults all their
    pages in anew: 14,000 page faults and an eighth of the CPU time of a step of configs/digits.py.
    The process then holds its peak until it ends. Use it where the CPU is the device.

    Returns:
        False where the C library has no such call (macOS, musl); nothing is changed then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
