"""What is to be published: one plain network from [0, 1] to logits, taken out of an ART classifier, copied, cleaned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from art_saliency import _checks, architectures
from art_saliency.errors import UnsupportedModelError
from art_saliency.files import sha256_of_tensors
from art_saliency.methods.fsr import drop_auxiliary_heads
from art_saliency.methods.surgery import inserted
from art_saliency.networks import copy_of, pixel_range
from art_saliency.robustbench.rules import Violation, refusal
from art_saliency.robustbench.standalone import normalise_input

__all__ = ["Deployable", "clean_key", "deployable", "foreign_steps", "taken_out"]


@dataclass(frozen=True)
class Deployable:
    """
    A network that can be published as it is.

    :ivar network: A copy on the CPU, in eval mode, frozen: (N, C, H, W) in [0, 1] to logits (N, K). No auxiliary heads, no
        wrappers; what the classifier did to its input is inside.
    :ivar normalised: The names of the buffers in which the classifier's standardisation now lies; empty when it had none.
    :ivar also_known_as: Hashes by which the same function goes: an evaluation that states one of them is one of this network.
    """

    network: nn.Module
    normalised: tuple[str, ...]
    also_known_as: frozenset[str]

    @property
    def weights(self) -> dict[str, Tensor]:
        """:return: Its tensors, contiguous, each with storage of its own."""
        return {name: value.detach().clone().contiguous() for name, value in self.network.state_dict().items()}

    @property
    def sha256(self) -> str:
        """:return: Of its tensors."""
        return sha256_of_tensors(self.weights)


def deployable(model: PyTorchClassifier | nn.Module) -> Deployable:
    """
    Take the network out of a classifier. The classifier is left as it is.

    Evaluate what this returns, ``deployable(classifier).network``, when the classifier standardises its input or has other
    ``clip_values`` than (0, 1): those are baked in, as two buffers. A step that applies to training alone is left out.

    :param model: A classifier with ``clip_values``, or a network that maps [0, 1] to logits.
    :return: The copy.
    :raises UnsupportedModelError: When the classifier has other preprocessing or postprocessing defences; all are named.
    """
    if steps := foreign_steps(model):
        raise refusal("classifier", steps)
    return taken_out(model)


def taken_out(model: PyTorchClassifier | nn.Module) -> Deployable:
    """:return: As :func:`deployable`, but for the defences around the network, which are not looked at."""
    network = model.model if isinstance(model, PyTorchClassifier) else model
    if not isinstance(network, nn.Module):
        raise _checks.refuse("model", f"a {type(model).__name__}", "an ART PyTorchClassifier or a torch.nn.Module")
    plain = _unwrapped(copy_of(network)).cpu().eval()
    known = {sha256_of_tensors(state) for state in (_tensors(network), _cleaned(network), _tensors(plain))}
    if inserted(plain, "fsr"):
        drop_auxiliary_heads(plain)
        known.add(sha256_of_tensors(_tensors(plain)))
    plain.requires_grad_(False)
    buffers: tuple[str, ...] = ()
    if isinstance(model, PyTorchClassifier) and (affine := _affine(model)) is not None:
        buffers = _bake(plain, *affine)
        known = {sha256_of_tensors(_tensors(plain))}  # before, it was another function of the image
    return Deployable(plain, buffers, frozenset(known))


def foreign_steps(classifier: PyTorchClassifier | nn.Module) -> list[Violation]:
    """:return: What the classifier does to its input or output that a network cannot take along; one entry each, by name."""
    if not isinstance(classifier, PyTorchClassifier):
        return []
    before = [step for step in classifier.preprocessing_operations if step.apply_predict and not _standardises(step)]
    after = [step for step in classifier.postprocessing_defences or [] if step.apply_predict]
    cure = "evaluate and publish the network without it; RobustBench attacks the network alone, from [0, 1] to logits"
    return [
        Violation(type(step).__name__, f"is a {kind} defence of the classifier, outside the network", cure)
        for kind, steps in (("preprocessing", before), ("postprocessing", after))
        for step in steps
    ]


def clean_key(key: str) -> str:
    """:return: The name that a tensor has in the network that torch.compile was given."""
    return key.replace("_orig_mod.", "")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def _cleaned(network: nn.Module) -> dict[str, Tensor]:
    return {clean_key(name): value for name, value in _tensors(network).items()}


def _unwrapped(network: nn.Module) -> nn.Module:
    """:return: The network, without what torch.compile and parallel training put around it or its parts; in place."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while wraps := "_orig_mod" if "_orig_mod" in network._modules else "module" * isinstance(network, parallel):
        network = network.get_submodule(wraps)
    for name, child in list(network.named_children()):
        if (inside := _unwrapped(child)) is not child:
            setattr(network, name, inside)
    return network


def _standardises(step: Any) -> bool:
    return type(step).__name__ in ("StandardisationMeanStd", "StandardisationMeanStdPyTorch")


def _affine(classifier: PyTorchClassifier) -> tuple[np.ndarray, np.ndarray] | None:
    """
    What the classifier does to an image in [0, 1] before its network, as (x - mean) / std.

    :return: Mean and deviation, broadcastable to (1, C, H, W), float64; ``None`` when it is the identity.
    """
    low, high = pixel_range(classifier)
    steps = [step for step in classifier.preprocessing_operations if step.apply_predict and _standardises(step)]
    if len(steps) > 1:
        raise UnsupportedModelError(f"classifier: got {len(steps)} standardisations, expected one; combine them")
    given = (steps[0].mean, steps[0].std) if steps else (0.0, 1.0)
    mean, std = np.broadcast_arrays(*(_by_axes(np.asarray(part), classifier.input_shape[0]) for part in given))
    if (low, high) != (0.0, 1.0):  # x [high - low] + low is what the classifier's own images are
        mean, std = (mean - low) / (high - low), std / (high - low)
    return None if (mean == 0).all() and (std == 1).all() else (mean, std)


def _by_axes(values: np.ndarray, channels: int) -> np.ndarray:
    """:return: (1, C, H, W) or what broadcasts to it, float64; as ART does, a row of C numbers is one number a channel."""
    shape = (channels, 1, 1) if values.ndim == 1 and len(values) == channels else values.shape
    return values.astype(np.float64).reshape((1,) * (4 - len(shape)) + tuple(shape))


def _bake(network: nn.Module, mean: np.ndarray, std: np.ndarray) -> tuple[str, str]:
    """Put a standardisation before a network, in place. :return: The names of its buffers."""
    taken = hasattr(network, "mu") or hasattr(network, "sigma")  # the network's own, which stays
    names = ("input_mu", "input_sigma") if taken else ("mu", "sigma")
    buffers = [torch.tensor(np.ascontiguousarray(value), dtype=torch.float32) for value in (mean, std)]
    if taken or type(network).__module__ != architectures.__name__:
        normalise_input(network, mean.shape, *names)
    for name, value in zip(names, buffers, strict=True):  # this package's networks look for mu and sigma by themselves
        network.register_buffer(name, value)
    return names
