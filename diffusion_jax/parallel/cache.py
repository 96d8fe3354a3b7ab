"""The persistent compilation cache: a second start of the same program skips XLA."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from diffusion_jax.errors import ConfigError


def enable_compilation_cache(directory: str | os.PathLike[str]) -> None:
    """Keeps every compiled program under `directory` (created when missing; gs:// works too).

    Call before the first compilation. Entries of any size and compile time are kept, since a
    training program is made of few. Safe to share between processes and runs.

    Raises:
      ConfigError: if the directory cannot be created or written.
    """
    path = os.fspath(directory)
    if "://" not in path:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"compilation_cache={path!r} cannot be created: {error.strerror}; expected a "
                f"writable directory"
            ) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"compilation_cache={path!r} is not writable")
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
