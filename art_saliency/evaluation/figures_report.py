"""The figures of a report: curves, a waterfall, a surface, networks side by side. Drawn without a screen, readable on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import margin
from art_saliency.evaluation.figures import show, wrapped
from art_saliency.evaluation.saliency_maps import loss_saliency
from art_saliency.files import write_file
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource, uniform
from art_saliency.threat import ThreatModel

__all__ = ["accuracy_curve", "distance_surface", "loss_surface", "loss_surface_figure", "side_by_side", "waterfall"]

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # told apart without colour
_GRID = 21  # points along each direction of a loss surface


def _canvas(width: float, height: float, title: str, fontsize: float = 9) -> Any:
    """:return: A figure of a size in inches; each line that its title has beyond the first makes it higher."""
    _checks.optional("matplotlib", "eval", "Drawing a figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = wrapped(title, width, fontsize)
    figure = Figure(figsize=(width, height + fontsize / 55 * title.count("\n")), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=fontsize)
    return figure


def _named(axis: Any, names: Sequence[str], width: float) -> None:
    """Name the places 0, 1, ... of an axis; where names of that length would meet, at a slant. :param width: Of the figure, in inches."""
    slanted = len(names) * (max(map(len, names)) + 2) > 18 * (width - 0.8)  # letters an inch, beside the other axis
    slant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_xticks(range(len(names)), names, fontsize=7, **slant)


def _saved(figure: Any, path: str | Path) -> Path:
    write_file(Path(path), lambda file: figure.savefig(file, format="png"))
    return Path(path)


def _bounds(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """:return: An accuracy in percent, and how far its interval reaches below and above it."""
    value, (low, high) = 100 * row["accuracy"], row["interval_95"]
    return value, max(0.0, value - 100 * low), max(0.0, 100 * high - value)


def accuracy_curve(
    curves: Mapping[str, Mapping[float, Mapping[str, Any]]],
    path: str | Path,
    *,
    title: str,
    label: str,
    logarithmic: bool = False,
    marked: float | None = None,
) -> Path:
    """
    Accuracy against a number (the radius, the steps of an attack), one line a network, with 95 % intervals.

    :param curves: For each network, rows with ``accuracy`` and ``interval_95`` by that number. :param path: The PNG.
    :param title: Of the figure. :param label: Of the horizontal axis. :param logarithmic: Whether it is.
    :param marked: Where a vertical line is drawn, from which on the horizontal axis is logarithmic. :return: The path.
    """
    figure = _canvas(5.2, 3.4, title)
    axis = figure.subplots()
    for number, (name, rows) in enumerate(curves.items()):
        points = sorted(rows)
        values, below, above = zip(*(_bounds(rows[point]) for point in points), strict=True)
        axis.errorbar(
            points,
            values,
            yerr=(below, above),
            label=name,
            marker=_MARKS[number % len(_MARKS)],
            markersize=4,
            capsize=2,
            lw=1.2,
        )
    if marked is not None:
        axis.axvline(marked, color="0.5", lw=0.8, ls="--")
        axis.set_xscale("symlog", linthresh=marked)  # what happens near a small radius would be one line at the left
    if logarithmic:
        axis.set_xscale("log")
    if logarithmic or marked is not None:
        ticks = sorted({point for rows in curves.values() for point in rows})
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=7, rotation=0 if logarithmic else 60)
        axis.minorticks_off()
    if marked is not None:
        axis.set_xlim(-0.15 * marked, 1.2 * max(ticks))
    axis.set(xlabel=label, ylabel="accuracy, %", ylim=(-3, 103))
    axis.grid(alpha=0.25, lw=0.5)
    if len(curves) > 1:
        axis.legend(fontsize=7, loc="upper right")
    return _saved(figure, path)


def waterfall(rows: Mapping[str, Mapping[str, Any]], path: str | Path, *, title: str) -> Path:
    """
    What is left after each attack in turn, with 95 % intervals.

    :param rows: In order, with ``accuracy`` and ``interval_95``. :param path: The PNG. :param title: Of the figure.
    :return: The path.
    """
    width = 0.75 * len(rows) + 2.2
    figure = _canvas(width, 3.2, title)
    axis = figure.subplots()
    names = list(rows)
    values, below, above = zip(*(_bounds(rows[name]) for name in names), strict=True)
    axis.bar(range(len(names)), values, color="0.75", edgecolor="0.2", width=0.65)
    axis.errorbar(range(len(names)), values, yerr=(below, above), fmt="none", ecolor="0.1", capsize=3, lw=1)
    for place, value in enumerate(values):  # at the foot, where no interval is in the way, or above it
        axis.text(
            place,
            2 if value - below[place] > 9 else value + above[place] + 1.5,
            f"{value:.1f}",
            ha="center",
            fontsize=8,
        )
    for place, (first, second) in enumerate(pairwise(values)):
        axis.plot((place, place + 1), (first, first), color="0.4", lw=0.7, ls=":")
        if first - second >= 0.05:
            axis.text(place + 0.5, first + 1.5, f"-{first - second:.1f}", ha="center", fontsize=7, color="#b00020")
    _named(axis, names, width)
    axis.set(ylabel="accuracy, %", ylim=(0, 108))
    return _saved(figure, path)


def loss_surface(
    model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, reach: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """
    The margin (best wrong logit minus the true one) around one image: above 0 it is misclassified.

    :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: (1, C, H, W) in [0, 1]. :param y: (1,).
    :param threat: Whose unit steps the directions are. :param reach: In units of eps, to either side.
    :param seed: Of the random direction.
    :return: (G,) places in units of eps, and (G, G) margins: rows along the random direction, columns along the gradient's.
    """
    places, images = _plane(model, x, y, threat, reach, seed)
    with evaluating(model), torch.no_grad():
        rows = [margin(model(row), y.expand(_GRID)) for row in images]
    return places.cpu(), torch.stack(rows).cpu()


def distance_surface(
    model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, reach: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """
    How far the images of :func:`loss_surface` lie from the one in the middle: at 1 runs the boundary of the ball.

    Of two sign directions it cuts a diamond, of two unit vectors an ellipse; more, where pixels end at 0 or 1.

    :return: (G,) places and (G, G) distances in the threat model's norm, both in units of eps. The parameters are those of
        :func:`loss_surface`.
    """
    places, images = _plane(model, x, y, threat, reach, seed)
    rows = [threat.distance(row, x) / threat.eps for row in images]
    return places.cpu(), torch.stack(rows).cpu()


def _plane(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, reach: float, seed: int
) -> tuple[Tensor, Iterator[Tensor]]:
    """:return: (G,) places, and row by row along the random direction the images (G, C, H, W) along the gradient's."""
    gradient = threat.ascent_direction(loss_saliency(model, x, y))
    random = threat.ascent_direction(uniform(x, RandomSource(seed, x.device)) - 0.5)
    places = torch.linspace(-reach, reach, _GRID, device=x.device, dtype=x.dtype)
    rows = (x + threat.eps * (across * random + places.view(-1, 1, 1, 1) * gradient) for across in places)
    return places, (row.clamp(0, 1) for row in rows)


