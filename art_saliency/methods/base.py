"""
What a training method is: an :class:`Objective` that turns a batch into :class:`LossTerms`.

An objective owns no optimizer, no device and no epoch. The loop minimises ``loss``, reports ``logits`` and logs ``terms``;
it knows no method. Constructor arguments are stored as attributes of the same name (scikit-learn's convention), so that
:meth:`Objective.config` can write them down.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast, get_args, get_origin, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack, get_type_hints

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack
from art_saliency.randomness import RandomSource

__all__ = [
    "Attack",
    "AuxiliaryLoss",
    "Batch",
    "LossTerms",
    "Objective",
    "auxiliary_modules",
    "auxiliary_terms",
    "step_terms",
    "warmup",
]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x, y) -> x_adv, all (N, C, H, W) in [0, 1]: an inner maximisation of the user's own."""


@dataclass
class Batch:
    """
    One training batch on the device.

    :ivar x: (N, C, H, W) in [0, 1].
    :ivar y: (N,) int64; (N, K) soft labels where the method allows them.
    :ivar index: (N,) int64, each image's place in the training set; ``None`` for a stream without stable places.
    :ivar progress: The share of the run that is over, 0 to 1.
    :ivar maps: Per-image maps (N, M, H, W) that the augmentation moved with `x`; ``None`` when there are none.
    :ivar random: Where an objective draws its random numbers; ``None`` is torch's global generator.
    :ivar target_model: A slow copy (EMA) of the network, for objectives whose ``needs_target_model`` is true.
    :ivar kept: Where an objective that is asked twice about one batch keeps what its inner maximisation found (and where the random
        numbers then stood); ``None`` keeps nothing.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    progress: float = 0.0
    maps: Tensor | None = None
    random: RandomSource | None = None
    target_model: nn.Module | None = None
    kept: dict[str, Any] | None = None


@dataclass
class LossTerms:
    """
    What an objective returns.

    :ivar loss: Scalar, to be minimised.
    :ivar logits: (N, K) of the train-mode forward that is reported as training accuracy: the adversarial branch of an
        adversarial method. They are the last N rows of the step's last train-mode forward but for side passes, which
        :func:`~art_saliency.modes.side_pass` marks.
    :ivar terms: Every component by name, scalars, detached and without their weights.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """
    A training method. Subclasses define ``name``, a keyword-only constructor and :meth:`forward`.

    :cvar name: The method's name on the command line and in records.
    :cvar pixel_units: The constructor arguments that are distances in image space; at the ART edge they are given in units of
        ``clip_values``.
    :cvar soft_labels: Whether (N, K) labels are allowed.
    :cvar single_step: Whether the inner maximisation takes one step, so that catastrophic overfitting is to be watched for.
    :cvar double_backward: Whether the loss holds input gradients; such terms are formed in float32 only.
    :cvar full_float32: Whether nearby passes are subtracted, which the rounding of TF32, a GPU's own, would drown.
    :cvar needs_target_model: Whether ``batch.target_model`` must be there.
    :cvar eps_warmup_share: The share of the run over which the radius of training rises from 0.
    """

    name: ClassVar[str]
    pixel_units: ClassVar[tuple[str, ...]] = ("eps", "eps_step")
    soft_labels: ClassVar[bool] = False
    single_step: ClassVar[bool] = False
    double_backward: ClassVar[bool] = False
    full_float32: bool = False
    needs_target_model: bool = False
    eps_warmup_share: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Write the constructor's signature out, for ``help()``, editors and :meth:`parameter_names`."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__signature__ = _written_out(cls)  # type: ignore[attr-defined]

    @property
    def needs_maps(self) -> bool:
        """Whether ``batch.maps`` is read: the trainer then makes them once, by ``cached_maps`` and ``full_maps``."""
        return False

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """
        The loss of one batch.

        :param model: Maps (N, C, H, W) in [0, 1] to logits; in train mode.
        :param batch: The batch.
        :return: Loss, logits and named terms.
        """

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """:return: The constructor's keyword arguments."""
        return tuple(inspect.signature(cls).parameters)

    def config(self) -> dict[str, Any]:
        """:return: Constructor arguments, JSON-able; a callable is written as ``{"callable": its name}`` and cannot be read back."""
        return {name: _plain(getattr(self, name)) for name in self.parameter_names()}

    def check_network(self, model: nn.Module, x: Tensor) -> None:
        """
        Refuse, before any work starts, a network that this method cannot train. Its modes and weights stay as they are.

        :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: Two images.
        """

    def radius(self, progress: float) -> float:
        """:return: The share of eps in force after `progress` (0 to 1) of the run: it rises linearly over ``eps_warmup_share``."""
        return warmup(progress, self.eps_warmup_share)

    def epoch_warnings(self, record: Mapping[str, Any]) -> list[str]:
        """
        What an epoch's figures should make the user worry about.

        :param record: The epoch's means, every term by name.
        :return: Sentences; those of the first epoch that has any are given as warnings. None by default.
        """
        return []

    def adaptive_variants(self) -> Mapping[str, AdaptiveAttack]:
        """:return: Attacks made for this method, by name, for the audit to try. None by default."""
        return {}

    def extra_repr(self) -> str:
        """:return: The constructor arguments, as ``repr`` shows them."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.parameter_names())


def _written_out(cls: type[Objective]) -> inspect.Signature:
    """
    A constructor's signature, with what its ``**options`` stands for: the parameters that it hands on to its base.

    They are the keys of ``Unpack[...]`` where the options are typed so, and all that the base takes where they are not.
    """
    own = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    rest = next((p for p in own.values() if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return inspect.Signature(list(own.values()))
    del own[rest.name]
    inherited = inspect.signature(cls.__mro__[1]).parameters
    hint = get_type_hints(cls.__init__, include_extras=True).get(rest.name)
    handed_on = get_type_hints(get_args(hint)[0]) if get_origin(hint) is Unpack else inherited
    return inspect.Signature(
        [p for name, p in inherited.items() if name in handed_on and name not in own] + [*own.values()]
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Objective):
        return {"objective": value.name, **value.config()}
    settings: dict[str, Any] = getattr(value, "attack_settings", dict)()  # of somebody else's attack
    return {"callable": getattr(value, "__qualname__", type(value).__qualname__), **settings}


@runtime_checkable
class AuxiliaryLoss(Protocol):
    """
    A module inside the network that adds a loss of its own to whatever objective trains it (an FSR layer).

    The loss belongs to the last ``len(y)`` rows of the last train-mode forward of the step that is no side pass: inside
    :func:`~art_saliency.modes.side_pass` a module's flag ``recording``, where it has one, is off.
    """

    def start_step(self, random: RandomSource | None, progress: float = 1.0) -> None:
        """
        Forget the previous step; random numbers drawn in this one are shared by all its train-mode forwards.

        :param random: Where they come from; ``None`` ends the last step. :param progress: The share of the run that is over.
        """

    def auxiliary_loss(self, logits: Tensor, y: Tensor) -> LossTerms:
        """:return: The weighted loss, the logits as given, and the unweighted terms."""


def auxiliary_modules(model: nn.Module) -> list[AuxiliaryLoss]:
    """:return: The modules of the network that add a loss, in order."""
    # mypy takes the class for unhashable, as it takes nn.Module's objects for
    return [cast(AuxiliaryLoss, module) for module in model.modules() if _adds_loss(type(module))]  # type: ignore[arg-type]


@functools.cache
def _adds_loss(kind: Any) -> bool:
    """Asked of the class, once: Python takes 14 microseconds to compare an object with a protocol, and a step asks every module."""
    return issubclass(kind, AuxiliaryLoss)


def auxiliary_terms(modules: list[AuxiliaryLoss], logits: Tensor, y: Tensor) -> LossTerms:
    """
    The loss that the network's own modules add: the mean over the modules, loss and terms alike.

    :param modules: What :func:`auxiliary_modules` found; not empty.
    :param logits: (N, K), as the objective returned them.
    :param y: (N,).
    """
    parts = [module.auxiliary_loss(logits, y) for module in modules]
    names = dict.fromkeys(name for part in parts for name in part.terms)
    terms = {name: torch.stack([part.terms[name] for part in parts if name in part.terms]).mean() for name in names}
    return LossTerms(torch.stack([part.loss for part in parts]).mean(), logits, terms)


def step_terms(objective: Objective, model: nn.Module, batch: Batch) -> LossTerms:
    """:return: What a training step minimises: the objective's loss and what the network's own modules (FSR) add to it."""
    modules = auxiliary_modules(model)
    for module in modules:
        module.start_step(batch.random, batch.progress)
    result: LossTerms = objective(model, batch)
    if not modules:
        return result
    extra = auxiliary_terms(modules, result.logits, batch.y)
    return LossTerms(result.loss + extra.loss, result.logits, {**result.terms, **extra.terms})


def warmup(progress: float, share: float) -> float:
    """:return: A weight's factor that rises linearly from 0 to 1 over the first `share` of the run."""
    _checks.real("progress", progress, least=0, most=1)
    return 1.0 if share <= 0 else min(1.0, progress / share)
