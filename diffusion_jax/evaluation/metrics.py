"""The scores of samples against a reference, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.diffusion.likelihood import Estimate
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import caption_score, frechet, kernel_distance, neighbours
from diffusion_jax.evaluation.class_scores import SPLITS
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.protocol import OWN, FeatureNetwork
from diffusion_jax.evaluation.moments import GROUPS, Moments

FEWEST = 2 * GROUPS
"""Samples of a Frechet distance, at least; each part of its error bar needs two."""
ENOUGH = 10_000
"""Samples below which a Frechet distance is called one of few samples."""
CAPTION_SCORE = "CLIP-score"
"""What the score of captions is called: no other network has it."""
CMMD_NETWORK = "clip_vit_l14_336"
"""Of the published values of CMMD."""
CMMD_REMARK = "unbiased; pictures resized with antialias"
"""Published values of CMMD are of the estimate with bias, and resizing differs between ports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name: of the data and the split, or of the file.
        hash: of its content, 16 hexadecimal digits.
        count: examples; None where published statistics do not tell.
        moments: of its features, by name.
        features: of some of its examples [k, D]; None of published statistics.
    """

    name: str
    hash: str
    count: int | None
    moments: Mapping[str, Moments]
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number.

    Attributes:
        name: with the network where it is not the field's own, such as "KID-EffNetLite0".
        estimate: value, standard error and n.
        remark: what a reader has to know about it.
        metric: what it was asked for as, such as "kid".
    """

    name: str
    estimate: Estimate
    remark: str = ""
    metric: str = ""


