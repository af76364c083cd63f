"""What a report is about, and its page: everything that was found, JSON-able, every accuracy with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from art_saliency.evaluation.accuracy import with_interval
from art_saliency.evaluation.audit import AuditReport
from art_saliency.evaluation.autoattack import AutoAttackResult
from art_saliency.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is evaluated, against what, and how: every part gets it alike. The images lie where the network is."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    batch_size: int
    seed: int
    progress: bool

    def options(self) -> dict[str, Any]:
        """:return: What every measurement takes."""
        return {"batch_size": self.batch_size, "seed": self.seed, "progress": self.progress}


def page_of(
    of: Evaluation,
    attacked: AutoAttackResult,
    audited: AuditReport,
    *,
    head: dict[str, Any],
    plain: dict[str, dict[str, Any]],
    parts: dict[str, Any],
) -> dict[str, Any]:
    """:return: All of it, JSON-able."""
    count = len(of.x)
    return {
        **head,
        "images": count,
        "threat_model": {"norm": of.threat.norm, "eps": of.threat.eps},
        "seed": of.seed,
        "weights_sha256": attacked.weights_sha256,
        **plain,
        "autoattack": {**row(attacked.robust_accuracy, count), "details": attacked.to_json()},
        "waterfall": _waterfall(attacked, count),
        "accuracy_against_eps": _against_eps(audited),
        "audit": audited.to_json(),
        **{name: None if found is None else found.to_json() for name, found in parts.items()},
    }


def row(share: float, count: int) -> dict[str, Any]:
    """:return: An accuracy with its interval."""
    return {**with_interval(share, count), "count": count}


def _waterfall(result: AutoAttackResult, count: int) -> dict[str, Any]:
    """:return: What is left, clean first, after each of AutoAttack's attacks in turn."""
    left = {"clean": result.clean_accuracy, **result.robust_accuracy_after}
    return {name: row(share, count) for name, share in left.items()}


def _against_eps(report: AuditReport) -> dict[str, Any]:
    """:return: The audit's curve, with intervals."""
    curve = next(check.figures["accuracy"] for check in report.checks if check.name == "accuracy never rises with eps")
    clean = {"0": report.accuracies["clean"]["accuracy"]}
    return {eps: row(share, report.count) for eps, share in {**clean, **curve}.items()}
