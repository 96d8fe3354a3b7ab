"""Trains: `python -m diffusion_jax.main --config=configs/digits.py --workdir=runs/digits`.

The same command starts, resumes and, with a larger `--config.steps`, extends a run. With --dry_run
it builds everything, prints size, cost and memory, draws data and noise levels, and stops.
"""

from __future__ import annotations

from absl import flags

from diffusion_jax import config_flag, doors

CONFIG = config_flag.define(
    "A file of configs/, with :variant; fields follow as --config.a.b=value."
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; the same one resumes it.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build and show everything, train nothing.")


def run() -> None:
    """Trains, or shows what it would train, with the parsed flags."""
    from diffusion_jax import api, dry_run

    start = dry_run.dry_run if DRY_RUN.value else api.train
    start(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    doors.enter(run, required=("config", "workdir"), agree_on_sigterm=True)
