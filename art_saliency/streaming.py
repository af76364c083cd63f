"""
Folders of images that are too large for memory: a data set whose images are decoded when they are taken.

What stays in memory is a line for each file, and the images that are held out. Whatever is taken has the pixels that
:func:`art_saliency.data.load_data` gives.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from art_saliency import _checks, data
from art_saliency._batch_sizes import batches_in
from art_saliency.data import DataSet, held_out_count, load_data, stratified_split, to_unit
from art_saliency.image_folders import ImageFiles, crop, files_loader, images_of

__all__ = ["HELD_OUT_LIMIT", "Pictures", "StreamedSet", "open_data", "split_augmentation"]

HELD_OUT_LIMIT = 5000
"""The most images that are held out of a streamed set: they are decoded once and stay in memory."""

_SAMPLE = 2000  # images that mean and deviation are taken of


class Pictures:
    """
    Images in files, indexed as a (N, 3, S, S) uint8 tensor is: a slice, indices or one index; only those are decoded.

    :param files: The files.
    """

    dtype = torch.uint8

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files, self.shape = files, torch.Size((len(files), 3, size, size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Any) -> Tensor:
        places = torch.arange(len(self.files))[key]
        count, one = places.numel(), 3 * self.shape[2] * self.shape[3]
        if count * one > data.MEMORY_LIMIT:
            limit = f"at most {data.MEMORY_LIMIT // one:,}, which {data.MEMORY_LIMIT / (1 << 30):g} GiB hold"
            raise _checks.refuse("images", f"{count:,} at once", limit, "take fewer (--images)")
        taken = torch.empty((count, *self.shape[1:]), dtype=torch.uint8)
        for row, place in enumerate(places.flatten().tolist()):
            taken[row] = self.files.image(place)
        return taken[0] if places.ndim == 0 else taken


class StreamedSet:
    """
    A folder of images as a :class:`~art_saliency.data.DataSet` that holds none of them.

    :param folder: As for :func:`~art_saliency.data.load_data`. :param size: Side in pixels to which images are resized and cropped.
    :ivar y_train: (N,) int64. :ivar y_test: As `y_train`. :ivar class_names: One an index.
    """

    def __init__(self, folder: str | os.PathLike[str], *, size: int | None) -> None:
        path = Path(folder).expanduser()
        if size is None:
            raise _checks.refuse("size", "None", "the side of the images in pixels", "say size=224 (--size 224), say")
        self.size, self.name = _checks.whole("size", size, least=1), path.resolve().name
        self._files = {
            part: ImageFiles(images_of(path, part == "train", crop(size, size))) for part in ("train", "test")
        }
        self.class_names = self._files["train"].classes
        self.num_classes = len(self.class_names)
        self.y_train, self.y_test = (self._files[part].labels for part in ("train", "test"))
        self.x_test = Pictures(self._files["test"], self.size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.size, self.size

    @property
    def x_train(self) -> Tensor:
        """:raises InputError: Always: nothing that wants all images at once can have them."""
        raise _checks.refuse(
            "x_train",
            f"all {len(self.y_train):,} images of a streamed folder",
            "batches of them (training_loader)",
            "where networks would be trained for transferred attacks, name some (--surrogate DIR) or none (--no-surrogates)",
        )

    def split(self, validation_split: float, seed: int) -> Any:
        """:raises InputError: Always, as :attr:`x_train`: see :meth:`hold_out`."""
        return self.x_train

    def fingerprint(self) -> str:
        """:return: A sha256, in hex, of the files' names and lengths in bytes, and of `size`: reading them all would take hours."""
        files = " ".join(self._files[part].fingerprint() for part in ("train", "test"))
        return hashlib.sha256(f"streamed {self.size} {files}".encode()).hexdigest()

    def mean(self) -> tuple[float, ...]:
        """:return: The mean of each channel over 2,000 training images, or all if there are fewer, in units of [0, 1]."""
        return tuple(self._moments()[0].tolist())

    def std(self) -> tuple[float, ...]:
        """:return: The standard deviation of each channel over the pixels of those images, in units of [0, 1]."""
        first, second = self._moments()
        return tuple((second - first.square()).sqrt().tolist())

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The means of each channel's values and squares, in float64, over images at even distances."""
        files, sums = self._files["train"], torch.zeros(2, 3, dtype=torch.float64)
        places = torch.linspace(0, len(files) - 1, min(_SAMPLE, len(files)), dtype=torch.float64).round().long()
        for place in places.tolist():
            pixels = to_unit(files.image(place)).double().flatten(1)
            sums += torch.stack([pixels.mean(1), pixels.square().mean(1)])
        first, second = sums / len(places)
        return first, second

    def hold_out(self, validation_split: float, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """
        Set a part of the training images aside for validation, stratified: at most :data:`HELD_OUT_LIMIT`, which are decoded now.

        :param validation_split: The share to set aside, above 0 and below 1; at least one image.
        :return: The places of the images to train on, for :meth:`training_loader`, and (x, y) to validate on.
        """
        count = min(held_out_count(validation_split, len(self.y_train)), HELD_OUT_LIMIT)
        kept, aside = stratified_split(self.y_train, count, seed)
        return kept, (Pictures(self._files["train"], self.size)[aside], self.y_train[aside])

    def training_loader(
        self,
        places: Tensor | None = None,
        *,
        batch_size: int,
        seed: int,
        random_crop: bool = False,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> DataLoader[Any]:
        """
        Training images in a new random order every epoch, which depends on the seed and the epoch alone.

        A last batch that leaves a process less than two images is left out (BatchNorm has no variance for one).

        :param places: Of the images to train on; ``None`` is all. :param batch_size: Images a step, of all processes together.
        :param random_crop: Whether an image is a random resized crop of its file, as is usual for ImageNet; else the central crop.
        :param num_workers: Processes that decode. :param rank: This process; it decodes its own rows of a batch alone, and the
            others' are zero. :param world_size: How many processes share a batch.
        :return: A loader of (B, 3, size, size) uint8 and (B,) int64, for ``fit_generator``.
        """
        files = self._files["train"]
        if random_crop:
            files = files.transformed(crop(self.size, self.size, at_random=True))
        places = torch.arange(len(files)) if places is None else places
        return files_loader(
            files.of_rank(rank, world_size),
            places,
            batch_size=_checks.whole("batch_size", batch_size, least=1),
            shuffle=True,
            drop_last=batches_in(len(places), batch_size, world_size) * batch_size < len(places),
            num_workers=_checks.whole("num_workers", num_workers),
            seed=_checks.seed(seed),
        )


def open_data(
    spec: str | os.PathLike[str], *, size: int | None = None, stream: bool = False, **options: Any
) -> DataSet | StreamedSet:
    """
    A data set in memory where it is small, and a streamed one where it is a folder of images that is large.

    :param spec: As for :func:`~art_saliency.data.load_data`. :param size: Likewise.
    :param stream: Whether a folder of images is streamed however small it is; else where ``art_saliency.data.MEMORY_LIMIT`` (8 GiB)
        would not hold its training images.
    :param options: The other keywords of ``load_data``.
    :raises InputError: When anything but a folder of images is to be streamed.
    """
    path = Path(spec).expanduser()
    folder = os.fspath(spec) not in data.NAMES and path.is_dir() and (path / "train").is_dir()
    folder = folder and not any(path.glob("*.npy"))
    if stream and not folder:
        raise _checks.refuse("stream", f"{os.fspath(spec)!r}", "a folder of images: train/CLASS/*.png", "leave it out")
    if folder and not stream and size is not None:
        bytes_ = 3 * _checks.whole("size", size, least=1) ** 2
        stream = len(images_of(path, True, crop(size, size))) * bytes_ > data.MEMORY_LIMIT
    return StreamedSet(path, size=size) if stream else load_data(spec, size=size, **options)


def split_augmentation(name: str, *, streamed: bool) -> tuple[bool, str]:
    """
    What of an augmentation happens while images are decoded, and what on the device.

    :param name: ``"resized-crop"`` or ``"resized-crop-flip"``, of streamed sets alone; or one of
        :data:`art_saliency.augmentation.AUGMENTATIONS`.
    :return: Whether files are cropped at random, and the name of the augmentation on the device.
    """
    at_random = {"resized-crop": "none", "resized-crop-flip": "flip"}
    if name not in at_random:
        return False, name
    if not streamed:
        expected = "none, flip, crop or crop-flip for images in memory"
        raise _checks.refuse("augment", repr(name), expected, "stream a folder of images: --stream")
    return True, at_random[name]
