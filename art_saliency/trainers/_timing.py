"""What a measurement on a busy machine needs: contestants that take turns, ratios within a round, memory, a matrix rate."""

from __future__ import annotations

import contextlib
import ctypes
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from art_saliency.modes import full_float32, matrices_as_convolutions

__all__ = [
    "Spread",
    "Turn",
    "exact_memory",
    "growth_of",
    "interleaved",
    "matrix_turn",
    "per_round",
    "waited",
]

Turn = Callable[[], float]
"""Does some steps; returns the seconds that each took on average, with nothing left to do on the device."""

_STATUS = Path("/proc/self/status")
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them, from malloc.h
_SAMPLE = 0.001  # seconds between two looks at the memory; a look takes 0.03 ms


@dataclass(frozen=True)
class Spread:
    """
    A figure over the rounds. :ivar median: Its median. :ivar low: Its 16th percentile. :ivar high: Its 84th.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """:param values: One a round. :return: Their median and what two thirds of them lie between."""
        low, high = np.percentile(values, (16, 84))
        return cls(statistics.median(values), float(low), float(high))

    def __str__(self) -> str:
        digits = 3 if self.median < 1.995 else 1 if self.median < 99.5 else 0
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def waited(device: torch.device) -> float:
    """:return: The time, in seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    groups: Mapping[str, Mapping[str, Turn]],
    *,
    rounds: int,
    seed: int,
    progress: Callable[[], object] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """
    Let contestants take turns, in another order every round, so that whatever else the machine does falls on all alike.

    The contestants of a group come one after the other, so that a ratio within a group is of neighbours in time. One round more,
    the first, is not counted: it pays for imports, kernels that are chosen, memory that is taken for the first time.

    :param groups: By name, each with its contestants by name. :param rounds: At least 1. :param seed: Of the orders.
    :param progress: Called after every turn.
    :return: Seconds a step of every counted round, by group and contestant.
    """
    order = random.Random(seed)
    found: dict[str, dict[str, list[float]]] = {group: {name: [] for name in turns} for group, turns in groups.items()}
    for number in range(rounds + 1):
        for group in order.sample(list(groups), len(groups)):
            for name in order.sample(list(groups[group]), len(groups[group])):
                seconds = groups[group][name]()
                if number:
                    found[group][name].append(seconds)
                if progress is not None:
                    progress()
    return found


def per_round(above: Sequence[float], below: Sequence[float]) -> Spread:
    """:param above: One figure a round. :param below: Likewise. :return: Their ratio, taken round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def matrix_turn(device: torch.device, precision: str, *, full: bool = False, repeats: int = 3) -> tuple[Turn, float]:
    """
    A product of two large square matrices as a contestant: what the chip does when nothing holds it up.

    :param precision: ``"32-true"``, on a GPU in TF32 where convolutions are, or ``"bf16-mixed"``.
    :param full: Whether TF32 is off, as it is for a method that subtracts nearby passes.
    :return: The turn, and the floating-point operations of one product.
    """
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))

    def turn() -> float:
        with full_float32(full), matrices_as_convolutions():
            start = waited(device)
            for _ in range(repeats):
                torch.mm(left, right)
            return (waited(device) - start) / repeats

    return turn, 2.0 * side**3


def growth_of(turn: Turn, device: torch.device) -> int | None:
    """
    The most memory, in bytes, that was in use during a turn beyond what was in use before it.

    On a CPU it is anonymous memory (files that are mapped do not count), looked at every millisecond: enter
    :func:`exact_memory` first. On a GPU it is the allocator's own count.

    :return: ``None`` where the system does not tell (no ``/proc``).
    """
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
        return int(torch.cuda.max_memory_allocated(device)) - int(allocated)
    if (before := _anonymous()) is None:
        return None
    most, over = before, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(_SAMPLE):
            most = max(most, _anonymous() or 0)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        turn()
    finally:
        over.set()
        watcher.join()
    return most - before


def _anonymous() -> int | None:
    """:return: Bytes of anonymous memory of this process."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


@contextmanager
def exact_memory() -> Iterator[None]:
    """
    Let glibc map every large block by itself for the duration, so that what is freed is gone at once.

    By default it keeps freed blocks of up to 32 MiB, and peaks of equal turns differ by a fifth; inside this context, by half a percent.
    To be entered before there is much to keep: what it has kept already it goes on using. Its own thresholds grow and cannot be
    had back; afterwards they stand where that growth would end.
    """
    _tune(_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        _tune(_MMAP_THRESHOLD, 1 << 25)
        _tune(_TRIM_THRESHOLD, 1 << 26)


def _tune(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no mallopt
        ctypes.CDLL(None).mallopt(parameter, value)
