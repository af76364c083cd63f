"""Train/eval mode, gradient flags and BatchNorm statistics as context managers: per submodule, restored on error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_statistics_kept", "evaluating", "frozen", "modes_kept", "training"]


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
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def batch_statistics_kept(*modules: nn.Module) -> Iterator[None]:
    """
    Let BatchNorm normalise by the batch in train mode without moving its running statistics.

    Of a step's several train-mode forwards only the last may move them.

    :param modules: The networks.
    """
    tracking = [
        child
        for module in modules
        for child in module.modules()
        if isinstance(child, _BatchNorm) and child.training and child.track_running_stats
    ]
    try:
        for child in tracking:
            child.track_running_stats = False  # torch then passes no running statistics to the kernel
        yield
    finally:
        for child in tracking:
            child.track_running_stats = True
