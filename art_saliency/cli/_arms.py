"""Train, save, evaluate and draw one network: what ``quickstart`` does three times and ``compare`` as often as asked."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from art_saliency.data import DataSet
    from art_saliency.threat import ThreatModel

__all__ = ["Arm", "Budget", "finish", "keep", "parse_arm", "run_arm"]

_PICTURES = 8


@dataclass(frozen=True)
class Budget:
    """
    What every arm of a comparison gets alike.

    :ivar network: The arguments of ``build_network``. :ivar epochs: Passes over the training images. :ivar images: Test images.
    """

    data: DataSet
    spec: dict[str, Any]
    network: dict[str, Any]
    threat: ThreatModel
    epochs: int
    batch_size: int
    lr: float
    images: int
    seed: int
    device: torch.device
    quiet: bool


@dataclass(frozen=True)
class Arm:
    """
    One arm of a comparison: ``METHOD``, or ``fsr+BASE`` for FSR on top of one, then ``:NAME=VALUE`` for each parameter that differs
    from the method's default, and ``@ACTIVATION`` for another activation.

    :ivar name: As it was written. :ivar method: Without the activation. :ivar trainer: The trainer's name.
    :ivar parameters: Of the trainer. :ivar network: What differs from the common network.
    """

    name: str
    method: str
    trainer: str
    parameters: dict[str, Any]
    network: dict[str, Any]


def parse_arm(text: str) -> Arm:
    """:return: The arm of that name."""
    from art_saliency import _checks
    from art_saliency.architectures import ACTIVATIONS
    from art_saliency.cli._common import read_settings
    from art_saliency.methods import OBJECTIVES
    from art_saliency.trainers.methods import TRAINERS

    rest, at, activation = text.partition("@")
    method, *pairs = rest.split(":")
    network = {"activation": _checks.one_of("activation", activation, ACTIVATIONS)} if at else {}
    layer, plus, base = method.partition("+")
    if plus:
        parameters = {"base": _checks.one_of("base", base, OBJECTIVES), **read_settings("--arms", pairs)}
        arm = Arm(text, method, _checks.one_of("arm", layer, ["fsr"]), parameters, network)
    else:
        arm = Arm(text, method, _checks.one_of("arm", method, TRAINERS), read_settings("--arms", pairs), network)
    TRAINERS[arm.trainer].check_parameters({"eps": 0.1, **arm.parameters})
    return arm


def run_arm(arm: Arm, budget: Budget, out: Path) -> dict[str, Any]:
    """
    Train one network and learn how robust it is. Writes ``out/ARM``: weights, the run's page, a figure.

    :return: Its figures, JSON-able.
    """
    import torch

    from art_saliency.attacks import pgd
    from art_saliency.data import to_unit
    from art_saliency.evaluation.figures import saliency_panel
    from art_saliency.evaluation.summary import summarise
    from art_saliency.methods.base import Batch
    from art_saliency.networks import build_network
    from art_saliency.trainers.methods import TRAINERS
    from art_saliency.trainers.runs import make_classifier, save
    from art_saliency.trainers.surrogates import Recipe, describe_optimizer
    from art_saliency.training.cost import forward_backward_passes

    data, device, threat = budget.data, budget.device, budget.threat
    network = {**budget.network, **arm.network}
    torch.manual_seed(budget.seed)
    model = build_network(**network)
    classifier = make_classifier(
        model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        optimizer=torch.optim.Adam(model.parameters(), lr=budget.lr),
        device=device,
    )
    given = {**TRAINERS[arm.trainer].defaults_for(model), **arm.parameters, "eps": threat.eps, "norm": threat.norm}
    recipe = Recipe(
        parameters=given,
        optimizer=describe_optimizer(classifier.optimizer),
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        seed=budget.seed,
    )
    trainer = TRAINERS[arm.trainer](classifier, **given)
    trainer.fit(
        data.x_train,
        data.y_train,
        batch_size=budget.batch_size,
        nb_epochs=budget.epochs,
        scheduler=recipe.scheduler,
        seed=budget.seed,
        verbose=not budget.quiet,
    )
    folder = save(
        out / arm.name,
        classifier,
        network=network,
        method=arm.method,
        settings=trainer.config(),
        data={**budget.spec, "fingerprint": data.fingerprint()},
        history=trainer.history,
        recipe=recipe.to_json(),
        force=True,  # the folder above it was vacant
    )
    x, y = data.x_test[: budget.images], data.y_test[: budget.images]
    summary = summarise(classifier.model, x, y, threat=threat, seed=budget.seed, progress=not budget.quiet)
    shown = slice(0, _PICTURES)
    # AutoAttack leaves an image alone that it could not turn; a picture is to show a perturbation in every column.
    x_adv = pgd(classifier.model, to_unit(x[shown]).to(device), y[shown].to(device), threat=threat, max_iter=20)
    saliency_panel(
        classifier.model,
        to_unit(x[shown]).to(device),
        x_adv,
        y[shown].to(device),
        folder / "saliency.png",
        title=f"{arm.name}: {data.name} under PGD-20, {threat.norm} eps {threat.eps:g}; accuracy: clean {summary.clean:.1%}, "
        f"AutoAttack {summary.autoattack.robust_accuracy:.1%}",
    )
    batch = Batch(to_unit(data.x_train[:128]).to(device), data.y_train[:128].to(device))
    return {
        **summary.to_json(),
        "seconds_per_epoch": statistics.median(trainer.history.column("seconds")),
        "passes_per_step": forward_backward_passes(classifier.model, trainer.objective, batch),
    }


def keep(results: Mapping[str, dict[str, Any]], out: Path) -> None:
    """Write what is known so far as ``results.json``, so that an interrupted comparison leaves its numbers."""
    from art_saliency.files import write_file

    write_file(out / "results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))


def finish(results: Mapping[str, dict[str, Any]], budget: Budget, out: Path) -> None:
    """Print the table of all arms, and write it as ``results.md`` and ``results.json``."""
    from art_saliency.evaluation.table import markdown_table, percent

    rows = [
        (
            arm,
            percent(result["clean"]["accuracy"]),
            percent(result["pgd20"]["accuracy"]),
            percent(result["autoattack"]["accuracy"]),
            "{:.1f}-{:.1f}".format(*(100 * end for end in result["autoattack"]["interval_95"])),
            f"{result['seconds_per_epoch']:.2f}",
            f"{result['passes_per_step']:.1f}",
        )
        for arm, result in results.items()
    ]
    header = ("network", "clean %", "PGD-20 %", "AutoAttack %", "95 % interval", "s / epoch", "passes / step")
    table = markdown_table(header, rows)
    details = next(iter(results.values()))["autoattack_details"]
    which = "all" if budget.images == len(budget.data.x_test) else "the first"
    note = (
        f"Accuracy on {which} {budget.images} test images of {budget.data.name}, {budget.threat.norm} eps "
        f"{budget.threat.eps:g}, {budget.epochs} epochs, seed {budget.seed}. AutoAttack: version standard, by "
        f"{details['backend']} {details['backend_version']}. One pass is a forward-backward pass of standard training."
    )
    (out / "results.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    keep(results, out)
    print(f"{table}\n\n{note}")
