"""What a user gives as conditions of samples, as arrays that the network reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.text import encode
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.options import label_list, number, number_rows, text_list

_FIELDS = (("label", "labels"), ("text", "prompts"), ("scalar", "scalars"))
Values = tuple[Any, Any, Any]
"""Labels, prompts and scalars as a user gives them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What samples are asked to be, as arrays [num, ...] by the name of the condition.

    Attributes:
        given: the conditions of each sample.
        negative: in place of none of them; None where that is not asked for.
        also: further conditions, each of all samples.
        weights: of these; None for that of the guidance.
    """

    given: Mapping[str, np.ndarray]
    negative: Mapping[str, np.ndarray] | None
    also: Sequence[Mapping[str, np.ndarray]]
    weights: np.ndarray | None

    def branches(self, index: np.ndarray) -> dict[str, Any]:
        """The conditions of the samples at `index`, by branch of the guidance."""
        whole = {"given": self.given, "negative": self.negative, "also": self.also}
        return jax.tree.map(lambda values: values[index], whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of one model.

    Attributes:
        spec: its data.
        names: of the conditioning that the network reads: label, text, scalar.
        always: those of them that training never left out: there is no prediction without.
    """

    spec: DataSpec
    names: tuple[str, ...]
    always: tuple[str, ...]

    def read(
        self, num: int, *, given: Values, negative: Values, also: Values, also_guidance: Any
    ) -> Asked:
        """All that `sample` takes of conditions and their weights.

        Raises:
            ConfigError: as `rows`, naming `negative_labels`, `also_labels` and so on; numbers of
                further conditions that differ.
        """
        others, weights = self._also(num, also, also_guidance)
        return Asked(
            given=self.rows(num, given),
            negative=self._other(num, "negative_", negative),
            also=others,
            weights=weights,
        )

    def rows(self, num: int, values: Values, *, shapes_only: bool = False) -> dict[str, np.ndarray]:
        """Conditioning [num, ...] by name; what is not given is the network's null, but for labels,
        which are then all classes in turn.

        Raises:
            ConfigError: something that the model does not read, or was never trained without.
        """
        for (name, argument), value in zip(_FIELDS, values, strict=True):
            if _given(value) and name not in self.names:
                what = "unconditional" if not self.names else f"not conditioned by {name}"
                raise ConfigError(f"{argument}={value!r}: the model is {what}; leave them")
            if not _given(value) and name in self.always and name != "label" and not shapes_only:
                raise ConfigError(
                    f"{argument}={value!r}: the model was trained with {name}_dropout=0 and has "
                    f"no prediction without; give {argument}"
                )
        (labels, prompts, scalars), result = values, {}
        if "label" in self.names:
            classes = self.spec.num_classes
            labels = labels if _given(labels) else range(classes)
            result["label"] = _cycle(label_list(labels, classes, self.spec.classes), num)
        if "text" in self.names:
            # An empty text is exactly the network's null.
            texts = text_list(prompts, self.spec.text_length)
            result["text"] = _cycle(encode(texts, self.spec.text_length), num)
        if "scalar" in self.names and scalars is not None:
            result["scalar"] = _cycle(number_rows(scalars, self.spec.scalars), num)
        return result

    def _also(
        self, num: int, values: Values, weights: Any
    ) -> tuple[list[dict[str, np.ndarray]], np.ndarray | None]:
        """Further conditions, and their weights [k] where some are given."""
        lists = {
            f"also_{argument}": _list(value)
            for (_, argument), value in zip(_FIELDS, values, strict=True)
            if _given(value)
        }
        count = len(next(iter(lists.values()), ()))
        shares = {"also_guidance": _list(weights)} if _given(weights) else {}
        for name, value in {**lists, **shares}.items():
            if len(value) != count:
                what = f"{count} further conditions" if count else "no further condition"
                raise ConfigError(f"{name}={value!r}: expected one for each of {what}")
        parts = []
        for k in range(count):
            one = [lists.get(f"also_{argument}", [])[k : k + 1] for _, argument in _FIELDS]
            parts.append(self._other(num, "also_", (one[0], one[1], one[2])))
        if not shares:
            return parts, None
        numbers = [number("also_guidance", share) for share in shares["also_guidance"]]
        return parts, np.asarray(numbers, np.float32)

    def _other(self, num: int, prefix: str, values: Values) -> dict[str, np.ndarray] | None:
        """`rows` of what is given beside; None where nothing is."""
        if not any(_given(value) for value in values):
            return None
        for (name, argument), value in zip(_FIELDS, values, strict=True):
            if name in self.always and not _given(value):
                raise ConfigError(
                    f"{prefix}{argument}={value!r}: the model was trained with {name}_dropout=0 "
                    f"and has no prediction without; give {prefix}{argument}"
                )
        try:
            rows = self.rows(num, values)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from error
        # Labels that are not given are none here, and not all classes.
        return {k: v for k, v in rows.items() if k != "label" or _given(values[0])}


def _given(value: Any) -> bool:
    # An array of no axis has no length.
    sized = isinstance(value, Sized) and getattr(value, "ndim", 1) > 0
    return not (value is None or (sized and not len(value)))


def _list(value: Any) -> list[Any]:
    if isinstance(value, jax.Array):
        value = np.asarray(value)
    several = isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0
    return [value] if isinstance(value, str) or not several else list(value)


def _cycle(values: np.ndarray, num: int) -> np.ndarray:
    """The rows repeated or cut to `num`."""
    return values[np.arange(num) % len(values)]
