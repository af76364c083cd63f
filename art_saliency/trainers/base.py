"""The adapter between ART and the loop: an ART ``Trainer`` that trains a ``PyTorchClassifier`` by an objective."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from art.data_generators import DataGenerator, NumpyDataGenerator, PyTorchDataGenerator
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from art_saliency import _checks
from art_saliency._batch_sizes import batches_in, too_few
from art_saliency.data import held_out_count, stratified_split, to_unit
from art_saliency.errors import NoEffectWarning, UnsupportedModelError
from art_saliency.methods.base import Objective
from art_saliency.modes import channels_last
from art_saliency.threat import ThreatModel
from art_saliency.trainers.identity import digest_of_pair, identity_of_run, word
from art_saliency.trainers.network import ClassifierNetwork, check_optimizer, check_train_mode, check_trainable
from art_saliency.trainers.options import RunOptions
from art_saliency.trainers.teacher import teacher_maps, trained_teacher
from art_saliency.training.batches import Batches, ImageView, ResidentBatches, StreamedBatches
from art_saliency.training.checkpoint import MAPS, Checkpoints
from art_saliency.training.engine import Engine, launched
from art_saliency.training.extensions import OverfittingWatch, PlateauWatch, SameBatches, Validation
from art_saliency.training.loop import train
from art_saliency.training.records import History, Progress
from art_saliency.training.schedules import Schedule

__all__ = ["ObjectiveTrainer"]

_LEAST_EPS = 1e-3  # of the pixel range: a radius below it is one of another range, such as 8/255 where pixels go to 255
_SILENT = ("verbose", "summary_writer")  # parameters of ART's attacks that change nothing in what they find


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
        own = inspect.signature(cls.objective_class).parameters.values()
        first = [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("classifier", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=PyTorchClassifier),
        ]

        def construct(self: ObjectiveTrainer, classifier: PyTorchClassifier, **parameters: Any) -> None:
            super(cls, self).__init__(classifier, **parameters)

        construct.__signature__ = inspect.Signature([*first, *own])  # type: ignore[attr-defined]
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
        self.kept_weights: dict[str, dict[str, Tensor]] = {}
        """By "best" and "last", state dicts of the classifier's model, after a ``fit`` with validation data."""

    @classmethod
    def method_name(cls) -> str:
        """:return: What the method is called on the command line and in records."""
        return cls.objective_class.name

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """:return: The constructor's keywords."""
        return cls.objective_class.parameter_names()

    @classmethod
    def objective_for(cls, parameters: Mapping[str, Any]) -> type[Objective]:
        """:return: The objective that the constructor makes of these parameters."""
        return cls.objective_class

    @classmethod
    def all_parameter_names(cls, parameters: Mapping[str, Any]) -> set[str]:
        """:return: The constructor's keywords, and those that it passes on to the objective that these parameters choose."""
        return {*cls.parameter_names(), *cls.objective_for(parameters).parameter_names()}

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
        # A trainer's own were taken out before; an unknown name is answered with all that there are.
        known = dict.fromkeys([*objective.parameter_names(), *cls.parameter_names()])
        _checks.no_unknown(cls.__name__, parameters, known)
        signature = inspect.signature(objective).parameters
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
            found = _checks.real(name, value, least=0, most=span if name == "eps" and linf else None) / span
            if name == "eps" and 0 < found < _LEAST_EPS:
                warnings.warn(
                    f"eps: got {value:.4g} where pixels range over {span:g}, expected more than a thousandth of that: distances are in the "
                    f"units of clip_values; eps={value * span:.4g} is what {value:.4g} is of a range of 1",
                    NoEffectWarning,
                    stacklevel=5,
                )
            return found
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
        Train the classifier. Its weights change; its train/eval modes come back as they were, and after a scheduler of a name the
        learning rate.

        :param x: (N, C, H, W) array or tensor within ``clip_values``; or, where these are (0, 1) or (0, 255), uint8 from 0 to 255.
        :param y: (N,) indices or (N, K) one-hot rows; soft labels where the method allows them.
        :param validation_data: (x, y) of held-out images: clean and PGD accuracy are measured on them and stand in the history.
        :param batch_size: Images a step.
        :param nb_epochs: Passes over the data.
        :param scheduler: ``"cosine"``, ``"step"``, ``"onecycle"``, or any torch scheduler (stepped once an epoch).
        :param kwargs: The fields of :class:`RunOptions`: ``seed``, ``augment``, ``grad_clip``, ``deterministic``, ``precision``, ``channels_last``,
            ``validate_every``, ``validation_split``, ``selection``, ``patience``, ``ema``, ``swa_from``, ``awp``,
            ``label_smoothing``, ``checkpoint_dir``, ``checkpoint_every``, ``resume``, ``extensions``, ``verbose``. An unknown
            keyword is refused.
        :raises InputError: When data or options are refused: before any work starts, with nothing changed.
        :raises UnsupportedModelError: When the method cannot train this network: likewise.
        :raises CheckpointError: When checkpoints cannot be read or written.
        :raises NonFiniteLossError: When the loss is NaN or Inf, with the last finite weights put back.
        :raises TrainingInterrupted: By SIGINT or SIGTERM, where there is a ``checkpoint_dir``.
        """
        options = RunOptions.checked(f"{type(self).__name__}.fit", kwargs)
        self._check_options(options, validated=validation_data is not None or options.validation_split > 0)
        batch_size, nb_epochs = self._check_run(batch_size, nb_epochs, scheduler, options)
        checkpoints = options.checkpoints()
        images, targets = self._viewed(x, y)
        validation = None if validation_data is None else self._validation(validation_data)
        options = options.seeded(None if checkpoints is None else checkpoints.identity.get("seed"))
        if validation is None and options.validation_split:
            assert options.seed is not None
            images, targets, validation = _hold_out(images, targets, options.validation_split, options.seed)
        self._check_batches(len(images), batch_size)
        if checkpoints is not None:
            data = {"training": digest_of_pair(images, targets)}
            self._claim(checkpoints, data, validation, nb_epochs, batch_size, scheduler, options)

        def batches(**maps: Any) -> ResidentBatches:
            return ResidentBatches(
                images,
                targets,
                batch_size=batch_size,
                device=self._device,
                augment=options.augment,
                world_size=launched()[1],
                **maps,
            )

        maps = self._maps(images, targets, batches, nb_epochs, options, checkpoints)
        self._train(batches(**maps), nb_epochs, scheduler, validation, options, checkpoints)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """
        Train the classifier from a stream.

        :param generator: An ART ``DataGenerator`` or a torch ``DataLoader`` that yields (x, y) as :meth:`fit` takes them.
        :param nb_epochs: Passes over the stream.
        :param kwargs: ``validation_data`` and ``scheduler`` as in :meth:`fit`, and the fields of :class:`RunOptions`. A run with a
            ``checkpoint_dir`` needs a ``DataLoader``, which can begin an epoch again; of its content, what the data set's
            ``fingerprint()`` says is compared, if it has one. A last batch that leaves a process less than two images is left out.
            Several processes load every batch, each for itself, and train on their own rows: it must be the same in all of them.
        """
        validation_data, scheduler = kwargs.pop("validation_data", None), kwargs.pop("scheduler", None)
        options = RunOptions.checked(f"{type(self).__name__}.fit_generator", kwargs)
        if options.validation_split:
            raise _checks.refuse(
                "validation_split", str(options.validation_split), "0 for a stream", "give validation_data"
            )
        self._check_options(options, validated=validation_data is not None)
        if isinstance(generator, PyTorchDataGenerator):
            generator = generator.iterator  # the loader that it wraps
        make, steps, batch_size = _stream(generator)
        if options.checkpoint_dir is not None and not isinstance(generator, DataLoader):
            got = f"{type(generator).__name__}, which cannot begin an epoch again"
            raise _checks.refuse("generator", got, "a torch DataLoader for a run with a checkpoint_dir")
        if options.checkpoint_dir is not None and not _workers_begin_anew(generator):
            got = "a DataLoader with persistent_workers, whose random states no checkpoint holds"
            raise _checks.refuse("generator", got, "one without, for a run with a checkpoint_dir")
        batch_size, nb_epochs = self._check_run(batch_size, nb_epochs, scheduler, options)
        checkpoints = options.checkpoints()
        self._check_batches(batch_size, batch_size)
        validation = None if validation_data is None else self._validation(validation_data)
        if checkpoints is not None:
            options = options.seeded(checkpoints.identity.get("seed"))
            data = {"stream": f"{steps} batches", "dataset": type(generator.dataset).__name__}
            if callable(content := getattr(generator.dataset, "fingerprint", None)):  # as files of images have it
                data["content"] = content()
            self._claim(checkpoints, data, validation, nb_epochs, batch_size, scheduler, options)
        options = options.seeded()
        batches = StreamedBatches(
            make,
            lambda x, y: self.prepare(x, y),
            steps_per_epoch=steps,
            device=self._device,
            augment=options.augment,
            generators=_generators(generator),
            shared=torch.Generator().manual_seed(options.seed or 0) if launched()[1] > 1 else None,
        )
        self._train(batches, nb_epochs, scheduler, validation, options, checkpoints)

    def predict(self, x: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """
        The classifier's logits.

        :param x: As in :meth:`fit`.
        :param kwargs: Passed to ``PyTorchClassifier.predict``.
        :return: (N, K).
        """
        self._network.read(self._classifier)
        low, high = self._network.low, self._network.high
        images = self._images("x", x)
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
        images, targets = self._viewed(x, y, name=name)
        return images[:], targets

    def _viewed(self, x: Any, y: Any, *, name: str = "x") -> tuple[ImageView, Tensor]:
        """:meth:`prepare`, with images that a file holds left there."""
        images = self._images(name, x)
        soft, label_name = self.objective.soft_labels, "y" if name == "x" else f"labels of {name}"
        targets = _checks.labels(y, len(images), self._classifier.nb_classes, name=label_name, soft=soft)
        if _checks.is_mapped(x):
            return ImageView(images, convert=self._to_unit_range), targets
        return ImageView(self._to_unit_range(images)), targets

    def _validation(self, validation_data: Any) -> tuple[ImageView, Tensor]:
        """Images to be measured on, and the class of each: of soft labels the likeliest."""
        images, targets = self._viewed(*_pair(validation_data), name="validation_data")
        return images, targets if targets.ndim == 1 else targets.argmax(1)

    def _to_unit_range(self, images: Tensor) -> Tensor:
        """:return: Images within ``clip_values`` in [0, 1]; uint8 as it is."""
        low, high = self._network.low, self._network.high
        if images.dtype == torch.uint8:
            return images
        images = images.float()
        return images if (low, high) == (0.0, 1.0) else ((images - low) / (high - low)).clamp_(0, 1)

    def _images(self, name: str, x: Any) -> Tensor:
        low, high = self._network.low, self._network.high
        whole_bytes = (low, high) in ((0.0, 255.0), (0.0, 1.0))
        images = _checks.images(
            x, name=name, low=low, high=high, shape=tuple(self._classifier.input_shape), allow_uint8=whole_bytes
        )
        return images if high != 1 else _checks.bytes_of_pixels(name, images)

    def _maps(
        self,
        images: ImageView,
        targets: Tensor,
        batches: Callable[[], Batches],
        epochs: int,
        options: RunOptions,
        checkpoints: Checkpoints | None,
    ) -> dict[str, Any]:
        """Per-image maps that the augmentation moves with the images, where the objective reads them."""
        objective: Any = self.objective
        if not objective.needs_maps:
            return {}
        # The objective keeps no teacher that was trained here: a second fit starts from a network of its own.
        teacher, maps_file = objective.teacher, self.maps_file
        if teacher is None:
            teacher = trained_teacher(
                self._network,
                self._classifier.optimizer,
                batches(),
                self.teacher_epochs or epochs,
                Engine(self._device),
                options,
                None if checkpoints is None else checkpoints.below("teacher"),
            )
        if maps_file is None and checkpoints is not None:
            maps_file = checkpoints.folder / MAPS
        if launched()[0] and maps_file is not None and not os.path.exists(maps_file):
            maps_file = None  # of several processes the first alone writes
        return teacher_maps(objective, teacher, images, targets, maps_file=maps_file, verbose=options.verbose)

    def _claim(
        self,
        checkpoints: Checkpoints,
        data: dict[str, Any],
        validation: tuple[ImageView, Tensor] | None,
        epochs: int,
        batch_size: int,
        scheduler: Any,
        options: RunOptions,
    ) -> None:
        """Refuse a folder that holds another run, before any work starts."""
        checkpoints.belong_to(
            identity_of_run(
                self,
                self._network,
                self._classifier.optimizer,
                scheduler,
                options,
                device=self._device,
                data={**data, "validation": None if validation is None else digest_of_pair(*validation)},
                epochs=epochs,
                batch_size=batch_size,
            ),
            Engine(self._device) if launched()[1] > 1 else None,
        )

    def _check_run(self, batch_size: Any, nb_epochs: Any, scheduler: Any, options: RunOptions) -> tuple[int, int]:
        """:return: Batch size and epochs, as numbers of Python's own."""
        if options.precision != "32-true" and self.objective.double_backward:
            # An input gradient under bf16 autocast was measured 21 % off: a penalty on it would be on noise.
            raise _checks.refuse(
                "precision",
                repr(options.precision),
                f"'32-true' for {self.method_name()}, which differentiates input gradients",
            )
        self._network.read(self._classifier)
        batch_size = _checks.whole("batch_size", batch_size, least=1)
        nb_epochs = _checks.whole("nb_epochs", nb_epochs, least=1)
        Schedule.checked(scheduler, nb_epochs)
        known = scheduler is None or isinstance(scheduler, str) or hasattr(scheduler, "state_dict")
        if options.checkpoint_dir is not None and not known:
            got = f"{type(scheduler).__name__} without state_dict()"
            raise _checks.refuse(
                "scheduler", got, "one that can be kept", "give a torch scheduler or no checkpoint_dir"
            )
        _check_ranks(launched()[1], batch_size, options)
        x = check_trainable(self._network, self._classifier)
        check_optimizer(self._network, self._classifier)
        self.objective.check_network(self._network, x)
        check_train_mode(self._network, x, self._classifier.nb_classes)
        return batch_size, nb_epochs

    def _check_options(self, options: RunOptions, *, validated: bool) -> None:
        """Refuse options that this method, or this run without validation data, cannot follow."""
        for name, asked in (("selection", options.selection == "best"), ("patience", options.patience is not None)):
            if asked and not validated:
                raise _checks.refuse(
                    name,
                    f"{getattr(options, name)!r} without validation data",
                    "held-out images to measure on",
                    "pass validation_data=(x, y) or, to fit, validation_split=0.1",
                )
        if options.label_smoothing and not self.objective.soft_labels:
            expected = f"0 for {self.objective.name}, which needs one true class an image"
            raise _checks.refuse("label_smoothing", f"{options.label_smoothing:g}", expected)
        if options.label_smoothing and getattr(self.objective, "label_smoothing", 0):
            raise _checks.refuse(
                "label_smoothing", "one for the method and one for the run", "one of them", "it would smooth twice"
            )
        if self.objective.needs_target_model and options.ema is None:
            expected = f"a decay: {self.objective.name} asks for a slow copy of the network"
            raise _checks.refuse("ema", "None", expected, "pass ema=0.999")

    def _check_batches(self, count: int, batch_size: int) -> None:
        if too_few(min(count, batch_size), launched()[1]) and any(
            isinstance(child, _BatchNorm) for child in self._network.modules()
        ):
            what = "batch_size" if batch_size == 1 else "x"
            raise _checks.refuse(what, "a batch of one image", "at least 2 for a network with BatchNorm")

    def _train(
        self,
        batches: Batches,
        epochs: int,
        scheduler: Any,
        validation: tuple[ImageView, Tensor] | None,
        options: RunOptions,
        checkpoints: Checkpoints | None,
    ) -> None:
        assert options.seed is not None
        threat: ThreatModel | None = getattr(self.objective, "threat", None)
        extensions, selection = options.additions(self._classifier.nb_classes), options.selecting()
        if validation is not None:
            extensions += [Validation(*validation, threat=threat, every=options.validate_every), selection]
        if self.objective.single_step and threat is not None:
            extensions.append(OverfittingWatch(threat))
        extensions.append(PlateauWatch())
        if isinstance(batches, StreamedBatches) and launched()[1] > 1:
            extensions.append(SameBatches(batches))
        extensions.extend(options.extensions)
        if options.verbose:
            extensions.append(Progress(self.method_name()))
        self.history, self.kept_weights = History(), {}
        with channels_last(self._network) if options.channels_last else nullcontext():
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
                checkpoints=checkpoints,
            )
        inner = "network."  # as ClassifierNetwork calls the classifier's own model
        self.kept_weights = {
            which: {name.removeprefix(inner): value for name, value in weights.items()}
            for which, weights in selection.weights.items()
        }


