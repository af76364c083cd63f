"""The adapter between ART and the loop: an ART ``Trainer`` that trains a ``PyTorchClassifier`` by an objective."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from art.data_generators import DataGenerator
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from art_saliency import _checks
from art_saliency.data import stratified_split, to_unit
from art_saliency.errors import UnsupportedModelError
from art_saliency.methods.base import Objective
from art_saliency.threat import ThreatModel
from art_saliency.trainers.network import ClassifierNetwork, check_trainable
from art_saliency.trainers.teacher import teacher_maps, trained_teacher
from art_saliency.training.batches import Augment, Batches, ResidentBatches, StreamedBatches
from art_saliency.training.engine import PRECISIONS, Engine
from art_saliency.training.extensions import Extension, OverfittingWatch, Validation
from art_saliency.training.loop import train
from art_saliency.training.records import History, Progress
from art_saliency.training.schedules import Schedule

__all__ = ["ObjectiveTrainer", "RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """
    The further keywords of ``fit`` and ``fit_generator``: they describe the run, not the method.

    :ivar seed: Of data order, attacks and dropout; ``None`` draws one from torch's global generator. It stands in the history.
    :ivar augment: Moves images on the device: an :class:`art_saliency.data.Augmentation`; ``None`` leaves them.
    :ivar grad_clip: The greatest norm of the gradient; ``None`` does not clip.
    :ivar deterministic: Whether only kernels are used whose results repeat bit for bit.
    :ivar precision: ``"32-true"`` or ``"bf16-mixed"``.
    :ivar validate_every: Epochs between two measurements on the validation data.
    :ivar validation_split: The share of the training images that is held out when there is no `validation_data`; 0 holds out none.
    :ivar extensions: :class:`art_saliency.training.Extension` objects of the user's own.
    :ivar verbose: Whether progress is shown.
    """

    seed: int | None = None
    augment: Augment | None = None
    grad_clip: float | None = None
    deterministic: bool = False
    precision: str = "32-true"
    validate_every: int = 1
    validation_split: float = 0.0
    extensions: Sequence[Extension] = ()
    verbose: bool = True

    def seeded(self) -> RunOptions:
        """:return: These options with a seed: the one given, or one drawn from torch's global generator."""
        return self if self.seed is not None else replace(self, seed=int(torch.randint(2**31 - 1, ())))

    @classmethod
    def checked(cls, where: str, given: dict[str, Any]) -> RunOptions:
        """:return: The options, refused when unknown or out of range."""
        _checks.no_unknown(where, given, [field.name for field in fields(cls)])
        options = cls(**given)
        if options.seed is not None:
            _checks.whole("seed", options.seed, most=2**63 - 1)
        if options.grad_clip is not None:
            _checks.real("grad_clip", options.grad_clip, above=0)
        if options.augment is not None and not callable(options.augment):
            raise _checks.refuse("augment", type(options.augment).__name__, "a callable such as data.Augmentation()")
        _checks.flag("deterministic", options.deterministic)
        _checks.flag("verbose", options.verbose)
        _checks.one_of("precision", options.precision, PRECISIONS)
        _checks.whole("validate_every", options.validate_every, least=1)
        _checks.real("validation_split", options.validation_split, least=0, below=1)
        return options


