"""A bundle on disk: where its files lie, how it appears as a whole or not at all, and the sums that it is checked by."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from art_saliency import _checks
from art_saliency.files import appearing, sha256_of_file, write_file

__all__ = [
    "SCHEMA",
    "SUMS",
    "Layout",
    "check_place",
    "sealed",
    "strange_entries",
    "sum_problems",
    "write_json",
    "write_text",
]

SCHEMA = 1
"""Of ``bundle.json``."""

SUMS = "SHA256SUMS"
"""The file of sums, in the form that ``sha256sum -c`` reads."""


class Layout:
    """
    Where things are in a bundle.

    :param folder: The bundle. :param name: Of the entry. :param dataset: And its board. :param threat_model: And its part.
    """

    def __init__(self, folder: Path, name: str, dataset: str, threat_model: str) -> None:
        self.folder, self.name = folder, name
        self.weights = folder / "models" / dataset / threat_model / f"{name}.pt"
        self.model_info = folder / "model_info" / dataset / threat_model / f"{name}.json"
        self.bundle = folder / "bundle.json"
        self.architecture = folder / "architecture.py"
        self.entry = folder / "model_zoo_entry.py"
        self.submission = folder / "SUBMISSION.md"
        self.reference = folder / "reference.pt"
        self.evaluation = folder / "evaluation.json"
        self.log = folder / "autoattack.log"
        self.x_adv = folder / "x_adv.pt"

    def problems(self) -> list[str]:
        """
        Compare the names that are there with those that a bundle has. No file is opened.

        :return: What does not belong in a bundle, and what is always written and is missing.
        """
        needed = {self.submission, self.reference, self.weights, self.model_info, self.entry, self.bundle}
        needed |= {self.folder / SUMS, *([self.log] if self.evaluation.exists() else [])}
        files = needed | {self.architecture, *([self.evaluation, self.x_adv] if self.log in needed else [])}
        folders = {above for file in files for above in file.parents}
        there = sorted(self.folder.rglob("*"))
        strange = [path for path in there if path not in (folders if path.is_dir() else files)]
        found = [f"{path.relative_to(self.folder).as_posix()} is no part of a bundle" for path in strange]
        missing = sorted(needed - {path for path in there if path.is_file()})
        return found + [f"{path.relative_to(self.folder).as_posix()} is missing" for path in missing]


def write_text(path: Path, text: str) -> None:
    """Write a text file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, page: dict[str, Any]) -> None:
    """Write JSON, making its folder."""
    write_text(path, json.dumps(page, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def sealed(target: Path, *, force: bool) -> Iterator[Path]:
    """
    Let a bundle appear with its sums, as a whole or not at all (:func:`~art_saliency.files.appearing`).

    :param target: Its place. :param force: Whether a bundle that is there may be replaced; anything else never is.
    :return: The folder to write into; its sums are added on exit.
    :raises InputError: When the place is taken.
    :raises CheckpointError: When it cannot be written.
    """
    check_place(target, force=force)
    with appearing(target, force=True) as folder:  # it was found to be vacant, or a bundle that may be replaced
        yield folder
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_text(folder / SUMS, "".join(f"{sha256_of_file(folder / file)}  {file}\n" for file in files))
        check_place(target, force=force)  # something may have appeared there meanwhile


def check_place(target: Path, *, force: bool) -> None:
    """:raises InputError: When a bundle may not be written there."""
    if Path.cwd().is_relative_to(target.resolve()):
        raise _checks.refuse("out", f"{target}, the working directory or a folder above it", "a new folder", "name one")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise _checks.refuse("out", f"{target}, which is no folder", "a new folder")
    if not any(target.iterdir()):
        return
    if not (target / "bundle.json").is_file() or not (target / SUMS).is_file():
        raise _checks.refuse("out", f"{target}, which holds other files", "a new or empty folder", "choose another")
    if not force:
        raise _checks.refuse("out", f"{target}, a bundle that is there already", "a new folder", "add --force")


def strange_entries(folder: Path) -> list[str]:
    """:return: Links, pipes and whatever else is neither a file nor a folder: what must not be read, as it may never end."""
    found = []
    for root, folders, files in os.walk(folder):
        for entry in (Path(root, each) for each in (*folders, *files)):
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                found.append(f"{entry.relative_to(folder).as_posix()} is no plain file")
    return sorted(found)


def sum_problems(folder: Path) -> list[str]:
    """
    Compare a bundle's files with its ``SHA256SUMS``. The sums tell damage and careless changes; they are no signature.

    :return: What does not agree: every file that is missing, changed or not listed; where there are :func:`strange_entries`,
        these alone, and nothing is read.
    """
    if strange := strange_entries(folder):
        return strange
    if not (folder / SUMS).is_file():
        return [f"{SUMS} is missing"]
    listed, found = {}, []
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*)", line)
        path = PurePosixPath(match[2] if match else "/")
        if match is None or path.is_absolute() or ".." in path.parts or path.as_posix() in listed:
            found.append(f"{SUMS}, line {number}: no sum of a file inside the bundle")
        else:
            listed[path.as_posix()] = match[1]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS}
    found += [f"{file} is missing" for file in sorted(set(listed) - there)]
    found += [f"{file} is not listed in {SUMS}" for file in sorted(there - set(listed))]
    changed = (file for file in sorted(there & set(listed)) if sha256_of_file(folder / file) != listed[file])
    return found + [f"{file} is not the file that was written (its sum differs)" for file in changed]
