"""What is known of a network's accuracy: AutoAttack's results, accepted when they are of these very weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from art_saliency import _checks
from art_saliency.errors import CheckpointError, InputError
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.evaluation.autoattack import AutoAttackResult
from art_saliency.files import read_tensors, sha256_of_tensors
from art_saliency.robustbench.deployable import Deployable
from art_saliency.robustbench.model_info import percent_text
from art_saliency.threat import ThreatModel

__all__ = [
    "Evidence",
    "autoattack_log",
    "differences",
    "fractions",
    "gather",
    "interval_of",
    "is_standard",
    "is_under",
    "partial_note",
    "read_evidence",
    "record_problems",
    "spread",
]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def _between(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _by_name(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, dict) and all(isinstance(name, str) and fits(value) for name, value in values.items())


_FIELDS: dict[str, type | Callable[[Any], bool]] = {
    "clean_accuracy": lambda value: _between(value, 0, 1),
    "robust_accuracy": lambda value: _between(value, 0, 1),
    "robust_accuracy_after": lambda values: _by_name(values, lambda value: _between(value, 0, 1)),
    "eps": lambda value: _between(value, 1e-9, 1e9),
    "norm": str,
    "version": str,
    "standard": bool,
    "deviations": _texts,
    "warnings": _texts,
    "backend": str,
    "backend_version": str,
    "seed": lambda value: _whole(value, 0),
    "batch_size": lambda value: _whole(value, 1),
    "threads": lambda value: _whole(value, 1),
    "device": str,
    "versions": lambda values: _by_name(values, lambda value: isinstance(value, str)),
    "weights_sha256": str,
    "data_sha256": str,
    "seconds": lambda value: _between(value, 0, 1e12),
    "count": lambda value: _whole(value, 1),
}
"""What a record holds: of a type, or what a function says yes to. Files may come from anybody."""


@dataclass(frozen=True)
class Evidence:
    """
    One evaluation.

    :ivar record: What :meth:`~art_saliency.evaluation.autoattack.AutoAttackResult.to_json` says.
    :ivar x_adv: (N, C, H, W) in [0, 1]; ``None`` when they were not kept. :ivar data: What the images are called.
    """

    record: dict[str, Any]
    x_adv: Tensor | None = None
    data: str | None = None


def gather(source: Any, network: Deployable, threat: ThreatModel) -> list[Evidence]:
    """
    Read evaluations and check that each is one of this network under this threat model.

    :param source: A result of :func:`art_saliency.autoattack`; the path of an ``evaluation.json`` that ``art-saliency
        evaluate`` wrote (the adversarial images beside it, ``x_adv.pt``, are read too); or a sequence of such things, which
        differ in their seed. The first of them is the one that will be stated.
    :return: One entry each.
    :raises InputError: When one of them is of other weights, data or settings; everything that differs is listed.
    """
    items = list(source) if isinstance(source, (list, tuple)) else [source]
    found = [read_evidence(item) for item in items]
    for place, evidence in enumerate(found):
        _check(f"evaluation {place + 1}", evidence, network, threat)
    if got := differences([evidence.record for evidence in found]):
        raise _checks.refuse(
            "evaluation", got, "evaluations that differ in their seed alone", "give one, or make others"
        )
    return found


def differences(records: Sequence[dict[str, Any]]) -> str:
    """:return: In what evaluations differ beside their seeds, or that two have the same seed; empty when neither is so."""
    same = ("data_sha256", "batch_size", "version", "count")
    differing = [name for name in same if len({record[name] for record in records}) > 1]
    if differing:
        return f"some that differ in {', '.join(differing)}"
    return "two with the same seed" if len({record["seed"] for record in records}) < len(records) else ""


def spread(found: Sequence[Evidence]) -> dict[str, Any] | None:
    """:return: How much the robust accuracy depends on the seed; ``None`` when there is one seed only."""
    if len(found) < 2:
        return None
    values = [evidence.record["robust_accuracy"] for evidence in found]
    return {"seeds": [evidence.record["seed"] for evidence in found], "low": min(values), "high": max(values)}


def record_problems(record: dict[str, Any]) -> list[str]:
    """:return: The fields that an evaluation's record lacks, or that hold something else than they should."""
    return [
        name
        for name, fits in _FIELDS.items()
        if not (isinstance(record.get(name), fits) if isinstance(fits, type) else fits(record.get(name)))
    ]


def is_under(record: dict[str, Any], threat: ThreatModel) -> bool:
    """:return: Whether an evaluation's record is of this norm and radius."""
    return (record["norm"], round(record["eps"], 9)) == (threat.norm, round(threat.eps, 9))


def is_standard(record: Mapping[str, Any]) -> bool:
    """:return: Whether an evaluation is AutoAttack's standard version, by all that its record says of that."""
    return bool(record["standard"]) and record["version"] == "standard" and not record["deviations"]


