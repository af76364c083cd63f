"""The three figures that every table starts with: clean accuracy, PGD-20, and the AutoAttack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.evaluation.accuracy import accuracy, pgd_accuracy, with_interval
from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
from art_saliency.threat import ThreatModel

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True)
class Summary:
    """
    Accuracy on the images given, 0 to 1.

    :ivar clean: On clean images. :ivar pgd20: Under PGD-20, which overstates. :ivar autoattack: The result that counts.
    :ivar images: How many.
    """

    clean: float
    pgd20: float
    autoattack: AutoAttackResult
    images: int

    def to_json(self) -> dict[str, Any]:
        """:return: The figures with their 95 % intervals, and everything AutoAttack's result carries."""
        return {
            "images": self.images,
            "clean": with_interval(self.clean, self.images),
            "pgd20": with_interval(self.pgd20, self.images),
            "autoattack": with_interval(self.autoattack.robust_accuracy, self.images),
            "autoattack_details": self.autoattack.to_json(),
        }


def summarise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    version: str = "standard",
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = True,
) -> Summary:
    """
    Evaluate a network.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode, its modes restored.
    :param x: (N, C, H, W) in [0, 1] or uint8. :param y: (N,) int64. :param threat: Norm and radius.
    :param version: Of AutoAttack. :param progress: Whether its bar is shown.
    :return: The three figures.
    """
    images = to_unit(_checks.bytes_of_pixels("x", x))
    return Summary(
        clean=accuracy(model, images, y),
        pgd20=pgd_accuracy(model, images, y, threat=threat, max_iter=20, seed=seed),
        autoattack=autoattack(
            model,
            images,
            y,
            eps=threat.eps,
            norm=threat.norm,
            version=version,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        ),
        images=len(images),
    )
