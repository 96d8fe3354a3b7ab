"""How near reconstructions are to their originals, picture by picture.

    PSNR(x, y) = 10 log10(255^2 / mean (x - y)^2)                                            (1)

    SSIM(x, y) = mean of (2 m_x m_y + C1)(2 s_xy + C2)
                         / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))                        (2)

over windows and channels (Wang et al. 2004, "Image Quality Assessment", eq. 13), where m, s^2 and
s_xy are mean, variance and covariance under a Gaussian of deviation 1.5 pixels cut off at 11 x 11,
C1 = (0.01 255)^2, C2 = (0.03 255)^2, and windows lie inside the picture.

    perceptual(x, y) = sum over layers of mean over space of |f(x)/|f(x)| - f(y)/|f(y)||^2   (3)

with the channels f of a feature network, in the manner of LPIPS (Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1). LPIPS has weights that
were fitted to human judgement and networks of its own; here every weight is 1, so that values
compare with others over the same network alone, whose name they carry.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.diffusion.likelihood import Estimate, estimate
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.features.extract import three_channels
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.evaluation.metrics import Score
from diffusion_jax.networks import compiler_options

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
SMALLEST = 1e-10
"""Added to a norm: channels that are all zero stay zero (LPIPS has the same)."""
NAMES = ("psnr", "ssim")
CHUNK = 64
"""Pictures of a compiled program, at most."""


def psnr(
    originals: UInt8[np.ndarray, "n h w c"], reconstructions: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """(1) in dB, of all pixels and channels of each picture; infinite where they are equal."""
    difference = originals.astype(np.int32) - reconstructions
    error = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(PEAK**2 / error)


def ssim(
    originals: UInt8[Any, "b h w c"], reconstructions: UInt8[Any, "b h w c"]
) -> Float[Array, "b rows"]:
    """The mean over columns and channels of (2), of each row of windows: h - 10 of them."""
    x, y = (jnp.asarray(a).astype(jnp.float32) for a in (originals, reconstructions))
    # Of what is left beside a picture's mean the squares are small, and so is their rounding.
    mean_x, mean_y = (a.mean((1, 2), keepdims=True) for a in (x, y))
    x, y = x - mean_x, y - mean_y
    near_x, near_y = _smooth(x), _smooth(y)
    variances = _smooth(x * x) - near_x**2 + _smooth(y * y) - near_y**2
    covariance = _smooth(x * y) - near_x * near_y
    near_x, near_y = near_x + mean_x, near_y + mean_y
    luminance = (2.0 * near_x * near_y + C1) / (near_x**2 + near_y**2 + C1)
    return (luminance * (2.0 * covariance + C2) / (variances + C2)).mean((2, 3))


def _smooth(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Means under the Gaussian window, where it fits; sums, which no device rounds to few bits."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    rows, columns = (length - WINDOW + 1 for length in x.shape[1:3])
    x = sum((x[:, i : i + rows] * w for i, w in enumerate(weights)), jnp.zeros(()))
    return sum((x[:, :, i : i + columns] * w for i, w in enumerate(weights)), jnp.zeros(()))


def perceptual(
    maps: Callable[[Any, Any], Sequence[Any]], params: Any, originals: Any, reconstructions: Any
) -> Float[Array, "b layers"]:
    """The summands of (3), of uint8 pictures [b, h, w, 3].

    Args:
        maps, params: of a `FeatureNetwork`.
    """
    pairs = zip(maps(params, originals), maps(params, reconstructions), strict=True)
    layers = [jnp.square(_unit(a) - _unit(b)).sum(-1).mean((1, 2)) for a, b in pairs]
    return jnp.stack(layers, axis=1)


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + SMALLEST)


class Comparison:
    """Collects the scores of pairs, batch by batch: a number a picture and score is kept.

    Args:
        network: of the perceptual distance; None: none is taken.
        names: of the other scores, of `NAMES`.

    Raises:
        ConfigError: an unknown name, nothing to be scored, or a network that gives no maps.
    """

    def __init__(self, network: FeatureNetwork | None = None, names: Sequence[str] = NAMES):
        for name in names:
            if name not in NAMES:
                raise ConfigError(unknown_name("names", name, NAMES))
        if not names and network is None:
            raise ConfigError(f"names=(): expected some of {', '.join(NAMES)}, or a network")
        if network is not None and network.maps is None:
            raise ConfigError(
                f"network={network.name!r} gives no maps of its layers for a perceptual distance; "
                "expected one that does, such as self or efficientnet_lite0"
            )
        self._network, self._names = network, tuple(names)
        self._params = None if network is None else jax.tree.map(jnp.asarray, network.params)
        self._found: dict[str, list[np.ndarray]] = {}
        self._size = 0

    @functools.cached_property
    def _programs(self) -> dict[str, Callable[[Any, Any], Any]]:
        """Name -> parts of the scores of a chunk, [b, parts]."""
        programs: dict[str, Callable[[Any, Any], Any]] = {}
        if "ssim" in self._names:
            programs["ssim"] = jax.jit(ssim, compiler_options=compiler_options())
        if self._network is not None and self._network.maps is not None:
            layers = functools.partial(perceptual, self._network.maps)
            compiled = jax.jit(layers, compiler_options=compiler_options())
            programs["perceptual"] = functools.partial(compiled, self._params)
        return programs

    def add(self, originals: Any, reconstructions: Any) -> None:
        """Takes pairs of uint8 pictures [n, H, W, C].

        Raises:
            ConfigError: other arrays, shapes that differ, pictures smaller than the window of SSIM,
                channels that the network does not read, or maps that are not finite.
        """
        pairs = tuple(np.asarray(a) for a in (originals, reconstructions))
        self._check(*pairs)
        if "psnr" in self._names:
            self._found.setdefault("psnr", []).append(psnr(*pairs))
        coloured = () if self._network is None else tuple(three_channels(a) for a in pairs)
        for name, program in self._programs.items():
            given = coloured if name == "perceptual" else pairs
            parts = self._in_chunks(program, *given)
            if not np.isfinite(parts).all():
                raise ConfigError(f"{name}: values are not finite: wrong weights of the network?")
            reduced = parts.sum(1) if name == "perceptual" else parts.mean(1)
            self._found.setdefault(name, []).append(reduced)

    def _check(self, originals: np.ndarray, reconstructions: np.ndarray) -> None:
        for name, batch in (("originals", originals), ("reconstructions", reconstructions)):
            if batch.dtype != np.uint8 or batch.ndim != 4 or not batch.size:
                raise ConfigError(
                    f"{name}: a batch of {batch.dtype} {list(batch.shape)}; expected uint8 "
                    "[n, height, width, channels]"
                )
        if originals.shape != reconstructions.shape:
            raise ConfigError(
                f"originals {list(originals.shape)}, reconstructions "
                f"{list(reconstructions.shape)}: expected pairs of one shape"
            )
        height, width = originals.shape[1:3]
        if "ssim" in self._names and min(height, width) < WINDOW:
            raise ConfigError(
                f"pictures of {height} x {width} are smaller than the window of ssim, {WINDOW} x "
                f"{WINDOW}; leave it: names=('psnr',)"
            )

    def _in_chunks(
        self, program: Callable[..., Any], x: np.ndarray, y: np.ndarray
    ) -> Float[np.ndarray, "n parts"]:
        """In programs of one size, that of the first batch: its last picture fills others up."""
        self._size = self._size or min(len(x), CHUNK)
        parts = []
        for start in range(0, len(x), self._size):
            rows = np.minimum(np.arange(start, start + self._size), len(x) - 1)
            parts.append(np.asarray(program(x[rows], y[rows]), np.float64))
        return np.concatenate(parts)[: len(x)]

    def scores(self) -> list[Score]:
        """Means over the pictures so far, with their standard errors.

        Raises:
            ConfigError: there were none.
        """
        if not self._found:
            raise ConfigError("originals: there are no pictures; expected at least one pair")
        found = {name: np.concatenate(parts) for name, parts in self._found.items()}
        remarks = {"psnr": ("PSNR", "dB"), "ssim": ("SSIM", "")}
        if self._network is not None:
            remark = f"unit weights, not LPIPS; weights hash {self._network.weights_hash}"
            remarks["perceptual"] = (f"perceptual-{self._network.name}", remark)
        return [
            Score(name=remarks[name][0], estimate=_mean(values), remark=remarks[name][1])
            for name, values in found.items()
        ]


def _mean(values: np.ndarray) -> Estimate:
    # The PSNR of equals is infinite, and so is then the mean; it has no deviation.
    if np.isinf(values).any():
        return Estimate(math.inf, math.inf, len(values))
    return estimate(values)


def scores(
    originals: Iterable[Any],
    reconstructions: Iterable[Any],
    network: FeatureNetwork | None = None,
    *,
    names: Sequence[str] = NAMES,
) -> list[Score]:
    """PSNR, SSIM and, with a network, the perceptual distance of reconstructions.

    Args:
        originals: batches of uint8 pictures [n, H, W, C], one after the other.
        reconstructions: of the same pictures, in batches of the same sizes.
        network: of the perceptual distance, such as `self_trained.train` or
            `efficientnet_lite0.build` make it; its pictures have 1 or 3 channels.
        names: psnr and ssim, or one of them.

    Returns:
        PSNR in dB (higher is better), SSIM (1 for equals), perceptual-<network> (0 for equals).

    Raises:
        ConfigError: as of `Comparison`, or one of them ends before the other.
    """
    comparison, end = Comparison(network, names), object()
    pairs = itertools.zip_longest(originals, reconstructions, fillvalue=end)
    for number, (original, reconstruction) in enumerate(pairs):
        if original is end or reconstruction is end:
            short = "originals" if original is end else "reconstructions"
            raise ConfigError(f"{short} end after {number} batches; expected a pair of each batch")
        comparison.add(original, reconstruction)
    return comparison.scores()
