"""Learning rates as functions of the number of updates n made so far.

(1)  warm-up:       peak (n + 1) / warmup_steps                for n < warmup_steps
(2)  constant:      peak
(3)  cosine:        from peak to final_scale peak at `steps`   (Loshchilov & Hutter 2017, eq. 5)
(4)  inverse_sqrt:  peak / sqrt(max(n / reference_steps, 1))   (Karras et al. 2024)
(5)  cool-down:     (2) and (4) times a line from 1 to final_scale over the last cooldown_steps
                    (Zhai et al. 2022)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import ConfigError, unknown_name

SCHEDULES = ("constant", "cosine", "inverse_sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """A learning rate; callable with an update count of any shape.

    Attributes:
        name: one of `SCHEDULES`.
        peak: the highest learning rate.
        steps: updates of the whole run, warm-up and cool-down included.
        warmup_steps: updates until the peak is reached.
        final_scale: what is left at the end of the cosine, or of the cool-down, as a factor.
        cooldown_steps: updates in the cool-down (5); 0 for none.
        reference_steps: updates until (4) begins to fall; 0 takes `warmup_steps`.
    """

    name: str
    peak: float
    steps: int
    warmup_steps: int = 0
    final_scale: float = 0.0
    cooldown_steps: int = 0
    reference_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(unknown_name("optimizer.schedule", self.name, SCHEDULES))
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.warmup_steps}: expected 0..{self.steps} "
                "(config.steps)"
            )
        if self.name == "cosine" and self.cooldown_steps:
            raise ConfigError(
                f"optimizer.cooldown_steps={self.cooldown_steps}: the schedule 'cosine' falls by "
                "itself; set 0, or schedule='constant' or 'inverse_sqrt'"
            )
        room = self.steps - self.warmup_steps
        if not 0 <= self.cooldown_steps <= room:
            raise ConfigError(
                f"optimizer.cooldown_steps={self.cooldown_steps}: expected 0..{room} "
                "(config.steps less warmup_steps)"
            )
        if self.reference_steps < 0:
            raise ConfigError(
                f"optimizer.reference_steps={self.reference_steps}: expected at least 0"
            )
        if self.reference_steps and self.name != "inverse_sqrt":
            raise ConfigError(
                f"optimizer.reference_steps={self.reference_steps}: the schedule {self.name!r} "
                "has none; set 0, or schedule='inverse_sqrt'"
            )
        if 0 < self.reference_steps < self.warmup_steps:
            raise ConfigError(
                f"optimizer.reference_steps={self.reference_steps}: the rate would fall before its "
                f"peak; expected at least warmup_steps={self.warmup_steps}, or 0 for that"
            )

    def __call__(self, count: Any) -> Any:
        """The learning rate of the update that follows `count` others."""
        count = jnp.asarray(count, jnp.float32)
        warm = (count + 1.0) / max(self.warmup_steps, 1)
        return self.peak * jnp.where(count < self.warmup_steps, warm, self._decayed(count))

    def with_peak(self, peak: float) -> RateSchedule:
        """The same shape with another peak."""
        return dataclasses.replace(self, peak=peak)

    def _decayed(self, count: Any) -> Any:
        if self.name == "cosine":
            progress = (count - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
            half = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
            return self.final_scale + (1.0 - self.final_scale) * half
        decayed = jnp.ones_like(count)
        if self.name == "inverse_sqrt":
            reference = self.reference_steps or max(self.warmup_steps, 1)
            decayed = 1.0 / jnp.sqrt(jnp.maximum(count / reference, 1.0))
        if self.cooldown_steps:
            left = jnp.clip((self.steps - count) / self.cooldown_steps, 0.0, 1.0)
            decayed = decayed * (self.final_scale + (1.0 - self.final_scale) * left)
        return decayed


def warmup_schedule(name: str, peak: float, *, steps: int, **options: Any) -> RateSchedule:
    """`RateSchedule` by position: name and peak, then the options of its attributes.

    Raises:
        ConfigError: unknown name, or a warm-up or cool-down that does not fit into the run.
    """
    return RateSchedule(name=name, peak=peak, steps=steps, **options)
