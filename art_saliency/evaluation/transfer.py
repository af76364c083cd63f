"""Transferred attacks: how a network does on images that were made, with full knowledge, to fool other networks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.evaluation._autoattack_memory import weights_sha256
from art_saliency.evaluation._inputs import checked, pixels, reference_tensor, right_answers, unbroken
from art_saliency.evaluation.accuracy import binomial_interval, with_interval
from art_saliency.evaluation.transfer_attacks import TRANSFER_ATTACKS, ensemble_logits, transfer_attack
from art_saliency.files import sha256_of_tensors
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel, a_threat_model

__all__ = ["ENSEMBLE", "SURROGATES", "TransferResult", "TransferRow", "surrogates_for", "transfer"]

ENSEMBLE = "ensemble"
"""What all surrogates together are called in a result."""

SURROGATES = ("standard", "pgd-at", "same recipe, other seed")
"""What :func:`surrogates_for` trains."""


@dataclass(frozen=True)
class TransferRow:
    """
    One attack from one surrogate.

    :ivar surrogate: Its name, or :data:`ENSEMBLE`.
    :ivar attack: A name of :data:`~art_saliency.evaluation.transfer_attacks.TRANSFER_ATTACKS`.
    :ivar correct: Adversarial images that the network under test classifies correctly, whether or not the clean ones are.
    :ivar surrogate_correct: Those that the surrogate itself does: where they are many, the attack is weak and `correct`
        says little.
    :ivar count: Images.
    """

    surrogate: str
    attack: str
    correct: int
    surrogate_correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """:return: Of the network under test, 0 to 1."""
        return self.correct / self.count

    @property
    def surrogate_accuracy(self) -> float:
        """:return: Of the surrogate under its own attack, 0 to 1."""
        return self.surrogate_correct / self.count

    def to_json(self) -> dict[str, Any]:
        """:return: Both accuracies with their counts and 95 % intervals."""
        return {
            "surrogate": self.surrogate,
            "attack": self.attack,
            **_measured(self.correct, self.count),
            "on_surrogate": _measured(self.surrogate_correct, self.count),
        }


@dataclass(frozen=True, eq=False)
class TransferResult:
    """
    What transferred attacks did, and all that is needed to repeat it.

    :ivar correct: (N,) bool on the CPU: classified correctly clean and under every attack from every surrogate.
    :ivar rows: One for each surrogate and attack; the last surrogate is the ensemble, where there are several.
    :ivar clean_correct: Clean images that are classified correctly.
    :ivar surrogates_correct: The same of each surrogate.
    :ivar eps: In units of the [0, 1] pixel range. :ivar norm: ``"Linf"`` or ``"L2"``.
    :ivar attacks: What ran, with its settings.
    :ivar max_iter: Steps. :ivar eps_step: Length of one, in pixel units of [0, 1].
    :ivar seed: Of the input diversity. :ivar batch_size: The numbers it draws depend on it.
    :ivar weights_sha256: Of the network. :ivar surrogates_sha256: Of each surrogate. :ivar data_sha256: Of images and labels.
    :ivar versions: Of python, torch and numpy. :ivar seconds: Wall clock.
    """

    correct: Tensor = field(repr=False)
    rows: tuple[TransferRow, ...]
    clean_correct: int
    surrogates_correct: dict[str, int]
    eps: float
    norm: str
    attacks: dict[str, dict[str, Any]]
    max_iter: int
    eps_step: float
    seed: int
    batch_size: int
    weights_sha256: str
    surrogates_sha256: dict[str, str]
    data_sha256: str
    versions: dict[str, str]
    seconds: float

    @property
    def robust_accuracy(self) -> float:
        """:return: The transfer accuracy, 0 to 1: the mean of `correct`. An upper bound of AutoAttack's, as a rule far above it."""
        return int(self.correct.sum()) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """:return: Its 95 % interval."""
        return binomial_interval(int(self.correct.sum()), len(self.correct))

    @property
    def clean_accuracy(self) -> float:
        """:return: 0 to 1."""
        return self.clean_correct / len(self.correct)

    def to_json(self) -> dict[str, Any]:
        """:return: Everything but the tensor; every accuracy with its count and 95 % interval."""
        count = len(self.correct)
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("correct", "rows")}
        del shown["clean_correct"], shown["surrogates_correct"]
        return {
            **_measured(int(self.correct.sum()), count),
            "clean": _measured(self.clean_correct, count),
            "surrogates": {name: _measured(right, count) for name, right in self.surrogates_correct.items()},
            "rows": [row.to_json() for row in self.rows],
            **shown,
        }


