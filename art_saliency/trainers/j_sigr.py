"""J-SIGR as an ART trainer: a teacher, its saliency maps once, then training."""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

from art_saliency import _checks
from art_saliency.methods.baselines import Standard
from art_saliency.methods.j_sigr import JSIGR
from art_saliency.trainers.base import ObjectiveTrainer, RunOptions
from art_saliency.trainers.network import ClassifierNetwork
from art_saliency.training.batches import Batches
from art_saliency.training.engine import Engine
from art_saliency.training.loop import train
from art_saliency.training.records import Progress

__all__ = ["JSIGRTrainer"]


class JSIGRTrainer(ObjectiveTrainer):
    """
    Jacobian norm with selective input-gradient regularisation, a reconstruction (Liu et al., Pattern Recognition 2024).

    Not adversarial training. The saliency maps of a frozen, standardly trained teacher say which pixels stay free; without a
    `teacher`, ``fit`` first trains one, a copy of the classifier's network, and shows it.

    :param classifier: With an optimizer and ``clip_values``.
    :param teacher: A trained network, as a torch module on [0, 1] or an ART classifier; ``None`` trains one in ``fit``.
    :param teacher_epochs: Passes that train it; ``None`` takes as many as ``fit`` itself.
    :param maps_file: Where the maps are kept between runs, with a hash of teacher, data and parameters; ``None`` keeps none.
    :param parameters: Those of :class:`~art_saliency.methods.j_sigr.JSIGR`; ``eps`` in units of ``clip_values``.
    """

    objective_class = JSIGR
    objective: JSIGR

    def __init__(
        self,
        classifier: PyTorchClassifier,
        *,
        teacher: nn.Module | PyTorchClassifier | None = None,
        teacher_epochs: int | None = None,
        maps_file: str | os.PathLike[str] | None = None,
        **parameters: Any,
    ) -> None:
        if teacher is not None and not isinstance(teacher, (nn.Module, PyTorchClassifier)):
            raise _checks.refuse("teacher", type(teacher).__name__, "a torch module, an ART classifier or None")
        if teacher_epochs is not None:
            _checks.whole("teacher_epochs", teacher_epochs, least=1)
        super().__init__(classifier, **parameters)
        self.teacher_epochs, self.maps_file = teacher_epochs, maps_file
        self.objective.teacher = ClassifierNetwork(teacher) if isinstance(teacher, PyTorchClassifier) else teacher

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """:return: The constructor's keywords."""
        return (*super().parameter_names(), "teacher_epochs", "maps_file")

    @classmethod
    def check_parameters(cls, parameters: dict[str, Any]) -> None:
        """Refuse what the constructor would, before there is a classifier."""
        own = ("teacher_epochs", "maps_file")
        super().check_parameters({name: value for name, value in parameters.items() if name not in own})

    def _maps(
        self, images: Tensor, targets: Tensor, batches: Batches, epochs: int, options: RunOptions
    ) -> dict[str, Any]:
        objective = self.objective
        if not objective.needs_maps:
            return {}
        if objective.teacher is None:
            objective.teacher = self._trained_teacher(batches, self.teacher_epochs or epochs, options)
        size = (images.shape[-2], images.shape[-1])
        hard = targets if targets.ndim == 1 else targets.argmax(1)
        bar = tqdm(
            total=len(images), desc="saliency maps", unit="image", dynamic_ncols=True, disable=not options.verbose
        )
        with bar:
            scores = objective.cached_maps(
                self.maps_file, objective.teacher, images.to(self._device), hard.to(self._device), progress=bar.update
            )
        return {"maps": scores, "expand": lambda maps: objective.full_maps(maps, size)}

    def _trained_teacher(self, batches: Batches, epochs: int, options: RunOptions) -> nn.Module:
        """A copy of the network, trained on clean images by an optimizer of the same kind."""
        teacher = copy.deepcopy(self._network)
        optimizer = self._classifier.optimizer
        accepted = inspect.signature(type(optimizer).__init__).parameters  # AdamW's defaults hold more than it takes
        settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        assert options.seed is not None
        train(
            teacher,
            Standard(),
            type(optimizer)(teacher.parameters(), **{**settings, "lr": optimizer.param_groups[0]["lr"]}),
            batches,
            epochs=epochs,
            engine=Engine(self._device),
            seed=options.seed,
            scheduler="cosine",
            deterministic=options.deterministic,
            extensions=[Progress("teacher")] if options.verbose else [],
        )
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        return teacher.eval()
