"""The keywords of ``fit`` that describe a run rather than a method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from art_saliency import _checks
from art_saliency.training.averaging import ExponentialAverage, StochasticWeightAverage
from art_saliency.training.awp import WeightPerturbation
from art_saliency.training.batches import Augment
from art_saliency.training.checkpoint import RESUME, Checkpoints, cadence
from art_saliency.training.engine import PRECISIONS, launched
from art_saliency.training.extensions import Extension
from art_saliency.training.selection import LabelSmoothing, Selection

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """
    The further keywords of ``fit`` and ``fit_generator``: they describe the run, not the method.

    :ivar seed: Of data order, attacks and dropout; ``None`` draws one from torch's global generator. It stands in the history.
    :ivar augment: Moves images on the device: an :class:`art_saliency.data.Augmentation`; ``None`` leaves them.
    :ivar grad_clip: The greatest norm of the gradient; ``None`` does not clip.
    :ivar deterministic: Whether only kernels are used whose results repeat bit for bit.
    :ivar precision: ``"32-true"`` or ``"bf16-mixed"``.
    :ivar channels_last: Whether convolutions work on channels-last memory: faster where the processor's kernels prefer it, with other
        rounding; the weights are laid out as before afterwards.
    :ivar validate_every: Epochs between two measurements on the validation data.
    :ivar validation_split: The share of the training images that is held out when there is no `validation_data`; 0 holds out none.
    :ivar selection: Whose weights stay in the classifier: ``"last"``, or ``"best"`` for the epoch with the highest PGD accuracy on
        the validation data, which it needs. Both are in ``trainer.kept_weights`` where there is validation data.
    :ivar patience: Measurements on the validation data without a better one after which training ends; ``None`` never.
    :ivar ema: Decay of an exponential average of the weights (0.999, say); ``None`` keeps none. Where an average is kept, it is
        what is validated, selected and left in the classifier.
    :ivar swa_from: The share of the run after which the weights are averaged equally, epoch by epoch; ``None`` does not average.
    :ivar awp: gamma of adversarial weight perturbation (0.005, say); ``None`` is without.
    :ivar label_smoothing: 0 to below 1; for methods that take soft labels.
    :ivar checkpoint_dir: A folder where the run is kept, so that it can go on when it was interrupted: on a CPU bit for bit, on one GPU
        with `deterministic`; ``None`` writes nothing. One process at a time keeps its run in a folder. SIGINT and SIGTERM then end a run after its step, with
        :class:`~art_saliency.errors.TrainingInterrupted`.
    :ivar checkpoint_every: A number of epochs, or words: ``"500 steps"``, ``"600 seconds"``.
    :ivar resume: ``"auto"`` goes on where a run in `checkpoint_dir` was interrupted, ``"must"`` refuses to start anew, ``"never"``
        starts anew. Other data or settings than the interrupted run's are refused by name; `seed` may be left out.
    :ivar extensions: :class:`art_saliency.training.Extension` objects of the user's own.
    :ivar verbose: Whether progress is shown.
    """

    seed: int | None = None
    augment: Augment | None = None
    grad_clip: float | None = None
    deterministic: bool = False
    precision: str = "32-true"
    channels_last: bool = False
    validate_every: int = 1
    validation_split: float = 0.0
    selection: str = "last"
    patience: int | None = None
    ema: float | None = None
    swa_from: float | None = None
    awp: float | None = None
    label_smoothing: float = 0.0
    checkpoint_dir: str | os.PathLike[str] | None = None
    checkpoint_every: int | str = 1
    resume: str = "auto"
    extensions: Sequence[Extension] = ()
    verbose: bool = True

    def seeded(self, interrupted: int | None = None) -> RunOptions:
        """:return: These options with a seed: the one given, an interrupted run's, or one drawn from torch's global generator."""
        if self.seed is not None:
            return self
        return replace(self, seed=int(torch.randint(2**31 - 1, ())) if interrupted is None else interrupted)

    def checkpoints(self) -> Checkpoints | None:
        """:return: What is in the folder where the run is to be kept; ``None`` without a folder."""
        if self.checkpoint_dir is None:
            return None
        return Checkpoints(self.checkpoint_dir, every=self.checkpoint_every, resume=self.resume)

    @classmethod
    def checked(cls, where: str, given: dict[str, Any]) -> RunOptions:
        """:return: The options, refused when unknown or out of range."""
        _checks.no_unknown(where, given, [field.name for field in fields(cls)])
        # As Python's own: NumPy's numbers would not go into a page of JSON.
        options = cls(
            **{name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        )
        if options.seed is not None:
            _checks.seed(options.seed)
        if options.grad_clip is not None:
            _checks.real("grad_clip", options.grad_clip, above=0)
        if options.augment is not None and not callable(options.augment):
            raise _checks.refuse("augment", type(options.augment).__name__, "a callable such as data.Augmentation()")
        given_extensions: Sequence[Any] = options.extensions
        for extension in given_extensions:
            if not isinstance(extension, Extension):
                got = f"a {type(extension).__name__} among them"
                raise _checks.refuse("extensions", got, "objects of classes derived from Extension")
        _checks.flag("deterministic", options.deterministic)
        _checks.flag("channels_last", options.channels_last)
        _checks.flag("verbose", options.verbose)
        _checks.one_of("precision", options.precision, PRECISIONS)
        _checks.whole("validate_every", options.validate_every, least=1)
        _checks.real("validation_split", options.validation_split, least=0, below=1)
        options._check_additions()
        options._check_checkpoints()
        return options if launched()[0] == 0 else replace(options, verbose=False)  # of several processes one speaks

    def _check_checkpoints(self) -> None:
        _checks.one_of("resume", self.resume, RESUME)
        cadence(self.checkpoint_every)
        if self.checkpoint_dir is None and (self.resume == "must" or self.checkpoint_every != 1):
            raise _checks.refuse("checkpoint_dir", "None", "a folder", "checkpoints are written and read there")
        if self.checkpoint_dir is not None and not isinstance(self.checkpoint_dir, (str, os.PathLike)):
            raise _checks.refuse("checkpoint_dir", repr(self.checkpoint_dir), "a path or None")

    def _check_additions(self) -> None:
        """Build what :meth:`additions` does, so that it is refused now rather than when the data is prepared."""
        if self.ema is not None and self.swa_from is not None:
            raise _checks.refuse("swa_from", f"{self.swa_from:g} beside ema={self.ema:g}", "one average of the weights")
        self.additions(1)
        self.selecting()

    def additions(self, classes: int) -> list[Extension]:
        """:return: What changes the steps of the run and averages its weights."""
        found: list[Extension] = []
        if _checks.real("label_smoothing", self.label_smoothing, least=0, below=1):
            found.append(LabelSmoothing(self.label_smoothing, classes))
        if self.awp is not None:
            found.append(WeightPerturbation(self.awp))
        if self.ema is not None:
            found.append(ExponentialAverage(self.ema))
        if self.swa_from is not None:
            found.append(StochasticWeightAverage(self.swa_from))
        return found

    def selecting(self) -> Selection:
        """:return: What keeps the best weights."""
        return Selection(self.selection, patience=self.patience)
