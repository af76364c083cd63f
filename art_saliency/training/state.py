"""
Everything that a run needs to go on as if it had never stopped: weights, optimizer, schedule, figures, random numbers, place.

The order of an epoch is not kept: the random states of its start are. A resumed epoch draws the order again, leaves out the batches
that were trained on, and goes on with the random states of the interruption. So data loaders resume as arrays do.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.methods.base import Batch
from art_saliency.randomness import host_states, set_host_states

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["RunState", "begin_epoch", "changed", "digests", "own_leaves", "random_states", "set_random_states"]


def random_states(run: Run) -> dict[str, Any]:
    """:return: The states of all that draws in a run: its own source, and torch's, NumPy's and Python's global generators."""
    states = {
        "run": run.random.state_dict(),
        "torch": torch.get_rng_state(),
        **host_states(),
        # A loader may shuffle with a generator of its own.
        "batches": [generator.get_state() for generator in run.batches.generators],
    }
    if run.engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(run.engine.device)
    return states


def set_random_states(run: Run, states: dict[str, Any]) -> None:
    """Continue where :func:`random_states` was taken."""
    run.random.load_state_dict(states["run"])
    torch.set_rng_state(states["torch"])
    set_host_states(states)
    for generator, state in zip(run.batches.generators, states["batches"], strict=True):
        generator.set_state(state)
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], run.engine.device)


def begin_epoch(run: Run) -> Iterator[Batch]:
    """:return: The batches of the epoch that are still to come: all, but where a run was interrupted in the midst of it."""
    if run.epoch_step == 0:
        run.epoch_random = random_states(run)
        return run.batches.epoch(run.random)
    now = random_states(run)
    set_random_states(run, run.epoch_random)
    rest = run.batches.epoch(run.random, run.epoch_step)
    set_random_states(run, now)
    return rest


@dataclass(frozen=True)
class RunState:
    """
    A run between two steps, in plain values and tensors of its own on the CPU.

    :ivar epoch: The epoch of the next step. :ivar epoch_step: Its steps that are done. :ivar step: All steps that are done.
    :ivar stopping: Whether it ended early. :ivar seconds: That the epoch has taken so far. :ivar warned: Whether the objective did.
    :ivar network: State dict. :ivar objective: State dict. :ivar optimizer: State dict. :ivar schedule: State dict.
    :ivar extensions: State dicts by class and number, of those that have any.
    :ivar history: Meta and records. :ivar sums: Of the figures of the epoch. :ivar threads: torch's, on which results depend bit for bit.
    :ivar random: Every random state now. :ivar epoch_random: And at the epoch's start.
    """

    epoch: int
    epoch_step: int
    step: int
    stopping: bool
    seconds: float
    warned: bool
    network: dict[str, Any]
    objective: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    extensions: dict[str, Any]
    history: dict[str, Any]
    sums: dict[str, Any]
    threads: int
    random: dict[str, Any]
    epoch_random: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> RunState:
        """:return: A copy of a run's state. :raises InputError: When something of it is neither tensor nor plain value; it is named."""
        extensions = {name: extension.state_dict() for name, extension in _named_extensions(run).items()}
        return cls(
            epoch=run.epoch,
            epoch_step=run.epoch_step,
            step=run.step,
            stopping=run.stopping,
            seconds=time.perf_counter() - run.epoch_started,
            warned=run.warned,
            network=_copied("network", dict(run.model.state_dict())),
            objective=_copied("objective", dict(run.objective.state_dict())),
            optimizer=_copied("optimizer", run.optimizer.state_dict()),
            schedule=_copied("scheduler", run.schedule.state_dict()),
            extensions=_copied("extensions", {name: state for name, state in extensions.items() if state}),
            history=_copied("history", {"meta": run.history.meta, "records": run.history.records}),
            sums=_copied("sums", run.sums.state_dict()),
            threads=torch.get_num_threads(),
            random=random_states(run),
            epoch_random=run.epoch_random,
        )

    @classmethod
    def read(cls, content: dict[str, Any]) -> RunState:
        """:return: What :meth:`content` gave. :raises CheckpointError: When it is that of another version."""
        if set(content) != {field.name for field in fields(cls)}:
            raise CheckpointError("got a checkpoint of another version of art-saliency; resume with that version")
        return cls(**content)

    def content(self) -> dict[str, Any]:
        """:return: The fields, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def restore(self, run: Run) -> None:
        """Put the run back, all but its extensions and random numbers: before the extensions start."""
        torch.set_num_threads(self.threads)
        run.model.load_state_dict(self.network)
        run.objective.load_state_dict(self.objective)
        run.optimizer.load_state_dict(self.optimizer)
        run.schedule.load_state_dict(self.schedule)
        run.history.meta.update(self.history["meta"])
        run.history.records[:] = self.history["records"]
        run.sums.load_state_dict(self.sums, run.engine.device)
        run.epoch, run.epoch_step, run.step = self.epoch, self.epoch_step, self.step
        run.epoch_started, run.warned = time.perf_counter() - self.seconds, self.warned
        run.stopping = self.stopping
        run.epoch_random = self.epoch_random

    def restore_extensions(self, run: Run) -> None:
        """Put back extensions and random numbers: after the extensions have started."""
        named = _named_extensions(run)
        for name, state in self.extensions.items():
            if name not in named:
                raise _checks.refuse("extensions", f"no {name}", "those of the interrupted run", "give the same ones")
            named[name].load_state_dict(state)
        set_random_states(run, self.random)


Place = tuple[Any, ...]
"""Keys and indices that lead to a leaf of a tree of dicts, lists and tuples."""


def _leaves(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    items = tree.items() if type(tree) is dict else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    empty = True
    for key, item in items:
        empty = False
        yield from _leaves(item, (*place, key))
    if empty:
        yield place, tree


def _digest(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    digest = hashlib.sha256(f"{leaf.dtype} {tuple(leaf.shape)}|".encode())
    digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data if leaf.numel() else b"")
    return digest.digest()


def digests(content: dict[str, Any]) -> dict[str, dict[Place, bytes]]:
    """:return: Of each field of :meth:`RunState.content`, what tells its leaves from another process's."""
    return {name: {place: _digest(leaf) for place, leaf in _leaves(tree)} for name, tree in content.items()}


