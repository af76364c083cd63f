"""Train/eval mode, gradient flags and BatchNorm statistics as context managers: per submodule, restored on error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from art_saliency.errors import UnsupportedModelError

__all__ = [
    "channels_last",
    "evaluating",
    "frozen",
    "full_float32",
    "matrices_as_convolutions",
    "modes_kept",
    "refuse_dropout",
    "side_pass",
    "tensor_float32",
    "training",
]

_BACKENDS: Any = torch.backends
_CUDNN: Any = torch.backends.cudnn  # whose settings by operation mypy does not know


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """
    Give every submodule its train/eval flag back on exit, one by one.

    ``model.train(was_training)`` would not do: a child that its owner put into ``eval()`` on purpose (a frozen
    BatchNorm) would come back in train mode.

    :param modules: The networks to watch.
    """
    flags = [(child, child.training) for module in modules for child in module.modules()]
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put networks into eval mode for the duration. :param modules: The networks."""
    with modes_kept(*modules):
        for module in modules:
            module.eval()
        yield


@contextmanager
def training(*modules: nn.Module) -> Iterator[None]:
    """Put networks into train mode for the duration. :param modules: The networks."""
    with modes_kept(*modules):
        for module in modules:
            module.train()
        yield


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """
    Take the parameters out of the graph for the duration: an attack needs no weight gradients, and they cost a third of a step.

    :param modules: The networks.
    """
    live = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in live:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)


def tensor_float32() -> bool:
    """:return: Whether torch lets a GPU round float32 convolutions to TF32's 10 bits, as it does unless it is told not to."""
    return str(_CUDNN.conv.fp32_precision) == "tf32"


@contextmanager
def _put(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set one of torch's global settings for the duration."""
    before = getattr(owner, name)
    try:
        setattr(owner, name, value)
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def full_float32(needed: bool = True) -> Iterator[None]:
    """
    Keep all 23 bits of float32 on GPUs for the duration: TF32, which keeps 10, is off for convolutions and matrix products.

    :param needed: Whether they are needed; else nothing is done.
    """
    if not needed:
        yield
        return
    try:
        # The older setting, where it can be read: a network may enter torch.backends.cudnn.flags(), which reads it, and torch
        # refuses that once convolutions alone were set by the newer one.
        convolutions = _put(_CUDNN, "allow_tf32", False) if _CUDNN.allow_tf32 else nullcontext()
    except RuntimeError:  # the newer one is in use already
        convolutions = _put(_CUDNN.conv, "fp32_precision", "ieee")
    with (
        _put(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        convolutions,
        # What somebody set for all of torch, or for all of cuDNN, would reach the convolutions from there.
        _put(_CUDNN, "fp32_precision", "ieee"),
        _put(_BACKENDS, "fp32_precision", "ieee"),
    ):
        yield


def matrices_as_convolutions() -> AbstractContextManager[None]:
    """Let a GPU round float32 matrix products as it rounds convolutions, for the duration."""
    return _put(torch.backends.cuda.matmul, "fp32_precision", "tf32" if tensor_float32() else "ieee")


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """
    Lay the weights of convolutions out as channels last for the duration; what goes through them then follows.

    Values stay the same, results differ in rounding. Weights that lay so before stay so.

    :param model: The network.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.ndim == 4 and t.is_contiguous()]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.contiguous()


@contextmanager
def side_pass(*modules: nn.Module) -> Iterator[None]:
    """
    For the side passes of a step: BatchNorm normalises by the batch without moving its running statistics, and layers that record
    their pass for an auxiliary loss (those with a flag ``recording``) leave it unrecorded.

    Of a step's several train-mode forwards only one, whose logits are reported, may do either.

    :param modules: The networks.
    """
    tracking: list[_BatchNorm] = []
    recording: list[Any] = []
    for child in (child for module in modules for child in module.modules()):
        if isinstance(child, _BatchNorm) and child.training and child.track_running_stats:
            tracking.append(child)
        elif getattr(child, "recording", False) is True:
            recording.append(child)
    try:
        for norm in tracking:
            norm.track_running_stats = False  # torch then passes no running statistics to the kernel
        for layer in recording:
            layer.recording = False
        yield
    finally:
        for layer in recording:
            layer.recording = True
        for norm in tracking:
            norm.track_running_stats = True


def refuse_dropout(model: nn.Module) -> None:
    """:raises UnsupportedModelError: When two forward passes draw two masks, in whose difference a finite difference would drown."""
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise UnsupportedModelError(
                f"form: got 'finite-difference' for a network with dropout ({name!r}), expected a network whose forward "
                f"passes agree: another mask each would drown the difference; say form='double-backward' or set p=0"
            )
