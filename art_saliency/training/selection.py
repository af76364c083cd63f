"""Which epoch's weights stay, by the robust accuracy on held-out images; when to stop early; and label smoothing of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from art_saliency import _checks
from art_saliency.methods.base import Batch
from art_saliency.training.extensions import Extension

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["SELECTIONS", "LabelSmoothing", "Selection", "smoothed_labels"]

SELECTIONS = ("last", "best")
"""Whose weights stay in the network: the last epoch's, or those of the epoch that was most robust on the validation images."""


class Selection(Extension):
    """
    Keeps the weights of the best and of the last epoch, and stops when there is nothing to hope for.

    An epoch is better when its ``validation_robust_accuracy`` (PGD) is higher; among equals, when its clean accuracy is; of full
    equals the earlier counts. Without a threat model the clean accuracy alone decides. Only measured epochs take part, so this
    stands behind :class:`~art_saliency.training.extensions.Validation`. Where an average of the weights is kept, it is what is
    measured and kept. The robust accuracy of few images is uncertain, and that of the best of many epochs flatters: the accuracy
    to report is measured on other images.

    :param which: One of :data:`SELECTIONS`.
    :param patience: Measurements without a better one after which training ends; ``None`` never ends it.
    """

    def __init__(self, which: str = "last", *, patience: int | None = None) -> None:
        self.which = _checks.one_of("selection", which, SELECTIONS)
        self.patience = None if patience is None else _checks.whole("patience", patience, least=1)
        self.weights: dict[str, dict[str, Tensor]] = {}
        """By "best" and "last": copies on the CPU, the last ones once the run is complete."""
        self.best_epoch = -1
        self._score: tuple[float, float] | None = None
        self._waited, self._averaged = 0, False

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Compare a measured epoch with the best one."""
        if "validation_accuracy" not in record:
            return
        clean = record["validation_accuracy"]
        score = (record.get("validation_robust_accuracy", clean), clean)
        if self._score is None or score > self._score:
            self._score, self.best_epoch, self._waited = score, run.epoch, 0
            self.weights["best"], self._averaged = _copy(run), run.candidate is not run.model
            return
        self._waited += 1
        if self.patience is not None and self._waited >= self.patience:
            run.stopping = True

    def on_complete(self, run: Run) -> None:
        """Put the selected weights into the network, and say in the history which they are."""
        page = run.history.meta["weights"]
        self.weights["last"] = _copy(run)
        stopped = self.patience is not None and self._waited >= self.patience
        stopped = stopped and page["epoch"] + 1 < run.epochs
        page.update(last_epoch=page["epoch"], best_epoch=self.best_epoch, stopped_early=stopped)
        if self.which == "best" and "best" in self.weights:
            run.model.load_state_dict(self.weights["best"])
            page.update(selection="best", epoch=self.best_epoch)
            if not self._averaged:  # the best epoch was before the first averaged one
                page.pop("average", None)

    def state_dict(self) -> dict[str, Any]:
        """:return: The best epoch so far, its accuracies and weights, and how many measurements ago it was."""
        robust, clean = self._score or (-1.0, -1.0)
        return {
            "best_epoch": self.best_epoch,
            "robust": robust,
            "clean": clean,
            "waited": self._waited,
            "averaged": self._averaged,
            "best": dict(self.weights.get("best", {})),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.best_epoch, self._waited = int(state["best_epoch"]), int(state["waited"])
        self._averaged = bool(state["averaged"])
        self._score = None if self.best_epoch < 0 else (float(state["robust"]), float(state["clean"]))
        self.weights = {"best": dict(state["best"])} if state["best"] else {}


def _copy(run: Run) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in run.candidate.state_dict().items()
    }


def smoothed_labels(y: Tensor, classes: int, smoothing: float) -> Tensor:
    """
    (1 - a) y + a / K (Szegedy et al. 2016).

    :param y: (N,) indices, or (N, K) rows. :param classes: K. :param smoothing: a, 0 to below 1.
    :return: (N, K) float32.
    """
    rows = F.one_hot(y, classes).float() if y.ndim == 1 else y
    return (1 - smoothing) * rows + smoothing / classes


class LabelSmoothing(Extension):
    """
    Smooths the labels of every batch, for objectives that take soft ones.

    The attack meets the same labels as the loss; a method's own ``label_smoothing`` smooths its cross-entropy alone.

    :param smoothing: a, 0 to below 1. :param classes: K.
    """

    def __init__(self, smoothing: float, classes: int) -> None:
        self.smoothing = _checks.real("label_smoothing", smoothing, least=0, below=1)
        self.classes = _checks.whole("classes", classes, least=1)

    def on_start(self, run: Run) -> None:
        """Write it down."""
        run.history.meta["label_smoothing"] = self.smoothing

    def before_step(self, run: Run, batch: Batch) -> None:
        """Put soft labels in place of the batch's own."""
        with torch.no_grad():
            batch.y = smoothed_labels(batch.y, self.classes, self.smoothing)
