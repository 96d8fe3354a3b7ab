"""How to sample: the options of a pipeline, each checked on its own when it is given."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.diffusion import solvers
from diffusion_jax.errors import ConfigError, nearest, unknown_name
from diffusion_jax.pipelines.guidance_kinds import KINDS

_LOG = logging.getLogger(__name__)
THRESHOLDS = ("none", "static", "dynamic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Every field is an argument of `sample` and a flag of the same name.

    Attributes:
        solver: a name in `solvers.SOLVERS`, or "ancestral" for any process.
        steps: network evaluations along the time grid (solvers of higher order take more).
        guidance: its weight; 1 is the conditional model itself.
        guidance_by: the kind of guidance, a name in `guidance_kinds.KINDS`.
        guidance_options: kind -> its own options, such as `{"apg": {"momentum": -0.75}}`.
        guidance_interval: times (low, high) between which guidance acts.
        guidance_rescale: how far the guided prediction's deviation is brought back to the
            conditional one's, 0 to 1.
        threshold: "none", "static" or "dynamic".
        threshold_percentile: of the dynamic threshold.
        solver_options: solver name -> its own options, such as `{"ddim": {"eta": 0.5}}`.
        log_probability: for classifier guidance besides, (x [B, ...], t) -> log p(y | x_t) [B],
            differentiable; in Python alone. The interval holds for it too, and so does the
            rescaling, to the deviation of what it guides.
        log_probability_scale: of its gradient.
        batch_size: samples a compiled batch, over all devices.

    Raises (from `of` and `replace`):
        ConfigError: a value of the wrong type or out of its range.
    """

    # Typed Any: what a user gives is judged by `of`.
    solver: Any
    steps: Any
    guidance: Any = 1.0
    guidance_by: Any = "classifier_free"
    guidance_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    guidance_interval: Any = (0.0, 1.0)
    guidance_rescale: Any = 0.0
    threshold: Any = "none"
    threshold_percentile: Any = 0.995
    solver_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    log_probability: Any = None
    log_probability_scale: Any = 1.0
    batch_size: Any = 64

    @property
    def guided(self) -> bool:
        """Whether more than the conditional model is evaluated."""
        return self.guidance != 1.0 or self.guidance_by == "perturbed_attention"

    @classmethod
    def of(cls, **values: Any) -> SamplingOptions:
        """The options with these values, converted and checked."""
        options = cls(**values)
        changes: dict[str, Any] = {
            name: whole(name, getattr(options, name), low=1) for name in ("steps", "batch_size")
        }
        for name in (
            "guidance",
            "guidance_rescale",
            "threshold_percentile",
            "log_probability_scale",
        ):
            changes[name] = number(name, getattr(options, name))
        _check_guidance(options)
        changes["guidance_interval"] = _interval(options.guidance_interval)
        if not 0.0 <= changes["guidance_rescale"] <= 1.0:
            raise ConfigError(f"guidance_rescale={changes['guidance_rescale']}: expected 0..1")
        if not 0.0 < changes["threshold_percentile"] < 1.0:
            raise ConfigError(
                f"threshold_percentile={changes['threshold_percentile']}: expected a number "
                "between 0 and 1, such as 0.995"
            )
        if options.threshold not in THRESHOLDS:
            raise ConfigError(unknown_name("threshold", options.threshold, THRESHOLDS))
        known = {*solvers.SOLVERS, "ancestral"}
        for name in (options.solver, *options.solver_options):
            if not isinstance(name, str):
                raise ConfigError(f"solver={name!r}: expected a name, such as 'ddim'")
            if name not in known:
                raise ConfigError(unknown_name("solver", name, known))
        return dataclasses.replace(options, **changes)

    def replace(self, **changes: Any) -> SamplingOptions:
        """These options with some of them changed; None leaves one as it is.

        `solver_options` here are those of the solver in use, and go over its own;
        `guidance_options` those of the kind of guidance in use.

        Raises:
            ConfigError: an unknown option, or a value that cannot be.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in changes.items():
            if name not in values:
                raise ConfigError(unknown_name("sampling option", name, values))
            if value is not None and name not in ("solver_options", "guidance_options"):
                values[name] = value
        for field, chosen in (("solver_options", "solver"), ("guidance_options", "guidance_by")):
            own, known = changes.get(field), values[field]
            if not isinstance(own, Mapping | None):
                raise ConfigError(f"{field}={own!r}: expected a mapping, such as {{'eta': 0.5}}")
            # Another that is no name is refused by `of`.
            if own and isinstance(values[chosen], str):
                merged = {**known.get(values[chosen], {}), **own}
                values[field] = {**known, values[chosen]: merged}
        return SamplingOptions.of(**values)


def _check_guidance(options: SamplingOptions) -> None:
    for kind in (options.guidance_by, *options.guidance_options):
        if not isinstance(kind, str):
            raise ConfigError(f"guidance_by={kind!r}: expected a name, such as 'apg'")
        if kind not in KINDS:
            raise ConfigError(unknown_name("guidance_by", kind, KINDS))
    for kind, own in options.guidance_options.items():
        known = KINDS[kind].options
        for name, value in own.items():
            if not known:
                raise ConfigError(f"{kind} option {name!r} is unknown; it takes none")
            if name not in known:
                raise ConfigError(unknown_name(f"{kind} option", name, known))
            number(f"{kind}.{name}", value)
    if options.log_probability is not None and not callable(options.log_probability):
        raise ConfigError(
            f"log_probability={options.log_probability!r}: expected a function of (x, t)"
        )


NOT_OPTIONS = ("key", "noise", "trajectory", "evaluations")
"""Keywords of solvers that a pipeline gives itself, or whose result it does not pass on."""


def check_solver_options(solver: str, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that the solver does not have, or of another kind."""
    parameters = inspect.signature(solvers.get(solver)).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    known = {name: default for name, default in keywords.items() if name not in NOT_OPTIONS}
    for option, value in given.items():
        if not known:
            raise ConfigError(f"{solver} option {option!r} is unknown; it takes none")
        if option not in known:
            raise ConfigError(unknown_name(f"{solver} option", option, known))
        default = known[option]
        kinds: Any = type(default)
        if isinstance(default, int | float) and not isinstance(default, bool):
            number(f"{solver}.{option}", value)
        elif isinstance(default, bool | str) and not isinstance(value, kinds):
            raise ConfigError(
                f"{solver}.{option}={value!r}: expected a {kinds.__name__}, such as {default!r}"
            )


