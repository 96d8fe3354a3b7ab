"""What the metrics need of a stream of pictures: moments, and features of some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.caption_score import CaptionStream
from diffusion_jax.evaluation.class_scores import SPLITS, ClassStream
from diffusion_jax.evaluation.moments import MomentStream

KEPT = 10_000
"""Features that are kept at most, for the scores of pairs and neighbours."""


class TooFewFinite(ConfigError):
    """Of so many samples, fewer are numbers than a metric needs."""


class NothingFinite(TooFewFinite):
    """No sample is a number."""


@dataclasses.dataclass
class Collected:
    """Of `expected` pictures, of which so many are known beforehand.

    Attributes:
        expected: pictures to come.
        names: of the features whose moments are wanted: features, spatial.
        seed: draws which of them are kept, where not all are.
        moments: by name.
        captions: takes the features of the pictures' captions, where those are wanted.
        classes: of the logits, where there are some.
        count: pictures so far.
        not_finite: samples that were left out, being no numbers.
    """

    expected: int
    names: tuple[str, ...] = ("features",)
    seed: int = 0
    captions: CaptionStream | None = None
    moments: dict[str, MomentStream] = dataclasses.field(default_factory=dict)
    classes: ClassStream | None = None
    count: int = 0
    not_finite: int = 0
    _kept: list[np.ndarray] = dataclasses.field(default_factory=list)
    _kept_index: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        # A part drawn at random: data may be sorted by class.
        random = np.random.default_rng(self.seed)
        chosen = random.permutation(self.expected)[:KEPT]
        self._chosen = np.zeros(self.expected, bool)
        self._chosen[chosen] = True
        self._order = random.permutation(min(self.expected, KEPT))
        self._seen = 0
        self.moments = {name: MomentStream() for name in self.names}

    def add(
        self,
        pixels: np.ndarray,
        features_of: Callable[[Any], Mapping[str, np.ndarray]],
        labels: np.ndarray | None = None,
        finite: np.ndarray | None = None,
        texts: np.ndarray | None = None,
    ) -> None:
        """Takes the next pictures; those that are not `finite` are counted and left out."""
        index = np.arange(self._seen, self._seen + len(pixels))
        self._seen += len(pixels)
        if finite is not None and not finite.all():
            self.not_finite += int((~finite).sum())
            pixels, index = pixels[finite], index[finite]
            labels, texts = (None if part is None else part[finite] for part in (labels, texts))
        if not len(pixels):
            return
        found = features_of(pixels)
        for name, stream in self.moments.items():
            stream.add(_one(found, name))
        if self.captions is not None:
            given = [] if texts is None else texts.tolist()
            self.captions.add(_one(found, "normalised"), given)
        kept = self._chosen[index]
        self._kept.append(found["features"][kept])
        self._kept_index.append(index[kept])
        if "logits" in found:
            if self.classes is None:
                self.classes = ClassStream(self.expected, SPLITS)
            self.classes.add(found["logits"], index, labels)
        self.count += len(pixels)

    def features(self) -> np.ndarray:
        """Those that were kept [k, D], in an order of no meaning."""
        together = self._together(self._kept)
        return together[self._order[self._order < len(together)]]

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Places [k] and features [k, D] of those that were kept, in the order of the samples."""
        return self._together(self._kept_index), self._together(self._kept)

    def check_finite(self, name: str = "", needed: int = 1) -> None:
        """Raises NothingFinite where samples were seen and none of them is finite, TooFewFinite
        where fewer are than the `needed` ones of a metric."""
        if 0 < self.count < needed:
            raise TooFewFinite(
                f"{self.count} of {self._seen} samples are finite: {name} needs at least {needed}; "
                "the run diverges, or give more"
            )
        if not self.count and self._seen:
            raise NothingFinite(
                f"none of {self._seen} samples is finite: expected numbers; the run diverged, or "
                "the solver's options are unstable"
            )

    def _together(self, parts: list[np.ndarray]) -> np.ndarray:
        self.check_finite()
        if not self.count:
            raise ConfigError("no pictures: expected at least one")
        return np.concatenate(parts)


def _one(found: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in found:
        known = ", ".join(found)
        raise ConfigError(f"{name!r} are not among the features of the network: {known}")
    return found[name]
