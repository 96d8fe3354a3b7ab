"""Samples: `python -m diffusion_jax.sample --workdir=runs/digits --num=64 --out=digits`.

Writes `samples.npz`, one PNG a sample for images, `grid.png` and, with --trajectory, a GIF.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from diffusion_jax import doors, sample_flags

# For --help, which shows those of the started module alone.
flags.adopt_module_key_flags(sample_flags)
OUT = flags.DEFINE_string("out", "", "Folder to write to.")
NUM = flags.DEFINE_integer("num", 64, "Number of samples.")
TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also write every state on the way.")


def run() -> None:
    """Samples with the parsed flags."""
    import jax

    from diffusion_jax import api, workdir
    from diffusion_jax.pipelines import output

    source, out, num = sample_flags.WORKDIR.value, OUT.value, NUM.value
    workdir.read_config(source)
    main = jax.process_index() == 0
    folder = output.prepare(out) if main else Path(out)
    arguments = sample_flags.sample_arguments()
    pipeline = api.load(source, note=doors.note, **sample_flags.load_arguments())
    sample_flags.check_weak(pipeline.defaults)
    samples = pipeline.sample(
        num,
        progress=lambda done: doors.note(f"{done}/{num} samples"),
        trajectory=TRAJECTORY.value,
        **arguments,
    )
    if main:
        output.write(folder, samples, pipeline.spec)
    doors.note(f"samples are in {out}")


if __name__ == "__main__":
    doors.enter(run, required=("workdir", "out"))