def whole(name: str, value: Any, *, low: int, below: int | None = None) -> int:
    """`value` as an int; ConfigError naming the argument unless it is one in low..below-1."""
    wanted = f"at least {low}" if below is None else f"{low} <= {name} < {below}"
    try:
        result = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}={value!r}: expected a whole number, {wanted}") from None
    if result < low or (below is not None and result >= below):
        raise ConfigError(f"{name}={result}: expected {wanted}")
    return result


def number(name: str, value: Any) -> float:
    """`value` as a float; ConfigError naming the argument unless it is a finite number."""
    result = _float(value)
    if not math.isfinite(result):
        raise ConfigError(f"{name}={value!r}: expected a finite number")
    return result


def _float(value: Any) -> float:
    """NaN for what is no number; a text is none here."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _interval(value: Any) -> tuple[float, float]:
    try:
        low, high = (_float(end) for end in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0.0 <= low < high <= 1.0:
        raise ConfigError(f"guidance_interval={value!r}: expected times 0 <= low < high <= 1")
    return low, high


def label_list(labels: Any, num_classes: int, names: Sequence[str] = ()) -> np.ndarray:
    """Labels as int32 [n].

    Args:
        labels: numbers, names, or one of either.
        num_classes: how many classes there are.
        names: of the classes, in order; empty where they have none.

    Raises:
        ConfigError: a label is no whole number in 0..num_classes-1 and not the name of a class.
    """
    alone = isinstance(labels, str) or not isinstance(labels, Iterable)
    given = [labels] if alone or getattr(labels, "ndim", 1) == 0 else labels
    numbers = [
        _class_number(one, num_classes, names) if isinstance(one, str) else one for one in given
    ]
    try:
        array = np.asarray(numbers)
    except ValueError:  # rows of unequal length
        array = np.empty(0, object)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        shown = " ".join(repr(labels).split())
        raise ConfigError(f"labels={shown}: expected a list of whole numbers or names")
    bad = (array < 0) | (array >= num_classes)
    if bad.any():
        found = str(array[bad][0])
        hint = f"; the class of that name is {names.index(found)}" if found in names else ""
        raise ConfigError(f"labels={found}: out of range; expected 0..{num_classes - 1}{hint}")
    return array.astype(np.int32)


SHOWN_NAMES = 12
"""Names of classes that an error lists at most."""


def _class_number(name: str, num_classes: int, names: Sequence[str]) -> int:
    field = f"labels={str(name)!r}"
    if not names:
        raise ConfigError(f"{field}: the classes have no names; expected 0..{num_classes - 1}")
    if name in names:
        return names.index(name)
    close = nearest(name, names)
    hint = f" (did you mean {close!r}?)" if close else ""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    shown = ", ".join(names[:SHOWN_NAMES])
    raise ConfigError(f"{field} is no class{hint}; known: {shown}{more}")


def text_list(prompts: Any, length: int) -> list[str]:
    """Captions, none at least as the empty one; says which are cut to `length` bytes of UTF-8.

    Raises:
        ConfigError: something is no text.
    """
    if prompts is None or isinstance(prompts, str):
        texts = [prompts or ""]
    else:
        texts = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    for prompt in texts:
        if not isinstance(prompt, str):
            raise ConfigError(f"prompts={prompt!r}: expected a text")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            # What a terminal passes on that is not UTF-8.
            raise ConfigError(f"prompts={prompt!r}: not UTF-8; expected a text")
    long = [prompt for prompt in texts if len(prompt.encode("utf-8")) > length]
    if long:
        many = f"{len(long)} prompt{'s are' if len(long) > 1 else ' is'}"
        _LOG.warning("%s cut to the %d bytes that the model reads: %r", many, length, long[0])
    return texts or [""]


def number_rows(scalars: Any, names: Sequence[str]) -> np.ndarray:
    """Numbers as float32 [n, len(names)]; ConfigError unless they are finite rows of that width."""
    try:
        rows = np.atleast_2d(np.asarray(scalars, np.float32))
    except (TypeError, ValueError):
        rows = np.empty((0, 0), np.float32)
    fits = rows.ndim == 2 and len(rows) and rows.shape[1] == len(names)
    if not fits or not np.isfinite(rows).all():
        raise ConfigError(f"scalars={scalars!r}: expected rows of {len(names)}: {', '.join(names)}")
    return rows


class Program:
    """Options that shape a compiled program, hashable; the value of the guidance does not."""

    def __init__(self, options: SamplingOptions) -> None:
        # The functions among them are told apart by what they are: held here, they stay that.
        self.options = options
        fixed = dataclasses.replace(options, guidance=1.0, batch_size=1)
        self._identity = (_key(vars(fixed)), options.guidance != 1.0)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._identity == other._identity


def _key(value: Any) -> Any:
    """A hashable stand-in that differs where the value does; texts of arrays and functions are cut
    short or alike where these are not."""
    if isinstance(value, Mapping):
        return tuple((name, _key(one)) for name, one in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if hasattr(value, "shape"):
        array = np.asarray(value)
        return array.shape, array.dtype.str, array.tobytes()
    if callable(value):
        # A method is another object each time that it is asked for.
        return id(getattr(value, "__func__", value)), id(getattr(value, "__self__", None))
    return repr(value)
