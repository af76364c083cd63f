"""A figure a claim, drawn from the stored runs alone. Each carries the hash of what it shows, so that a test can tell whether it is current."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from art_saliency.evaluation.accuracy import binomial_interval
from benchmarking.claims import CLAIMS, HEADLINE
from benchmarking.grids import GRIDS

__all__ = ["content", "draw_all", "figure_names", "recorded"]

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
_NAME_HEIGHT = 0.045  # of the axes
_ALSO_NAMED = ("adapter+pgd-at", "j-sigr", "fsr+adv-gsct", "pgd-at:ema=0.99:awp=0.005")


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
    return {
        g: {a: [_point(r, *keys), _point(r, "autoattack", "accuracy")] for a, r in found.items()}
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


def _scatter(runs: Runs, name: str, label: str) -> Any:
    """Robust accuracy against a figure: a point an arm, with :func:`_whiskers`; controls are small and unnamed."""
    shown = content(runs, name)
    figure, axes = _panels(7.4, [4.2] * len(shown))
    for axis, (grid, arms) in zip(axes, shown.items(), strict=True):
        named = {}
        for arm, (across, up) in arms.items():
            x, y = statistics.fmean(across), 100 * statistics.fmean(up)
            if arm in HEADLINE or arm in _ALSO_NAMED:
                named[arm] = x, y
            size, alpha = (5, 1) if arm in named else (2.5, 0.5)
            spread = _whiskers(up, GRIDS[grid].images)
            axis.errorbar(x, y, yerr=spread, fmt="o", ms=size, capsize=2, lw=0.8, color=_colour(arm), alpha=alpha)
        _labelled(axis, named)
        single = all(len(up) == 1 for _, up in arms.values())
        axis.set(
            xlabel=label, ylabel=f"AutoAttack accuracy, % ({'95 % interval' if single else 'deviation over seeds'})"
        )
        axis.set_title(GRIDS[grid].title, fontsize=9)
        axis.grid(alpha=0.25, lw=0.5)
    return figure


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
            arm,
            named[arm],
            xytext=(1.03, place),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=_colour(arm),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": _colour(arm), "alpha": 0.6},
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


def draw_all(runs: Runs, folder: Path) -> list[Path]:
    """:return: The figures, written anew where they are not current."""
    folder.mkdir(parents=True, exist_ok=True)
    draws: dict[str, Callable[[], Any]] = {
        "cost": lambda: _scatter(runs, "cost", "forward-backward passes a step (standard training: 1)"),
        **{name: (lambda name=name: _bars(runs, name)) for name in CLAIMS},
        "consensus": lambda: _scatter(runs, "consensus", "saliency consensus, clean and under PGD-20"),
        **{name: (lambda name=name: _maps(runs, name)) for name in figure_names(runs) if name.startswith(_MAPS)},
    }
    written = []
    for name in figure_names(runs):
        path = folder / f"{name}.png"
        if not (path.is_file() and recorded(path, runs, name)):
            draws[name]().savefig(path, metadata={"Source": _hash(content(runs, name)), "Software": None})
            written.append(path)
    return written
