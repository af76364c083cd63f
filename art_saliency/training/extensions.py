"""What can be hung on the loop: progress, validation, weight averages, checkpoints, all through a few hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.attacks import pgd
from art_saliency.data import to_unit
from art_saliency.evaluation.accuracy import accuracy, pgd_accuracy
from art_saliency.methods.base import Batch, LossTerms
from art_saliency.modes import evaluating
from art_saliency.threat import ThreatModel
from art_saliency.training.batches import ImageView, StreamedBatches

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["Extension", "OverfittingWatch", "PlateauWatch", "SameBatches", "Validation"]

_PIECE = 1 << 22  # bytes


class Extension:
    """
    Something that happens around training steps. Every hook does nothing by default.

    Extensions run in the order in which they are given. What an extension must remember over an interruption, it returns from
    :meth:`state_dict`.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def before_step(self, run: Run, batch: Batch) -> None:
        """Before each step. What it changes in the batch, the objective sees."""

    def around_gradient(
        self, run: Run, batch: Batch, loss_terms: Callable[[], LossTerms]
    ) -> AbstractContextManager[None]:
        """
        Around the passes of a step whose gradient the optimizer takes; weights that it changes come back on exit.

        :param loss_terms: Computes the step's loss at the weights as they are now, without gradients into ``param.grad``.
        """
        return nullcontext()

    def after_step(self, run: Run) -> None:
        """After each optimizer step. Must not wait for the device."""

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """After each epoch; what is written into `record` joins the history."""

    def on_complete(self, run: Run) -> None:
        """After the last epoch of a run that no error stopped: what is to stay in the network is put there."""

    def on_finish(self, run: Run) -> None:
        """After the last step, also when training was stopped by an error."""

    def state_dict(self) -> dict[str, Any]:
        """:return: Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. Called after :meth:`on_start`."""


class SameBatches(Extension):
    """
    That several processes, each of which trains on its own rows of a batch, have loaded the same one: an epoch's first is compared.

    :param batches: What they are loaded by.
    """

    def __init__(self, batches: StreamedBatches) -> None:
        self.batches, self.epoch = batches, -1

    def before_step(self, run: Run, batch: Batch) -> None:
        """:raises InputError: In every process, where they have not."""
        if self.epoch == run.epoch:
            return
        self.epoch, number = run.epoch, self.batches.labels_sum
        greatest, least = run.engine.greatest_of_all([number, -number])
        if greatest != -least:
            raise _checks.refuse(
                "generator",
                f"other batches in one of {run.engine.world_size} processes than in another",
                "the same in all",
                "seed what its order is drawn from: give the loader or its sampler a seeded torch generator",
            )


