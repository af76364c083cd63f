"""
What can be measured about saliency maps, one number an image.

A map that is zero everywhere, or constant where a correlation is asked for, has no answer: the number is NaN, never a
perfect score. Maps are signed, (N, C, H, W); but for :func:`consensus` a pixel's importance is ``sum_c |g_c|``.

All but the sensitivity, which Captum has, are a few lines of torch. Quantus is not used: its Gini index adds 1e-7 to every pixel,
and every metric of its base class stops at a batch of maps that are all zero. The tests compare with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.evaluation.saliency_maps import SaliencyMap, check_maps, unit_maps
from art_saliency.gradients import cosine, importance, input_gradient
from art_saliency.modes import evaluating, frozen
from art_saliency.perturbation_saliency import blurred, salient_mask
from art_saliency.randomness import RandomSource

__all__ = [
    "consensus",
    "deletion_auc",
    "edge_alignment",
    "etmann_alignment",
    "gini",
    "insertion_auc",
    "max_sensitivity",
    "rank_correlation",
    "sobel_edges",
    "top_mass",
    "top_overlap",
]

_PLACES = (0, 2, 3)  # axes of an image and its map; channels may differ


def _where_alive(values: Tensor, *maps: Tensor) -> Tensor:
    """:return: The numbers, NaN where a map is zero everywhere or not finite."""
    alive = torch.stack([(m != 0).flatten(1).any(1) & m.isfinite().flatten(1).all(1) for m in maps]).all(0)
    return torch.where(alive, values, torch.nan)


def consensus(a: Tensor, b: Tensor) -> Tensor:
    """
    How far two maps of an image point the same way: the cosine that Adv-GSCT trains for.

    :param a: (N, C, H, W), signed, of clean images, say. :param b: (N, C, H, W), of adversarial ones.
    :return: (N,), -1 to 1. NaN where either is zero, where :func:`art_saliency.gradients.cosine` would say 1: a network
        without gradients has no consensus.
    """
    check_maps(0, 1, 2, 3, a=a, b=b)
    return _where_alive(cosine(a.detach(), b.detach()), a, b)


def _most_important(maps: Tensor, share: float) -> Tensor:
    """:return: (N, 1, H, W) bool; ties fall in one fixed order, so that a greater share holds the smaller one."""
    scores = importance(maps.detach())
    return salient_mask(scores, (scores.shape[2], scores.shape[3]), share).bool()


def top_overlap(a: Tensor, b: Tensor, share: float = 0.1) -> Tensor:
    """
    Intersection over union of the most important pixels of two maps.

    :param share: Of the pixels, above 0 and at most 1. Two random maps score about share / (2 - share): 0.05 at 0.1. Pixels
        that are exactly zero are never important, so a sparse map may have fewer.
    :return: (N,), 0 to 1.
    """
    check_maps(*_PLACES, a=a, b=b)
    _checks.real("share", share, above=0, most=1)
    first, second = ((_most_important(m, share) & (importance(m) > 0)).flatten(1) for m in (a, b))
    union = (first | second).sum(1)
    return _where_alive((first & second).sum(1) / union, a, b)


def _ranks(values: Tensor) -> Tensor:
    """:return: (N, M) ranks from 1, in float64; equal values share their mean rank."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above + 1).double() / 2


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """
    Spearman's correlation of the importance of the pixels, equal values sharing their mean rank.

    :param a: (N, C, H, W). :param b: (N, C', H, W).
    :return: (N,), -1 to 1; NaN where either importance is the same everywhere.
    """
    check_maps(*_PLACES, a=a, b=b)
    rows = [_ranks(importance(m.detach()).flatten(1)) for m in (a, b)]
    first, second = (r - r.mean(1, keepdim=True) for r in rows)
    # The products are of whole and half numbers, exact in float64: equal maps give 1 and not 0.9999999.
    value = (first * second).sum(1) / (first.square().sum(1).sqrt() * second.square().sum(1).sqrt())
    return _where_alive(value.clamp(-1, 1).to(a.dtype), a, b)


