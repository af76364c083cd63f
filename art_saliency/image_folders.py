"""Folders of pictures, one folder a class: what is in them, and a loader that streams them from the disk."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from art_saliency import _checks
from art_saliency._batch_sizes import batches_in
from art_saliency.errors import ArtSaliencyError, CheckpointError
from art_saliency.randomness import RandomSource

__all__ = ["ImageFiles", "crop", "files_loader", "image_folder_loader", "images_of", "listed", "reading"]


def image_folder_loader(
    folder: str | os.PathLike[str],
    *,
    size: int,
    batch_size: int,
    train: bool,
    resize: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """
    Stream a folder of images that is too large for memory. Classes are numbered in the order of their sorted names.

    Order and crops depend on the seed and the epoch alone: not on the workers, nor on anybody else's random numbers.
    Flips are the :class:`~art_saliency.augmentation.Augmentation`'s, on the device.

    :param folder: Holds ``train/CLASS/*.png`` and the same classes in ``test/`` or, where there is none, ``val/``; one
        of the two will do.
    :param size: Side of the images in pixels.
    :param train: Whether ``train/`` is read, in a random order, each image by a random resized crop, a last batch of
        one image left out (BatchNorm has no variance for it); else ``test/`` or ``val/``, in order, resized and cropped
        at the centre.
    :param resize: The shorter side before that central crop; ``None`` is `size`. RobustBench's ImageNet: 256 for 224.
    :param num_workers: Processes that decode.
    :return: A loader of (B, 3, size, size) uint8 and (B,) int64; ``loader.dataset.classes`` are the names.
    """
    _checks.whole("size", size, least=1)
    _checks.whole("batch_size", batch_size, least=1)
    shorter = size if resize is None else _checks.whole("resize", resize, least=size)
    images = ImageFiles(images_of(Path(folder).expanduser(), train, crop(size, shorter, at_random=train)))
    return files_loader(
        images,
        torch.arange(len(images)),
        batch_size=batch_size,
        shuffle=train,
        drop_last=train and batches_in(len(images), batch_size) * batch_size < len(images),
        num_workers=_checks.whole("num_workers", num_workers),
        seed=_checks.seed(seed),
    )


def files_loader(
    files: ImageFiles,
    places: Tensor,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
    seed: int,
) -> DataLoader[Any]:
    """
    Decode images of files batch by batch.

    :param places: Of the images that are shown. :param shuffle: Whether in a new random order every epoch.
    :param drop_last: Whether an incomplete last batch is left out.
    """
    return _Loader(
        files,
        batch_size=batch_size,
        sampler=_SeededOrder(places, shuffle, seed),
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_undisturbed,
        generator=torch.Generator(),  # its own, or every epoch would move torch's global one
    )


class _Loader(DataLoader[Any]):
    """Whose workers' errors read as if there were no workers: torch puts the worker's traceback into the message."""

    stateless_workers = True  # each image is drawn by a seed of its own

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ArtSaliencyError as error:
            if not self.num_workers:
                raise
            # The last line of a traceback: the class, a colon, and what the error said, which is one line.
            said = str(error).rstrip().splitlines()[-1].partition(": ")[2]
            raise type(error)(said) from None


def _undisturbed(_: int) -> None:
    """
    Give a worker, which is forked with the run's handlers of signals, its own.

    Ctrl-C reaches every process of a terminal: workers ignore it, so that the run can still finish its step. SIGTERM is how the
    loader ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """
    Images in files, by (place, seed of the crop).

    The names lie in one array: a list of a million of them would take five times the memory, and be copied into every worker.

    :param images: torchvision's ImageFolder.
    """

    def __init__(self, images: Any) -> None:
        self.root, self.transform, self.classes = os.fspath(images.root), images.transform, tuple(images.classes)
        self.names = np.array([os.fsencode(file)[len(os.fsencode(self.root)) + 1 :] for file, _ in images.samples])
        self.labels = torch.tensor(images.targets, dtype=torch.int64)
        self.rank, self.world_size = 0, 1

    def transformed(self, transform: Callable[[Any], Any]) -> ImageFiles:
        """:return: The same files, with another transform."""
        files = copy.copy(self)
        files.transform = transform
        return files

    def of_rank(self, rank: int, world_size: int) -> ImageFiles:
        """:return: The same files; of a batch, only the rows of one of several processes are decoded, and the others are zero."""
        files = copy.copy(self)
        files.rank, files.world_size = rank, world_size
        return files

    def __len__(self) -> int:
        return len(self.names)

    def path(self, place: int) -> str:
        """:return: The file of an image."""
        return os.path.join(self.root, os.fsdecode(self.names[place]))

    def fingerprint(self) -> str:
        """:return: A sha256, in hex, of the files' names and lengths in bytes: reading them all could take hours."""
        digest = hashlib.sha256()
        for place in range(len(self)):
            digest.update(self.names[place] + f" {os.path.getsize(self.path(place))}\n".encode())
        return digest.hexdigest()

    def image(self, place: int) -> Tensor:
        """:return: (3, H, W) uint8."""
        image: Tensor = self.transform(_decoded(self.path(place)))
        return image

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        place, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would move a GPU's generator as well
            return self.image(place), int(self.labels[place])

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A batch at once: how torch's loaders ask for one."""
        each = len(keys) // self.world_size
        if self.world_size == 1 or each == 0:
            return [self[key] for key in keys]
        own = range(self.rank * each, (self.rank + 1) * each)
        first = self[keys[own.start]]
        blank = torch.zeros_like(first[0])
        rows = [(blank, int(self.labels[place])) for place, _ in keys]
        rows[own.start] = first
        rows[own.start + 1 : own.stop] = [self[keys[row]] for row in own[1:]]
        return rows


class _SeededOrder(Sampler[tuple[int, int]]):
    """
    (place, seed of the crop) of every image, the seeds new each epoch and so is the order of training.

    :ivar generator: What both are drawn from, under the name by which a run keeps it in its checkpoints.
    """

    def __init__(self, places: Tensor, shuffle: bool, seed: int) -> None:
        self.places, self.shuffle, self.random = places, shuffle, RandomSource(seed)
        self.generator = self.random.generator

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.places[self.random.permutation(len(self))] if self.shuffle else self.places
        seeds = torch.randint(1 << 62, (len(self),), generator=self.generator)
        return zip(order.tolist(), seeds.tolist(), strict=True)


def images_of(path: Path, train: bool, transform: Callable[[Any], Any]) -> Any:
    """:return: torchvision's ImageFolder of ``train/`` or the other part, whose classes must agree where both exist."""
    datasets = _checks.optional("torchvision.datasets", "vision", "reading a folder of images")
    folders = path / "train", path / "test" if (path / "test").is_dir() else path / "val"
    folder = folders[0 if train else 1]
    if not folder.is_dir():
        expected = str(folder) if train else f"{path / 'test'} or {folder}"
        raise CheckpointError(str(_checks.refuse(str(path), "no such folder", expected, "put CLASS/*.png into it")))
    learned, met = (
        {entry.name for entry in os.scandir(each) if entry.is_dir()} if each.is_dir() else None for each in folders
    )
    if learned is not None and met is not None and learned != met:
        missing, unknown = listed(sorted(learned - met)), listed(sorted(met - learned))
        got = f"classes that lack {missing} and add {unknown}"
        raise _checks.refuse(str(folders[1]), got, f"those of {folders[0]}", "give both the same folders")
    if not (learned if train else met):
        raise _checks.refuse(str(folder), "no folder in it", "one for each class", "put CLASS/*.png into it")
    images = datasets.ImageFolder(folder, transform=transform, loader=_decoded, allow_empty=True)
    empty = sorted(set(images.classes) - {images.classes[label] for label in set(images.targets)})
    if empty:
        raise _checks.refuse(str(folder), f"no image in {listed(empty)}", "at least one in each class")
    return images


def crop(size: int | None, shorter: int | None, *, at_random: bool = False) -> Any:
    """:return: A transform of a decoded image to (3, size, size) uint8; with no size, the image as it is."""
    v2 = _checks.optional("torchvision.transforms.v2", "vision", "resizing images")
    if size is None:
        return v2.PILToTensor()
    parts = [v2.RandomResizedCrop(size)] if at_random else [v2.Resize(shorter), v2.CenterCrop(size)]
    return v2.Compose([*parts, v2.PILToTensor()])


def _decoded(file: str) -> Any:
    image = _checks.optional("PIL.Image", "vision", "reading images")
    with reading(file, "replace or remove it"), image.open(file) as opened:
        if opened.mode in ("I", "F") or opened.mode.startswith("I;"):  # converting would cut off all above 255
            raise _checks.refuse(file, f"pixels of mode {opened.mode!r}", "8 bits a channel", "convert the image")
        return opened.convert("RGB")


def listed(names: Collection[str]) -> str:
    """Names in one line, the first few of many."""
    shown = ", ".join(list(names)[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "nothing"


@contextmanager
def reading(source: str | Path, remedy: str) -> Iterator[None]:
    """Whatever a parser raises on a file it cannot read (there are a dozen types) becomes one that names the file."""
    try:
        yield
    except ArtSaliencyError:
        raise
    except PermissionError as error:
        source = error.filename or source  # of a data set in several files
        expected = "a file that you may read"
        raise CheckpointError(
            str(_checks.refuse(f"{source}", "'Permission denied'", expected, "change its mode"))
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
        got = f"nothing readable ({type(error).__name__}: {reason})"
        raise CheckpointError(str(_checks.refuse(str(source), got, "whole, undamaged files", remedy))) from error
