"""
Is a bundle what it says? Without trust nothing in it is executed: no code, no pickle.

What is read: sums, JSON, the syntax of its Python files, and tensors by ``torch.load(weights_only=True)``. With trust,
RobustBench's own code loads it in a fresh process, and benchmarks it where that is asked for.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.errors import CheckpointError, InputError
from art_saliency.files import is_dense, read_tensors, sha256_of_tensors
from art_saliency.robustbench.benchmark import compared, wanted_benchmark
from art_saliency.robustbench.bundle import SCHEMA, Layout, strange_entries, sum_problems
from art_saliency.robustbench.export import name_problem
from art_saliency.robustbench.fresh import open_images
from art_saliency.robustbench.model_info import prepared_board, problems, unfilled
from art_saliency.robustbench.proof import load_problems, make_job, prove
from art_saliency.robustbench.rules import key_violations
from art_saliency.robustbench.statement import stated_records, statement_problems
from art_saliency.robustbench.user_source import import_problems, parsed

__all__ = ["Verification", "verify_bundle"]


@dataclass
class Verification:
    """
    What was found.

    :ivar bundle: The folder. :ivar problems: What is wrong; empty when nothing is.
    :ivar checked: What was looked at. :ivar unchecked: What was not, and how to have it looked at.
    :ivar unfilled: Arguments of an export that a human has still to give. :ivar benchmark: RobustBench's numbers beside the stated ones.
    """

    bundle: str
    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """:return: Whether nothing is wrong, as far as was looked."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """:return: Everything."""
        return {"ok": self.ok, **self.__dict__}


def verify_bundle(
    folder: str | Path,
    *,
    trust: bool = False,
    benchmark: bool = False,
    images: str | Path | None = None,
    data_dir: str | Path = "data",
    device: str = "cpu",
) -> Verification:
    """
    Check a bundle.

    :param folder: What :func:`~art_saliency.robustbench.export.export_robustbench` wrote.
    :param trust: Whether the bundle's own code may be run, in another process with your rights. Everything that can be
        checked without running it is checked first; where that finds a problem, it is not run.
    :param benchmark: Whether RobustBench's ``benchmark`` is to be run and its number compared. Needs `trust`.
    :param images: Arrays with the test images in RobustBench's order (see :func:`art_saliency.load_data`); ``None`` lets
        RobustBench download them.
    :param data_dir: Where RobustBench keeps its data sets.
    :param device: On which it is benchmarked.
    :return: What was found; ``ok`` says whether it is good.
    :raises CheckpointError: When there is no bundle at all, or `images` cannot be read or are not of its data set.
    """
    path = Path(folder)
    if not (path / "bundle.json").is_file():
        raise CheckpointError(f"{path}: no bundle.json, expected a bundle; make one with: art-saliency export")
    if benchmark and not trust:
        raise _checks.refuse("benchmark", "True without trust", "both: it runs the bundle's own code", "add --trust")
    found = Verification(str(path))
    found.checked.append("that every file is the one that was written (SHA256SUMS), and that there are no others")
    found.problems += strange_entries(path)
    if found.problems:
        found.unchecked.append(
            "everything else: what is no plain file is not read (take it away, or have the bundle sent again)"
        )
        return found
    found.problems += sum_problems(path)
    page = _read_page(path, found)
    if page is None:
        return found
    layout = Layout(path, page["name"], page["dataset"], page["threat_model"])
    found.problems += [problem for problem in layout.problems() if problem not in found.problems]
    x_adv = _check_tensors(layout, page, found)
    info = _check_info(layout, page, found)
    report = _check_evaluation(layout, page, info, x_adv, found)
    _check_code(layout, page, found)
    if not trust or found.problems:
        how = "first solve what is wrong" if trust else "add --trust to run the bundle's code"
        found.unchecked.append(f"that RobustBench loads it and gets the same logits from it ({how})")
        found.unchecked.append(f"that RobustBench's benchmark returns the stated accuracy ({how})")
        return found
    wanted = None
    if benchmark and (report is None or page["threat_model"] == "corruptions"):
        found.unchecked.append("RobustBench's benchmark: the bundle states no accuracy to compare with")
    elif benchmark and report is not None:
        if images is not None:  # what is wrong with them is not the bundle's fault
            open_images(images, report["stated"]["count"], page["num_classes"], page["input_shape"])
        wanted = wanted_benchmark(report["stated"], page["preprocessing"], images, data_dir, device)
    job = make_job(path, page, wanted)
    if wanted is not None and report is not None:
        job["threads"] = max(1, report["stated"]["threads"])  # on which bits depend
    (answer,) = prove([job])
    found.problems += load_problems(answer)
    found.checked.append("that RobustBench's load_model loads it and gets the same logits from it, in a fresh process")
    if not benchmark:
        found.unchecked.append("that RobustBench's benchmark returns the stated accuracy (add --benchmark)")
    elif "benchmark_error" in answer:
        found.problems.append(f"RobustBench's benchmark failed: {answer['benchmark_error']}")
    elif wanted is not None and report is not None and "error" not in answer:
        found.benchmark, wrong = compared(answer["benchmark"], report, device)
        found.problems += wrong
        exactly = "exactly the stated accuracies" if found.benchmark["exact"] else "an accuracy within what is stated"
        found.checked.append(f"that RobustBench's benchmark returns {exactly}, on {found.benchmark['count']} images")
    return found


# --- without running anything ---------------------------------------------------------------------------------------------


def _json(path: Path, found: Verification) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        found.problems.append(f"{path.name} cannot be read as JSON ({error})")
        return None


_PAGE: dict[str, Callable[[Any], bool]] = {
    "schema": lambda value: value == SCHEMA,
    "name": lambda value: isinstance(value, str),
    "dataset": lambda value: isinstance(value, str),
    "threat_model": lambda value: isinstance(value, str),
    "weights_sha256": lambda value: isinstance(value, str),
    "also_known_as": lambda value: isinstance(value, list),
    "preprocessing": lambda value: value is None or isinstance(value, str),
    "publication": lambda value: isinstance(value, dict),
    "architecture": lambda value: value in ("robustbench", "own", "user"),
}


def _read_page(path: Path, found: Verification) -> dict[str, Any] | None:
    """:return: ``bundle.json``, when it can be gone by."""
    page = _json(path / "bundle.json", found)
    if not isinstance(page, dict):
        found.problems += [] if page is None else ["bundle.json is no object"]
        return None
    for name, before in {"also_known_as": [page.get("weights_sha256")], "publication": {}}.items():
        page.setdefault(name, before)  # bundles of before it was written down
    wrong = [name for name, fits in _PAGE.items() if name not in page or not fits(page[name])]
    if wrong:
        found.problems.append(f"bundle.json is not one that this version reads: look at {', '.join(wrong)}")
        return None
    try:
        place = prepared_board(page["dataset"], page["threat_model"], page["preprocessing"])
    except InputError as error:
        found.problems.append(f"bundle.json: {error}")
        return None
    if expected := name_problem(page["name"], page["dataset"]):
        found.problems.append(f"bundle.json: name: got {page['name']!r}, expected {expected}")
        return None
    if page.get("num_classes") != place.num_classes or page.get("input_shape") != list(place.input_shape):
        found.problems.append(f"bundle.json: classes and shape of images are not those of {page['dataset']}")
        return None
    return page


def _check_tensors(layout: Layout, page: dict[str, Any], found: Verification) -> dict[str, Tensor] | None:
    """:return: ``x_adv.pt``; ``None`` when there are no adversarial images that can be read."""
    found.checked.append(
        "that checkpoint, adversarial images and reference hold tensors only, under keys that stay whole"
    )
    weights = _read(layout.weights, found)
    if weights is not None:
        where = layout.weights.relative_to(layout.folder).as_posix()
        violations = key_violations(weights)
        found.problems += [f"{where}: {violation}" for violation in violations]
        if not violations and sha256_of_tensors(weights) != page["weights_sha256"]:
            found.problems.append(f"{where}: these are not the weights that bundle.json names")
    _read(layout.reference, found, x=4, logits=2)
    images = _read(layout.x_adv, found, x_adv=4) if layout.x_adv.is_file() else None
    if images is not None and not bool(((images["x_adv"] >= 0) & (images["x_adv"] <= 1)).all()):
        found.problems.append("x_adv.pt: adversarial images are outside [0, 1]")
    if images is not None and list(images["x_adv"].shape[1:]) != page["input_shape"]:
        found.problems.append(f"x_adv.pt: adversarial images are not of the shape {tuple(page['input_shape'])}")
    return images


def _read(path: Path, found: Verification, **axes: int) -> dict[str, Any] | None:
    """
    Read a file of tensors.

    :param axes: How many each of them has, by name; none stands for whatever is there.
    :return: Its content; ``None`` when it is anything else.
    """
    try:
        content = {str(key): value for key, value in read_tensors(path).items()}
    except CheckpointError as error:
        found.problems.append(str(error))
        return None
    if axes and (set(content) != set(axes) or not all(_finite(content[name], axes[name]) for name in axes)):
        shapes = " and ".join(f"{name} with {count} axes" for name, count in axes.items())
        found.problems.append(f"{path.name}: got other things than {shapes}, finite float32 tensors")
        return None
    return content


def _finite(value: Any, axes: int) -> bool:
    plain = is_dense(value) and value.dtype == torch.float32 and value.ndim == axes
    return plain and bool(value.isfinite().all())


def _check_info(layout: Layout, page: dict[str, Any], found: Verification) -> dict[str, Any]:
    info = _json(layout.model_info, found)
    if info is None:
        return {}
    wrong = problems(info, page["dataset"], page["threat_model"])
    found.problems += [f"model_info {problem}" for problem in wrong]
    found.checked.append("that model_info has RobustBench's fields in RobustBench's conventions")
    if not isinstance(info, dict):
        return {}
    found.unfilled += unfilled(info, page["publication"])
    return info


def _check_evaluation(
    layout: Layout,
    page: dict[str, Any],
    info: dict[str, Any],
    images: dict[str, Tensor] | None,
    found: Verification,
) -> dict[str, Any] | None:
    """:param images: What ``x_adv.pt`` holds. :return: ``evaluation.json``, when nothing is wrong with the bundle so far."""
    if not layout.evaluation.is_file():
        _without_evaluation(page, info, found)
        return None
    report: Any = _json(layout.evaluation, found)
    log = layout.log.read_text(encoding="utf-8", errors="replace") if layout.log.is_file() else None
    found.problems += statement_problems(report, page, info, images, log)
    found.checked.append("that the accuracies, radius, spread and log stated are those of evaluations of these weights")
    if not found.problems and any(r.record["weights_sha256"] != page["weights_sha256"] for r in stated_records(report)):
        said = "that the weights evaluated are those of the bundle but for wrappers and auxiliary heads, as bundle.json says"
        found.unchecked.append(f"{said} (their sum is another)")
    if images is None:
        found.unchecked.append("how the network classifies adversarial images (there are none to be scored)")
    return report if not found.problems else None


def _without_evaluation(page: dict[str, Any], info: dict[str, Any], found: Verification) -> None:
    """Say what is stated all the same: of corruptions there is no evidence that a bundle could hold."""
    names = [name for name in info if name in ("clean_acc", "autoattack_acc") or name.startswith("corruptions_")]
    stated = [name for name in names if info[name] is not None]
    if not stated:
        found.unchecked.append("accuracies: the bundle states none")
    elif page["threat_model"] == "corruptions":
        words = ", ".join(f"{name} {info[name]}" for name in stated)
        found.unchecked.append(f"accuracies: {words} are stated, without evidence (RobustBench measures them itself)")
    else:
        found.problems += [f"model_info states {name} without an evaluation" for name in stated]


def _check_code(layout: Layout, page: dict[str, Any], found: Verification) -> None:
    """Read the Python files; they are not run."""
    if layout.architecture.is_file() == (page["architecture"] == "robustbench"):
        found.problems.append("architecture.py is there though RobustBench has the class, or is missing")
    for path in (layout.entry, layout.architecture):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found.problems += [f"{path.name} {problem}" for problem in import_problems(text)]
    if layout.entry.is_file() and not _names_entry(
        layout.entry.read_text(encoding="utf-8", errors="replace"), page["name"]
    ):
        found.problems.append(f"model_zoo_entry.py has no ENTRY called {page['name']!r}")
    found.checked.append("that its Python files are Python and import what RobustBench depends on (they were not run)")


def _names_entry(text: str, name: str) -> bool:
    try:
        tree = parsed(text)
    except SyntaxError:
        return False
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    values = [
        node.value for node in assigned if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ENTRY"
    ]
    tuples = [value for value in values if isinstance(value, ast.Tuple) and len(value.elts) == 2]
    return any(isinstance(value.elts[0], ast.Constant) and value.elts[0].value == name for value in tuples)
