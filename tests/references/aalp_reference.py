"""AALP from the words of its page, one image and one channel at a time, on a network that is handed over in two halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Half = Callable[[Tensor], Tensor]


def contribution(head: Half, features: Tensor, channel: int, target: int, step: float = 1e-6) -> float:
    """mean(ds/dA_k) * mean(A_k) of one image, features (C, H, W), the derivative by central differences."""
    with torch.no_grad():
        moved = torch.zeros_like(features)
        moved[channel] = step
        up, down = head((features + moved)[None])[0, target], head((features - moved)[None])[0, target]
        positions = features[channel].numel()
        mean_slope = float(up - down) / (2 * step) / positions
        return mean_slope * float(features[channel].sum()) / positions


def contributions(body: Half, head: Half, image: Tensor, target: int | None) -> list[float]:
    """All channels of one image (C, H, W); `target` None is the predicted class."""
    with torch.no_grad():
        features = body(image[None])[0]
        if target is None:
            target = int(head(features[None])[0].argmax())
    return [contribution(head, features, k, target) for k in range(len(features))]


def mask(scores: Sequence[float], rate: float) -> list[float]:
    """Drop the lowest |c_k|; as many stay as (1 - rate) of the channels round to, one at least."""
    stay = max(1, round((1 - rate) * len(scores)))
    order = sorted(range(len(scores)), key=lambda k: abs(scores[k]), reverse=True)
    return [1.0 if k in order[:stay] else 0.0 for k in range(len(scores))]


def weight(z: Tensor, z_adv: Tensor, label: int, weighting: str) -> float:
    p, q = torch.softmax(z.detach(), 0), torch.softmax(z_adv.detach(), 0)
    return {
        "p_y": float(p[label]),
        "correct": float(int(p.argmax()) == label),
        "p_y_above": float(p[label] >= q[label]),
        "constant": 1.0,
    }[weighting]


def loss(
    body: Half,
    head: Half,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    lam: float,
    clean_weight: float,
    rate: float,
    guide: str,
    branches: str,
    weighting: str,
    normalise: bool,
    balance: bool,
) -> Tensor:
    """a CE(z^m) + (1 - a) CE(z~^m) + lam mean_i w_i mean_k (z^m_ik - z~^m_ik)^2 [+ mean_i (1 - w_i) CE(z~^m_i)]."""
    ce_clean, ce_adv, distances, weights = [], [], [], []
    for image, perturbed, label in zip(x, x_adv, y.tolist(), strict=True):
        target = label if guide == "true" else None
        own = mask(contributions(body, head, image, target), rate)
        other = {
            "clean": [1.0] * len(own),
            "both": own,
            "separate": mask(contributions(body, head, perturbed, target), rate),
        }[branches]
        z = head(body(image[None]) * torch.tensor(own, dtype=x.dtype).view(1, -1, 1, 1))[0]
        z_adv = head(body(perturbed[None]) * torch.tensor(other, dtype=x.dtype).view(1, -1, 1, 1))[0]
        ce_clean.append(torch.logsumexp(z, 0) - z[label])
        ce_adv.append(torch.logsumexp(z_adv, 0) - z_adv[label])
        distances.append(sum((z[k] - z_adv[k]) ** 2 for k in range(len(z))) / len(z))
        weights.append(weight(z, z_adv, label, weighting))
    n = len(x)
    if normalise:
        mean = sum(weights) / n
        weights = [w / mean for w in weights]
    total = torch.zeros((), dtype=x.dtype)
    for i in range(n):
        total = total + (clean_weight * ce_clean[i] + (1 - clean_weight) * ce_adv[i]) / n
        total = total + lam * weights[i] * distances[i] / n
        if balance:
            total = total + max(0.0, 1 - weights[i]) * ce_adv[i] / n
    return total


def opposing(z: Tensor, z_adv: Tensor, label: int) -> bool:
    """Whether (p - onehot(y)) . (z - z~) < 0 for one sample."""
    z, z_adv = z.detach(), z_adv.detach()
    p = torch.softmax(z, 0)
    return float(sum((p[k] - float(k == label)) * (z[k] - z_adv[k]) for k in range(len(z)))) < 0
