"""What ``train`` trains on: images in memory, or a folder of pictures that are decoded as they are needed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import say

if TYPE_CHECKING:
    from art_saliency.augmentation import Augmentation
    from art_saliency.data import DataSet
    from art_saliency.streaming import StreamedSet
    from art_saliency.trainers.base import ObjectiveTrainer

__all__ = ["add_stream_options", "device_augmentation", "held_out", "training_data", "way_to_fit"]


def add_stream_options(group: Any) -> None:
    """Add ``--stream`` and ``--workers``."""
    group.add_argument(
        "--stream",
        action="store_true",
        help="decode the pictures of a folder as they are needed, so that memory does not grow with their number; a folder that would "
        "take more than 8 GiB at --size is streamed without a word. At most 5,000 pictures are then held out",
    )
    group.add_argument("--workers", type=int, help="processes that decode (default: as there are cores, up to 8)")


def device_augmentation(name: str) -> Augmentation | None:
    """:return: What ``--augment`` means on the device; a random crop of pictures happens while they are decoded."""
    from art_saliency.augmentation import augmentation_by_name
    from art_saliency.streaming import split_augmentation

    name = split_augmentation(name, streamed=True)[1]
    return None if name == "none" else augmentation_by_name(name)


def training_data(args: argparse.Namespace) -> DataSet | StreamedSet:
    """:return: What ``--data`` names, in memory or streamed."""
    from art_saliency import _checks
    from art_saliency.streaming import StreamedSet, open_data, split_augmentation

    if args.workers is not None:
        _checks.whole("--workers", args.workers)
    data = open_data(args.data, root=args.data_root, download=args.download, size=args.size, stream=args.stream)
    split_augmentation(args.augment, streamed=isinstance(data, StreamedSet))
    if args.workers is not None and not isinstance(data, StreamedSet):
        say(
            args,
            "--workers: nothing is decoded while it trains, all images are in memory (--stream streams a folder of pictures)",
        )
    return data


def held_out(args: argparse.Namespace, data: DataSet | StreamedSet) -> int:
    """:return: How many training images ``--validation-split`` holds out."""
    from art_saliency.data import held_out_count
    from art_saliency.streaming import HELD_OUT_LIMIT, StreamedSet

    count = held_out_count(args.validation_split, len(data.y_train)) if args.validation_split else 0
    return min(count, HELD_OUT_LIMIT) if isinstance(data, StreamedSet) else count


def way_to_fit(
    trainer: ObjectiveTrainer, data: DataSet | StreamedSet, args: argparse.Namespace, *, rank: int, ranks: int
) -> Callable[..., None]:
    """:return: The trainer's ``fit`` or ``fit_generator``, with the images to train on and those to hold out."""
    from art_saliency.streaming import StreamedSet, split_augmentation

    if not isinstance(data, StreamedSet):
        return partial(
            trainer.fit,
            data.x_train,
            data.y_train,
            validation_split=args.validation_split,  # of the set where it lies: nothing of it is copied
            batch_size=args.batch_size,
        )
    if trainer.objective.needs_maps:
        say(
            args,
            f"{args.method}: the saliency masks of streamed pictures are made anew in every step, which takes most of it",
        )
    places = validation = None
    if args.validation_split:
        places, validation = data.hold_out(args.validation_split, args.seed)
    loader = data.training_loader(
        places,
        batch_size=args.batch_size,
        seed=args.seed,
        random_crop=split_augmentation(args.augment, streamed=True)[0],
        num_workers=min(8, os.cpu_count() or 1) if args.workers is None else args.workers,
        rank=rank,
        world_size=ranks,
    )
    return partial(trainer.fit_generator, loader, validation_data=validation)
