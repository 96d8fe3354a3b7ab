"""A large buffer that is freed and asked for again must not be faulted in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

BODY = """
import resource, sys
import numpy as np
from diffusion_jax.parallel.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else True
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(8_000_000)
before = faults()
for _ in range(5):
    np.ones(8_000_000)
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_buffers_are_used_again():
    counts = {}
    for mode in ("plain", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", BODY, mode], capture_output=True, text=True, check=True
        )
        kept, faults = done.stdout.split()
        assert kept == "True"
        counts[mode] = int(faults)
    assert counts["keep"] < 0.05 * counts["plain"]
