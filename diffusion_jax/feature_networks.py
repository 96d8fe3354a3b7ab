"""Feature networks by the name and file that a user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
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
from diffusion_jax.parallel.distributed import by_main

OF_FILES: dict[str, Callable[..., FeatureNetwork]] = {
    "inception": inception.build,
    "dinov2": dinov2.build,
    "clip": clip.build,
    "efficientnet_lite0": efficientnet_lite0.build,
}
"""Name -> what makes the network of the tensors of a file, its path, and options."""
LEARN_FROM = 50_000
"""Examples that the network of the data itself learns from, at most, drawn at random."""
LEARN_BYTES = 2**31
"""Their pixels' bytes, at most: they are held in memory."""
JUDGED_BY = 10_000
"""Held-out examples that it is judged by, at most."""


def check(asked: Any, names: Sequence[str]) -> None:
    """Raises ConfigError for what can be no feature network for these metrics; opens nothing."""
    name, _, path = str(asked).partition(":")
    if name not in ("self", *OF_FILES):
        raise ConfigError(unknown_name("features", name, ["self", *OF_FILES]))
    if CAPTION_SCORE in names and (name != "clip" or not path):
        raise ConfigError(
            f"metrics={CAPTION_SCORE}: features={asked!r} has no text tower; expected clip:FILE"
        )
    if name == "self":
        if path:
            raise ConfigError(
                f"features={asked!r}: this network learns from the data; leave {path!r}"
            )
        return
    if not path:
        raise ConfigError(f"features={asked!r}: expected {name}:FILE, the file of its weights")
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise ConfigError(f"features={asked!r}: there is no file {file!r}; expected its weights")


def feature_network(
    asked: str, config: Any, training: data.Source, folder: Path, note: Callable[[str], None]
) -> tuple[FeatureNetwork, str]:
    """The network called NAME or NAME:FILE, and a remark about it.

    Args:
        asked: "self", or a name and the file of its weights; of Inception also how it resizes
            (inception:FILE:tf1 as the TensorFlow 1 graph, by which sFID and Inception scores are
            published; else as pytorch-fid); of CLIP, where it is not beside its file, the tokeniser
            (clip:FILE:TOKENIZER).
        config: of the run, for the held-out data that a network of its own is judged by.
        training: what such a network learns from.
        folder: where it is kept.
        note: takes lines about what is going on.

    Raises:
        ConfigError: an unknown name or resizing, no file, or weights that do not fit.
    """
    check(asked, ())
    name, _, path = asked.partition(":")
    if name == "self":
        return _own(config, training, folder, note)
    path, options = _file_and_options(name, path)
    with named("features="):
        network = OF_FILES[name](read_tensors(path), path, **options)
    return network, network.remark


def _file_and_options(name: str, given: str) -> tuple[str, dict[str, str]]:
    """The file of weights, and options of what makes the network, from what stands after NAME."""
    if name == "clip":
        return _clip_files(given)[0], {}
    if name != "inception":
        return given, {}
    path, colon, resize = given.partition(":")
    if colon and resize not in inception.RESIZES:
        with named(f"features={name}:FILE:RESIZE: "):
            raise ConfigError(unknown_name("resize", resize, inception.RESIZES))
    return path, {"resize": resize} if colon else {}


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
    check(asked, (CAPTION_SCORE,))
    files = asked.partition(":")[2]
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
    height, width, channels = training.spec.shape
    most = min(LEARN_FROM, max(LEARN_BYTES // (height * width * channels), 1))
    part = data.drawn(training, most)
    classes = training.spec.num_classes
    self_trained.check(len(part), (height, width), by_class=classes > 0)
    # One process of a run learns and keeps it: the others get its weights, bit for bit.
    flat = by_main(lambda: _known_or_learned(part, folder, note))
    network = self_trained.build(_nested(flat))
    return network, _accuracy(network, config, classes > 0)


def _known_or_learned(
    part: data.Source, folder: Path, note: Callable[[str], None]
) -> Mapping[str, np.ndarray]:
    """The weights by layer and kind, such as "conv0.bias"."""
    classes = part.spec.num_classes
    pixels, labels = _in_memory(part)
    digest = hashlib.sha256(f"{self_trained.RECIPE} {classes} {pixels.shape}".encode())
    digest.update(pixels.data)
    if labels is not None:
        digest.update(labels.data)
    path = folder / f"self-{digest.hexdigest()[:HASH_DIGITS]}.npz"
    flat = references.read_arrays(path)
    if flat is None:
        note(f"a feature network learns from {len(pixels)} training pictures")
        network = self_trained.train(three_channels(pixels), labels, classes)
        layers = network.params.items()
        flat = {f"{a}.{b}": value for a, layer in layers for b, value in layer.items()}
        references.write_arrays(path, flat)
    return flat


def _in_memory(part: data.Source) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 pictures [n, height, width, channels], and int32 labels [n] where there are classes."""
    pixels = np.empty((len(part), *part.spec.shape), np.uint8)
    labels = np.empty(len(part), np.int32) if part.spec.num_classes else None
    start = 0
    for some, classes in references.pictures(part):
        rows = slice(start, start + len(some))
        pixels[rows] = some
        if labels is not None and classes is not None:
            labels[rows] = classes
        start += len(some)
    return pixels, labels


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, value in flat.items():
        layer, _, kind = name.partition(".")
        params.setdefault(layer, {})[kind] = value
    return params


def _accuracy(network: FeatureNetwork, config: Any, by_class: bool) -> str:
    """How well it knows what it learned, of pictures that it did not learn from."""
    right, apply = 0, jax.jit(network.apply)
    held = data.drawn(builders.source(config, "validation"), JUDGED_BY)
    for pixels, labels in references.pictures(held):
        seen = three_channels(pixels)
        seen, labels = (seen, labels) if by_class else self_trained.turned(seen)
        logits = apply(network.params, seen)["logits"]
        right += int((np.asarray(logits).argmax(1) == labels).sum())
    of = "" if by_class else "quarter turns of "
    return f"right for {right / len(held):.1%} of {of}{len(held)} held out"
