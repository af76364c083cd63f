"""Images and labels that fit each other and the network, where the network computes and in the type in which it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.errors import UnsupportedModelError
from art_saliency.modes import evaluating
from art_saliency.randomness import global_generators_kept


def a_network(model: object) -> nn.Module:
    """:return: It, when it is a network; a classifier around one, such as ART's, is refused with the cure."""
    if not isinstance(model, nn.Module):
        inside = isinstance(getattr(model, "model", None), nn.Module)
        remedy = "pass art_saliency.network_of(classifier), with images in [0, 1]" if inside else ""
        raise _checks.refuse("model", f"a {type(model).__name__}", "a torch.nn.Module", remedy)
    return model


def reference_tensor(model: nn.Module, x: Tensor) -> Tensor:
    """:return: A tensor that lies where the network computes, in the type in which it computes."""
    return next(
        (p for p in a_network(model).parameters() if p.is_floating_point()),
        x if x.is_floating_point() else x[:0].float(),
    )


def pixels(x: Tensor, like: Tensor) -> Tensor:
    """:return: The images in [0, 1], where `like` lies and in its type."""
    return to_unit(x.to(like.device)).to(like.dtype)


def checked(model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """
    Check images and labels against each other and the network.

    One image goes through the network to count its classes: a label beyond them would be counted as an error of the
    network, and ends a CUDA process when it reaches a loss.

    :param x: (N, C, H, W) in [0, 1], or uint8. :param y: (N,), or one-hot rows.
    :return: The images as they are, and the labels as (N,) int64.
    :raises InputError: When they do not fit, or are bytes of 0 and 1 alone.
    :raises UnsupportedModelError: When the network's weights are of half precision; under autocast float32 ones stay.
    """
    x = _checks.bytes_of_pixels("x", _checks.images(x, allow_uint8=True))
    like = reference_tensor(model, x)
    refuse_half(like)
    first = pixels(x[:1], like)
    # A network that draws random numbers must not move the caller's generator by being asked for its classes.
    with evaluating(model), torch.no_grad(), global_generators_kept():
        classes = model(first).shape[1]
    return x, _checks.labels(y, len(x), classes, soft=False)


def refuse_half(like: Tensor) -> None:
    """Refuse a network of half precision by name. :param like: See :func:`reference_tensor`."""
    if like.dtype in (torch.float16, torch.bfloat16):
        raise _of_another_type(like, "the steps of an attack are lost in its rounding")


def refuse_double(like: Tensor) -> None:
    """Refuse a network of double precision by name, where AutoAttack is to be run. :param like: See :func:`reference_tensor`."""
    if like.dtype == torch.float64:
        raise _of_another_type(like, "AutoAttack makes images of that")


def _of_another_type(like: Tensor, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model: got a network of {like.dtype}, expected torch.float32: {why}; convert it with .float()"
    )


def placed(model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """
    :func:`checked` images and labels, brought to where the network is; all of them at once.

    Bytes become pixels on the CPU, since a GPU divides by 255 to other bits, and fingerprints are taken of the outcome.

    :return: Images of float32, or of float64 for a network of it, and labels.
    """
    images, labels = checked(model, x, y)
    like = reference_tensor(model, images[:0].float())
    images = to_unit(images.cpu()) if images.dtype == torch.uint8 else images
    return pixels(images, like).contiguous(), labels.to(like.device)


def unbroken(x_adv: Tensor, x: Tensor) -> Tensor:
    """:return: The images of an attack; where one has pixels that are not finite, and so is none, the clean one instead."""
    finite = torch.isfinite(x_adv).flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x_adv, x)


def right_answers(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) bool; logits (N, K) that are not finite are no answer."""
    return torch.isfinite(logits).all(1) & (logits.argmax(1) == y)
