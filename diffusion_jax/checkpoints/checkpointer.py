"""Asynchronous checkpoints of a whole train state, restored on any mesh with the same bits.

One step holds two parts that appear together or not at all: `state`, any tree of arrays, and
`metadata`, a JSON object for what must stay exact beyond 32 bits (positions as Python integers).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.checkpoints import failures, layout
from diffusion_jax.checkpoints.mismatch import describe_mismatch, summarise
from diffusion_jax.errors import ConfigError


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never asks the runtime: only the training loop may count steps towards an agreement.

        The thread that finishes a save asks with a step long past, and a SIGTERM at that moment
        would be agreed for a step that the loop has behind it and never sees.
        """
        return False


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps of a set that changes while the run goes on."""

    def __init__(self, steps: set[int]) -> None:
        self._steps = steps

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """One truth value a checkpoint."""
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


class Checkpointer:
    """The checkpoints of one run.

    Every process of the run makes one and calls the same methods in the same order.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        """Opens `directory`; creates it, and clears what a killed save left, unless `read_only`.

        Args:
          directory: a local path or gs://...
          keep_last: number of newest steps to keep.
          keep_every: steps that it divides are kept for good.
          read_only: for sampling and evaluation beside a running training; nothing is changed.

        Raises:
          ConfigError: if the directory is missing (`read_only`), cannot be written, or holds
            something but no checkpoint that can be restored.
        """
        if keep_last < 1:
            raise ConfigError(f"keep_last={keep_last} must be at least 1")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"keep_every={keep_every} must be at least 1, or None")
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        failures.hide_traces_of_writing_threads()
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._kept: set[int] = set()
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last), _Kept(self._kept)]
        if keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._preservation = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
        if not read_only:
            layout.prepare_directory(self.directory)
            self._manager = self._make_manager()
        else:
            layout.check_restorable(self.directory)
            if not self.directory.is_dir():
                raise ConfigError(
                    f"checkpoints directory {path!r} does not exist; expected that of a trained run"
                )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending; one that is still being written is not among
        them."""
        return layout.complete_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest step that can be restored, or None before the first save."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> bool:
        """Starts to write `state` and `metadata` as `step`; the writing goes on in threads.

        The values are copied before this returns, so that the caller may donate `state` at once.
        Waits for a save that is still under way.

        Args:
          step: the number of updates in `state`.
          state: tree of `jax.Array`, typed keys included; none without elements (ValueError).
          metadata: what `json` can write.

        Returns:
          False when that step is there already (after a resume): nothing is written then.

        Raises:
          ConfigError: if this save or the one before could not be written for want of room or
            permission; Aborted where the storage failed otherwise.
        """
        if self._read_only:
            raise ValueError(f"the checkpoints in {self.directory} were opened read_only")
        json.dumps(metadata)  # a TypeError here, not in a thread later
        with self._reported():
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return False
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata)
                ),
                force=True,
            )

    def keep(self, step: int) -> None:
        """Keeps `step` beside the newest ones, in place of the step that this was last asked of."""
        self._kept.clear()
        self._kept.add(step)

    def saving(self) -> bool:
        """Whether the last save is still being written; costs nothing to ask."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the last save is complete on disk.

        Raises:
          ConfigError, Aborted: if it could not be written, as for `save`.
        """
        with self._reported():
            if self._manager is not None:
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads. Raises as `wait` does."""
        with self._reported():
            if self._manager is not None:
                self._manager.close()
        self._manager = None

    def read_metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata of `step` (default: the newest)."""
        return layout.read_metadata(self.directory, self._existing(step))

    def stored(self, step: int | None = None) -> Any:
        """What `step` holds, as nested dicts (lists for tuples) of `jax.ShapeDtypeStruct`.

        Reads no array. A typed key appears as the integers it is made of.
        """
        path = self._state_path(self._existing(step))
        with self._readable(path), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(path).tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, metadata) of `step` (default: the newest), with exactly the saved bits.

        Args:
          abstract: tree of `jax.ShapeDtypeStruct` like the saved state; the shardings in it may
            differ from those at the save in mesh and in number of processes.
          step: a step of `steps()`.

        Raises:
          ConfigError: if there is no such step, it is damaged or cannot be read, or `abstract`
            differs from what is stored.
        """
        step = self._existing(step)
        return self._restore(abstract, step, partial=False), self.read_metadata(step)

    def restore_subtree(self, abstract: Any, step: int | None = None) -> Any:
        """Only the part of the state that is in `abstract`; nothing else is read.

        Args:
          abstract: nested dict of `jax.ShapeDtypeStruct`, for instance
            `{"ema": {"default": params}}`. An array without sharding goes to the first device.
          step: a step of `steps()` (default: the newest).

        Raises:
          ConfigError: as for `restore`, with regard to that part.
        """
        return self._restore(abstract, self._existing(step), partial=True)

    def _restore(self, abstract: Any, step: int, *, partial: bool) -> Any:
        path = self._state_path(step)
        differences = describe_mismatch(abstract, self.stored(step), partial=partial)
        if differences:
            raise ConfigError(
                f"checkpoint {str(path.parent)!r} is of another architecture: "
                f"{summarise(differences)}; expected the config that it was trained with"
            )
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=getattr(a, "sharding", None) or here
            ),
            abstract,
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
        with self._readable(path), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=placed, restore_args=restore_args, partial_restore=partial
                ),
            )

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step in steps:
            return step
        if not steps:
            raise ConfigError(f"checkpoints directory {str(self.directory)!r} holds no checkpoint")
        nearest = min(steps, key=lambda known: abs(known - (step or 0)))
        raise ConfigError(
            f"step={step} is not among the checkpoints in {str(self.directory)!r}; "
            f"nearest: {nearest}"
        )

    def _state_path(self, step: int) -> epath.Path:
        return self.directory / str(step) / layout.STATE

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preservation, cleanup_tmp_directories=True
        )
        return _Manager(self.directory, options=options)

    @contextlib.contextmanager
    def _readable(self, path: epath.Path) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError):  # the device's: not enough room, no answer
            raise
        except Exception as error:  # a damaged file may mislead orbax into anything
            earlier = [step for step in self.steps() if step < int(path.parent.name)]
            raise ConfigError(
                f"checkpoint {str(path.parent)!r} cannot be read: {failures.origin(error)}; "
                f"expected it as it was saved; earlier steps: {earlier}"
            ) from error

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns what the writing threads met into one line; the next save starts with new ones."""
        try:
            yield
        except Exception as error:
            self._manager = None
            failures.raise_readable(error, self.directory, self.steps())
            raise