def _frechet(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    parts = samples.moments["features"].parts()
    _enough("fd", samples.count, FEWEST)
    found = frechet.frechet_estimate(parts, reference.moments["features"])
    return [("FD", found, _few(samples, len(parts[0].mean)))]


def _spatial(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    _enough("sfid", samples.count, FEWEST)
    parts = samples.moments["spatial"].parts()
    found = frechet.frechet_estimate(parts, reference.moments["spatial"])
    return [("sFD", found, _few(samples, len(parts[0].mean)))]


def _infinity(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    _enough("fd_infinity", samples.count, FEWEST)
    parts = samples.moments["features"].parts()
    found = frechet.frechet_infinity(parts, reference.moments["features"])
    return [("FD-infinity", found, _few(samples, len(parts[0].mean)))]


def _kid(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    found = kernel_distance.kid(samples.features(), _features("kid", reference))
    return [("KID", found, "")]


def _cmmd(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    found = kernel_distance.cmmd(samples.features(), _features("cmmd", reference))
    return [("CMMD", found, "")]


def _precision(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    both = samples.features(), _features("precision_recall", reference)
    precision, recall = neighbours.precision_recall(*both)
    remark = f"{neighbours.PRECISION_NEIGHBOURS} neighbours, {len(both[1])} of the reference"
    return [("precision", precision, remark), ("recall", recall, remark)]


def _density(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    both = samples.features(), _features("density_coverage", reference)
    density, coverage = neighbours.density_coverage(*both)
    remark = f"{neighbours.DENSITY_NEIGHBOURS} neighbours, {len(both[1])} of the reference"
    return [("density", density, remark), ("coverage", coverage, remark)]


def _inception(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    return [("IS", _classes("inception_score", samples).inception_score(), "")]


def _accuracy(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    return [("class-accuracy", _classes("class_accuracy", samples).accuracy(), "")]


def _captions(samples: Collected, reference: Reference) -> list[tuple[str, Estimate, str]]:
    if samples.captions is None:
        raise ConfigError("clip_score: nothing was compared with captions; choose another")
    return [(CAPTION_SCORE, samples.captions.estimate(), samples.captions.remark)]


METRICS: dict[str, Callable[[Collected, Reference], list[tuple[str, Estimate, str]]]] = {
    "fd": _frechet,
    "sfid": _spatial,
    "fd_infinity": _infinity,
    "kid": _kid,
    "cmmd": _cmmd,
    "inception_score": _inception,
    "precision_recall": _precision,
    "density_coverage": _density,
    "class_accuracy": _accuracy,
    caption_score.METRIC: _captions,
}
"""Name -> the scores that it makes. `fid` is `fd` over the Inception network."""


NEEDED = {
    **dict.fromkeys(("fd", "sfid", "fd_infinity"), FEWEST),
    **dict.fromkeys(("kid", "cmmd"), kernel_distance.FEWEST),
    "precision_recall": neighbours.PRECISION_NEIGHBOURS + 2,
    "density_coverage": neighbours.DENSITY_NEIGHBOURS + 2,
    "inception_score": 2 * SPLITS,
}
"""Name -> samples that it needs at least."""
NEEDED_OF_REFERENCE = {
    **dict.fromkeys(("fd", "sfid", "fd_infinity"), 2),
    **dict.fromkeys(("kid", "cmmd"), kernel_distance.FEWEST),
    "precision_recall": neighbours.PRECISION_NEIGHBOURS + 1,
    "density_coverage": neighbours.DENSITY_NEIGHBOURS + 1,
}
"""Name -> examples of the reference that it needs at least."""
BETTER_HIGH = ("precision", "recall", "density", "coverage", "IS", "class-accuracy", CAPTION_SCORE)
"""Beginnings of the names of scores that are better when they are larger."""
OF_CLASSES = ("inception_score", "class_accuracy")
OF_FEATURES = ("kid", "cmmd", "precision_recall", "density_coverage")
"""Need the features of the reference, not their moments alone."""


def check(
    names: Sequence[str],
    network: FeatureNetwork,
    given: Mapping[str, int],
    num: int,
    reference: Reference | None = None,
) -> None:
    """What `scores` would find only when all samples are drawn.

    Args:
        names: of the metrics.
        network: the feature network.
        given: features that it has, and their dimensions.
        num: samples to come.
        reference: where it is known already.

    Raises:
        ConfigError: too few samples or examples of the reference, or what network or reference do
            not give.
    """
    check_count(names, num)
    for name in names:
        if name == "sfid" and "spatial" not in given:
            raise ConfigError(
                f"sfid: 'spatial' are not among the features of the network: {', '.join(given)}"
            )
        if name in OF_CLASSES and "logits" not in given:
            raise ConfigError(f"{name}: the feature network has no classes; choose another")
        _check_classes(name, network)
        if reference is None:
            continue
        _check_size(name, reference)
        if name == "sfid" and "spatial" not in reference.moments:
            raise ConfigError(f"sfid: the statistics of {reference.name} have no spatial features")
    for name, moments in reference.moments.items() if reference is not None else ():
        if name in given and moments.mean.size != given[name]:
            raise ConfigError(
                f"reference: {reference and reference.name} has {name} of {moments.mean.size} "
                f"dimensions and the network of {given[name]}; expected those of one network"
            )


def scores(
    names: Sequence[str], samples: Collected, reference: Reference, network: FeatureNetwork
) -> list[Score]:
    """The scores of collected samples.

    Raises:
        ConfigError: an unknown metric, too few samples, or what the network does not give.
        NothingFinite: no sample is a number.
    """
    samples.check_finite()
    result = []
    for name in names:
        if name not in METRICS:
            raise ConfigError(unknown_name("metrics", name, METRICS))
        _check_classes(name, network)
        samples.check_finite(name, NEEDED.get(name, 1))
        for own, found, remark in METRICS[name](samples, reference):
            remarks = [remark, _of_network(name, network)]
            if samples.not_finite:
                remarks.append(f"{samples.not_finite} samples not finite, left out")
            full = full_name(own, network.score)
            said = "; ".join(filter(None, remarks))
            result.append(Score(name=full, estimate=found, remark=said, metric=name))
    return result


def check_count(names: Sequence[str], num: int) -> None:
    """Raises ConfigError where a metric of `names` needs more samples than `num`."""
    for name in names:
        needed = NEEDED.get(name, 1)
        if num < needed:
            raise ConfigError(f"num={num}: {name} needs at least {needed} samples")


def higher_is_better(score: str) -> bool:
    """Whether a score of this name grows with quality; distances, bits and losses do not."""
    return score.startswith(BETTER_HIGH)


def full_name(own: str, score: str) -> str:
    """A score's name with the network's: nothing is called FID unless it is."""
    if own == CAPTION_SCORE:
        return own
    if score == "FID":
        return own.replace("FD", "FID")
    suffix = score.removeprefix("FD-")
    return f"{own}-{suffix}"


def _of_network(name: str, network: FeatureNetwork) -> str:
    if name != "cmmd":
        return ""
    if network.name == CMMD_NETWORK:
        return CMMD_REMARK
    if network.score != "FD-CLIP":
        return "not of CLIP, whose embeddings CMMD is defined by"
    return f"published values are of {CMMD_NETWORK}"


def _enough(name: str, count: int, needed: int) -> None:
    if count < needed:
        raise ConfigError(f"{count} samples: {name} needs at least {needed}; give num={needed}")


def _check_classes(name: str, network: FeatureNetwork) -> None:
    """An Inception score is of any classes, the accuracy of those that were asked for."""
    if name == "class_accuracy" and network.name != OWN:
        raise ConfigError(
            f"class_accuracy: features={network.name} has other classes than the data; expected "
            f"features={OWN}"
        )


def _check_size(name: str, reference: Reference) -> None:
    found = len(_features(name, reference)) if name in OF_FEATURES else reference.count
    needed = NEEDED_OF_REFERENCE.get(name, 1)
    if found is not None and found < needed:
        raise ConfigError(
            f"reference: {reference.name} has {found} examples; {name} needs at least {needed}"
        )


def _few(samples: Collected, dimensions: int) -> str:
    remarks = [f"few samples (below {ENOUGH})"] if samples.count < ENOUGH else []
    if samples.count <= dimensions:
        remarks.append(f"fewer than the {dimensions} dimensions")
    return ", ".join(remarks)


def _features(name: str, reference: Reference) -> Any:
    if reference.features is None:
        raise ConfigError(
            f"{name}: {reference.name} holds statistics alone; it needs the pictures: give a split "
            "of the data as the reference"
        )
    return reference.features


def _classes(name: str, samples: Collected) -> Any:
    if samples.classes is None:
        raise ConfigError(f"{name}: the feature network has no classes; choose another")
    return samples.classes
