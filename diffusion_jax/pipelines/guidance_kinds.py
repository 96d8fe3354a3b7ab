"""The kinds of guidance that `sample` knows by name, with their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind.

    Attributes:
        options: its own, with their defaults.
        unconditional: whether `guidance` is that against the unconditional branch.
        without_condition: whether it works for a model without conditions.
        gaussian: whether it needs a schedule.
        tokens: whether it works for tokens.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unconditional: bool = True
    without_condition: bool = False
    gaussian: bool = False
    tokens: bool = False


KINDS: dict[str, Kind] = {
    "classifier_free": Kind(tokens=True),
    "cfg_zero": Kind(options={"zero_steps": 1}, gaussian=True),
    "apg": Kind(options={"parallel": 0.0, "threshold": 0.0, "momentum": -0.5}, gaussian=True),
    "autoguidance": Kind(unconditional=False, without_condition=True, tokens=True),
    "perturbed_attention": Kind(options={"scale": 3.0}, without_condition=True),
}


def own_options(options: Any) -> dict[str, Any]:
    """Of the kind that the `SamplingOptions` name, those given over the defaults."""
    given = options.guidance_options.get(options.guidance_by, {})
    return {**KINDS[options.guidance_by].options, **given}
