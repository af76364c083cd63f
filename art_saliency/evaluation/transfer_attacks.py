"""Attacks whose images are made on one network, or on several together, to fool another: MI, DI, TI and all three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AttackLoss, attack_loss
from art_saliency.gradients import input_gradient
from art_saliency.modes import evaluating, frozen
from art_saliency.randomness import RandomSource, uniform
from art_saliency.threat import ThreatModel, a_threat_model, finite_entries

__all__ = ["TRANSFER_ATTACKS", "ensemble_logits", "kernel_side", "resize_and_pad", "smooth", "transfer_attack"]

TRANSFER_ATTACKS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0, "diversity": 0.0, "kernel": 1},
    "mi": {"momentum": 1.0, "diversity": 0.0, "kernel": 1},
    "di": {"momentum": 0.0, "diversity": 0.5, "kernel": 1},
    "ti": {"momentum": 0.0, "diversity": 0.0, "kernel": None},
    "mi-di-ti": {"momentum": 1.0, "diversity": 0.5, "kernel": None},
}
"""Keywords of :func:`transfer_attack` by name; the factors are the papers': mu = 1, p = 0.5. ``"plain"`` is PGD without random start."""

_LEAST_SHARE = 0.9  # of a side that an image keeps: Xie et al. pad 299 to 330 pixels; ours must stay within the side
_KERNEL_SHARE = 15 / 299  # of a side that the Gaussian covers: Dong et al. 2019 take 15 pixels of 299


def transfer_attack(
    sources: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    momentum: float = 1.0,
    diversity: float = 0.0,
    kernel: int | None = 1,
    max_iter: int = 10,
    eps_step: float | None = None,
    loss: str | AttackLoss = "cross-entropy",
    random: RandomSource | None = None,
) -> Tensor:
    """
    Images made on `sources` to fool a network that is not among them, by the iterative gradient method from the clean image.

    MI (Dong et al. 2018, algorithm 1): the step follows g <- momentum * g + d / ||d||_1, d the gradient, for each image.
    DI (Xie et al. 2019): the gradient is taken on an image that is shrunk and padded at random with probability
    `diversity`; see :func:`resize_and_pad`. TI (Dong et al. 2019): the gradient is convolved with a Gaussian; see
    :func:`smooth`. They combine freely; :data:`TRANSFER_ATTACKS` names the usual ones.

    :param sources: Networks from (N, C, H, W) in [0, 1] to logits (N, K), on the device of `x`. The loss of several is that
        of the mean of their logits (Dong et al. 2018, section 3.2, with equal weights).
    :param x: (N, C, H, W) in [0, 1].
    :param y: (N,) int64, or (N, K) soft labels for the cross-entropy.
    :param threat: Norm and radius; a radius of 0 returns `x`.
    :param momentum: mu, at least 0; with 0 the gradient itself is followed.
    :param diversity: p, 0 to 1; 0 draws no random numbers.
    :param kernel: Side of the Gaussian in pixels, odd; 1 leaves the gradient alone, ``None`` suits the size of the images.
    :param max_iter: Steps.
    :param eps_step: Length of a step in [0, 1] pixel units; ``None`` is 2.5 * eps / max_iter as for
        :func:`art_saliency.attacks.pgd`. *Choice*: the papers' eps / max_iter reaches the surface of the ball only when all
        steps agree, and was the weaker one with every number of steps, norm and radius tried on digits, most in L2.
    :param loss: As for :func:`art_saliency.attacks.pgd`.
    :param random: Where DI's random numbers come from; ``None`` is torch's global generator.
    :return: (N, C, H, W) in [0, 1], within the threat model, detached.
    """
    networks = _networks(sources)
    _checks.real("momentum", momentum, least=0)
    _checks.real("diversity", diversity, least=0, most=1)
    max_iter = _checks.whole("max_iter", max_iter)
    if _checks.a_tensor("x", x).ndim != 4:
        raise _checks.refuse("x", f"shape {tuple(x.shape)}", "4 axes, (N, C, H, W)")
    side = kernel_side(x) if kernel is None else _odd("kernel", kernel)
    a_threat_model(threat)
    step = 2.5 * threat.eps / max(max_iter, 1) if eps_step is None else _checks.real("eps_step", eps_step, least=0)
    objective = attack_loss(loss)
    x = x.detach()
    x_adv, velocity = x.clone(), torch.zeros_like(x)
    if threat.eps == 0:
        return x_adv
    with evaluating(*networks), frozen(*networks):
        for _ in range(max_iter):
            with torch.enable_grad():
                x_adv = x_adv.detach().requires_grad_(True)
                seen = resize_and_pad(x_adv, diversity, random)
                gradient = input_gradient(objective(ensemble_logits(networks, seen), y).sum(), x_adv)
            # Before what follows spreads one entry that is not finite over the whole image and all later steps.
            direction = smooth(finite_entries(gradient), side)
            if momentum > 0:  # without it there is nothing to normalise for, and the steps are PGD's, bit for bit
                direction = velocity = momentum * velocity + _l1_unit(direction)
            x_adv = threat.project(x_adv.detach() + step * threat.ascent_direction(direction), x)
    return x_adv.detach()


