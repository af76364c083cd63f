"""What a run leaves behind: a history that can be read, written as JSON, and watched while it grows."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from art_saliency.training.extensions import Extension

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["History", "Progress", "Sums", "versions"]


def versions() -> dict[str, str]:
    """:return: The versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in (
        "art-saliency",
        "adversarial-robustness-toolbox",
        "torchvision",
        "numpy",
        "pyautoattack",
        "robustbench",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Sums:
    """Figures of an epoch, weighted by the images of each step, kept on the device until the epoch is over."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._weight: dict[str, int] = {}

    def add(self, names: tuple[str, ...], values: Tensor, rows: int) -> None:
        """:param names: Of the figures. :param values: (len(names),), each the mean over the rows. :param rows: Images of the step."""
        weighted = values.double() * rows if values.device.type != "mps" else values * rows
        self._sums[names] = self._sums[names] + weighted if names in self._sums else weighted
        for name in names:
            self._weight[name] = self._weight.get(name, 0) + rows

    def means(self) -> dict[str, float]:
        """:return: The means over the images. Waits for the device."""
        totals: dict[str, float] = {}
        for names, sums in self._sums.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
        return {name: total / self._weight[name] for name, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """:return: Sums and weights."""
        return {"sums": [[list(names), sums] for names, sums in self._sums.items()], "weight": dict(self._weight)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._sums = {tuple(names): sums.to(device) for names, sums in state["sums"]}
        self._weight = dict(state["weight"])


class History(Sequence[dict[str, Any]]):
    """
    One record an epoch, oldest first, and what the run was.

    ``history[-1]["loss"]``, ``history.column("train_accuracy")``, ``history.meta["seed"]``.

    :ivar meta: Objective and its settings, seed, versions, device, threads, steps an epoch.
    :ivar records: The epochs: ``epoch, loss, train_accuracy, lr, seconds``, every term of the loss, and what extensions measured.
    """

    def __init__(self, meta: dict[str, Any] | None = None, records: list[dict[str, Any]] | None = None) -> None:
        self.meta: dict[str, Any] = meta or {}
        self.records: list[dict[str, Any]] = records or []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: Any) -> Any:
        return self.records[item]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __repr__(self) -> str:
        last = (
            ", ".join(f"{k} {v:.4g}" for k, v in self.records[-1].items() if isinstance(v, float))
            if self.records
            else "empty"
        )
        return f"History({len(self)} epochs; {last})"

    def column(self, name: str) -> list[Any]:
        """:return: One figure over the epochs; ``None`` where an epoch has none."""
        return [record.get(name) for record in self.records]

    def to_json(self) -> str:
        """:return: ``{"meta": ..., "epochs": [...]}``."""
        return json.dumps({"meta": self.meta, "epochs": self.records}, indent=1)


class Progress(Extension):
    """
    A bar on the terminal: epochs, loss, training and validation accuracy. It waits for the device once an epoch only.

    :param label: What stands before the bar.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        """Open the bar."""
        self._bar = tqdm(
            total=run.epochs * run.batches.steps_per_epoch,
            initial=run.step,
            desc=self.label,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            leave=True,
        )

    def after_step(self, run: Run) -> None:
        """Move the bar."""
        self._bar.update(1)

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Show the epoch's figures."""
        shown = {"epoch": f"{run.epoch + 1}/{run.epochs}", "loss": f"{record['loss']:.3f}"}
        names = {"acc": "train_accuracy", "val": "validation_accuracy", "val-robust": "validation_robust_accuracy"}
        shown.update({short: f"{record[name]:.1%}" for short, name in names.items() if name in record})
        self._bar.set_postfix(shown)

    def on_finish(self, run: Run) -> None:
        """Close the bar."""
        self._bar.close()