def gini(maps: Tensor) -> Tensor:
    """
    Sparseness: Gini's index of the importance (Hurley and Rickard 2009; for saliency Chalasani et al. 2020).

    :param maps: (N, C, H, W).
    :return: (N,): 0 when all M pixels count the same, 1 - 1/M when one counts alone.
    """
    check_maps(maps=maps)
    ordered = unit_maps(importance(maps.detach())).flatten(1).sort(dim=1).values
    pixels = ordered.shape[1]
    weights = (pixels - torch.arange(pixels, device=maps.device, dtype=maps.dtype) - 0.5) / pixels
    value = 1 - 2 * (ordered * weights).sum(1) / ordered.sum(1)
    return _where_alive(value.clamp_min(0), maps)


def top_mass(maps: Tensor, share: float = 0.1) -> Tensor:
    """
    The part of all importance that the most important pixels hold.

    :param share: Of the pixels, above 0 and at most 1; at least one pixel.
    :return: (N,), `share` for a constant map, 1 for one that is smaller than that share.
    """
    check_maps(maps=maps)
    _checks.real("share", share, above=0, most=1)
    flat = unit_maps(importance(maps.detach())).flatten(1)
    kept = max(1, round(share * flat.shape[1]))
    return _where_alive(flat.topk(kept, dim=1).values.sum(1) / flat.sum(1), maps)


def sobel_edges(x: Tensor) -> Tensor:
    """
    Edge strength: the length of Sobel's gradient of the mean over channels; edge pixels are repeated outside.

    :param x: (N, C, H, W).
    :return: (N, 1, H, W), at least 0.
    """
    check_maps(x=x)
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=x.dtype, device=x.device) / 8
    padded = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return slopes.square().sum(1, keepdim=True).sqrt()


def edge_alignment(maps: Tensor, x: Tensor) -> Tensor:
    """
    Whether a map follows the lines of its image: the rank correlation of importance and Sobel's edges. *Choice.*

    :param maps: (N, C, H, W). :param x: (N, C', H, W), the images explained.
    :return: (N,), -1 to 1.
    """
    check_maps(*_PLACES, maps=maps, x=x)
    return rank_correlation(maps, sobel_edges(x.detach()))


def _auc(model: nn.Module, start: Tensor, end: Tensor, y: Tensor, maps: Tensor, steps: int) -> Tensor:
    """:return: (N,) mean probability of `y` on the way from `start` to `end`, the most important pixels first."""
    steps = _checks.whole("steps", steps, least=1)
    shares, curve = [], []
    with evaluating(model), torch.no_grad():
        for step in range(steps + 1):
            mask = _most_important(maps, step / steps)
            shares.append(mask[0].to(start.dtype).mean())
            probability = model(torch.where(mask, end, start)).softmax(1)
            curve.append(probability.gather(1, y[:, None])[:, 0])
    return _where_alive(torch.trapezoid(torch.stack(curve), torch.stack(shares), dim=0), maps)


def deletion_auc(
    model: nn.Module, x: Tensor, y: Tensor, maps: Tensor, *, baseline: Tensor | None = None, steps: int = 20
) -> Tensor:
    """
    How soon the class is lost when pixels are deleted, the most important first (Petsiuk et al. 2018). Low is good.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K). :param x: (N, C, H, W) in [0, 1].
    :param y: (N,) int64, the class explained. :param maps: (N, C', H, W) of `x`.
    :param baseline: What replaces a pixel, broadcastable to `x`; ``None`` is black, as in the paper's code.
    :param steps: Equal steps; pixels a step are rounded.
    :return: (N,) area under the curve of the class's probability over the share of pixels deleted, 0 to 1.
    """
    check_maps(*_PLACES, x=x, maps=maps)
    end = torch.zeros_like(x) if baseline is None else baseline.to(x).expand_as(x)
    return _auc(model, x.detach(), end, y, maps, steps)


