"""The flags of doors that sample, and what they say as arguments of the pipeline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from diffusion_jax import doors
from diffusion_jax.errors import ConfigError

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a trained run.")
LABELS = flags.DEFINE_string(
    "labels",
    "",
    "Classes by number or name, such as 3,7 or cat,dog; cycled up to --num. Names with a comma can "
    "be given in Python alone.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be given several times.")
SCALARS = flags.DEFINE_multi_string(
    "scalars", [], "Numbers that condition the model, such as 1.5,20; may be given several times."
)
NEGATIVE_LABELS = flags.DEFINE_string(
    "negative_labels", "", "Classes that guidance turns away from, such as 3,7."
)
NEGATIVE_PROMPT = flags.DEFINE_multi_string(
    "negative_prompt", [], "A caption that guidance turns away from."
)
NEGATIVE_SCALARS = flags.DEFINE_multi_string(
    "negative_scalars", [], "Numbers that guidance turns away from, such as 1.5,20."
)
ALSO_LABELS = flags.DEFINE_string("also_labels", "", "Further classes of all samples, such as 3,7.")
ALSO_PROMPT = flags.DEFINE_multi_string(
    "also_prompt", [], "A further caption of all samples; may be given several times."
)
ALSO_SCALARS = flags.DEFINE_multi_string(
    "also_scalars",
    [],
    "Further numbers of all samples, such as 1.5,20; may be given several times.",
)
ALSO_GUIDANCE = flags.DEFINE_string(
    "also_guidance", "", "Weights of the further classes, captions or numbers, such as 2,-1."
)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance weight; 1 is the conditional model.")
SOLVER = flags.DEFINE_string("solver", None, "Solver, such as ddim or dpmpp_2m.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the solver.")
GUIDANCE_INTERVAL = flags.DEFINE_string(
    "guidance_interval", "", "Times between which guidance acts, such as 0.2,0.8."
)
GUIDANCE_BY = flags.DEFINE_string(
    "guidance_by",
    None,
    "classifier_free, cfg_zero, apg, autoguidance or perturbed_attention.",
)
GUIDANCE_OPTIONS = flags.DEFINE_string(
    "guidance_options", "", "Of the kind of guidance, such as momentum=-0.75,threshold=10."
)
WEAK = flags.DEFINE_string(
    "weak", None, "Workdir of the weaker model of autoguidance; '' leaves out the config's."
)
WEAK_EMA = flags.DEFINE_string("weak_ema", None, "Its average; '' takes the raw weights.")
WEAK_STEP = flags.DEFINE_integer("weak_step", None, "Its step, of those that were kept.")
GUIDANCE_RESCALE = flags.DEFINE_float("guidance_rescale", None, "Rescaling of guidance, 0 to 1.")
THRESHOLD = flags.DEFINE_string("threshold", None, "none, static or dynamic.")
SOLVER_OPTIONS = flags.DEFINE_string("solver_options", "", "Of the solver, such as eta=0.5.")
EMA = flags.DEFINE_string("ema", None, "Average to sample from; '' takes the raw weights.")
EMA_LENGTH = flags.DEFINE_float(
    "ema_length", None, "Relative length of an average to make, such as 0.08; see ema.powers."
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A step that was kept, best or newest; the newest by default."
)
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same samples.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples a compiled batch.")


def load_arguments() -> dict[str, Any]:
    """What `api.load` is given besides the workdir."""
    return {
        "ema": EMA.value,
        "ema_length": EMA_LENGTH.value,
        "checkpoint": CHECKPOINT.value,
        "weak": WEAK.value,
        "weak_ema": WEAK_EMA.value,
        "weak_step": WEAK_STEP.value,
    }


def sample_arguments() -> dict[str, Any]:
    """What `pipeline.sample` and `stream` are given besides the number of samples.

    Raises:
        ConfigError: a flag that cannot be read.
    """
    return {
        "labels": _labels(LABELS.value),
        "prompts": PROMPT.value,
        "scalars": _rows("scalars", SCALARS.value),
        "negative_labels": _labels(NEGATIVE_LABELS.value),
        "negative_prompts": NEGATIVE_PROMPT.value,
        "negative_scalars": _rows("negative_scalars", NEGATIVE_SCALARS.value),
        "also_labels": _labels(ALSO_LABELS.value),
        "also_prompts": ALSO_PROMPT.value,
        "also_scalars": _rows("also_scalars", ALSO_SCALARS.value),
        "also_guidance": doors.numbers("also_guidance", ALSO_GUIDANCE.value, float, "2,-1"),
        "seed": SEED.value,
        "guidance": GUIDANCE.value,
        "guidance_by": GUIDANCE_BY.value,
        "guidance_options": doors.settings("guidance_options", GUIDANCE_OPTIONS.value),
        "guidance_interval": doors.numbers(
            "guidance_interval", GUIDANCE_INTERVAL.value, float, "0.2,0.8"
        ),
        "guidance_rescale": GUIDANCE_RESCALE.value,
        "solver": SOLVER.value,
        "steps": STEPS.value,
        "solver_options": doors.settings("solver_options", SOLVER_OPTIONS.value),
        "threshold": THRESHOLD.value,
        "batch_size": BATCH_SIZE.value,
    }


def check_weak(defaults: Any) -> None:
    """Refuses a weaker model that samples would not be guided by.

    Args:
        defaults: the options of the pipeline, which the flags go over.

    Raises:
        ConfigError: one is given, but another kind of guidance, or none.
    """
    given = {"weak": WEAK.value or None, "weak_ema": WEAK_EMA.value, "weak_step": WEAK_STEP.value}
    by = GUIDANCE_BY.value or defaults.guidance_by
    unguided = GUIDANCE.value is None and defaults.guidance == 1.0
    for name, value in given.items():
        if value is not None and (by != "autoguidance" or unguided):
            wanted = "--guidance above 1" if by == "autoguidance" else "--guidance_by=autoguidance"
            raise ConfigError(f"--{name}={value!r} has no effect: expected {wanted} with it")


def _rows(flag: str, given: Sequence[str]) -> list[list[float]] | None:
    """Rows of numbers, each given as a comma-separated list; None for no row."""
    return [doors.numbers(flag, row, float, "1.5,20") or [] for row in given] or None


_NUMBER = re.compile(r"-?[0-9]{1,18}")


def _labels(text: str) -> list[int | str] | None:
    """A comma-separated list, whole numbers as such and the rest as names; None for an empty one.

    What is both a number and the name of a class is the number.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    return [int(part) if _NUMBER.fullmatch(part) else part for part in parts] or None
