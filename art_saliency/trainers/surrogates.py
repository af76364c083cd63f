"""Surrogates for transferred attacks: copies of a run's network, trained as it was, by other methods or from another seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack
from art_saliency.augmentation import augmentation_by_name
from art_saliency.data import DataSet
from art_saliency.errors import CheckpointError
from art_saliency.evaluation.transfer import surrogates_for
from art_saliency.files import read_tensors
from art_saliency.methods import OBJECTIVES
from art_saliency.networks import build_network
from art_saliency.randomness import global_generators_kept
from art_saliency.threat import ThreatModel
from art_saliency.trainers.identity import FREE_OPTIONS
from art_saliency.trainers.methods import TRAINERS
from art_saliency.trainers.network import optimizer_settings
from art_saliency.trainers.options import RunOptions
from art_saliency.trainers.runs import make_classifier

__all__ = ["RUN_OPTIONS", "Recipe", "describe_optimizer", "load_weights", "train_surrogates", "variants_of_run"]

RUN_OPTIONS = tuple(f.name for f in fields(RunOptions) if f.name not in (*FREE_OPTIONS, "seed", "augment"))
"""Of ``fit``'s, those that what was learned depends on, and that a recipe names as ``fit`` does."""

_NOT_COPIED = ("maps_file",)  # parameters that name a file of the run itself, which a copy must not share


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """:return: One of torch's optimizers as JSON: its class's name, and the settings that the class takes."""
    plain = (bool, int, float, str, list, tuple, type(None))
    settings = {key: value for key, value in optimizer_settings(optimizer).items() if isinstance(value, plain)}
    return {"name": type(optimizer).__name__, **settings}


@dataclass(frozen=True)
class Recipe:
    """
    How a run was trained, JSON-able: all that ``run.json`` does not say elsewhere and a second run of the kind needs.

    :ivar parameters: The trainer's keywords. :ivar optimizer: What :func:`describe_optimizer` says.
    :ivar epochs: Passes. :ivar batch_size: Images a step. :ivar seed: Of everything random, the split included.
    :ivar scheduler: A name or ``None``. :ivar augment: A name or ``None``. :ivar grad_clip: The greatest norm, or ``None``.
    :ivar precision: As in ``fit``. :ivar deterministic: As in ``fit``. :ivar channels_last: As in ``fit``.
    :ivar validation_split: The share of the training images that was held out; 0 is none.
    :ivar weights: A file of weights that training began from, or ``None``.
    :ivar selection: As in ``fit``, and so are the following: :class:`~art_saliency.trainers.options.RunOptions`.
    """

    parameters: dict[str, Any]
    optimizer: dict[str, Any]
    epochs: int
    batch_size: int
    seed: int
    scheduler: str | None = "onecycle"
    augment: str | None = None
    grad_clip: float | None = None
    precision: str = "32-true"
    deterministic: bool = False
    channels_last: bool = False
    validation_split: float = 0.0
    weights: str | None = field(default=None)
    selection: str = "last"
    patience: int | None = None
    validate_every: int = 1
    ema: float | None = None
    swa_from: float | None = None
    awp: float | None = None
    label_smoothing: float = 0.0

    def run_options(self) -> dict[str, Any]:
        """:return: What ``fit`` takes on top of epochs, batch size, schedule, seed, augmentation and validation data."""
        return {name: getattr(self, name) for name in RUN_OPTIONS}

    def fit_options(self) -> dict[str, Any]:
        """:return: All that ``fit`` takes beside the data and how a run is kept and shown."""
        return {
            "batch_size": self.batch_size,
            "nb_epochs": self.epochs,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "augment": None if self.augment is None else augmentation_by_name(self.augment),
            **self.run_options(),
        }

    def to_json(self) -> dict[str, Any]:
        """:return: The fields."""
        return asdict(self)

    @classmethod
    def of(cls, page: dict[str, Any]) -> Recipe:
        """
        Read a run's recipe.

        :param page: What :func:`art_saliency.trainers.runs.read_run` gives.
        :raises CheckpointError: When the run was saved without one, or with one that this version cannot read.
        """
        known = page.get("recipe")
        names = {f.name for f in fields(cls)}
        if not isinstance(known, dict) or not set(known) <= names or not {"optimizer", "epochs"} <= set(known):
            what = "no recipe" if known is None else "a recipe that this version cannot read"
            raise CheckpointError(
                f"run.json: got {what}, expected how the run was trained; train it again, or give surrogates of your own"
            )
        return cls(**known)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """:return: A fresh optimizer of the run's kind over the model's parameters."""
        settings = dict(self.optimizer)
        kind: type[Optimizer] = getattr(torch.optim, settings.pop("name"))
        return kind(model.parameters(), **settings)


