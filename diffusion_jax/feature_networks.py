"""Feature networks by the name and file that a user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import builders, data
from diffusion_jax.errors import ConfigError, named, unknown_name
from diffusion_jax.evaluation import references
from diffusion_jax.evaluation.caption_score import METRIC as CAPTION_SCORE
from diffusion_jax.evaluation.caption_score import CaptionExtractor
from diffusion_jax.evaluation.features import (
    clip,
    clip_tokens,
    dinov2,
    efficientnet_lite0,
    inception,
    self_trained,
)
from diffusion_jax.evaluation.features.extract import three_channels
from diffusion_jax.evaluation.features.protocol import HASH_DIGITS, FeatureNetwork
from diffusion_jax.interop.weight_files import read_tensors

OF_FILES: dict[str, Callable[[Mapping[str, np.ndarray], str], FeatureNetwork]] = {
    "inception": inception.build,
    "dinov2": dinov2.build,
    "clip": clip.build,
    "efficientnet_lite0": efficientnet_lite0.build,
}
"""Name -> what makes the network of the tensors of a file."""
LEARN_FROM = 50_000
"""Examples that the network of the data itself learns from, at most."""


def feature_network(
    asked: str, config: Any, training: data.Source, folder: Path, note: Callable[[str], None]
) -> tuple[FeatureNetwork, str]:
    """The network called NAME or NAME:FILE, and a remark about it.

    Args:
        asked: "self", or a name and the file of its weights; of CLIP also, where it is not beside
            that, its tokeniser (clip:FILE:TOKENIZER).
        config: of the run, for the held-out data that a network of its own is judged by.
        training: what such a network learns from.
        folder: where it is kept.
        note: takes lines about what is going on.

    Raises:
        ConfigError: an unknown name, no file, or weights that do not fit.
    """
    name, _, path = asked.partition(":")
    if name not in ("self", *OF_FILES):
        raise ConfigError(unknown_name("features", name, ["self", *OF_FILES]))
    if name == "self":
        if path:
            raise ConfigError(
                f"features={asked!r}: this network learns from the data; leave {path!r}"
            )
        return _own(config, training, folder, note)
    if not path:
        raise ConfigError(f"features={asked!r}: expected {name}:FILE, the file of its weights")
    path = _clip_files(path)[0] if name == "clip" else path
    with named("features="):
        return OF_FILES[name](read_tensors(path), path), ""


def caption_extractor(asked: str, mesh: Mesh) -> CaptionExtractor:
    """The text tower of the file of `feature_network(asked, ...)`.

    Its tokeniser is `tokenizer.json`, or `vocab.json` and `merges.txt`: beside the file, or where
    clip:FILE:TOKENIZER says (a file or a folder).

    Args:
        asked: clip:FILE or clip:FILE:TOKENIZER.
        mesh: over which a batch of captions is split.

    Raises:
        ConfigError: another network, a file without a text tower, or no tokeniser that fits it.
    """
    name, _, files = asked.partition(":")
    if name != "clip" or not files:
        raise ConfigError(
            f"metrics={CAPTION_SCORE}: features={asked!r} has no text tower; expected clip:FILE"
        )
    path, tokenizer = _clip_files(files)
    with named(f"metrics={CAPTION_SCORE}, features=clip:FILE: "):
        network = clip.build_text(read_tensors(path), path)
    with named(f"metrics={CAPTION_SCORE}, features=clip:FILE:TOKENIZER: "):
        found = clip_tokens.load(tokenizer, length=network.length, vocabulary=network.vocabulary)
    return CaptionExtractor(network, found, mesh)


def _clip_files(files: str) -> tuple[str, Path]:
    """The file of weights, and where the tokeniser is."""
    path, _, tokenizer = files.partition(":")
    return path, Path(tokenizer) if tokenizer else Path(path).parent


def _own(
    config: Any, training: data.Source, folder: Path, note: Callable[[str], None]
) -> tuple[FeatureNetwork, str]:
    parts = list(references.pictures(training))
    pixels = three_channels(np.concatenate([part for part, _ in parts]))[:LEARN_FROM]
    classes = training.spec.num_classes
    known = [found for _, found in parts if found is not None]
    labels = None
    if classes and len(known) == len(parts):
        labels = np.concatenate(known)[:LEARN_FROM].astype(np.int32)
    recipe = f"{self_trained.RECIPE} {classes} {pixels.shape}".encode()
    digest = hashlib.sha256(recipe + np.ascontiguousarray(pixels[..., :1]).tobytes())
    path = folder / f"self-{digest.hexdigest()[:HASH_DIGITS]}.npz"
    network = _read(path)
    if network is None:
        note(f"a feature network learns from {len(pixels)} training pictures")
        network = self_trained.train(pixels, labels, classes)
        _write(path, network)
    return network, _accuracy(network, config, labels is not None)


def _accuracy(network: FeatureNetwork, config: Any, by_class: bool) -> str:
    """How well it knows classes that it did not learn from."""
    if not by_class:
        return "learned quarter turns"
    right, count = 0, 0
    for pixels, labels in references.pictures(builders.source(config, "validation")):
        logits = network.apply(network.params, jnp.asarray(three_channels(pixels)))["logits"]
        right += int((np.asarray(logits).argmax(1) == labels).sum())
        count += len(pixels)
    return f"right for {right / count:.1%} of {count} held out"


def _read(path: Path) -> FeatureNetwork | None:
    flat = references.read_arrays(path)
    if flat is None:
        return None
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, value in flat.items():
        layer, _, kind = name.partition(".")
        params.setdefault(layer, {})[kind] = value
    return self_trained.build(params)


def _write(path: Path, network: FeatureNetwork) -> None:
    layers = network.params.items()
    flat = {f"{a}.{b}": value for a, layer in layers for b, value in layer.items()}
    references.write_arrays(path, flat)
