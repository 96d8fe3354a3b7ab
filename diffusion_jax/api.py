"""The door for Python: `train(config, workdir)` and `load(workdir).sample(16)`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from diffusion_jax import (
    builders,
    config_rules,
    data,
    frozen,
    start,
    training_evaluations,
    transfer,
    workdir,
)
from diffusion_jax import config as configs
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.config import Config
from diffusion_jax.errors import named
from diffusion_jax.evaluations import evaluate
from diffusion_jax.examples import held_out_conditions
from diffusion_jax.likelihoods import bits_per_dim
from diffusion_jax.loading import load, weaker_model
from diffusion_jax.lock import Lock, release_on_error
from diffusion_jax.objectives.alignment import FrozenEncoder
from diffusion_jax.objectives.base import network_params
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.distributed import Preemption, main_first
from diffusion_jax.parallel.flops import count_flops, peak_flops
from diffusion_jax.parallel.mesh import check_batch_size, process_rows
from diffusion_jax.pipelines import guiding
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.pipelines.previews import Previews
from diffusion_jax.saves import Saves
from diffusion_jax.training import writers
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.loop import Hook, Loop, LoopOptions
from diffusion_jax.training.progress import Progress
from diffusion_jax.training.state import TrainState, position
from diffusion_jax.training.validation import Validator

__all__ = ["Run", "bits_per_dim", "evaluate", "load", "train"]

PyTree = Any


def train(config: Config, path: str | Path, *, encoder: FrozenEncoder | None = None) -> TrainState:
    """Starts, resumes or extends the run of a workdir; returns when `config.steps` are done.

    Args:
        config: a config made from `diffusion_jax.config.base()`.
        path: the workdir. One that holds checkpoints of this config is resumed.
        encoder: that of `objective.denoising.alignment`, where its name is "given".

    Raises:
        ConfigError: the config, the workdir or a checkpoint cannot work as given.
        DataError: the data are missing or unreadable.
        Preempted: SIGTERM was received and the state is saved.
        Aborted: too many non-finite steps in a row.
    """
    return Run.build(config, path, encoder).train()


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run put together but not started: the one place where all rooms meet.

    Attributes:
        config: the whole config.
        path: the workdir.
        model: network, process and prediction.
        train_data, validation_data: sources of the two splits.
        train_ids: a hash of the ids of the training examples.
        compiled: the training step on its mesh.
        frozen: what the step reads and never trains.
        weak: the weaker model of autoguidance, for the grids.
        begin: makes the first state, where it is not one of fresh parameters.
        held: keeps other runs off the workdir; None but in process 0.
        preemption: asked whether the machine is wanted back.
    """

    config: Config
    path: Path
    model: builders.Model
    train_data: data.Source
    train_ids: str
    validation_data: data.Source
    compiled: CompiledTrainer
    frozen: frozen.Frozen
    weak: guiding.Weak | None = None
    begin: transfer.Beginning | None = None
    held: Lock | None = None
    preemption: Preemption = dataclasses.field(default_factory=Preemption)

    @classmethod
    def build(cls, config: Config, path: str | Path, encoder: FrozenEncoder | None = None) -> Run:
        """Builds and checks everything that needs no compilation."""
        config_rules.validate(config)
        config = builders.resolve(config)
        folder, held = start.open_workdir(path, config)
        with release_on_error(held):
            config = start.as_begun(folder, config)
            run = cls.put_together(config, folder, held, encoder)
            run.checkpoints.steps()
        return run

    @classmethod
    def put_together(
        cls,
        config: Config,
        folder: Path,
        held: Lock | None = None,
        encoder: FrozenEncoder | None = None,
    ) -> Run:
        """The run of a validated and resolved config; touches nothing in its workdir."""
        mesh = builders.mesh(config)
        with named("config."):
            check_batch_size(config.batch_size, config.accumulation, mesh)
        with named("config.validation."):
            check_batch_size(config.validation.batch_size or config.batch_size, 1, mesh)
        train_data = main_first(lambda: builders.source(config, "train"))
        train_ids = start.agree_on_data(train_data)
        workdir.check_data(folder, train_data.spec, len(train_data), train_ids)
        model = builders.model(config, train_data.spec)
        parts = frozen.prepare(config, train_data.spec, mesh, encoder)
        workdir.check_frozen(folder, parts.hashes)
        compiled = builders.compiled(config, model, mesh, parts.encoder)
        training_evaluations.check(config, train_data.spec)
        with named("config.sampling."):
            weak = weaker_model(config, model, mesh)
            shapes = network_params(compiled.abstract_state.params)
            builders.pipeline(config, model, shapes, mesh, weak).trace()
        return cls(
            config=config,
            path=folder,
            model=model,
            train_data=train_data,
            train_ids=train_ids,
            validation_data=builders.source(config, "validation"),
            compiled=compiled,
            frozen=parts,
            weak=weak,
            begin=transfer.begin(config, folder, train_data.spec, compiled),
            held=held,
        )

    @functools.cached_property
    def checkpoints(self) -> Checkpointer:
        """Those of the workdir, opened for writing when they are first asked for."""
        return Checkpointer(
            self.path / workdir.CHECKPOINTS,
            keep_last=self.config.checkpoint.keep_last,
            keep_every=self.config.checkpoint.keep_every,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return jax.process_index() == 0

    def train(self) -> TrainState:
        """See `diffusion_jax.train`. The workdir is free for another run afterwards."""
        with contextlib.ExitStack() as stack:
            if self.held is not None:
                stack.callback(self.held.release)
            return self._train()

    def _train(self) -> TrainState:
        self.enable_cache()
        state = self._saves.first_state(self.compiled, self.begin)
        first = int(state.step)
        if first >= self.config.steps and not self._owes(first):
            self.checkpoints.close()
            self._finish(f"step {first} of config.steps={self.config.steps} is reached already")
            return state
        with workdir.reported(self.path):
            state = self._train_from(state, first)
        self._finish(f"{self.config.steps} steps done")
        return state

    def _owes(self, step: int) -> bool:
        return self.evaluations is not None and self.evaluations.owed(step, self.config.steps)

    def _train_from(self, state: TrainState, first: int) -> TrainState:
        with contextlib.ExitStack() as stack:
            stack.callback(self._saves.close)
            if self.is_main:
                parts = self.model.spec, len(self.train_data), self.train_ids, self.frozen.hashes
                workdir.write_config(self.path, self.config, *parts)
            writer = writers.create(
                self.path,
                start_step=first,
                tensorboard=self.config.logging.tensorboard,
                process_index=jax.process_index(),
            )
            stack.callback(writer.close)
            progress = Progress(self.config.steps, first, enabled=self.is_main)
            stack.callback(progress.close)
            batches = self.batches(position(state.examples))
            stack.callback(batches.close)
            writer.hparams(dict(configs.flatten(self.config)))
            if self.evaluations is not None:
                self.evaluations.start(first, self.checkpoints.steps())
            asked, found = self.config.validation.examples, len(self.validation_data)
            if self.is_main and asked > found:
                print(f"config.validation.examples={asked}: {found} are held out, all used")
            state = self.loop(batches, writer, progress).run(state)
            self._saves.wait()
        return state

    @functools.cached_property
    def _saves(self) -> Saves:
        return Saves(self.checkpoints, self.path)

    def enable_cache(self) -> None:
        """Keeps compiled programs for the next start."""
        start.enable_cache(self.config)

    def loader(self) -> data.Loader:
        """Shuffled batches of this process."""
        return data.Loader(
            source=self.train_data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rows=process_rows(self.compiled.mesh, self.config.batch_size),
        )

    def batches(self, start: int) -> data.Prefetcher:
        """Device batches from position `start` (examples), made ahead in a thread."""
        return data.Prefetcher(
            self.loader().batch,
            start,
            self.config.batch_size,
            depth=self.config.data.prefetch,
            transfer=functools.partial(global_batch, mesh=self.compiled.mesh),
        )

    def loop(self, batches: data.Prefetcher, writer: writers.Writer, progress: Progress) -> Loop:
        """The loop with its compiled step."""
        trees = self.frozen.trees
        batch = self.abstract_batch(self.loader().batch(0))
        began = time.perf_counter()
        step = self.compiled.lower(batch, trees).compile()
        progress.note(f"train step compiled in {time.perf_counter() - began:.1f} s")
        return Loop(
            options=self._loop_options(batch),
            step=step,
            frozen=trees,
            batches=batches,
            ids=self.loader().ids,
            metric_names=self.compiled.metric_names(batch, trees),
            save=self.save,
            should_stop=self._should_stop,
            hooks=self._hooks(writer),
            writer=writer,
            progress=progress,
            workdir=str(self.path),
            evaluations=self.evaluations,
        )

    def abstract_batch(self, local: Mapping[str, Any]) -> PyTree:
        """Shapes of the global batch whose part in this process is like `local`."""
        given = {name: value for name, value in local.items() if name != "id"}
        return self.compiled.abstract_batch(given, self.config.batch_size)

    def flops_per_step(self, batch: PyTree) -> float:
        """Three forward passes a step: the backward pass costs two (recomputation not counted).

        The frozen encoder has no backward pass.
        """
        trees, encoder = self.frozen.trees, self.frozen.encoder
        forward = self.compiled.forward_flops(batch, trees)
        once = count_flops(encoder.encode, encoder.params, batch["x"]) if encoder else 0
        return 3.0 * forward - 2.0 * once

    def _loop_options(self, batch: PyTree) -> LoopOptions:
        mesh = self.compiled.mesh
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        return LoopOptions(
            steps=self.config.steps,
            batch_size=self.config.batch_size,
            log_every=self.config.logging.every,
            save_every=self.config.checkpoint.every,
            guard_limit=self.config.guard.limit,
            profile_at=self.config.logging.profile_at,
            profile_steps=self.config.logging.profile_steps,
            flops_per_step=self.flops_per_step(batch),
            peak_flops=peak * mesh.size if peak else None,
        )

    def save(self, state: TrainState, step: int) -> None:
        """Starts to write a checkpoint under the number of updates it has seen."""
        self._saves.save(state, step)

    def _should_stop(self, step: int) -> bool:
        # Asked after every step and in evaluations: a save that failed meanwhile ends the run here.
        self._saves.collect()
        return self.preemption.reached()

    def _finish(self, what: str) -> None:
        if self.is_main:
            workdir.show(self.path, what)

    def _hooks(self, writer: writers.Writer) -> list[Hook]:
        config, hooks = self.config, []
        if config.validation.examples:
            hooks.append(Hook(name="validation", every=config.validation.every, run=self._validate))
            if builders.bound_steps(config):
                run = self._bound()
                hooks.append(Hook(name="bound", every=config.validation.every, run=run))
        previews = Previews(
            num=config.sampling.num,
            seed=config.sampling.seed,
            folder=self.path / workdir.SAMPLES,
            trajectory=self.path / workdir.TRAJECTORY,
            last_step=config.steps,
            **held_out_conditions(self.model.conditions, self.validation_data, config.sampling.num),
            write=self.is_main,
            show=writer.image,
        )

        def sample(state: TrainState, step: int) -> Mapping[str, float]:
            return previews(self._sampler_of(state), step)

        hooks.append(Hook(name="samples", every=config.sampling.every, run=sample))
        return hooks

    @functools.cached_property
    def _sampler(self) -> PixelPipeline:
        return builders.pipeline(self.config, self.model, {}, self.compiled.mesh, self.weak)

    def _sampler_of(self, state: TrainState) -> PixelPipeline:
        return self._sampler.with_params(_weights(state, self.config.sampling.ema))

    @functools.cached_property
    def evaluations(self) -> training_evaluations.TrainingEvaluation | None:
        """Scores during the training, where the config asks for some."""
        return training_evaluations.create(
            self.config,
            self.path,
            {"train": self.train_data, "validation": self.validation_data}.__getitem__,
            self._sampler,
            self._sampler_of,
            self.checkpoints.keep,
        )

    def _validation_batches(self) -> Iterator[Any]:
        """Padded device batches of the held-out examples, one at a time."""
        config, mesh = self.config, self.compiled.mesh
        size = config.validation.batch_size or config.batch_size
        local = data.sequential_batches(
            self.validation_data,
            size,
            self._validation_examples,
            rows=process_rows(mesh, size),
        )
        return (global_batch(batch, mesh) for batch in local)

    @property
    def _validation_examples(self) -> int:
        return min(self.config.validation.examples, len(self.validation_data))

    @functools.cached_property
    def _validator(self) -> Validator:
        return Validator(
            trainer=self.compiled.trainer,
            batches=self._validation_batches,
            count=self._validation_examples,
            mesh=self.compiled.mesh,
        )

    def _validate(self, state: TrainState, step: int) -> Mapping[str, float]:
        return self._validator(state, self.frozen.trees)

    def _bound(self) -> Callable[[TrainState, int], Mapping[str, float]]:
        """The whole variational bound of the averaged weights, and its floor where it is known."""
        evaluator = builders.bound(self.config, self.model, self.train_data, self.compiled.mesh)

        def run(state: TrainState, step: int) -> Mapping[str, float]:
            params = _weights(state, self.config.sampling.ema)
            result = evaluator(params, self._validation_batches())
            return {f"val/{name}": value for name, value in result.items()}

        return run


def _weights(state: TrainState, name: str) -> PyTree:
    """The average called `name`, or the raw parameters for ""."""
    return network_params(state.ema[name] if name else state.params)
