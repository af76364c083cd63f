"""Projected gradient descent as Madry et al. (2018) write it: one sample, one step, one coordinate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def clip(value: float, low: float, high: float) -> float:
    """The nearest number of an interval."""
    return min(max(value, low), high)


def project(point: list[float], centre: list[float], *, norm: str, eps: float) -> list[float]:
    """Into the ball around the centre, then into [0, 1], coordinate by coordinate."""
    if norm == "Linf":
        return [clip(clip(p, c - eps, c + eps), 0.0, 1.0) for p, c in zip(point, centre, strict=True)]
    length = math.sqrt(sum((p - c) ** 2 for p, c in zip(point, centre, strict=True)))
    shrink = min(1.0, eps / length) if length > 0 else 1.0
    return [clip(c + shrink * (p - c), 0.0, 1.0) for p, c in zip(point, centre, strict=True)]


def step(gradient: list[float], *, norm: str) -> list[float]:
    """The direction of steepest ascent, of length 1 in the norm."""
    if norm == "Linf":
        return [math.copysign(1.0, g) if g != 0 else 0.0 for g in gradient]
    length = math.sqrt(sum(g**2 for g in gradient))
    return [g / length if length > 0 else 0.0 for g in gradient]


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """-log p_y, the definition."""
    return -torch.log(torch.exp(logits[label]) / torch.exp(logits).sum())


def margin(logits: Tensor, label: int) -> Tensor:
    """max_{k != y} z_k - z_y."""
    wrong = [logits[k] for k in range(len(logits)) if k != label]
    best = wrong[0]
    for other in wrong[1:]:
        best = other if bool(other > best) else best
    return best - logits[label]


def dlr(logits: Tensor, label: int) -> Tensor:
    """-(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3), pi the classes in falling order of their logits."""
    order = sorted(range(len(logits)), key=lambda k: -float(logits.detach()[k]))
    return margin(logits, label) / (logits[order[0]] - logits[order[2]])


def pgd_one(
    model: nn.Module,
    x: Tensor,
    label: int,
    start: Tensor,
    *,
    norm: str,
    eps: float,
    eps_step: float,
    max_iter: int,
    loss: Callable[[Tensor, int], Tensor] = cross_entropy,
) -> Tensor:
    """
    x_{t+1} = Proj(x_t + eps_step * steepest(grad_x L(x_t, y))), for one image.

    :param x: (C, H, W) float64, the clean image.
    :param start: (C, H, W), x_0.
    :return: (C, H, W).
    """
    centre, point = x.flatten().tolist(), start.flatten().tolist()
    for _ in range(max_iter):
        image = torch.tensor(point, dtype=torch.float64).view(1, *x.shape).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(image)[0], label), image)
        direction = step(gradient.flatten().tolist(), norm=norm)
        moved = [p + eps_step * d for p, d in zip(point, direction, strict=True)]
        point = project(moved, centre, norm=norm, eps=eps)
    return torch.tensor(point, dtype=torch.float64).view(x.shape)


def pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, **options: object) -> Tensor:
    """:func:`pgd_one` for every image of a batch, each without the others."""
    return torch.stack([pgd_one(model, x[i], int(y[i]), start[i], **options) for i in range(len(x))])  # type: ignore[arg-type]
