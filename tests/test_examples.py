"""Every example runs; those of the four methods differ in nothing but the method."""

from __future__ import annotations

import re
import runpy
import sys
from difflib import unified_diff
from pathlib import Path

import pytest

from tests.helpers import write_few_digits

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "benchmark")  # which has tests of its own
METHODS = ("adv_gsct", "j_sigr", "aalp", "fsr")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """200 digits as a user's own data."""
    return write_few_digits(tmp_path_factory.mktemp("examples") / "few.npz", 200, 10)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_what_autoattack_found(script, few, monkeypatch, capsys):
    words = [str(script), "--data", str(few), "--epochs", "1", "--images", "6", "--eps", "0.1"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"^clean \d+\.\d%, AutoAttack \d+\.\d%$", capsys.readouterr().out, re.MULTILINE)


def test_the_methods_examples_are_identical_but_for_the_method():
    first = (EXAMPLES / "adv_gsct.py").read_text().splitlines()
    assert len(first) <= 60
    for name in METHODS[1:]:
        other = (EXAMPLES / f"{name}.py").read_text().splitlines()
        assert len(other) <= 60
        changed = [line for line in unified_diff(first, other, n=0, lineterm="") if re.match(r"[+-][^+-]", line)]
        assert all(re.search(r"Trainer|examples/|build_network|^[+-]\"\"\"", line) for line in changed), changed


def test_every_method_has_an_example():
    assert set(METHODS) <= {script.stem for script in SCRIPTS}
