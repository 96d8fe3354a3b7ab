"""How good a run is: `python -m diffusion_jax.evaluate --workdir=runs/digits --metrics=fd,kid,bpd`.

Prints each score with its standard error, and adds them to eval.jsonl and eval.md of the workdir.
"""

from __future__ import annotations

from absl import flags

from diffusion_jax import doors, sample_flags
from diffusion_jax.errors import ConfigError

# For --help, which shows those of the started module alone.
flags.adopt_module_key_flags(sample_flags)

NUM = flags.DEFINE_integer("num", 10_000, "Number of samples; for bpd and loss of examples.")
METRICS = flags.DEFINE_list(
    "metrics",
    None,
    "fid, fd, sfid, fd_infinity, kid, cmmd, inception_score, precision_recall, density_coverage, "
    "class_accuracy, clip_score, nearest, bpd, loss; by default fd, kid and precision_recall, or "
    "bpd where the data are no pictures.",
)
FEATURES = flags.DEFINE_string(
    "features",
    "self",
    "The feature network: self (learns from the data), or NAME:FILE of weights; inception:FILE:tf1 "
    "resizes as the TensorFlow 1 graph of published sFID and Inception scores, clip:FILE:TOKENIZER "
    "names a tokeniser.",
)
REFERENCE = flags.DEFINE_string(
    "reference",
    "train",
    "train or validation of the data, a folder of pictures, or an .npz of statistics.",
)
SPLIT = flags.DEFINE_string("split", None, "Data of bpd and loss: validation or train.")
SWEEP = flags.DEFINE_string(
    "sweep", "", "Scores every combination, such as solver=ddim|heun,steps=5|10|20,guidance=1|2."
)
BPD_OPTIONS = flags.DEFINE_string(
    "bpd_options", "", "How bits are counted, such as method=flow,trace=exact,steps=50."
)


def run() -> None:
    """Evaluates with the parsed flags."""
    from diffusion_jax import api
    from diffusion_jax.evaluation import report

    if SWEEP.value:
        _sweep()
        return
    rows = api.evaluate(
        sample_flags.WORKDIR.value,
        METRICS.value,
        num=NUM.value,
        features=FEATURES.value,
        reference=REFERENCE.value,
        split=SPLIT.value,
        loading=sample_flags.load_arguments(),
        bpd=doors.settings("bpd_options", BPD_OPTIONS.value),
        note=doors.note,
        **sample_flags.sample_arguments(),
    )
    for row in rows:
        doors.note(report.line(row))


def _sweep() -> None:
    from diffusion_jax import sweeps

    if BPD_OPTIONS.value or SPLIT.value:
        name = "bpd_options" if BPD_OPTIONS.value else "split"
        raise ConfigError(f"--{name}: bits do not depend on the sampler; leave it in a sweep")
    axes = doors.settings("sweep", SWEEP.value) or {}
    rows = sweeps.sweep(
        sample_flags.WORKDIR.value,
        {name: doors.values(value) for name, value in axes.items()},
        METRICS.value or ("fd",),
        num=NUM.value,
        features=FEATURES.value,
        reference=REFERENCE.value,
        loading=sample_flags.load_arguments(),
        note=doors.note,
        **sample_flags.sample_arguments(),
    )
    for row in rows:
        doors.note(sweeps.line(row))
    doors.note(f"best: {sweeps.line(sweeps.best(rows))}")


if __name__ == "__main__":
    doors.enter(run, required=("workdir",))
