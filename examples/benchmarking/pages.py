"""What is made of the stored runs: tables in the README, the cards and ``results/RESULTS.md``, and figures."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from art_saliency.evaluation.table import markdown_table
from benchmarking.claims import CLAIMS, HEADLINE, TARGETS, Target
from benchmarking.figures import draw_all
from benchmarking.grids import GRIDS, Grid

__all__ = ["load_runs", "rendered", "write_all"]

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""grid -> arm -> runs, by seed."""

_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"
_PLACE = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)
_CARDS = ("adv-gsct", "j-sigr", "aalp", "fsr")
_MARKS = "†‡§¶"
_PERCENT = re.compile(r"\d+(?:\.\d+)?%")
_RELATED = 8  # arms, from which a correlation over them is worth a word
_HEADER = ("arm", "seeds", "clean %", "PGD-20 %", "AutoAttack %", "transfer %", "consensus", "passes / step", "audit")
_WORDS = (
    "AutoAttack is version `standard`; *transfer* counts the images that withstand all of fifteen transferred attacks, five from a standard network, from a "
    "PGD-AT network and from both; a *pass* is a forward-backward pass of standard training of the bare network, counted (what AWP adds is not); the *audit* "
    "is seed 0's. `@silu` names an activation, `:NAME=VALUE` what differs from a method's defaults; adapter is f + R(f), of as many parameters as the FSR "
    "layer. *JPEG-75*: each image was once encoded again as a JPEG of quality 75, in training and test."
)
_NOTE = (
    "Mean and standard deviation over seeds; of one seed, the 95 % interval that the number of images leaves. *Consensus* is the mean cosine of loss-gradient "
    f"saliency, clean and under PGD-20, on 100 images. {_WORDS}"
)


def load_runs(folder: Path) -> Runs:
    """:return: All stored runs, in the order of the grids."""
    runs: Runs = {}
    for grid, settings in GRIDS.items():
        pages = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / grid).glob("*.json"))]
        by_arm = {arm: sorted((p for p in pages if p["arm"] == arm), key=lambda p: p["seed"]) for arm in settings.arms}
        if found := {arm: those for arm, those in by_arm.items() if those}:
            runs[grid] = found
    return runs


def _spread(values: Sequence[float | None], digits: int = 1, scale: float = 100) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} +- {statistics.stdev(known):.{digits}f}"


def _accuracy(runs: Sequence[dict[str, Any]], key: str) -> str:
    """Mean and deviation over seeds; of one seed, what its images leave open."""
    if len(runs) > 1:
        return _spread([run[key]["accuracy"] for run in runs])
    low, high = runs[0][key]["interval_95"]
    return f"{100 * runs[0][key]['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _verdict(runs: Iterable[dict[str, Any]]) -> str:
    return next((run["audit"]["verdict"].split()[0] for run in runs if "audit" in run), "-")


def _row(arm: str, runs: list[dict[str, Any]], marks: dict[str, str]) -> tuple[str, ...]:
    doubts = {words for words, _ in _doubts(runs)}
    mark = "".join(sign for words, sign in marks.items() if words in doubts)
    return (
        arm,
        str(len(runs)),
        *(_accuracy(runs, key) for key in ("clean", "pgd20")),
        f"{_accuracy(runs, 'autoattack')} {mark}".rstrip(),
        _accuracy(runs, "transfer"),
        _spread([run["saliency"]["consensus"]["mean"] for run in runs], 2, 1),
        f"{statistics.median(run['cost']['passes_per_step'] for run in runs):.1f}",
        _verdict(runs),
    )


def _table(runs: Runs, grid: str, arms: Iterable[str]) -> str:
    marks = _marks(runs)
    return markdown_table(_HEADER, [_row(arm, runs[grid][arm], marks) for arm in arms if arm in runs[grid]])


def difference(runs: Runs, grid: str, arm: str, versus: str, key: str = "autoattack") -> list[float]:
    """:return: Seed by seed, in points."""
    found = runs.get(grid, {})
    other = {run["seed"]: run[key]["accuracy"] for run in found.get(versus, [])}
    return [100 * (run[key]["accuracy"] - other[run["seed"]]) for run in found.get(arm, []) if run["seed"] in other]


