"""What samples are compared with, by the name that a user gives: a split, a folder or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax import builders, data
from diffusion_jax import config as configs
from diffusion_jax.data.joined import Joined
from diffusion_jax.errors import ConfigError, DataError, unknown_name
from diffusion_jax.evaluation import references
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.metrics import Reference

SPLITS = ("train", "validation")
Sources = Callable[[str], data.Source]


def check_name(asked: Any) -> None:
    """Raises ConfigError where a reference can be none."""
    asked = str(asked)
    if asked in SPLITS or Path(asked).is_dir():
        return
    if asked.endswith(".npz"):
        if not Path(asked).is_file():
            raise ConfigError(f"reference={asked!r}: there is no such file; expected statistics")
        return
    known = [*SPLITS, "FILE.npz", "FOLDER"]
    raise ConfigError(unknown_name("reference", asked, known))


def reference_of(
    asked: str,
    config: Any,
    sources: Sources,
    extractor: Extractor,
    wanted: tuple[str, ...],
    cache: Path,
    note: Callable[[str], None],
) -> Reference:
    """The reference called `asked`.

    Args:
        asked: train or validation, a folder of pictures, or an .npz of statistics.
        config: of the run.
        sources: its data by split.
        extractor: the feature network.
        wanted: features whose moments are needed.
        cache: folder where references are kept.
        note: takes lines about what is going on, warnings too.

    Raises:
        ConfigError: there is no such reference, or its pictures are not like the samples.
        DataError: it cannot be read.
    """
    if asked.endswith(".npz"):
        return references.of_file(asked)
    source = sources(asked) if asked in SPLITS else _folder(asked, sources("train").spec)
    title = f"{config.data.name} {asked}" if asked in SPLITS else _title(asked, source.spec)
    note(f"reference: {len(source)} pictures of {title}")
    found = references.of_source(source, title, extractor, wanted, cache)
    if asked != "train":
        _warn_of_held_out(asked, found, sources, note)
    return found


def _title(path: str, spec: data.DataSpec) -> str:
    """Other pictures are not refused, but never changed without a word."""
    height, width, channels = spec.shape
    colours = "grey" if channels == 1 else f"{channels} channels"
    return f"folder {Path(path).name} (made {height} x {width}, {colours})"


def _folder(path: str, spec: data.DataSpec) -> data.Source:
    """All pictures of a folder, in the size of the samples."""
    height, width, channels = spec.shape
    if height != width:
        raise ConfigError(
            f"reference={path!r}: samples of {height} x {width} are not square; expected a split "
            "of the data or an .npz of statistics"
        )
    config = configs.base()
    config.data.name, config.data.path = "image_folder", path
    options = {"labels": "none", "captions": "none", "validation_share": 0.5}
    config.data.image_folder.update(image_size=height, channels=channels, **options)
    try:
        return Joined([builders.source(config, split) for split in SPLITS])
    except (ConfigError, DataError) as error:
        raise ConfigError(
            f"reference={path!r}: expected a folder of two pictures or more; {error}"
        ) from error


def _warn_of_held_out(
    asked: str, found: Reference, sources: Sources, note: Callable[[str], None]
) -> None:
    held_out = sources("validation")
    if asked != "validation" and found.hash != references.content_hash(held_out):
        return
    note(
        f"Warning: reference={asked!r} is what this run holds out ({found.count} pictures): "
        "distances to it are not those to the training data that papers give; "
        "reference='train' is that"
    )
