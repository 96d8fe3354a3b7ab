"""Samples: `python -m diffusion_jax.sample --workdir=runs/digits --num=64 --out=digits`.

Writes `samples.npz`, one PNG a sample for images, `grid.png` and, with --trajectory, a GIF.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from diffusion_jax import doors

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a trained run.")
OUT = flags.DEFINE_string("out", "", "Folder to write to.")
NUM = flags.DEFINE_integer("num", 64, "Number of samples.")
LABELS = flags.DEFINE_string("labels", "", "Classes, such as 3,7; cycled up to --num.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be given several times.")
SCALARS = flags.DEFINE_multi_string(
    "scalars", [], "Numbers that condition the model, such as 1.5,20; may be given several times."
)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance weight; 1 is the conditional model.")
SOLVER = flags.DEFINE_string("solver", None, "Solver, such as ddim or dpmpp_2m.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the solver.")
GUIDANCE_INTERVAL = flags.DEFINE_string(
    "guidance_interval", "", "Times between which guidance acts, such as 0.2,0.8."
)
GUIDANCE_RESCALE = flags.DEFINE_float("guidance_rescale", None, "Rescaling of guidance, 0 to 1.")
THRESHOLD = flags.DEFINE_string("threshold", None, "none, static or dynamic.")
SOLVER_OPTIONS = flags.DEFINE_string("solver_options", "", "Of the solver, such as eta=0.5.")
EMA = flags.DEFINE_string("ema", None, "Average to sample from; '' takes the raw weights.")
EMA_LENGTH = flags.DEFINE_float(
    "ema_length", None, "Relative length of an average to make, such as 0.08; see ema.powers."
)
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same samples.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples a compiled batch.")
TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also write every state on the way.")


def run() -> None:
    """Samples with the parsed flags."""
    import jax

    from diffusion_jax import api, workdir
    from diffusion_jax.pipelines import output

    workdir.read_config(WORKDIR.value)
    main = jax.process_index() == 0
    folder = output.prepare(OUT.value) if main else Path(OUT.value)
    labels = doors.numbers("labels", LABELS.value, int, "3,7")
    rows = [doors.numbers("scalars", row, float, "1.5,20") or [] for row in SCALARS.value]
    pipeline = api.load(WORKDIR.value, ema=EMA.value, ema_length=EMA_LENGTH.value, note=doors.note)
    samples = pipeline.sample(
        NUM.value,
        labels=labels,
        prompts=PROMPT.value,
        scalars=rows or None,
        seed=SEED.value,
        guidance=GUIDANCE.value,
        solver=SOLVER.value,
        steps=STEPS.value,
        batch_size=BATCH_SIZE.value,
        guidance_interval=doors.numbers(
            "guidance_interval", GUIDANCE_INTERVAL.value, float, "0.2,0.8"
        ),
        guidance_rescale=GUIDANCE_RESCALE.value,
        threshold=THRESHOLD.value,
        solver_options=doors.settings("solver_options", SOLVER_OPTIONS.value),
        trajectory=TRAJECTORY.value,
        progress=lambda done: doors.note(f"{done}/{NUM.value} samples"),
    )
    if main:
        output.write(folder, samples, pipeline.spec)
    doors.note(f"samples are in {OUT.value}")


if __name__ == "__main__":
    doors.enter(run, required=("workdir", "out"))
