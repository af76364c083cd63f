"""Clean and PGD accuracy, in batches, in eval mode, with the interval that a finite test set leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AttackLoss, pgd
from art_saliency.evaluation._inputs import checked, pixels, reference_tensor, right_answers
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel, a_threat_model

__all__ = ["accuracy", "binomial_interval", "pgd_accuracy", "with_interval"]


def binomial_interval(successes: int, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson's interval of a proportion: honest for small sets and near 0 and 1.

    :param z: 1.96 for 95 %.
    :return: Its ends, 0 to 1.
    """
    count = _checks.whole("count", count, least=1)
    successes = _checks.whole("successes", successes, most=count)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Exact at the ends, where rounding would leave 1e-17 below the only possible share.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def with_interval(share: float, images: int, /, **more: Any) -> dict[str, Any]:
    """
    An accuracy as JSON files hold it.

    :param share: Of the images, 0 to 1. :param more: What is to stand between them.
    :return: ``accuracy`` and ``interval_95``.
    """
    return {"accuracy": share, **more, "interval_95": list(binomial_interval(round(share * images), images))}


def _share_correct(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, perturb: Callable[[Tensor, Tensor], Tensor]
) -> float:
    like = reference_tensor(model, x)
    correct = torch.zeros((), dtype=torch.long, device=like.device)
    with evaluating(model):
        for start in range(0, len(x), batch_size):
            images = pixels(x[start : start + batch_size], like)
            targets = y[start : start + batch_size].to(like.device)
            images = perturb(images, targets)
            with torch.no_grad():
                correct += right_answers(model(images), targets).sum()
    return int(correct) / len(x)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> float:
    """
    The share of images whose highest logit is the true class; logits that are not finite are never right.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode, its modes restored.
    :param x: (N, C, H, W) in [0, 1], or uint8; on any device.
    :param y: (N,) int64, or one-hot rows (N, K).
    :return: 0 to 1.
    """
    x, y = checked(model, x, y)
    return _share_correct(model, x, y, _checks.whole("batch_size", batch_size, least=1), lambda images, _: images)


def pgd_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    max_iter: int = 20,
    eps_step: float | None = None,
    restarts: int = 1,
    loss: str | AttackLoss = "cross-entropy",
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """
    Accuracy under :func:`art_saliency.attacks.pgd`. An upper bound of robust accuracy: report AutoAttack's.

    :param threat: Norm and radius, in units of the [0, 1] pixel range.
    :param seed: Of the random starts. The other parameters are those of :func:`accuracy` and of the attack.
    :return: 0 to 1.
    """
    a_threat_model(threat)
    x, y = checked(model, x, y)
    random = RandomSource(seed, reference_tensor(model, x).device)

    def perturb(images: Tensor, targets: Tensor) -> Tensor:
        return pgd(
            model,
            images,
            targets,
            threat=threat,
            max_iter=max_iter,
            eps_step=eps_step,
            restarts=restarts,
            loss=loss,
            random=random,
        )

    return _share_correct(model, x, y, _checks.whole("batch_size", batch_size, least=1), perturb)
