"""Files that are whole or not there: tensors only, written aside and moved into place, with a hash that is checked."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from art_saliency.errors import CheckpointError

__all__ = ["read_tensors", "sha256_of_file", "sha256_of_tensors", "write_file", "write_tensors"]


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """
    Write a file so that no reader, and no crash, ever sees half of it.

    :param path: Where it is to appear. :param write: Given the open file.
    :raises CheckpointError: When it cannot be written (a full disk); what stood there before still stands.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error}); free some space or choose another folder") from error
    finally:
        Path(aside).unlink(missing_ok=True)


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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, by what is wrong with the file
        raise CheckpointError(
            f"{path}: damaged or not a file of tensors ({type(error).__name__}); expected a state dict that "
            f"torch.load(weights_only=True) reads; copy it again or train again"
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


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """:return: A SHA-256 over names, shapes, types and bytes: the identity of weights, wherever they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
