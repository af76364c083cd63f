"""Every example runs; those of the four methods differ in nothing but the method."""

from __future__ import annotations

import re
import runpy
import sys
from difflib import unified_diff
from pathlib import Path

import numpy as np
import pytest
from art.defences.trainer import AdversarialTrainerMadryPGD

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
    words = [str(script), "--data", str(few), "--epochs", "1", "--images", "6", "--eps", "26/255"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"^clean \d+\.\d%, AutoAttack \d+\.\d%$", capsys.readouterr().out, re.MULTILINE)


def test_arts_own_trainer_is_handed_pixels_in_0_to_1_where_the_data_are_bytes(tmp_path, monkeypatch):
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "bytes.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    handed = []
    monkeypatch.setattr(AdversarialTrainerMadryPGD, "fit", lambda _, x, y: handed.append(x))
    words = ["--data", str(tmp_path / "bytes.npz"), "--images", "1"]
    monkeypatch.setattr(sys, "argv", ["art_native_trainer_with_fsr.py", *words])
    runpy.run_path(str(EXAMPLES / "art_native_trainer_with_fsr.py"), run_name="__main__")
    assert np.array_equal(handed[0], x[:, None].astype(np.float32) / 255)


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