class ObjectiveTrainer(Trainer):  # type: ignore[misc]
    """
    Trains an ART ``PyTorchClassifier`` by one :class:`~art_saliency.methods.base.Objective`.

    :param classifier: With an optimizer and ``clip_values``. Its loss is not used: the method brings its own.
    :param parameters: The objective's, by keyword. Distances (``eps``, ``eps_step``) are in units of ``clip_values``, as
        everywhere in ART; the objective itself works on [0, 1].
    """

    objective_class: ClassVar[type[Objective]]
    teacher_epochs: int | None = None
    maps_file: str | os.PathLike[str] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the objective's own parameters in ``help()`` and in editors."""
        super().__init_subclass__(**kwargs)
        if "objective_class" not in cls.__dict__ or "__init__" in cls.__dict__:
            return
        own = inspect.signature(cls.objective_class.__init__).parameters.values()
        first = [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("classifier", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=PyTorchClassifier),
        ]

        def construct(self: ObjectiveTrainer, classifier: PyTorchClassifier, **parameters: Any) -> None:
            ObjectiveTrainer.__init__(self, classifier, **parameters)

        construct.__signature__ = inspect.Signature([*first, *(p for p in own if p.name != "self")])  # type: ignore[attr-defined]
        construct.__doc__ = cls.objective_class.__doc__
        construct.__name__ = "__init__"
        cls.__init__ = construct  # type: ignore[method-assign]

    def __init__(self, classifier: PyTorchClassifier, **parameters: Any) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise UnsupportedModelError(
                f"classifier: got {type(classifier).__name__}, expected an ART PyTorchClassifier; wrap the torch module: "
                f"art.estimators.classification.PyTorchClassifier(model, loss, input_shape, nb_classes, optimizer, clip_values=(0, 1))"
            )
        super().__init__(classifier)
        self._network = ClassifierNetwork(classifier)
        self.objective = self._make_objective(self.objective_class, parameters)
        self.history = History()

    @classmethod
    def method_name(cls) -> str:
        """:return: What the method is called on the command line and in records."""
        return cls.objective_class.name

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """:return: The constructor's keywords."""
        return cls.objective_class.parameter_names()

    @classmethod
    def check_parameters(cls, parameters: dict[str, Any]) -> None:
        """Refuse what the constructor would, for images in [0, 1], before there is a classifier."""
        cls._build(cls.objective_class, parameters)

    @classmethod
    def defaults_for(cls, model: nn.Module) -> dict[str, Any]:
        """:return: Parameters whose best default depends on the network."""
        return {}

    def config(self) -> dict[str, Any]:
        """:return: The method's parameters, JSON-able, distances in units of [0, 1]."""
        return self.objective.config()

    @classmethod
    def _build(cls, objective: type[Objective], parameters: dict[str, Any]) -> Objective:
        _checks.no_unknown(cls.__name__, parameters, objective.parameter_names())
        signature = inspect.signature(objective.__init__).parameters
        for name in objective.parameter_names():
            if signature[name].default is inspect.Parameter.empty and name not in parameters:
                raise _checks.refuse(name, "nothing", f"a value: {cls.__name__}(classifier, {name}=...)")
        return objective(**parameters)

    def _make_objective(self, objective: type[Objective], parameters: dict[str, Any]) -> Objective:
        """Build the objective, with distances brought from ``clip_values`` to [0, 1]."""
        linf = parameters.get("norm", "Linf") == "Linf"
        return self._build(
            objective, {name: self._to_unit(objective, name, value, linf) for name, value in parameters.items()}
        )

    def _to_unit(self, objective: type[Objective], name: str, value: Any, linf: bool) -> Any:
        span = self._network.high - self._network.low
        if name in objective.pixel_units and value is not None and span != 1:
            return _checks.real(name, value, least=0, most=span if name == "eps" and linf else None) / span
        if name == "attack" and hasattr(value, "generate"):
            return _art_attack(value, self._network)
        return value

    # --- ART's trainer contract -------------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        y: Any,
        validation_data: tuple[Any, Any] | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """
        Train the classifier. Its weights change; its train/eval modes and its learning rate come back as they were.

        :param x: (N, C, H, W) array or tensor within ``clip_values``; or uint8, which stands for 0 to 255 of the range.
        :param y: (N,) indices or (N, K) one-hot rows; soft labels where the method allows them.
        :param validation_data: (x, y) of held-out images: clean and PGD accuracy are measured on them and stand in the history.
        :param batch_size: Images a step.
        :param nb_epochs: Passes over the data.
        :param scheduler: ``"cosine"``, ``"step"``, ``"onecycle"``, or any torch scheduler (stepped once an epoch).
        :param kwargs: The fields of :class:`RunOptions`: ``seed``, ``augment``, ``grad_clip``, ``deterministic``, ``precision``,
            ``validate_every``, ``validation_split``, ``extensions``, ``verbose``. An unknown keyword is refused.
        """
        options = RunOptions.checked(f"{type(self).__name__}.fit", kwargs)
        self._check_run(batch_size, nb_epochs, scheduler, options)
        images, targets = self.prepare(x, y)
        validation = None if validation_data is None else self.prepare(*_pair(validation_data), name="validation_data")
        if validation is None and options.validation_split:
            images, targets, validation = _hold_out(images, targets, options.validation_split, options.seed or 0)
        self._check_batches(len(images), batch_size)
        options = options.seeded()

        def batches(**maps: Any) -> ResidentBatches:
            return ResidentBatches(
                images, targets, batch_size=batch_size, device=self._device, augment=options.augment, **maps
            )

        maps = self._maps(images, targets, batches(), nb_epochs, options)
        self._train(batches(**maps), nb_epochs, scheduler, validation, options)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """
        Train the classifier from a stream.

        :param generator: An ART ``DataGenerator`` or a torch ``DataLoader`` that yields (x, y) as :meth:`fit` takes them.
        :param nb_epochs: Passes over the stream.
        :param kwargs: ``validation_data`` and ``scheduler`` as in :meth:`fit`, and the fields of :class:`RunOptions`.
        """
        validation_data, scheduler = kwargs.pop("validation_data", None), kwargs.pop("scheduler", None)
        options = RunOptions.checked(f"{type(self).__name__}.fit_generator", kwargs)
        if options.validation_split:
            raise _checks.refuse(
                "validation_split", str(options.validation_split), "0 for a stream", "give validation_data"
            )
        make, steps, batch_size = _stream(generator)
        self._check_run(batch_size, nb_epochs, scheduler, options)
        self._check_batches(2, batch_size)
        validation = None if validation_data is None else self.prepare(*_pair(validation_data), name="validation_data")
        options = options.seeded()
        batches = StreamedBatches(
            make, lambda x, y: self.prepare(x, y), steps_per_epoch=steps, device=self._device, augment=options.augment
        )
        self._train(batches, nb_epochs, scheduler, validation, options)

    def predict(self, x: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """
        The classifier's logits.

        :param x: As in :meth:`fit`.
        :param kwargs: Passed to ``PyTorchClassifier.predict``.
        :return: (N, K).
        """
        low, high = self._network.low, self._network.high
        images, _ = self._images("x", x)
        images = to_unit(images) * (high - low) + low if images.dtype == torch.uint8 else images
        result: np.ndarray[Any, Any] = self._classifier.predict(images.float().cpu().numpy(), **kwargs)
        return result

    # --- what the two ways of fitting share --------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._classifier.device
        return device

    def prepare(self, x: Any, y: Any, *, name: str = "x") -> tuple[Tensor, Tensor]:
        """
        Check images and labels and bring them to [0, 1].

        :return: (N, C, H, W) in [0, 1] or uint8 standing for it; (N,) int64 or (N, K) float32.
        """
        images, (low, high) = self._images(name, x)
        targets = _checks.labels(y, len(images), self._classifier.nb_classes, soft=self.objective.soft_labels)
        if images.dtype != torch.uint8:
            images = images.float()
            images = images if (low, high) == (0.0, 1.0) else ((images - low) / (high - low)).clamp_(0, 1)
        return images, targets

    def _images(self, name: str, x: Any) -> tuple[Tensor, tuple[float, float]]:
        low, high = self._network.low, self._network.high
        whole_bytes = (low, high) in ((0.0, 255.0), (0.0, 1.0))
        images = _checks.images(
            x, name=name, low=low, high=high, shape=tuple(self._classifier.input_shape), allow_uint8=whole_bytes
        )
        if images.dtype == torch.uint8 and high == 1 and int(images.max()) <= 1:
            raise _checks.refuse(
                name, "uint8 of 0 and 1 alone", "uint8 from 0 to 255", "it would be divided by 255: convert it to float"
            )
        return images, (low, high)

    def _maps(
        self, images: Tensor, targets: Tensor, batches: Batches, epochs: int, options: RunOptions
    ) -> dict[str, Any]:
        """Per-image maps that the augmentation moves with the images, where the objective reads them."""
        objective: Any = self.objective
        if not objective.needs_maps:
            return {}
        # The objective keeps no teacher that was trained here: a second fit starts from a network of its own.
        teacher = objective.teacher
        if teacher is None:
            epochs = self.teacher_epochs or epochs
            engine = Engine(self._device)
            teacher = trained_teacher(self._network, self._classifier.optimizer, batches, epochs, engine, options)
        x, y = images.to(self._device), targets.to(self._device)
        return teacher_maps(objective, teacher, x, y, maps_file=self.maps_file, verbose=options.verbose)

    def _check_run(self, batch_size: int, nb_epochs: int, scheduler: Any, options: RunOptions) -> None:
        if options.precision != "32-true" and self.objective.double_backward:
            # An input gradient under bf16 autocast was measured 21 % off: a penalty on it would be on noise.
            raise _checks.refuse(
                "precision",
                repr(options.precision),
                f"'32-true' for {self.method_name()}, which differentiates input gradients",
            )
        _checks.whole("batch_size", batch_size, least=1)
        _checks.whole("nb_epochs", nb_epochs, least=1)
        Schedule.checked(scheduler)
        check_trainable(self._network, self._classifier)

    def _check_batches(self, count: int, batch_size: int) -> None:
        if min(count, batch_size) == 1 and any(isinstance(child, _BatchNorm) for child in self._network.modules()):
            what = "batch_size" if batch_size == 1 else "x"
            raise _checks.refuse(what, "a batch of one image", "at least 2 for a network with BatchNorm")

    def _train(
        self,
        batches: Batches,
        epochs: int,
        scheduler: Any,
        validation: tuple[Tensor, Tensor] | None,
        options: RunOptions,
    ) -> None:
        assert options.seed is not None
        threat: ThreatModel | None = getattr(self.objective, "threat", None)
        extensions: list[Extension] = []
        if validation is not None:
            extensions.append(Validation(*validation, threat=threat, every=options.validate_every))
        if self.objective.single_step and threat is not None:
            extensions.append(OverfittingWatch(threat))
        extensions.extend(options.extensions)
        if options.verbose:
            extensions.append(Progress(self.method_name()))
        self.history = History()
        train(
            self._network,
            self.objective,
            self._classifier.optimizer,
            batches,
            epochs=epochs,
            engine=Engine(self._device, precision=options.precision),
            seed=options.seed,
            scheduler=scheduler,
            grad_clip=options.grad_clip,
            deterministic=options.deterministic,
            extensions=extensions,
            history=self.history,
        )


def _pair(validation_data: Any) -> tuple[Any, Any]:
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
        raise _checks.refuse("validation_data", type(validation_data).__name__, "a pair (x, y)")
    return validation_data[0], validation_data[1]


def _hold_out(x: Tensor, y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Split off a validation set at random, class by class, the same for the same seed."""
    count = max(1, round(share * len(x)))
    if count >= len(x):
        raise _checks.refuse(
            "validation_split", f"{share:g} of {len(x)} images", "a share that leaves images to train on"
        )
    hard = y if y.ndim == 1 else y.argmax(1)
    kept, held = stratified_split(hard, count, seed)
    return x[kept], y[kept], (x[held], hard[held])


def _stream(generator: Any) -> tuple[Callable[[], Iterator[Any]], int, int]:
    """:return: What makes an epoch's iterator, the batches an epoch has, and the batch size."""
    if isinstance(generator, DataLoader):
        return lambda: iter(generator), len(generator), generator.batch_size or 2
    if isinstance(generator, DataGenerator):
        steps = -(-int(generator.size) // int(generator.batch_size))

        def batches() -> Iterator[Any]:
            for _ in range(steps):
                yield generator.get_batch()

        return batches, steps, int(generator.batch_size)
    raise _checks.refuse("generator", type(generator).__name__, "an ART DataGenerator or a torch DataLoader")


def _art_attack(attack: Any, network: ClassifierNetwork) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """An ART evasion attack as an inner maximisation: arrays in the classifier's range outside, tensors in [0, 1] inside."""
    low, span = network.low, network.high - network.low

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raw = attack.generate(x=(x.detach() * span + low).cpu().numpy(), y=y.cpu().numpy())
        return ((torch.from_numpy(np.asarray(raw)).to(x) - low) / span).clamp(0, 1)

    perturb.__qualname__ = type(attack).__qualname__
    return perturb
