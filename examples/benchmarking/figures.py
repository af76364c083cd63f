"""A figure a claim, drawn from the stored runs alone. Each carries the hash of what it shows, so that a test can tell whether it is current."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from art_saliency.evaluation.accuracy import binomial_interval
from benchmarking.claims import CLAIMS
from benchmarking.grids import GRIDS, HEADLINE_ARMS

__all__ = ["content", "draw_all", "drawn", "figure_names", "frontier", "recorded"]

Runs = dict[str, dict[str, list[dict[str, Any]]]]
_FAMILIES = (
    ("fsr", "tab:green"),
    ("adapter", "tab:olive"),
    ("adv-gsct", "tab:red"),
    ("j-sigr", "tab:purple"),
    ("aalp", "tab:orange"),
)
_MAPS = "saliency-"
_LEAST = 3
_NAME_HEIGHT = 0.042  # of the axes
_NAMED = {*HEADLINE_ARMS, "pgd-at:ema=0.99:awp=0.005"}


def figure_names(grids: Iterable[str]) -> tuple[str, ...]:
    """:param grids: Those that have runs. :return: Of all figures."""
    return ("cost", *CLAIMS, "consensus", *(f"{_MAPS}{grid}" for grid in grids if not GRIDS[grid].held_out))


def _point(those: list[dict[str, Any]], *keys: str) -> list[float]:
    values = []
    for run in those:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    return values


def content(runs: Runs, name: str) -> Any:
    """:return: All that a figure shows, JSON-able: what its hash is of. Beside others, grids with hardly an arm, or for tuning, are left out."""
    if name.startswith(_MAPS):
        return {a: those[0]["maps"] for a, those in runs[name.removeprefix(_MAPS)].items()}
    wanted = set(CLAIMS[name].arms) if name in CLAIMS else None
    runs = {
        g: found
        for g, found in runs.items()
        if not GRIDS[g].held_out and len(set(found) if wanted is None else wanted & set(found)) >= _LEAST
    }
    if name == "cost":
        return _points(runs, ("cost", "passes_per_step"))
    if name == "consensus":
        return _points(runs, ("saliency", "consensus", "mean"))
    keys = ("clean", "autoattack", "transfer")
    return {
        g: {a: {key: _point(found[a], key, "accuracy") for key in keys} for a in CLAIMS[name].arms if a in found}
        for g, found in runs.items()
    }


def _points(runs: Runs, keys: tuple[str, ...]) -> Any:
    """Of the arms that a claim is of: all others are in the figures of the claims."""
    return {
        g: {a: [_point(r, *keys), _point(r, "autoattack", "accuracy")] for a, r in found.items() if a in _NAMED}
        for g, found in runs.items()
    }


def _hash(shown: Any) -> str:
    drawn_by = Path(__file__).read_text(encoding="utf-8")  # a change of the drawing draws anew
    return hashlib.sha256((json.dumps(shown, sort_keys=True) + drawn_by).encode()).hexdigest()


def recorded(path: Path, runs: Runs, name: str) -> bool:
    """:return: Whether the figure shows what the runs say today."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source") == _hash(content(runs, name))


def _colour(arm: str) -> str:
    return next((colour for family, colour in _FAMILIES if arm.startswith(family)), "0.35")


def _panels(width: float, heights: list[float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), dpi=110, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights)))


def _scatter(runs: Runs, name: str, label: str, *, cost: bool) -> Any:
    """
    Robust accuracy against a figure: a point an arm that a claim is of, with :func:`_whiskers`.

    :param cost: The figure is a price: it is drawn by its ratios, with a line through the arms that none beats for as little.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    shown = content(runs, name)
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(13, 4.6 * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, (grid, arms) in zip(axes[: len(shown)], shown.items(), strict=True):
        points = {arm: (statistics.fmean(x), 100 * statistics.fmean(y)) for arm, (x, y) in arms.items()}
        for arm, point in points.items():
            spread = _whiskers(arms[arm][1], GRIDS[grid].images)
            axis.errorbar(*point, yerr=spread, fmt="o", ms=5, capsize=2, lw=0.8, color=_colour(arm))
        if cost:
            axis.step(*zip(*frontier(points.values()), strict=True), where="post", color="0.75", lw=4, zorder=0)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
        _labelled(axis, points)
        single = all(len(y) == 1 for _, y in arms.values())
        up = f"AutoAttack accuracy, % ({'95 % interval' if single else 'deviation over seeds'})"
        axis.set(xlabel=label, ylabel=up)
        axis.set_title(GRIDS[grid].title, fontsize=9, loc="left")
        axis.grid(alpha=0.25, lw=0.5)
    return figure


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """:return: Those of (price, worth) that are worth more than all that cost no more, the cheapest first."""
    best: list[tuple[float, float]] = []
    for price, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or worth > best[-1][1]:
            best.append((price, worth))
    return best


def _whiskers(up: list[float], images: int) -> list[list[float]]:
    """:return: Down and up, in points: one standard deviation over seeds, or the 95 % interval that one seed's images leave."""
    if len(up) > 1:
        return [[100 * statistics.stdev(up)]] * 2
    low, high = binomial_interval(round(up[0] * images), images)
    return [[100 * max(0.0, up[0] - low)], [100 * (high - up[0])]]