def _check_ranks(count: int, batch_size: int, options: RunOptions) -> None:
    """Refuse what several processes cannot do together."""
    if count == 1:
        return
    together = f"for {count} processes that train together"
    if batch_size % count:
        raise _checks.refuse("batch_size", str(batch_size), f"a multiple of {count} {together}", "it is of all of them")
    if options.seed is None:
        raise _checks.refuse("seed", "None", f"a number {together}", "each would draw another")


def _pair(validation_data: Any) -> tuple[Any, Any]:
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
        raise _checks.refuse("validation_data", type(validation_data).__name__, "a pair (x, y)")
    return validation_data[0], validation_data[1]


def _hold_out(x: ImageView, y: Tensor, share: float, seed: int) -> tuple[ImageView, Tensor, tuple[ImageView, Tensor]]:
    """Split off a validation set at random, class by class, the same for the same seed. No image is copied."""
    hard = y if y.ndim == 1 else y.argmax(1)
    kept, held = stratified_split(hard, held_out_count(share, len(x)), seed)
    return x.among(kept), y[kept], (x.among(held), hard[held])


def _stream(generator: Any) -> tuple[Callable[[], Iterator[Any]], int, int]:
    """:return: What makes an epoch's iterator, the batches an epoch has, and the batch size."""
    ranks = launched()[1]
    if isinstance(generator, DataLoader):
        try:
            steps = len(generator)
        except TypeError:
            got = f"a DataLoader of a {type(generator.dataset).__name__} without a length"
            raise _checks.refuse("generator", got, "one whose batches can be counted", "give it __len__") from None
        if not steps:
            raise _checks.refuse("generator", "a DataLoader without a batch", "one batch at least", "look at drop_last")
        size = generator.batch_size or 2
        if generator.batch_size and not generator.drop_last:
            drawn: Any = generator.dataset if isinstance(generator.dataset, IterableDataset) else generator.sampler
            steps = batches_in(len(drawn), size, ranks)
        return lambda: iter(generator), steps, size
    if isinstance(generator, DataGenerator):
        count, size = int(generator.size or 0), int(generator.batch_size)
        if not count:
            raise _checks.refuse(
                "generator", f"a {type(generator).__name__} of size None", "how many images an epoch has"
            )
        if isinstance(generator, NumpyDataGenerator):  # it can be gone through from its beginning, others only go on
            images = generator.batches_per_epoch * size if generator.drop_remainder else count
            return lambda: iter(generator), batches_in(images, size, ranks), size
        steps, whole = batches_in(count, size, ranks), math.ceil(count / size)

        def batches() -> Iterator[Any]:
            for step in range(steps):
                batch = generator.get_batch()
                if step == steps - 1:  # what is left out is taken too, or the next epoch would begin with it
                    for _ in range(steps, whole):
                        generator.get_batch()
                yield batch

        return batches, steps, size
    raise _checks.refuse("generator", type(generator).__name__, "an ART DataGenerator or a torch DataLoader")


