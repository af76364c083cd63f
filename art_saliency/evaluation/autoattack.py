"""The AutoAttack (Croce and Hein 2020), by its authors' code in either distribution: guarded, recorded, resumable."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.errors import UnsupportedModelError
from art_saliency.evaluation._autoattack_backend import LOG, Messages, find_backend
from art_saliency.evaluation._autoattack_guard import process_kept
from art_saliency.evaluation._autoattack_memory import Calls, Memory, Tally, weights_sha256
from art_saliency.evaluation._autoattack_plan import (
    ATTACKS,
    QUERIES,
    VERSIONS,
    Plan,
    check_images_fit,
    plan_attacks,
)
from art_saliency.evaluation._inputs import a_network, reference_tensor, refuse_double, refuse_half
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.files import sha256_of_tensors
from art_saliency.gradients import input_gradient
from art_saliency.modes import tensor_float32
from art_saliency.randomness import seed_everything
from art_saliency.threat import ThreatModel

__all__ = ["ATTACKS", "VERSIONS", "AutoAttackResult", "autoattack"]

_PROBE = 4  # images whose logits a state folder remembers
_ROUNDING = 1e-6  # of float32 pixels
_CHUNK = 256  # images whose distances are taken at once, in float64


@dataclass(frozen=True, eq=False)
class AutoAttackResult:
    """
    What one evaluation found, and all that is needed to repeat it.

    :ivar x_adv: (N, C, H, W) in [0, 1] on the CPU; where no attack succeeded, the image as given.
    :ivar correct: (N,) bool on the CPU: classified correctly by a clean forward pass over `x_adv`.
    :ivar clean_accuracy: 0 to 1.
    :ivar robust_accuracy: 0 to 1, the mean of `correct`.
    :ivar robust_accuracy_after: AutoAttack's own count after each attack, in order. An attack that was left no image
        did not run and has no entry.
    :ivar eps: In units of the [0, 1] pixel range.
    :ivar norm: ``"Linf"`` or ``"L2"``.
    :ivar version: As asked for.
    :ivar attacks: What ran, or would have, had an image been left.
    :ivar standard: Whether this is AutoAttack's standard version, nothing changed: what leaderboards hold.
    :ivar deviations: What was changed, in words. Empty exactly when `standard` is true.
    :ivar warnings: AutoAttack's own, verbatim, then those of this package's checks. Report them with the number.
    :ivar backend: ``"autoattack"`` (fra31's) or ``"pyautoattack"``.
    :ivar backend_version: Of the distribution.
    :ivar seed: The result depends on it.
    :ivar batch_size: The result depends on it.
    :ivar threads: Of torch on the CPU; bits depend on it.
    :ivar device: And its model name.
    :ivar versions: Of python, torch and numpy.
    :ivar weights_sha256: Of the network's state_dict: names, types, shapes and bytes.
    :ivar data_sha256: Of images and labels.
    :ivar seconds: Wall clock; calls that were remembered count with what they took when they were computed.
    """

    x_adv: Tensor = field(repr=False)
    correct: Tensor = field(repr=False)
    clean_accuracy: float
    robust_accuracy: float
    robust_accuracy_after: dict[str, float]
    eps: float
    norm: str
    version: str
    attacks: list[str]
    standard: bool
    deviations: list[str]
    warnings: list[str]
    backend: str
    backend_version: str
    seed: int
    batch_size: int
    threads: int
    device: str
    versions: dict[str, str]
    weights_sha256: str
    data_sha256: str
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """:return: The 95 % interval of the robust accuracy that the number of images leaves, 0 to 1."""
        return binomial_interval(int(self.correct.sum()), len(self.correct))

    def to_json(self) -> dict[str, Any]:
        """:return: Everything but the tensors, and ``count`` and ``interval``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(getattr(self, f.name), Tensor)}
        return {**plain, "count": len(self.correct), "interval": list(self.interval)}