def fractions(record: Mapping[str, Any]) -> str:
    """:return: The accuracies that no number of right answers among so many images gives, in words; empty when there are none."""
    counts = {name: record[name] * record["count"] for name in ("clean_accuracy", "robust_accuracy")}
    return " and ".join(name.replace("_", " ") for name, n in counts.items() if abs(n - round(n)) > 1e-6)


def partial_note(record: Mapping[str, Any], images: int) -> str:
    """:param images: Of the full evaluation. :return: What a page's footnote must end with; empty when all were evaluated."""
    if record["count"] >= images:
        return ""
    low, high = (percent_text(end) for end in interval_of(record))
    return f"AutoAttack on {record['count']} of {images} test images (95 % interval {low} to {high})."


def read_evidence(item: Any) -> Evidence:
    """
    Read one evaluation; of which weights it is, is not looked at.

    :param item: A result of :func:`art_saliency.autoattack`, or the path of an ``evaluation.json``.
    :raises CheckpointError: When the file is no evaluation, or not that of the images beside it.
    """
    if isinstance(item, AutoAttackResult):
        return Evidence(json.loads(json.dumps(item.to_json())), item.x_adv)
    if not isinstance(item, (str, Path)):
        raise _checks.refuse("evaluation", f"a {type(item).__name__}", "an AutoAttackResult or the path of its JSON")
    path = Path(item)
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
        record = page.get("autoattack_details", page)
        wrong = record_problems(record)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: could not be read as an evaluation ({error}); evaluate again") from error
    if wrong:
        raise CheckpointError(
            f"{path}: no evaluation with AutoAttack, {', '.join(wrong)} missing or not what they should be; evaluate again"
        )
    return Evidence(record, _images_beside(path, page.get("x_adv_sha256")), page.get("data"))


def _images_beside(path: Path, sha256: Any) -> Tensor | None:
    """:return: The adversarial images that an evaluation left beside its JSON; ``None`` when it left none."""
    images = path.with_name("x_adv.pt")
    if sha256 is None or not images.is_file():
        return None
    x_adv = read_tensors(images)
    if sha256_of_tensors(x_adv) != sha256:
        raise CheckpointError(
            f"{images}: not the adversarial images of {path.name} (their hash differs); evaluate again"
        )
    found = x_adv.get("x_adv")
    if not isinstance(found, Tensor) or found.ndim != 4:
        raise CheckpointError(f"{images}: no adversarial images, expected x_adv with 4 axes; evaluate again")
    return found


def _check(name: str, evidence: Evidence, network: Deployable, threat: ThreatModel) -> None:
    record, wrong = evidence.record, []
    if record["weights_sha256"] not in network.also_known_as:
        weights = f"{record['weights_sha256'][:12]}..., not of {network.sha256[:12]}..., which is to be exported"
        baked = ", evaluate deployable(classifier).network" if network.normalised else ""
        wrong.append(f"is of the weights {weights} (train and evaluate again, or export what was evaluated{baked})")
    if not is_under(record, threat):
        wrong.append(f"is for {record['norm']} eps {record['eps']:g}, not {threat.norm} eps {threat.eps:g}")
    if not is_standard(record):
        deviations = "; ".join(record["deviations"]) or f"version {record['version']}"
        wrong.append(f"is not AutoAttack's standard version ({deviations})")
    if not 0 <= record["robust_accuracy"] <= record["clean_accuracy"] <= 1:
        wrong.append("has a robust accuracy that is not between 0 and the clean one")
    if broken := fractions(record):
        wrong.append(f"has a {broken} of {record['count']} images that is of no whole number of them")
    if evidence.x_adv is not None and len(evidence.x_adv) != record["count"]:
        wrong.append(f"counts {record['count']} images beside {len(evidence.x_adv)} adversarial ones")
    if wrong:
        raise InputError(f"{name}: got one that {'; that '.join(wrong)}; nothing was written")


def interval_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """:return: The 95 % interval of an evaluation's robust accuracy, 0 to 1: what its record says of it is not gone by."""
    return binomial_interval(round(record["robust_accuracy"] * record["count"]), record["count"])


def autoattack_log(found: Sequence[Evidence]) -> str:
    """:return: What AutoAttack found, attack by attack, in its own log's words; written from the records."""
    lines = []
    for record in (evidence.record for evidence in found):
        low, high = interval_of(record)
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        lines += [
            f"AutoAttack {record['version']} ({record['backend']} {record['backend_version']}), {record['norm']} eps "
            f"{record['eps']:.8g}, seed {record['seed']}, batch size {record['batch_size']}, {record['count']} images",
            f"{versions}, {record['device']}, {record['threads']} thread(s), {record['seconds']:.0f} s",
            f"weights {record['weights_sha256']}",
            f"images and labels {record['data_sha256']}",
            f"initial accuracy: {record['clean_accuracy']:.2%}",
            *(f"robust accuracy after {name.upper()}: {v:.2%}" for name, v in record["robust_accuracy_after"].items()),
            f"robust accuracy: {record['robust_accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})",
            *(f"warning: {warning}" for warning in record["warnings"]),
            "",
        ]
    return "\n".join(lines)
