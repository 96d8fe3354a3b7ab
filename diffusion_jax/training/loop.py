"""The training loop: dispatches steps, reads metrics back late, and calls what is due.

Invariants:
- `train_step` is the only thing that runs per step; the loop waits for the step just dispatched
  only at a log line, a hook, a save or the end.
- The batch of a step is asked for by position; nothing else is remembered about the data.
- A state is saved, evaluated or logged under the number of updates it has seen.
- Before a save everything known up to it is written, and nothing is saved past the guard's limit:
  a run that starts from it goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np

from diffusion_jax.errors import Aborted, Preempted
from diffusion_jax.training.metrics import MetricBuffer, SkippedStep
from diffusion_jax.training.progress import Progress
from diffusion_jax.training.state import TrainState, position
from diffusion_jax.training.writers import Writer

PyTree = Any
Step = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Any, Any]]


@runtime_checkable
class Batches(Protocol):
    """Device batches in order, from a background thread."""

    waited: Any

    def __next__(self) -> tuple[int, PyTree]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
    """Something that is done at intervals with the state.

    Attributes:
        name: for the log.
        every: interval in steps; 0 means at the end only.
        run: `(state, step) -> scalars to write`.
    """

    name: str
    every: int
    run: Callable[[TrainState, int], Mapping[str, float]]

    def due(self, step: int, last: int) -> bool:
        """Whether to run after update number `step` of `last`."""
        return step == last or (self.every > 0 and step % self.every == 0)


class Interrupted(Exception):
    """An evaluation gave way to a machine that is wanted back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        scalars: to write.
        best: whether the state has to be saved, as the best so far.
    """

    scalars: Mapping[str, float]
    best: bool


@runtime_checkable
class Evaluations(Protocol):
    """Long evaluations of the state, after it was saved; every process calls them alike."""

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after update number `step` of `last`."""
        ...

    def owed(self, step: int, last: int) -> bool:
        """Whether that of `step` was due before this start, but never came to its end."""
        ...

    def run(self, state: Any, step: int, stop: Callable[[], bool]) -> Evaluated:
        """Evaluates; raises `Interrupted` soon after `stop` says so."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Intervals and limits, in steps.

    Attributes:
        steps: updates of the whole run.
        batch_size: global, in examples.
        log_every: interval of log lines.
        save_every: interval of checkpoints; the last step is always saved.
        guard_limit: skipped steps in a row that are still borne.
        profile_at: step before which a profile starts; 0 for none.
        profile_steps: steps in the profile.
        flops_per_step: analytic FLOPs of one step, for the utilisation.
        peak_flops: FLOP/s of all devices together; None where it is not known.
    """

    steps: int
    batch_size: int
    log_every: int
    save_every: int
    guard_limit: int
    profile_at: int = 0
    profile_steps: int = 5
    flops_per_step: float = 0.0
    peak_flops: float | None = None


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Everything the loop calls. All of it is handed in; the loop knows no config.

    Attributes:
        step: compiled `(state, frozen, batch) -> (state, packed metrics, bad examples)`.
        frozen: trees handed to every step.
        batches: device batches, starting at the state's position.
        ids: position -> int64 [B], the ids of the global batch, to name a skipped one.
        metric_names: rows of the packed metrics.
        save: `(state, step)`: starts to write a checkpoint.
        should_stop: step -> whether the machine is wanted back; agrees over all processes, which
            ask equally often, and remembers.
        hooks: validation, sample grids.
        evaluations: scores of samples, where some are asked for.
        writer, progress: where things are shown.
        workdir: where a profile goes.
    """

    options: LoopOptions
    step: Step
    frozen: PyTree
    batches: Batches
    ids: Callable[[int], np.ndarray]
    metric_names: Sequence[str]
    save: Callable[[TrainState, int], None]
    should_stop: Callable[[int], bool]
    hooks: Sequence[Hook]
    writer: Writer
    progress: Progress
    workdir: str
    evaluations: Evaluations | None = None

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state` to `options.steps` updates.

        Raises:
            Preempted: the machine is wanted back; the state is saved.
            Aborted: more non-finite steps in a row than the limit.
        """
        start = int(state.step)
        self._first, self._logged = (start, position(state.examples)), start
        self._metrics = MetricBuffer(self.metric_names)
        self._metrics.consecutive_skips = int(state.opt_state["guard"]["consecutive"])
        self._clock = _Clock(start)
        self._profile = _Profile(self.options, start, self.workdir)
        if passed := self._profile.passed(start):
            self.progress.note(passed)
        try:
            if self.evaluations is not None and self.evaluations.owed(start, self.options.steps):
                self._evaluate(self.evaluations, state, start, saved=True)
            for step in range(start + 1, self.options.steps + 1):
                state = self._step(state, step)
        finally:
            if where := self._profile.stop():
                self.progress.note(where)
        return state

    def _step(self, state: TrainState, step: int) -> TrainState:
        last = step == self.options.steps
        self._profile.start_if_due(step)
        _, batch = next(self.batches)
        # Batch and state are on the devices: a transfer here would be a slow mistake.
        with jax.transfer_guard("disallow"):
            state, packed, bad_examples = self.step(state, self.frozen, batch)
        self._metrics.push(step, packed, bad_examples)
        self._check_skipped()
        if self._profile.over(step):
            self._metrics.flush()
            self.progress.note(str(self._profile.stop()))
        saves = last or step % self.options.save_every == 0
        if saves or step % self.options.log_every == 0:
            self._log(step)
        self.progress.step(step)
        self._run_hooks(state, step)
        if saves:
            self.writer.flush()
            self.save(state, step)
        if self.evaluations is not None and self.evaluations.due(step, self.options.steps):
            saves = self._evaluate(self.evaluations, state, step, saved=saves)
        if not last and self.should_stop(step):
            self._leave(state, step, saved=saves)
        return state

    def _evaluate(
        self, evaluations: Evaluations, state: TrainState, step: int, *, saved: bool
    ) -> bool:
        """Whether the state is saved now."""
        with self._clock.paused(self.batches):
            jax.block_until_ready(state.step)
            try:
                found = evaluations.run(state, step, lambda: self.should_stop(step))
            except Interrupted:
                # Also of the last step: the scores are made up for at the next start.
                self._leave(state, step, saved=saved)
        self.writer.scalars(step, found.scalars)
        if found.best and not saved:
            self._log(step)
            self.writer.flush()
            self.save(state, step)
        return saved or found.best

    def _log(self, step: int) -> None:
        """Writes the row of `step`, which a log line and a preemption may both ask for."""
        if step == self._logged:
            return
        self._logged = step
        self._metrics.flush()
        self._check_skipped()
        scalars = {f"train/{k}": v for k, v in self._metrics.take().items()}
        scalars |= self._clock.rates(step, self.options, self.batches.waited)
        scalars |= _memory()
        self.writer.scalars(step, scalars)
        self.progress.log(step, scalars)

    def _run_hooks(self, state: TrainState, step: int) -> None:
        due = [hook for hook in self.hooks if hook.due(step, self.options.steps)]
        if not due:
            return
        with self._clock.paused(self.batches):
            jax.block_until_ready(state.step)
            for hook in due:
                scalars = hook.run(state, step)
                if scalars:
                    self.writer.scalars(step, scalars)

    def _check_skipped(self) -> None:
        for skipped in self._metrics.take_skipped():
            self.progress.note(self._describe(skipped))
        # The longest row, since a good step may be read back together with the bad ones before it.
        if self._metrics.longest_skips > self.options.guard_limit:
            raise Aborted(
                f"{self._metrics.longest_skips} steps in a row were not finite "
                f"(config.guard.limit={self.options.guard_limit}); lower the learning rate or "
                "look at the examples named above"
            )

    def _describe(self, skipped: SkippedStep) -> str:
        first_step, first_position = self._first
        at = first_position + (skipped.step - 1 - first_step) * self.options.batch_size
        ids = self.ids(at)
        bad = ids[skipped.bad_examples] if skipped.bad_examples.any() else ids
        shown = ", ".join(str(i) for i in bad[:16]) + (", ..." if len(bad) > 16 else "")
        what = "non-finite examples" if skipped.bad_examples.any() else "all finite; batch"
        return f"step {skipped.step} skipped: non-finite update; {what}: id {shown}"

    def _leave(self, state: TrainState, step: int, *, saved: bool) -> NoReturn:
        if not saved:
            self._log(step)
            self.writer.flush()
            self.save(state, step)
        raise Preempted(f"the machine is wanted back: saved step {step}; start me again")