def autoattack(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    eps: float,
    norm: str = "Linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    square_queries: int = QUERIES,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AutoAttackResult:
    """
    Robust accuracy under AutoAttack.

    The adversarial images are those of the backend called directly on the network in eval mode, bit for bit, with the
    same seed and batch size (a randomised network: after ``torch.manual_seed(seed)``). The network and the process are
    left as they were: modes, gradients and their flags, random states, tracer.

    With fewer than ten classes the standard version cannot run. APGD-T and FAB-T then get one target less than there
    are classes; with three classes untargeted APGD-DLR stands in for APGD-T; with two it is left out, and the result of
    a network with large logits, on which the cross-entropy has no gradient, rests on FAB-T and Square. The result says
    ``standard=False`` and why.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K); normalisation inside. Evaluated in eval mode.
    :param x: (N, C, H, W) in [0, 1], array or tensor on any device; converted to float32.
    :param y: (N,) class indices or (N, K) one-hot rows.
    :param eps: Radius, in units of the [0, 1] pixel range.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param version: ``"standard"``; ``"plus"``; ``"rand"`` for randomised networks; ``"custom"`` with `attacks`.
    :param attacks: Names from :data:`ATTACKS`, in order, each with AutoAttack's own parameters for a custom list.
    :param square_queries: Of Square, 5000 in the standard version. More of them tell whether a black-box attack beats
        the white-box ones (a sign of masked gradients), fewer make a smoke test; either is a deviation.
    :param batch_size: Images at once.
    :param seed: Each call of an attack starts from it.
    :param device: Where the network already is; ``None`` finds out.
    :param state_dir: A folder in which every finished batch of every attack is kept: the same evaluation with the same
        folder continues after a kill and ends with the same adversarial images, on a CPU bit for bit. ``None`` keeps nothing.
    :param progress: Whether a bar is shown on stderr.
    :return: The result.
    :raises MissingDependencyError: When neither distribution of AutoAttack is installed.
    :raises UnsupportedModelError: When the network's weights are not float32, when it does not return logits, when these are finite
        on no image, or when they have no gradient to the images and an attack needs one.
    :raises InputError: When an argument is outside what is accepted, or `state_dir` was begun with other settings.
    """
    threat = ThreatModel(norm, _checks.real("eps", eps, above=0))
    _checks.one_of("version", version, [*VERSIONS, "custom"])
    square_queries = _checks.whole("square_queries", square_queries, least=1)
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    seed = _checks.seed(seed)
    a_network(model)
    backend, messages, began = find_backend(), Messages(), time.perf_counter()
    with process_kept(model, backend.counter):
        # On the CPU, from where AutoAttack moves batches, and contiguous: it takes views.
        images = to_unit(_checks.bytes_of_pixels("x", _checks.images(x, allow_uint8=True)).cpu()).float().contiguous()
        refuse_double(reference_tensor(model, images))
        refuse_half(reference_tensor(model, images))
        where = _device_of(model, device)
        seed_everything(seed)
        logits = _logits(model, images[:batch_size].to(where))
        targets = _checks.labels(_checks.as_tensor("y", y).cpu(), len(images), logits.shape[1], soft=False)
        plan = plan_attacks(version, attacks, logits.shape[1], square_queries)
        check_images_fit(plan, threat, images)
        record: dict[str, Any] = {
            "eps": threat.eps,
            "norm": norm,
            "version": version,
            "attacks": list(plan.attacks),
            "backend": backend.name,
            "backend_version": backend.version,
            "seed": seed,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "device": _device_name(where),
            "weights_sha256": weights_sha256(model),
            "data_sha256": sha256_of_tensors({"x": images, "y": targets}),
        }
        clean_classes = _predictions(model, images, where, batch_size)
        silent = int((clean_classes < 0).sum())
        if silent == len(images):
            raise UnsupportedModelError(
                "model: got NaN or infinite logits on every clean image, expected finite ones; look at its weights"
            )
        clean = clean_classes == targets
        memory = None
        if state_dir is not None:
            probe = {"logits": logits[:_PROBE].tolist(), "square_queries": square_queries, "torch": torch.__version__}
            memory = Memory(Path(state_dir), {**record, **probe})
        engine = backend.engine(model, threat, version, plan, square_queries, seed, where, messages)
        with _progress_bar(plan, clean, shown=progress) as seen:
            calls = Calls(engine, messages, memory, seen)
            seed_everything(seed)
            with _cause_named(model, images[:1].to(where)):
                x_adv, y_adv = backend.run(engine, images, targets, batch_size)
        correct = _predictions(model, x_adv, where, batch_size) == targets
        said = f"NaN or infinite logits on {silent} of {len(images)} clean images, which count as errors"
        doubts = [*([said] if silent else []), *_outside(x_adv, images, threat), *_recount(correct, y_adv == targets)]
        if weights_sha256(model) != record["weights_sha256"]:
            doubts.append("the network's state_dict changed during the evaluation, which in eval mode it must not")
    for doubt in doubts:
        LOG.warning(doubt)
    return AutoAttackResult(
        x_adv=x_adv,
        correct=correct,
        clean_accuracy=int(clean.sum()) / len(clean),
        robust_accuracy=int(correct.sum()) / len(correct),
        robust_accuracy_after={name: (t.attacked - t.fooled) / len(images) for name, t in calls.tallies.items()},
        standard=not plan.deviations,
        deviations=plan.deviations,
        warnings=list(dict.fromkeys(messages.warnings + doubts)),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        seconds=time.perf_counter() - began + calls.remembered_seconds,
        **record,
    )


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """:return: The device the network is on; one that was asked for must be among those it is on."""
    devices = list(dict.fromkeys(tensor.device for tensor in chain(model.parameters(), model.buffers())))
    if device is None:
        return devices[0] if devices else torch.device("cpu")
    asked = torch.device(device)
    for where in devices:
        if where.type == asked.type and asked.index in (None, where.index):
            return where
    if devices:
        raise _checks.refuse(
            "device", repr(str(asked)), f"{str(devices[0])!r}, where the network is", "move it: model.to(device)"
        )
    return asked


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)}{', TF32' if tensor_float32() else ''})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """:return: The network's output, when AutoAttack can attack it: logits (N, K), in full precision."""
    with torch.no_grad():
        logits = model(x)
    wanted = f"logits ({len(x)}, K), one float32 tensor"
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            f"model: got {type(logits).__name__}, expected {wanted}; wrap it to return only those"
        )
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise UnsupportedModelError(
            f"model: got an output of shape {tuple(logits.shape)}, expected {wanted} with K >= 2"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(f"model: got {logits.dtype}, expected {wanted}; its rounding would mask gradients")
    return logits


@contextmanager
def _cause_named(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Where AutoAttack fails on a network whose logits have no gradient to the images, say so; it asks for one itself."""
    try:
        yield
    except RuntimeError:
        # Looked into afterwards alone: one more pass beforehand would move the noise of a network that keeps a generator.
        with torch.enable_grad():
            probe = x.detach().requires_grad_(True)
            input_gradient(model(probe).sum(), probe)
        raise


def _predictions(model: nn.Module, x: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """:return: (N,) int64 on the CPU, in AutoAttack's own batches; -1, no label, where logits are not finite."""
    found = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            logits = model(x[start : start + batch_size].to(device))
            found.append(torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1).cpu())
    return torch.cat(found)


def _outside(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> list[str]:
    """:return: A complaint when an adversarial image is not one under the threat model."""
    # In float64, in which a ball of float32 pixels is exact; a chunk at a time, for it doubles what they take.
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(x), _CHUNK)]
    distance = torch.cat([threat.distance(x_adv[chunk].double(), x[chunk].double()) for chunk in chunks])
    far = ~(distance <= threat.eps + _ROUNDING)  # NaN is far
    beyond = ((x_adv < -_ROUNDING) | (x_adv > 1 + _ROUNDING)).flatten(1).any(1)
    if not bool((far | beyond).any()):
        return []
    return [
        f"{int((far | beyond).sum())} adversarial images are outside the threat model: distances up to "
        f"{float(distance.max()):g} (eps {threat.eps:g}), pixels from {float(x_adv.min()):g} to {float(x_adv.max()):g}"
    ]