def insertion_auc(
    model: nn.Module, x: Tensor, y: Tensor, maps: Tensor, *, sigma: float | None = None, steps: int = 20
) -> Tensor:
    """
    How soon the class is found when the pixels of a blurred image are made sharp (Petsiuk et al. 2018). High is good.

    :param sigma: The blur's standard deviation in pixels; ``None`` is an eighth of the shorter side, at least 1 (*choice*).
    :return: (N,), 0 to 1. The other parameters are those of :func:`deletion_auc`.
    """
    check_maps(*_PLACES, x=x, maps=maps)
    blur = max(1.0, min(x.shape[-2:]) / 8) if sigma is None else sigma
    return _auc(model, blurred(x.detach(), blur), x.detach(), y, maps, steps)


def etmann_alignment(model: nn.Module, x: Tensor) -> Tensor:
    """
    Alignment of image and saliency, |<x, g>| / ||g||, g the gradient of the margin of the two highest logits (Etmann et al. 2019).

    For a linear network without bias it is the L2 distance to the boundary between the two classes.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K), K at least 2.
    :return: (N,), at least 0, in units of the pixel range; NaN where the gradient is zero.
    """
    check_maps(x=x)
    with evaluating(model), frozen(model), torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        if logits.shape[1] < 2:
            raise _checks.refuse("model", f"{logits.shape[1]} logit", "at least 2")
        highest = logits.topk(2, dim=1).values
        gradient = input_gradient((highest[:, 0] - highest[:, 1]).sum(), x)
    scaled = gradient / gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny).view(-1, 1, 1, 1)
    value = (x.detach() * scaled).flatten(1).sum(1).abs() / scaled.flatten(1).norm(dim=1)
    return _where_alive(value, gradient)


def max_sensitivity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    saliency_map: SaliencyMap,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """
    The furthest that a map moves, relative to its length, when the image moves a little (Yeh et al. 2019), by Captum.

    :param saliency_map: One of :func:`~art_saliency.evaluation.saliency_maps.named_maps`, or any such function.
    :param radius: Linf radius of the moves, uniform within, in units of the [0, 1] pixel range, which they do not leave.
    :param samples: Moves tried, the same for every image, at least 1.
    :param seed: Of the moves.
    :param batch_size: Images a pass.
    :return: (N,), at least 0. The other parameters are those of :func:`deletion_auc`.
    """
    check_maps(x=x)
    metrics = _checks.optional("captum.metrics", "explain", "The sensitivity of a saliency map")
    _checks.real("radius", radius, above=0, most=1)
    samples = _checks.whole("samples", samples, least=1)
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    random = RandomSource(seed, x.device)
    moves = radius * (2 * random.uniform(x[:1].expand(samples, *x.shape[1:])) - 1)

    def moved(images: Tensor) -> Tensor:  # Captum hands over every image `samples` times in a row
        return (images + moves.repeat(len(images) // samples, 1, 1, 1)).clamp(0, 1)

    rows = max(1, batch_size // samples)
    values, maps = [], []
    for images, targets in zip(torch.split(x.detach(), rows), torch.split(y, rows), strict=True):
        still = saliency_map(model, images, targets)
        # Captum would not repeat a single target; and it asks for the unmoved images as a tuple, and wants one back.
        repeated = targets.repeat_interleave(samples)

        def explained(some: Tensor | tuple[Tensor], still: Tensor = still, y: Tensor = repeated) -> Any:
            return (still,) if isinstance(some, tuple) else saliency_map(model, some, y)

        values.append(metrics.sensitivity_max(explained, images, moved, n_perturb_samples=samples).flatten())
        maps.append(still)
    return _where_alive(torch.cat(values), torch.cat(maps))
