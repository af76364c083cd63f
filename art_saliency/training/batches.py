"""Where training batches come from: a set that lies in memory and is moved once, or a stream of somebody's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency._batch_sizes import batches_in, too_few
from art_saliency.data import to_unit
from art_saliency.methods.base import Batch
from art_saliency.randomness import RandomSource

__all__ = ["Augment", "Batches", "ImageView", "ResidentBatches", "StreamedBatches"]

Augment = Callable[..., "tuple[Tensor, Tensor | None]"]
"""(x, random, maps) -> (x, maps): moves images, and maps with them, on the device."""


class ImageView:
    """
    Images of a set by their places in it, brought to [0, 1] as they are asked for: of a set in a file nothing else is ever in memory.

    :param source: (N, C, H, W), in memory or mapped from a file.
    :param places: (M,) int64, which images; ``None`` is all of them.
    :param convert: Brings images of the source to [0, 1] or uint8; ``None`` leaves them as they are.
    :ivar shape: (M, C, H, W). :ivar dtype: Of the images that are given. :ivar device: Where the source lies.
    """

    def __init__(
        self, source: Tensor, places: Tensor | None = None, convert: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.source, self.convert = source, convert
        self.places = None if places is None else places.to(source.device)
        self.shape = torch.Size([len(source) if places is None else len(places), *source.shape[1:]])
        self.device = source.device
        self.dtype = self[:1].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """:param index: Places in this view. :return: These images, (B, C, H, W)."""
        images = self.source[index if self.places is None else self.places[index]]
        return images if self.convert is None else self.convert(images)

    def among(self, places: Tensor) -> ImageView:
        """:return: A view of some of these images."""
        places = places.to(self.device)
        return ImageView(self.source, places if self.places is None else self.places[places], self.convert)

    def to(self, device: torch.device) -> Tensor:
        """:return: All of them on a device, copied piece by piece where they are not the source itself."""
        if self.places is None and self.convert is None:
            return self.source.to(device)
        images = torch.empty(self.shape, dtype=self.dtype, device=device)
        rows = max(1, _PIECE // max(1, self.shape[1:].numel()))
        for start in range(0, len(self), rows):
            images[start : start + rows] = self[start : start + rows].to(device)
        return images


_PIECE = 1 << 22  # pixels that are copied at a time


class Batches(Protocol):
    """
    An epoch of batches, again and again.

    :ivar steps_per_epoch: How many batches an epoch has.
    :ivar generators: What the order is drawn from beside the run's random source and torch's global generator.
    """

    steps_per_epoch: int
    generators: Sequence[torch.Generator]

    def epoch(self, random: RandomSource, start: int = 0) -> Iterator[Batch]:
        """
        Draw the epoch's order, at once, and leave out its first batches without a look at them.

        :param start: How many are left out: an interrupted epoch goes on there.
        :return: The other batches of the epoch, on the device.
        """


class ResidentBatches:
    """
    The whole training set on the device, kept as it came (uint8 stays uint8), shuffled anew every epoch.

    On a GPU whose free memory it would fill by more than two fifths it stays on the host and batches travel.
    A last batch of one image is left out of its epoch: BatchNorm has no variance for it. Shuffling makes it another every time.

    :param x: (N, C, H, W) in [0, 1] or uint8; a view that stays on the host is read batch by batch.
    :param y: (N,) int64 or (N, K).
    :param maps: (N, M, h, w) per-image maps; `expand` makes them as large as the images before augmentation moves both.
    :param augment: Moves images and maps on the device.
    :param world_size: How many processes share every batch, each its equal part; what is left over is left out as the last one is.
    """

    def __init__(
        self,
        x: Tensor | ImageView,
        y: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        augment: Augment | None = None,
        maps: Tensor | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> None:
        home = device if _fits(x, device) else torch.device("cpu")
        self.x = x if x.device == home else x.to(home)
        self.y, self.maps = y.to(device), None if maps is None else maps.to(home)
        self.device, self.augment, self.expand = device, augment, expand
        self.batch_size = min(batch_size, len(x))
        self.steps_per_epoch = batches_in(len(x), self.batch_size, world_size)

    generators: Sequence[torch.Generator] = ()

    def epoch(self, random: RandomSource, start: int = 0) -> Iterator[Batch]:
        """:return: Every image once, in a random order, from batch `start` on."""
        return self._batches(random.permutation(len(self.x)), random, start)

    def _batches(self, order: Tensor, random: RandomSource, start: int) -> Iterator[Batch]:
        at_home = order.to(self.x.device)  # once an epoch: in a step the host would wait for it
        for step in range(start, self.steps_per_epoch):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index, here = _own_rows(order[batch], random), _own_rows(at_home[batch], random)
            x = to_unit(_sent(self.x[here], self.device))
            maps = None if self.maps is None else _sent(self.maps[here], self.device)
            if maps is not None and self.expand is not None:
                maps = self.expand(maps)
            if self.augment is not None:
                had_maps = maps is not None
                x, maps = self.augment(x, random, maps)
                if had_maps and maps is None:
                    raise _checks.refuse("augment", "no maps back", "those it was given, moved as the images are")
            yield Batch(x, self.y[index], index=index, maps=maps, random=random)


def _own_rows(batch: Tensor, random: RandomSource) -> Tensor:
    """:return: This process's equal part of a batch: all of it, where there is one process."""
    if random.world_size == 1:
        return batch
    random.rows = len(batch) // random.world_size
    return batch[random.rank * random.rows : (random.rank + 1) * random.rows]