def own_leaves(content: dict[str, Any], first: dict[str, dict[Place, bytes]]) -> dict[Place, Any]:
    """
    What one process's state holds that rank 0's does not: random states, BatchNorm's statistics in the midst of an epoch, figures.

    :param first: :func:`digests` of rank 0's content.
    :return: By place, for :func:`changed`: leaves, or a whole field whose leaves are others.
    """
    own: dict[Place, Any] = {}
    for name, tree in content.items():
        leaves = {place: (leaf, _digest(leaf)) for place, leaf in _leaves(tree)}
        if leaves.keys() != first[name].keys():
            own[(name,)] = tree
            continue
        own.update({(name, *place): leaf for place, (leaf, seen) in leaves.items() if seen != first[name][place]})
    return own


def changed(tree: Any, own: dict[Place, Any], place: Place = ()) -> Any:
    """:return: Rank 0's content as that of the process whose :func:`own_leaves` these are."""
    if place in own:
        return own[place]
    if type(tree) is dict:
        return {key: changed(item, own, (*place, key)) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(changed(item, own, (*place, number)) for number, item in enumerate(tree))
    return tree


def _named_extensions(run: Run) -> dict[str, Any]:
    """Extensions by class and number: those that keep no state, such as a progress bar, may come and go."""
    counts: Counter[str] = Counter()
    named = {}
    for extension in run.extensions:
        kind = type(extension).__name__
        named[f"{kind} {counts[kind]}"] = extension
        counts[kind] += 1
    return named


def _copied(where: str, value: Any) -> Any:
    """A copy whose tensors lie on the CPU and share no memory with the run's, of what ``weights_only=True`` reads back."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter):  # MultiStepLR's milestones
        return Counter(value)
    if isinstance(value, dict):
        return {key: _copied(f"{where}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copied(f"{where}.{number}", item) for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None:
        return None
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # torch.__version__ is more than a str, which a file of plain values must not hold
    got = f"{where} of type {type(value).__name__}"
    raise _checks.refuse("checkpoint_dir", got, "tensors and plain values alone", "train without checkpoints")
