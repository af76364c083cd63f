"""What ``evaluate`` prints and writes: the table of one run, and one table and figure of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from art_saliency.cli._common import shown_and_written

__all__ = ["compare", "table_of_run"]

_MEASURES = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}
_CONDITIONS = {"data": "test images of {}", "threat model": "{}", "AutoAttack": "AutoAttack version {}"}
"""What figures hold for, by the name of a column, and in words."""


def _attack(page: dict[str, Any]) -> dict[str, Any]:
    details: dict[str, Any] = page.get("autoattack_details") or page["autoattack"]["details"]
    return details


def _conditions(page: dict[str, Any]) -> dict[str, str]:
    """:param page: Of an evaluation or of a report. :return: Each of the conditions, as it was."""
    from art_saliency.evaluation._autoattack_plan import in_words

    attack = _attack(page)
    return {
        "data": page["data"],
        "threat model": f"{attack['norm']} eps {attack['eps']:g}",
        "AutoAttack": in_words(attack["version"], attack["deviations"]),
    }


def _note(conditions: dict[str, str], names: Sequence[str]) -> str:
    """:return: Some of the conditions, in one line."""
    return ", ".join(_CONDITIONS[name].format(conditions[name]) for name in names)


def table_of_run(page: dict[str, Any], method: str) -> str:
    """:param page: Of an evaluation or of a report. :return: Its figures, Markdown, and below them what they hold for."""
    from art_saliency.evaluation.report_text import interval
    from art_saliency.evaluation.table import markdown_table, percent

    known = _conditions(page)
    rows = [
        (
            f"AutoAttack ({known['AutoAttack']})" if key == "autoattack" else words,
            percent(page[key]["accuracy"]),
            interval(page[key]),
        )
        for key, words in _MEASURES.items()
    ]
    table = markdown_table((f"{method}, {page['images']} images", "accuracy %", "95 % interval"), rows)
    return f"{table}\n\n{_note(known, ['data', 'threat model'])}"


def compare(pages: dict[str, dict[str, Any]], out: Path) -> None:
    """Print and write one table of all runs, and draw one figure. What differs between them has a column."""
    from art_saliency.evaluation._autoattack_plan import changes_of
    from art_saliency.evaluation.report_text import interval
    from art_saliency.evaluation.table import markdown_table, percent

    full = all("audit" in page for page in pages.values())
    known = {name: _conditions(page) for name, page in pages.items()}
    first = next(iter(known.values()))
    same = [what for what in _CONDITIONS if all(each[what] == first[what] for each in known.values())]
    own = [what for what in _CONDITIONS if what not in same]
    header = ["run", "method", *own, *(f"{words} %" for words in _MEASURES.values()), "95 % interval", "images"]
    rows: list[tuple[Any, ...]] = []
    for name, page in pages.items():
        method = page.get("run") or page["network"]
        shares = (percent(page[key]["accuracy"]) for key in _MEASURES)
        more = (page["audit"]["verdict"],) if full else ()
        where = (known[name][what] for what in own)
        rows.append((name, method, *where, *shares, interval(page["autoattack"]), page["images"], *more))
    table = markdown_table([*header, "audit"] if full else header, rows, left=2 + len(own))
    if same:
        table = f"{table}\n\n{_note(first, same)}"
    attacks = [_attack(page) for page in pages.values()]
    changes = [change for attack in attacks for change in changes_of(attack["version"], attack["deviations"])]
    table = "\n\n".join([table, *(f"AutoAttack: {change}" for change in dict.fromkeys(changes))])
    shown_and_written(f"\n{table}\n", lambda: _write_comparison(pages, table, out, full=full))
    print(f"Written to {out}: comparison.md, comparison.json, comparison.png")


def _write_comparison(pages: dict[str, dict[str, Any]], table: str, out: Path, *, full: bool) -> None:
    from art_saliency.evaluation.figures_report import accuracy_curve, side_by_side
    from art_saliency.files import write_file

    out.mkdir(parents=True, exist_ok=True)
    side_by_side(
        pages,
        out / "comparison.png",
        title=f"{len(pages)} networks, 95 % intervals",
        measures=list(_MEASURES),
        words=lambda key: _MEASURES[key],
    )
    if full:
        curves = {
            name: {float(eps): row for eps, row in page["accuracy_against_eps"].items()} for name, page in pages.items()
        }
        accuracy_curve(curves, out / "accuracy_against_eps.png", title="Accuracy against the radius (PGD)", label="eps")
    write_file(out / "comparison.md", lambda file: file.write(f"{table}\n\n![comparison](comparison.png)\n".encode()))
    write_file(out / "comparison.json", lambda file: file.write(json.dumps(pages, indent=1).encode()))