def _fits(x: Tensor | ImageView, device: torch.device) -> bool:
    if device.type != "cuda" or x.device.type == "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own to give again
    return x.shape.numel() * x.dtype.itemsize < 0.4 * free


def _sent(batch: Tensor, device: torch.device) -> Tensor:
    """
    :return: A batch on the device. What a GPU is sent from pinned memory travels while the host goes on; what it sends is waited
        for, as the host would read it before it has come.
    """
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=device.type != "cpu")


class StreamedBatches:
    """
    Batches of a loader that somebody else made; nothing of the set is kept.

    A last batch that is smaller than those before it is left out where it leaves a process less than two images. Several processes
    load the same batches, each for itself, and train on their own rows.

    :param make: Called once an epoch; yields (x, y) of any array kind.
    :param prepare: (x, y) -> tensors, checked: (N, C, H, W) in [0, 1] and labels.
    :param steps_per_epoch: How many batches an epoch has.
    :param generators: The loader's own, where it shuffles with one.
    :param shared: What torch's global generator of the CPU is while a batch is loaded, alike in all processes; ``None``, where there
        is one process, leaves it as it is.
    :ivar labels_sum: A number that tells the labels of one whole batch from those of another: the last batch's.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        prepare: Callable[[Any, Any], tuple[Tensor, Tensor]],
        *,
        steps_per_epoch: int,
        device: torch.device,
        augment: Augment | None = None,
        generators: Sequence[torch.Generator] = (),
        shared: torch.Generator | None = None,
    ) -> None:
        self.generators = generators if shared is None else (*generators, shared)
        self.make, self.prepare, self.steps_per_epoch = make, prepare, steps_per_epoch
        self.device, self.augment, self.shared = device, augment, shared
        self.labels_sum = 0

    def epoch(self, random: RandomSource, start: int = 0) -> Iterator[Batch]:
        """:return: One pass through the loader, from batch `start` on: those before it are loaded and left."""
        rows = 0
        with self._shared_state():
            stream = iter(self.make())
            for _, pair in zip(range(start), stream, strict=False):
                rows = len(pair[1])
        return self._batches(stream, random, start, rows)

    def _batches(self, stream: Iterator[Any], random: RandomSource, start: int, rows: int) -> Iterator[Batch]:
        for step in range(start, self.steps_per_epoch):
            with self._shared_state():
                pair = next(stream, None)
            if pair is None:
                return
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                got = f"{len(pair)} things" if isinstance(pair, (tuple, list)) else f"a {type(pair).__name__}"
                raise _checks.refuse("generator", f"{got} as a batch", "pairs of images and labels")
            x, y = self.prepare(*pair)
            if step == self.steps_per_epoch - 1 and len(x) < rows and too_few(len(x), random.world_size):
                return
            rows = len(x)
            if rows < random.world_size:
                got = f"a batch of {rows} images for {random.world_size} processes"
                raise _checks.refuse("generator", got, "one image a process at least")
            if random.world_size > 1:
                self.labels_sum = _labels_sum(y)
            x, y = _own_rows(x, random), _own_rows(y, random)
            x = to_unit(_sent(x, self.device))
            if self.augment is not None:
                x, _ = self.augment(x, random, None)
            yield Batch(x, _sent(y, self.device), random=random)

    @contextmanager
    def _shared_state(self) -> Iterator[None]:
        """Else a loader that shuffles by torch's global generator, of which dropout draws too, would shuffle otherwise in each process."""
        if self.shared is None:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(self.shared.get_state())
        try:
            yield
        finally:
            self.shared.set_state(torch.get_rng_state())
            torch.set_rng_state(own)


def _labels_sum(y: Tensor) -> int:
    labels = (y if y.ndim == 1 else y.argmax(1)).cpu()
    places = torch.arange(1, 2 * len(labels), 2, dtype=torch.int64)
    return int(((labels.long() + 1) * places * places).sum())
