"""
The loop: batch -> objective -> backward -> optimizer -> schedule -> extensions, once for every method there is.

Nothing in a step waits for the device: figures are summed there and read once an epoch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency.methods.base import Batch, LossTerms, Objective, auxiliary_modules, auxiliary_terms
from art_saliency.modes import modes_kept
from art_saliency.randomness import RandomSource
from art_saliency.training.batches import Batches
from art_saliency.training.engine import Engine, reproducible
from art_saliency.training.extensions import Extension
from art_saliency.training.guard import FiniteGuard
from art_saliency.training.records import History, versions
from art_saliency.training.schedules import Schedule

__all__ = ["Run", "train"]


class Run:
    """
    A run in progress, as extensions see it.

    :ivar model: The network as the user gave it. :ivar objective: What is minimised. :ivar optimizer: The optimizer.
    :ivar epoch: The current epoch, from 0. :ivar step: Optimizer steps done. :ivar epochs: How many epochs there will be.
    :ivar random: The run's random numbers. :ivar history: The epochs that are over.
    :ivar batch: The last batch. :ivar logits: Its detached logits. :ivar target_model: The slow copy, where an extension keeps one.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        batches: Batches,
        *,
        epochs: int,
        engine: Engine,
        schedule: Schedule,
        random: RandomSource,
        history: History,
    ) -> None:
        self.model, self.objective, self.optimizer, self.batches = model, objective, optimizer, batches
        self.epochs, self.engine, self.schedule = epochs, engine, schedule
        self.random, self.history = random, history
        self.epoch = self.step = 0
        self.batch: Batch | None = None
        self.logits: Tensor | None = None
        self.target_model: nn.Module | None = None


class _Sums:
    """Figures of an epoch, weighted by the images of each step, kept on the device until the epoch is over."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._weight: dict[str, int] = {}

    def add(self, names: tuple[str, ...], values: Tensor, rows: int) -> None:
        weighted = values.double() * rows if values.device.type != "mps" else values * rows
        self._sums[names] = self._sums[names] + weighted if names in self._sums else weighted
        for name in names:
            self._weight[name] = self._weight.get(name, 0) + rows

    def means(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for names, sums in self._sums.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
        return {name: total / self._weight[name] for name, total in totals.items()}


def _loss_terms(run: Run, model: nn.Module, batch: Batch) -> LossTerms:
    """The objective's loss, and what the network's own modules (FSR) add to it."""
    modules = auxiliary_modules(run.model)
    for module in modules:
        module.start_step(batch.random)
    result: LossTerms = run.objective(model, batch)
    if modules:
        extra = auxiliary_terms(modules, result.logits, batch.y)
        result = LossTerms(result.loss + extra.loss, result.logits, {**result.terms, **extra.terms})
    return result


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).float().mean()


def _epoch(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    guard: FiniteGuard,
    grad_clip: float | None,
    extensions: Sequence[Extension],
) -> dict[str, float]:
    sums, total = _Sums(), run.epochs * run.batches.steps_per_epoch
    for batch in run.batches.epoch(run.random):
        batch.progress, batch.target_model = run.step / total, run.target_model
        with run.engine.autocast():
            result = _loss_terms(run, model, batch)
        optimizer.zero_grad(set_to_none=True)
        run.engine.backward(result.loss)
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), grad_clip)
        optimizer.step()
        run.schedule.after_step()
        logits = result.logits.detach()
        names = (*result.terms, "loss")
        figures = torch.stack(
            [*(term.detach().float() for term in result.terms.values()), result.loss.detach().float()]
        )
        guard.watch(run.step, run.epoch, names, figures)
        sums.add((*names, "train_accuracy"), torch.cat([figures, _accuracy(logits, batch.y)[None]]), len(batch.x))
        run.batch, run.logits = batch, logits
        run.step += 1
        for extension in extensions:
            extension.after_step(run)
    guard.read(run.step, run.epoch)
    return sums.means()


@contextmanager
def _surrounded(run: Run, extensions: Sequence[Extension]) -> Iterator[None]:
    """Start every extension, and finish all that were started, whatever happens between."""
    started: list[Extension] = []
    try:
        for extension in extensions:
            extension.on_start(run)
            started.append(extension)
        yield
    finally:
        for extension in reversed(started):
            extension.on_finish(run)


def train(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    batches: Batches,
    *,
    epochs: int,
    engine: Engine,
    seed: int,
    scheduler: object = None,
    grad_clip: float | None = None,
    deterministic: bool = False,
    extensions: Sequence[Extension] = (),
    history: History | None = None,
) -> History:
    """
    Train a network by an objective. Modes come back as they were, also when training is stopped by an error.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K), on the engine's device.
    :param objective: The method. :param optimizer: Over the model's parameters. :param batches: The training data.
    :param epochs: Passes over it. :param engine: Device and precision. :param seed: Of data order, attacks and dropout.
    :param scheduler: See :class:`~art_saliency.training.schedules.Schedule`.
    :param grad_clip: The greatest norm of the whole gradient; ``None`` does not clip.
    :param deterministic: Whether only kernels are used whose results repeat bit for bit.
    :param extensions: What else happens around steps and epochs.
    :param history: A history to fill, so that it can be read after an error; ``None`` makes one.
    :return: One record an epoch.
    :raises NonFiniteLossError: With the last finite weights put back.
    """
    history = History() if history is None else history
    random = RandomSource(seed, engine.device, rank=engine.rank, world_size=engine.world_size)
    schedule = Schedule(scheduler, optimizer, epochs * batches.steps_per_epoch)
    run = Run(
        model,
        objective,
        optimizer,
        batches,
        epochs=epochs,
        engine=engine,
        schedule=schedule,
        random=random,
        history=history,
    )
    history.meta.update(
        objective=objective.name,
        settings=objective.config(),
        seed=seed,
        epochs=epochs,
        steps_per_epoch=batches.steps_per_epoch,
        device=str(engine.device),
        precision=engine.precision,
        threads=torch.get_num_threads(),
        deterministic=deterministic,
        versions=versions(),
    )
    wrapped, wrapped_optimizer = engine.setup(model, optimizer)
    guard = FiniteGuard(model, optimizer)
    said = False
    try:
        with (
            modes_kept(model),
            reproducible(seed, engine.device, deterministic=deterministic),
            _surrounded(run, extensions),
        ):
            for run.epoch in range(epochs):
                model.train()
                started = time.perf_counter()
                means = _epoch(run, wrapped, wrapped_optimizer, guard, grad_clip, extensions)
                record = {
                    "epoch": run.epoch,
                    "loss": means.pop("loss"),
                    "train_accuracy": means.pop("train_accuracy"),
                    **means,
                    "lr": float(optimizer.param_groups[0]["lr"]),
                    "seconds": time.perf_counter() - started,
                }
                schedule.after_epoch(record["loss"])
                for sentence in objective.epoch_warnings(record):
                    if not said:
                        warnings.warn(f"epoch {run.epoch}: {sentence}", stacklevel=2)
                    said = True
                for extension in extensions:
                    extension.after_epoch(run, record)
                history.records.append(record)
    finally:
        schedule.restore()
        for module in auxiliary_modules(model):
            module.start_step(None)  # else it keeps the last step's tensors and random source
    return history
