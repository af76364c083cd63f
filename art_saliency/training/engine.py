"""Where and how precisely a run computes: Lightning Fabric under a plain loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency import _checks

__all__ = ["PRECISIONS", "Engine", "reproducible"]

PRECISIONS = ("32-true", "bf16-mixed")
"""float32 throughout, or bfloat16 where autocast allows it; Lightning's names."""


class Engine:
    """
    Device, precision and strategy of a run.

    One process needs nothing of Fabric's wrapping, which costs a hook a forward pass, and gets none.
    Fabric is imported here, when training starts: it takes a second.

    :param device: Where the network lies.
    :param precision: ``"32-true"``, or ``"bf16-mixed"`` for first-order passes.
    """

    def __init__(self, device: torch.device | str, *, precision: str = "32-true") -> None:
        from lightning_fabric import Fabric

        self.device = torch.device(device)
        self.precision = _checks.one_of("precision", precision, PRECISIONS)
        accelerator = {"cuda": "gpu", "cpu": "cpu", "mps": "mps"}.get(self.device.type, "auto")
        devices: Any = [self.device.index or 0] if self.device.type == "cuda" else 1
        self.fabric = Fabric(accelerator=accelerator, devices=devices, precision="32-true")
        self.rank, self.world_size = self.fabric.global_rank, self.fabric.world_size
        self.plain = self.world_size == 1

    def setup(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """:return: The network and optimizer that the loop is to call."""
        if self.plain:
            return model, optimizer
        wrapped: tuple[nn.Module, Any] = self.fabric.setup(model, optimizer, move_to_device=False)
        return wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """
        The precision of the passes inside. It is torch's own context, entered around the objective: Fabric's wrapper of the network
        refuses the input gradients that every attack takes.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32-true")

    def backward(self, loss: Tensor) -> None:
        """The step's one ordinary backward pass."""
        if self.plain:
            torch.autograd.backward(loss)
        else:
            self.fabric.backward(loss)


@contextmanager
def reproducible(seed: int, device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """
    Seed torch's global generators (dropout draws from them) for the duration; the user's own sequence is untouched.

    :param deterministic: Whether torch refuses kernels whose result varies from run to run.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            if deterministic:
                # cuBLAS reads this when it starts; without it, torch's deterministic mode refuses matrix products.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = benchmark
