"""Frozen parts of a run: arguments of its step, never trained, kept by hash instead of copied.

A hash is that of the parameters, whatever checkpoint they lie in: an encoder may be moved, and one
that was trained on is another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import builders, workdir
from diffusion_jax import config as configs
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec
from diffusion_jax.diffusion import denoiser, predictions
from diffusion_jax.errors import ConfigError, DiffusionJaxError
from diffusion_jax.objectives.alignment import FrozenEncoder, network_encoder
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.parallel.sharding import path_name, shardings_for, with_shardings

PyTree = Any
ALIGNMENT = "objective.denoising.alignment"
HASH_DIGITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a run needs and does not train.

    Attributes:
        encoder: of the alignment, its parameters on the run's mesh; None without.
        hashes: by the name of the tree, of its parameters.
    """

    encoder: FrozenEncoder | None = None
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def trees(self) -> dict[str, PyTree]:
        """The argument `frozen` of the training step."""
        return {} if self.encoder is None else {"alignment": self.encoder.params}


def prepare(config: Config, spec: DataSpec, on: Mesh, given: FrozenEncoder | None = None) -> Frozen:
    """Loads the frozen parts that a config asks for. A collective: every process must call it.

    Args:
        config: of the run.
        spec: its data.
        on: its mesh.
        given: encoder that was handed to `train`, parameters on the host or on devices.

    Raises:
        ConfigError: an encoder is missing, not asked for, or does not fit the data.
    """
    asked = config.objective.name == "denoising"
    own = config.objective.denoising.alignment
    name, _ = configs.component(own, ALIGNMENT) if asked else ("none", {})
    if (name == "given") != (given is not None):
        what = "no encoder is" if given is None else "an encoder is"
        wanted = "train(config, workdir, encoder=...)" if given is None else "'given'"
        raise ConfigError(f"config.{ALIGNMENT}.name={name!r}: {what} given; expected {wanted}")
    if name == "none":
        return Frozen()
    size = config.mesh.fsdp_min_size
    with _in_one_line(f"config.{ALIGNMENT}.name='given'"):
        if given is not None:
            encoder = dataclasses.replace(given, params=_placed(given.params, on, size))
            _check_width(encoder, spec)
    if given is None:
        with _in_one_line(f"config.{ALIGNMENT}.workdir.path={own.workdir.path!r}"):
            encoder = _of_workdir(own.workdir.to_dict(), spec, on, size)
    return Frozen(encoder=encoder, hashes={"alignment": hash_of(encoder.params)})


@contextlib.contextmanager
def _in_one_line(field: str) -> Iterator[None]:
    """What is wrong with an encoder, though it speaks of a config of its own."""
    try:
        yield
    except (DiffusionJaxError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ConfigError(f"{field}: {' '.join(first)}") from error


def _check_width(encoder: FrozenEncoder, spec: DataSpec) -> None:
    x = jax.ShapeDtypeStruct((1, *spec.shape), "float32")
    found = jax.eval_shape(encoder.encode, encoder.params, x).shape[-1]
    if found != encoder.dim:
        raise ConfigError(f"the encoder's dim={encoder.dim}: its features have {found} channels")


def _placed(params: PyTree, on: Mesh, min_size: int) -> PyTree:
    host = jax.tree.map(np.asarray, gather(params))
    return jax.tree.map(
        lambda a, place: jax.make_array_from_callback(a.shape, place, lambda i: a[i]),
        host,
        shardings_for(host, on, min_size=min_size),
    )


def _of_workdir(options: Mapping[str, Any], spec: DataSpec, on: Mesh, size: int) -> FrozenEncoder:
    """The network of a finished run, without conditioning, with the weights it samples from."""
    if not options["path"]:
        raise ConfigError("expected the workdir of a trained run")
    config = workdir.read_config(options["path"])
    seen = workdir.read_spec(options["path"])
    if seen.shape != spec.shape:
        raise ConfigError(f"its data have shape {seen.shape}; these have {spec.shape}")
    if options["features_after"] is not None:
        if config.network.name != "dit":
            raise ConfigError(
                f"a {config.network.name!r} has its features at one place; leave "
                f"config.{ALIGNMENT}.workdir.features_after={options['features_after']}"
            )
        config.network.dit.features_after = options["features_after"]
    built = builders.model(config, seen)
    if built.schedule is None:
        raise ConfigError(f"its process is {config.process.name!r}; expected 'gaussian'")
    x = jax.ShapeDtypeStruct((1, *spec.shape), "float32")
    noise = jax.ShapeDtypeStruct((1,), "float32")
    if config.network.name == "dit" and not config.network.dit.features_after:
        raise ConfigError(
            "its config has network.dit.features_after=0; name the number of blocks in "
            f"config.{ALIGNMENT}.workdir.features_after, up to {_depth(built, x, noise)}"
        )
    found = builders.feature_shape(config.network.name, built.network, x, noise)
    return FrozenEncoder(
        encode=_encode(built, options["time"]),
        params=_restored(config, options["path"], built, on, size),
        dim=found.shape[-1],
    )


def _depth(built: builders.Model, x: Any, noise: Any) -> int:
    shapes = jax.eval_shape(built.network.init, jax.eval_shape(lambda: jax.random.key(0)))
    blocks = shapes["blocks"]
    return len(blocks) if "0" in blocks else jax.tree.leaves(blocks)[0].shape[0]


def _encode(built: builders.Model, time: float) -> Callable[[PyTree, Any], Any]:
    """Clean data as the network takes it, told the noise level of `time`."""

    def encode(params: PyTree, x0: Any) -> Any:
        schedule, scale = built.schedule_of(params), 1.0
        if built.prediction == "edm":
            alpha, sigma = schedule.alpha(time), schedule.sigma(time)
            c_in = predictions.preconditioning(alpha, sigma, built.sigma_data).c_in
            scale = jnp.asarray(c_in, x0.dtype)
        noise = denoiser.noise_input(built.network.noise_input, schedule, time)
        return network_encoder(built.network.apply, noise)(params, scale * x0)

    return encode


def _restored(config: Config, path: str, built: builders.Model, on: Mesh, size: int) -> PyTree:
    name = config.sampling.ema
    shapes = jax.eval_shape(built.network.init, jax.eval_shape(lambda: jax.random.key(0)))
    wanted = with_shardings(shapes, shardings_for(shapes, on, min_size=size))
    folder = workdir.folder_of(path) / workdir.CHECKPOINTS
    with Checkpointer(folder, read_only=True) as checkpoints:
        if name:
            return checkpoints.restore_subtree({"ema": {name: wanted}})["ema"][name]
        stored = checkpoints.stored()["params"]
        # Raw parameters may be kept in 16 bits.
        kept = jax.tree.map(
            lambda a, b: jax.ShapeDtypeStruct(a.shape, b.dtype, sharding=a.sharding),
            wanted,
            _part(stored, wanted),
        )
        return checkpoints.restore_subtree({"params": kept})["params"]


def _part(tree: PyTree, like: PyTree) -> PyTree:
    if not isinstance(like, Mapping):
        return tree
    return {key: _part(tree[key], value) for key, value in like.items()}


def hash_of(params: PyTree) -> str:
    """Of paths, shapes, kinds and values; the same on any mesh. A collective."""
    found = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_name = {path_name(path): leaf for path, leaf in leaves}
    for name, leaf in sorted(by_name.items()):
        # One array at a time: the host never holds all of them.
        values = np.ascontiguousarray(gather(leaf))
        found.update(f"{name} {values.dtype} {values.shape} ".encode())
        found.update(values.tobytes())
    return found.hexdigest()[:HASH_DIGITS]
