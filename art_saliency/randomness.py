"""One source of random numbers a run: its state can be saved, and several ranks can share one global batch's draw."""

from __future__ import annotations

import math
import random as python
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from art_saliency import _checks

__all__ = [
    "RandomSource",
    "global_generators_kept",
    "global_states",
    "host_states",
    "normal",
    "seed_everything",
    "set_global_states",
    "set_host_states",
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


def _torch_generators() -> dict[str, torch.Generator]:
    """The CPU's and every GPU's. Asking an idle CUDA for its own would start it: hundreds of MiB, and no fork afterwards."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)  # type: ignore[no-untyped-call]
    return {"cpu": torch.default_generator, **{f"cuda:{gpu}": torch.cuda.default_generators[gpu] for gpu in gpus}}


def host_states() -> dict[str, Any]:
    """:return: Where NumPy's and Python's global generators stand, in types that ``torch.load(weights_only=True)`` reads."""
    numpy: Any = np.random.get_state()  # noqa: NPY002, ART's attacks and data generators draw from it
    _, keys, position, has_gauss, gauss = numpy
    version, words, pending = python.getstate()
    return {
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words), pending],
    }


def set_host_states(states: Mapping[str, Any]) -> None:
    """Continue where :func:`host_states` was taken."""
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, pending = states["python"]
    python.setstate((version, tuple(words.tolist()), pending))


def global_states() -> dict[str, Any]:
    """:return: Where every global generator stands, torch's and those of :func:`host_states`, for :func:`set_global_states`."""
    return {**{name: generator.get_state() for name, generator in _torch_generators().items()}, **host_states()}


def set_global_states(states: Mapping[str, Any]) -> None:
    """Continue where :func:`global_states` was taken."""
    for name, generator in _torch_generators().items():
        if name in states:
            generator.set_state(states[name])
    if "cuda:0" not in states and torch.cuda.is_available():
        # Seeds given to an idle CUDA wait for its start. Its state cannot be read, but torch seeds it with the CPU's.
        torch.cuda.manual_seed_all(torch.initial_seed())
    set_host_states(states)


def seed_everything(seed: int, host_seed: int | None = None) -> None:
    """Seed every global generator: a randomised network may draw from any of them. :param host_seed: NumPy's and Python's, if another."""
    host_seed = seed if host_seed is None else host_seed
    torch.manual_seed(seed)
    python.seed(host_seed)
    np.random.seed(host_seed % 2**32)  # noqa: NPY002


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def global_generators_kept(seed: int | None = None, host_seed: int | None = None) -> Iterator[None]:
    """
    Let the global generators, torch's, NumPy's and Python's, come back as they were.

    They are the whole process's: another thread that comes here waits, else it would give back what is this one's.

    :param seed: What they are seeded with meanwhile; ``None`` leaves them where they stand. :param host_seed: As of :func:`seed_everything`.
    """
    with _ONE_AT_A_TIME:
        before = global_states()
        try:
            if seed is not None:
                seed_everything(seed, host_seed)
            yield
        finally:
            set_global_states(before)
