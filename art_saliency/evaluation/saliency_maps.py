"""
Saliency maps: what each pixel has to do with a class, by six methods with one signature.

``map(model, x, y) -> (N, C, H, W)``, signed where the method has signs, in eval mode, for the class `y`, which need not be the
true one. An image's map depends on that image alone, whatever the batch; and, where numbers are drawn, on the seed alone.
Captum computes what it has; its absolute values are switched off, and the global random state it draws from is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import UnsupportedModelError
from art_saliency.gradients import input_gradient
from art_saliency.modes import evaluating, frozen
from art_saliency.perturbation_saliency import perturbation_saliency
from art_saliency.randomness import global_generators_kept

__all__ = [
    "SaliencyMap",
    "check_maps",
    "gradient_times_input",
    "integrated_gradients",
    "logit_gradient",
    "loss_saliency",
    "named_maps",
    "occlusion",
    "smoothgrad",
    "unit_maps",
]

SaliencyMap = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x (N, C, H, W), y (N,)) -> (N, C, H, W) or (N, 1, H, W), detached."""

_PURPOSE = "This saliency map"


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """A network in eval mode without weight gradients; what Captum says of one without input gradients, in our words."""
    try:
        with torch.inference_mode(False), evaluating(model), frozen(model), torch.enable_grad():
            yield
    except RuntimeError as error:
        if "does not require grad" in str(error) or "not have been used in the graph" in str(error):
            raise UnsupportedModelError(
                "model: got logits without a gradient to the images, expected a differentiable forward pass; "
                "look for .detach(), torch.no_grad(), .numpy(), rounding or argmax in the network"
            ) from error
        raise


def _leaf(x: Tensor) -> Tensor:
    """:return: A copy to differentiate by: neither Captum nor autograd then marks the caller's tensor."""
    return x.detach().clone().requires_grad_(True)


def check_maps(*same: int, **maps: Tensor) -> None:
    """
    Refuse what is no map of floats with four axes, or not of the same size as the first one: it would be broadcast.

    :param same: Axes along which all of them agree. :param maps: (N, C, H, W), each by its name.
    """
    first = next(iter(maps))
    for name, value in maps.items():
        if _checks.a_tensor(name, value).ndim != 4 or not value.is_floating_point():
            hint = "add the channel axis: [:, None]" if value.ndim == 3 else ""
            raise _checks.refuse(name, f"{value.dtype} of shape {tuple(value.shape)}", "floats, (N, C, H, W)", hint)
        wanted = [maps[first].shape[axis] if axis in same else value.shape[axis] for axis in range(4)]
        if list(value.shape) != wanted:
            raise _checks.refuse(
                name, f"shape {tuple(value.shape)}", f"{tuple(wanted)}, as {first} is {tuple(maps[first].shape)}"
            )


def unit_maps(maps: Tensor) -> Tensor:
    """
    Scale each map by its own greatest value: shapes are compared, not sizes, and tiny gradients do not vanish in a sum.

    :param maps: (N, 1, H, W), at least 0.
    :return: (N, 1, H, W) in [0, 1]; a map of zeros stays one.
    """
    check_maps(maps=maps)
    return maps / maps.flatten(1).amax(1).clamp_min(torch.finfo(maps.dtype).tiny).view(-1, 1, 1, 1)


def loss_saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """
    The gradient of the cross-entropy with respect to the images, in eval mode.

    :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: (N, C, H, W). :param y: (N,) int64.
    :return: (N, C, H, W), detached.
    """
    with evaluating(model), frozen(model), torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return input_gradient(F.cross_entropy(model(x), y, reduction="sum"), x)


def logit_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """
    The gradient of the logit of the class (Simonyan et al. 2014), by Captum.

    :return: (N, C, H, W). The parameters are those of :func:`loss_saliency`.
    """
    attr = _checks.optional("captum.attr", "explain", _PURPOSE)
    with _explained(model):
        gradient: Tensor = attr.Saliency(model).attribute(_leaf(x), target=y, abs=False)
    return gradient.detach()


