"""J-SIGR as an ART trainer: its objective, and the teacher that a user may give."""

from __future__ import annotations

import os
from typing import Any

from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_saliency import _checks
from art_saliency.methods.j_sigr import JSIGR
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.network import ClassifierNetwork

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
        assert isinstance(self.objective, JSIGR)
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
