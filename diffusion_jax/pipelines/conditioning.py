"""What a user gives as conditions of samples, as arrays that the network reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.text import encode
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.options import label_list, number, number_rows, text_list

_FIELDS = (("label", "labels"), ("text", "prompts"), ("scalar", "scalars"))


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

    def rows(
        self, num: int, labels: Any, prompts: Any, scalars: Any, *, shapes_only: bool = False
    ) -> dict[str, np.ndarray]:
        """Conditioning [num, ...] by name; what is not given is the network's null, but for labels,
        which are then all classes in turn.

        Raises:
            ConfigError: something that the model does not read, or was never trained without.
        """
        values = {"labels": labels, "prompts": prompts, "scalars": scalars}
        for name, argument in _FIELDS:
            value = values[argument]
            if _given(value) and name not in self.names:
                what = "unconditional" if not self.names else f"not conditioned by {name}"
                raise ConfigError(f"{argument}={value!r}: the model is {what}; leave them")
            if not _given(value) and name in self.always and name != "label" and not shapes_only:
                raise ConfigError(
                    f"{argument}={value!r}: the model was trained with {name}_dropout=0 and has "
                    f"no prediction without; give {argument}"
                )
        result = {}
        if "label" in self.names:
            classes = self.spec.num_classes
            labels = labels if _given(labels) else range(classes)
            result["label"] = _cycle(label_list(labels, classes), num)
        if "text" in self.names:
            # An empty text is exactly the network's null.
            texts = text_list(prompts, self.spec.text_length)
            result["text"] = _cycle(encode(texts, self.spec.text_length), num)
        if "scalar" in self.names and scalars is not None:
            result["scalar"] = _cycle(number_rows(scalars, self.spec.scalars), num)
        return result

    def negative(
        self, num: int, labels: Any, prompts: Any, scalars: Any
    ) -> dict[str, np.ndarray] | None:
        """`rows` of what guidance turns away from; None where nothing is given.

        Raises:
            ConfigError: as `rows`, naming `negative_labels` and so on.
        """
        return self._other(num, "negative_", labels, prompts, scalars)

    def also(
        self, num: int, labels: Any, prompts: Any, scalars: Any, weights: Any, guidance: float
    ) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """Further conditions, each of all samples, and their weights [k] (default: `guidance`).

        Raises:
            ConfigError: as `rows`, naming `also_labels` and so on; numbers that differ.
        """
        lists = {
            f"also_{argument}": _list(value)
            for argument, value in (("labels", labels), ("prompts", prompts), ("scalars", scalars))
            if _given(value)
        }
        count = len(next(iter(lists.values()), ()))
        shares = _list(weights) if _given(weights) else [guidance] * count
        for name, value in {**lists, "also_guidance": shares}.items():
            if len(value) != count:
                what = f"{count} further conditions" if count else "no further condition"
                raise ConfigError(f"{name}={value!r}: expected one for each of {what}")
        numbers = [number("also_guidance", share) for share in shares]
        parts = []
        for k in range(count):
            one = {name: values[k : k + 1] for name, values in lists.items()}
            arguments = [one.get(f"also_{argument}") for _, argument in _FIELDS]
            parts.append(self._other(num, "also_", *arguments))
        return parts, np.asarray(numbers, np.float32)

    def _other(
        self, num: int, prefix: str, labels: Any, prompts: Any, scalars: Any
    ) -> dict[str, np.ndarray] | None:
        if not any(_given(value) for value in (labels, prompts, scalars)):
            return None
        for name, value in (("label", labels), ("text", prompts), ("scalar", scalars)):
            if name in self.always and not _given(value):
                argument = prefix + dict(_FIELDS)[name]
                raise ConfigError(
                    f"{argument}={value!r}: the model was trained with {name}_dropout=0 and has "
                    f"no prediction without; give {argument}"
                )
        try:
            rows = self.rows(num, labels, prompts, scalars)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from error
        # Labels that are not given are none here, and not all classes.
        return {k: v for k, v in rows.items() if k != "label" or _given(labels)}


def _given(value: Any) -> bool:
    return not (value is None or (isinstance(value, Sized) and not len(value)))


def _list(value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    return list(value)


def _cycle(values: np.ndarray, num: int) -> np.ndarray:
    """The rows repeated or cut to `num`."""
    return values[np.arange(num) % len(values)]
