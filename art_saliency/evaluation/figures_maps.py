"""A figure of saliency maps: for each image, clean and adversarial, one column a kind of map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.evaluation.figures import class_words, likeness, show, wrapped
from art_saliency.evaluation.saliency_maps import unit_maps
from art_saliency.evaluation.saliency_metrics import consensus
from art_saliency.files import write_file
from art_saliency.gradients import importance
from art_saliency.modes import evaluating

__all__ = ["maps_panel"]

_NOTE = (
    "true class → predicted class (green right, red wrong). Maps: importance of each pixel for the true class (occlusion: for all logits), black is 0 and the "
    "brightest the map's own maximum. cos: cosine of the signed maps of the clean and the adversarial image."
)
_CELL, _GAP, _TITLE, _LEFT, _TOP = 1.15, 0.07, 0.2, 1.05, 0.78  # inches
_BETWEEN = 0.12  # inches, between two images, on top of the room for titles


def maps_panel(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    maps: Mapping[str, tuple[Tensor, Tensor]],
    path: str | Path,
    *,
    title: str,
    names: Sequence[str],
    classes: Sequence[str] | None = None,
) -> Path:
    """
    Draw maps of single images, two rows an image: clean and adversarial.

    :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: (N, C, H, W) clean images. :param x_adv: (N, C, H, W).
    :param y: (N,) the true class. :param maps: Those of `x` and those of `x_adv`, (N, C', H, W), by the names that head the columns.
    :param path: The PNG; it is whole or not there. :param title: Of the figure. :param names: One an image, for its rows.
    :param classes: Names of the classes; empty or ``None`` numbers them.
    :return: The path.
    """
    _checks.optional("matplotlib", "explain", "Drawing a figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with evaluating(model), torch.no_grad():
        predicted = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    columns, pair = 1 + len(maps), 2 * (_CELL + _TITLE) + _BETWEEN
    width = max(_LEFT + columns * (_CELL + _GAP), 4.2)
    title, note = wrapped(title, width, 10), wrapped(_NOTE, width, 6)
    top = _TOP + 0.17 * title.count("\n")
    height = top + len(x) * pair + 0.1 * len(note.split("\n"))
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)

    def axis_at(image: int, version: int, column: int) -> Any:  # to the hundredth of an inch: no label meets another
        down = top + image * pair + version * (_CELL + _TITLE)
        left = _LEFT + column * (_CELL + _GAP)
        return figure.add_axes((left / width, 1 - (down + _CELL) / height, _CELL / width, _CELL / height))

    for image, version in itertools.product(range(len(x)), range(2)):
        axis = axis_at(image, version, 0)
        show(axis, (x, x_adv)[version][image], vmin=0, vmax=1, cmap="gray")
        class_words(axis, int(y[image]), predicted[version][image], classes)
        label = f"{names[image]}\n{('clean', 'adversarial')[version]}"
        axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
        for column, (name, both) in enumerate(maps.items(), start=1):
            axis = axis_at(image, version, column)
            agreement = float(consensus(*(some[image : image + 1] for some in both)))
            head = _two_lines(name) if image == 0 and not version else None
            picture = unit_maps(importance(both[version][image : image + 1]))[0]
            show(axis, picture, likeness(agreement) if version else head, vmin=0, vmax=1, cmap="magma")
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / height, va="top")
    figure.text(0.5, 0.05 / height, note, fontsize=6, ha="center", va="bottom")
    target = Path(path)
    write_file(target, lambda file: figure.savefig(file, format="png"))
    return target


def _two_lines(name: str) -> str:
    """:return: A long name broken at its middlemost hyphen: columns are narrow."""
    name = name.replace("-x-", "-x ")
    cuts = [place for place, letter in enumerate(name) if letter == "-"]
    if len(name) <= 10 or not cuts:
        return name
    cut = min(cuts, key=lambda place: abs(place - len(name) / 2))
    return f"{name[:cut]}\n{name[cut + 1 :]}"
