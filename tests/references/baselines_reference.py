"""The baselines' losses as their papers write them: numpy float64, one sample and one class at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Rows = NDArray[np.float64]


def softmax(z: Sequence[float] | Rows) -> list[float]:
    highest = max(z)
    powers = [math.exp(value - highest) for value in z]
    return [power / sum(powers) for power in powers]


def cross_entropy(z: Rows, target: Sequence[float]) -> float:
    """One sample; `target` is a distribution over the classes."""
    return -sum(t * math.log(p) for t, p in zip(target, softmax(z), strict=True) if t > 0)


def one_hot(label: int, classes: int, smoothing: float = 0.0) -> list[float]:
    return [(1 - smoothing) * (k == label) + smoothing / classes for k in range(classes)]


def kl(z: Rows, z_adv: Rows) -> float:
    """KL(p(x) || p(x~)) = sum_k p_k(x) log(p_k(x) / p_k(x~))."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(z), softmax(z_adv), strict=True))


def trades(z: Rows, z_adv: Rows, y: Sequence[int], beta: float, smoothing: float) -> float:
    n, classes = z.shape
    total = 0.0
    for i in range(n):
        total += cross_entropy(z[i], one_hot(y[i], classes, smoothing)) / n + beta * kl(z[i], z_adv[i]) / n
    return total


def bce(z_adv: Rows, label: int) -> float:
    """-log p_y(x~) - log(1 - max_{k != y} p_k(x~))."""
    p = softmax(z_adv)
    return -math.log(p[label]) - math.log(1 - max(p[k] for k in range(len(p)) if k != label))


def mart(z: Rows, z_adv: Rows, y: Sequence[int], lam: float) -> float:
    n = len(z)
    total = 0.0
    for i in range(n):
        total += bce(z_adv[i], y[i]) / n + lam * kl(z[i], z_adv[i]) * (1 - softmax(z[i])[y[i]]) / n
    return total


def alp(
    z: Rows,
    z_adv: Rows,
    y: Sequence[int],
    lam: float,
    clean_weight: float = 0.5,
    smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
) -> float:
    """(1 - a) CE(z~) + a CE(z) + lam mean_i w_i mean_k (z_ik - z~_ik)^2; a = 1/2, w = 1 is ALP."""
    n, classes = z.shape
    total = 0.0
    for i in range(n):
        target = one_hot(y[i], classes, smoothing)
        distance = sum((z[i, k] - z_adv[i, k]) ** 2 for k in range(classes)) / classes
        total += clean_weight * cross_entropy(z[i], target) / n
        total += (1 - clean_weight) * cross_entropy(z_adv[i], target) / n
        total += lam * (1.0 if weights is None else weights[i]) * distance / n
    return total


def ascend(
    model: nn.Module,
    x: torch.Tensor,
    start: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    step: float,
    steps: int,
    kind: str,
) -> torch.Tensor:
    """L-inf PGD, one image after the other, by autograd: ``"ce"``, or ``"kl"`` to the clean prediction."""
    found = []
    for i in range(len(x)):
        image, label = x[i : i + 1], y[i : i + 1]
        clean = torch.log_softmax(model(image), 1).detach()
        current = start[i : i + 1].clone()
        for _ in range(steps):
            current = current.detach().requires_grad_(True)
            log_q = torch.log_softmax(model(current), 1)
            loss = -log_q[0, int(label)] if kind == "ce" else (clean.exp() * (clean - log_q)).sum()
            (slope,) = torch.autograd.grad(loss, current)
            with torch.no_grad():
                current = current + step * torch.sign(slope)
                current = torch.maximum(torch.minimum(current, image + eps), image - eps)
                current = torch.clamp(current, 0, 1)
        found.append(current.detach())
    return torch.cat(found)
