"""
Exact resumption: every call of an inner attack is remembered on disk.

AutoAttack reseeds torch with its seed in every call of an inner attack, so what a call returns depends on the
network, the settings, its images and labels, and, for a randomised network, on the state of the random generators when
it begins. All of that stands in the key. What a call leaves behind (images, generator states, warnings) stands in the
file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.evaluation._autoattack_backend import Messages
from art_saliency.files import read_tensors, sha256_of_tensors, write_file, write_tensors
from art_saliency.randomness import global_states, set_global_states

_FINGERPRINT = "fingerprint.json"

# The inner attacks of an AutoAttack object, and what its list calls them at the moment of a call.
_INNER: dict[str, Callable[[Any], str]] = {
    "apgd": lambda attack: f"apgd-{attack.loss}",
    "apgd_targeted": lambda attack: "apgd-t",
    "fab": lambda attack: "fab-t" if attack.targeted else "fab",
    "square": lambda attack: "square",
}


def weights_sha256(model: nn.Module) -> str:
    """:return: SHA-256 of the network's weights and buffers, the one that a saved run states too."""
    return sha256_of_tensors({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two settings agree; logits (nested lists) may differ by rounding, as they do on a GPU, and NaN is NaN."""
    if not isinstance(ours, list) or not isinstance(theirs, list) or not isinstance(ours[0], list):
        return bool(ours == theirs)
    a, b = (torch.tensor(part).nan_to_num() for part in (ours, theirs))
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-3 * a.abs().max())


class Memory:
    """
    A folder that holds what one evaluation has computed so far.

    :param folder: Made when it is not there.
    :param fingerprint: Everything that decides the result, by name, JSON-able.
    :raises InputError: When the folder was begun with other settings; the message names each that differs.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise _checks.refuse("state_dir", f"{str(folder)!r}, a file", "a folder, or a path where one can be made")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            begun = json.loads((folder / _FINGERPRINT).read_bytes())
        except (
            FileNotFoundError,
            ValueError,
        ):  # new, or damaged: what lies there is then recomputed, its keys will not fit
            begun = json.loads(json.dumps(fingerprint))
            write_file(folder / _FINGERPRINT, lambda file: file.write(json.dumps(begun, indent=1).encode()))
        differing = [name for name in fingerprint if not _same(fingerprint[name], begun.get(name))]
        if differing:
            values = (
                f"{n} ({begun.get(n)!r} there, {fingerprint[n]!r} here)" if n != "logits" else n for n in differing
            )
            raise _checks.refuse(
                "state_dir",
                f"{str(folder)!r}, begun by an evaluation that differs in {', '.join(values)}",
                "the folder of this very evaluation",
                "name another folder, or the settings it was begun with",
            )
        self._identity = json.dumps(begun, sort_keys=True)

    def key(self, attack: str, call: int, x: Tensor, y: Tensor) -> str:
        """:return: SHA-256 of everything that the call's outcome depends on."""
        state = global_states()
        (keys, *numpy), (version, words, pending) = state.pop("numpy"), state.pop("python")
        tensors = sha256_of_tensors({"x": x, "y": y, "numpy": keys, "python": words, **state})
        plain = (self._identity, attack, call, numpy, version, pending, tensors)
        return hashlib.sha256(repr(plain).encode()).hexdigest()

    def recall(self, attack: str, call: int, key: str, device: torch.device) -> dict[str, Any] | None:
        """:return: What :meth:`keep` was given; None when nothing is there, or it is damaged, or of another key."""
        try:
            known = read_tensors(self._path(attack, call))
        except CheckpointError:
            return None
        return {**known, "x_adv": known["x_adv"].to(device)} if known.get("key") == key else None

    def keep(self, attack: str, call: int, **outcome: Any) -> None:
        """Write a call's outcome: ``key``, ``x_adv``, ``random``, ``warnings``, ``seconds``."""
        write_tensors(self._path(attack, call), outcome)

    def _path(self, attack: str, call: int) -> Path:
        return self.folder / f"{call:05d}-{attack}.pt"


@dataclass
class Tally:
    """How many images an attack was given, and how many of them AutoAttack then saw misclassified."""

    attacked: int = 0
    fooled: int = 0


class Calls:
    """
    Sees every call of the inner attacks of one AutoAttack object; counts, and with a memory, remembers.

    :param seen: Called after each, with the attack's name and the tallies.
    :ivar tallies: By attack, in the order in which they ran.
    :ivar remembered_seconds: What the remembered calls took when they were computed.
    """

    def __init__(
        self, engine: Any, messages: Messages, memory: Memory | None, seen: Callable[[str, dict[str, Tally]], None]
    ) -> None:
        self.messages, self.memory, self.seen = messages, memory, seen
        self.tallies: dict[str, Tally] = {}
        self.remembered_seconds = 0.0
        self._number = 0
        self._tracer = sys.gettrace()
        self._awaited: tuple[str, Tensor] | None = None
        for place, name in _INNER.items():
            inner = getattr(engine, place)
            inner.perturb = partial(self._perturb, name, inner, inner.perturb)
        engine.get_logits = partial(self._get_logits, engine.get_logits)

    def _perturb(
        self, name: Callable[[Any], str], inner: Any, compute: Callable[..., Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        sys.settrace(self._tracer)  # AutoAttack's check has switched it off, and an attack lasts hours
        attack = name(inner)
        self._number += 1
        x_adv = compute(x, y) if self.memory is None else self._remembered(self.memory, attack, compute, x, y)
        self.tallies.setdefault(attack, Tally()).attacked += len(x)
        self._awaited = attack, y
        return x_adv

    def _remembered(self, memory: Memory, attack: str, compute: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        key = memory.key(attack, self._number, x, y)
        known = memory.recall(attack, self._number, key, x.device)
        if known is None:
            began, warned = time.perf_counter(), len(self.messages.warnings)
            x_adv = compute(x, y)
            memory.keep(
                attack,
                self._number,
                key=key,
                x_adv=x_adv.detach(),
                random=global_states(),
                warnings=self.messages.warnings[warned:],
                seconds=time.perf_counter() - began,
            )
            return x_adv
        for warning in known["warnings"]:
            self.messages.warning(warning)
        set_global_states(known["random"])
        self.remembered_seconds += known["seconds"]
        found: Tensor = known["x_adv"]
        return found

    def _get_logits(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """AutoAttack's forward pass; the one that follows a call decides which images were fooled."""
        logits = forward(x)
        if self._awaited is not None:
            (attack, y), self._awaited = self._awaited, None
            self.tallies[attack].fooled += int((logits.max(dim=1)[1] != y).sum())
            self.seen(attack, self.tallies)
        return logits
