"""
The whole way: bundles of every kind, loaded by RobustBench's own code in one fresh process, which also benchmarks one of them.

Networks are small and images are made here; what RobustBench does with them is RobustBench's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import io
import json
import marshal
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from art.defences.postprocessor import ReverseSigmoid
from art.defences.preprocessor import SpatialSmoothing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_saliency import autoattack, build_network, export_robustbench, insert_fsr, load_robustbench, verify_bundle
from art_saliency.cli import main
from art_saliency.errors import CheckpointError, InputError, MissingDependencyError, UnsupportedModelError
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.files import read_tensors, sha256_of_file, sha256_of_tensors
from art_saliency.modes import tensor_float32
from art_saliency.networks import own_logits
from art_saliency.robustbench import export
from art_saliency.robustbench.benchmark import compared
from art_saliency.robustbench.bundle import SUMS
from art_saliency.robustbench.fresh import _execute
from art_saliency.robustbench.proof import TOLERANCE, load_problems, make_job, prove
from art_saliency.trainers.runs import make_classifier, save
from art_saliency.training.records import History

SHAPE = (3, 32, 32)
EPS = 8 / 255
FACTS = {
    "paper_title": "Saliency",
    "paper_url": "https://arxiv.org/abs/2601.00001",
    "authors": "Jane Doe, John Roe",
    "venue": "arXiv, Jan 2026",
    "additional_data": False,
    "reported": 0.5,
    "license": "MIT",
    "code_url": "https://example.org/code",
    "checkpoint_url": "https://example.org/weights",
}
GOOD = {"taken": False, "training": False, "difference": 0.0, "scale": 1.0, "violations": [], "benchmark": None}

USERS = """
from torch import nn

def make():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.Tanh()), nn.Flatten(), nn.Linear(384, 10))
"""


CORRUPTED = {"threat_model": "corruptions"}

OF_288 = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 2, 16, 16), nn.Flatten(), nn.Linear(2 * 18 * 18, 1000))
"""
"""A network for images of 288 pixels a side alone."""


def made_by(code):
    names = {}
    exec(code, names)
    return names["make"]()