def _measured(correct: int, count: int) -> dict[str, Any]:
    return with_interval(correct / count, count, correct=correct, count=count)


def transfer(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    surrogates: Mapping[str, nn.Module],
    threat: ThreatModel,
    attacks: Sequence[str] = tuple(TRANSFER_ATTACKS),
    max_iter: int = 10,
    eps_step: float | None = None,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = False,
) -> TransferResult:
    """
    Accuracy on images that were made to fool each surrogate, and all of them together.

    A network that resists these and falls to AutoAttack is not robust. One that falls to these and resists gradient attacks
    on itself hides its gradients.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K); evaluated in eval mode, its modes restored.
    :param x: (N, C, H, W) in [0, 1], or uint8; on any device.
    :param y: (N,) int64, or one-hot rows (N, K).
    :param surrogates: Networks by name, with the same input and classes, on the device and in the type of `model`. The
        network itself may be one: that row is a white-box attack.
    :param threat: Norm and radius, in units of the [0, 1] pixel range.
    :param attacks: Names of :data:`~art_saliency.evaluation.transfer_attacks.TRANSFER_ATTACKS`.
    :param max_iter: Steps of each attack. :param eps_step: Length of a step; ``None`` is 2.5 * eps / max_iter.
    :param batch_size: Images at once. :param seed: Every attack from every surrogate starts from it.
    :param progress: Whether a bar is shown on stderr.
    :return: The result.
    """
    began = time.perf_counter()
    names = _attack_names(attacks)
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    seed = _checks.seed(seed)
    max_iter = _checks.whole("max_iter", max_iter)
    a_threat_model(threat)
    step = 2.5 * threat.eps / max(max_iter, 1) if eps_step is None else _checks.real("eps_step", eps_step, least=0)
    images, targets = checked(model, x, y)
    like, images = (
        reference_tensor(model, images),
        to_unit(images.cpu()),
    )  # a GPU divides by 255 to other bits than are hashed
    sources = _sources(model, surrogates, pixels(images[:1], like))
    random = {(source, attack): RandomSource(seed, like.device) for source in sources for attack in names}
    found = {pair: [0, 0] for pair in random}
    standing, clean = torch.zeros(len(images), dtype=torch.bool), dict.fromkeys(surrogates, 0)
    clean_correct = 0
    with tqdm(total=len(images) * len(found), desc="transfer", unit="image", disable=not progress, leave=None) as bar:
        for rows, some, labels in _batches(images, targets, like, batch_size):
            left = _right([model], some, labels)
            clean_correct += int(left.sum())
            for name in surrogates:
                clean[name] += int(_right(sources[name], some, labels).sum())
            for (source, attack), counts in found.items():
                x_adv = transfer_attack(
                    sources[source],
                    some,
                    labels,
                    threat=threat,
                    max_iter=max_iter,
                    eps_step=step,
                    random=random[source, attack],
                    **TRANSFER_ATTACKS[attack],
                )
                x_adv = unbroken(x_adv, some)
                resisted = _right([model], x_adv, labels)
                counts[0] += int(resisted.sum())
                counts[1] += int(_right(sources[source], x_adv, labels).sum())
                left &= resisted
                bar.update(len(some))
            standing[rows] = left.cpu()
    return TransferResult(
        correct=standing,
        rows=tuple(TransferRow(*pair, right, own, len(images)) for pair, (right, own) in found.items()),
        clean_correct=clean_correct,
        surrogates_correct=clean,
        eps=threat.eps,
        norm=threat.norm,
        attacks={name: dict(TRANSFER_ATTACKS[name]) for name in names},
        max_iter=max_iter,
        eps_step=step,
        seed=seed,
        batch_size=batch_size,
        weights_sha256=weights_sha256(model),
        surrogates_sha256={name: weights_sha256(network) for name, network in surrogates.items()},
        data_sha256=sha256_of_tensors({"x": images.float(), "y": targets}),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        seconds=time.perf_counter() - began,
    )


