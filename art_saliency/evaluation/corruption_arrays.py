"""Corrupted images as CIFAR-10-C has them: a folder of ``.npy`` files, mapped from the disk, never in memory as a whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.errors import CheckpointError
from art_saliency.evaluation.accuracy import accuracy
from art_saliency.evaluation.corruptions import SEVERITIES, CorruptionResult, names_among, severities_among

__all__ = ["CorruptionArrays", "array_corruption_accuracy", "open_corruption_arrays"]

_LABELS = "labels"


@dataclass(frozen=True, eq=False)
class CorruptionArrays:
    """
    N images, each corrupted in several ways at five severities.

    :ivar name: The folder's.
    :ivar images: By corruption, (5 * N, C, H, W) uint8, a view of the file: do not write into it.
    :ivar labels: (N,) int64.
    """

    name: str
    images: dict[str, Tensor] = field(repr=False)
    labels: Tensor = field(repr=False)

    def block(self, corruption: str, severity: int) -> Tensor:
        """:return: (N, C, H, W) uint8, a view: all images under one corruption at one severity."""
        count = len(self.labels)
        return self.images[corruption][(severity - 1) * count : severity * count]


def open_corruption_arrays(
    folder: str | os.PathLike[str],
    corruptions: Sequence[str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
) -> CorruptionArrays:
    """
    Open a folder such as CIFAR-10-C's.

    :param folder: With ``CORRUPTION.npy``, each (5 * N, H, W, 3), (5 * N, H, W, 1) or (5 * N, H, W) uint8, severity 1 first,
        and ``labels.npy``, (5 * N,), the same N five times, or (N,).
    :param corruptions: Which; ``None`` takes every file there. :param shape: (C, H, W) that the network takes; ``None`` takes any.
    :return: The arrays.
    :raises CheckpointError: When a file is missing or damaged; it is named.
    :raises InputError: When what a file holds does not fit; it is named.
    """
    path = Path(folder).expanduser()
    there = sorted(file.stem for file in path.glob("*.npy")) if path.is_dir() else []
    names = [name for name in there if name != _LABELS]
    names = names if corruptions is None else names_among("corruptions", corruptions)
    if not names:
        raise CheckpointError(f"{path}: no CORRUPTION.npy in it, expected a folder as CIFAR-10-C's; check the path")
    for name in [*names, _LABELS]:
        if name not in there:
            shown = ", ".join(there) or "nothing"
            hint = _checks.suggestion(name, [known for known in there if known != _LABELS])
            raise CheckpointError(f"{path / name}.npy: no such file, expected it beside {shown}{hint}")
    images = {name: _pixels(path / f"{name}.npy") for name in names}
    sizes = {name: tuple(array.shape) for name, array in images.items()}
    for name, size in sizes.items():
        if size != sizes[names[0]]:
            expected = f"{sizes[names[0]]} (N, C, H, W) as {names[0]}.npy"
            raise _checks.refuse(f"{path / name}.npy", f"images of shape {size}", expected)
    if shape is not None and sizes[names[0]][1:] != tuple(shape):
        expected = f"{tuple(shape)}, which the network takes"
        raise _checks.refuse(f"{path / names[0]}.npy", f"images of shape {sizes[names[0]][1:]}", expected)
    for name, array in images.items():
        _checks.bytes_of_pixels(f"{path / name}.npy", array, remedy="multiply it by 255")
    total = sizes[names[0]][0]
    return CorruptionArrays(path.resolve().name, images, _labels(path / f"{_LABELS}.npy", total // len(SEVERITIES)))


def _mapped(file: Path) -> Any:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # NumPy raises several kinds, by what is wrong with the file
        raise CheckpointError(
            f"{file}: got a damaged file ({type(error).__name__}: {str(error).splitlines()[0][:100]}), expected what "
            "numpy.save writes; copy it again"
        ) from error


def _pixels(file: Path) -> Tensor:
    array = _mapped(file)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise _checks.refuse(str(file), f"{array.dtype} of shape {array.shape}", "uint8 (5 * N, H, W, 3)")
    if array.size == 0 or len(array) % len(SEVERITIES):
        raise _checks.refuse(str(file), f"{len(array)} images", "five times as many as there are clean ones")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written
        tensor = torch.from_numpy(array)
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)


def _labels(file: Path, count: int) -> Tensor:
    """:return: (N,) int64; five copies that differ would mean that the severities are not of the same images."""
    array = _mapped(file)
    if array.dtype.kind not in "iu" or array.shape not in ((count,), (count * len(SEVERITIES),)):
        expected = f"{count * len(SEVERITIES)} or {count} whole numbers"
        raise _checks.refuse(str(file), f"{array.dtype} of shape {array.shape}", expected)
    rows = array.reshape(-1, count)
    if not bool((rows == rows[0]).all()):
        raise _checks.refuse(str(file), "labels that differ between severities", "the same labels five times")
    return torch.from_numpy(rows[0].astype(np.int64))


def array_corruption_accuracy(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    count: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> CorruptionResult:
    """
    Accuracy on corrupted images from files, a batch in memory at a time.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode, its modes restored.
    :param folder: See :func:`open_corruption_arrays`. CIFAR-10-C itself: https://zenodo.org/records/2535967.
    :param corruptions: Which; ``None`` takes all that are there. RobustBench's score is of the fifteen that are not "extra".
    :param severities: Of 1 to 5.
    :param count: The first so many images of each severity; ``None`` takes all.
    :param batch_size: Images at once. :param progress: Whether a bar is shown on stderr.
    :return: The result; clean accuracy is not known from such a folder.
    """
    chosen = severities_among(severities)
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    arrays = open_corruption_arrays(folder, corruptions)
    most = len(arrays.labels)
    rows = most if count is None else _checks.whole("count", count, least=1, most=most)
    correct: dict[str, dict[int, int]] = {name: {} for name in arrays.images}
    with tqdm(
        total=len(correct) * len(chosen) * rows, desc="corruptions", unit="image", disable=not progress, leave=None
    ) as bar:
        for name, by_severity in correct.items():
            for severity in chosen:
                x = to_unit(arrays.block(name, severity)[:rows])
                by_severity[severity] = round(accuracy(model, x, arrays.labels[:rows], batch_size=batch_size) * rows)
                bar.update(rows)
    return CorruptionResult(correct, rows, None, arrays.name, None, {"numpy": np.__version__})
