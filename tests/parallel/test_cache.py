import os
import subprocess
import sys

import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.cache import enable_compilation_cache

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from diffusion_jax.parallel.cache import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
value = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((32, 32)))
print(value, sum("cache_hits" in e for e in events), sum("cache_misses" in e for e in events))
"""


def run(directory):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    value, hits, misses = result.stdout.split()
    return value, int(hits), int(misses)


def test_second_start_compiles_nothing(tmp_path):
    directory = tmp_path / "a" / "cache"
    first = run(directory)
    second = run(directory)
    assert first[1] == 0
    assert first[2] > 0
    assert second == (first[0], first[2], 0)


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"compilation_cache='.*file/cache' cannot be created"):
        enable_compilation_cache(tmp_path / "file" / "cache")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(ConfigError, match="is not writable"):
            enable_compilation_cache(tmp_path / "closed")