def loss_surface_figure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    path: str | Path,
    *,
    threat: ThreatModel,
    title: str,
    seed: int = 0,
) -> Path:
    """
    Draw :func:`loss_surface` of a few images; the decision boundary is the thick line, that of the ball the dashed one.

    A smooth slope towards the gradient's side is what an attack climbs; a jagged one, or a plateau, misleads it.

    :param x: (N, C, H, W), one panel each. :return: The path. The other parameters are those of :func:`loss_surface`.
    """
    note = "best wrong logit minus the true one; white: decision boundary; dashed: the ball"
    figure = _canvas(2.5 * len(x) + 0.8, 3.4, f"{title}\n{note}", 8)
    panels = figure.subplots(2, len(x), squeeze=False, height_ratios=(1, 2.6))
    for column in range(len(x)):
        show(panels[0][column], x[column], f"class {int(y[column])}", vmin=0, vmax=1, cmap="gray")
        axis = panels[1][column]
        one: Any = {"x": x[column : column + 1], "y": y[column : column + 1], "threat": threat, "seed": seed}
        places, surface = loss_surface(model, **one)
        _, distances = distance_surface(model, **one)
        field = axis.contourf(places, places, surface, levels=15, cmap="viridis")
        if float(surface.min()) < 0 < float(surface.max()):
            axis.contour(places, places, surface, levels=[0.0], colors="white", linewidths=2)
        if float(distances.max()) > 1:  # else no direction leads anywhere
            axis.contour(places, places, distances, levels=[1.0], colors="black", linewidths=0.9, linestyles="--")
        axis.set_xlabel("gradient, eps", fontsize=7)
        if column == 0:
            axis.set_ylabel("random, eps", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.set_aspect("equal")
        figure.colorbar(field, ax=axis, shrink=0.75).ax.tick_params(labelsize=6)
    return _saved(figure, path)


def side_by_side(
    networks: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    title: str,
    measures: Sequence[str],
    words: Callable[[str], str] = str,
) -> Path:
    """
    Several networks' accuracies as bars, with 95 % intervals.

    :param networks: By name: for each measure a row with ``accuracy`` and ``interval_95``. :param path: The PNG.
    :param title: Of the figure. :param measures: Which, in order. :param words: What a measure is called. :return: The path.
    """
    room = 0.5 * len(networks) * len(measures) + 2.4
    figure = _canvas(room, 3.4, title)
    axis = figure.subplots()
    width = 0.8 / len(measures)
    for number, measure in enumerate(measures):
        values, below, above = zip(*(_bounds(row[measure]) for row in networks.values()), strict=True)
        places = [place + (number - (len(measures) - 1) / 2) * width for place in range(len(networks))]
        shade = str(0.85 - 0.6 * number / max(1, len(measures) - 1))
        axis.bar(places, values, width=width, label=words(measure), color=shade, edgecolor="0.2", lw=0.6)
        axis.errorbar(places, values, yerr=(below, above), fmt="none", ecolor="#b00020", capsize=2, lw=0.9)
    _named(axis, list(networks), room)
    axis.set(ylabel="accuracy, %", ylim=(0, 104))
    longest = max(len(words(measure)) for measure in measures)
    fitting = max(1, int(18 * room / (longest + 7)))  # letters an inch; 7 for the patch and what is left free around it
    figure.legend(fontsize=7, ncols=min(len(measures), fitting), loc="outside lower center")
    return _saved(figure, path)
