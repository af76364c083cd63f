"""
Input gradients and Jacobian norms that stay in the graph, and what is made of them: importance, masks by rank, cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.errors import UnsupportedModelError
from art_saliency.randomness import RandomSource, normal, uniform

__all__ = [
    "cosine",
    "importance",
    "input_gradient",
    "jacobian_columns",
    "jacobian_frobenius",
    "jacobian_projection",
    "top_share_mask",
    "unit_directions",
]


def input_gradient(score: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """
    The gradient of a score with respect to the images it was computed from.

    Gradients are per sample, so hand over a *sum* over samples: a mean would shrink each by 1/N.

    :param score: A scalar, the sum over samples.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param create_graph: Whether the gradient itself is to be differentiated (a penalty on it).
    :return: (N, C, H, W).
    :raises UnsupportedModelError: When the score does not depend differentiably on `x`.
    """
    gradient = None
    if score.requires_grad:
        gradient = torch.autograd.grad(score, x, create_graph=create_graph, allow_unused=True)[0]
    if gradient is None:
        raise UnsupportedModelError(
            "model: got logits without a gradient to the images, expected a differentiable forward pass; "
            "look for .detach(), torch.no_grad(), .numpy(), rounding or argmax in the network"
        )
    return gradient


def unit_directions(logits: Tensor, random: RandomSource | None = None) -> Tensor:
    """
    A direction of logit space for each sample, uniform on the unit sphere.

    :param logits: (N, K), read for its shape, dtype and device alone.
    :param random: Where the random numbers come from; ``None`` is torch's global generator.
    :return: (N, K) of length 1, detached.
    """
    drawn = normal(logits.detach(), random)
    return drawn / drawn.norm(dim=1, keepdim=True).clamp_min(1e-12)


def jacobian_projection(logits: Tensor, x: Tensor, direction: Tensor, *, create_graph: bool = False) -> Tensor:
    """
    J^T v of every sample, J = dz/dx, in one backward pass.

    :param logits: (N, K), computed from `x`.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param direction: (N, K), each sample's v.
    :param create_graph: Whether the projection itself is to be differentiated.
    :return: (N, C, H, W).
    """
    return input_gradient((logits * direction).sum(), x, create_graph=create_graph)


def _projections(logits: Tensor, x: Tensor, count: int | None, random: RandomSource | None, graph: bool) -> list[Tensor]:
    """:return: J^T v for `count` random v, or for every unit vector of logit space, (N, P) each."""
    if count is None:
        basis = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        directions = [vector.expand_as(logits) for vector in basis]
    else:
        _checks.whole("projections", count, least=1)
        directions = [unit_directions(logits, random) for _ in range(count)]
    return [jacobian_projection(logits, x, v, create_graph=graph).flatten(1) for v in directions]


def jacobian_frobenius(
    logits: Tensor,
    x: Tensor,
    *,
    projections: int | None = 1,
    random: RandomSource | None = None,
    create_graph: bool = False,
) -> Tensor:
    """
    ||J||_F^2 of every sample, or an unbiased estimate: (K / n) sum_k ||J^T v_k||^2, v_k uniform on the unit sphere.

    After Hoffman, Roberts and Yaida (2019), "Robust Learning with Jacobian Regularization".

    :param logits: (N, K), computed from `x`.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param projections: n, at least 1: as many backward passes; ``None`` is the exact norm, K backward passes.
    :param random: Where the directions come from; ``None`` is torch's global generator.
    :param create_graph: Whether the norm is to be differentiated.
    :return: (N,), at least 0.
    """
    squares = [rows.square().sum(1) for rows in _projections(logits, x, projections, random, create_graph)]
    return torch.stack(squares).sum(0) * (1.0 if projections is None else logits.shape[1] / projections)


def jacobian_columns(
    logits: Tensor,
    x: Tensor,
    *,
    projections: int | None = 1,
    random: RandomSource | None = None,
    create_graph: bool = False,
) -> Tensor:
    """
    The L1 norm of w^T J, expected over w of mean square length K, or an unbiased estimate: (sqrt(K) / n) sum_k ||J^T v_k||_1.

    ``eps * ||J^T w||_1`` is the most that an L-inf perturbation of size `eps` can move w^T z to first order (the dual norm).
    The expectation is sqrt(K) E|v_1| times the sum over pixels of the lengths of J's columns. Parameters are those of
    :func:`jacobian_frobenius`.

    :return: (N,), at least 0.
    """
    classes = logits.shape[1]
    rows = _projections(logits, x, projections, random, create_graph)
    if projections is not None:
        return torch.stack([row.abs().sum(1) for row in rows]).sum(0) * (math.sqrt(classes) / projections)
    squares = torch.stack([row.square() for row in rows]).sum(0)
    # The square root has no derivative at 0, where a pixel that moves no logit lies: such a pixel counts 0.
    lengths = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
    mean_component = math.exp(math.lgamma(classes / 2) - math.lgamma((classes + 1) / 2)) / math.sqrt(math.pi)  # E|v_1|
    return lengths.sum(1) * (math.sqrt(classes) * mean_component)


def importance(gradient: Tensor) -> Tensor:
    """
    Feature importance of every pixel: I = sum_c |g_c|.

    :param gradient: (N, C, H, W).
    :return: (N, 1, H, W), at least 0.
    """
    return gradient.abs().sum(1, keepdim=True)


def top_share_mask(scores: Tensor, share: float, random: RandomSource | None = None) -> Tensor:
    """
    Mark the highest-ranked share of the pixels of each image; ties are broken at random.

    A threshold on the value would keep every tied pixel: gradient x input is exactly 0 on all black ones.

    :param scores: (N, 1, H, W).
    :param share: The share to mark, 0 to 1; ``round(share * H * W)`` pixels an image.
    :param random: Where tie-breaking numbers come from.
    :return: (N, 1, H, W) of 0 and 1, detached.
    """
    _checks.real("share", share, least=0, most=1)
    flat = scores.detach().flatten(1)
    kept = round(share * flat.shape[1])
    if kept == flat.shape[1]:
        return torch.ones_like(scores)
    shuffled = uniform(flat, random).argsort(1)
    by_rank = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)[:, :kept]
    return torch.zeros_like(flat).scatter_(1, shuffled.gather(1, by_rank), 1.0).view_as(scores)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """
    Cosine similarity of each sample, differentiable, in float32 at least, right at any scale.

    The gradients of a confident network are of the order of 1e-10, whose squares vanish in float32: rows are divided by
    their greatest entry first, which changes no cosine.

    :param a: (N, ...).
    :param b: (N, ...).
    :return: (N,); exactly 1 with zero derivative where either row is exactly zero, so that ``1 - cosine`` ignores it.
    """
    rows = []
    for tensor in (a, b):
        flat = tensor.flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        rows.append(flat)
    scales = [row.detach().abs().amax(1, keepdim=True) for row in rows]
    live = ((scales[0] > 0) & (scales[1] > 0)).squeeze(1)
    # A zero row is replaced before the norm is taken: the derivative of a norm at 0 is NaN even where it is masked later.
    unit = [
        torch.where(live[:, None], row / scale.clamp_min(torch.finfo(row.dtype).tiny), torch.ones_like(row))
        for row, scale in zip(rows, scales, strict=True)
    ]
    similarity = (unit[0] * unit[1]).sum(1) / (unit[0].norm(dim=1) * unit[1].norm(dim=1))
    return torch.where(live, similarity, torch.ones_like(similarity))