def _batches(x: Tensor, y: Tensor, like: Tensor, batch_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """:return: Which images, their pixels and their labels, where the network is."""
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        yield rows, pixels(x[rows], like), y[rows].to(like.device)


def _right(networks: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) bool; logits that are not finite are no answer."""
    with evaluating(*networks), torch.no_grad():
        return right_answers(ensemble_logits(networks, x), y)


def _attack_names(attacks: Sequence[str]) -> list[str]:
    if isinstance(attacks, str):
        raise _checks.refuse("attacks", repr(attacks), "a sequence of names", f"write [{attacks!r}]")
    names = list(dict.fromkeys(_checks.one_of("attacks", name, TRANSFER_ATTACKS) for name in attacks))
    if not names:
        raise _checks.refuse("attacks", "no name", f"at least one of {', '.join(TRANSFER_ATTACKS)}")
    return names


def _sources(model: nn.Module, surrogates: Mapping[str, nn.Module], example: Tensor) -> dict[str, list[nn.Module]]:
    """:return: What attacks are made on, by name: each surrogate, and all of them where there are several; refused by name."""
    if not isinstance(surrogates, Mapping) or not surrogates:
        got = "none" if isinstance(surrogates, Mapping) else f"a {type(surrogates).__name__}"
        raise _checks.refuse("surrogates", got, "at least one network by its name", "write {'standard': network}")
    with evaluating(model), torch.no_grad():
        wanted = model(example).shape
    for name, network in surrogates.items():
        _check_surrogate(name, network, example, wanted)
    sources: dict[str, list[nn.Module]] = {name: [network] for name, network in surrogates.items()}
    return sources if len(sources) == 1 else {**sources, ENSEMBLE: list(surrogates.values())}


def _check_surrogate(name: str, network: nn.Module, example: Tensor, wanted: torch.Size) -> None:
    """Refuse a network that cannot stand in for the one under test, by its name."""
    where = f"surrogates[{name!r}]"
    if not isinstance(name, str) or name == ENSEMBLE:
        raise _checks.refuse(
            "surrogates", f"the name {name!r}", f"a name other than {ENSEMBLE!r}, which is all together"
        )
    if not isinstance(network, nn.Module):
        raise _checks.refuse(where, f"a {type(network).__name__}", "a torch.nn.Module")
    like = reference_tensor(network, example)
    if (like.device, like.dtype) != (example.device, example.dtype):
        raise _checks.refuse(
            where,
            f"a network of {like.dtype} on {like.device}",
            f"{example.dtype} on {example.device}, as the network under test",
            "move it with .to()",
        )
    try:
        with evaluating(network), torch.no_grad():
            logits = network(example)
    except RuntimeError as error:
        shape, why = tuple(example.shape[1:]), str(error).splitlines()[0][:200]
        raise _checks.refuse(where, f"a failure ({why})", f"logits of images of shape {shape}") from error
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise _checks.refuse(
            where,
            f"{got} for one image",
            f"logits of {tuple(wanted)}, as the network under test's",
        )


def surrogates_for(
    train_copy: Callable[[str, int], nn.Module], method: str, *, seed: int, own_seed: int | None = None
) -> dict[str, nn.Module]:
    """
    Train the surrogates that say most about a network: a standard one, one by PGD-AT, and its own twin.

    :param train_copy: (method, seed) -> a trained copy of the network; ``trainers.surrogates`` makes one.
    :param method: The network's own.
    :param seed: The copies take the next seeds from here on, each another one.
    :param own_seed: The network's own, which no copy takes.
    :return: Networks by the names of :data:`SURROGATES`.
    """
    seed = _checks.seed(seed)
    free = [number for number in range(seed, seed + len(SURROGATES) + 1) if number != own_seed]
    methods = ("standard", "pgd-at", method)
    return {name: train_copy(*pair) for name, pair in zip(SURROGATES, zip(methods, free, strict=False), strict=True)}
