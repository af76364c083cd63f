"""Networks by name, this package's or anybody's, and the check that every network from elsewhere has to pass."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.architectures import (
    ACTIVATIONS,
    ActivationFactory,
    PreActResNet18,
    ResNet18,
    SmallCNN,
    WideResNet,
    add_normalisation,
    normalised,
)
from art_saliency.errors import ArtSaliencyError, UnsupportedModelError
from art_saliency.gradients import input_gradient
from art_saliency.modes import evaluating, modes_kept

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

__all__ = [
    "ACTIVATIONS",
    "NETWORKS",
    "ActivationFactory",
    "NetworkFactory",
    "PreActResNet18",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "build_network",
    "check_network",
    "copy_of",
    "default_network",
    "own_logits",
    "pixel_range",
]

NetworkFactory = Callable[..., nn.Module]
"""Takes ``num_classes, in_channels, activation, mean, std`` and, unless it is left at its default, ``width``, by keyword."""

NETWORKS: dict[str, NetworkFactory] = {
    "small-cnn": SmallCNN,
    "mnist-cnn": partial(SmallCNN, stem_stride=2),
    "resnet18": ResNet18,
    "preactresnet18": PreActResNet18,
    "wrn-28-10": lambda width=10, **options: WideResNet(depth=28, widen_factor=width, **options),
    "wrn-34-10": lambda width=10, **options: WideResNet(depth=34, widen_factor=width, **options),
}
"""By name, for :func:`build_network` and the command line; the width of a Wide ResNet is its widen factor."""


def default_network(input_shape: Sequence[int]) -> str:
    """:param input_shape: (C, H, W). :return: The name of a network that suits it: small ones up to 16 and 28 pixels a side."""
    side = max(_shape(input_shape)[1:])
    return "small-cnn" if side <= 16 else "mnist-cnn" if side <= 28 else "resnet18"


def build_network(
    name: str,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    activation: str | ActivationFactory = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int | None = None,
) -> nn.Module:
    """
    Build a network with fresh weights, which ``torch.manual_seed`` decides.

    :param name: One of :data:`NETWORKS`; ``"timm:NAME"`` or ``"torchvision:NAME"``, any classifier that the library lists,
        made for this size of images and without pretrained weights; or ``"package.module:factory"``, a function or
        class of your own, called with those of the keywords `num_classes` and `in_channels` that it accepts.
    :param num_classes: K, at least 2.
    :param input_shape: (C, H, W) of the images.
    :param activation: A name of :data:`ACTIVATIONS`, or a function like those there; of this package's networks only.
    :param mean: Of each channel, in units of [0, 1]: subtracted inside the network; ``None`` is 0.
    :param std: Of each channel, in units of [0, 1]: divided by inside the network; ``None`` is 1.
    :param width: Of this package's networks only; ``None`` is the network's own default.
    :return: The network, which maps (N, C, H, W) in [0, 1] to logits (N, K).
    :raises InputError: When there is no such network, or an argument does not suit it.
    :raises UnsupportedModelError: When a network from elsewhere cannot be made, or fails :func:`check_network`.
    """
    _checks.whole("num_classes", num_classes, least=2)
    shape = _shape(input_shape)
    if not isinstance(name, str) or ":" not in name:
        factory = NETWORKS[_checks.one_of("network", name, NETWORKS)]
        given = {} if width is None else {"width": _checks.whole("width", width, least=1)}
        return factory(
            num_classes=num_classes, in_channels=shape[0], activation=activation, mean=mean, std=std, **given
        )
    if width is not None or activation != "relu":
        got = f"a width or an activation for {name!r}"
        raise _checks.refuse("network", got, "neither", "set them in a factory of your own, package.module:factory")
    model = _from_elsewhere(name, num_classes, shape)
    check_network(model, shape, num_classes)
    if add_normalisation(model, shape[0], mean, std):
        if isinstance(model, nn.Sequential):  # ART runs its children one by one, past any hook
            raise _checks.refuse("mean", f"one for {name!r}, an nn.Sequential", "None", "normalise in its first layer")
        model.register_forward_pre_hook(_normalise_input)
    return model


def _normalise_input(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (normalised(network, inputs[0]), *inputs[1:])


def _from_elsewhere(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    origin = name.partition(":")[0]
    try:
        if origin == "timm":
            return _from_timm(name, num_classes, shape)
        if origin == "torchvision":
            return _from_torchvision(name, num_classes, shape)
        factory = _imported(name)
        return factory(**_accepted(factory, num_classes=num_classes, in_channels=shape[0]))  # type: ignore[no-any-return]
    except ArtSaliencyError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"network: got {name!r}, which could not be made ({_brief(error)}), expected a network for {num_classes} "
            f"classes and images of shape {shape}; try it by itself in Python"
        ) from error


def _from_timm(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, at timm's use of torch.jit
        timm, what = _checks.optional("timm", "timm", f"the network {name!r}"), name.partition(":")[2]
    _known(name, timm.list_models())
    settings = timm.get_pretrained_cfg(what)
    # Networks of patches are made for one size; the others take any, and many of them no such keyword.
    size = {"img_size": shape[1:]} if settings is not None and settings.fixed_input_size else {}
    model: nn.Module = timm.create_model(what, num_classes=num_classes, in_chans=shape[0], **size)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and any(side % width for side, width in zip(shape[1:], patch, strict=False)):
        got = f"{name!r} for images of {shape[1]}x{shape[2]} pixels"  # its first layer would leave the rest out, unsaid
        remedy = "bring the images to such a size, or take another network"
        raise _checks.refuse("network", got, f"sides that patches of {patch[0]}x{patch[1]} pixels fill", remedy)
    return model


def _from_torchvision(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    models, what = _checks.optional("torchvision", "vision", f"the network {name!r}").models, name.partition(":")[2]
    _known(name, models.list_models(module=models))
    channels, height, width = shape
    if channels != 3:
        got, remedy = f"{name!r} for images of {channels} channel{'s' * (channels > 1)}", "timm's take any: timm:NAME"
        raise _checks.refuse("network", got, "images of 3 channels, as all of torchvision's networks take", remedy)
    options: dict[str, Any] = {}
    if what.startswith("vit_"):
        if height != width:
            raise _checks.refuse("network", f"{name!r} for images of {height}x{width} pixels", "square ones")
        options = {"image_size": height}
    elif what.startswith("maxvit"):
        options = {"input_size": (height, width)}
    elif what in ("googlenet", "inception_v3"):  # auxiliary logits would be in what they give while they are trained
        options = {"aux_logits": False, "init_weights": True}
    return models.get_model(what, weights=None, num_classes=num_classes, **options)  # type: ignore[no-any-return]


def _known(name: str, known: Sequence[str]) -> None:
    """Refuse a name that the library does not know; it knows too many to print them."""
    library, _, what = name.partition(":")
    if what.partition(".")[0] not in known:  # timm writes architecture.weights
        expected = f"a classifier that {library} lists{_checks.suggestion(what, known, most=3)}"
        raise _checks.refuse("network", repr(name), expected)


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(importlib.import_module(module))
    except Exception as error:
        raise _checks.refuse(
            "network",
            f"{name!r}, which could not be imported ({_brief(error)})",
            "package.module:factory",
            "run `python -m art_saliency` in the folder that holds it, or put that folder on PYTHONPATH",
        ) from error


def _accepted(factory: Any, **options: Any) -> dict[str, Any]:
    """:return: The options that the factory has parameters for."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a built-in without a signature, or nothing that can be called
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {key: value for key, value in options.items() if key in parameters}


