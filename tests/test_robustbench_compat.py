"""
The repair of robustbench 1.1.1 in fresh processes, against the installation as the registry ships it.

One process imports what is slow and is no part of the matter, then forks a child for each scenario: in each, RobustBench is
imported for the first time.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import art_saliency

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

SCENARIOS = '''
import importlib, importlib.machinery, json, os, sys, traceback
import torch, torchvision, timm, pandas, art_saliency
from torch import nn

def untouched():
    """Without the repair it cannot be imported; with it, it can, also after that failure."""
    before = dict(sys.modules), list(sys.meta_path)
    try:
        import robustbench
        failed = None
    except ModuleNotFoundError as error:
        failed = error.name
    from art_saliency.robustbench.compat import import_robustbench, seeded
    robustbench = import_robustbench()
    again = import_robustbench() is robustbench
    attack = robustbench.eval.AutoAttack
    with seeded(3):
        seed = robustbench.eval.AutoAttack(nn.Flatten(), norm="L2", eps=0.5, device="cpu").seed
    try:
        with seeded(3):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return {
        "failed": failed, "again": again, "seed": seed, "unseeded": attack(nn.Flatten(), device="cpu").seed,
        "restored": robustbench.eval.AutoAttack is attack, "bases": [c.__module__ for c in attack.__mro__][1],
        "left": [name for name in ("autoattack", "autoattack.state", "pkg_resources") if name in sys.modules],
        "finders": sys.meta_path == before[1], "children": hasattr(robustbench, "utils") and hasattr(robustbench, "data"),
        "state": robustbench.eval.EvaluationState.__module__,
    }

def benchmark():
    """Its benchmark, with a log and both shapes of AutoAttack's answer, on images that the test makes."""
    from art_saliency.robustbench.compat import import_robustbench, seeded
    robustbench = import_robustbench()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).eval()
    x = torch.rand(6, 3, 2, 2)
    y = model(x).argmax(1)
    from robustbench.model_zoo.enums import BenchmarkDataset
    robustbench.data._clean_dataset_loaders[BenchmarkDataset.cifar_10] = lambda n, folder, prepr: (x[:n], y[:n])
    with seeded(1):
        clean, robust = robustbench.benchmark(model, n_examples=6, eps=0.9, log_path="aa.log")
    attack = robustbench.eval.AutoAttack(model, eps=0.9, seed=1, version="custom", attacks_to_run=["apgd-ce"], device="cpu")
    pair = attack.run_standard_evaluation(x, y, bs=6, return_labels=True)
    return {"clean": clean, "robust": robust, "log": open("aa.log").read(), "pair": [list(part.shape) for part in pair]}

def authors():
    """Where the author's own autoattack is installed, it is used."""
    sys.path.insert(0, "authors")
    from art_saliency.robustbench.compat import import_robustbench, seeded
    robustbench = import_robustbench()
    with seeded(4):
        seed = robustbench.eval.AutoAttack("model").seed
    return {"origin": robustbench.eval.AutoAttack.__module__, "file": sys.modules["autoattack"].__file__, "seed": seed}

def fixed():
    """A release that can be imported gets nothing."""
    sys.path.insert(0, "fixed")
    from art_saliency.robustbench import compat
    made = []
    compat._fill_autoattack = compat._fill_state = compat._fill_pkg_resources = made.append
    robustbench = compat.import_robustbench()
    return {"file": robustbench.__file__, "made": made, "origin": robustbench.eval.AutoAttack.__module__}

def no_pkg_resources():
    """Beside a setuptools that has no pkg_resources any more."""
    find = importlib.machinery.PathFinder.find_spec
    hidden = lambda name, *rest: None if name.split(".")[0] == "pkg_resources" else find(name, *rest)
    importlib.machinery.PathFinder.find_spec = hidden
    sys.modules.pop("pkg_resources", None)
    from art_saliency.robustbench.compat import import_robustbench
    robustbench = import_robustbench()
    path = robustbench.loaders.pkg_resources.resource_filename("robustbench.loaders", "helper_files/imagenet_test_image_ids.txt")
    return {"left": "pkg_resources" in sys.modules, "found": os.path.isfile(path)}

