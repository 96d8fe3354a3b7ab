"""Trains: `python -m diffusion_jax.main --config=configs/digits.py --workdir=runs/digits`.

The same command starts, resumes and, with a larger `--config.steps`, extends a run.
"""

from __future__ import annotations

from absl import flags

from diffusion_jax import config_flag, doors

CONFIG = config_flag.define(
    "A file of configs/, with :variant; fields follow as --config.a.b=value."
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; the same one resumes it.")


def run() -> None:
    """Trains with the parsed flags."""
    from diffusion_jax import api

    api.train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    doors.enter(run, required=("config", "workdir"), agree_on_sigterm=True)