def _workers_begin_anew(loader: Any) -> bool:
    """:return: Whether an epoch that is taken up again draws what it drew: workers that outlive an epoch keep generators of their own."""
    return not getattr(loader, "persistent_workers", False) or bool(getattr(loader, "stateless_workers", False))


def _generators(loader: Any) -> list[torch.Generator]:
    """:return: What a loader draws from beside torch's global generator, each once."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in own if isinstance(generator, torch.Generator)}.values())


def _art_attack(attack: Any, network: ClassifierNetwork) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """An ART evasion attack as an inner maximisation: arrays in the classifier's range outside, tensors in [0, 1] inside."""
    if getattr(attack, "targeted", False):
        got, remedy = f"{type(attack).__name__} with targeted=True", "it would move every image towards its own class"
        raise _checks.refuse("attack", got, "an untargeted attack", remedy)
    low, span = network.low, network.high - network.low

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raw = attack.generate(x=(x.detach() * span + low).cpu().numpy(), y=y.cpu().numpy())
        return ((torch.from_numpy(np.asarray(raw)).to(x) - low) / span).clamp(0, 1)

    perturb.__qualname__ = type(attack).__qualname__
    names = [name for name in attack.attack_params if name not in _SILENT]
    perturb.attack_settings = lambda: {name: word(getattr(attack, name, None)) for name in names}  # type: ignore[attr-defined]
    return perturb