def importing_art_saliency_does_nothing():
    from art_saliency import PGDATTrainer, export_robustbench, load_robustbench, verify_bundle
    from art_saliency.robustbench import compat
    ours = [finder for finder in sys.meta_path if isinstance(finder, compat._StandIns)]
    return {"finders": len(ours), "loaded": sorted({n.split(".")[0] for n in sys.modules} & {"robustbench", "autoattack"})}

results = {}
for scenario in (untouched, benchmark, authors, fixed, no_pkg_resources, importing_art_saliency_does_nothing):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            answer = scenario()
        except BaseException:
            answer = {"error": traceback.format_exc()[-1500:]}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        results[scenario.__name__] = json.loads(file.read())
    os.wait()
json.dump(results, open("results.json", "w"))
'''

AUTHORS = """
class AutoAttack:
    def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, version="standard", device="cuda", log_path=None):
        self.seed = seed
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("compat")
    theirs = place / "authors" / "autoattack"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text(AUTHORS)
    (theirs / "state.py").write_text("class EvaluationState: pass\n")
    installed = Path(metadata.distribution("robustbench").locate_file("robustbench"))
    shutil.copytree(installed, place / "fixed" / "robustbench", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (
        ("eval.py", "from autoattack", "from pyautoattack"),
        ("loaders.py", "import pkg_resources", "pkg_resources = None"),
    ):
        file = place / "fixed" / "robustbench" / name
        file.write_text(file.read_text().replace(old, new))
    path = os.pathsep.join([str(Path(art_saliency.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCENARIOS],
        cwd=place, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "results.json").read_text())
    assert not [answer["error"] for answer in found.values() if "error" in answer]
    return found


def is_the_registrys_own():
    """Whether every file of RobustBench is the one whose hash its wheel states."""
    distribution = metadata.distribution("robustbench")
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    for name, digest, _ in rows:
        if name.startswith("robustbench/") and digest.startswith("sha256="):
            content = Path(distribution.locate_file(name)).read_bytes()
            if base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode() != digest[7:]:
                return False
    return distribution.version == "1.1.1"


def test_the_installation_is_untouched_and_cannot_be_imported_without_the_repair(results):
    assert is_the_registrys_own()
    assert results["untouched"]["failed"] == "autoattack"


def test_with_the_repair_it_can_and_the_repair_leaves_no_trace(results):
    answer = results["untouched"]
    assert answer["left"] in ([], ["pkg_resources"])  # setuptools' own, where it has one
    assert answer["finders"]
    assert answer["children"]
    assert answer["again"]
    assert (answer["bases"], answer["state"]) == ("pyautoattack.autoattack", "pyautoattack.state")
    assert is_the_registrys_own()


def test_a_seed_is_given_and_taken_away(results):
    answer = results["untouched"]
    assert (answer["seed"], answer["unseeded"], answer["restored"]) == (3, None, True)


def test_robustbenchs_benchmark_runs_and_writes_its_log(results):
    answer = results["benchmark"]
    assert answer["clean"] == 1
    assert answer["robust"] < 1
    assert "initial accuracy: 100.00%" in answer["log"]
    assert "robust accuracy after APGD-CE" in answer["log"]
    assert answer["pair"] == [[6, 3, 2, 2], [6]]


def test_the_authors_own_package_wins(results):
    answer = results["authors"]
    assert answer["origin"] == "autoattack"
    assert answer["file"].endswith(os.path.join("authors", "autoattack", "__init__.py"))
    assert answer["seed"] == 4


def test_a_fixed_release_is_left_alone(results):
    answer = results["fixed"]
    assert os.path.join("fixed", "robustbench") in answer["file"]
    assert answer["made"] == []
    assert answer["origin"] == "pyautoattack.autoattack"


def test_a_setuptools_without_pkg_resources_is_made_up_for(results):
    assert results["no_pkg_resources"] == {"left": False, "found": True}


def test_importing_art_saliency_imports_and_repairs_nothing(results):
    assert results["importing_art_saliency_does_nothing"] == {"finders": 0, "loaded": []}
