"""One method's contestants in the benchmark: our trainer, its ideal, loops by hand, ART's own trainer."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerMadryPGD, AdversarialTrainerTRADESPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from art_saliency import _checks
from art_saliency.gradients import second_derivatives
from art_saliency.methods.base import Batch, auxiliary_modules, step_terms
from art_saliency.modes import full_float32
from art_saliency.networks import build_network
from art_saliency.trainers._plain_loops import BARE, PLAIN, plain_epoch
from art_saliency.trainers._timing import Turn, growth_of, waited
from art_saliency.trainers.arms import Arm
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.methods import TRAINERS
from art_saliency.trainers.runs import make_classifier
from art_saliency.training.cost import step_operations
from art_saliency.training.engine import PRECISIONS
from art_saliency.training.extensions import Extension
from art_saliency.training.loop import Run

__all__ = ["Contestants", "Setting"]

_WARM_UPS = ("ramp", "warmup_share", "eps_warmup_share", "aux_warmup_share")


@dataclass(frozen=True)
class Setting:
    """
    What all contestants have in common.

    :ivar network: The arguments of :func:`art_saliency.networks.build_network`. :ivar eps: Radius in [0, 1].
    :ivar max_iter: Attack steps of the methods that iterate. :ivar batch_size: Images a step.
    :ivar steps: Steps of a turn. :ivar rounds: Turns that count. :ivar memory_turns: Turns that measure memory; 0 measures none.
    :ivar precision: ``"32-true"``, or ``"bf16-mixed"`` where a method allows it. :ivar device: ``"cpu"`` or ``"cuda:N"``.
    :ivar seed: Of weights, images, orders.
    """

    network: Mapping[str, Any]
    eps: float = 8 / 255
    max_iter: int = 10
    batch_size: int = 128
    steps: int = 2
    rounds: int = 20
    memory_turns: int = 2
    precision: str = "32-true"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.real("eps", self.eps, above=0, most=1)
        for name, least in {"max_iter": 1, "batch_size": 2, "steps": 1, "rounds": 1, "memory_turns": 0}.items():
            _checks.whole(name, getattr(self, name), least=least)
        _checks.seed(self.seed)
        _checks.one_of("precision", self.precision, PRECISIONS)


class _Probe(Extension):
    """
    Times the steps of one ``fit`` and the end of its epoch.

    :param keep: Whether the batches are kept as the loop made them; else they take no memory beyond their step.
    """

    def __init__(self, device: torch.device, *, keep: bool) -> None:
        self.device, self.keep = device, keep
        self.batches: list[Batch] = []
        self.start = self.seconds = self.end = 0.0

    def on_start(self, run: Run) -> None:
        self.start = waited(self.device)

    def after_step(self, run: Run) -> None:
        assert run.batch is not None
        if self.keep:
            self.batches.append(run.batch)
        if run.step == run.batches.steps_per_epoch:
            self.seconds = (waited(self.device) - self.start) / run.step

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        self.end = waited(self.device) - self.start - self.seconds * run.step


class Contestants:
    """One method's contestants. They take turns on one network and one optimizer, so that nothing differs but the loop."""

    def __init__(self, arm: Arm, setting: Setting, x: Tensor, y: Tensor, folder: Path) -> None:
        self.arm, self.setting, self.x, self.y = arm, setting, x, y
        if arm.options:
            raise _checks.refuse("methods", repr(arm.name), "a method and its parameters", "leave a run's options out")
        kind = TRAINERS[arm.trainer]
        self.device = torch.device(setting.device)
        torch.manual_seed(setting.seed)
        model = build_network(**{**setting.network, **arm.network})
        self.classifier: PyTorchClassifier = make_classifier(
            model,
            input_shape=tuple(setting.network["input_shape"]),
            num_classes=setting.network["num_classes"],
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4),
            device=self.device,
        )
        self.trainer = kind(self.classifier, **_parameters(kind, model, arm, setting))
        self.name = self.trainer.objective.name
        self.base = None if self.name == kind.method_name() else self.name  # the method under an FSR layer
        if self.trainer.objective.needs_maps:  # the teacher's cost is not a step's: its maps are made once and kept
            teacher: Any = copy.deepcopy(self.classifier.model).requires_grad_(False).eval()
            self.trainer.objective.teacher = teacher
            self.trainer.maps_file = folder / f"{arm.folder}.pt"
        # A penalty on input gradients is refused in half precision.
        self.precision = "32-true" if self.trainer.objective.double_backward else setting.precision
        self.ends: list[float] = []
        self.batches: list[Batch] = []

    @property
    def arithmetic(self) -> str:
        """:return: Its precision, and whether TF32 is off."""
        return self.precision + ", full" * self.trainer.objective.full_float32

    def turns(self) -> dict[str, Turn]:
        """:return: The contestants that there are for this method."""
        found: dict[str, Turn] = {"loop": self.loop, "ideal": self.ideal}
        if self.base is None:
            if self.name in PLAIN:
                found["plain"] = self.plain
                found["bare"] = self.bare
            if self.name in _ART:
                found["art"] = partial(self.art, inner=None)
                found["art-full"] = partial(self.art, inner=self.setting.batch_size)
        return found

    def loop(self) -> float:
        """Our trainer, as a user calls it; from the start of the first step to the end of the last."""
        probe = _Probe(self.device, keep=not self.batches)
        self.trainer.fit(
            self.x,
            self.y,
            batch_size=self.setting.batch_size,
            nb_epochs=1,
            seed=self.setting.seed,
            precision=self.precision,
            extensions=[probe],
            verbose=False,
        )
        self.ends.append(probe.end / probe.seconds)
        self.batches = self.batches or probe.batches
        return probe.seconds

    def ideal(self) -> float:
        """The objective's own passes and the optimizer's step, on batches that the loop made earlier."""
        if not self.batches:
            self.loop()
        model, optimizer, objective = self.classifier.model, self.classifier.optimizer, self.trainer.objective
        model.train()
        start = waited(self.device)
        for batch in self.batches:
            with second_derivatives(objective.double_backward), full_float32(objective.full_float32):
                with _autocast(self.device, self.precision):
                    loss = step_terms(objective, model, batch).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        seconds = waited(self.device) - start
        for module in auxiliary_modules(model):
            module.start_step(None)
        return seconds / len(self.batches)

    def plain(self) -> float:
        """A loop as people write it: float32, a ``DataLoader``."""
        size = self.setting.batch_size
        data = TensorDataset(self.x.float() / 255, self.y)
        loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=size, shuffle=True)
        model, optimizer = self.classifier.model, self.classifier.optimizer
        start = waited(self.device)
        plain_epoch(PLAIN[self.name], model, optimizer, loader, self.device, self.setting.eps, self.setting.max_iter)
        return (waited(self.device) - start) / len(loader)

    def bare(self) -> float:
        """The passes written by hand, on resident batches, in the method's precision."""
        if not self.batches:
            self.loop()
        model, optimizer = self.classifier.model, self.classifier.optimizer
        loss, eps, max_iter = BARE[self.name], self.setting.eps, self.setting.max_iter
        model.train()
        start = waited(self.device)
        for batch in self.batches:
            with _autocast(self.device, self.precision):
                value = loss(model, batch.x, batch.y, eps, max_iter)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return (waited(self.device) - start) / len(self.batches)

    def art(self, inner: int | None) -> float:
        """ART's own trainer. :param inner: The batch size of its attack; ``None`` leaves ART's own, 32."""
        setting = self.setting
        x, y = (self.x.float() / 255).numpy(), self.y.numpy()
        fit = _ART[self.name](self.classifier, setting.eps, setting.max_iter, inner)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be switched off
            start = waited(self.device)
            fit(x, y, batch_size=setting.batch_size, nb_epochs=1)
            return (waited(self.device) - start) / setting.steps

    def extra_memory(self) -> int | None:
        """:return: Peak bytes of our trainer beyond those of the ideal: beyond network, optimizer, batch and activations."""
        found: list[int] = []
        self.ideal()  # after the loop, once: what is taken for the first time counts for neither
        for _ in range(self.setting.memory_turns):
            loop, ideal = growth_of(self.loop, self.device), growth_of(self.ideal, self.device)
            if loop is not None and ideal is not None:
                found.append(loop - ideal)
        return sorted(found)[len(found) // 2] if found else None

    def operations(self) -> int:
        """:return: Of a step."""
        return step_operations(self.classifier.model, self.trainer.objective, self.batches[0])


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "32-true")


