"""A scheduler's config with its class's defaults filled in, and the errors that name a field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.errors import ConfigError, nearest

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_STABLE_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_EPSILON = {"prediction_type": "epsilon"}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_FLOW_SIGMAS = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DPM = {
    **_BETAS,
    **_EPSILON,
    **_THRESHOLD,
    **_SIGMAS,
    **_FLOW_SIGMAS,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
_CONSISTENCY = {
    **_STABLE_BETAS,
    **_EPSILON,
    **_THRESHOLD,
    **_CLIP,
    **_LEADING,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}
_EDM = {
    **_EPSILON,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "rho": 7.0,
    "final_sigmas_type": "zero",
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **_BETAS,
        **_EPSILON,
        **_THRESHOLD,
        **_CLIP,
        **_LEADING,
        "variance_type": "fixed_small",
        "rescale_betas_zero_snr": False,
    },
    "DDIMScheduler": {
        **_BETAS,
        **_EPSILON,
        **_THRESHOLD,
        **_CLIP,
        **_LEADING,
        "set_alpha_to_one": True,
        "rescale_betas_zero_snr": False,
    },
    "UnCLIPScheduler": {
        **_EPSILON,
        **_CLIP,
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "PNDMScheduler": {
        **_BETAS,
        **_EPSILON,
        **_LEADING,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
    },
    "LCMScheduler": _CONSISTENCY,
    "TCDScheduler": _CONSISTENCY,
    "EulerDiscreteScheduler": {
        **_BETAS,
        **_EPSILON,
        **_SIGMAS,
        **_LINSPACE,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {
        **_BETAS,
        **_EPSILON,
        **_LINSPACE,
        "rescale_betas_zero_snr": False,
    },
    "HeunDiscreteScheduler": {
        **_STABLE_BETAS,
        **_EPSILON,
        **_SIGMAS,
        **_LINSPACE,
        **_CLIP,
        "clip_sample": False,
    },
    "KDPM2DiscreteScheduler": {**_STABLE_BETAS, **_EPSILON, **_SIGMAS, **_LINSPACE},
    "KDPM2AncestralDiscreteScheduler": {**_STABLE_BETAS, **_EPSILON, **_SIGMAS, **_LINSPACE},
    "LMSDiscreteScheduler": {**_BETAS, **_EPSILON, **_SIGMAS, **_LINSPACE},
    "DPMSolverMultistepScheduler": {
        **_DPM,
        **_LINSPACE,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverSinglestepScheduler": {**_DPM, "lower_order_final": False},
    "DEISMultistepScheduler": {
        **_BETAS,
        **_EPSILON,
        **_THRESHOLD,
        **_SIGMAS,
        **_FLOW_SIGMAS,
        **_LINSPACE,
        "solver_order": 2,
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "lower_order_final": True,
    },
    "UniPCMultistepScheduler": {
        **_BETAS,
        **_EPSILON,
        **_THRESHOLD,
        **_SIGMAS,
        **_FLOW_SIGMAS,
        **_LINSPACE,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": (),
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        **_THRESHOLD,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}
"""Class name -> field -> default: every field of every supported class."""

_KNOWN_FIELDS = {field for fields in DEFAULTS.values() for field in fields}


class SchedulerConfig(Mapping[str, Any]):
    """A class's fields with their values; fields of other classes are left out.

    diffusers lets one class read another's config, so that published ones carry fields that their
    class does not have; those are ignored there and here. A field that no class has is refused.

    Raises:
      ConfigError: no or an unknown `_class_name`, or an unknown field.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in DEFAULTS:
            raise ConfigError(_unsupported("_class_name", name, DEFAULTS))
        self.class_name: str = str(name)
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for field in given:
            if field not in _KNOWN_FIELDS:
                raise ConfigError(
                    f"{self.class_name}: {_unsupported('field', field, DEFAULTS[self.class_name])}"
                )
        defaults = DEFAULTS[self.class_name]
        self._fields = {field: given.get(field, default) for field, default in defaults.items()}

    def __getitem__(self, field: str) -> Any:
        return self._fields[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def choose(self, field: str, choices: Iterable[Any]) -> Any:
        """The field's value; ConfigError unless it is one of `choices`."""
        value, choices = self[field], list(choices)
        if value not in choices:
            raise self.refuse(field, choices)
        return value

    @property
    def size(self) -> int:
        """Timesteps of training."""
        return self.whole("num_train_timesteps", least=1)

    def number(self, field: str, **bounds: Any) -> float:
        """The field as a number; bounds and errors of `checked`."""
        return self.checked(field, self[field], **bounds)

    def whole(self, field: str, **bounds: Any) -> int:
        """The field as a whole number; bounds and errors of `checked`."""
        return int(self.checked(field, self[field], whole=True, **bounds))

    def argument(
        self, arguments: Mapping[str, Any], name: str, default: Number, **bounds: Any
    ) -> float:
        """The argument as a number, `default` where it is not given; as `checked`."""
        return self.checked(name, arguments.get(name, default), **bounds)

    def begin(self, arguments: Mapping[str, Any], steps: int, evaluations: int = 1) -> int:
        """The step, of `steps`, that `begin_index` means; each counts as so many `evaluations`.

        Raises:
          ConfigError: an index of none of the steps, or within one.
        """
        last = evaluations * (steps - 1)
        index = int(self.argument(arguments, "begin_index", 0, whole=True))
        if index % evaluations:
            raise self.refuse_argument("begin_index", index, "an even number, twice the step's")
        if not 0 <= index <= last:
            raise self.refuse_argument("begin_index", index, f"0 to {last}, for {steps} steps")
        return index // evaluations

    def checked(
        self,
        name: str,
        value: Any,
        *,
        above: Number | None = None,
        below: Number | None = None,
        least: Number | None = None,
        most: Number | None = None,
        whole: bool = False,
    ) -> float:
        """`value` of a field or argument as a float.

        Raises:
          ConfigError: no number, no whole one where that is asked for, or outside the bounds.
        """
        number = number_of(value)
        fits = math.isfinite(number) and not (whole and number != int(number))
        fits = fits and (above is None or number > above) and (below is None or number < below)
        if fits and (least is None or number >= least) and (most is None or number <= most):
            return number
        limits = (("above", above), ("below", below), ("at least", least), ("at most", most))
        bounds = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
        kind = "a whole number" if whole else "a number"
        raise self.refuse_argument(name, value, ", ".join([kind, *bounds]))

    def refuse(self, field: str, supported: Iterable[Any]) -> ConfigError:
        """The error that says that this value of `field` is not supported."""
        return ConfigError(f"{self.class_name}: {_unsupported(field, self[field], supported)}")

    def refuse_argument(self, name: str, value: Any, expected: str) -> ConfigError:
        """The error for a value that does not do, of an argument of `plan` or a field."""
        return ConfigError(f"{self.class_name}: {name}={value!r}; expected {expected}")


def number_of(value: Any) -> float:
    """`value` as a float, NaN where it is no number."""
    if isinstance(value, (str, bool)) or np.ndim(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _unsupported(field: str, value: Any, supported: Iterable[Any]) -> str:
    supported = [str(choice) for choice in supported]
    close = nearest(str(value), supported)
    hint = f" (did you mean {close!r}?)" if close else ""
    return f"{field}={value!r} is not supported{hint}; supported: {', '.join(supported)}"
