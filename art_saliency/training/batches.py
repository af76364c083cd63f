"""Where training batches come from: a set that lies in memory and is moved once, or a stream of somebody's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from art_saliency.data import to_unit
from art_saliency.methods.base import Batch
from art_saliency.randomness import RandomSource

__all__ = ["Augment", "Batches", "ResidentBatches", "StreamedBatches"]

Augment = Callable[..., "tuple[Tensor, Tensor | None]"]
"""(x, random, maps) -> (x, maps): moves images, and maps with them, on the device."""


class Batches(Protocol):
    """An epoch of batches, again and again."""

    steps_per_epoch: int

    def epoch(self, random: RandomSource) -> Iterator[Batch]:
        """:return: The batches of one epoch, on the device."""


class ResidentBatches:
    """
    The whole training set on the device, kept as it came (uint8 stays uint8), shuffled anew every epoch.

    On a GPU whose free memory it would fill by more than two fifths it stays on the host and batches travel.
    A last batch of one image is left out of its epoch: BatchNorm has no variance for it. Shuffling makes it another every time.

    :param x: (N, C, H, W) in [0, 1] or uint8. :param y: (N,) int64 or (N, K).
    :param maps: (N, M, h, w) per-image maps; `expand` makes them as large as the images before augmentation moves both.
    :param augment: Moves images and maps on the device.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        augment: Augment | None = None,
        maps: Tensor | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        home = device if _fits(x, device) else torch.device("cpu")
        self.x, self.y, self.maps = x.to(home), y.to(device), None if maps is None else maps.to(home)
        self.device, self.augment, self.expand = device, augment, expand
        self.batch_size = min(batch_size, len(x))
        whole, rest = divmod(len(x), self.batch_size)
        self.steps_per_epoch = whole + (rest > 1)

    def epoch(self, random: RandomSource) -> Iterator[Batch]:
        """:return: Every image once, in a random order."""
        order = random.permutation(len(self.x))
        for step in range(self.steps_per_epoch):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            here = index.to(self.x.device)
            x = to_unit(self.x[here].to(self.device, non_blocking=True))
            maps = None if self.maps is None else self.maps[here].to(self.device, non_blocking=True)
            if maps is not None and self.expand is not None:
                maps = self.expand(maps)
            if self.augment is not None:
                x, maps = self.augment(x, random, maps)
            yield Batch(x, self.y[index.to(self.y.device)], index=index, maps=maps, random=random)


def _fits(x: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return x.numel() * x.element_size() < 0.4 * free


class StreamedBatches:
    """
    Batches of a loader that somebody else made; nothing of the set is kept.

    :param make: Called once an epoch; yields (x, y) of any array kind.
    :param prepare: (x, y) -> tensors, checked: (N, C, H, W) in [0, 1] and labels.
    :param steps_per_epoch: How many batches an epoch has.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        prepare: Callable[[Any, Any], tuple[Tensor, Tensor]],
        *,
        steps_per_epoch: int,
        device: torch.device,
        augment: Augment | None = None,
    ) -> None:
        self.make, self.prepare, self.steps_per_epoch = make, prepare, steps_per_epoch
        self.device, self.augment = device, augment

    def epoch(self, random: RandomSource) -> Iterator[Batch]:
        """:return: One pass through the loader."""
        stream = self.make()
        for _, (x, y) in zip(range(self.steps_per_epoch), stream, strict=False):
            x, y = self.prepare(x, y)
            x = to_unit(x.to(self.device, non_blocking=True))
            if self.augment is not None:
                x, _ = self.augment(x, random, None)
            yield Batch(x, y.to(self.device, non_blocking=True), random=random)