def network(name="small-cnn", shape=SHAPE, classes=10, **options):
    torch.manual_seed(0)
    model = build_network(name, num_classes=classes, input_shape=shape, **{"width": 4, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def with_fsr(model, target, shape=SHAPE, classes=10):
    return insert_fsr(model, target, classes, torch.rand(2, *shape), hidden=4)


def classifier(model, **options):
    settings = {"clip_values": (0.0, 1.0), "device_type": "cpu", **options}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, 10, **settings)


@pytest.fixture(scope="module")
def images():
    """12 coarse images, and the labels that the small network gives them, three of them changed."""
    noise = torch.Generator().manual_seed(1)
    coarse = torch.rand(12, 3, 4, 4, generator=noise)
    x = (nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255).round() / 255
    y = sharp(network())(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    return x, y


def sharp(model):
    """Untrained, a network says the same of every image: without its mean over many images it does not."""
    with torch.no_grad():
        many = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        logits = model(nn.functional.interpolate(many, size=32, mode="bilinear"))
        model.linear.bias -= logits.mean(0)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("robustbench")


@pytest.fixture(scope="module")
def results(images):
    """AutoAttack's standard version, as RobustBench would run it with seed 5."""
    return [autoattack(sharp(network()), *images, eps=EPS, batch_size=32, seed=5, progress=False)]


@pytest.fixture(scope="module")
def models(place):
    """By name: a model, and the arguments of its export."""
    (place / "users.py").write_text(USERS)
    (place / "of_288.py").write_text(OF_288)
    torch.manual_seed(0)
    users, made_for_288 = (made_by(code) for code in (USERS, OF_288))
    standardised = {"clip_values": (0, 255), "preprocessing": ((120.0, 110.0, 100.0), (50.0, 60.0, 70.0))}
    source = f"{place / 'users.py'}:make"
    silu = network("preactresnet18", classes=100, activation="silu")
    large = network("small-cnn", (3, 224, 224), 1000, width=2, mean=(0.5, 0.4, 0.3))
    return {
        "Doe2026Fsr": (with_fsr(network("resnet18"), "layer4"), {}),
        "Doe2026Art": (classifier(network("resnet18", mean=(0.4, 0.5, 0.6)), **standardised), {}),
        "Doe2026Wrn": (classifier(network("wrn-28-10", width=1), preprocessing=(0.5, 0.25)), {"threat_model": "L2"}),
        "Doe2026Theirs_R18": (network("resnet18", width=64), {}),
        "Doe2026Users": (classifier(with_fsr(users, "0"), preprocessing=(0.5, 0.25)), {"source": source}),
        "Doe2026Silu": (with_fsr(silu, "layer3", classes=100), {"dataset": "cifar100"}),
        "Doe2026Large": (
            with_fsr(large, "layer2", (3, 224, 224), 1000),
            {"dataset": "imagenet", "preprocessing": "Res256Crop224", "eps": 4 / 255},
        ),
        "Doe2026Larger": (
            made_for_288,
            {"dataset": "imagenet", "preprocessing": "Crop288", "source": f"{place / 'of_288.py'}:make"},
        ),
        "Doe2026Corrupted": (network(), {"threat_model": "corruptions"}),
    }


@pytest.fixture(scope="module")
def proven(place, images, results, models):
    """All bundles, written here and proven together in one fresh process, and its answers."""
    arrays = place / "images.npz"
    x, y = ((part * 255).round().byte() if part.ndim == 4 else part for part in images)
    np.savez(arrays, x_train=x.numpy(), y_train=np.arange(12) % 3, x_test=x.numpy(), y_test=y.numpy())
    jobs = {}
    with pytest.MonkeyPatch.context() as patched:

        def later(parts):
            jobs[parts[0]["name"]] = parts[0]
            return [GOOD]

        patched.setattr(export, "prove", later)
        facts = {**FACTS, "evaluation": results}
        export_robustbench(sharp(network()), "Doe2026Saliency", out=place / "Doe2026Saliency", **facts)
        for name, (model, options) in models.items():
            export_robustbench(model, name, out=place / name, **options)
    ours = {"count": 12, "eps": EPS, "seed": 5, "batch_size": 32, "device": "cpu", "preprocessing": None}
    jobs["Doe2026Saliency"]["benchmark"] = {**ours, "data_dir": str(place), "images": str(arrays)}
    for name, job in jobs.items():
        job["bundle"] = str(place / name)
    asked_for = {**jobs["Doe2026Saliency"]["benchmark"], "count": 13}
    jobs["one image too many"] = {**jobs["Doe2026Saliency"], "benchmark": asked_for}
    return dict(zip(jobs, prove(list(jobs.values())), strict=True))


def page_of(folder, kind="model_info"):
    (path,) = folder.glob("model_info/*/*/*.json") if kind == "model_info" else [folder / kind]
    return json.loads(path.read_text())


def weights_of(folder):
    (path,) = folder.glob("models/*/*/*.pt")
    return path


# ---- RobustBench's own code ----------------------------------------------------------------------------------------

NAMES = [
    "Doe2026Saliency",
    "Doe2026Fsr",
    "Doe2026Art",
    "Doe2026Wrn",
    "Doe2026Theirs_R18",
    "Doe2026Users",
    "Doe2026Silu",
]
NAMES += ["Doe2026Large", "Doe2026Larger", "Doe2026Corrupted"]


@pytest.mark.parametrize("name", NAMES)
def test_robustbench_loads_it_without_an_edit_and_its_logits_are_the_classifiers(proven, place, models, name):
    answer = proven[name]
    assert load_problems(answer) == []
    assert answer["difference"] <= TOLERANCE * answer["scale"]
    assert answer["taken"] is False
    # By the same operations in the same order: AutoAttack then finds the same images. Baking in a scale rounds otherwise.
    assert answer["difference"] == 0 or name == "Doe2026Art"
    reference = read_tensors(place / name / "reference.pt")
    if name in models:  # what it was compared with is what the user's own classifier says
        assert torch.equal(reference["logits"], own_logits(models[name][0], reference["x"]))
    assert float(reference["logits"].std(0).max()) > 1e-3  # images are told apart


def test_robustbenchs_benchmark_returns_exactly_the_stated_number(proven, place, results):
    answer, (result,) = proven["Doe2026Saliency"]["benchmark"], results
    assert result.standard
    assert answer["clean"] == round(12 * result.clean_accuracy) == 9
    assert answer["robust"] == int(result.correct.sum()) < 9
    assert answer["data_sha256"] == result.data_sha256
    assert answer["rescored"] == answer["robust"]
    assert answer["distance"] <= EPS + 1e-6
    info = page_of(place / "Doe2026Saliency")
    assert float(info["autoattack_acc"]) == round(100 * answer["robust"] / 12, 2)
    assert info["clean_acc"] == "75.00"


def test_a_benchmark_that_fails_is_not_taken_for_a_bundle_that_cannot_be_loaded(proven):
    answer = proven["one image too many"]
    assert load_problems(answer) == []
    assert answer["benchmark"] is None
    assert "holds 12 test images, expected 13" in answer["benchmark_error"]


def test_robustbenchs_class_is_used_where_it_has_one(proven, place):
    kinds = {name: page_of(place / name, "bundle.json")["architecture"] for name in NAMES}
    own = dict.fromkeys(NAMES, "own")
    theirs = {"Doe2026Wrn": "robustbench", "Doe2026Theirs_R18": "robustbench"}
    assert kinds == own | theirs | {"Doe2026Users": "user", "Doe2026Larger": "user"}
    assert not (place / "Doe2026Wrn" / "architecture.py").exists()
    assert "class Doe2026WrnNet(WideResNet)" in (place / "Doe2026Wrn" / "model_zoo_entry.py").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_bundle_is_good_as_far_as_it_can_be_checked_without_running_it(proven, place, name):
    found = verify_bundle(place / name)
    assert found.problems == []
    assert sum("add --trust" in line for line in found.unchecked) == 2
    plain = torch.load(weights_of(place / name), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in plain.values())
    assert not any("module." in key or "model." in key or "auxiliary" in key for key in plain)


def test_accuracies_without_an_evaluation_stay_null(proven, place):
    info = page_of(place / "Doe2026Fsr")
    assert info["clean_acc"] is info["autoattack_acc"] is info["link"] is info["reported"] is None
    assert (info["eps"], info["dataset"], info["architecture"]) == ("8/255", "cifar10", "ResNet-18 (width 4) + FSR")
    assert page_of(place / "Doe2026Corrupted")["eps"] is None
    assert page_of(place / "Doe2026Wrn")["eps"] == "0.5"
    assert not (place / "Doe2026Fsr" / "evaluation.json").exists()
    lacking = ["paper_url", "paper_title", "authors", "additional_data", "venue", "evaluation", "reported"]
    lacking += ["code_url", "license", "checkpoint_url", "gdrive_id"]
    assert verify_bundle(place / "Doe2026Fsr").unfilled == lacking
    assert verify_bundle(place / "Doe2026Corrupted").unfilled == [
        "corruptions" if name == "evaluation" else name for name in lacking
    ]
    stated = page_of(place / "Doe2026Saliency")
    assert "12 of 10000 test images (95 % interval" in stated["footnote"]
    assert verify_bundle(place / "Doe2026Saliency").unfilled == ["gdrive_id"]


# ---- the commands, with nothing patched ----------------------------------------------------------------------------


def test_the_commands_go_all_the_way(place, images, results, proven, capsys, monkeypatch):
    model, run, out = sharp(network()), place / "run", place / "by-command"
    spec = {"name": "small-cnn", "num_classes": 10, "input_shape": list(SHAPE), "width": 4}
    made = make_classifier(model, input_shape=SHAPE, num_classes=10)
    save(run, made, network=spec, method="pgd-at", settings={"eps": EPS}, data={}, history=History())
    # As a network that torch.compile was given to would have been saved.
    compiled = {f"_orig_mod.{key}": value for key, value in read_tensors(run / "weights.pt").items()}
    torch.save(compiled, run / "weights.pt")
    edited(run / "run.json", weights_sha256=sha256_of_tensors(compiled))
    (run / "evaluation.json").write_text(json.dumps({"data": "made", "autoattack_details": results[0].to_json()}))
    words = ["export", str(run), "--name", "Doe2026Command", "--out", str(out), "--dataset", "cifar10"]
    words += ["--threat-model", "Linf", "--paper-url", "https://arxiv.org/abs/2601.00001", "--authors", "Jane Doe"]
    assert main([*words, "--reported", "52.5"]) == 0
    told = capsys.readouterr().out
    assert "RobustBench's load_model loads it, with the same logits" in told
    missing = (
        "till to be filled in, by exporting again with --force: --paper-title, --additional-data, --venue, --code-url, "
    )
    missing += "--license, --checkpoint-url, --gdrive-id\n"
    assert missing in told
    assert missing in (out / "SUBMISSION.md").read_text()
    assert set(read_tensors(weights_of(out))) == set(model.state_dict())
    info = page_of(out)
    assert (info["authors"], info["reported"], info["clean_acc"]) == ("Jane Doe", "52.50", "75.00")
    assert main(["verify", str(out)]) == 0
    told = capsys.readouterr().out
    assert "good, as far as it was checked" in told
    assert missing in told
    assert told.count("not checked:") == 3
    assert "there are none to be scored" in told  # the run's evaluation kept no adversarial images
    assert main(words) == 2
    assert "add --force" in capsys.readouterr().err
    (out / "model_info" / "cifar10" / "Linf" / "Doe2026Command.json").write_text(json.dumps({**info, "eps": 0.03}))
    assert main(["verify", str(out), "--trust", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert any("its sum differs" in problem for problem in found["problems"])
    assert any("has 'eps': 0.03" in problem for problem in found["problems"])
    assert any("first solve what is wrong" in line for line in found["unchecked"])


@pytest.mark.parametrize("percent", ["150", "-1", "nan"])
def test_what_the_paper_reports_is_in_percent_on_the_command_line(percent, tmp_path, capsys):
    assert main(["export", str(tmp_path), "--name", "Doe2026X", "--reported", percent]) == 2
    told = capsys.readouterr().err
    assert f"--reported: got {percent}, expected " in told
    assert told.endswith("0 <= --reported <= 100\n")


@pytest.fixture
def run_of(tmp_path, results, answered):
    """Make a run whose evaluation is for some threat model, and export it without the proof."""
    answered()
    made = make_classifier(sharp(network()), input_shape=SHAPE, num_classes=10)
    spec = {"name": "small-cnn", "num_classes": 10, "input_shape": list(SHAPE), "width": 4}
    save(tmp_path / "run", made, network=spec, method="pgd-at", settings={}, data={}, history=History())

    def exported(*words, **changes):
        page = {"autoattack_details": {**results[0].to_json(), **changes}}
        (tmp_path / "run" / "evaluation.json").write_text(json.dumps(page))
        command = ["export", str(tmp_path / "run"), "--name", "Doe2026X", "--out", str(tmp_path / "b"), *words]
        return page_of(tmp_path / "b") if main(command) == 0 else None

    return exported


def test_a_runs_own_evaluation_is_taken_when_it_fits(run_of, capsys):
    assert run_of()["clean_acc"] == "75.00"
    assert "accuracies stay null" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "changes", "says"),
    [
        (["--threat-model", "corruptions"], {}, ""),
        (["--no-evaluation"], {}, ""),
        (["--threat-model", "L2"], {}, "is for Linf eps 8/255, not L2 eps 0.5: accuracies stay null"),
        (["--eps", "4/255"], {}, "--norm Linf --eps 4/255)"),
        ([], {"eps": 4 / 255}, "is for Linf eps 4/255, not Linf eps 8/255"),
    ],
)
def test_a_runs_own_evaluation_of_something_else_is_left_out_and_that_is_said(run_of, capsys, words, changes, says):
    assert run_of(*words, **changes)["clean_acc"] is None
    told = capsys.readouterr().err
    assert says in told
    assert ("accuracies stay null" in told) == bool(says)


@pytest.mark.parametrize("interval", [None, [1], [0.9, 1.0]])
def test_the_interval_that_is_stated_is_that_of_the_count(run_of, results, interval):
    low, high = (f"{100 * end:.2f}" for end in results[0].interval)
    footnote = run_of(interval=interval)["footnote"]
    assert footnote == f"AutoAttack on 12 of 10000 test images (95 % interval {low} to {high})."


def test_what_is_known_later_is_exported_again_and_no_sealed_file_is_edited(run_of, tmp_path):
    words = [
        "--threat-model",
        "corruptions",
        "--corruptions",
        "clean_acc=93.1",
        "--corruptions",
        "corruptions_acc=85.25",
    ]
    assert run_of("--threat-model", "corruptions")["corruptions_acc"] is None
    bundle = tmp_path / "b"
    entry, before = (bundle / "model_zoo_entry.py").read_text(), weights_of(bundle).read_bytes()
    assert '"gdrive_id": None' in entry
    for text in (entry, (bundle / "SUBMISSION.md").read_text()):
        assert "export again with --gdrive-id and --force" in text
    info = run_of(*words, "--gdrive-id", "1aB_c-9", "--force")
    assert (info["clean_acc"], info["corruptions_acc"]) == ("93.10", "85.25")
    entry = (bundle / "model_zoo_entry.py").read_text()
    assert '"gdrive_id": "1aB_c-9"' in entry
    assert all("--gdrive-id" not in text for text in (entry, (bundle / "SUBMISSION.md").read_text()))
    assert weights_of(bundle).read_bytes() == before
    found = verify_bundle(bundle)
    assert found.problems == []
    stated = "accuracies: clean_acc 93.10, corruptions_acc 85.25 are stated, without evidence"
    assert any(line.startswith(stated) for line in found.unchecked)
    assert not {"clean_acc", "corruptions_acc"} & set(found.unfilled)


def test_an_evaluation_that_was_asked_for_must_fit(run_of, tmp_path, capsys):
    own = str(tmp_path / "run" / "evaluation.json")
    assert run_of("--threat-model", "L2", "--evaluation", own) is None
    assert "is for Linf eps 0.0313725, not L2 eps 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_of("--no-evaluation", "--evaluation", own)


def test_questions_are_asked_on_a_terminal_only(monkeypatch):
    from art_saliency.cli import export as command

    asked = dict.fromkeys(command._QUESTIONS) | {"authors": "Jane"}
    assert command._asked(asked, quiet=False) == asked  # no terminal here
    answers = io.StringIO("A title\narxiv\nhttps://arxiv.org/abs/XXXX.XXXXX\n\nICML 2026\nyes\n\n\n")
    answers.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    found = command._asked(asked, quiet=False)
    assert found["paper_title"] == "A title"
    assert (found["paper_url"], found["license"]) == (None, None)
    assert (found["venue"], found["authors"], found["additional_data"]) == ("ICML 2026", "Jane", "yes")
    assert command._asked(asked, quiet=True) == asked


@pytest.mark.parametrize(
    ("said", "taken", "asked"),
    [
        ("Y\n", "yes", 1),
        ("YES\n", "yes", 1),
        ("n\n", "no", 1),
        ("Yes, 1M synthetic images\ntrue\nNo\nyes\n", "no", 3),
        ("maybe\n\n", None, 2),
        ("maybe", None, 2),  # and then nothing more: the end of the input
    ],
)
def test_a_question_for_yes_or_no_is_asked_until_it_is_answered(monkeypatch, capsys, said, taken, asked):
    from art_saliency.cli import export as command

    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert command._answer("Data?", command._ANSWERS["additional_data"]) == taken
    told = capsys.readouterr().err
    assert (told.count("Data? [leave open]: "), told.count("expected yes or no")) == (asked, asked - 1)


# ---- what is compared when RobustBench has spoken ---------------------------------------------------------------------


@pytest.fixture
def answered(monkeypatch):
    """Let a chosen answer stand for the fresh process."""

    asked = []

    def give(**changes):
        from art_saliency.robustbench import verify

        def answer(jobs):
            asked.extend(jobs)
            return [{**GOOD, **changes} for _ in jobs]

        for module in (verify, export):
            monkeypatch.setattr(module, "prove", answer)
        return asked

    return give


def seen(result, **changes):
    counts = {"clean": 9, "robust": int(result.correct.sum()), "count": 12, "data_sha256": result.data_sha256}
    return {**counts, "distance": EPS, "rescored": int(result.correct.sum()), **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"clean": 8}, "RobustBench counts 8 of 12 clean images as correct, expected 9"),
        ({"robust": 9}, "images robust, expected"),
        ({"data_sha256": "0"}, "these are not the images and labels of the evaluation"),
        ({"rescored": 11}, "x_adv.pt: 11 of its images are classified correctly"),
        ({"distance": 0.1}, "x_adv.pt: images are up to 0.1 from the clean ones"),
    ],
)
def test_the_benchmarks_number_is_compared_exactly(proven, place, results, answered, changes, says):
    asked = answered(benchmark=seen(results[0], **changes))
    found = verify_bundle(place / "Doe2026Saliency", trust=True, benchmark=True, images=place / "images.npz")
    assert found.benchmark["exact"]
    wanted = asked[-1]["benchmark"]
    assert (wanted["seed"], wanted["batch_size"], wanted["count"], wanted["eps"]) == (5, 32, 12, EPS)
    assert asked[-1]["threads"] == results[0].threads
    assert (found.problems == []) == (says is None)
    assert says is None or any(says in problem for problem in found.problems), found.problems


