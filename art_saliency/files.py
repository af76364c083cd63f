"""Files and folders that are whole or not there: written aside and moved into place; of tensors only, with a hash that is checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.errors import CheckpointError

__all__ = [
    "appearing",
    "is_dense",
    "read_tensors",
    "sha256_of_file",
    "sha256_of_tensors",
    "write_file",
    "write_tensors",
]


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """
    Write a file so that no reader, and no crash, ever sees half of it.

    :param path: Where it is to appear. :param write: Given the open file.
    :raises CheckpointError: When it cannot be written (a full disk); what stood there before still stands.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:  # not tempfile's: that would leave a checkpoint only its owner can read
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        # torch.save may meet a full disk while it closes its archive; its RuntimeError then hides the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({cause.strerror or cause}); free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that does not exist, or is a file
            aside.unlink()


@contextlib.contextmanager
def appearing(folder: Path, *, force: bool) -> Iterator[Path]:
    """
    Let a folder appear as a whole, or not at all: it is written beside its place and moved there when all has gone well.

    An old folder stands until the new one takes its place, and comes back when that fails.

    :param folder: Its place; folders above it are made. :param force: Whether a folder that is there may be replaced.
    :return: The folder to write into.
    :raises InputError: When the place is taken; by anything but a folder, whatever `force` says.
    :raises CheckpointError: When it cannot be written there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise _checks.refuse("folder", f"{folder}, which is no folder", "a new folder")
    if folder.exists() and not force:
        raise _checks.refuse("folder", f"{folder}, which is there already", "a new folder", "add --force")
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        with _place_writable(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()  # not tempfile's: that would leave a folder only its owner can read
        yield aside
        with _place_writable(folder):
            _take_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _place_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error.strerror}); choose another place") from error


def _take_place(aside: Path, folder: Path) -> None:
    old = aside.with_name(f"{aside.name}.old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors and plain values, for :func:`read_tensors`. :param path: The file. :param tensors: By name."""
    write_file(path, lambda file: torch.save(dict(tensors), file))


def read_tensors(path: Path) -> dict[str, Any]:
    """
    Read what :func:`write_tensors` wrote. Nothing in the file is executed.

    :raises CheckpointError: When it is missing, truncated, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected weights; check the path, or train again")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the sums that torch.save put there
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, by what is wrong with the file
        raise CheckpointError(
            f"{path}: got a file that is damaged or holds more than tensors ({type(error).__name__}), expected a state "
            f"dict that torch.load(weights_only=True) reads; copy it again or train again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected a dict of tensors by name")
    return content


def sha256_of_file(path: Path) -> str:
    """:return: The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def is_dense(value: Any) -> bool:
    """:return: Whether it is an ordinary tensor, all of whose numbers lie in memory: not sparse, quantized, nested or without data."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return value.layout == torch.strided


def _way_to_dense(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "put it on a device that holds values,"
    if tensor.is_nested:
        return "pad it by torch.nested.to_padded_tensor,"
    return f"call {'.dequantize()' if tensor.is_quantized else '.to_dense()'} on it,"


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """
    Hash tensors.

    :return: A SHA-256 over names, shapes, types and bytes: the identity of weights, wherever they lie.
    :raises InputError: When one of them is not dense.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not is_dense(tensors[name]):
            got = f"{name!r}, a tensor of {tensors[name].layout}, {tensors[name].dtype}"
            remedy = f"{_way_to_dense(tensors[name])} or keep it out of the state dict"
            raise _checks.refuse("tensors", got, "dense tensors", remedy)
        tensor = tensors[name].detach().cpu().contiguous()
        # The name's length comes first, so that no name can pass for the end of another tensor.
        digest.update(f"{len(name)}|{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