class Validation(Extension):
    """
    Clean and PGD accuracy on held-out images: ``validation_accuracy`` and ``validation_robust_accuracy`` in the history.

    What is measured is what would stay: the averaged weights where an average is kept.

    :param x: (N, C, H, W) in [0, 1] or uint8, or a view of such images. :param y: (N,) int64.
    :param threat: What PGD may do; ``None`` measures clean accuracy only.
    :param every: Epochs between two measurements; the last epoch is always measured.
    :param max_iter: PGD steps.
    """

    def __init__(
        self,
        x: Tensor | ImageView,
        y: Tensor,
        *,
        threat: ThreatModel | None,
        every: int = 1,
        max_iter: int = 10,
        batch_size: int = 256,
    ) -> None:
        self.x, self.y, self.threat = x, y, threat
        self.every, self.max_iter, self.batch_size = every, max_iter, batch_size

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Measure and write down."""
        if (run.epoch + 1) % self.every and run.epoch + 1 < run.epochs:
            return
        clean = robust = 0.0  # images that are classified right
        for number, (x, y) in enumerate(self._pieces()):
            clean += len(y) * accuracy(run.candidate, x, y, batch_size=self.batch_size)
            if self.threat is not None:
                robust += len(y) * pgd_accuracy(
                    run.candidate,
                    x,
                    y,
                    threat=self.threat,
                    max_iter=self.max_iter,
                    batch_size=self.batch_size,
                    seed=(run.random.seed + number) % 2**63,
                )
        record["validation_accuracy"] = round(clean) / len(self.y)
        if self.threat is not None:
            record["validation_robust_accuracy"] = round(robust) / len(self.y)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images in [0, 1], some 4 MB at a time: a share of a set in a file may be larger than memory."""
        rows = self.batch_size * max(1, _PIECE // (self.batch_size * 4 * self.x.shape[1:].numel()))
        for start in range(0, len(self.y), rows):
            yield to_unit(self.x[start : start + rows]), self.y[start : start + rows]


def _classes(y: Tensor) -> Tensor:
    """:return: (N,) of labels that are classes or shares of them (N, K)."""
    return y if y.ndim == 1 else y.argmax(1)


class _SaysOnce(Extension):
    """What warns once a run, a resumed one included."""

    def __init__(self) -> None:
        self.warned = False

    def say(self, sentence: str) -> None:
        """Warn. (The place named is the loop's.)"""
        self.warned = True
        warnings.warn(sentence, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """:return: Whether it was said."""
        return {"warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.warned = bool(state["warned"])


class OverfittingWatch(_SaysOnce):
    """
    Catastrophic overfitting (Wong et al. 2020): a network that single-step training made robust to single steps only.

    Once an epoch the last training batch is attacked by PGD; ``train_pgd_accuracy`` joins the history, and a warning is given
    when it falls far below the accuracy on the method's own examples.

    :param threat: What PGD may do.
    :param share: PGD accuracy below this share of the accuracy on the method's own examples is called catastrophic: honest
        single-step training loses up to a half, a collapse nearly all.
    """

    def __init__(self, threat: ThreatModel, *, share: float = 1 / 3, max_iter: int = 10) -> None:
        super().__init__()
        self.threat, self.share, self.max_iter = threat, share, max_iter

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Measure, write down, and warn once."""
        if run.batch is None or run.logits is None:
            return
        x, y = run.batch.x, _classes(run.batch.y)
        threat = self.threat.scaled(run.objective.radius(run.batch.progress))
        x_adv = pgd(run.model, x, y, threat=threat, max_iter=self.max_iter)
        with evaluating(run.model), torch.no_grad():
            against_pgd = float((run.model(x_adv).argmax(1) == y).float().mean())
        on_own_examples = float((run.logits.argmax(1) == y).float().mean())
        record["train_pgd_accuracy"] = against_pgd
        if against_pgd < self.share * on_own_examples and on_own_examples > 0.3 and not self.warned:
            self.say(
                f"epoch {run.epoch}: {on_own_examples:.0%} of a training batch is classified right on the method's single-step "
                f"examples but {against_pgd:.0%} under PGD-{self.max_iter}: catastrophic overfitting. Lower eps or the learning "
                f"rate, shorten training, or use an iterative method"
            )


class PlateauWatch(_SaysOnce):
    """
    A network that takes every image for one class: adversarial training that meets the whole radius too early may never leave the
    plateau on which it began.

    After an epoch the logits of its last batch of enough images are looked at, and a warning is given once, when the radius has risen
    (:meth:`~art_saliency.methods.base.Objective.radius`) and a third of the run and `steps` steps are over.

    :param steps: Fewer are too few to leave any plateau. :param images: A smaller batch may well be of one class.
    """

    def __init__(self, *, steps: int = 100, images: int = 16) -> None:
        super().__init__()
        self.steps, self.images = steps, images
        self._seen: tuple[Tensor, Tensor] | None = None

    def after_step(self, run: Run) -> None:
        """Keep the last batch that is large enough: an epoch's last one may be a handful of images."""
        if run.batch is not None and run.logits is not None and len(run.batch.y) >= self.images:
            self._seen = run.batch.y, run.logits

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Look, and warn once."""
        seen, self._seen = self._seen, None
        if self.warned or run.batch is None or seen is None:
            return
        y = _classes(seen[0])
        if run.step < self.steps or run.batch.progress < 1 / 3 or run.objective.radius(run.batch.progress) < 1:
            return
        if bool((y == y[0]).all()):
            return
        taken_for = seen[1].argmax(1)
        if not bool((taken_for == taken_for[0]).all()):
            return
        longer = (
            f"let the radius rise over a larger share of the run (eps_warmup_share, now {run.objective.eps_warmup_share:g}), "
            if "eps_warmup_share" in run.objective.parameter_names()
            else ""
        )
        self.say(
            f"epoch {run.epoch}: all {len(y)} images of a training batch are taken for class {int(taken_for[0])}: the network has not "
            f"left the plateau on which training began. To cure it, {longer}lower the learning rate, or train longer"
        )