def test_a_benchmark_that_fails_is_said_to_have_failed(proven, place, answered):
    answered(benchmark_error="OSError: no network")
    found = verify_bundle(place / "Doe2026Saliency", trust=True, benchmark=True)
    assert found.problems == ["RobustBench's benchmark failed: OSError: no network"]
    assert found.benchmark is None


def test_images_that_cannot_be_used_are_not_the_bundles_fault(proven, place, answered, tmp_path, capsys):
    asked = answered()
    x, y = np.zeros((12, 3, 16, 16), dtype=np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    for name, says in (
        ("none.npz", "which does not exist"),
        ("small.npz", "holds images of the shape (3, 16, 16), expected (3, 32, 32)"),
        ("few.npz", "holds 3 test images, expected 12"),
    ):
        words = ["verify", str(place / "Doe2026Saliency"), "--trust", "--benchmark", "--images", str(tmp_path / name)]
        assert main(words) == 2
        assert says in capsys.readouterr().err
    assert asked == []


def test_options_that_verify_would_not_look_at_are_refused(proven, place, capsys):
    bundle = str(place / "Doe2026Saliency")
    for option in ("--images", "--device", "--data-dir"):
        assert main(["verify", bundle, "--trust", option, "cpu"]) == 2
        assert f"{option}: got 'cpu', expected no such option without --benchmark" in capsys.readouterr().err
    for words, got in ((["--seed", "7"], "--seed: got 7"), (["--force"], "--force: got it")):
        assert main(["verify", bundle, "--trust", "--benchmark", *words]) == 2
        assert f"{got}, expected no such option here" in capsys.readouterr().err
    assert main(["verify", bundle, "--benchmark"]) == 2
    told = capsys.readouterr().err
    assert "add --trust" in told
    assert "takes as long" not in told


def test_with_another_batch_size_it_is_compared_with_the_interval_of_the_count(proven, results, answered, tmp_path):
    answered()
    stated = dataclasses.replace(results[0], batch_size=250, x_adv=None, robust_accuracy=0.5)
    none = dataclasses.replace(stated, seed=6, robust_accuracy=0.0)  # which would let anything below pass
    out = export_robustbench(sharp(network()), "Doe2026Spread", out=tmp_path / "b", evaluation=[stated, none])
    for robust, good in ((0, False), (6, True)):
        answered(benchmark=seen(results[0], robust=robust, rescored=6))
        found = verify_bundle(out, trust=True, benchmark=True)
        assert found.ok == good, found.problems
        assert found.benchmark["allowed"] == list(binomial_interval(6, 12))


def compared_over(robust, stated, count=10_000, *, batch_size=250, devices=("cpu (AVX2)", "cpu"), **seen):
    """What RobustBench's number has against it beside the stated ones, one a seed."""
    record = {
        "clean_accuracy": 0.8,
        "batch_size": batch_size,
        "data_sha256": "d",
        "eps": EPS,
        "seed": 0,
        "device": devices[0],
    }
    first, *others = ({**record, "robust_accuracy": value} for value in stated)
    answer = {"count": count, "robust": robust, "clean": round(0.8 * count), "data_sha256": "d", **seen}
    return compared(answer, {"stated": first, "others": others}, devices[1])


@pytest.mark.parametrize("devices", [("cpu (AVX2)", "cuda"), ("cuda (H100)", "cpu"), ("cuda (H100)", "cuda:0")])
def test_a_gpu_draws_other_numbers_and_turns_a_few_images(devices):
    few = {"clean": 802, "rescored": 531}
    assert compared_over(535, (0.528,), 1000, batch_size=32)[1] == [
        "benchmark: RobustBench finds 535 of 1000 images robust, expected 528 exactly"
    ]
    found, wrong = compared_over(535, (0.528,), 1000, batch_size=32, devices=devices, **few)
    assert wrong == []
    assert not found["exact"]
    assert len(compared_over(528, (0.528,), 1000, batch_size=32, **few)[1]) == 2
    assert len(compared_over(600, (0.528,), 1000, batch_size=32, devices=devices, clean=810, rescored=535)[1]) == 3


def test_what_a_classifier_itself_says_is_asked_in_full_float32(proven, tmp_path, monkeypatch):
    asked = []

    def heard(*given):
        asked.append(torch.backends.cuda.matmul.fp32_precision == "ieee" and not tensor_float32())
        return own_logits(*given)

    monkeypatch.setattr(export, "own_logits", heard)
    export_robustbench(network(), "Doe2026X", out=tmp_path / "b")
    assert asked == [True]


@pytest.mark.parametrize(
    ("stated", "good", "bad"),
    [
        ((0.5250, 0.5253), (5254, 5245, 5275), (5200, 5300)),
        ((0.5250, 0.5250, 0.5250), (5247, 5250, 5253), (5246, 5254)),  # three images, where seeds agree
        ((0.5250,), (5155, 5345), (5150, 5350)),
    ],
)
def test_a_fresh_draw_may_lie_outside_the_seeds_that_were_tried(stated, good, bad):
    for robust in (*good, *bad):
        assert (compared_over(robust, stated)[1] == []) == (robust in good), robust


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_honest_number_is_rarely_convicted(seeds):
    """Draws of one distribution: in 95 % of cases, and the few images, the last agrees with the others."""
    torch.manual_seed(0)
    draws = (5000 + 20 * torch.randn(1000, seeds + 1)).round()
    wrong = sum(bool(compared_over(int(last), [v / 10_000 for v in rest])[1]) for *rest, last in draws.tolist())
    assert wrong < 65


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"difference": 1e-5}, "logits are 1e-05 from the classifier's, expected 1e-06 at most"),
        ({"difference": float("nan")}, "logits are nan from"),
        ({"training": True}, "in train mode"),
        ({"violations": ["the network is odd"]}, "after loading, the network is odd"),
        ({"error": "RuntimeError: no"}, "load_model does not load it: RuntimeError: no"),
    ],
)
def test_what_the_fresh_process_says_against_it_counts(proven, place, answered, tmp_path, changes, says):
    answered(**changes)
    found = verify_bundle(place / "Doe2026Fsr", trust=True)
    assert [says in problem for problem in found.problems] == [True]
    with pytest.raises(UnsupportedModelError) as caught:
        export_robustbench(network(), "Doe2026X", out=tmp_path / "b")
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_where_robustbenchs_class_says_something_else_the_networks_own_code_goes_along(tmp_path, monkeypatch):
    kinds = []

    def differs_first(jobs):
        kinds.append(page_of(tmp_path / os.listdir(tmp_path)[0], "bundle.json")["architecture"])
        return [{**GOOD, "difference": 1.0 if kinds == ["robustbench"] else 0.0}]

    monkeypatch.setattr(export, "prove", differs_first)
    out = export_robustbench(network("wrn-28-10", width=1), "Doe2026Wrn", out=tmp_path / "b")
    assert kinds == ["robustbench", "own"]
    assert (out / "architecture.py").exists()
    assert verify_bundle(out).problems == []


