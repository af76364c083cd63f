"""One source of random numbers a run: its state can be saved, and several ranks can share one global batch's draw."""

from __future__ import annotations

import math
import random as python
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from art_saliency import _checks

__all__ = [
    "RandomSource",
    "global_generators_kept",
    "global_states",
    "host_generators_kept",
    "normal",
    "set_global_states",
    "uniform",
]


class RandomSource:
    """
    A generator of its own on one device, so that nothing else in the process moves it.

    With several ranks every rank draws for the whole global batch and keeps its own rows: two ranks then use the very
    numbers of one process with the whole batch.

    :param seed: Where the sequence starts, 0 to 2**63 - 1.
    :param device: Where the numbers are drawn.
    :param rank: This process, from 0.
    :param world_size: How many processes share the batch.
    :ivar rows: This rank's images of the batch, where known: of a joint batch [a; b] it then keeps its rows of a and of b.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", *, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.rank, self.world_size = _checks.seed(seed), rank, world_size
        self.rows: int | None = None
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def uniform(self, like: Tensor) -> Tensor:
        """:return: Numbers in [0, 1) of the shape and dtype of `like`, whose first axis is the (rank's share of the) batch."""
        rows = len(like)
        shape = (rows * self.world_size, *like.shape[1:])
        drawn = torch.rand(shape, generator=self.generator, device=self.device, dtype=like.dtype)
        if self.world_size == 1:
            return drawn
        each = self.rows if self.rows and rows % self.rows == 0 else rows
        parts = drawn.view(rows // each, self.world_size, each, *like.shape[1:])
        return parts[:, self.rank].reshape(like.shape)

    def permutation(self, count: int) -> Tensor:
        """:return: (count,) int64, a random order, the same on every rank."""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """:return: The generator's state, as a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.generator.set_state(state["generator"].cpu())


def uniform(like: Tensor, random: RandomSource | None = None) -> Tensor:
    """:return: Numbers in [0, 1) of the shape of `like`, from `random`, or from torch's global generator when that is None."""
    return torch.rand_like(like) if random is None else random.uniform(like)


def normal(like: Tensor, random: RandomSource | None = None) -> Tensor:
    """
    Standard normal numbers of the shape of `like`, cut off near 4.9 standard deviations.

    The inverse normal distribution needs one uniform number an entry, where Box-Muller would need two.
    """
    return math.sqrt(2) * torch.erfinv((2 * uniform(like, random) - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def _global_generators() -> dict[str, torch.Generator]:
    """Torch's own, of the CPU and of every GPU. An idle CUDA is not started for this."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)  # type: ignore[no-untyped-call]
    return {"cpu": torch.default_generator, **{f"cuda:{gpu}": torch.cuda.default_generators[gpu] for gpu in gpus}}


def global_states() -> dict[str, Tensor]:
    """:return: Where torch's global generators stand, for :func:`set_global_states`."""
    return {name: generator.get_state() for name, generator in _global_generators().items()}


def set_global_states(states: dict[str, Tensor]) -> None:
    """Continue where :func:`global_states` was taken."""
    for name, generator in _global_generators().items():
        if name in states:
            generator.set_state(states[name])


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def global_generators_kept(seed: int | None = None) -> Iterator[None]:
    """
    Let torch's global generators, the CPU's and every GPU's, come back as they were.

    They are the whole process's: another thread that comes here waits, else it would give back what is this one's.

    :param seed: What they are seeded with meanwhile; ``None`` leaves them where they stand.
    """
    with _ONE_AT_A_TIME:
        before = global_states()
        if seed is not None:
            # torch.manual_seed would leave an idle CUDA a seed for its start.
            for generator in _global_generators().values():
                generator.manual_seed(seed)
        try:
            yield
        finally:
            set_global_states(before)


@contextmanager
def host_generators_kept(seed: int) -> Iterator[None]:
    """
    Seed NumPy's and Python's global generators, from which ART's attacks and data generators draw; they come back as they were.

    :param seed: 0 to 2**63 - 1.
    """
    before = np.random.get_state(), python.getstate()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    python.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        python.setstate(before[1])
