"""The saves of a run: under way beside the training, and noted outside the checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from diffusion_jax import workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.state import TrainState, position


def _described(state: TrainState, step: int) -> dict[str, int]:
    """The metadata of a checkpoint: Python integers, exact beyond 32 bits."""
    return {"step": step, "examples": position(state.examples)}


class Saves:
    """What the loop and the start of a run do with the checkpoints of its workdir."""

    def __init__(self, checkpoints: Checkpointer, path: Path) -> None:
        self._checkpoints, self._path = checkpoints, path
        self._under_way = False

    def first_state(
        self, compiled: CompiledTrainer, begin: Callable[[], TrainState] | None = None
    ) -> TrainState:
        """The newest checkpoint of the workdir, or a fresh state where there never was one.

        Args:
            compiled: the training step.
            begin: makes a fresh state; None for one of initial parameters.

        Raises:
            ConfigError: the checkpoints are gone, unreadable or of another run.
        """
        main, step = jax.process_index() == 0, self._checkpoints.latest_step()
        if step is None:
            workdir.check_never_saved(self._path)
            if main and (self._path / workdir.CONFIG_FILE).exists():
                print(f"{self._path} holds no checkpoint yet: starts at step 0", flush=True)
            return compiled.init() if begin is None else begin()
        state, metadata = self._checkpoints.restore(compiled.abstract_state, step)
        held = _described(state, int(state.step))
        if step != held["step"] or any(metadata.get(name) != held[name] for name in held):
            raise ConfigError(
                f"checkpoint {str(self._path / workdir.CHECKPOINTS / str(step))!r} contradicts "
                f"itself: its metadata is {metadata}, its state is of {held}; put it back as it "
                "was saved, or move it away to resume from an earlier step"
            )
        if main:
            print(f"resumed from step {step} of {self._path}", flush=True)
        return state

    def save(self, state: TrainState, step: int) -> None:
        """Starts to write a checkpoint under the number of updates it has seen."""
        self._checkpoints.save(step, state, _described(state, step))
        self._note()
        self._under_way = True

    def collect(self) -> None:
        """Takes note of a save that is over; asked at every step, it costs nothing in between.

        Raises:
            ConfigError, Aborted: it could not be written.
        """
        if self._under_way and not self._checkpoints.saving():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises as `collect` does."""
        self._under_way = False
        self._checkpoints.wait()
        self._note()

    def close(self) -> None:
        """Waits and frees the threads; raises as `collect` does."""
        try:
            self._checkpoints.close()
        finally:
            self._note()

    def _note(self) -> None:
        latest = self._checkpoints.latest_step()
        if jax.process_index() == 0 and latest is not None:
            workdir.note_saved(self._path, latest)