def check_network(model: nn.Module, input_shape: Sequence[int], num_classes: int) -> None:
    """
    Try a network on two images, forward and backward, in eval mode. Weights, gradients and modes stay as they are.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K).
    :param input_shape: (C, H, W).
    :param num_classes: K.
    :raises UnsupportedModelError: When it gives anything but finite logits (2, K) that have a gradient to the images.
    """
    if not isinstance(model, nn.Module):
        raise _unsupported(f"a {type(model).__name__}", "a torch.nn.Module", "return the network itself")
    shape, wanted = (2, *_shape(input_shape)), f"logits of shape (2, {num_classes}) for two images"
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    x = torch.linspace(0, 1, math.prod(shape), device=like.device, dtype=like.dtype).view(shape)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(x.requires_grad_(True))
            if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
                got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise _unsupported(got, f"{wanted} and nothing else", "change its last layer")
            input_gradient(logits.sum(), x)
            with torch.no_grad():
                # Else what a module keeps of a pass, as spectral_norm keeps its weight, lies in a graph: no copy of it can be made.
                model(x)
    except ArtSaliencyError:
        raise
    except Exception as error:
        got, remedy = f"{_brief(error)} for input of shape {shape}", "look at the channels and the size that it takes"
        raise _unsupported(got, f"{wanted} and their gradient", remedy) from error
    if logits.is_meta:
        return
    if not bool(logits.isfinite().all()):
        raise _unsupported("NaN or Inf", f"finite {wanted} in [0, 1]", "look at its weights")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        raise _unsupported("probabilities", wanted, "take the softmax out of the network")


