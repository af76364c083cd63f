"""Train, save, evaluate and draw one network: what ``quickstart`` does three times and ``compare`` as often as asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import KEPT

if TYPE_CHECKING:
    from torch import nn

    from art_saliency.evaluation.summary import Summary
    from art_saliency.trainers.arms import Arm, Budget

__all__ = ["run_arm"]

_PICTURES = 8


def run_arm(arm: Arm, budget: Budget, out: Path, *, resume: str | None = None) -> dict[str, Any]:
    """
    Train one network and learn how robust it is. Writes ``out/ARM``: weights, the run's page, a figure.

    :param resume: As in ``fit``, from what is kept in ``out/ARM`` meanwhile; ``None`` keeps nothing.
    :return: Its figures, JSON-able.
    """
    from art_saliency.evaluation.summary import summarise
    from art_saliency.trainers.arms import cost_of, train_arm
    from art_saliency.trainers.runs import save
    from art_saliency.training.checkpoint import clear

    data, kept = budget.data, out / arm.folder / KEPT
    # Not after every epoch: the seconds of an epoch stand in the table.
    keeping: dict[str, Any] = (
        {"checkpoint_dir": kept, "checkpoint_every": "60 seconds", "resume": resume} if resume else {}
    )
    trained = train_arm(arm, budget, **keeping)
    classifier = trained.trainer.get_classifier()
    folder = save(
        out / arm.folder,
        classifier,
        network=trained.network,
        method=arm.method,
        settings=trained.trainer.config(),
        data={**budget.spec, "fingerprint": data.fingerprint()},
        history=trained.trainer.history,
        recipe=trained.recipe.to_json(),
        force=True,  # the folder above it was vacant
    )
    x, y = data.x_test[: budget.images], data.y_test[: budget.images]
    summary = summarise(classifier.model, x, y, threat=budget.threat, seed=budget.seed, progress=not budget.quiet)
    _draw(arm, budget, classifier.model, folder, summary)
    clear(kept)
    return {**summary.to_json(), **cost_of(trained, budget)}


def _draw(arm: Arm, budget: Budget, model: nn.Module, folder: Path, summary: Summary) -> None:
    """The first test images and their adversarial versions, with what the network looks at."""
    from art_saliency.attacks import pgd
    from art_saliency.data import to_unit
    from art_saliency.evaluation.figures import saliency_panel

    data, threat, shown = budget.data, budget.threat, min(_PICTURES, budget.images)
    x, y = to_unit(data.x_test[:shown]).to(budget.device), data.y_test[:shown].to(budget.device)
    # AutoAttack leaves an image alone that it could not turn; a picture is to show a perturbation in every column.
    saliency_panel(
        model,
        x,
        pgd(model, x, y, threat=threat, max_iter=20),
        y,
        folder / "saliency.png",
        title=f"{arm.name}: {data.name} under PGD-20, {threat.norm} eps {threat.eps:g}; accuracy: clean {summary.clean:.1%}, "
        f"AutoAttack {summary.autoattack.robust_accuracy:.1%}",
    )
