"""How well pictures fit their captions: the CLIP score (Hessel et al. 2021, "CLIPScore: A
Reference-free Evaluation Metric for Image Captioning").

    100 max(cos(picture, caption), 0)

over the projected features of both towers, averaged over the samples. Their own weight is 2.5
instead of 100, and they put "A photo depicts" before a caption; scores of samples are told in
hundredths and of the caption as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from diffusion_jax.diffusion.likelihood import Estimate
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.clip import TextNetwork
from diffusion_jax.evaluation.features.clip_tokens import CaptionTokenizer
from diffusion_jax.evaluation.features.extract import OverDevices

METRIC = "clip_score"
SCALE = 100.0
_KNOWN = 10_000
"""Captions whose features are kept: those of samples come again and again."""


def check_prompts(prompts: Any) -> None:
    """Whether samples of such prompts have captions, before any is drawn.

    Raises:
        ConfigError: none, or an empty one.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    bad = next((text for text in texts if not isinstance(text, str) or not text.strip()), None)
    if not texts or bad is not None:
        raise ConfigError(
            f"metrics={METRIC}: prompts={bad!r}, but every sample needs a caption; give --prompt "
            "to a model of captions, or leave this metric"
        )


class CaptionExtractor:
    """Captions in, features of length 1 out.

    Args:
        network: the text tower.
        tokenizer: of as many tokens a row as the tower has.
        mesh: over which a batch is split.
        batch_size: captions a compiled batch, at least.
    """

    def __init__(
        self, network: TextNetwork, tokenizer: CaptionTokenizer, mesh: Mesh, batch_size: int = 64
    ) -> None:
        self._run = OverDevices(network.apply, network.params, mesh, batch_size, "captions")
        self._tokenizer = tokenizer
        self.options = network.options
        self._known: dict[str, np.ndarray] = {}
        self.cut: set[str] = set()
        """Captions that were too long, and lost their last tokens."""

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The features of some captions, the same in every process."""
        if len(self._known) > _KNOWN:
            self._known.clear()
        new = sorted(set(captions) - set(self._known))
        if new:
            rows = self._tokenizer(new)
            self.cut.update(text for text, cut in zip(new, rows.cut, strict=True) if cut)
            found = self._run(rows.tokens)["normalised"]
            self._known.update(zip(new, found, strict=True))
        return np.stack([self._known[text] for text in captions])


class CaptionStream:
    """Collects the scores of single samples; memory does not grow with their number.

    Args:
        features_of: of captions.
    """

    def __init__(self, features_of: CaptionExtractor) -> None:
        self._features_of = features_of
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, pictures: Float[np.ndarray, "n d"], captions: Sequence[str]) -> None:
        """Takes the features of pictures, of length 1, and their captions.

        Raises:
            ConfigError: an empty caption, or towers of two networks.
        """
        check_prompts(captions)
        texts = self._features_of([str(text) for text in captions])
        if texts.shape != pictures.shape:
            raise ConfigError(
                f"metrics={METRIC}: captions have {texts.shape[1]} features and pictures "
                f"{pictures.shape[1]}; expected both towers of one network"
            )
        cosines = (pictures.astype(np.float64) * texts).sum(1)
        scores = SCALE * np.maximum(cosines, 0.0)
        # The mean and the squares about it, of all so far (Chan et al. 1983).
        count, mean = len(scores), float(scores.mean())
        total, apart = self._count + count, mean - self._mean
        self._squares += float(((scores - mean) ** 2).sum())
        self._squares += apart**2 * self._count * count / total
        self._mean += apart * count / total
        self._count = total

    def estimate(self) -> Estimate:
        """The mean, and its standard error for these captions: others would give another mean.

        Raises:
            ConfigError: no samples.
        """
        if not self._count:
            raise ConfigError(f"metrics={METRIC}: no samples; expected at least one")
        n = self._count
        error = math.sqrt(self._squares / (n - 1) / n) if n > 1 else math.inf
        return Estimate(self._mean, error, n)

    @property
    def remark(self) -> str:
        """What a reader has to know about it."""
        cut, options = len(self._features_of.cut), self._features_of.options
        said = [f"text tower of {options}"] if options else []
        if cut:
            said.append(f"{cut} captions cut: more tokens than the text tower reads")
        return "; ".join(said)