def _labelled(axis: Any, named: dict[str, tuple[float, float]]) -> None:
    """Names in a column beside the axes, as near to their points' heights as they can be without lying on one another."""
    from sklearn.isotonic import isotonic_regression

    ordered = sorted(named, key=lambda arm: named[arm][1])
    low, high = axis.get_ylim()
    heights = np.array([(named[arm][1] - low) / (high - low) for arm in ordered])
    # With a gap taken off for every name below, names that stay apart are a sequence that does not fall.
    gaps = _NAME_HEIGHT * np.arange(len(ordered))
    places = isotonic_regression(heights - gaps, y_min=0, y_max=1 - gaps[-1]) + gaps
    for place, arm in zip(places, ordered, strict=True):
        axis.annotate(
            arm.replace(":lambda_sep=0.1:lambda_rec=0.1", ", lambdas 0.1"),
            named[arm],
            xytext=(1.03, place),
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            color=_colour(arm),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": _colour(arm), "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _bars(runs: Runs, name: str) -> Any:
    shown = content(runs, name)
    figure, axes = _panels(7.4, [0.9 + 0.34 * len(arms) for arms in shown.values()])
    for axis, (grid, arms) in zip(axes, shown.items(), strict=True):
        for row, (arm, figures) in enumerate(arms.items()):
            robust = [100 * v for v in figures["autoattack"]]
            mean = statistics.fmean(robust)
            axis.barh(row, mean, color=_colour(arm), alpha=0.75, height=0.62)
            axis.plot(
                robust, [row] * len(robust), "k|", ms=7, mew=0.8, label="AutoAttack, each seed" if not row else None
            )
            for key, mark, words in (("transfer", "kD", "transferred attacks"), ("clean", "ko", "clean")):
                axis.plot(
                    100 * statistics.fmean(figures[key]), row, mark, ms=4, mfc="w", label=words if not row else None
                )
            axis.text(1, row, f"{mean:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=7)
        axis.invert_yaxis()
        axis.set(xlim=(0, 101))
        axis.set_title(GRIDS[grid].title, fontsize=8)
    axes[-1].set_xlabel("accuracy, %; bar: AutoAttack, mean over seeds", fontsize=8)
    handles, words = axes[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(CLAIMS[name].title, fontsize=9)
    return figure


def _maps(runs: Runs, name: str) -> Any:
    """Eight test images x arms, in two columns: the size of the loss gradient, each map scaled to its own maximum."""
    from matplotlib.figure import Figure

    lines = list(content(runs, name).items())
    rows = -(-len(lines) // 2)
    figure = Figure(figsize=(12, 0.56 * rows + 0.5), dpi=110, layout="constrained")
    for half, part in zip((lines[:rows], lines[rows:]), figure.subfigures(1, 2), strict=True):
        axes = part.subplots(rows, 8, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for row, (arm, packed) in zip(axes, half, strict=False):
            maps = np.frombuffer(base64.b64decode(packed["base64"]), np.uint8).reshape(packed["shape"])
            for axis, image in zip(row, maps, strict=True):
                axis.imshow(image, cmap="magma", vmin=0, vmax=255)
            words = arm.replace(":", "\n:")
            row[0].text(-0.15, 0.5, words, fontsize=6, ha="right", va="center", transform=row[0].transAxes)
    figure.suptitle(
        f"{GRIDS[name.removeprefix(_MAPS)].title}: loss-gradient saliency of the first eight test images, of the lowest seed",
        fontsize=9,
    )
    return figure


def drawn(runs: Runs, name: str) -> Any:
    """:return: The figure of that name (:func:`figure_names`), a matplotlib ``Figure``."""
    if name == "cost":
        return _scatter(runs, name, "forward-backward passes a step (standard training: 1)", cost=True)
    if name == "consensus":
        return _scatter(runs, name, "saliency consensus, clean and under PGD-20", cost=False)
    return _maps(runs, name) if name.startswith(_MAPS) else _bars(runs, name)


def draw_all(runs: Runs, folder: Path) -> list[Path]:
    """:return: The figures, written anew where they are not current."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in figure_names(runs):
        path = folder / f"{name}.png"
        if not (path.is_file() and recorded(path, runs, name)):
            drawn(runs, name).savefig(path, metadata={"Source": _hash(content(runs, name)), "Software": None})
            written.append(path)
    return written