def ensemble_logits(sources: Sequence[nn.Module], x: Tensor) -> Tensor:
    """:return: (N, K), the mean of the networks' logits (Dong et al. 2018, section 3.2, with equal weights); one network's own."""
    logits = [source(x) for source in sources]
    return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)


def resize_and_pad(x: Tensor, probability: float, random: RandomSource | None = None) -> Tensor:
    """
    Input diversity (Xie et al. 2019): each image, with a probability of its own, shrunk and put at a random place on black.

    The paper enlarges images of 299 pixels to between 299 and 330, pads them to 330 and resizes the network's input. A small
    network takes one size only, so *choice*: the image is shrunk, bilinearly, to at least nine tenths of its side (the same
    ratio) and padded to the side that it had. At 8 pixels that is 7, at 28 it is 25 to 27, at 32 29 to 31.

    Two products with interpolation matrices, each image its own: exact, without a loop, and the same bits every time, which
    the backward pass of ``interpolate`` is not on a GPU.

    :param x: (N, C, H, W).
    :param probability: 0 to 1; 0 returns `x` itself and draws no random numbers.
    :param random: Four numbers an image; ``None`` is torch's global generator.
    :return: (N, C, H, W).
    """
    if probability == 0:
        return x
    drawn = uniform(x.detach().flatten(1)[:, :1].expand(-1, 4).contiguous(), random)
    coin, size, top, left = drawn.unbind(1)
    rows, columns = _shrinking(x.shape[2], size, top), _shrinking(x.shape[3], size, left)
    moved = rows[:, None] @ x @ columns[:, None].transpose(2, 3)
    return torch.where((coin < probability)[:, None, None, None], moved, x)


def _shrinking(side: int, size: Tensor, place: Tensor) -> Tensor:
    """
    Matrices that shrink a line of pixels and put it somewhere on black.

    :param size: (N,) in [0, 1), which of the allowed lengths. :param place: (N,) in [0, 1), which of the places it has.
    :return: (N, side, side); row i holds the weights of the old pixels in the new pixel i.
    """
    least = max(1, min(round(_LEAST_SHARE * side), side - 1))
    length = least + (size * (side - least)).floor()
    start = (place * (side - length + 1)).floor()
    pixel = torch.arange(side, device=size.device, dtype=size.dtype)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    # Where the middle of a new pixel lay in the old line, pixel middles at 0.5, 1.5, ... (align_corners=False).
    source = (pixel - start[:, None] + 0.5) * (side / length)[:, None] - 0.5
    weights = (1 - (source[:, :, None] - pixel).abs()).clamp_min(0)  # bilinear: never beyond the line when it shrinks
    return weights * inside[:, :, None]


def kernel_side(x: Tensor) -> int:
    """:return: The side of the Gaussian that suits images (N, C, H, W): 15 for 299 pixels as in the paper, at least 3, odd."""
    return max(3, 2 * int(max(x.shape[2:]) * _KERNEL_SHARE / 2) + 1)


def smooth(gradient: Tensor, side: int) -> Tensor:
    """
    The gradient convolved with a Gaussian, black around it: the gradient of the loss summed over shifted images (Dong et al. 2019).

    Its standard deviation is k / sqrt(3) for a side of 2k + 1, as in the paper, and its weights sum to 1.

    :param gradient: (N, C, H, W).
    :param side: Odd; 1 returns the gradient itself.
    :return: (N, C, H, W).
    """
    if side == 1:
        return gradient
    reach = side // 2
    offsets = torch.arange(-reach, reach + 1, device=gradient.device, dtype=gradient.dtype)
    line = torch.exp(-offsets.square() * 3 / (2 * reach**2))
    line = line / line.sum()
    channels = gradient.shape[1]
    # A Gaussian is a product, so two lines do the work of a square. Gradients can be 1e-30: scale first, or products vanish.
    scale = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)[:, None, None, None]
    down = F.conv2d(
        gradient / scale, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(reach, 0), groups=channels
    )
    both = F.conv2d(down, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, reach), groups=channels)
    return both * scale


def _l1_unit(gradient: Tensor) -> Tensor:
    """:return: Rows of L1 norm 1, at any scale; 0 where a row is exactly 0."""
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)).view_as(gradient)


def _networks(sources: Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(sources, nn.Module):  # an nn.Sequential would pass for a list of its layers
        raise _checks.refuse("sources", "one network", "a sequence of networks", "write [network]")
    networks = list(sources)
    if not networks:
        raise _checks.refuse("sources", "no network", "at least one")
    for network in networks:
        if not isinstance(network, nn.Module):
            raise _checks.refuse("sources", f"a {type(network).__name__}", "torch.nn.Modules that return logits")
    return networks


def _odd(name: str, value: Any) -> int:
    if _checks.whole(name, value, least=1) % 2 == 0:
        raise _checks.refuse(name, str(value), "an odd side in pixels, or None")
    return int(value)
