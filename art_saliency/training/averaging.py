"""
Averages of the weights along a run: exponential (EMA), or equal from an epoch on (SWA).

Who asks for an average wants it: it is what validation measures, what selection keeps, and what ends in the network. Training
itself goes on from the raw weights, which no average ever touches. (The optimizer's state belongs to the raw ones.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from art_saliency import _checks
from art_saliency.modes import evaluating, modes_kept
from art_saliency.networks import copy_of
from art_saliency.randomness import RandomSource
from art_saliency.training.extensions import Extension
from art_saliency.training.state import random_states, set_random_states

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["ExponentialAverage", "StochasticWeightAverage", "recompute_batch_statistics"]


def recompute_batch_statistics(
    model: nn.Module, images: Iterable[Tensor], mean_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> None:
    """
    Set BatchNorm's running statistics to the mean of the batches' own: those of averaged weights are nobody's.

    Only BatchNorm is in train mode meanwhile; dropout and FSR's noise are off, as in the network that is deployed.

    :param model: Its modes and momenta come back as they were. A layer that keeps no statistics, or whose class refuses train mode,
        is left alone.
    :param images: Batches (N, C, H, W) in [0, 1]; every batch weighs the same.
    :param mean_over_ranks: Averages a tensor in place over the processes that share the images; ``None`` is for one alone.
    """
    with modes_kept(model):
        candidates = (child for child in model.modules() if isinstance(child, _BatchNorm))
        layers = [child for child in candidates if child.running_mean is not None and child.train().training]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's word for an equal average
                layer.train()
            for x in images:
                model(x)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        for layer in layers if mean_over_ranks is not None else ():
            for statistics in (layer.running_mean, layer.running_var):
                if mean_over_ranks is not None and statistics is not None:
                    mean_over_ranks(statistics)


class _Average(Extension, ABC):
    """A copy of the network beside it, in eval mode, out of every graph."""

    kind: str

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.count = 0
        self._state: dict[str, Any] | None = None
        self._run: Run | None = None

    def on_start(self, run: Run) -> None:
        """Copy the network, or take up the copy of an interrupted run."""
        self.model = copy_of(run.model).requires_grad_(False).eval()
        self.count = 0
        if self._state is not None:
            self._restore(self._state)
        self._run = run
        self._describe(run)

    @abstractmethod
    def _describe(self, run: Run) -> None:
        """Say in the history what is averaged, and offer the copy to the run where it is one already."""

    def on_complete(self, run: Run) -> None:
        """Put the average into the network, where there is one."""
        if self.model is not None and run.candidate is self.model:
            run.model.load_state_dict(self.model.state_dict())
            run.history.meta["weights"]["average"] = self.kind

    def on_finish(self, run: Run) -> None:
        """Forget the run, and what an interrupted one had left: the next starts anew."""
        self._state = self._run = None

    def state_dict(self) -> dict[str, Any]:
        """:return: ``count``, and the copy's tensors under ``model``."""
        tensors = (
            {} if self.model is None else {name: value.detach() for name, value in self.model.state_dict().items()}
        )
        return {"count": self.count, "model": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; before or after :meth:`on_start`."""
        self._state = state
        if self._run is not None:
            self._restore(state)
            self._describe(self._run)

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.model is not None
        self.count = int(state["count"])
        self.model.load_state_dict(state["model"])


class ExponentialAverage(_Average):
    """
    EMA after every step: a <- d a + (1 - d) w, of parameters and BatchNorm's running statistics alike, from the first weights on.

    The copy also serves as ``batch.target_model`` to an objective that asks for a slow network.

    :param decay: d, 0 to below 1; 0 follows the weights.
    :param warmup: Whether d is at most (1 + t) / (10 + t) after t steps (as in TensorFlow's ``ExponentialMovingAverage``):
        without it, the untrained weights stay for about 1 / (1 - d) steps.
    """

    kind = "ema"

    def __init__(self, decay: float, *, warmup: bool = True) -> None:
        super().__init__()
        self.decay = _checks.real("ema", decay, least=0, below=1)
        self.warmup = _checks.flag("warmup", warmup)
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._copied: tuple[list[Tensor], list[Tensor]] = ([], [])

    def _describe(self, run: Run) -> None:
        assert self.model is not None
        run.target_model = run.candidate = self.model
        run.history.meta["ema"] = {"decay": self.decay, "warmup": self.warmup}
        pairs = list(zip(_tensors(self.model), _tensors(run.model), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._pairs = [slow for slow, _ in averaged], [fast.detach() for _, fast in averaged]
        self._copied = [slow for slow, _ in copied], [fast for _, fast in copied]

    def decay_at(self, step: int) -> float:
        """:param step: Steps done before this one. :return: d of the step."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def after_step(self, run: Run) -> None:
        """Move the average. On the device, all tensors at once."""
        with torch.no_grad():
            torch._foreach_lerp_(*self._pairs, 1 - self.decay_at(self.count))
            for slow, fast in zip(*self._copied, strict=True):  # counters
                slow.copy_(fast)
        self.count += 1


class StochasticWeightAverage(_Average):
    """
    SWA (Izmailov et al. 2018): the mean of the weights at the end of each epoch, from one epoch on.

    Until then there is no average, and the raw weights are measured. BatchNorm's statistics are recomputed, by one clean pass over
    the training data (as augmented) after each averaged epoch: the statistics of the averaged weights are not the average of
    statistics. An adversarial method's own statistics came from adversarial images; that the clean ones serve is a choice.

    :param start: The share of the run after which averaging begins, 0 to below 1; the last epoch is always averaged.
    """

    kind = "swa"

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = _checks.real("swa_from", start, least=0, below=1)

    def first_epoch(self, epochs: int) -> int:
        """:return: The first epoch, from 0, whose weights are averaged."""
        return min(epochs - 1, math.floor(round(self.start * epochs, 9)))

    def _describe(self, run: Run) -> None:
        run.history.meta["swa"] = {"from": self.start, "first_epoch": self.first_epoch(run.epochs)}
        if self.count and self.model is not None:
            run.candidate = self.model

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Average, and recompute the statistics."""
        if run.epoch < self.first_epoch(run.epochs):
            return
        assert self.model is not None
        with torch.no_grad():
            for slow, fast in zip(self.model.parameters(), run.model.parameters(), strict=True):
                slow.add_((fast - slow) / (self.count + 1))
            for kept, now in zip(self.model.buffers(), run.model.buffers(), strict=True):
                kept.copy_(now)  # what is not BatchNorm's is the last
        self.count += 1
        run.candidate = self.model
        # Random numbers of its own: whether an average is kept changes nothing in the run, not even in a loader's shuffling.
        engine, before = run.engine, random_states(run)
        random = RandomSource(run.random.seed, run.random.device, rank=engine.rank, world_size=engine.world_size)
        recompute_batch_statistics(self.model, (batch.x for batch in run.batches.epoch(random)), engine.mean_over_ranks)
        set_random_states(run, before)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