def interval(values: Sequence[float], images: int) -> tuple[float, float] | None:
    """
    Student's 95 % interval of a mean difference; of fewer than three seeds ``None``.

    :param values: Seed by seed, in points. :param images: How many were judged: differences come in steps of one of them, so that
        seeds which happen to agree to the image are not taken for certainty.
    """
    from scipy.stats import t

    if len(values) < 3:
        return None
    deviation = max(statistics.stdev(values), 100 / images / math.sqrt(12))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _judgement(
    values: Sequence[float], images: int, words: tuple[str, str, str] = ("a gain", "a loss", "open"), least: float = 0
) -> str:
    """:return: The first of the words where the whole interval lies above `least`, the second where it lies below, else the third."""
    found = interval(values, images)
    if found is None:
        return "too few seeds"
    low, high = found
    return words[0] if low > least else words[1] if high < least else words[2]


def _signed(values: Sequence[float], images: int) -> str:
    mean, found = f"{statistics.fmean(values):+.1f}", interval(values, images)
    return mean if found is None else f"{mean} ({found[0]:+.1f} to {found[1]:+.1f})"


def _targets(runs: Runs) -> str:
    """What each method reaches beside what it must exceed, on every grid, and at which part of its passes."""

    def passes(grid: str, arm: str) -> float:
        return statistics.median(run["cost"]["passes_per_step"] for run in runs[grid][arm])

    def cell(grid: str, target: Target) -> str:
        values = difference(runs, grid, target.arm, target.versus, target.key)
        if not values:
            return "-"
        images, cost = GRIDS[grid].images, passes(grid, target.arm) / passes(grid, target.versus)
        verdict = _judgement(values, images, ("met", "missed", "undecided"), target.least)
        return f"{_signed(values, images)} at {cost:.2f}: {verdict}"

    names = {"autoattack": "AutoAttack", "transfer": "transfer"}
    rows = [(t.arm, t.versus, names[t.key], f"{t.least:+.1f}", *(cell(grid, t) for grid in runs)) for t in TARGETS]
    return markdown_table(
        ("arm", "against", "under", "target", *(_with_seeds(runs, grid) for grid in runs)), rows, left=3
    )


def _with_seeds(runs: Runs, grid: str) -> str:
    """:return: The set's name, and over how many seeds its differences are."""
    counts = {len(difference(runs, grid, t.arm, t.versus, t.key)) for t in TARGETS} - {0}
    words = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
    return f"{grid}, {words} seed{'s' if max(counts) > 1 else ''}"


def _differences(runs: Runs, grid: str, pairs: Iterable[tuple[str, str]]) -> str:
    rows = []
    for arm, versus in pairs:
        values = difference(runs, grid, arm, versus)
        if values:
            images = GRIDS[grid].images
            rows.append((arm, versus, str(len(values)), _signed(values, images), _judgement(values, images)))
    return markdown_table(("arm", "against", "seeds", "AutoAttack, points", "verdict"), rows, left=2) if rows else ""


def of_other_images(runs: Runs, grid: str, arm: str, versus: str) -> tuple[int, float] | None:
    """
    How far a difference of two arms would move with other test images: what an interval over seeds, of the same images, leaves out.

    :return: The seeds of which each image's outcome is stored, and half of the 95 % interval over images of their mean difference, in
        points; ``None`` where there are none.
    """

    def withstood(name: str) -> dict[int, list[int]]:
        those = runs.get(grid, {}).get(name, [])
        return {run["seed"]: list(map(int, run["withstood"]["autoattack"])) for run in those if "withstood" in run}

    ours, theirs = withstood(arm), withstood(versus)
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        return None
    gains = [statistics.fmean(ours[seed][i] - theirs[seed][i] for seed in shared) for i in range(GRIDS[grid].images)]
    return len(shared), 100 * 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))