def copy_of(model: nn.Module) -> nn.Module:
    """:return: A deep copy. :raises UnsupportedModelError: When a module keeps something that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise _unsupported(
            f"a network that cannot be copied ({_brief(error)})", "one that can", "look at what its modules keep"
        ) from error


def _unsupported(got: str, expected: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model: got {got}, expected {expected}; {remedy}")


def _brief(error: Exception) -> str:
    """:return: An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200].rstrip('.')}".removesuffix(": ")


def _shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise _checks.refuse("input_shape", tuple(input_shape), "(C, H, W)")
    channels, height, width = (_checks.whole("input_shape", side, least=1) for side in input_shape)
    return channels, height, width


def pixel_range(classifier: PyTorchClassifier) -> tuple[float, float]:
    """:return: The classifier's ``clip_values`` as two numbers; ``None`` and ranges that differ by pixel are refused."""
    if classifier.clip_values is None:
        raise _checks.refuse(
            "classifier", "clip_values=None", "the pixel range", "write PyTorchClassifier(..., clip_values=(0.0, 1.0))"
        )
    low, high = (np.unique(np.asarray(end, dtype=np.float64)) for end in classifier.clip_values)
    if len(low) != 1 or len(high) != 1 or low[0] >= high[0]:
        raise _checks.refuse("clip_values", str(classifier.clip_values), "one least and one greatest pixel value")
    return float(low[0]), float(high[0])


def own_logits(model: PyTorchClassifier | nn.Module, x: Tensor) -> Tensor:
    """
    What the user's classifier itself says of images: the truth that everything made of it is measured against.

    :param model: A classifier with ``clip_values``, or a network on [0, 1]; its modes are kept.
    :param x: (N, C, H, W) in [0, 1], on the CPU.
    :return: (N, K) on the CPU.
    """
    if isinstance(model, nn.Module):
        with evaluating(model), torch.no_grad():
            like = next((p for p in model.parameters()), x)
            logits: Tensor = model(x.to(like.device))
            return logits.cpu()
    low, high = pixel_range(model)
    scaled = x.numpy() if (low, high) == (0.0, 1.0) else x.numpy() * np.float32(high - low) + np.float32(low)
    with modes_kept(model.model), torch.no_grad():
        return torch.from_numpy(np.asarray(model.predict(scaled, batch_size=len(x))))


def art_device_type(device: torch.device | str) -> str:
    """
    Get ready for ART, which of several GPUs takes the current one: that becomes the one that is asked for.

    :param device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. :return: ART's ``device_type``.
    """
    where = torch.device(device)
    if where.type != "cuda":
        return "cpu"
    if where.index is not None:  # without a number the current one is meant
        torch.cuda.set_device(where)
    return "gpu"
