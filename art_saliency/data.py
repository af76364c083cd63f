"""
Data sets by one call: the embedded digits, torchvision's, ``.npz`` files, folders of ``.npy`` files or of images.

Pixels stay as the source has them: uint8 for 0 to 255, else float32 in [0, 1]. Normalisation belongs to the network.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.augmentation import Augmentation, augmentation_by_name
from art_saliency.errors import CheckpointError, InputError
from art_saliency.image_folders import crop, image_folder_loader, images_of, listed, reading

__all__ = [
    "NAMES",
    "Augmentation",
    "DataSet",
    "augmentation_by_name",
    "held_out_count",
    "image_folder_loader",
    "load_data",
    "stratified_split",
    "to_unit",
]

NAMES = ("digits", "cifar10", "cifar100", "svhn", "mnist")
"""Sets known by name; all but the embedded digits are torchvision's."""

MEMORY_LIMIT = 8 << 30
"""Bytes up to which each part of a folder of images is kept in memory; :func:`image_folder_loader` streams any."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_CHUNK = 1 << 22  # pixels read at a time, so that a memory-mapped set is never in memory as a whole


def to_unit(x: Tensor) -> Tensor:
    """:return: uint8 pixels as float32 in [0, 1], on their device; anything else as it is."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def held_out_count(validation_split: float, count: int) -> int:
    """:return: How many of `count` training images a share, above 0 and below 1, sets aside: one at least, and not all."""
    share = _checks.real("validation_split", validation_split, above=0, below=1)
    if count < 2:
        raise _checks.refuse("validation_split", f"a training set of {count} image", "at least 2 images")
    return min(max(1, round(share * count)), count - 1)


def stratified_split(y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """
    Set `count` images aside at random, of every class its share as nearly as whole images allow.

    :param y: (N,) int64.
    :param count: How many to set aside, 1 to N - 1.
    :return: Places of the images that are kept and of those set aside, int64, ascending.
    """
    _checks.whole("count", count, least=1, most=len(y) - 1)
    # The only generator of these libraries whose numbers are promised never to change (NumPy's NEP 19).
    random = np.random.RandomState(_checks.seed(seed) % 2**32)
    labels = y.cpu().numpy()
    sizes = np.bincount(labels)
    shares = sizes * count / len(labels)
    quota = np.floor(shares).astype(np.int64)
    # The images still missing come from the classes with the largest remainders, at random among equal ones.
    classes = random.permutation(len(sizes))
    quota[classes[np.argsort((quota - shares)[classes], kind="stable")[: count - quota.sum()]]] += 1
    order = random.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]  # class after class, at random inside each
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    aside = np.zeros(len(labels), dtype=bool)
    aside[by_class[rank < np.repeat(quota, sizes)]] = True
    return torch.from_numpy(np.flatnonzero(~aside)), torch.from_numpy(np.flatnonzero(aside))


