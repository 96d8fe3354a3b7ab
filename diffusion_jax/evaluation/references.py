"""References: what samples are compared with, computed once and kept by the hash of its content."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import data
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.collected import KEPT, Collected
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.features.protocol import HASH_DIGITS, FeatureNetwork
from diffusion_jax.evaluation.frechet import as_moments
from diffusion_jax.evaluation.metrics import Reference
from diffusion_jax.evaluation.moments import Moments
from diffusion_jax.parallel.distributed import by_main
from diffusion_jax.visual.pixels import replace_file, to_uint8

LAYOUT = 2
"""Of the kept files; another is computed anew."""
BATCH = 256
COUNTS = {"n", "count"}
"""Names of the number of examples in files of statistics."""
_UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError)


def pictures(source: data.Source) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """uint8 pictures of a source in order, as samples are rounded, and their labels."""
    for batch in data.sequential_batches(source, min(BATCH, len(source))):
        real = batch["mask"]
        labels = batch["conditioning"].get("label")
        yield to_uint8(batch["x"][real]), None if labels is None else labels[real]


def content_hash(source: data.Source) -> str:
    """16 hexadecimal digits: a SHA-256 over those of all pictures, in whatever order they come."""
    found = [
        hashlib.sha256(np.ascontiguousarray(one).tobytes()).digest()
        for pixels, _ in pictures(source)
        for one in pixels
    ]
    digest = hashlib.sha256(repr(source.spec.shape).encode())
    digest.update(b"".join(sorted(found)))
    return digest.hexdigest()[:HASH_DIGITS]


def of_source(
    source: data.Source, name: str, extractor: Extractor, wanted: tuple[str, ...], folder: Path
) -> Reference:
    """The reference that a source of pictures makes.

    Args:
        source: of the examples.
        name: of the data and the split.
        extractor: the feature network.
        wanted: features whose moments are needed: features, spatial.
        folder: where it is kept, under the hashes of the pictures and of all that decides features.

    Raises:
        ConfigError: no pictures, or features that are not finite.
    """
    # Process 0 alone reads and writes what is kept: disks of other hosts may hold something else.
    known = by_main(lambda: _known(source, extractor.network, wanted, folder))
    hashed, key = known.pop("hashed").item(), known.pop("key").item()
    if not known:
        collected = Collected(len(source), wanted)
        for pixels, labels in pictures(source):
            collected.add(pixels, extractor, labels)
        known = _arrays(collected)
        if jax.process_index() == 0:
            write_arrays(_path(folder, key), known)
    moments = {
        one: Moments(len(source), known[f"{one}_mean"], known[f"{one}_scatter"]) for one in wanted
    }
    return Reference(
        name=name, hash=hashed, count=len(source), moments=moments, features=known["kept"]
    )


def _known(
    source: data.Source, network: FeatureNetwork, wanted: tuple[str, ...], folder: Path
) -> dict[str, np.ndarray]:
    """The hash of the pictures, the key of what is kept, and that where it is there."""
    hashed = content_hash(source)
    of_network = network.name, network.weights_hash, network.resize, network.options
    decides = LAYOUT, hashed, *of_network, wanted, KEPT
    key = hashlib.sha256(repr(decides).encode()).hexdigest()[:HASH_DIGITS]
    kept = read_arrays(_path(folder, key)) or {}
    return {"hashed": np.asarray(hashed), "key": np.asarray(key), **kept}


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.npz"


def of_file(path: str | os.PathLike[str]) -> Reference:
    """Published statistics, .npz with mu and sigma (and mu_s, sigma_s of the spatial features).

    Raises:
        ConfigError: no such file, not one of these layouts, made with pickle, or no covariances.
    """
    path = Path(path)
    where = f"reference={str(path)!r}"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            wanted = {"mu", "sigma", "mu_s", "sigma_s", *COUNTS}
            statistics = {name: file[name] for name in file.files if name in wanted}
            names = file.files
    # Another type is an .npy of this name, or parts that are packed or encrypted in another way.
    except (*_UNREADABLE, AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{where}: no .npz of arrays; expected mu and sigma") from error
    moments = {"features": as_moments(statistics or dict.fromkeys(names), where)}
    if "mu_s" in statistics and "sigma_s" in statistics:
        count = {name: statistics[name] for name in COUNTS & set(statistics)}
        spatial = {"mu": statistics["mu_s"], "sigma": statistics["sigma_s"]}
        moments["spatial"] = as_moments({**spatial, **count}, f"{where}, mu_s and sigma_s")
    return Reference(
        name=path.name,
        hash=hashlib.sha256(raw).hexdigest()[:HASH_DIGITS],
        count=moments["features"].count if COUNTS & set(statistics) else None,
        moments=moments,
        features=None,
    )


def _arrays(collected: Collected) -> dict[str, np.ndarray]:
    result = {"kept": collected.features()}
    for name, stream in collected.moments.items():
        total = stream.total()
        result |= {f"{name}_mean": total.mean, f"{name}_scatter": total.scatter}
    return result


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What was kept, or None where it is missing or was cut off."""
    try:
        # From memory: np.load leaves a file open that it cannot read.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, *_UNREADABLE):
        return None


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Keeps it; a folder that cannot be written costs only the time of the next evaluation."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    try:
        replace_file(path, save)
    except OSError:
        return
