"""The proof that a bundle is what it says, in a process that has seen nothing of this one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from art_saliency.errors import CheckpointError, MissingDependencyError

__all__ = ["TOLERANCE", "check_installed", "load_problems", "make_job", "prove"]

TOLERANCE = 1e-6
"""How far logits may be apart, in units of the largest one (at least 1): float32's own rounding is a tenth of it."""

_START = """
import json, sys
with open(sys.argv[1] + "/job.json", encoding="utf-8") as file:
    sys.path[:] = json.load(file)["path"]
from art_saliency.robustbench.fresh import main
main(sys.argv[1])
"""


def check_installed() -> None:
    """:raises MissingDependencyError: When RobustBench is not installed; it is not imported here."""
    if importlib.util.find_spec("robustbench") is None:
        raise MissingDependencyError("robustbench", "robustbench", "proving that RobustBench loads the bundle")


def make_job(folder: Path, page: dict[str, Any], benchmark: dict[str, Any] | None = None) -> dict[str, Any]:
    """:param folder: The bundle. :param page: Its ``bundle.json``. :return: What :func:`prove` takes."""
    names = ("name", "dataset", "threat_model", "num_classes", "input_shape")
    threads = torch.get_num_threads()
    return {"bundle": str(folder.resolve()), "threads": threads, "benchmark": benchmark, **{n: page[n] for n in names}}


def prove(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Let RobustBench load bundles, and benchmark them where that is asked for, in one fresh process. *Their code is run.*

    :param jobs: From :func:`make_job`.
    :return: One answer each, as :func:`art_saliency.robustbench.fresh.answer` describes it.
    :raises CheckpointError: When the process ended without an answer.
    """
    check_installed()
    with tempfile.TemporaryDirectory() as place:
        page = {"path": [str(Path(entry).resolve()) for entry in sys.path if entry], "parts": list(jobs)}
        Path(place, "job.json").write_text(json.dumps(page), encoding="utf-8")
        # -B: nothing is compiled into a bundle. Elsewhere, so that no file of the user's folder is found by its name.
        words = [sys.executable, "-B", "-c", _START, place]
        ended = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False, env=dict(os.environ))
        try:
            found: list[dict[str, Any]] = json.loads(Path(place, "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(
                f"RobustBench in a fresh process: ended with code {ended.returncode} ({last})"
            ) from error
    return found


def load_problems(answer: dict[str, Any]) -> list[str]:
    """:return: What an answer says against a bundle, its benchmark aside."""
    if "error" in answer:
        return [f"RobustBench's load_model does not load it: {answer['error']}"]
    found = [f"after loading, {violation}" for violation in answer["violations"]]
    if answer["training"]:
        found.append("RobustBench's load_model returns it in train mode")
    if not answer["difference"] <= TOLERANCE * answer["scale"]:  # NaN is far
        limit = TOLERANCE * answer["scale"]
        found.append(f"its logits are {answer['difference']:.3g} from the classifier's, expected {limit:.3g} at most")
    return found
