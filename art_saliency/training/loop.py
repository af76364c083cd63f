"""
The loop: batch -> objective -> backward -> optimizer -> schedule -> extensions, once for every method there is.

Nothing in a step waits for the device: figures are summed there and read once an epoch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency import _checks
from art_saliency.gradients import second_derivatives
from art_saliency.methods.base import Batch, LossTerms, Objective, auxiliary_modules, step_terms
from art_saliency.modes import full_float32, modes_kept, tensor_float32
from art_saliency.randomness import RandomSource
from art_saliency.training.batches import Batches
from art_saliency.training.engine import Engine, reproducible
from art_saliency.training.extensions import Extension
from art_saliency.training.guard import FiniteGuard
from art_saliency.training.records import History, Sums, versions
from art_saliency.training.schedules import Schedule
from art_saliency.training.state import begin_epoch

if TYPE_CHECKING:
    from art_saliency.training.checkpoint import Checkpoints

__all__ = ["Run", "train"]


class Run:
    """
    A run in progress, as extensions see it.

    :ivar model: The network as the user gave it. :ivar objective: What is minimised. :ivar optimizer: The optimizer.
    :ivar epoch: The current epoch, from 0. :ivar step: Optimizer steps done. :ivar epochs: How many epochs there will be.
    :ivar random: The run's random numbers. :ivar history: The epochs that are over.
    :ivar batch: The last batch. :ivar logits: Its detached logits. :ivar target_model: The slow copy, where an extension keeps one.
    :ivar candidate: The network that would be deployed if the run ended now: the model itself, or an average of its weights.
    :ivar stopping: Set it to end the run after this epoch, as if it were the last one.
    :ivar extensions: What hangs on the run, in order. :ivar guard: Against what is not finite.
    :ivar epoch_step: Steps of this epoch that are done. :ivar epoch_started: When it began, on ``time.perf_counter()``.
    :ivar rate: The learning rate of the last step, of the first group.
    :ivar epoch_random: The random states of its start. :ivar sums: Of its figures. :ivar warned: Whether one of the objective's warnings was given.
    """

    guard: FiniteGuard

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
        extensions: Sequence[Extension] = (),
    ) -> None:
        self.model, self.objective, self.optimizer, self.batches = model, objective, optimizer, batches
        self.epochs, self.engine, self.schedule = epochs, engine, schedule
        self.random, self.history = random, history
        self.extensions = extensions
        self.epoch = self.step = self.epoch_step = 0
        self.epoch_started = time.perf_counter()
        self.epoch_random: dict[str, Any] = {}
        self.rate: float | Tensor = 0.0
        self.sums, self.warned = Sums(), False
        self.batch: Batch | None = None
        self.logits: Tensor | None = None
        self.target_model: nn.Module | None = None
        self.candidate: nn.Module = model
        self.stopping = False


@contextmanager
def _around_gradient(run: Run, batch: Batch, extensions: Sequence[Extension]) -> Iterator[None]:
    def loss_terms() -> LossTerms:
        with run.engine.autocast():
            return step_terms(run.objective, run.model, batch)

    with ExitStack() as around:
        for extension in extensions:
            around.enter_context(extension.around_gradient(run, batch, loss_terms))
        yield


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).float().mean()


def _epoch(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    grad_clip: float | None,
    checkpoints: Checkpoints | None,
) -> None:
    extensions, steps = run.extensions, run.batches.steps_per_epoch
    for batch in begin_epoch(run):
        batch.progress, batch.target_model = run.step / (run.epochs * steps), run.target_model
        for extension in extensions:
            extension.before_step(run, batch)
        with (
            second_derivatives(run.objective.double_backward),
            full_float32(run.objective.full_float32),
            _around_gradient(run, batch, extensions),
        ):
            with run.engine.autocast():
                result = step_terms(run.objective, model, batch)
            optimizer.zero_grad(set_to_none=True)
            run.engine.backward(result.loss)
        if grad_clip is not None:
            trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, grad_clip)
        optimizer.step()
        run.rate = run.optimizer.param_groups[0]["lr"]
        run.schedule.after_step()
        logits = result.logits.detach()
        names = (*result.terms, "loss")
        figures = torch.stack(
            [*(term.detach().float() for term in result.terms.values()), result.loss.detach().float()]
        )
        run.guard.watch(run.step, run.epoch, names, figures)
        run.sums.add((*names, "train_accuracy"), torch.cat([figures, _accuracy(logits, batch.y)[None]]), len(batch.x))
        run.batch, run.logits = batch, logits
        run.step += 1
        run.epoch_step += 1
        for extension in extensions:
            extension.after_step(run)
        # After the last step the epoch is first brought to its end: what follows it belongs to it.
        if checkpoints is not None and run.epoch_step < steps:
            checkpoints.after_step(run)
    if run.epoch_step == 0:
        got = f"no batch in epoch {run.epoch}"
        raise _checks.refuse("generator", got, f"{steps}, in every epoch", "give one that can be gone through again")
    run.guard.read(run.step, run.epoch)


def _end_of_epoch(run: Run) -> None:
    """The epoch's record, what follows from it, and the place before the next one."""
    run.engine.share_buffers(run.model, run.candidate)
    means = run.engine.figures_of_all(run.sums.means())
    record = {
        "epoch": run.epoch,
        "loss": means.pop("loss"),
        "train_accuracy": means.pop("train_accuracy"),
        **means,
        "lr": float(run.rate),
        "seconds": time.perf_counter() - run.epoch_started,
    }
    run.schedule.after_epoch(record["loss"])
    for sentence in run.objective.epoch_warnings(record):
        if not run.warned:
            warnings.warn(f"epoch {run.epoch}: {sentence}", stacklevel=3)
        run.warned = True
    for extension in run.extensions:
        extension.after_epoch(run, record)
    run.stopping = run.engine.any_of_all(run.stopping)
    run.history.records.append(record)
    run.epoch, run.epoch_step, run.epoch_started, run.sums = run.epoch + 1, 0, time.perf_counter(), Sums()


