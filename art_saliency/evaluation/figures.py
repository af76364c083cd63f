"""Figures, drawn without a screen and readable on paper."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.evaluation.saliency_maps import loss_saliency, unit_maps
from art_saliency.evaluation.saliency_metrics import consensus
from art_saliency.gradients import importance
from art_saliency.modes import evaluating

__all__ = ["class_words", "likeness", "saliency_panel", "show", "wrapped"]


_NOTE = (
    "true → predicted class (green right, red wrong); saliency = |gradient of the loss|, each scaled to its own maximum; "
    "cos = similarity of the two saliencies"
)


def show(axis: Any, image: Tensor, title: str | None = None, **options: Any) -> None:
    """
    Draw one image without ticks or frame.

    :param axis: Matplotlib's. :param image: (C, H, W); where C is neither 1 nor 3, the mean over channels is drawn. :param options: Of ``imshow``.
    """
    image = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    picture = image.permute(1, 2, 0).cpu().numpy()
    axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, interpolation="nearest", **options)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    if title is not None:
        axis.set_title(title, fontsize=8, pad=2)


def wrapped(text: str, width: float, fontsize: float) -> str:
    """:return: A text in lines of one size that a figure has room for; lines it already has stay apart. :param width: In inches."""
    letters = int(130 * width / fontsize)  # of DejaVu Sans; measured: 145 of ordinary words
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, letters))


def class_words(axis: Any, true: int, predicted: int, classes: Sequence[str] | None) -> None:
    """Head an image with its true and its predicted class: green where they are one, red where not, no wider than the image."""
    word = (lambda k: classes[k] if len(classes[k]) <= 12 else f"{classes[k][:11]}…") if classes else str
    said = f"{word(true)} → {word(predicted)}"
    colour = "#1b5e20" if predicted == true else "#b00020"
    axis.set_title(said, fontsize=min(8, 135 / len(said)), pad=2, color=colour)


def likeness(agreement: float) -> str:
    """:return: The :func:`~art_saliency.evaluation.saliency_metrics.consensus` of two maps, as a figure says it."""
    return f"cos {agreement:.2f}" if math.isfinite(agreement) else "a map is 0"


def saliency_panel(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    path: str | Path,
    *,
    title: str,
    classes: Sequence[str] | None = None,
) -> Path:
    """
    Draw, for each image, the input, the adversarial input, and the network's loss saliency at both.

    :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: (N, C, H, W) clean images; one column each.
    :param x_adv: (N, C, H, W). :param y: (N,) true classes. :param path: The PNG. :param title: Of the figure.
    :param classes: Names of the classes; empty or ``None`` numbers them.
    :return: The path.
    """
    _checks.optional("matplotlib", "eval", "Drawing a figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with evaluating(model), torch.no_grad():
        predicted = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    gradients = [loss_saliency(model, images, y) for images in (x, x_adv)]
    agreement = consensus(*gradients)
    columns = len(x)
    width = max(1.15 * columns + 1.1, 4.2)
    title, note = wrapped(title, width, 10), wrapped(_NOTE, width, 6)
    top, foot = 0.12 + 0.17 * len(title.split("\n")), 0.05 + 0.1 * len(note.split("\n"))  # inches
    height = 5.6 + top + foot
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, columns, squeeze=False)
    rows = ("input", "adversarial\ninput", "saliency\nat input", "saliency at\nadversarial")
    maps = [unit_maps(importance(gradient)) for gradient in gradients]
    for column in range(columns):
        for row, images in enumerate((x, x_adv)):
            show(axes[row][column], images[column], vmin=0, vmax=1, cmap="gray")
            class_words(axes[row][column], int(y[column]), predicted[row][column], classes)
        for row, maps_of_row in enumerate(maps, start=2):
            text = likeness(float(agreement[column])) if row == 3 else None
            show(axes[row][column], maps_of_row[column], text, vmin=0, vmax=1, cmap="magma")
    for row, text in enumerate(rows):
        axes[row][0].set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    figure.suptitle(title, fontsize=10, y=1 - 0.06 / height, va="top")
    figure.text(0.5, 0.04 / height, note, fontsize=6, ha="center", va="bottom")
    figure.tight_layout(rect=(0, foot / height, 1, 1 - 0.06 / height), h_pad=0.9, w_pad=0.3)
    figure.savefig(str(path))
    return Path(path)