def _parameters(kind: type[ObjectiveTrainer], model: nn.Module, arm: Arm, setting: Setting) -> dict[str, Any]:
    """The common radius and attack steps, and every term at full weight from the first step on."""
    known = kind.all_parameter_names(arm.parameters)
    common = {"max_iter": setting.max_iter, **dict.fromkeys(_WARM_UPS, 0.0)}
    given = {name: value for name, value in common.items() if name in known}
    return {**kind.defaults_for(model), "eps": setting.eps, **given, **arm.parameters}


# --- ART's own -------------------------------------------------------------------------------------------------------

Fit = Callable[..., Any]


def _madry(classifier: PyTorchClassifier, eps: float, max_iter: int, inner: int | None) -> Fit:
    trainer = AdversarialTrainerMadryPGD(classifier, eps=eps, eps_step=2.5 * eps / max_iter, max_iter=max_iter)
    if inner is not None:
        trainer.attack.set_params(batch_size=inner)
    fit: Fit = trainer.fit
    return fit


def _trades(classifier: PyTorchClassifier, eps: float, max_iter: int, inner: int | None) -> Fit:
    size = {} if inner is None else {"batch_size": inner}
    attack = ProjectedGradientDescent(
        classifier, eps=eps, eps_step=2.5 * eps / max_iter, max_iter=max_iter, num_random_init=1, verbose=False, **size
    )
    fit: Fit = AdversarialTrainerTRADESPyTorch(classifier, attack, beta=6.0).fit
    return fit


_ART: dict[str, Callable[[PyTorchClassifier, float, int, int | None], Fit]] = {"pgd-at": _madry, "trades": _trades}
