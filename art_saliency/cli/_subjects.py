"""What ``evaluate`` measures: runs with their networks and data, all opened before the first is worked on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import check_attackable, data_of_run, page_of_run, threat_of_run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from art_saliency.data import DataSet
    from art_saliency.threat import ThreatModel

__all__ = ["Subject", "named_surrogates", "opened"]


@dataclass(frozen=True, eq=False)
class Subject:
    """One run and what it is measured on: the first `count` test images of the data."""

    folder: Path
    page: dict[str, Any]
    model: nn.Module
    data: DataSet
    count: int
    threat: ThreatModel

    def can_be_repeated(self) -> bool:
        """:return: Whether the run is by a method of this package; one of the user's own, saved by ``save``, cannot be trained here."""
        from art_saliency.trainers.methods import TRAINERS

        return self.page["method"].partition("+")[0] in TRAINERS

    def images(self) -> tuple[Tensor, Tensor]:
        """:return: (N, C, H, W) in [0, 1] or uint8, and (N,) int64."""
        return self.data.x_test[: self.count], self.data.y_test[: self.count]


def opened(args: argparse.Namespace, folders: Mapping[str, Path], device: torch.device) -> dict[str, Subject]:
    """
    Open every run, and refuse what does not fit. Data that several runs have in common is read once.

    :param args: Of ``evaluate``. :param folders: By name. :return: By name.
    """
    from art_saliency import _checks
    from art_saliency.evaluation.audit import check_radius
    from art_saliency.evaluation.report import check_feasible
    from art_saliency.trainers.runs import load

    sets: dict[str, DataSet] = {}
    subjects = {}
    for name, folder in folders.items():
        page = page_of_run(folder)
        model = load(folder, device=device).model
        which = json.dumps(page["data"] if args.data is None else page["data"].get("size"), sort_keys=True)
        data = sets[which] if which in sets else sets.setdefault(which, data_of_run(args, page))
        shape, most = tuple(page["network"]["input_shape"]), len(data.y_test)
        if data.input_shape != shape:
            raise _checks.refuse("--data", f"images of shape {data.input_shape}", f"{shape}, which the network takes")
        count = most if args.images is None else _checks.whole("--images", args.images, least=1, most=most)
        _checks.labels(data.y_test[:count], count, page["network"]["num_classes"], name="y_test")
        of = subjects[name] = Subject(folder, page, model, data, count, threat_of_run(args, page))
        check_attackable(of.threat, data.x_test, args.version)
        if args.full:
            check_radius(of.threat, data.x_test)
            check_feasible(model, data.input_shape, corruption_folder=args.corruptions)
    return subjects


def named_surrogates(
    args: argparse.Namespace, subjects: Mapping[str, Subject], device: torch.device
) -> dict[str, nn.Module]:
    """
    Open the networks that ``--surrogate`` names; where three are to be trained, refuse runs that do not say how.

    :param args: Of ``evaluate --full``. :param subjects: What they are to be surrogates for. :return: By folder.
    """
    from art_saliency import _checks
    from art_saliency.trainers.runs import load
    from art_saliency.trainers.surrogates import Recipe

    for of in subjects.values():
        takes = {key: of.page["network"][key] for key in ("input_shape", "num_classes")}
        for folder in args.surrogate or ():
            other = {key: page_of_run(folder)["network"][key] for key in takes}
            if other != takes:
                raise _checks.refuse("--surrogate", f"{folder}, a network for {other}", f"one for {takes}")
        if not args.surrogate and not args.no_surrogates and of.can_be_repeated():
            Recipe.of(of.page)
            _ = of.data.x_train  # of a streamed set, which has no such thing and says what to do
    return {str(folder): load(folder, device=device).model for folder in args.surrogate or ()}
