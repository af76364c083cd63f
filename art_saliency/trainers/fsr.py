"""Feature separation and recalibration as an ART trainer: the network gains a layer, and any method trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.optim import Optimizer

from art_saliency import _checks
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.base import Objective
from art_saliency.methods.baselines import PGDAT
from art_saliency.methods.fsr import FSRLayer, LayerOptions, fsr_layers, insert_fsr
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.network import check_trainable
from art_saliency.trainers.options import RunOptions

__all__ = ["FSRTrainer"]

_LAYER = tuple(get_type_hints(LayerOptions))


class FSRTrainer(ObjectiveTrainer):
    """
    Feature separation and recalibration (Kim et al., CVPR 2023) on top of any training method.

    The constructor inserts the layer into the classifier's model and gives its parameters to the optimizer, in a group that
    copies the first one's settings: build a scheduler object afterwards.

    :param classifier: With an optimizer and ``clip_values``.
    :param target: The dotted name of the submodule behind which the layer is put; it must put out (N, C, H, W).
    :param base: The method that trains the network: a name such as ``"pgd-at"``, ``"trades"``, ``"mart"``, or an objective
        (whose distances are in units of [0, 1]).
    :param hidden: Width of the layer's two networks. :param tau: Temperature of its mask.
    :param zero_init: Whether the layer is the identity at first. :param lambda_sep: Weight of the separation loss.
    :param lambda_rec: Weight of the recalibration loss. :param aux_warmup_share: The share of the run over which both rise from 0.
    :param parameters: The base method's, by keyword; ``eps`` in units of ``clip_values``.
    """

    objective_class = PGDAT

    def __init__(
        self,
        classifier: PyTorchClassifier,
        target: str = "layer4",
        base: str | Objective = "pgd-at",
        *,
        hidden: int = 64,
        tau: float = 0.1,
        zero_init: bool = False,
        lambda_sep: float = 1.0,
        lambda_rec: float = 1.0,
        aux_warmup_share: float = 0.0,
        **parameters: Any,
    ) -> None:
        self._base = base
        if isinstance(base, Objective) and parameters:
            _checks.no_unknown(type(self).__name__, parameters, _LAYER)
        super().__init__(classifier, **parameters)
        check_trainable(self._network, classifier)
        self.target = target
        options: LayerOptions = {
            "hidden": hidden,
            "tau": tau,
            "zero_init": zero_init,
            "lambda_sep": lambda_sep,
            "lambda_rec": lambda_rec,
            "aux_warmup_share": aux_warmup_share,
        }
        example = torch.rand(2, *classifier.input_shape, device=classifier.device)
        example = example * (self._network.high - self._network.low) + self._network.low
        insert_fsr(classifier.model, target, classifier.nb_classes, example, **options)
        layer = fsr_layers(classifier.model)[target]
        # As the layer has checked them: numbers of NumPy's are no JSON.
        self._layer_config = {name: getattr(layer, name) for name in options}
        _add_parameters(classifier.optimizer, layer, target)

    @classmethod
    def method_name(cls) -> str:
        """:return: ``"fsr"``."""
        return "fsr"

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """:return: The layer's keywords; the base method's come on top."""
        return ("target", "base", *_LAYER)

    @classmethod
    def objective_for(cls, parameters: Mapping[str, Any]) -> type[Objective]:
        """:return: The base method's, of which there is a name."""
        return OBJECTIVES[_checks.one_of("base", parameters.get("base", cls.objective_class.name), OBJECTIVES)]

    @classmethod
    def check_parameters(cls, parameters: dict[str, Any]) -> None:
        """Refuse what the constructor would, before there is a classifier."""
        own = {name: value for name, value in parameters.items() if name in cls.parameter_names()}
        cls._build(cls.objective_for(own), {name: value for name, value in parameters.items() if name not in own})
        FSRLayer(1, 2, **{name: own[name] for name in _LAYER if name in own})

    @classmethod
    def defaults_for(cls, model: nn.Module) -> dict[str, Any]:
        """:return: The last stage of this package's networks, where the paper's own networks have the layer."""
        stages = getattr(model, "stages", None)
        return {"target": stages[-1]} if stages else {}

    def config(self) -> dict[str, Any]:
        """:return: The layer's parameters and the base method's."""
        return {"target": self.target, "base": self.objective.name, **self._layer_config, **self.objective.config()}

    def _make_objective(self, objective: type[Objective], parameters: dict[str, Any]) -> Objective:
        if isinstance(self._base, Objective):
            return self._base
        return super()._make_objective(self.objective_for({"base": self._base}), parameters)

    def _check_run(self, batch_size: Any, nb_epochs: Any, scheduler: Any, options: RunOptions) -> tuple[int, int]:
        checked = super()._check_run(batch_size, nb_epochs, scheduler, options)
        groups = len(self._classifier.optimizer.param_groups)
        for rates in _rates(scheduler):
            if len(rates) != groups:
                raise _checks.refuse(
                    "scheduler",
                    f"one for {len(rates)} parameter groups",
                    f"one for {groups}",
                    "build it after FSRTrainer, which adds the FSR layer's group to the optimizer",
                )
        return checked


def _add_parameters(optimizer: Optimizer, layer: FSRLayer, target: str) -> None:
    """Give a layer's parameters to an optimizer, with the settings of its first group; what else it does not know stays out."""
    own = ("params", "param_names", "initial_lr")
    first = {key: value for key, value in optimizer.param_groups[0].items() if key not in own}
    named = "param_names" in optimizer.param_groups[0]
    parameters: list[Any] = [(f"{target}.fsr.{name}", p) if named else p for name, p in layer.named_parameters()]
    optimizer.add_param_group({**first, "params": parameters})


def _rates(scheduler: Any) -> Iterator[Sequence[float]]:
    """:return: For how many parameter groups a scheduler, and each that it leads, was built: one rate each."""
    if (rates := getattr(scheduler, "base_lrs", None)) is not None:
        yield rates
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _rates(inner)