def test_without_robustbench_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    from art_saliency.robustbench import proof

    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"art-saliency\[robustbench\]"):
        export_robustbench(network(), "Doe2026X", out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_robustbench_has_is_refused(tmp_path, answered):
    answered(taken=True)
    with pytest.raises(InputError, match="which RobustBench has already"):
        export_robustbench(network(), "Wong2020Fast", out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_robustbench(network(), "Doe2026X", out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def with_a_sparse_buffer():
    model = network()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    return model


@pytest.mark.parametrize(
    ("model", "name", "options", "says"),
    [
        (network, "doe", {}, "name: got 'doe', expected an author, a year"),
        (network, "Doe2026X/../../x", {}, "name: got"),
        (network, "Doe202\u0666X", {}, "name: got"),  # an Arabic six
        (
            network,
            "Standard2026Model",
            {"dataset": "imagenet", "preprocessing": "Res224"},
            "name: got 'Standard2026Model'",
        ),
        (network, "Kireev2021Effectiveness_X", {}, "name: got"),
        (network, "Doe2026X", {"dataset": "svhn"}, "dataset: got 'svhn'"),
        (network, "Doe2026X", {"threat_model": "L1"}, "threat_model: got 'L1'"),
        (network, "Doe2026X", {"eps": 8}, "eps: got 8"),
        (network, "Doe2026X", {"eps": 0}, "eps: got 0"),
        (network, "Doe2026X", {"threat_model": "corruptions", "eps": 0.1}, "eps: got 0.1, expected None"),
        (network, "Doe2026X", {"dataset": "imagenet"}, "preprocessing: got None, expected one of 'Res256Crop224'"),
        (network, "Doe2026X", {"preprocessing": "Res224"}, "preprocessing: got 'Res224', expected None"),
        (network, "Doe2026X", {"paper_url": "arxiv"}, "paper_url: got 'arxiv', expected a web address"),
        (network, "Doe2026X", {"paper_url": "https://arxiv.org/abs/..."}, "paper_url: got 'https://arxiv.org/abs/...'"),
        (network, "Doe2026X", {"code_url": "https://github.com/<user>/x"}, "code_url: got 'https://github.com/<user>"),
        (network, "Doe2026X", {"checkpoint_url": "TODO"}, "checkpoint_url: got 'TODO', expected a web address"),
        (network, "Doe2026X", {"authors": "..."}, "has 'authors': '...', expected text"),
        (network, "Doe2026X", {"reported": 52.5}, "reported: got 52.5"),
        (network, "Doe2026X", {"additional_data": "no"}, "has 'additional_data': 'no'"),
        (network, "Doe2026X", {"source": "net.py"}, "source: got 'net.py'"),
        (network, "Doe2026X", {"threat_model": "corruptions", "evaluation": "e.json"}, "evaluation: got one"),
        (lambda: network().double(), "Doe2026X", {}, "it holds torch.float64, and RobustBench feeds float32"),
        (network, "Doe2026X", {"gdrive_id": "https://drive.google.com/file/d/1a/view"}, "gdrive_id: got 'https"),
        (network, "Doe2026X", {"corruptions": {"clean_acc": 0.9}}, "corruptions: got results, expected None for Linf"),
        (
            network,
            "Doe2026X",
            {**CORRUPTED, "corruptions": {"corruptions_acc": 85}},
            "corruptions_acc: got 85, expected",
        ),
        (
            network,
            "Doe2026X",
            {**CORRUPTED, "corruptions": {"corruptions_mce": 1}},
            "corruptions: got 'corruptions_mce'",
        ),
        (with_a_sparse_buffer, "Doe2026X", {}, "tensors: got 'adjacency', a tensor of torch.sparse_coo"),
        (lambda: network(classes=9), "Doe2026X", {}, "expected logits of shape (6, 10)"),
        (lambda: nn.Sequential(network(), nn.Softmax(1)), "Doe2026X", {}, "puts out probabilities"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "Doe2026X", {}, "--source network.py:factory"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, answered, model, name, options, says):
    answered()
    with pytest.raises((InputError, UnsupportedModelError)) as caught:
        export_robustbench(model(), name, out=tmp_path / "b", **options)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_working_directory_is_no_place_for_a_bundle(tmp_path, monkeypatch, answered, out):
    answered()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="the working directory or a folder above it"):
        export_robustbench(network(), "Doe2026X", out=out)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_everything_that_is_wrong_in_and_around_a_network_is_said_at_once(tmp_path, answered):
    answered()
    backbone = network()
    backbone.add_module("head_module", nn.Linear(2, 2))
    model = nn.Sequential(backbone, nn.Dropout(0.0), nn.Softmax(1))
    defended = classifier(
        model,
        preprocessing_defences=SpatialSmoothing(channels_first=True),
        postprocessing_defences=ReverseSigmoid(),
    )
    with pytest.raises(UnsupportedModelError) as caught:
        export_robustbench(defended, "Doe2026X", out=tmp_path / "b")
    lines = str(caught.value).splitlines()
    assert "for 5 reason(s)" in lines[0]
    for place in ("SpatialSmoothing", "ReverseSigmoid", "0.head_module.weight", "0.head_module.bias", "2 puts out"):
        assert sum(f"- {place}" in line for line in lines) == 1
    assert list(tmp_path.iterdir()) == []


# ---- strangers' bundles -------------------------------------------------------------------------------------------------


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def sums_again(folder):
    """What an attacker does: the sums fit again."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256_of_file(folder / file)}  {file}\n" for file in files))


@pytest.fixture
def copied(proven, place, tmp_path):
    return shutil.copytree(place / "Doe2026Saliency", tmp_path / "b")


@pytest.mark.parametrize("target", ["weights", "x_adv.pt", "reference.pt"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trust", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_nothing_of_it_runs(copied, tmp_path, target, legacy, trust):
    marker, path = tmp_path / "ran", weights_of(copied) if target == "weights" else copied / target
    content = {**torch.load(path, weights_only=True), "more": Evil(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    sums_again(copied)
    found = verify_bundle(copied, trust=trust)
    assert any("holds more than tensors" in problem for problem in found.problems)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it was a real one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_in_place_of_a_checkpoint_is_refused(copied, tmp_path):
    weights_of(copied).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    sums_again(copied)
    assert not verify_bundle(copied, trust=True).ok
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["architecture.py", "model_zoo_entry.py"])
def test_a_bundles_code_does_not_run_without_trust(copied, tmp_path, file):
    marker = tmp_path / "ran"
    text = (
        (copied / file)
        .read_text()
        .replace("from __future__ import annotations", "from __future__ import annotations\n", 1)
    )
    (copied / file).write_text(f"{text}\n__import__('os').system('touch {marker}')\n")
    sums_again(copied)
    found = verify_bundle(copied)
    assert found.ok
    assert any("RobustBench loads it" in line and "--trust" in line for line in found.unchecked)
    assert not marker.exists()
    with pytest.raises(InputError, match="--trust"):
        verify_bundle(copied, benchmark=True)
    assert not marker.exists()


def test_with_trust_it_runs_and_is_loaded_by_robustbench(copied, tmp_path, capsys):
    """The same harmless line as above, and this time its marker is there: nothing is patched."""
    marker = tmp_path / "ran"
    with (copied / "architecture.py").open("a") as file:
        file.write(f"\n__import__('os').system('touch {marker}')\n")
    sums_again(copied)
    assert main(["verify", str(copied), "--trust"]) == 0
    told = capsys.readouterr().out
    assert (
        "checked: that RobustBench's load_model loads it and gets the same logits from it, in a fresh process" in told
    )
    assert "(add --benchmark)" in told
    assert marker.exists()
    assert verify_bundle(copied).problems == []  # nothing was written into it


def test_bytecode_beside_a_file_is_refused_and_never_run_in_its_place(copied, tmp_path):
    """Python itself would take it without a look at the file: it claims to need no check."""
    marker, path = tmp_path / "ran", copied / "architecture.py"
    code = compile(f"__import__('pathlib').Path({str(marker)!r}).touch()", str(path), "exec")
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(path.read_bytes())
    cache = Path(importlib.util.cache_from_source(str(path)))
    cache.parent.mkdir()
    cache.write_bytes(header + marshal.dumps(code))
    sums_again(copied)
    found = verify_bundle(copied, trust=True)
    assert f"__pycache__/{cache.name} is no part of a bundle" in found.problems
    assert any("first solve what is wrong" in line for line in found.unchecked)
    module = _execute(path, "architecture_beside_bytecode")
    assert not marker.exists()
    factory = vars(module)["doe2026saliency"]
    assert inspect.getsource(factory).startswith("def doe2026saliency()")
    spec = importlib.util.spec_from_file_location("again", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert marker.exists()  # it was a real one


def truncated(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flipped(path):
    """One bit of a tensor, where torch.load would not notice."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda item: item.file_size)
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(bytes(content))


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replaced(path, make):
    """Put something else in a file's place."""
    path.unlink()
    make(path)


def stated_otherwise(bundle, **changes):
    path = bundle / "evaluation.json"
    edited(path, stated={**json.loads(path.read_text())["stated"], **changes})


def noted(bundle, footnote):
    (path,) = bundle.glob("model_info/*/*/*.json")
    edited(path, footnote=footnote)


def seconded(bundle, spread, **changes):
    """Add a second evaluation, and a spread."""
    path = bundle / "evaluation.json"
    edited(path, others=[{**json.loads(path.read_text())["stated"], **changes}], over_seeds=spread)


@pytest.mark.parametrize("again", [False, True], ids=["sums as they were", "sums made to fit"])
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda b: truncated(weights_of(b)), "got a file that is damaged"),
        (lambda b: flipped(weights_of(b)), "got a file that is damaged"),
        (
            lambda b: torch.save({"conv1.weight": torch.ones(2)}, weights_of(b)),
            "not the weights that bundle.json names",
        ),
        (
            lambda b: torch.save({"a.model.b": torch.ones(2)}, weights_of(b)),
            "RobustBench's loader would read it as 'l.b'",
        ),
        (lambda b: torch.save(torch.ones(2), b / "reference.pt"), "expected a dict of tensors"),
        (lambda b: torch.save({"x_adv": torch.full((12, *SHAPE), 2.0)}, b / "x_adv.pt"), "outside [0, 1]"),
        (lambda b: torch.save({"x_adv": torch.zeros(3, *SHAPE)}, b / "x_adv.pt"), "x_adv.pt holds 3 images"),
        (lambda b: weights_of(b).unlink(), "no such file"),
        (lambda b: next(b.glob("model_info/*/*/*.json")).write_text("{"), "cannot be read as JSON"),
        (lambda b: edited(next(b.glob("model_info/*/*/*.json")), autoattack_acc="74.99"), "which evaluation.json says"),
        (lambda b: noted(b, None), "expected one that ends with 'AutoAttack on 12 of 10000 test images (95 % interval"),
        (lambda b: noted(b, "evaluated on all 10000"), "'evaluated on all 10000', expected one that ends with"),
        (lambda b: stated_otherwise(b, weights_sha256="0" * 64), "weights 000000000000..., which are not the bundle's"),
        (lambda b: seconded(b, None, seed=6, weights_sha256="x"), "weights x..., which are not the bundle's"),
        (lambda b: stated_otherwise(b, version="rand"), "not of AutoAttack's standard version"),
        (lambda b: stated_otherwise(b, deviations=["x"]), "not of AutoAttack's standard version"),
        (
            lambda b: stated_otherwise(b, clean_accuracy=0.76),
            "a clean accuracy of 12 images that is of no whole number",
        ),
        (lambda b: stated_otherwise(b, count=10_001), "counts 10001 images, expected 10000 at most"),
        (lambda b: stated_otherwise(b, robust_accuracy_after={"apgd-ce": "x"}), "can be read (robust_accuracy_after)"),
        (lambda b: (b / "autoattack.log").write_text("robust accuracy: 99%"), "autoattack.log says something else"),
        (lambda b: torch.save({"x_adv": torch.zeros(12, 1, 8, 8)}, b / "x_adv.pt"), "not of the shape (3, 32, 32)"),
        (lambda b: edited(b / "evaluation.json", stated={}), "holds no evaluation that can be read"),
        (lambda b: edited(b / "evaluation.json", exported_weights_sha256="0"), "is of other weights"),
        (lambda b: (b / "evaluation.json").unlink(), "states clean_acc without an evaluation"),
        (lambda b: stated_otherwise(b, norm="L2"), "evaluation.json is for L2, expected Linf"),
        (lambda b: stated_otherwise(b, standard=False), "not of AutoAttack's standard version"),
        (lambda b: stated_otherwise(b, eps=1 / 255), "'eps': '8/255', expected '1/255', which evaluation.json says"),
        (lambda b: stated_otherwise(b, count=0), "holds no evaluation that can be read (count)"),
        (lambda b: stated_otherwise(b, eps=float("nan")), "holds no evaluation that can be read (eps)"),
        (lambda b: stated_otherwise(b, robust_accuracy=0.8), "a robust accuracy above the clean one"),
        (lambda b: edited(b / "evaluation.json", over_seeds={"low": 0, "high": 1}), "another spread over seeds"),
        (lambda b: edited(b / "evaluation.json", others=None), "holds no evaluation that can be read"),
        (lambda b: edited(b / "evaluation.json", others=[{}]), "holds no evaluation that can be read (clean_accuracy"),
        (lambda b: seconded(b, {"low": 0, "high": 1}, seed=6), "another spread over seeds"),
        (lambda b: seconded(b, None), "holds two with the same seed"),
        (lambda b: seconded(b, None, seed=6, data_sha256="0"), "holds some that differ in data_sha256"),
        (lambda b: seconded(b, None, seed=6, norm="L2"), "evaluation.json is for L2, expected Linf"),
        (lambda b: (b / "x_adv.pt").unlink(), "no adversarial images that can be read"),
        (lambda b: torch.save({"x_adv": torch.zeros(12, *SHAPE)}, b / "x_adv.pt"), "holds other images than those"),
        (lambda b: edited(b / "evaluation.json", x_adv_sha256=None), "holds other images than those"),
        (lambda b: (b / "architecture.py").write_text("import art_saliency\n"), "imports 'art_saliency'"),
        (lambda b: (b / "architecture.py").write_text("def ("), "is not Python code"),
        (lambda b: (b / "architecture.py").unlink(), "architecture.py is there though"),
        (lambda b: torch.save({"a": torch.eye(2).to_sparse()}, weights_of(b)), "a is not a plain tensor"),
        (lambda b: torch.save({"a": torch.eye(2, device="meta")}, weights_of(b)), "a is not a plain tensor"),
        (lambda b: torch.save({"a": torch.ones(2).to(torch.float8_e5m2)}, weights_of(b)), "whose rounding masks"),
        (lambda b: torch.save({"x_adv": torch.ones(12, *SHAPE).to_sparse()}, b / "x_adv.pt"), "x_adv.pt: got other"),
        (lambda b: torch.save({"x_adv": torch.tensor(0.5)}, b / "x_adv.pt"), "than x_adv with 4 axes, finite"),
        (lambda b: torch.save({"x": torch.ones(2)}, b / "reference.pt"), "than x with 4 axes and logits with 2 axes"),
        (lambda b: (b / "evaluation.json").write_text("[" * 200_000 + "]" * 200_000), "cannot be read as JSON"),
        (lambda b: (b / "architecture.py").write_text("x=" + "-" * 200_000 + "1"), "is not Python code"),
        (lambda b: (b / "architecture.py").write_text("x=" + "1+" * 200_000 + "1"), "is not Python code"),
        (lambda b: (b / "model_zoo_entry.py").write_text("x" + ".a" * 100_000 + "=1"), "is not Python code"),
        (lambda b: (b / "more.py").write_text(""), "more.py is no part of a bundle"),
        (lambda b: shutil.copy(weights_of(b), weights_of(b).with_name("More.pt")), "More.pt is no part of a bundle"),
        (lambda b: (b / "SUBMISSION.md").unlink(), "SUBMISSION.md is missing"),
        (lambda b: (b / "autoattack.log").unlink(), "autoattack.log is missing"),
        (lambda b: (b / "reference.pt").unlink(), "reference.pt is missing"),
        (lambda b: (b / "model_zoo_entry.py").unlink(), "model_zoo_entry.py is missing"),
        (lambda b: (b / "evaluation.json").unlink(), "x_adv.pt is no part of a bundle"),
        (lambda b: replaced(b / "architecture.py", Path.mkdir), "architecture.py is no part of a bundle"),
        (lambda b: replaced(b / "evaluation.json", Path.mkdir), "evaluation.json is no part of a bundle"),
        (lambda b: (b / "model_zoo_entry.py").write_text("ENTRY = ('Other', {})"), "no ENTRY called 'Doe2026Saliency'"),
        (lambda b: edited(b / "bundle.json", name="../../x2026X"), "name: got '../../x2026X'"),
        (lambda b: edited(b / "bundle.json", schema=2), "look at schema"),
        (lambda b: edited(b / "bundle.json", num_classes=9), "classes and shape"),
        (lambda b: edited(b / "bundle.json", preprocessing="Res224"), "preprocessing: got 'Res224', expected None"),
        (lambda b: (b / "bundle.json").write_text("[]"), "bundle.json is no object"),
    ],
)
def test_whatever_is_wrong_with_a_bundle_is_said_and_it_is_not_run(copied, monkeypatch, harm, says, again):
    from art_saliency.robustbench import verify

    monkeypatch.setattr(verify, "prove", lambda jobs: pytest.fail("its code was run"))
    harm(copied)
    if again:
        sums_again(copied)
    found = verify_bundle(copied, trust=True)
    assert any(says in problem for problem in found.problems), found.problems
    assert again or any(SUMS in p or "sum differs" in p or "missing" in p for p in found.problems)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("name", ["x_adv.pt", "model_zoo_entry.py", "evaluation.json", SUMS, "more"])
def test_where_something_is_no_plain_file_nothing_is_read(copied, monkeypatch, name):
    """Whoever opens a pipe that nobody writes into waits for ever."""
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was read"))
    found = verify_bundle(copied, trust=True)
    assert found.problems == [f"{name} is no plain file"]
    assert len(found.unchecked) == 1


def test_a_network_that_was_evaluated_with_its_auxiliary_heads_is_the_bundles_and_that_is_said(
    results, answered, tmp_path
):
    answered()
    model = with_fsr(network(), "layer2")
    evaluated = dataclasses.replace(results[0], weights_sha256=sha256_of_tensors(model.state_dict()))
    found = verify_bundle(export_robustbench(model, "Doe2026Fsr", out=tmp_path / "b", evaluation=evaluated))
    assert found.problems == []
    assert sum("but for wrappers and auxiliary heads" in line for line in found.unchecked) == 1


def test_a_bundle_of_before_other_names_of_its_weights_were_written_down_is_good(copied):
    page = page_of(copied, "bundle.json")
    del page["also_known_as"]
    (copied / "bundle.json").write_text(json.dumps(page))
    sums_again(copied)
    found = verify_bundle(copied)
    assert found.problems == []
    assert not any("auxiliary heads" in line for line in found.unchecked)


def test_what_is_missing_is_said_once(copied):
    (copied / "SUBMISSION.md").unlink()
    assert verify_bundle(copied).problems == ["SUBMISSION.md is missing"]
    (copied / SUMS).unlink()
    assert verify_bundle(copied).problems == [f"{SUMS} is missing", "SUBMISSION.md is missing"]


def test_a_folder_that_no_bundle_has_is_named(copied):
    (copied / "more").mkdir()
    assert verify_bundle(copied).problems == ["more is no part of a bundle"]


def test_a_bundle_without_adversarial_images_says_that_none_are_scored(copied):
    (copied / "x_adv.pt").unlink()
    edited(copied / "evaluation.json", x_adv_sha256=None)
    sums_again(copied)
    found = verify_bundle(copied)
    assert found.problems == []
    assert sum("adversarial images (there are none to be scored)" in line for line in found.unchecked) == 1


def test_what_is_no_bundle_at_all_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a bundle"):
        verify_bundle(tmp_path)


# ---- the other way ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(place):
    """RobustBench with one more entry, small, whose checkpoint is in place."""
    from art_saliency.robustbench.compat import import_robustbench

    robustbench = import_robustbench()
    enums = robustbench.model_zoo.enums
    table = robustbench.model_zoo.model_dicts[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf]
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    table["Doe2026Zoo"] = {"model": lambda: WideResNet(depth=10, widen_factor=1), "gdrive_id": "none"}
    torch.manual_seed(0)
    model = WideResNet(depth=10, widen_factor=1)
    folder = place / "zoo"
    (folder / "cifar10" / "Linf").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "cifar10" / "Linf" / "Doe2026Zoo.pt")
    yield folder, model.eval(), table, robustbench
    del table["Doe2026Zoo"]