def gradient_times_input(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """
    The gradient of the logit of the class times the image (Shrikumar et al. 2016), by Captum. Zero on black pixels.

    :return: (N, C, H, W). The parameters are those of :func:`loss_saliency`.
    """
    attr = _checks.optional("captum.attr", "explain", _PURPOSE)
    with _explained(model):
        product: Tensor = attr.InputXGradient(model).attribute(_leaf(x), target=y)
    return product.detach()


def smoothgrad(
    model: nn.Module, x: Tensor, y: Tensor, *, samples: int = 25, noise: float = 0.15, seed: int = 0
) -> Tensor:
    """
    The mean logit gradient over noisy copies of the image (Smilkov et al. 2017), by Captum.

    Every image meets the same noise, its copies are one batch: so its map depends on no other image.

    :param samples: Copies of an image, at least 1.
    :param noise: Standard deviation in units of the [0, 1] pixel range, above 0; the paper recommends 0.1 to 0.2. Copies
        are not clipped, as in the paper.
    :param seed: Of the noise.
    :return: (N, C, H, W). The other parameters are those of :func:`loss_saliency`.
    """
    attr = _checks.optional("captum.attr", "explain", _PURPOSE)
    count = _checks.whole("samples", samples, least=1)
    deviation = _checks.real("noise", noise, above=0)
    seed = _checks.seed(seed)
    tunnel = attr.NoiseTunnel(attr.Saliency(model))
    maps = []
    with _explained(model), global_generators_kept():
        for image, target in zip(torch.split(x.detach().clone(), 1), torch.split(y, 1), strict=True):
            torch.manual_seed(seed)
            maps.append(
                tunnel.attribute(
                    image, nt_type="smoothgrad", nt_samples=count, stdevs=deviation, target=target, abs=False
                ).detach()
            )
    return torch.cat(maps)


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    baseline: Tensor | None = None,
    steps: int = 50,
    batch_size: int = 256,
) -> Tensor:
    """
    The logit gradient averaged along the line from a baseline, times the difference (Sundararajan et al. 2017), by Captum.

    Complete: an image's map sums to the logit at the image minus the logit at the baseline, up to the quadrature.

    :param baseline: Broadcastable to `x`; ``None`` is black, the paper's.
    :param steps: Points of the Gauss-Legendre quadrature, at least 1.
    :param batch_size: Images a pass, at least one point of every image of `x`.
    :return: (N, C, H, W). The other parameters are those of :func:`loss_saliency`.
    """
    attr = _checks.optional("captum.attr", "explain", _PURPOSE)
    points = _checks.whole("steps", steps, least=1)
    rows = max(_checks.whole("batch_size", batch_size, least=1), len(x))
    start = torch.zeros_like(x) if baseline is None else baseline.to(x).expand_as(x).detach()
    with _explained(model):
        attributions: Tensor = attr.IntegratedGradients(model).attribute(
            _leaf(x), baselines=start, target=y, n_steps=points, internal_batch_size=rows
        )
    return attributions.detach()


def occlusion(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """
    How far the logits move when a spot of the image is blurred away: :func:`perturbation_saliency` at full size.

    :param y: Not used: all logits count. The drop of one class would be nothing on an image that the network gets wrong.
    :return: (N, 1, H, W), at least 0. The other parameters are those of :func:`loss_saliency`.
    """
    scores = perturbation_saliency(model, x.detach(), y)
    return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


def named_maps(seed: int = 0) -> dict[str, SaliencyMap]:
    """:return: Every map by its name; `seed` is that of those that draw random numbers."""
    return {
        "loss-gradient": loss_saliency,
        "logit-gradient": logit_gradient,
        "gradient-x-input": gradient_times_input,
        "smoothgrad": partial(smoothgrad, seed=seed),
        "integrated-gradients": integrated_gradients,
        "occlusion": occlusion,
    }
