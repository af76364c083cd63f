"""A teacher and its saliency maps, for objectives that read ``batch.maps``: computed once, before training."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from art_saliency.methods.baselines import Standard
from art_saliency.networks import copy_of
from art_saliency.trainers.network import optimizer_settings
from art_saliency.training.batches import Batches, ImageView
from art_saliency.training.checkpoint import Checkpoints
from art_saliency.training.engine import Engine
from art_saliency.training.loop import train
from art_saliency.training.records import Progress

if TYPE_CHECKING:
    from art_saliency.trainers.options import RunOptions

__all__ = ["teacher_maps", "trained_teacher"]


def teacher_maps(
    objective: Any,
    teacher: nn.Module,
    images: Tensor | ImageView,
    targets: Tensor,
    *,
    maps_file: str | os.PathLike[str] | None,
    verbose: bool,
) -> dict[str, Any]:
    """
    The maps of a whole training set, for :class:`~art_saliency.training.batches.ResidentBatches`.

    :param objective: With ``cached_maps`` and ``full_maps``. :param teacher: On [0, 1], on the device.
    :param images: (N, C, H, W) in [0, 1] or uint8, on any device. :param targets: (N,) or (N, K).
    :param maps_file: Where they are kept between runs; ``None`` keeps none.
    :return: The keywords ``maps`` and ``expand``.
    """
    size = (images.shape[-2], images.shape[-1])
    hard = targets if targets.ndim == 1 else targets.argmax(1)
    with tqdm(total=len(images), desc="saliency maps", unit="image", dynamic_ncols=True, disable=not verbose) as bar:
        scores = objective.cached_maps(maps_file, teacher, images, hard, progress=bar.update)
    return {"maps": scores, "expand": lambda maps: objective.full_maps(maps, size)}


def trained_teacher(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    epochs: int,
    engine: Engine,
    options: RunOptions,
    checkpoints: Checkpoints | None = None,
) -> nn.Module:
    """
    A copy of the network, trained on clean images by an optimizer of the same kind.

    :param network: As it is before training; it is not touched. :param epochs: Passes over the batches.
    :param checkpoints: Where its training is kept; ``None`` keeps nothing.
    :return: The teacher, frozen, in eval mode.
    """
    teacher = copy_of(network)
    assert options.seed is not None
    train(
        teacher,
        Standard(),
        # A rate that is a tensor is moved in place by a schedule: the teacher's must not be the network's own.
        type(optimizer)(
            teacher.parameters(), **{**optimizer_settings(optimizer), "lr": deepcopy(optimizer.param_groups[0]["lr"])}
        ),
        batches,
        epochs=epochs,
        engine=engine,
        seed=options.seed,
        scheduler="cosine",
        deterministic=options.deterministic,
        extensions=[Progress("teacher")] if options.verbose else [],
        checkpoints=checkpoints,
    )
    return teacher.requires_grad_(False).eval()
