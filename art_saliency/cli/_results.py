"""What a comparison leaves in its folder: its budget, the figures of every arm, and one table of them all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import KEPT, shown_and_written
from art_saliency.errors import CheckpointError

if TYPE_CHECKING:
    from art_saliency.trainers.arms import Arm, Budget

__all__ = ["begin", "finish", "go_on", "has_begun", "keep"]

_BUDGET, _RESULTS, _TABLE = "budget.json", "results.json", "results.md"
_ARMS = "arms"  # in the budget's file: the folders of all arms that were begun


def has_begun(out: Path) -> bool:
    """:return: Whether there is a comparison in a folder, over or not."""
    return (out / _BUDGET).is_file()


def begin(budget: Budget, arms: Sequence[Arm], out: Path) -> None:
    """Write the page from which ``--resume`` goes on, and take away what an earlier comparison in this folder left for its own."""
    from art_saliency.training.checkpoint import clear

    out.mkdir(parents=True, exist_ok=True)
    before: list[str] = []
    if has_begun(out):
        with contextlib.suppress(CheckpointError):  # damaged: it goes now
            before = _read(out / _BUDGET).get(_ARMS, [])
    folders = [arm.folder for arm in arms]
    for folder in {*before, *folders}:
        clear(out / folder / KEPT)
    (out / _TABLE).unlink(missing_ok=True)
    keep({}, out)
    _write({**budget.to_json(), _ARMS: folders}, out / _BUDGET)


def go_on(budget: Budget, arms: Sequence[Arm], out: Path) -> dict[str, dict[str, Any]]:
    """
    Go on with the comparison in a folder.

    :return: The figures of the arms that are over.
    :raises InputError: When its budget or its data are others; what differs is named.
    """
    from art_saliency import _checks
    from art_saliency.training.checkpoint import differences

    before = _read(out / _BUDGET)
    folders = before.pop(_ARMS, [])
    if found := differences(before, budget.to_json()):
        got = f"a budget that differs from the one in {out}: {'; '.join(found)}"
        raise _checks.refuse("--resume", got, "the same data and words", "give those, or choose another folder")
    results = _read(out / _RESULTS)
    added = [arm.folder for arm in arms if arm.folder not in folders]
    _write({**before, _ARMS: folders + added}, out / _BUDGET)
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({error}), expected what compare wrote; start anew with --force"
        ) from error
    return value


def keep(results: Mapping[str, dict[str, Any]], out: Path) -> None:
    """Write what is known so far as ``results.json``, so that an interrupted comparison leaves its numbers."""
    _write(results, out / _RESULTS)


def _write(value: Mapping[str, Any], path: Path) -> None:
    from art_saliency.files import write_file

    write_file(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def finish(results: Mapping[str, dict[str, Any]], budget: Budget, out: Path) -> None:
    """Print the table of all arms, and write it as ``results.md`` and ``results.json``."""
    from art_saliency.evaluation._autoattack_plan import changes_of, in_words
    from art_saliency.evaluation.table import markdown_table, percent
    from art_saliency.files import write_file

    rows = [
        (
            arm,
            percent(result["clean"]["accuracy"]),
            percent(result["pgd20"]["accuracy"]),
            percent(result["autoattack"]["accuracy"]),
            "{:.1f}-{:.1f}".format(*(100 * end for end in result["autoattack"]["interval_95"])),
            f"{result['seconds_per_epoch']:.2f}",
            f"{result['passes_per_step']:.1f}",
        )
        for arm, result in results.items()
    ]
    header = ("network", "clean %", "PGD-20 %", "AutoAttack %", "95 % interval", "s / epoch", "passes / step")
    table = markdown_table(header, rows)
    details = next(iter(results.values()))["autoattack_details"]
    kind = (details["version"], details["deviations"])
    which = "all" if budget.images == len(budget.data.x_test) else "the first"
    note = (
        f"Accuracy on {which} {budget.images} test images of {budget.data.name}, {budget.threat.norm} eps "
        f"{budget.threat.eps:g}, {budget.epochs} epochs, seed {budget.seed}. AutoAttack: version {in_words(*kind)}, by "
        f"{details['backend']} {details['backend_version']}. One pass is a forward-backward pass of standard training."
    )
    note = "\n\n".join([note, *(f"AutoAttack: {change}" for change in changes_of(*kind))])

    def write() -> None:
        keep(results, out)
        write_file(out / _TABLE, lambda file: file.write(f"{table}\n\n{note}\n".encode()))

    shown_and_written(f"{table}\n\n{note}", write)
