"""
Input gradients and Jacobian norms that stay in the graph, and what is made of them: importance, masks by rank, cosine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from art_saliency import _checks
from art_saliency.errors import UnsupportedModelError
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource, normal, uniform

__all__ = [
    "check_second_derivatives",
    "cosine",
    "importance",
    "input_gradient",
    "jacobian_frobenius",
    "jacobian_projection",
    "second_derivatives",
    "sphere_directions",
    "top_share_mask",
    "unit_directions",
]


def input_gradient(score: Tensor, x: Tensor, *, create_graph: bool = False, retain_graph: bool = False) -> Tensor:
    """
    The gradient of a score with respect to the images it was computed from.

    Gradients are per sample, so hand over a *sum* over samples: a mean would shrink each by 1/N.

    :param score: A scalar, the sum over samples.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param create_graph: Whether the gradient itself is to be differentiated (a penalty on it).
    :param retain_graph: Whether the forward pass is still needed: something else of it will be differentiated.
    :return: (N, C, H, W).
    :raises UnsupportedModelError: When the score does not depend differentiably on `x`.
    """
    gradient = None
    if score.requires_grad:
        gradient = torch.autograd.grad(
            score, x, create_graph=create_graph, retain_graph=create_graph or retain_graph, allow_unused=True
        )[0]
    if gradient is None:
        raise UnsupportedModelError(
            "model: got logits without a gradient to the images, expected a differentiable forward pass; "
            "look for .detach(), torch.no_grad(), .numpy(), rounding or argmax in the network"
        )
    return gradient


@contextmanager
def second_derivatives(needed: bool = True) -> Iterator[None]:
    """
    Where input gradients are differentiated: attention by torch's mathematical kernel, as the fused ones have no second derivative.

    :param needed: Whether they are; else nothing is done.
    :raises UnsupportedModelError: When another operation of the network has none; it is named.
    """
    if not needed:
        yield
        return
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if re.search("donated buffer|does not currently support double backward", str(error)):
            raise UnsupportedModelError(
                "model: got a network of torch.compile, whose backward pass has no derivative, expected the network that it was made of "
                "for a method with input gradients in its loss; or take a method without them"
            ) from error
        missing = re.search(r"derivative for (?:aten::)?_?(\w+?)_backward is not implemented", str(error))
        if missing is None:
            raise
        raise UnsupportedModelError(
            f"model: got a network with {missing[1]}, of which torch has no second derivative, expected one that a method with "
            "input gradients in its loss can train; take another activation or network, or a method without them"
        ) from error


def check_second_derivatives(model: nn.Module, x: Tensor) -> None:
    """
    Differentiate a network's input gradient by its weights, in eval mode, and throw the result away.

    :param model: Maps (N, C, H, W) to logits. :param x: Some images.
    :raises UnsupportedModelError: When an operation has no second derivative; it is named.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model), torch.enable_grad(), second_derivatives():
        x = x.detach().requires_grad_(True)
        g = input_gradient(model(x).sum(), x, create_graph=True)
        if g.requires_grad:
            torch.autograd.grad(g.square().sum(), weights, allow_unused=True)


def unit_directions(logits: Tensor, random: RandomSource | None = None) -> Tensor:
    """
    A direction of logit space for each sample, uniform on the unit sphere.

    :param logits: (N, K), read for its shape, dtype and device alone.
    :param random: Where the random numbers come from; ``None`` is torch's global generator.
    :return: (N, K) of length 1, detached.
    """
    drawn = normal(logits.detach(), random)
    unit: Tensor = drawn / drawn.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


def jacobian_projection(
    logits: Tensor, x: Tensor, direction: Tensor, *, create_graph: bool = False, retain_graph: bool = False
) -> Tensor:
    """
    J^T v of every sample, J = dz/dx, in one backward pass.

    :param logits: (N, K), computed from `x`.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param direction: (N, K), each sample's v.
    :param create_graph: Whether the projection itself is to be differentiated.
    :param retain_graph: Whether something else of the forward pass will be differentiated.
    :return: (N, C, H, W).
    """
    score = (logits * direction.detach()).sum()
    return input_gradient(score, x, create_graph=create_graph, retain_graph=retain_graph)


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

    :param logits: (N, K), computed from `x`; the graph stays for further gradients.
    :param x: (N, C, H, W) with ``requires_grad``.
    :param projections: n, at least 1: as many backward passes; ``None`` is the exact norm, K backward passes.
    :param random: Where the directions come from; ``None`` is torch's global generator.
    :param create_graph: Whether the norm is to be differentiated.
    :return: (N,), at least 0.
    """
    squares = [
        weight
        * jacobian_projection(logits, x, w, create_graph=create_graph, retain_graph=True).square().flatten(1).sum(1)
        for w, weight in sphere_directions(logits, projections, random)
    ]
    return torch.stack(squares).sum(0)


def sphere_directions(
    logits: Tensor, projections: int | None = 1, random: RandomSource | None = None
) -> list[tuple[Tensor, float]]:
    """
    Directions w of logit space and their weights, with sum weight * ||J^T w||^2 = ||J||_F^2 for every J, at least on average.

    :param logits: (N, K), read for its shape, dtype and device alone.
    :param projections: How many random ones, uniform on the sphere; ``None`` gives the K axes.
    :param random: Where the random numbers come from; ``None`` is torch's global generator.
    :return: Pairs of w (N, K), of length sqrt(K), detached, and a weight; the weights sum to 1.
    """
    count, classes = logits.shape
    length = math.sqrt(classes)
    if projections is None:
        axes = torch.eye(classes, dtype=logits.dtype, device=logits.device)[:, None].expand(-1, count, -1)
        return [(length * axis, 1 / classes) for axis in axes]
    _checks.whole("projections", projections, least=1)
    return [(length * unit_directions(logits, random), 1 / projections) for _ in range(projections)]


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
    if kept in (0, flat.shape[1]):
        return torch.full_like(scores, float(kept > 0), requires_grad=False)
    least = flat.topk(kept, dim=1, sorted=False).values.amin(1, keepdim=True)
    # Above the least score that is kept: first; at it: by lot; below: last. Two selections cost a quarter of two sorts.
    turn = torch.where(flat > least, -1.0, torch.where(flat == least, uniform(flat, random), 2.0))
    chosen = turn.topk(kept, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(flat).scatter_(1, chosen, 1.0).view_as(scores)


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