def _images(runs: Runs) -> list[str]:
    rows = []
    for arm, versus in dict.fromkeys((target.arm, target.versus) for target in TARGETS):
        for grid in runs:
            values, found = difference(runs, grid, arm, versus), of_other_images(runs, grid, arm, versus)
            if values and found:
                images = GRIDS[grid].images
                rows.append(
                    (arm, versus, grid, _signed(values, images), f"+-{found[1]:.1f}", f"{images}", str(found[0]))
                )
    if not rows:
        return []
    header = ("arm", "against", "set", "points, interval over seeds", "95 % over images", "images", "seeds of these")
    return [
        "## How much hangs on the test images",
        "",
        "Intervals over seeds are of the same test images. From the runs that keep which images withstood AutoAttack: how far the mean "
        "difference of these seeds would move with other images of the same kind, at most: of one seed, that seed's own chance is in it too. It adds to the interval over seeds; verdicts do not count it.",
        "",
        markdown_table(header, rows, left=3),
        "",
    ]


def _described(runs: Runs, grid: str) -> str:
    """:return: A set of runs in one sentence: data, network, budget, and the command that makes them."""
    settings, count = GRIDS[grid], sum(map(len, runs[grid].values()))
    shared = f"{settings.epochs} epochs of Adam (one cycle, peak {settings.lr:g}, batches of {settings.batch_size}), {_inner(settings)}"
    audited = f", audit on {settings.audited}" if settings.audited else ""
    command = f"python examples/benchmark.py run {grid}{'' if settings.data else ' --data FILE'}"
    return (
        f"**{settings.title}**, {shared}, AutoAttack and transfer on {settings.images} {'held-out' if settings.held_out else 'test'} images{audited}; "
        f"`{command}`{_of_file(settings)} ({count} of {len(settings.runs)} runs stand)"
    )


