"""MI, DI and TI as their papers write them: one image, one step, one pixel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references.attacks_reference import cross_entropy, project, step


def gaussian(side: int) -> list[list[float]]:
    """W_ij = exp(-(i^2 + j^2) / (2 sigma^2)) over its sum, sigma = k / sqrt(3), i and j from -k to k (Dong et al. 2019)."""
    k = side // 2
    if k == 0:
        return [[1.0]]
    sigma = k / math.sqrt(3)
    rows = [[math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in range(-k, k + 1)] for i in range(-k, k + 1)]
    total = sum(sum(row) for row in rows)
    return [[entry / total for entry in row] for row in rows]


def convolve(image: Tensor, kernel: list[list[float]]) -> Tensor:
    """Every pixel the weighted sum of its neighbours, 0 beyond the edge."""
    channels, height, width = image.shape
    k = len(kernel) // 2
    out = torch.zeros_like(image)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                total = 0.0
                for i in range(-k, k + 1):
                    for j in range(-k, k + 1):
                        if 0 <= row - i < height and 0 <= column - j < width:
                            total += kernel[i + k][j + k] * float(image[c, row - i, column - j])
                out[c, row, column] = total
    return out


def shrunk(image: Tensor, coin: float, size: float, top: float, left: float, probability: float) -> Tensor:
    """Resize-and-pad of one image (C, H, W) by the four numbers in [0, 1) that decide it, by ``interpolate`` and ``pad``."""
    if coin >= probability:
        return image
    height, width = image.shape[1:]
    sides, starts = [], []
    for side, place in ((height, top), (width, left)):
        least = max(1, min(round(0.9 * side), side - 1))
        sides.append(least + math.floor(size * (side - least)))
        starts.append(math.floor(place * (side - sides[-1] + 1)))
    small = F.interpolate(image[None], size=sides, mode="bilinear", align_corners=False)[0]
    below, right = height - sides[0] - starts[0], width - sides[1] - starts[1]
    return F.pad(small, (starts[1], right, starts[0], below))


def mi_one(
    sources: Sequence[nn.Module],
    x: Tensor,
    label: int,
    *,
    norm: str,
    eps: float,
    eps_step: float,
    max_iter: int,
    momentum: float,
    kernel: int = 1,
    see: Callable[[Tensor, int], Tensor] = lambda image, step: image,
) -> Tensor:
    """
    g_0 = 0, x_0 = x; g_{t+1} = momentum * g_t + d / ||d||_1; x_{t+1} = Proj(x_t + eps_step * steepest(g_{t+1})).

    d is the gradient of the cross-entropy of the sources' mean logits at what `see` makes of x_t, convolved with the kernel.

    :param x: (C, H, W) float64, the clean image.
    """
    weights = gaussian(kernel)
    centre, point = x.flatten().tolist(), x.flatten().tolist()
    velocity = [0.0] * len(point)
    for t in range(max_iter):
        image = torch.tensor(point, dtype=torch.float64).view(x.shape).requires_grad_(True)
        logits = sum(source(see(image, t)[None])[0] for source in sources) / len(sources)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, label), image)
        direction = convolve(gradient, weights).flatten().tolist()
        length = sum(abs(entry) for entry in direction)
        velocity = [
            momentum * v + (d / length if length > 0 else 0.0) for v, d in zip(velocity, direction, strict=True)
        ]
        moved = [p + eps_step * d for p, d in zip(point, step(velocity, norm=norm), strict=True)]
        point = project(moved, centre, norm=norm, eps=eps)
    return torch.tensor(point, dtype=torch.float64).view(x.shape)
