"""Other views of a network that an audit attacks in its place: rescaled, averaged, smoothed, in train mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from art_saliency.modes import side_pass, training
from art_saliency.randomness import global_generators_kept

_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish)
_SHARPNESS = 10.0  # of the softplus: within 0.07 of a ReLU everywhere, and curved over a few tenths around its kink


class Rescaled(nn.Module):
    """The network with its logits divided by a number: the same decisions, another cross-entropy."""

    def __init__(self, model: nn.Module, divisor: float) -> None:
        super().__init__()
        self.model, self.divisor = model, divisor

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, K)."""
        logits: Tensor = self.model(x) / self.divisor
        return logits


class Averaged(nn.Module):
    """A randomised network's mean logits over several forward passes: its gradient is the expectation over transformations."""

    def __init__(self, model: nn.Module, passes: int) -> None:
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, K)."""
        return torch.stack([self.model(x) for _ in range(self.passes)]).mean(0)


class SameNoise(nn.Module):
    """A randomised network that draws the same numbers of every global generator in every pass over a batch of one size."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, K)."""
        with global_generators_kept(self.seed):
            logits: Tensor = self.model(x)
        return logits


class InTrainMode(nn.Module):
    """A copy of the network that computes in train mode whatever mode it is put into; the batch's statistics move nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, K)."""
        with training(self.model), side_pass(self.model):
            logits: Tensor = self.model(x)
        return logits


def smoothed_copy(model: nn.Module) -> nn.Module | None:
    """
    A copy whose kinked activations are softplus, so that its gradient sees beyond the linear region an image lies in.

    :return: The copy; ``None`` when the network has no activation *module* with a kink.
    """
    twin = copy.deepcopy(model)
    found = False
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _KINKED):
                setattr(parent, name, nn.Softplus(beta=_SHARPNESS).train(child.training))
                found = True
    return twin if found else None
