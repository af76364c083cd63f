"""A figure a claim, drawn from the stored runs alone. Each carries the hash of what it shows, so that a test can tell whether it is current."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarking.claims import CLAIMS
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


def figure_names() -> tuple[str, ...]:
    """:return: Of all figures."""
    return ("cost", *CLAIMS, "consensus", "saliency")


def _point(those: list[dict[str, Any]], *keys: str) -> list[float]:
    values = []
    for run in those:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    return values


def content(runs: Runs, name: str) -> Any:
    """:return: All that a figure shows, JSON-able: what its hash is of."""
    if name == "cost":
        return _points(runs, ("cost", "passes_per_step"))
    if name == "consensus":
        return _points(runs, ("saliency", "consensus", "mean"))
    if name == "saliency":
        return {g: {a: those[0]["maps"] for a, those in found.items()} for g, found in runs.items()}
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
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def recorded(path: Path, runs: Runs, name: str) -> bool:
    """:return: Whether the figure shows what the runs say today."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source") == _hash(content(runs, name))


def _colour(arm: str) -> str:
    return next((colour for family, colour in _FAMILIES if arm.startswith(family)), "0.35")


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * count), dpi=110, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(count, 1)))


def _scatter(runs: Runs, name: str, label: str) -> Any:
    """Robust accuracy against a figure: one point an arm, whiskers of one standard deviation over seeds; the controls unnamed."""
    shown = content(runs, name)
    figure, axes = _panels(len(shown), 7.2, 4.4)
    for axis, (grid, arms) in zip(axes, shown.items(), strict=True):
        for arm, (across, up) in arms.items():
            x, y = statistics.fmean(across), 100 * statistics.fmean(up)
            axis.errorbar(
                x,
                y,
                yerr=100 * statistics.stdev(up) if len(up) > 1 else None,
                fmt="o",
                ms=4,
                capsize=2,
                lw=0.8,
                color=_colour(arm),
            )
            axis.annotate(arm, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=5.5, color=_colour(arm))
        axis.set(xlabel=label, ylabel="AutoAttack accuracy, %")
        axis.set_title(GRIDS[grid].title, fontsize=9)
        axis.margins(x=0.12)
        axis.grid(alpha=0.25, lw=0.5)
    return figure


def _bars(runs: Runs, name: str) -> Any:
    shown = content(runs, name)
    figure, axes = _panels(len(shown), 7.2, 0.9 + 0.34 * len(CLAIMS[name].arms))
    for axis, (grid, arms) in zip(axes, shown.items(), strict=True):
        for row, (arm, figures) in enumerate(arms.items()):
            robust = [100 * v for v in figures["autoattack"]]
            mean = statistics.fmean(robust)
            axis.barh(row, mean, color=_colour(arm), alpha=0.75, height=0.62)
            axis.plot(robust, [row] * len(robust), "k|", ms=7, mew=0.8)
            axis.plot(100 * statistics.fmean(figures["transfer"]), row, "kD", ms=4, mfc="w")
            axis.plot(100 * statistics.fmean(figures["clean"]), row, "ko", ms=4, mfc="w")
            axis.text(1, row, f"{mean:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=7)
        axis.invert_yaxis()
        axis.set(
            xlabel="accuracy, %: bar AutoAttack (| each seed), diamond transferred attacks, circle clean", xlim=(0, 101)
        )
        axis.set_title(GRIDS[grid].title, fontsize=8)
    figure.suptitle(CLAIMS[name].title, fontsize=9)
    return figure


def _maps(runs: Runs) -> Any:
    """Eight test images x arms: the size of the loss gradient, each map scaled to its own maximum."""
    from matplotlib.figure import Figure

    shown = content(runs, "saliency")
    rows = sum(map(len, shown.values()))
    figure = Figure(figsize=(7.2, 0.62 * rows + 0.8), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 8, squeeze=False)
    lines = [(grid, arm, packed) for grid, arms in shown.items() for arm, packed in arms.items()]
    for row, (grid, arm, packed) in zip(axes, lines, strict=True):
        maps = np.frombuffer(base64.b64decode(packed["base64"]), np.uint8).reshape(packed["shape"])
        for axis, image in zip(row, maps, strict=True):
            axis.imshow(image, cmap="magma", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{grid}\n{arm}", fontsize=5, rotation=0, ha="right", va="center")
    figure.suptitle(
        "Loss-gradient saliency of the first eight test images, seed by seed the lowest that stands", fontsize=8
    )
    return figure


def draw_all(runs: Runs, folder: Path) -> list[Path]:
    """:return: The figures, written anew where they are not current."""
    folder.mkdir(parents=True, exist_ok=True)
    draws: dict[str, Callable[[], Any]] = {
        "cost": lambda: _scatter(runs, "cost", "forward-backward passes a step (standard training: 1)"),
        **{name: (lambda name=name: _bars(runs, name)) for name in CLAIMS},
        "consensus": lambda: _scatter(runs, "consensus", "saliency consensus, clean and under PGD-20"),
        "saliency": lambda: _maps(runs),
    }
    written = []
    for name in figure_names():
        path = folder / f"{name}.png"
        if not (path.is_file() and recorded(path, runs, name)):
            draws[name]().savefig(path, metadata={"Source": _hash(content(runs, name)), "Software": None})
            written.append(path)
    return written