def _recount(correct: Tensor, by_autoattack: Tensor) -> list[str]:
    """:return: A complaint when a clean forward pass and AutoAttack disagree about an image."""
    if torch.equal(correct, by_autoattack):
        return []
    return [
        f"AutoAttack counted {int(by_autoattack.sum())} of {len(correct)} images as robust, a clean forward pass over "
        f"its result {int(correct.sum())}; they disagree on {int((correct != by_autoattack).sum())}: the decision "
        "boundary runs through these images, or the network is not deterministic"
    ]


@contextmanager
def _progress_bar(plan: Plan, clean: Tensor, *, shown: bool) -> Iterator[Callable[[str, dict[str, Tally]], None]]:
    """A bar over images times attacks, with the running robust accuracy. :return: What each batch is reported to."""
    count, standing = len(clean), int(clean.sum())
    with tqdm(total=count * len(plan.attacks), desc="AutoAttack", unit="image", disable=not shown, leave=None) as bar:

        def seen(attack: str, tallies: dict[str, Tally]) -> None:
            left, tally = standing - sum(t.fooled for t in tallies.values()), tallies[attack]
            # An image that an earlier attack fooled needs no further one: it counts as done in all that follow.
            done = plan.attacks.index(attack) * count + count - (left + tally.fooled) + tally.attacked
            bar.set_postfix(attack=attack, robust=f"{left / count:.2%}", refresh=False)
            bar.update(done - bar.n)

        yield seen
        bar.update(bar.total - bar.n)