@contextmanager
def _surrounded(run: Run, checkpoints: Checkpoints | None) -> Iterator[None]:
    """Start every extension, and finish all that were started, whatever happens between."""
    started: list[Extension] = []
    try:
        if checkpoints is not None:
            checkpoints.restore(run)
        for extension in run.extensions:
            extension.on_start(run)
            started.append(extension)
        if checkpoints is not None:
            checkpoints.begin(run)
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
    checkpoints: Checkpoints | None = None,
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
    :param checkpoints: Where the run is kept, and taken up from when it was interrupted; ``None`` writes nothing.
    :return: One record an epoch.
    :raises NonFiniteLossError: With the last finite weights put back.
    :raises TrainingInterrupted: By SIGINT or SIGTERM, where there are checkpoints, after one was written.
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
        extensions=extensions,
    )
    history.meta.update(
        objective=objective.name,
        settings=objective.config(),
        seed=seed,
        epochs=epochs,
        steps_per_epoch=batches.steps_per_epoch,
        device=str(engine.device),
        precision=engine.precision,
        tf32=engine.device.type == "cuda" and tensor_float32() and not objective.full_float32,
        processes=engine.world_size,
        threads=torch.get_num_threads(),
        deterministic=deterministic,
        versions=versions(),
    )
    wrapped, wrapped_optimizer = engine.setup(model, optimizer)
    try:
        with (
            modes_kept(model),
            torch.enable_grad(),
            reproducible(seed, rank=engine.rank, deterministic=deterministic),
            checkpoints or nullcontext(),
            _surrounded(run, checkpoints),
        ):
            run.guard = FiniteGuard(model, optimizer, first_step=run.step)
            while run.epoch < epochs and not run.stopping:
                model.train()
                _epoch(run, wrapped, wrapped_optimizer, grad_clip, checkpoints)
                _end_of_epoch(run)
                if checkpoints is not None:
                    checkpoints.after_epoch(run)
            run.epoch = len(history) - 1
            history.meta["weights"] = {"selection": "last", "epoch": run.epoch}
            for extension in extensions:
                extension.on_complete(run)
    finally:
        schedule.restore()
        for module in auxiliary_modules(model):
            module.start_step(None)  # else it keeps the last step's tensors and random source
    return history
