"""Arms of a comparison: networks that are trained alike but for the method, its parameters and what differs by name."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.architectures import ACTIVATIONS
from art_saliency.data import DataSet, to_unit
from art_saliency.errors import NoEffectWarning
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.base import Batch
from art_saliency.networks import build_network
from art_saliency.randomness import global_generators_kept
from art_saliency.threat import ThreatModel
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.methods import TRAINERS
from art_saliency.trainers.options import RunOptions
from art_saliency.trainers.runs import make_classifier
from art_saliency.trainers.surrogates import Recipe, describe_optimizer
from art_saliency.training.cost import forward_backward_passes
from art_saliency.words import read_settings

__all__ = [
    "Arm",
    "Budget",
    "Trained",
    "cost_of",
    "going_on",
    "one_step",
    "parse_arm",
    "parse_arms",
    "train_arm",
    "try_arms",
]

_OPTIONS = ("ema", "swa_from", "awp", "label_smoothing", "grad_clip", "precision", "channels_last")


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
    augment: str | None = None

    def to_json(self) -> dict[str, Any]:
        """:return: All that figures depend on, beside the arm."""
        names = ("network", "epochs", "batch_size", "lr", "images", "seed", "augment")
        same = {name: getattr(self, name) for name in names}
        return {"data": self.data.fingerprint(), "norm": self.threat.norm, "eps": self.threat.eps, **same}


@dataclass(frozen=True)
class Arm:
    """
    One arm of a comparison: ``METHOD``, or ``fsr+BASE`` for FSR on top of one, then ``:NAME=VALUE`` for each parameter of the method
    or option of the run (``ema``, ``awp``, ...) that differs from its default, and ``@ACTIVATION`` for another activation.

    :ivar name: As it was written. :ivar method: Without the activation. :ivar trainer: The trainer's name.
    :ivar parameters: Of the trainer. :ivar network: What differs from the common network. :ivar options: Of the run.
    """

    name: str
    method: str
    trainer: str
    parameters: dict[str, Any]
    network: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Of the arm, in that of a comparison: its name, in which a fraction's bar would make a folder within a folder."""
        return self.name.replace("/", "%2F")


@dataclass(frozen=True)
class Trained:
    """
    What training an arm left.

    :ivar trainer: With its history and its classifier. :ivar recipe: How it was trained. :ivar network: Arguments of ``build_network``.
    """

    trainer: ObjectiveTrainer
    recipe: Recipe
    network: dict[str, Any]


def parse_arms(option: str, text: str, **words: Any) -> list[Arm]:
    """
    Read several arms.

    :param option: That named them. :param text: With commas. :param words: For :func:`parse_arm`. :return: The arms, each named once.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise _checks.refuse(option, f"{name!r} twice", "every arm once")
    return [parse_arm(name, option=option, **words) for name in names]


def parse_arm(
    text: str,
    *,
    option: str = "--arms",
    options: tuple[str, ...] = _OPTIONS,
    common: tuple[str, ...] = ("eps", "norm"),
) -> Arm:
    """
    Read one arm.

    :param option: That named it. :param options: Which options of the run may be named; all others are refused.
    :param common: What all arms get alike, by options of their own; refused here. :return: The arm of that name.
    """
    rest, at, activation = text.partition("@")
    method, *pairs = rest.split(":")
    settings = read_settings(option, pairs, common=common)
    network = {"activation": _checks.one_of("activation", activation, ACTIVATIONS)} if at else {}
    layer, plus, base = method.partition("+")
    trainer = _checks.one_of("arm", layer, ["fsr"]) if plus else _checks.one_of("arm", method, TRAINERS)
    fixed = {"base": _checks.one_of("base", base, OBJECTIVES)} if plus else {}
    own = TRAINERS[trainer].all_parameter_names({**settings, **fixed})
    chosen = {name: value for name, value in settings.items() if name in options and name not in own}
    parameters = {**fixed, **{name: value for name, value in settings.items() if name not in chosen}}
    TRAINERS[trainer].check_parameters({"eps": 0.1, **parameters})
    RunOptions.checked(option, dict(chosen))
    return Arm(text, method, trainer, parameters, network, chosen)


@contextmanager
def going_on() -> Iterator[None]:
    """Around ``fit``: no warning that nothing was trained, as ``--resume`` asks for whatever is there, a finished training included."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is over: its weights were taken", NoEffectWarning)
        yield


def train_arm(
    arm: Arm,
    budget: Budget,
    *,
    prepare: Callable[[nn.Module, Tensor], object] | None = None,
    checkpoint_dir: Path | None = None,
    **keeping: Any,
) -> Trained:
    """
    Train one network.

    :param prepare: (network, images (2, C, H, W) in [0, 1]): changes the fresh network before there is an optimizer, as a control does.
    :param checkpoint_dir: Where the training is kept, and gone on with where it was left; one that came to its end is read back.
    :param keeping: How: ``checkpoint_every`` and ``resume`` of ``fit``.
    :return: Trainer and recipe.
    """
    data, threat = budget.data, budget.threat
    network = {**budget.network, **arm.network}
    torch.manual_seed(budget.seed)
    model = build_network(**network)
    if prepare is not None:
        prepare(model, to_unit(data.x_train[:2]))
    classifier = make_classifier(
        model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        optimizer=torch.optim.Adam(model.parameters(), lr=budget.lr),
        device=budget.device,
    )
    given = {**TRAINERS[arm.trainer].defaults_for(model), **arm.parameters, "eps": threat.eps, "norm": threat.norm}
    recipe = Recipe(
        parameters=given,
        optimizer=describe_optimizer(classifier.optimizer),
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        seed=budget.seed,
        augment=budget.augment,
        **arm.options,
    )
    trainer = TRAINERS[arm.trainer](classifier, **given)
    with going_on():
        trainer.fit(
            data.x_train,
            data.y_train,
            verbose=not budget.quiet,
            checkpoint_dir=checkpoint_dir,
            **{**recipe.fit_options(), **keeping},
        )
    return Trained(trainer, recipe, network)


def try_arms(arms: Sequence[Arm], budget: Budget) -> None:
    """
    Let every arm take a step of two images, so that what its network, method and options cannot do together is refused before any arm
    is trained.
    """
    for arm in arms:
        one_step(arm, budget)


def one_step(arm: Arm, budget: Budget, prepare: Callable[[nn.Module, Tensor], object] | None = None) -> Trained:
    """:return: An arm that has taken a step of two images. :param prepare: As for :func:`train_arm`."""
    data = budget.data
    chosen = (
        data.x_train[:256].flatten(1).amax(1).topk(min(2, len(data.x_train))).indices
    )  # black ones would be refused
    few = replace(data, x_train=data.x_train[chosen], y_train=data.y_train[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is no training
        return train_arm(arm, replace(budget, data=few, epochs=1, quiet=True), prepare=prepare)


def cost_of(trained: Trained, budget: Budget) -> dict[str, float]:
    """:return: Median seconds an epoch, and forward-backward passes a step, counted: passes of the bare network, without any layer put in."""
    data, device, trainer = budget.data, budget.device, trained.trainer
    with global_generators_kept():
        plain = build_network(**trained.network).to(device)
    batch = Batch(to_unit(data.x_train[:128]).to(device), data.y_train[:128].to(device))
    return {
        "seconds_per_epoch": statistics.median(trainer.history.column("seconds")),
        "passes_per_step": forward_backward_passes(
            trainer.get_classifier().model, trainer.objective, batch, plain=plain
        ),
    }
