"""Stops a run whose loss or weights are no longer finite, and gives the last good weights back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency.errors import NonFiniteLossError

__all__ = ["FiniteGuard"]

_NEVER = 1 << 62


class FiniteGuard:
    """
    Watches without waiting: flags stay on the device and are read every `every` steps.

    At each reading at which everything was finite, weights and optimizer state are copied; when something was not, that copy
    is put back and :class:`NonFiniteLossError` names the first term and step.

    :param model: The network that is trained. :param optimizer: Its optimizer. :param every: Steps between two readings.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, every: int = 50, first_step: int = 0) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self._names: tuple[str, ...] = ()
        self._first_bad: Tensor | None = None
        self._pending = 0
        self._snapshot(first_step)

    def _snapshot(self, step: int) -> None:
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._good: tuple[dict[str, Tensor], Any] = (weights, copy.deepcopy(self.optimizer.state_dict()))
        self._good_step = step

    def watch(self, step: int, epoch: int, names: tuple[str, ...], values: Tensor) -> None:
        """
        Take note of one step's figures.

        :param names: The names of the figures, terms first, the loss last. :param values: (len(names),), detached.
        """
        if names != self._names or self._first_bad is None:
            if self._pending:
                self.read(step, epoch)
            self._names, self._first_bad = (
                names,
                torch.full((len(names),), _NEVER, dtype=torch.long, device=values.device),
            )
        self._first_bad = torch.where(torch.isfinite(values), self._first_bad, self._first_bad.clamp(max=step))
        self._pending += 1
        if self._pending >= self.every:
            self.read(step + 1, epoch)

    def read(self, step: int, epoch: int) -> None:
        """Look at the flags and the weights. :param step: Steps done. :raises NonFiniteLossError: When something was not finite."""
        if not self._pending or self._first_bad is None:
            return
        self._pending = 0
        first = self._first_bad.tolist()
        if min(first) < _NEVER:
            bad_step, name = min(first), self._names[first.index(min(first))]
        elif not bool(torch.isfinite(torch.nn.utils.get_total_norm(list(self.model.parameters())))):
            bad_step, name = step - 1, "weights"
        else:
            self._snapshot(step)
            return
        weights, optimizer_state = self._good
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer_state)
        raise NonFiniteLossError(name, bad_step, epoch, self._good_step)
