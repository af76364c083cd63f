"""What a training step costs, counted, not timed: its floating-point operations in units of one plain training step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from art_saliency.gradients import second_derivatives
from art_saliency.methods.base import Batch, Objective, step_terms
from art_saliency.methods.baselines import Standard
from art_saliency.randomness import RandomSource, global_generators_kept

__all__ = ["forward_backward_passes", "step_operations"]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own operation counts. Torch's ``FlopCounterMode`` also follows modules, by hooks that break ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=result))
        return result


def forward_backward_passes(
    model: nn.Module, objective: Objective, batch: Batch, *, plain: nn.Module | None = None
) -> float:
    """
    The cost of the objective's step in forward-backward passes: 1 is a step of standard training.

    Convolutions and matrix products are counted, second derivatives included; an attack's backward pass, which needs no
    weight gradients, counts less than a whole one. The network, its gradients and the random state are left alone.

    :param model: The network. :param objective: The method. :param batch: Any batch; its size does not matter.
    :param plain: The network that standard training is of, without what a method puts into it; ``None`` is `model`, as it is.
    :return: A ratio; PGD-10 adversarial training is about 7.7.
    """
    with global_generators_kept():
        one = step_operations(model if plain is None else plain, Standard(), batch)
        return step_operations(model, objective, batch) / one


def step_operations(model: nn.Module, objective: Objective, batch: Batch) -> int:
    """
    The floating-point operations of the objective's step: those of its convolutions and matrix products, as torch counts them.

    :param model: The network; it is left alone. :param objective: The method. :param batch: The batch.
    """
    batch = copy.copy(batch)
    batch.progress, batch.random = 1.0, RandomSource(0, batch.x.device)
    if objective.needs_maps and batch.maps is None:
        batch.maps = torch.zeros_like(batch.x[:, :1])  # a step of a run has them: they are made once, before training
    model = copy.deepcopy(model).train()
    with second_derivatives(objective.double_backward), _Counter() as counter:
        step_terms(objective, model, batch).loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.total)
