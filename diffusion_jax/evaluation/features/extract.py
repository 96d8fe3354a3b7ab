"""Features of pictures, in filled batches over all devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.parallel.mesh import batch_sharding, batch_shards, replicated

CHANNELS = (1, 3)


def three_channels(pixels: Any) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures as the networks read them: grey ones three times over.

    Raises:
        ConfigError: no uint8 pictures of 1 or 3 channels.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in CHANNELS:
        raise ConfigError(
            f"pixels of type {pixels.dtype} and shape {pixels.shape}: feature networks read uint8 "
            "pictures [n, height, width, 1 or 3]"
        )
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


@dataclasses.dataclass(frozen=True)
class OverDevices:
    """A pure function of parameters and rows on a mesh, in batches of one size.

    Attributes:
        apply: `(params, rows [b, ...]) -> {name: [b, D]}`, where no row depends on another.
        params: on every device.
        mesh: over which a batch is split.
        batch_size: rows a compiled batch, at least.
        called: what the rows are, for messages.
    """

    apply: Callable[[Any, Any], Mapping[str, Any]]
    params: Any
    mesh: Mesh
    batch_size: int = 64
    called: str = "pictures"

    @functools.cached_property
    def _program(self) -> Callable[..., Any]:
        return jax.jit(self.apply, compiler_options=compiler_options())

    @functools.cached_property
    def _placed(self) -> Any:
        whole = replicated(self.mesh)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, whole, lambda i: a[i]), self.params
        )

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{name: [n, D]} of rows [n, ...], the same in every process.

        Raises:
            ConfigError: no rows, or results that are not finite.
        """
        if not len(rows):
            raise ConfigError(f"no {self.called}: expected at least one")
        shards = batch_shards(self.mesh)
        size = -(-self.batch_size // shards) * shards
        parts: list[Any] = []
        waiting: Any = None
        for start in range(0, len(rows), size):
            # The last batch is filled with the last row.
            batch = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
            placed = jax.make_array_from_callback(
                batch.shape, batch_sharding(self.mesh), lambda i, batch=batch: batch[i]
            )
            with jax.set_mesh(self.mesh):
                found = self._program(self._placed, placed)
            if waiting is not None:
                parts.append(gather(waiting))
            waiting = found
        parts.append(gather(waiting))
        return {name: self._checked(name, parts, len(rows)) for name in parts[0]}

    def _checked(self, name: str, parts: list[Any], count: int) -> np.ndarray:
        whole = np.concatenate([part[name] for part in parts])[:count]
        bad = int((~np.isfinite(whole)).any(1).sum())
        if bad:
            raise ConfigError(
                f"{name} of {bad} of {count} {self.called} are not finite: wrong weights?"
            )
        return whole


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A feature network on a mesh.

    Attributes:
        network: the network.
        mesh: over which a batch is split; the parameters are on every device.
        batch_size: pictures a compiled batch, at least.
    """

    network: FeatureNetwork
    mesh: Mesh
    batch_size: int = 64

    @functools.cached_property
    def _run(self) -> OverDevices:
        network = self.network
        return OverDevices(network.apply, network.params, self.mesh, self.batch_size)

    def __call__(self, pixels: Any) -> dict[str, np.ndarray]:
        """Features {name: [n, D]} of uint8 pictures [n, H, W, 1 or 3], the same in every process.

        Raises:
            ConfigError: other pictures, none, or features that are not finite.
        """
        return self._run(three_channels(pixels))