def load_weights(model: nn.Module, source: str) -> None:
    """
    Put a file's weights into a network.

    :param source: A state dict, or one under ``"state_dict"``.
    :raises CheckpointError: When there is no such file, it is damaged, or its weights do not fit; it is named.
    """
    weights = read_tensors(Path(source))
    try:
        model.load_state_dict(weights.get("state_dict", weights))
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{source}: these weights do not fit the network: {' '.join(lines[1:3]) or lines[0]}"
        ) from error


def train_surrogates(
    page: dict[str, Any],
    data: DataSet,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    threat: ThreatModel | None = None,
    epochs: int | None = None,
    quiet: bool = False,
) -> dict[str, nn.Module]:
    """
    Train a standard network, one by PGD-AT and a twin of a run's network: the same architecture, data, recipe, other seeds.

    :param page: The run's ``run.json``, as :func:`art_saliency.trainers.runs.read_run` gives it.
    :param data: Its data. The images that the run held out are held out here.
    :param seed: The copies take the next seeds from here on, except the run's own.
    :param device: Where they are trained and stay.
    :param threat: Of PGD-AT; ``None`` is the run's own.
    :param epochs: Passes over the data; ``None`` is as many as the run had.
    :param quiet: Whether no progress is shown.
    :return: Networks in eval mode by the names of :data:`art_saliency.evaluation.transfer.SURROGATES`.
    :raises CheckpointError: When the run was saved without a recipe.
    :raises InputError: When it cannot be repeated: it is by a method or with a function of the user's own.
    """
    recipe, method = Recipe.of(page), page["method"]
    if method.partition("+")[0] not in TRAINERS:
        raise _checks.refuse(
            "method", repr(method), "one of this package's, which can be repeated", "train a twin yourself"
        )
    passes = recipe.epochs if epochs is None else _checks.whole("epochs", epochs, least=1)
    where = torch.device(device)
    parameters = {
        "standard": {},
        "pgd-at": _radius(page, threat),
        method: {key: value for key, value in recipe.parameters.items() if key not in _NOT_COPIED},
    }
    for key, value in parameters[method].items():
        if isinstance(value, dict) and "callable" in value:
            got = f"a run whose {key} is a function ({value['callable']}), which run.json cannot hold"
            raise _checks.refuse("surrogates", got, "one that can be repeated", "train a twin yourself")
    (x, y), held_out = (data.x_train, data.y_train), None
    if recipe.validation_split:
        (x, y), held_out = data.split(recipe.validation_split, recipe.seed)
    needs_validation = recipe.selection == "best" or recipe.patience is not None

    def train_copy(name: str, own: int) -> nn.Module:
        torch.manual_seed(own)
        network = {key: value for key, value in page["network"].items() if key != "fsr"}
        model = build_network(**network)
        if recipe.weights:
            load_weights(model, recipe.weights)
        shape, classes = tuple(network["input_shape"]), network["num_classes"]
        optimizer = recipe.make_optimizer(model)
        classifier = make_classifier(model, input_shape=shape, num_classes=classes, optimizer=optimizer, device=where)
        trainer = TRAINERS[name.partition("+")[0]](classifier, **parameters[name])
        trainer.fit(
            x,
            y,
            validation_data=held_out if needs_validation else None,
            verbose=not quiet,
            **{**recipe.fit_options(), "nb_epochs": passes, "seed": own},
        )
        trained: nn.Module = classifier.model
        return trained.eval()

    torch.empty(0, device=where)  # an idle CUDA would be started with the seed of a copy, and not be put back
    with global_generators_kept():
        return surrogates_for(train_copy, method, seed=seed, own_seed=recipe.seed)


def _radius(page: dict[str, Any], threat: ThreatModel | None) -> dict[str, Any]:
    """:return: The keywords of PGD-AT."""
    if threat is not None:
        return {"eps": threat.eps, "norm": threat.norm}
    if page["settings"].get("eps") is None:
        raise _checks.refuse("threat", "nothing", "a threat model", "the run was trained without one")
    return {"eps": page["settings"]["eps"], "norm": page["settings"].get("norm", "Linf")}


def variants_of_run(page: dict[str, Any]) -> Mapping[str, AdaptiveAttack]:
    """
    The attacks that were made for the method by which a run was trained, for the audit.

    :param page: The run's ``run.json``. :return: By name; none for a method whose settings hold a function, which JSON cannot.
    """
    name = page["method"].partition("+")[2] or page["settings"].get("base") or page["method"]
    objective = OBJECTIVES.get(name)
    if objective is None:
        return {}
    known = set(objective.parameter_names())
    settings = {key: value for key, value in page["settings"].items() if key in known}
    if any(isinstance(value, dict) for value in settings.values()):
        return {}
    return objective(**settings).adaptive_variants()
