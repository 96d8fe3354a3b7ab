"""Scores of a trained run: `python -m diffusion_jax.evaluate --workdir=runs/digits --metrics=bpd`.

Prints each with its standard error. bpd: bits per dimension of examples, see `bits_per_dim`.
"""

from __future__ import annotations

from absl import flags

from diffusion_jax import doors

METRICS = ("bpd",)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a trained run.")
CHOSEN = flags.DEFINE_list("metrics", ["bpd"], "What to measure: bpd.")
NUM = flags.DEFINE_integer("num", None, "Number of examples; all by default.")
SPLIT = flags.DEFINE_string("split", "validation", "Of the data: validation or train.")
EMA = flags.DEFINE_string("ema", None, "Average to evaluate; '' takes the raw weights.")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Examples a compiled batch.")
BPD_OPTIONS = flags.DEFINE_string(
    "bpd_options", "", "How bits are counted, such as method=flow,trace=exact,steps=50."
)


def run() -> None:
    """Evaluates with the parsed flags."""
    import dataclasses

    from diffusion_jax import api
    from diffusion_jax.errors import ConfigError, unknown_name
    from diffusion_jax.evaluation.likelihood import LikelihoodOptions

    for name in CHOSEN.value or [""]:
        if name not in METRICS:
            raise ConfigError(unknown_name("metrics", name, METRICS))
    options = doors.settings("bpd_options", BPD_OPTIONS.value) or {}
    known = {field.name for field in dataclasses.fields(LikelihoodOptions)} - {"seed"}
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("bpd_options", name, known))
    found = api.bits_per_dim(
        WORKDIR.value,
        num=NUM.value,
        split=SPLIT.value,
        ema=EMA.value,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
        **options,
    )
    doors.note(str(found))


if __name__ == "__main__":
    doors.enter(run, required=("workdir",))
