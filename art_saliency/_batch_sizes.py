"""Which last batch of an epoch is trained on: one place for arrays, streams and loaders."""

from __future__ import annotations

__all__ = ["batches_in", "too_few"]


def too_few(rows: int, world_size: int = 1) -> bool:
    """:return: Whether a process would get less than two images: BatchNorm has no variance for one, and none has no loss."""
    return rows // world_size <= 1


def batches_in(count: int, batch_size: int, world_size: int = 1) -> int:
    """
    How many batches an epoch has. What is left over after the whole ones is a batch if it is not too few.

    :param count: Images of an epoch, at least one. :param batch_size: Images of a batch, of all processes together.
    :param world_size: Processes that share a batch.
    :return: At least 1: an only batch is never left out.
    """
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (not too_few(rest, world_size)))