def _section(runs: Runs, grid: str, arms: Sequence[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    if not set(arms) & set(runs[grid]):
        return []
    lines = [
        f"{_described(runs, grid)}:",
        "",
        _table(runs, grid, arms),
        "",
        *_doubted({arm: runs[grid][arm] for arm in arms if arm in runs[grid]}, _marks(runs)),
    ]
    if table := _differences(runs, grid, pairs):
        lines += [
            "Differences seed by seed, with Student's 95 % interval of their mean:",
            "",
            table,
            "",
        ]
    return lines


def _doubts(runs: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """:return: What AutoAttack itself doubted of a run each, in words that are the same for every run, and the figures in it."""
    warnings = [warning for run in runs for warning in run["autoattack_details"]["warnings"]]
    return [(_PERCENT.sub("...%", warning), " ".join(_PERCENT.findall(warning))) for warning in warnings]


def _marks(runs: Runs) -> dict[str, str]:
    """:return: A footnote mark for each of AutoAttack's warnings."""
    every = sorted({words for found in runs.values() for those in found.values() for words, _ in _doubts(those)})
    return dict(zip(every, _MARKS, strict=False))


def _doubted(found: dict[str, list[dict[str, Any]]], marks: dict[str, str]) -> list[str]:
    """Below a table: each warning's arms, in how many of their seeds it was given, and the figures in it."""
    lines: list[str] = []
    for words, mark in marks.items():
        told = []
        for arm, those in found.items():
            figures = [its for run in those for said, its in _doubts([run]) if said == words]
            if figures:
                told.append(
                    f"`{arm}` {len(figures)} of {len(those)}" + (f" ({', '.join(figures)})" if any(figures) else "")
                )
        if told:
            lines += [f"{mark} {'; '.join(told)}.", ""]
    return lines


def _note(runs: Runs) -> str:
    """At the end of a page's tables: what their columns and marks mean."""
    doubts = [
        f'{mark} beside an accuracy, and below the table of how many seeds: AutoAttack itself warned, "{words}"'
        for words, mark in _marks(runs).items()
    ]
    return " ".join([_NOTE, *doubts])


def _inner(grid: Grid) -> str:
    """:return: What is common to the attacks of training."""
    share, half = grid.parameters.get("eps_warmup_share"), "precision" in grid.options
    rises = f", radii that rise over the first {share:g} of the run" if share else ""
    mixed = ", bfloat16 but for methods that differentiate input gradients" if half else ""
    return f"PGD-{grid.parameters.get('max_iter', 10)} in training{rises}{mixed}"


def _of_file(grid: Grid) -> str:
    if grid.of_file is None:
        return ""
    train, test = grid.of_file
    return (
        f", of which the first {train:,} training and {test:,} test images are read, sha256 `{grid.data_sha256[:12]}`"
    )


def _final(runs: Runs) -> Runs:
    """:return: The runs that were judged on test images."""
    return {grid: found for grid, found in runs.items() if not GRIDS[grid].held_out}


def _overview(runs: Runs) -> str:
    """The methods beside each other: clean accuracy and AutoAttack on every set, what a step costs, and what the audit objected to."""

    def cell(grid: str, arm: str, key: str) -> str:
        those = runs[grid].get(arm, [])
        return _accuracy(those, key) if those else "-"

    def attacked(grid: str, arm: str) -> str:
        verdict = _verdict(runs[grid].get(arm, []))
        return cell(grid, arm, "autoattack") + ("" if verdict in ("consistent", "-") else f", {verdict}")

    first = next(iter(runs))
    header = ("arm", "passes / step", *(word for grid in runs for word in (f"{grid}: clean", "AutoAttack")))
    rows = [
        (
            arm,
            f"{statistics.median(run['cost']['passes_per_step'] for run in runs[first][arm]):.1f}",
            *(word for grid in runs for word in (cell(grid, arm, "clean"), attacked(grid, arm))),
        )
        for arm in HEADLINE
    ]
    return markdown_table(header, rows)


def _readme(runs: Runs) -> str:
    final = _final(runs)
    return "\n".join(
        [
            "Accuracy in %, mean and standard deviation over seeds (of one seed, the 95 % interval that its images leave), and what the audit calls a "
            f"network, where it is not *consistent with true robustness*; passes are those of {next(iter(final))}:",
            "",
            _overview(final),
            "",
            "What each method must exceed: points of accuracy gained over another arm, seed by seed: mean, Student's 95 % interval, and at which part of "
            "the other's passes. A target, set for a ResNet-18 on all of CIFAR-10, is *met* where the whole interval lies above it, *missed* where it "
            "lies below, else *undecided*:",
            "",
            _targets(final),
            "",
            *(f"- {_described(final, grid)}" for grid in final),
            "",
            _WORDS,
            "",
            "![Robustness against cost](examples/results/figures/cost.png)",
            "",
            "The grey line joins the arms that none beats for as few passes, by their means. All arms, controls, combinations, differences, AutoAttack's own warnings, audits and figures: [examples/results/RESULTS.md](examples/results/RESULTS.md).",
        ]
    )


def _card(runs: Runs, name: str) -> str:
    lines: list[str] = []
    for grid in runs:
        lines += _section(runs, grid, CLAIMS[name].arms, CLAIMS[name].differences)
    return "\n".join(
        [
            *lines,
            _note(runs),
            "",
            f"Figure: `examples/results/figures/{name}.png`. Every number's run: `examples/results/`.",
        ]
    )


def _results(runs: Runs) -> str:
    lines = [
        "# Results",
        "",
        "Made by `python examples/benchmark.py pages` from the files beside this page, one a run; each names its command. Where a file has "
        "`made_as`, that command made it, when it was another name of the same settings; it is renamed, and nothing else is changed.",
        "",
    ]
    for grid in runs:
        lines += [
            f"## {GRIDS[grid].title}",
            "",
            *_section(runs, grid, GRIDS[grid].arms, [p for claim in CLAIMS.values() for p in claim.differences]),
        ]
    lines += [_note(runs), "", *_images(_final(runs)), "## Audits", "", *_audits(_final(runs)), "## Figures", ""]
    for name, words in [("cost", "Robustness against cost"), *((name, claim.title) for name, claim in CLAIMS.items())]:
        lines += [f"![{words}](figures/{name}.png)", ""]
    lines += ["## Interpretability", "", *_interpretability(_final(runs))]
    return "\n".join(lines).rstrip() + "\n"


_LATER_CHECKS = ("gradients foretell small changes", "margins lead to the boundary")
"""What the audit was taught after the first runs had been stored."""


def _audited(runs: Runs) -> list[dict[str, Any]]:
    return [run for found in runs.values() for those in found.values() for run in those if "audit" in run]


def _audits(runs: Runs) -> list[str]:
    """Which networks the audit does not call consistent, and what it measured on them."""
    made = [{check["name"] for check in run["audit"]["checks"]} for run in _audited(runs)]
    lacking = {name: sum(name not in names for names in made) for name in _LATER_CHECKS}
    lines = [
        "An audit has the checks that there were when it was made: "
        + "; ".join(f"*{name}* is not in {count} of {len(made)}" for name, count in lacking.items() if count)
        + ".",
        "",
    ] * any(lacking.values())
    for grid, found in runs.items():
        audits = {arm: run["audit"] for arm, those in found.items() for run in those if "audit" in run}
        if not audits:
            continue
        rows = [
            (arm, verdict["verdict"].split()[0], check["name"], check["figure"])
            for arm, verdict in audits.items()
            for check in verdict["checks"]
            if check["name"] in verdict["reasons"]
        ]
        consistent = sum(verdict["verdict"].startswith("consistent") for verdict in audits.values())
        words = f"consistent with true robustness in {consistent} of {len(audits)} arms audited"
        lines += [
            f"**{GRIDS[grid].title}**, {GRIDS[grid].audited} test images, seed 0: {words}{'; not in' if rows else ''}",
            "",
        ]
        if rows:
            lines += [markdown_table(("arm", "verdict", "check", "measured"), rows, left=4), ""]
    return lines


def _interpretability(runs: Runs) -> list[str]:
    names = ("consensus", "gini", "top_mass", "edge_alignment", "insertion", "deletion")
    lines: list[str] = []
    for grid, found in runs.items():
        rows = [
            (arm, *(_spread([r["saliency"][n]["mean"] for r in those], 3, 1) for n in names))
            for arm, those in found.items()
        ]
        lines += [f"**{GRIDS[grid].title}**", "", markdown_table(("arm", *names), rows), ""]
        if len(rows) >= _RELATED:
            lines += [
                f"Rank correlation over {len(rows)} arms, of the means over seeds: consensus and AutoAttack accuracy {_relation(found):+.2f}.",
                "",
            ]
    lines += ["Loss-gradient maps of clean images; consensus is with the maps of their PGD-20 versions.", ""]
    return [
        *lines,
        "![Consensus and robustness](figures/consensus.png)",
        *(line for grid in runs for line in ("", f"![Saliency of every arm, {grid}](figures/saliency-{grid}.png)")),
    ]


def _relation(found: dict[str, list[dict[str, Any]]]) -> float:
    """Spearman's rank correlation between consensus and AutoAttack accuracy over the arms."""
    from scipy.stats import spearmanr

    pairs = [
        (
            statistics.fmean(r["saliency"]["consensus"]["mean"] for r in those),
            statistics.fmean(r["autoattack"]["accuracy"] for r in those),
        )
        for those in found.values()
    ]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def rendered(runs: Runs, root: Path) -> dict[Path, str]:
    """:return: Every page as it should be, by its path."""
    pages = {root / "examples" / "results" / "RESULTS.md": _results(runs)}
    places = {
        root / "README.md": _readme(runs),
        **{root / "art_saliency" / "methods" / f"{n.replace('-', '_')}.md": _card(runs, n) for n in _CARDS},
    }
    for path, text in places.items():
        parts = _PLACE.split(path.read_text(encoding="utf-8"))
        if len(parts) != 3:
            raise SystemExit(f"{path}: got {len(parts) // 2} places for results, expected {_BEGIN} and {_END} once")
        pages[path] = f"{parts[0]}{_BEGIN}\n{text}\n{_END}{parts[2]}"
    return pages


def write_all(folder: Path, root: Path) -> list[Path]:
    """
    Write tables and figures.

    :param folder: Of the runs. :param root: Of the project. :return: What was written.
    """
    runs = load_runs(folder)
    if not runs:
        raise SystemExit(f"{folder}: got no runs, expected some; python examples/benchmark.py run digits")
    pages = rendered(runs, root)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return [*pages, *draw_all(runs, folder / "figures")]