@dataclass(frozen=True, eq=False)
class DataSet:
    """
    A training and a test set. Arrays that came from ``.npy`` files are mapped from the disk: do not write into them.

    :ivar x_train: (N, C, H, W), uint8, or float32 in [0, 1].
    :ivar y_train: (N,) int64.
    :ivar x_test: As `x_train`.
    :ivar y_test: As `y_train`.
    :ivar class_names: One an index, where the source names its classes; else empty.
    """

    name: str
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    num_classes: int
    class_names: tuple[str, ...] = field(default=(), repr=False)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """:return: The sha256 of the four arrays, in hex: the same wherever equal images and labels came from."""
        digest = hashlib.sha256()
        for array in _ARRAYS:
            tensor = getattr(self, array)
            digest.update(f"{array} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for chunk in _chunks(tensor):
                digest.update(chunk.contiguous().numpy().data)
        return digest.hexdigest()

    def mean(self) -> tuple[float, ...]:
        """:return: The mean of each channel over the training images, in units of [0, 1]."""
        return tuple(self._moment(lambda pixels: pixels).tolist())

    def std(self) -> tuple[float, ...]:
        """:return: The standard deviation of each channel over all training pixels, in units of [0, 1]."""
        mean = torch.tensor(self.mean(), dtype=torch.float64).view(1, -1, 1, 1)
        return tuple(self._moment(lambda pixels: (pixels - mean).square()).sqrt().tolist())

    def _moment(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of a function of each channel's pixels, in float64."""
        total = torch.zeros(self.input_shape[0], dtype=torch.float64)
        for chunk in _chunks(self.x_train):
            total += function(chunk.double() / (255 if chunk.dtype == torch.uint8 else 1)).sum((0, 2, 3))
        return total / (self.x_train.numel() / self.input_shape[0])

    def split(self, validation_split: float, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """
        Set a part of the *training* set aside for validation, stratified; the test set is not touched.

        :param validation_split: The share to set aside, above 0 and below 1; at least one image.
        :return: (x, y) to train on and (x, y) to validate on, both copies.
        """
        parts = stratified_split(self.y_train, held_out_count(validation_split, len(self.y_train)), seed)
        train, validation = ((self.x_train[index], self.y_train[index]) for index in parts)
        return train, validation


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    step = max(1, _CHUNK // tensor[0].numel())
    return (tensor[start : start + step] for start in range(0, len(tensor), step))


def load_data(
    spec: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    size: int | None = None,
    layout: str | None = None,
    num_classes: int | None = None,
) -> DataSet:
    """
    Read a data set.

    :param spec: One of :data:`NAMES`; or the path of a ``.npz`` file with ``x_train, y_train, x_test, y_test``; of a
        folder of four ``.npy`` files with those names, which are memory-mapped; or of a folder of images,
        ``train/CLASS/*.png`` and the same classes in ``test/`` or, where there is none, ``val/``. Arrays of images are
        (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; labels are indices or one-hot.
    :param root: Where torchvision keeps its sets; ``None`` is ``~/.cache/art_saliency``.
    :param download: Whether a set of torchvision's that is not there is fetched.
    :param size: Side in pixels to which a folder's images are resized and cropped; ``None`` takes them as they are.
    :param layout: ``"NCHW"`` or ``"NHWC"``, for arrays whose shape could be either.
    :param num_classes: For arrays whose training labels do not show every class; ``None`` counts them.
    :raises CheckpointError: When a file is missing or damaged.
    :raises InputError: When what it holds is not a data set, or no set has that name.
    """
    if layout is not None:
        _checks.one_of("layout", layout, ("NCHW", "NHWC"))
    if num_classes is not None:
        _checks.whole("num_classes", num_classes, least=2)
    if not isinstance(spec, (str, os.PathLike)):
        raise _checks.refuse("data", repr(spec), "a name or a path")
    name, path = os.fspath(spec), Path(spec).expanduser()
    kind = "name" if name in NAMES else _kind(path)
    for keyword, value, taker in (
        ("size", size, "images"),
        ("layout", layout, "arrays"),
        ("num_classes", num_classes, "arrays"),
    ):
        if value is not None and kind != taker:
            raise _checks.refuse(keyword, repr(value), f"no {keyword} for {name!r}", f"it is for {_SOURCES[taker]}")
    if name == "digits":
        return _digits()
    if kind == "name":
        return _torchvision(name, Path("~/.cache/art_saliency" if root is None else root).expanduser(), download)
    name = path.resolve().name  # reports show it: where the files lie is nobody's business
    if kind == "images":
        return _image_folder(name, path, size)
    return _data_set(name, _read_npy(path) if path.is_dir() else _read_npz(path), layout, num_classes)


_SOURCES = {"images": "folders of images", "arrays": ".npz files and folders of .npy files"}


def _digits() -> DataSet:
    """scikit-learn's 1,797 digits, 8x8: 1,437 to train on, 360 to test on, the same ones everywhere."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16  # 0 to 16, so exact in float32
    y = torch.from_numpy(digits.target).long()
    train, test = stratified_split(y, 360, seed=0)
    return DataSet("digits", x[train], y[train], x[test], y[test], 10, tuple("0123456789"))


def _torchvision(name: str, root: Path, download: bool) -> DataSet:
    datasets = _checks.optional("torchvision.datasets", "vision", f"reading {name}")
    make = getattr(datasets, {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "mnist": "MNIST"}[name])
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        which = {"split": part} if name == "svhn" else {"train": part == "train"}
        remedy = (
            "look at the connection"
            if download
            else f"say download=True (--download) to fetch {name}, or root= (--data-root) to find it"
        )
        with reading(root, remedy):
            source = make(root, download=download, **which)
            labels = source.labels if name == "svhn" else source.targets
            arrays[f"x_{part}"], arrays[f"y_{part}"] = np.asarray(source.data), np.asarray(labels)
    classes = tuple(getattr(source, "classes", "0123456789"))
    return _data_set(name, arrays, None, len(classes), classes)


def _kind(path: Path) -> str:
    """Whether a path holds "arrays" or "images"."""
    if path.is_file():
        return "arrays"
    if not path.is_dir():
        known = f"one of {', '.join(map(repr, NAMES))}, a .npz file, or a folder of .npy files or of images"
        if path.suffix or len(path.parts) > 1:
            raise CheckpointError(f"data: got {str(path)!r}, which does not exist, expected {known}; check the path")
        raise InputError(f"data: got {str(path)!r}, expected {known}{_checks.suggestion(path, NAMES)}")
    if any(path.glob("*.npy")):
        return "arrays"
    if (path / "train").is_dir():
        return "images"
    present = sorted(entry.name for entry in path.iterdir())
    raise _checks.refuse(
        str(path), listed(present), f"{', '.join(f'{name}.npy' for name in _ARRAYS)}, or train/CLASS/*.png"
    )


def _all_present(path: Path, present: Collection[str]) -> None:
    if not set(_ARRAYS) <= set(present):
        raise _checks.refuse(str(path), f"arrays {listed(present)}", ", ".join(_ARRAYS), "save them under these names")


def _read_npz(path: Path) -> dict[str, Any]:
    with (
        reading(path, "write it again with numpy.savez"),
        path.open("rb"),
    ):  # is_zipfile says False of what it may not read
        if not zipfile.is_zipfile(path):  # numpy would take it for a pickle and propose to load it unsafely
            raise ValueError("no .npz archive, or only a part of one")
        with np.load(path, allow_pickle=False) as archive:
            _all_present(path, archive.files)
            return {name: _native(name, archive[name]) for name in _ARRAYS}


def _native(name: str, array: Any) -> Any:
    """:return: An array of an archive in this machine's byte order, the only one that torch knows."""
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no .npy file
        raise TypeError(f"{name} is no array")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_npy(path: Path) -> dict[str, Any]:
    _all_present(path, sorted(file.stem for file in path.glob("*.npy")))
    arrays = {}
    for name in _ARRAYS:
        file = path / f"{name}.npy"
        with reading(file, "write it again with numpy.save"):
            arrays[name] = np.lib.format.open_memmap(file, mode="r")
    return arrays


def _data_set(
    name: str, arrays: dict[str, Any], layout: str | None, num_classes: int | None, class_names: tuple[str, ...] = ()
) -> DataSet:
    """Check four arrays and bring them into form."""
    x_train, x_test = (_pixels(key, arrays[key], layout) for key in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        got, expected = (f"{x.dtype} images of shape {tuple(x.shape[1:])}" for x in (x_test, x_train))
        raise _checks.refuse("x_test", got, f"{expected} as in x_train")
    classes = _class_count(arrays["y_train"]) if num_classes is None else num_classes
    y_train, y_test = (
        _checks.labels(_as_int64(arrays[key]), len(x), classes, name=key, soft=False)
        for key, x in (("y_train", x_train), ("y_test", x_test))
    )
    return DataSet(name, x_train, y_train, x_test, y_test, classes, class_names)


def _pixels(name: str, array: Any, layout: str | None) -> Tensor:
    """:return: (N, C, H, W) uint8, or float32 in [0, 1]; a view where the array is memory-mapped."""
    mapped = isinstance(array, np.memmap)
    accepted = array.dtype in (np.uint8, np.float32) if mapped else array.dtype == np.uint8 or array.dtype.kind == "f"
    if not accepted:
        remedy = "a mapped array is not converted: save it as one of these" if mapped else "convert it with astype"
        raise _checks.refuse(name, f"dtype {array.dtype}", "uint8 from 0 to 255 or float32 in [0, 1]", remedy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written
        tensor = torch.from_numpy(array)
    tensor = _checks.images(_channels_first(name, tensor, layout), name=name, allow_uint8=True)
    return tensor if mapped else tensor.to(torch.uint8 if tensor.dtype == torch.uint8 else torch.float32).contiguous()


def _channels_first(name: str, x: Tensor, layout: str | None) -> Tensor:
    shape = tuple(x.shape)
    if x.ndim == 3 and 0 not in shape[1:]:
        return x[:, None]
    axes = {"NCHW": 1, "NHWC": 3} if layout is None else {layout: {"NCHW": 1, "NHWC": 3}[layout]}
    fitting = [name for name, axis in axes.items() if x.ndim == 4 and shape[axis] in (1, 3) and 0 not in shape[1:]]
    if not fitting:
        known = layout or "(N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise _checks.refuse(name, f"shape {shape}", f"{known} with 1 or 3 channels", "reshape it to images")
    if len(fitting) == 2:
        raise _checks.refuse(
            name, f"shape {shape}", "1 or 3 channels on one side only", "in Python say layout='NCHW' or 'NHWC'"
        )
    return x if fitting == ["NCHW"] else x.permute(0, 3, 1, 2)


def _as_int64(y: Any) -> Any:
    return y.astype(np.int64) if y.dtype.kind in "iu" else y


def _class_count(y: Any) -> int:
    """How many classes training labels show: the columns of rows, or one more than the greatest index."""
    labels = _checks.as_tensor("y_train", _as_int64(y))
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels.shape[1]
    finite = labels[torch.isfinite(labels)]  # what is not finite, or is no index, is refused with the other labels
    least, most = (int(finite.min()), int(finite.max())) if finite.numel() else (0, 0)
    if least > 0:
        remedy = f"subtract {least}, or in Python say num_classes={most + 1} if the classes below have no image"
        raise _checks.refuse("y_train", f"labels from {least} to {most}", "labels that begin at 0", remedy)
    if most < 1:
        raise _checks.refuse(
            "y_train", "one class", "at least 2 classes", "in Python say num_classes if others have no image"
        )
    if most >= len(labels):  # identifiers, say: a network of so many classes may not even fit into memory
        remedy = f"number the classes from 0, or in Python say num_classes={most + 1} if most of them have no image"
        raise _checks.refuse(
            "y_train", f"a label of {most} among {len(labels)} images", "no more classes than images", remedy
        )
    return most + 1


def _image_folder(name: str, path: Path, size: int | None) -> DataSet:
    """The whole folder in memory, as uint8."""
    if size is not None:
        _checks.whole("size", size, least=1)
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        images = images_of(path, part == "train", crop(size, size))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _decoded_all(images), np.asarray(images.targets)
    return _data_set(name, arrays, "NCHW", len(images.classes), tuple(images.classes))


def _decoded_all(images: Any) -> Any:
    first = images[0][0]
    if len(images) * first.numel() > MEMORY_LIMIT:
        got = f"{len(images):,} images of {first.shape[1]}x{first.shape[2]} pixels"
        expected = f"at most {MEMORY_LIMIT / (1 << 30):g} GiB to keep in memory"
        raise _checks.refuse(
            images.root, got, expected, "say a smaller size, or stream them (train --stream, image_folder_loader)"
        )
    x = torch.empty((len(images), *first.shape), dtype=torch.uint8)
    for place, (file, _) in enumerate(images.samples):
        image = images[place][0]
        if image.shape != first.shape:
            got, expected = (f"{each.shape[1]}x{each.shape[2]} pixels" for each in (image, first))
            raise _checks.refuse(
                file, got, f"{expected} as in {images.samples[0][0]}", "say size= (train and compare: --size)"
            )
        x[place] = image
    return x.numpy()