def test_a_zoo_model_becomes_a_classifier_that_can_be_trained_evaluated_and_given_fsr(zoo):
    from art_saliency import PGDATTrainer
    from art_saliency.evaluation.accuracy import accuracy

    folder, model, _, _ = zoo
    torch.manual_seed(4)
    state = torch.get_rng_state()
    found = load_robustbench("Doe2026Zoo", "cifar10", "Linf", model_dir=folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.model.training
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(found.predict(x.numpy())), model(x))
    y = torch.tensor([0, 1, 2, 3])
    assert 0 <= accuracy(found.model, x, y) <= 1
    PGDATTrainer(found, eps=EPS, max_iter=1).fit(x.numpy(), y.numpy(), nb_epochs=1, batch_size=4)
    assert not torch.equal(found.model.fc.weight, model.fc.weight)
    insert_fsr(found.model, "block3", 10, x, hidden=4)
    assert found.predict(x.numpy()).shape == (4, 10)


def test_errors_of_the_zoo_say_what_to_do(zoo, monkeypatch):
    folder, _, table, robustbench = zoo
    with pytest.raises(InputError, match="did you mean 'Wong2020Fast'"):
        load_robustbench("Wong2020fast", model_dir=folder)
    file = folder / "cifar10" / "Linf" / "Wong2020Fast.pt"
    file.write_text("<html>Quota exceeded</html>")
    with pytest.raises(CheckpointError, match="delete the file, fetch it by hand"):
        load_robustbench("Wong2020Fast", model_dir=folder)
    fetched = []
    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", lambda gdrive, path: fetched.append((gdrive, path)))
    with pytest.raises(CheckpointError, match="could not load 'Rade2021Helper_R18_ddpm'"):
        load_robustbench("Rade2021Helper_R18_ddpm", model_dir=folder)
    expected = folder / "cifar10" / "Linf" / "Rade2021Helper_R18_ddpm.pt"
    assert fetched == [(table["Rade2021Helper_R18_ddpm"]["gdrive_id"], expected)]  # the real path to the download
    marker = folder / "ran"
    torch.save({"conv1.weight": Evil(marker)}, file)
    with pytest.raises(CheckpointError):
        load_robustbench("Wong2020Fast", model_dir=folder)
    assert not marker.exists()


def test_make_job_says_where(tmp_path):
    page = {"name": "a", "dataset": "cifar10", "threat_model": "Linf", "num_classes": 10, "input_shape": [3, 32, 32]}
    job = make_job(tmp_path, page)
    assert job["bundle"] == str(tmp_path.resolve())
    assert job["benchmark"] is None