class _Profile:
    """One trace of the steps in a window; a run resumed inside it traces the rest."""

    def __init__(self, options: LoopOptions, start: int, workdir: str) -> None:
        first = options.profile_at
        self._window = range(first, first + options.profile_steps if first else 0)
        self._steps = range(max(first, start + 1), self._window.stop)
        self._workdir = workdir
        self._running = False

    def passed(self, start: int) -> str | None:
        """A line where all of the window lies before a resumed run's first step."""
        if not self._window or self._window[-1] > start:
            return None
        return (
            f"config.logging.profile_at={self._window[0]}: steps {self._window[0]}.."
            f"{self._window[-1]} lie before the resumed step {start}; no profile"
        )

    def start_if_due(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._workdir)
            self._running = True

    def over(self, step: int) -> bool:
        return self._running and step == self._steps[-1]

    def stop(self) -> str | None:
        """Ends a running trace; says where it is."""
        if not self._running:
            return None
        self._running = False
        jax.profiler.stop_trace()
        first, last = self._steps[0], self._steps[-1]
        return f"profile of steps {first}..{last} is in {self._workdir}/plugins"


class _Clock:
    """Time spent training since the last log line, hooks left out."""

    def __init__(self, step: int) -> None:
        self._step, self._since, self._waited, self._away = step, time.perf_counter(), 0.0, 0.0
        self._wait_away = 0.0

    def paused(self, batches: Batches) -> _Pause:
        return _Pause(self, batches)

    def add(self, seconds: float, waited: float) -> None:
        self._away += seconds
        self._wait_away += waited

    def rates(self, step: int, options: LoopOptions, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since - self._away, 1e-9)
        steps = step - self._step
        waiting = waited - self._waited - self._wait_away
        self._step, self._since, self._waited = step, now, waited
        self._away = self._wait_away = 0.0
        rates = {
            "train/images_per_second": steps * options.batch_size / seconds,
            "train/steps_per_second": steps / seconds,
            "train/data_wait_share": waiting / seconds,
        }
        if options.flops_per_step:
            flops = steps * options.flops_per_step / seconds
            rates["train/flops_per_second"] = flops
            if options.peak_flops:
                rates["train/mfu"] = flops / options.peak_flops
        return rates


class _Pause:
    def __init__(self, clock: _Clock, batches: Batches) -> None:
        self._clock, self._batches = clock, batches

    def __enter__(self) -> None:
        self._began, self._waited = time.perf_counter(), self._batches.waited

    def __exit__(self, *error: object) -> None:
        waited = self._batches.waited - self._waited
        self._clock.add(time.perf_counter() - self._began, waited)


def _memory() -> dict[str, float]:
    """Peak bytes of the first local device, where the platform reports them (CPU does not)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"train/peak_memory_bytes": float(peak)} if peak else {}
