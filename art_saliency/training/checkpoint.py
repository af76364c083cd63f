"""
Checkpoints of a run: written whole or not at all, checked by their hash, and taken up again.

A checkpoint is one file of tensors and plain values, whose name holds its number and its SHA-256. It is copied between two steps and
written beside the training; a run that is killed at any moment leaves its last ones whole. Only finite weights are kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from art_saliency import _checks
from art_saliency.errors import CheckpointError, NoEffectWarning, TrainingInterrupted
from art_saliency.files import read_tensors, sha256_of_file, write_tensors
from art_saliency.training.engine import launched
from art_saliency.training.state import RunState, changed, digests, own_leaves

if TYPE_CHECKING:
    from art_saliency.training.engine import Engine
    from art_saliency.training.loop import Run

__all__ = ["MAPS", "RESUME", "Checkpoints", "cadence", "clear", "differences"]

RESUME = ("auto", "never", "must")
"""Go on where a run was interrupted, if it was; start anew and replace what is there; go on, and refuse to start anew."""

MAPS = "maps.pt"
"""What a trainer calls a file, beside the checkpoints, of maps that it computed before the run."""

SCHEMA = 1
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{6,})-([0-9a-f]{64})\.pt")
_ASIDE = "checkpoint.writing"
_LOCK = "checkpoint.lock"
_UNITS = {
    "epoch": "epochs",
    "epochs": "epochs",
    "step": "steps",
    "steps": "steps",
    "second": "seconds",
    "seconds": "seconds",
}


def cadence(every: int | str) -> tuple[int, str]:
    """
    How often a checkpoint is written.

    :param every: A number of epochs, or words such as ``"1 epoch"``, ``"500 steps"``, ``"600 seconds"``.
    :return: The number and its unit.
    """
    words = f"{every} epochs" if isinstance(every, int) and not isinstance(every, bool) else every
    match = re.fullmatch(r"\s*(\d+)\s*([a-z]+)\s*", words) if isinstance(words, str) else None
    if match is None or match[2] not in _UNITS or int(match[1]) < 1:
        raise _checks.refuse("checkpoint_every", repr(every), "a number of epochs, '500 steps' or '600 seconds'")
    return int(match[1]), _UNITS[match[2]]


class Checkpoints:
    """
    Where a run is kept. The last two checkpoints stay, and no other file in the folder is touched; another run there is refused
    while it goes on, and so is one that began to look before it.

    Of several processes that train together each reads the folder, so that each refuses what does not fit; rank 0 alone writes, and
    when they go on all take up what it has read. It keeps its own state whole, and what differs in the others'. They agree between
    two steps, so that a signal to one of them ends all after the same step, and so does an error of the writer.

    As a context it lets SIGINT and SIGTERM wait for the end of a step, in the main thread alone: the run is then kept, and
    :class:`~art_saliency.errors.TrainingInterrupted` says how to go on. A second signal acts as it always does. The number of
    torch's threads, on which results depend bit for bit, is the interrupted run's meanwhile, and as before afterwards.

    :param folder: Made when missing. :param every: See :func:`cadence`; there is one at the start and the end of a run, too.
    :param resume: One of :data:`RESUME`.
    :raises CheckpointError: When nothing in the folder can be read, or nothing is there and `resume` is ``"must"``.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int | str = 1, resume: str = "auto") -> None:
        self.folder, self.every = Path(folder), every
        self.resume = _checks.one_of("resume", resume, RESUME)
        self._count, self._unit = cadence(every)
        if self.folder.exists() and not self.folder.is_dir():
            raise _checks.refuse("checkpoint_dir", f"{self.folder}, which is a file", "a folder")
        self._number = _last_number(self.folder)
        self._identity: dict[str, Any] = {}
        self._inner = False  # of a run that another one needs: that it is over is as it should be
        self._engine: Engine | None = None
        self.rank = launched()[0]
        self._good: list[Path] = []
        self._found = None if resume == "never" else self._newest()
        if self._found is None and resume == "must" and self.rank == 0:
            raise CheckpointError(f"{self.folder}: holds no checkpoint, expected one to resume from; check the path")
        self._signal: int | None = None
        self._error: Exception | None = None
        self._handlers: dict[int, Any] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._last_step, self._last_time, self._threads = 0, time.monotonic(), torch.get_num_threads()
        self._held = contextlib.ExitStack()
        self._superseded: list[Path] = []

    # --- what is there -----------------------------------------------------------------------------------------------

    def _newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; a damaged one is named in a warning."""
        damaged: list[str] = []
        for _, digest, path in sorted(_files(self.folder), reverse=True):
            try:
                if sha256_of_file(path) != digest:
                    raise CheckpointError(f"{path}: damaged, its hash is not the one in its name")
                content = read_tensors(path)
                if content.get("schema") != SCHEMA:
                    raise CheckpointError(f"{path}: got schema {content.get('schema')}, expected {SCHEMA}")
            except OSError as error:  # a CheckpointError is one
                damaged.append(str(error))
                continue
            for sentence in damaged:
                warnings.warn(f"{sentence}; resuming from the one before it, {path.name}", stacklevel=4)
            self._good = [path]
            return content
        if damaged:
            raise CheckpointError(
                f"{self.folder}: none of the {len(damaged)} checkpoints can be read ({damaged[0]}); start anew with "
                f"resume='never' (--force), which replaces them"
            )
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What the run that is to be resumed was; empty when there is none."""
        return {} if self._found is None else dict(json.loads(self._found["identity"]))

    def belong_to(self, identity: dict[str, Any], engine: Engine | None = None) -> None:
        """
        Say which run is to be kept here, before any work starts.

        :param identity: JSON-able: all that must be equal in a run that goes on.
        :param engine: What connects the processes, where there are several: nothing is written before all have come here.
        :raises InputError: When the run that is here differs; what differs is named, and nothing is changed.
        """
        self._identity, self._engine = json.loads(json.dumps({**identity, "processes": launched()[1]})), engine
        before = {"processes": 1, **self.identity}  # a run of a version that kept those of one process alone
        self._agree()  # a process that is refused and ends must not break the connection of one that has yet to come here
        if self._found is not None and (found := differences(before, self._identity)):
            shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
            raise _checks.refuse(
                "resume",
                f"a run that differs from the one in {self.folder}: {shown}",
                "the same data and settings",
                "give those, choose another folder, or start anew with resume='never' (--force)",
            )
        self._agree()
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with _alone(self.folder):
                    for left in self.folder.glob(f"*{_ASIDE}*"):  # by a process that was killed while it wrote
                        left.unlink()
            except CheckpointError as error:
                self._error = error
            except OSError as error:
                self._error = CheckpointError(f"{self.folder}: cannot be written to ({error.strerror}); choose another")
                self._error.__cause__ = error
        self._agree()

    def below(self, name: str) -> Checkpoints:
        """:return: The checkpoints, in a folder of that name, of a run that this one needs first, such as a teacher's."""
        inner = Checkpoints(self.folder / name, every=self.every, resume="never" if self.resume == "never" else "auto")
        inner._inner = True
        identity = {**self._identity, "part": name}
        if differences({"processes": 1, **inner.identity}, identity):
            inner._found, inner._good = None, []
        inner.belong_to(identity, self._engine)
        if (
            self.resume == "never"
        ):  # or this run, interrupted before its own first checkpoint, would go on with what was here
            inner._superseded = [path for _, _, path in _files(self.folder)]
        return inner

    # --- called by the loop -------------------------------------------------------------------------------------------

    def restore(self, run: Run) -> None:
        """Put an interrupted run back, all but its extensions."""
        if self._engine is not None:
            # Another node may have another disk, or none of the run's: all go on from what rank 0 has read.
            self._found = self._engine.of_first(self._found)
        if self._found is None:
            return
        if self.rank:
            self._found["state"] = changed(self._found["state"], self._found["others"][self.rank - 1])
        state = RunState.read(self._found["state"])
        state.restore(run)
        if run.epoch < run.epochs and not run.stopping:
            run.history.meta["resumed_at"] = [*run.history.meta.get("resumed_at", []), run.step]
        elif self.resume == "auto" and not self._inner:
            warnings.warn(
                f"{self.folder} holds this very run, which is over: its weights were taken and nothing was trained; to train anew, "
                f"choose another folder or say resume='never' (--force); resume='must' says that this is meant",
                NoEffectWarning,
                stacklevel=2,
            )

    def begin(self, run: Run) -> None:
        """Put the extensions of an interrupted run back; or write the first checkpoint of a new one, to see that it can be written."""
        self._last_step, self._last_time = run.step, time.monotonic()
        if self._found is not None:
            RunState.read(self._found["state"]).restore_extensions(run)
            self._found = None  # it takes memory
            return
        self._save(run)
        self._settle()
        if self.rank == 0:
            for path in self._superseded:
                path.unlink(missing_ok=True)

    def after_step(self, run: Run) -> None:
        """Between two steps of an epoch."""
        if self._writing is not None and self._writing.done():
            self._wait()  # an error of the writer ends the run now
        number, due = self._agree(self._is_due(run))
        if number or due:
            run.guard.read(run.step, run.epoch)  # what is not finite is not kept
            self._save(run)
        self._stop_if_asked(run, number)

    def after_epoch(self, run: Run) -> None:
        """Between two epochs."""
        over = run.stopping or run.epoch >= run.epochs
        at_epoch = self._unit == "epochs" and run.epoch % self._count == 0
        number, due = self._agree(over or at_epoch or self._is_due(run))
        if number or due:
            self._save(run)
        self._stop_if_asked(run, number)
        if over:
            self._settle()

    def _is_due(self, run: Run) -> bool:
        if self._unit == "steps":
            return run.step - self._last_step >= self._count
        return self._unit == "seconds" and time.monotonic() - self._last_time >= self._count

    def _stop_if_asked(self, run: Run, number: int) -> None:
        if number:
            self._settle()
            self._signal = None
            raise TrainingInterrupted(number, run.step, self.folder)

    def _agree(self, due: bool = False) -> tuple[int, bool]:
        """
        What all processes are to do now.

        :param due: Whether a checkpoint is.
        :return: The signal that one of them was sent, or 0; and whether a checkpoint is due: clocks differ, so one decides for all.
        :raises CheckpointError: In all of them, when rank 0 could not write.
        """
        error, self._error = self._error, None
        number, failed, due_to_all = self._signal or 0, error is not None, due
        if self._engine is not None:
            number, *flags = self._engine.greatest_of_all([number, failed, due and self.rank == 0])
            failed, due_to_all = map(bool, flags)
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(f"{self.folder}: rank 0 could not write there; see what it says")
        return number, due_to_all

    # --- writing ------------------------------------------------------------------------------------------------------

    def _save(self, run: Run) -> None:
        """Copy the run, and write the copy while it goes on."""
        assert self._writer is not None
        self._settle()  # one copy at a time
        state = RunState.of(run).content()
        content = {"schema": SCHEMA, "identity": json.dumps(self._identity), "state": state}
        self._last_step, self._last_time = run.step, time.monotonic()
        if self._engine is not None:
            first = self._engine.of_first(digests(state) if self.rank == 0 else None)
            content["others"] = (self._engine.gathered(own_leaves(state, first) if self.rank else None) or [])[1:]
        if self.rank == 0:
            self._writing = self._writer.submit(self._write, content)

    def _write(self, content: dict[str, Any]) -> None:
        aside = self.folder / _ASIDE
        write_tensors(aside, content)
        path = self.folder / f"checkpoint-{self._number + 1:06d}-{sha256_of_file(aside)}.pt"
        try:
            os.replace(aside, path)
            self._number += 1
            self._good = [*self._good, path][-KEPT:]
            for _, _, old in _files(self.folder):
                if old not in self._good:
                    old.unlink()
        except OSError as error:
            raise CheckpointError(f"{path}: could not be put in its place ({error.strerror})") from error

    def _settle(self) -> None:
        """Until what is being written is written. :raises CheckpointError: In every process, when it could not be."""
        self._wait()
        self._agree()

    def _wait(self) -> None:
        """Until what is being written here is written; an error is kept, to be raised where all can hear of it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except Exception as error:
                self._error = error

    # --- signals and threads ------------------------------------------------------------------------------------------

    def __enter__(self) -> Checkpoints:
        if self.rank == 0:
            self._held.enter_context(_alone(self.folder))
            if (newest := _last_number(self.folder)) != self._number:
                self._held.close()
                raise CheckpointError(
                    f"{self.folder}: got checkpoint {newest} of a run that has gone on meanwhile, expected {self._number}, from which "
                    f"this one was to go on; run it again"
                )
        self._threads, self._signal, self._handlers = torch.get_num_threads(), None, {}
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None was not set by Python and could not be put back; who ignores a signal wants it ignored.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._put_handlers_back()

    def _put_handlers_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._put_handlers_back()
        assert self._writer is not None
        self._writer.shutdown(wait=True)
        self._held.close()
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if error is None and self._signal is not None:  # it came after the last checkpoint
            signal.raise_signal(self._signal)


def clear(folder: Path) -> None:
    """Take away the checkpoints of a run that is over, and the folders that are then empty. No other file is touched."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif _NAME.fullmatch(path.name) or _ASIDE in path.name or path.name in (MAPS, _LOCK):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """
    Keep other runs out of a folder for the duration: two would take each other's checkpoints away.

    The system takes the lock back when the process ends, however it does. Where it knows none, nothing is kept out.

    :raises CheckpointError: When another run has the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path, own = folder / _LOCK, (os.getpid(), os.path.realpath(folder))
    taken = CheckpointError(f"{folder}: another run is kept there now; wait for its end or choose another folder")
    if own in _HELD:  # the lock is the process's, not the thread's: to open its file and close it would give it back
        raise taken
    _HELD.add(own)
    with contextlib.ExitStack() as held:
        held.callback(_HELD.discard, own)
        file = held.enter_context(path.open("ab"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise taken from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise taken  # its owner took the file away in between: it is at its end
        held.callback(path.unlink, missing_ok=True)
        yield


_HELD: set[tuple[int, str]] = set()
"""The folders that runs of this process keep to themselves; a fork's are not its parent's."""


def _files(folder: Path) -> list[tuple[int, str, Path]]:
    """The checkpoints of a folder: number, hash, path."""
    names = folder.iterdir() if folder.is_dir() else ()
    return [(int(found[1]), found[2], path) for path in names if (found := _NAME.fullmatch(path.name))]


def _last_number(folder: Path) -> int:
    """:return: Of the newest checkpoint of a folder; 0 where there is none."""
    return max((number for number, _, _ in _files(folder)), default=0)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """:return: What differs between two runs, as ``batch_size: 64 then, 128 now``."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{sentence}" for sentence in differences(a, b)]
        elif isinstance(a, list) and isinstance(b, list):
            found += [f"{key}.{sentence}" for sentence in differences(_numbered(a), _numbered(b))]
        elif a != b:
            found.append(f"{key}: {_short(a)} then, {_short(b)} now")
    return found


def _numbered(items: Iterable[Any]) -> dict[str, Any]:
    return {str(number): item for number, item in enumerate(items)}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
