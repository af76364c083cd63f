"""The command line as a user meets it: real runs on real digits, and one clear sentence for every wrong word."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from torch import nn

import art_saliency
from art_saliency import load
from art_saliency.architectures import ACTIVATIONS
from art_saliency.cli import main
from art_saliency.data import load_data
from art_saliency.errors import InputError
from art_saliency.evaluation.accuracy import accuracy
from art_saliency.files import sha256_of_tensors
from art_saliency.methods.fsr import fsr_layers, insert_fsr
from art_saliency.networks import build_network
from art_saliency.trainers.methods import StandardTrainer
from art_saliency.trainers.runs import make_classifier, save
from art_saliency.training.records import History
from tests.helpers import spell, write_few_digits

ONE_EPOCH = {"eps": 0.1, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run trained by the command line on an .npz of 300 digits."""
    place = tmp_path_factory.mktemp("cli")
    few = write_few_digits(place / "few.npz", 300, 40)
    words = spell("train", "adv-gsct", data=few, eps=0.1, set="rho=0.2", epochs=25, lr=0.02)
    assert main([*words, "--width", "8", "--out", str(place / "run"), "--device", "cpu", "--quiet"]) == 0
    return place


def test_train_writes_a_run_that_load_gives_back(folder):
    page = json.loads((folder / "run" / "run.json").read_text())
    assert page["method"] == "adv-gsct"
    assert page["settings"]["rho"] == 0.2
    assert page["history"]["meta"]["seed"] == 0
    assert len(page["history"]["epochs"]) == 25
    assert page["history"]["epochs"][-1]["validation_robust_accuracy"] is not None
    classifier = load(folder / "run")
    assert sha256_of_tensors(classifier.model.state_dict()) == page["weights_sha256"]
    data = load_data(folder / "few.npz")
    assert accuracy(classifier.model, data.x_test, data.y_test) > 0.3
    plain = torch.load(folder / "run" / "weights.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in plain.values())
    assert not any("model." in key or "module." in key for key in plain)


def test_evaluate_measures_with_autoattack_and_refuses_to_replace_what_is_of_something_else(folder, capsys):
    words = ["evaluate", str(folder / "run"), "--images", "8", "--device", "cpu", "--quiet"]
    assert main([*words, "--force"]) == 0
    out, err = capsys.readouterr()
    assert "AutoAttack (standard)" in out
    assert err == ""
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    assert result["images"] == 8
    assert result["autoattack"]["accuracy"] <= result["pgd20"]["accuracy"] <= result["clean"]["accuracy"]
    low, high = result["autoattack"]["interval_95"]
    assert low <= result["autoattack"]["accuracy"] <= high
    assert result["autoattack_details"]["standard"] is True
    assert main([*words, "--norm", "L2", "--eps", "1e300"]) == 2
    assert "--eps: got 1e+300, expected 0 < --eps <= 1e+09" in capsys.readouterr().err
    before = (folder / "run" / "evaluation.json").read_bytes()
    for other, said in (
        (["--seed", "1"], "--seed"),
        (["--eps", "0.2", "--batch-size", "4"], "--eps, --batch-size"),
        (["--images", "7", "--norm", "L2", "--version", "rand"], "images, --norm, --version"),
    ):
        assert main([*words, *other]) == 2
        assert f"evaluation.json, which is of other {said}, expected none, or the" in (err := capsys.readouterr().err)
        assert err.endswith("; add --force\n")
    assert before == (folder / "run" / "evaluation.json").read_bytes()


@pytest.fixture
def measured(monkeypatch):
    """The seeds of the measurements that were made."""
    from art_saliency.evaluation import summary

    seeds, summarise = [], summary.summarise

    def measure(*given, **options):
        seeds.append(options["seed"])
        return summarise(*given, **options)

    monkeypatch.setattr(summary, "summarise", measure)
    return seeds


def test_what_was_measured_is_measured_again_with_force_alone(folder, tmp_path, measured, capsys):
    """Of two runs, one of which stands measured, the other is; the comparison is that of both. Weights that are damaged are told first."""
    for copied in ("one", "two"):
        shutil.copytree(folder / "run", tmp_path / copied, ignore=shutil.ignore_patterns("evaluation.json", "x_adv.pt"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    words = ["--images", "3", "--device", "cpu", "--quiet"]
    assert main(["evaluate", one, *words]) == 0
    table = capsys.readouterr().out.split("Written to")[0]
    before = (tmp_path / "one" / "evaluation.json").read_bytes()
    assert main(["evaluate", one, two, *words, "--out", str(tmp_path / "both")]) == 0
    assert measured == [0, 0]
    said = f"{table}Read from {one}/evaluation.json: measured before (--force measures anew)\n"
    assert capsys.readouterr().out.startswith(said)
    assert (tmp_path / "one" / "evaluation.json").read_bytes() == before
    pages = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert pages["one"] == json.loads(before)
    assert pages["one"]["autoattack"] == pages["two"]["autoattack"]
    assert main(["evaluate", one, *words, "--force"]) == 0
    assert measured == [0, 0, 0]
    capsys.readouterr()
    damage(tmp_path / "one" / "evaluation.json")
    assert main(["evaluate", two, one, *words, "--out", str(tmp_path / "again")]) == 2
    assert "one/evaluation.json: could not be read as an evaluation" in (said := capsys.readouterr().err)
    assert said.endswith("evaluate again with --force\n")
    for change, said in ((damage, "expected a state dict that torch.load"), (Path.unlink, "no such file")):
        change(tmp_path / "two" / "weights.pt")
        assert main(["evaluate", two, *words]) == 2
        assert said in (err := capsys.readouterr().err)
        assert "two/weights.pt" in err
    assert measured == [0, 0, 0]


def test_an_evaluation_without_its_figures_is_called_damaged(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", run := tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json"))
    words = ["evaluate", str(run), "--images", "2", "--device", "cpu", "--quiet"]
    assert main(words) == 0
    page = json.loads((run / "evaluation.json").read_text())
    for broken in ({**page, "pgd20": None}, {**page, "clean": {"accuracy": "?"}}, [page]):
        (run / "evaluation.json").write_text(json.dumps(broken))
        capsys.readouterr()
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.endswith("; evaluate again with --force\n")


def test_a_folder_that_is_called_like_a_data_set_is_not_taken_for_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = spell("train", "standard", **ONE_EPOCH, data="digits", width=4, out="digits", quiet=True, device="cpu")
    assert main(words) == 0
    page = json.loads(Path("digits/run.json").read_text())
    assert page["data"]["spec"] == "digits"
    assert main(["evaluate", "digits", "--images", "2", "--quiet", "--device", "cpu"]) == 0


OWN = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, num_classes))
"""


def test_a_users_own_network_and_weights_are_trained(folder, capsys, monkeypatch):
    (folder / "my_networks.py").write_text(OWN)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = spell("train", "standard", **ONE_EPOCH, data=folder / "few.npz", quiet=True, device="cpu")
    own = ["--network", "my_networks:make", "--lr", "0.01", "--out", str(folder / "own")]
    assert main([*words, *own, "--force"]) == 0
    started = [*own[:-1], str(folder / "own2"), "--weights", str(folder / "own" / "weights.pt"), "--force"]
    assert main([*words, *started]) == 0
    capsys.readouterr()
    assert main([*words, *own[:-1], str(folder / "own3"), "--weights", str(folder / "run" / "weights.pt")]) == 2
    assert "do not fit the network" in capsys.readouterr().err


def test_a_network_with_fsr_comes_back_with_its_layers(folder):
    words = spell("train", "fsr", **ONE_EPOCH, data=folder / "few.npz", quiet=True, device="cpu")
    settings = spell(set=["base=trades", "hidden=8", "beta=2"], out=folder / "fsr")
    assert main([*words, *settings]) == 0
    page = json.loads((folder / "fsr" / "run.json").read_text())
    assert page["settings"]["base"] == "trades"
    assert page["settings"]["beta"] == 2
    layer = page["network"]["fsr"]["layer3"]
    assert (layer["hidden"], layer["tau"]) == (8, 0.1)
    assert sha256_of_tensors(load(folder / "fsr").model.state_dict()) == page["weights_sha256"]


def test_a_run_comes_back_to_be_trained_on_with_all_that_its_layers_were_set_to(digits, tmp_path):
    options = {"lambda_sep": 0.1, "lambda_rec": 0.2, "aux_warmup_share": 0.5, "hidden": 4, "tau": 0.3}
    network = {"name": "small-cnn", "num_classes": 10, "input_shape": [1, 8, 8], "width": 4}
    made = make_classifier(
        insert_fsr(build_network(**network), "layer3", 10, digits[0][:2], **options),
        input_shape=(1, 8, 8),
        num_classes=10,
    )
    fsr_layers(made.model)["layer3"].randomised = True
    save(tmp_path / "run", made, network=network, method="fsr", settings={}, data={}, history=History())
    back = load(tmp_path / "run", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    layer = fsr_layers(back.model)["layer3"]
    assert {name: getattr(layer, name) for name in options} == options
    assert layer.randomised
    before = {name: value.clone() for name, value in back.model.state_dict().items()}
    StandardTrainer(back).fit(digits[0][:64], digits[1][:64], nb_epochs=1, seed=0, verbose=False)
    assert any(not torch.equal(before[name], value) for name, value in back.model.state_dict().items())
    with pytest.raises(InputError, match="no optimizer"):
        StandardTrainer(load(tmp_path / "run")).fit(digits[0][:64], digits[1][:64], verbose=False)


def test_compare_puts_methods_and_compositions_into_one_table(folder, capsys):
    words = spell("compare", **ONE_EPOCH, data=folder / "few.npz", images=6, width=8, quiet=True, device="cpu")
    out = folder / "compare"
    assert main([*words, *spell(arms="fgsm-rs:eps_step=1/20,fsr+trades,standard@silu", out=out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["fgsm-rs:eps_step=1/20", "fsr+trades", "standard@silu"]
    page = json.loads((out / "fgsm-rs:eps_step=1%2F20" / "run.json").read_text())
    assert (page["method"], page["settings"]["eps_step"]) == ("fgsm-rs", 0.05)
    assert {path.parent for path in out.rglob("weights.pt")} < set(out.iterdir()), (
        "a folder an arm, none within another"
    )
    page = json.loads((out / "standard@silu" / "run.json").read_text())
    assert (page["method"], page["network"]["activation"]) == ("standard", "silu")
    assert all(f"| {arm} " in printed for arm in results)
    assert results["fsr+trades"]["passes_per_step"] > results["fgsm-rs:eps_step=1/20"]["passes_per_step"] > 1
    assert load(out / "fsr+trades").nb_classes == 10
    assert (out / "fsr+trades" / "saliency.png").exists()


def test_compare_brings_pictures_to_one_size_and_evaluate_finds_it(tmp_path, capsys):
    for part in ("train", "test"):
        for label in "ab":
            (place := tmp_path / "pics" / part / label).mkdir(parents=True)
            for side in (9, 11, 12, 13):
                Image.new("RGB", (side, side), (20 * side, 9 * side, 200)).save(place / f"{side}.png")
    words = spell("compare", **ONE_EPOCH, arms="standard", width=4, quiet=True, device="cpu", out=tmp_path / "out")
    words += spell(data=tmp_path / "pics")
    assert main(words) == 2
    assert "say size= (train and compare: --size)" in capsys.readouterr().err
    assert main([*words, "--size", "10"]) == 0
    assert main(["evaluate", str(tmp_path / "out" / "standard"), "--quiet", "--device", "cpu"]) == 0


def test_an_interrupted_comparison_keeps_what_it_measured_and_goes_on(folder, monkeypatch, capsys):
    """
    The second arm is measured no more; the first one's figures are in results.json. With --resume neither is trained again, and the
    figures are those of a comparison that nothing interrupted.
    """
    from art_saliency.evaluation import summary

    measured, summarise = [], summary.summarise

    def failing(*given, **options):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(given)
        return summarise(*given, **options)

    words = spell("compare", **ONE_EPOCH, data=folder / "few.npz", images=4, width=4, quiet=True, device="cpu")
    words += spell(arms="standard,fgsm-rs", out=(out := folder / "interrupted"))
    with monkeypatch.context() as patch:
        patch.setattr(summary, "summarise", failing)
        assert main(words) == 130
    before = json.loads((out / "results.json").read_text())
    assert list(before) == ["standard"]
    (kept,) = (out / "fgsm-rs" / "checkpoints").glob("checkpoint-000002-*")  # the first is of the beginning
    assert main(words) == 2
    assert "add --force" in capsys.readouterr().err
    assert main([*words, "--resume", "--lr", "0.02"]) == 2
    assert "--resume: got a budget that differs from the one in" in (said := capsys.readouterr().err)
    assert "lr: 0.01 then, 0.02 now, expected the same data and words" in said
    assert kept.exists()
    weights = (out / "fgsm-rs" / "weights.pt").read_bytes()
    assert main([*words, "--resume"]) == 0
    assert not kept.parent.exists()
    results = json.loads((out / "results.json").read_text())
    assert results["standard"] == before["standard"]
    assert load(out / "fgsm-rs").nb_classes == 10
    assert (out / "fgsm-rs" / "weights.pt").read_bytes() == weights
    assert "| fgsm-rs " in capsys.readouterr().out


def test_a_comparison_that_is_begun_anew_is_gone_on_with_and_not_the_one_before(folder, tmp_path, monkeypatch, capsys):
    """The one before stopped in its second arm; what others keep in the folder is left alone."""
    from art_saliency.evaluation import summary

    words = spell("compare", **ONE_EPOCH, data=folder / "few.npz", images=2, width=4, quiet=True, device="cpu")
    words += spell(out=(out := tmp_path / "out"))

    def stopped_after(count, *more):
        summarise, measured = summary.summarise, []

        def measure(*given, **options):
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(given)
            return summarise(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(summary, "summarise", measure)
            assert main([*words, *more]) == 130

    stopped_after(1, "--arms", "standard,fgsm-rs")
    (kept,) = (out / "fgsm-rs" / "checkpoints").glob("checkpoint-000002-*")
    shutil.copytree(kept.parent, out / "mine" / "checkpoints")
    (out / "results.md").write_text("of the one before")
    shutil.copytree(out, damaged := tmp_path / "damaged")
    damage(damaged / "budget.json")
    assert main([*words[:-1], str(damaged), "--arms", "fgsm-rs", "--force"]) == 0
    stopped_after(0, "--arms", "standard", "--force", "--lr", "0.02")
    assert not kept.exists()
    assert not (out / "results.md").exists()
    assert main([*words, "--arms", "standard,fgsm-rs", "--resume", "--lr", "0.02"]) == 0, capsys.readouterr().err
    assert list(json.loads((out / "results.json").read_text())) == ["standard", "fgsm-rs"]
    assert (out / "mine" / "checkpoints" / kept.name).exists()


WRONG = {
    "method": (["train", "adv-gst", "--eps", "0.1", "--out", "OUT"], "did you mean 'adv-gsct'"),
    "network": (["train", "pgd-at", "--eps", "0.1", "--out", "OUT", "--network", "smal-cnn"], "small-cnn"),
    "data": (["train", "pgd-at", "--eps", "0.1", "--out", "OUT", "--data", "digit"], "did you mean 'digits'"),
    "file": (["train", "pgd-at", "--eps", "0.1", "--out", "OUT", "--data", "nowhere.npz"], "nowhere.npz"),
    "eps": (["train", "pgd-at", "--eps", "8", "--out", "OUT"], "eps: got 8, expected 0 <= eps <= 1"),
    "workers": (
        ["train", "pgd-at", "--eps", "0.1", "--workers", "-2", "--out", "OUT"],
        "--workers: got -2, expected a",
    ),
    "more than there is memory": (
        ["train", "pgd-at", "--eps", "0.1", "--width", "100000000", "--out", "OUT"],
        "a smaller --batch-size, --width or --size",
    ),
    "no step": (
        ["train", "pgd-at", "--eps", "0.1", "--set", "max_iter=0", "--out", "OUT"],
        "max_iter: got 0, expected a whole number, 1 <= max_iter <= 10000; without a step nothing is attacked",
    ),
    "setting": (["train", "pgd-at", "--eps", "0.1", "--set", "rho=1", "--out", "OUT"], "unknown keyword 'rho'"),
    "a layer's setting": (
        ["train", "fsr", "--eps", "0.1", "--set", "aux_warmup=1", "--out", "OUT"],
        "did you mean 'aux_warmup_share'",
    ),
    "own eps": (
        ["train", "pgd-at", "--eps", "0.1", "--set", "eps=0.3", "--out", "OUT"],
        "--set: got 'eps=0.3', expected no eps here; use --eps",
    ),
    "own norm": (
        ["compare", "--arms", "standard,pgd-at:norm=L2", "--out", "OUT"],
        "--arms: got 'norm=L2', expected no",
    ),
    "arm twice": (["compare", "--arms", "standard, standard", "--out", "OUT"], "--arms: got 'standard' twice"),
    "setting twice": (
        ["train", "pgd-at", "--eps", "0.1", "--set", "max_iter=9", "--set", "max_iter=1", "--out", "OUT"],
        "--set: got max_iter twice, expected each name once",
    ),
    "arm's setting twice": (
        ["compare", "--arms", "pgd-at:max_iter=9:max_iter=1", "--out", "OUT"],
        "got max_iter twice",
    ),
    "pair": (["train", "pgd-at", "--eps", "0.1", "--set", "rho", "--out", "OUT"], "NAME=VALUE"),
    "device": (["train", "pgd-at", "--eps", "0.1", "--device", "gpu", "--out", "OUT"], "auto, cpu, cuda or cuda:N"),
    "augment": (["train", "pgd-at", "--eps", "0.1", "--augment", "crp", "--out", "OUT"], "crop"),
    "weights": (["train", "pgd-at", "--eps", "0.1", "--weights", "no.pt", "--out", "OUT"], "no.pt: no such file"),
    "scheduler": (["train", "pgd-at", "--eps", "0.1", "--scheduler", "cosin", "--out", "OUT"], "did you mean 'cosine'"),
    "no scheduler": (["train", "pgd-at", "--eps", "0.1", "--scheduler", "foo", "--out", "OUT"], "'onecycle', 'none'"),
    "nothing to select on": (
        ["train", "pgd-at", "--eps", "0.1", "--selection", "best", "--validation-split", "0", "--out", "OUT"],
        "--selection: got best without images held out, expected some to measure on; say --validation-split 0.1",
    ),
    "nothing to wait for": (
        ["train", "pgd-at", "--eps", "0.1", "--patience", "1", "--validation-split", "0", "--out", "OUT"],
        "--patience: got 1 without images held out, expected some to measure on; say --validation-split 0.1",
    ),
    "no slow copy": (
        ["train", "adv-gsct", "--eps", "0.1", "--set", "target_network=ema", "--out", "OUT"],
        "--ema: got nothing, expected a decay: adv-gsct as set keeps a slow copy; say --ema 0.999",
    ),
    "size": (
        ["train", "pgd-at", "--eps", "0.1", "--size", "5", "--out", "OUT"],
        "got 5, expected no size for 'digits'",
    ),
    "compare's size": (["compare", "--size", "5", "--out", "OUT"], "got 5, expected no size for 'digits'"),
    "arm": (["compare", "--arms", "pgd-at,fsr+pgd", "--out", "OUT"], "did you mean 'pgd-at'"),
    "arm's parameter": (["compare", "--arms", "adv-gsct:rhoo=0", "--out", "OUT"], "did you mean 'rho'"),
    "activation": (["compare", "--arms", "pgd-at@sillu", "--out", "OUT"], "did you mean 'silu'"),
    "layer": (["compare", "--arms", "fr+pgd-at", "--out", "OUT"], "expected one of 'fsr'"),
    "arm's network": (
        ["compare", "--arms", "standard", "--network", "resnet", "--out", "OUT"],
        "did you mean 'resnet18'",
    ),
    "second arm's option": (
        ["compare", "--arms", "standard,adv-gsct:precision=bf16-mixed", "--out", "OUT"],
        "expected '32-true' for adv-gsct",
    ),
    "second arm's layer": (["compare", "--arms", "standard,fsr:target=layer9", "--out", "OUT"], "target: got 'layer9'"),
    "share": (
        ["train", "pgd-at", "--eps", "0.1", "--validation-split", "1", "--out", "OUT"],
        "--validation-split: got 1,",
    ),
    "no share": (["train", "pgd-at", "--eps", "0.1", "--validation-split", "nan", "--out", "OUT"], "split: got nan"),
    "rate": (["train", "pgd-at", "--eps", "0.1", "--lr", "1e300", "--out", "OUT"], "expected 0 < --lr <= 1000"),
    "common rate": (["compare", "--arms", "standard", "--lr", "1e30", "--out", "OUT"], "expected 0 < --lr <= 1000"),
    "decay": (
        ["train", "pgd-at", "--eps", "0.1", "--weight-decay", "1e40", "--out", "OUT"],
        "<= --weight-decay <= 1000",
    ),
    "train's seed": (["train", "pgd-at", "--eps", "0.1", "--seed", "4294967296", "--out", "OUT"], "got 4294967296"),
    "compare's seed": (["compare", "--seed", "-1", "--out", "OUT"], "--seed: got -1"),
    "export's seed": (["export", "nowhere", "--name", "Doe2026Saliency", "--seed", "-1"], "--seed: got -1"),
    "bench's classes": (["bench", "--num-classes", "0"], "--num-classes: got 0, expected a whole number, 2 <="),
    "no run": (["evaluate", "nowhere"], "nowhere: no run.json"),
    "quickstart eps": (["quickstart", "--eps", "2", "--out", "OUT"], "--eps: got 2, expected 0 < --eps <= 1"),
    "quickstart epochs": (["quickstart", "--epochs", "0", "--out", "OUT"], "--epochs: got 0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_word_is_explained_in_one_sentence_and_leaves_nothing(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, expected = WRONG[kind]
    assert main([*words, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"art-saliency {words[0]}: error: ")
    assert expected in err
    assert not list(tmp_path.iterdir()), "something was left behind"


@pytest.fixture
def closed(folder, monkeypatch):
    """A folder with a copy of the run, in which this process may not write, nor read the weights; what root may do is played."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(folder / "run", place / "run", ignore=shutil.ignore_patterns("evaluation.json"))
    shutil.copy(folder / "few.npz", place / "few.npz")
    for path, mode in (
        (place / "few.npz", 0),
        (place / "run" / "weights.pt", 0),
        (place / "run", 0o555),
        (place, 0o555),
    ):
        path.chmod(mode)
    if os.geteuid() == 0:
        unreadable, real_open, real_file = (
            {place / "few.npz", place / "run" / "weights.pt"},
            open,
            tempfile.TemporaryFile,
        )

        def opened(file, *args, **options):
            if isinstance(file, (str, os.PathLike)) and Path(file) in unreadable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return real_open(file, *args, **options)

        def temporary(*args, dir=None, **options):
            if dir is not None and Path(dir).is_relative_to(place):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))
            return real_file(*args, dir=dir, **options)

        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    yield place
    monkeypatch.undo()
    for path in (place, place / "run"):
        path.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such modes")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "pgd-at", "--eps", "0.1", "--out", "{}/new"],
        ["train", "pgd-at", "--eps", "0.1", "--out", "{}/new/deep"],
        ["compare", "--arms", "standard", "--out", "{}/new"],
        ["quickstart", "--out", "{}/new"],
        ["bench", "--out", "{}/bench.json"],
        ["evaluate", "{}/run"],
        ["evaluate", "{}/run", "--full", "--no-surrogates"],
        ["explain", "{}/run", "--index", "0"],
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(closed, words, capsys):
    assert main([word.format(closed) for word in words] + ["--quiet", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "where nothing can be written (Permission denied), expected a folder that can be written to" in err


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such modes")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "pgd-at", "--data", "{}/few.npz"], "few.npz: got 'Permission denied'"),
        (["train", "pgd-at", "--weights", "{}/run/weights.pt"], "weights.pt: Permission denied"),
        (["export", "{}/run", "--name", "Doe2026Saliency"], "weights.pt: Permission denied"),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(closed, words, said, capsys):
    with tempfile.TemporaryDirectory() as place:
        own = ["--eps", "0.1", "--out", f"{place}/new"]
        assert main([word.format(closed) for word in words] + [*own, "--quiet", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize("place", ["few.npz", "few.npz/new"])
@pytest.mark.parametrize(
    "words",
    [
        ["train", "pgd-at", "--eps", "0.1"],
        ["compare", "--arms", "standard"],
        ["quickstart"],
        ["evaluate", "{0}/run", "{0}/twin"],
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_also_with_force(folder, words, place, capsys):
    if "{0}/twin" in words and not (folder / "twin").exists():
        shutil.copytree(folder / "run", folder / "twin")
    given = [word.format(folder) for word in words]
    before = (folder / "few.npz").read_bytes()
    assert main([*given, "--out", str(folder / place), "--force", "--quiet", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert re.search("which is (a file|no folder), expected a folder", err)
    assert (folder / "few.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "place", "said"),
    [
        (["train", "pgd-at", "--eps", "0.1"], "run", "not empty, expected a new or empty folder"),
        (["compare", "--arms", "standard"], "run", "not empty, expected a new or empty folder"),
        (["quickstart"], "run", "not empty, expected a new or empty folder"),
        (["evaluate", "{1}/one", "{1}/two"], "run", "not empty, expected a new or empty folder"),
        (["bench"], "few.npz", "there already, expected a new file"),
        (["explain", "{0}/run", "--index", "0"], "there.png", "there already, expected a new file"),
    ],
)
def test_a_place_that_is_taken_is_refused_in_the_same_words_by_all(folder, tmp_path, words, place, said, capsys):
    (folder / "there.png").touch()
    for copied in ("one", "two"):
        shutil.copytree(folder / "run", tmp_path / copied, ignore=shutil.ignore_patterns("evaluation.json"))
    given = [word.format(folder, tmp_path) for word in words]
    assert main([*given, "--out", str(folder / place), "--quiet", "--device", "cpu"]) == 2
    expected = f"--out: got {folder / place}, which is {said}; add --force, or choose another\n"
    assert capsys.readouterr().err == f"art-saliency {words[0]}: error: {expected}"


def test_a_disk_that_is_full_leaves_the_table_on_the_screen(folder, capsys, monkeypatch):
    def full(path, tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("art_saliency.files.write_tensors", full)
    words = ["evaluate", str(folder / "run"), "--images", "2", "--device", "cpu", "--quiet", "--force"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "AutoAttack (standard)" in out
    assert err == f"art-saliency evaluate: error: {folder / 'run' / 'x_adv.pt'}: {os.strerror(errno.ENOSPC)}\n"


def piped(words, *, unbuffered=""):
    """Exit code and stderr of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open(writer, "wb") as nobody:
        command = [sys.executable, "-m", "art_saliency", *words]
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error_and_costs_nothing(folder, tmp_path, unbuffered):
    assert piped(["methods"], unbuffered=unbuffered) == (141, "")
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json"))
    words = ["evaluate", str(tmp_path / "run"), "--images", "2", "--quiet", "--device", "cpu"]
    assert piped(words, unbuffered=unbuffered) == (141, "")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_said_once(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "art_saliency", "methods"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    said = f"art-saliency: error: standard output: {os.strerror(errno.ENOSPC)}\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(
    "words",
    [["trian"], ["train"], ["train", "pgd-at"], ["train", "pgd-at", "--eps", "x", "--out", "a"]],
)
def test_words_that_do_not_parse_end_with_2_and_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: art-saliency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train adv-gsct --epoch 3", "--epoch: no such option; did you mean --epochs? ("),
        (
            "train pgd-at --eps 0.1 --out a --max-iter=3",
            "--max-iter: no such option; did you mean --set max_iter=...? (",
        ),
        (
            "train j-sigr --lamda-j 3",
            "--lamda-j: no such option; did you mean --set lambda_j=... or --set lambda_s=...? (",
        ),
        ("train standard --max-iter 3", "--max-iter: no such option ("),
        ("train --hlep", "--hlep: no such option; did you mean --help? ("),
        ("evaluate a b --ful", "--ful: no such option; did you mean --full? ("),
        ("verify --zzz", "--zzz: no such option ("),
        ("methods aalp fsr", "fsr: one word too many ("),
        ("methods -x", "-x: no such option ("),
    ],
)
def test_an_option_that_does_not_exist_is_named_in_one_line_with_those_near_it(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    prog = f"art-saliency {words.split()[0]}"
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"{prog}: error: {said}{prog} --help")


def test_a_value_that_looks_like_an_option_and_help_beside_a_wrong_word_are_taken_as_they_are(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--ful", "--help"])
    assert caught.value.code == 0
    assert "Examples:" in capsys.readouterr().out
    assert main(["export", str(folder / "no"), "--name", "Doe2026Saliency", "--footnote", "--a note"]) == 2
    assert "no run.json" in capsys.readouterr().err


def test_a_run_that_is_there_is_not_overwritten(folder, capsys):
    before = (folder / "run" / "weights.pt").read_bytes()
    assert main(["train", "pgd-at", "--eps", "0.1", "--out", str(folder / "run")]) == 2
    assert "add --force" in capsys.readouterr().err
    assert (folder / "run" / "weights.pt").read_bytes() == before


def test_new_weights_do_not_stand_beside_what_was_measured_of_the_old_ones(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for name in ("evaluation.json", "x_adv.pt", "explain.png", "notes.txt"):
        (run / name).write_text("of the old weights")
    for name in ("report", "autoattack-state"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "file").touch()
    words = spell("train", "standard", **ONE_EPOCH, data=folder / "few.npz", width=4, out=run, quiet=True, device="cpu")
    assert main([*words, "--force"]) == 0
    assert {path.name for path in run.iterdir()} == {"weights.pt", "run.json", "best.pt", "notes.txt"}


@pytest.fixture
def digits_network(digits):
    network = {"name": "small-cnn", "num_classes": 10, "input_shape": [1, 8, 8], "width": 4}
    return network, build_network(**network)


BAD_SAVES = {
    "numbers of torch": ({"settings": {"eps": torch.tensor(0.1)}}, {}, "settings: got what JSON cannot hold"),
    "another activation": (
        {"network": {"activation": "silu"}},
        {},
        "network: got those of another: with the same weights its",
    ),
    "another width": ({"network": {"width": 8}}, {}, "network: got those of another .*size mismatch"),
    "unknown": ({"network": {"name": "small-cn"}}, {}, "did you mean 'small-cnn'"),
    "pixel range": (
        {},
        {"clip_values": (0, 255)},
        r"classifier: got clip_values \(0, 255\) or.*build_network\(..., mean=, std=\)",
    ),
    "preprocessing": ({}, {"preprocessing": (0.5, 0.25)}, "classifier: got .*preprocessing before its model"),
}


@pytest.mark.parametrize("kind", BAD_SAVES)
def test_what_would_come_back_as_something_else_is_not_saved_and_a_run_that_is_there_stays(
    kind, digits_network, tmp_path
):
    changes, options, words = BAD_SAVES[kind]
    network, model = digits_network
    made = make_classifier(model, input_shape=(1, 8, 8), num_classes=10)
    page = {"method": "standard", "settings": {}, "data": {}, "history": History()}
    save(tmp_path, made, network=network, **page)
    (tmp_path / "evaluation.json").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, **{"clip_values": (0.0, 1.0), **options})
    changed = {**page, **changes, "network": {**network, **changes.get("network", {})}}
    random = torch.get_rng_state()
    with pytest.raises(InputError, match=words):
        save(tmp_path, other, force=True, **changed)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    save(tmp_path, made, network=network, force=True, **page)
    assert torch.equal(torch.get_rng_state(), random)
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt", "run.json"}


def test_resuming_a_run_that_is_over_is_no_error_and_other_words_are_named(folder, tmp_path, capsys):
    words = spell("train", "standard", **ONE_EPOCH, data=folder / "few.npz", width=4, quiet=True, device="cpu")
    words += ["--out", str(tmp_path / "run"), "--resume"]
    assert main(words) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert "this run is over, nothing was left to do" in said.out
    assert main([*words, "--lr", "0.003"]) == 2
    assert "where a run of other optimizer is over, expected the run of these words" in capsys.readouterr().err
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}


def test_what_has_the_name_of_a_measurement_but_lies_beside_no_run_is_somebodys_own(folder, tmp_path):
    run = tmp_path / "thesis"
    (run / "report").mkdir(parents=True)
    (run / "report" / "thesis.tex").write_text("years of work")
    (run / "saliency.png").write_text("a figure")
    words = spell("train", "standard", **ONE_EPOCH, data=folder / "few.npz", width=4, out=run, quiet=True, device="cpu")
    assert main([*words, "--force"]) == 0
    assert {path.name for path in run.iterdir()} == {"weights.pt", "run.json", "best.pt", "report", "saliency.png"}
    assert (run / "report" / "thesis.tex").read_text() == "years of work"


def damage(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other(part, value):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))

    return change


def other_weights(path):
    state = torch.load(path, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights.pt", damage, "expected a state dict that torch.load"),
        ("weights.pt", other_weights, "its hash differs"),
        ("weights.pt", lambda path: path.unlink(), "no such file"),
        ("run.json", damage, "damaged"),
        ("run.json", lambda path: path.write_text('{"schema": 99}'), "schema 99"),
        ("run.json", other("network", {}), "got {} as network, expected an object with name, num_classes, input_shape"),
        ("run.json", other("settings", None), "got null as settings, expected an object"),
        ("run.json", other("method", 5), "run.json: got 5 as method, expected a text"),
        ("run.json", other("data", {"spec": 5}), "run.json: got 5 as data.spec, expected a text; copy it again"),
        ("run.json", other("data", {"spec": "digits", "root": [1]}), "run.json: got [1] as data.root, expected a text"),
        ("run.json", other("data", {}), "--data: got nothing, expected data; the run does not say on which"),
        ("run.json", other("data", {"spec": "/nowhere/few.npz"}), "--data or --data-root where the run's data are now"),
    ],
)
def test_a_damaged_run_is_refused(folder, tmp_path, name, change, words, capsys):
    import shutil

    shutil.copytree(folder / "run", tmp_path / "run")
    change(tmp_path / "run" / name)
    assert main(["evaluate", str(tmp_path / "run"), "--force", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1, err


def test_other_data_than_in_training_is_noticed(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder / "run", tmp_path / "run")
    page = json.loads((tmp_path / "run" / "run.json").read_text())
    page["data"]["fingerprint"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(page))
    assert main(["evaluate", str(tmp_path / "run"), "--force", "--quiet"]) == 2
    assert "with other content than in training" in capsys.readouterr().err


def test_help_teaches_by_example_and_answers_without_torch():
    for command in ("quickstart", "train", "evaluate"):
        code = f"import sys; from art_saliency.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert f"art-saliency {command}" in done.stdout.split("Examples:")[1]
        assert done.stdout.endswith("False\n")


def test_help_names_every_activation_and_prints_no_doubled_percent_sign(capsys):
    shown = {}
    for command in ("train", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown[command] = " ".join(capsys.readouterr().out.split())
    assert "%%" not in "".join(shown.values())
    assert ", ".join(list(ACTIVATIONS)[:-1]) + f" or {list(ACTIVATIONS)[-1]} (default" in shown["train"]


def test_a_run_that_was_interrupted_is_not_called_no_run(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for words in (["evaluate", "{}"], ["explain", "{}", "--index", "0"]):
        assert main([word.format(tmp_path / "run") for word in words]) == 2
        assert "run: got a run that was interrupted, expected one that is over; go on" in capsys.readouterr().err


def test_quickstart_leaves_table_checkpoints_and_figures(tmp_path, monkeypatch, capsys):
    """The whole command on few epochs and with AutoAttack's weakest sibling would prove little: this is the real one, shortened."""
    import art_saliency.evaluation.summary as summary

    real = summary.summarise
    monkeypatch.setattr(summary, "summarise", lambda model, x, y, **options: real(model, x[:8], y[:8], **options))
    assert main(["quickstart", "--out", str(tmp_path / "q"), "--epochs", "1", "--quiet", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for method in ("standard", "pgd-at", "adv-gsct"):
        assert f"| {method}" in out
        assert (tmp_path / "q" / method / "saliency.png").read_bytes().startswith(b"\x89PNG")
        assert load(tmp_path / "q" / method).nb_classes == 10
    results = json.loads((tmp_path / "q" / "results.json").read_text())
    assert results["standard"]["passes_per_step"] == 1
    assert 6 < results["pgd-at"]["passes_per_step"] < 8.5
    assert 1 < results["adv-gsct"]["passes_per_step"] < results["pgd-at"]["passes_per_step"]
    assert "Next: " in out
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 2


FROM_A_PATH = "import os, sys; sys.path.append({}); from art_saliency.cli import main; sys.exit(main(['verify', '.']))"


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "art_saliency", "verify", "."],
        ["-c", FROM_A_PATH.format("os.getcwd()")],
        ["-c", FROM_A_PATH.format("'inside'")],
    ],
)
def test_verify_refuses_a_bundle_from_which_python_takes_modules_before_any_is_taken(tmp_path, words):
    """A bundle brings a module of a name that torch imports; the command must end before anything looks for it."""
    bundle, marker = tmp_path / "bundle", tmp_path / "ran"
    bundle.mkdir()
    (bundle / "numpy.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(art_saliency.__file__).parent.parent)}
    ended = subprocess.run(
        [sys.executable, *words], cwd=bundle, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "verify it from another folder" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not marker.exists()


def test_verify_does_not_put_the_working_directory_on_pythons_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = list(sys.path)
    assert main(["verify", "."]) == 2
    assert "expected a bundle" in capsys.readouterr().err
    assert sys.path == before
    assert main(["evaluate", "nowhere"]) == 2
    assert sys.path == [*before, str(tmp_path)]  # a command that builds the user's own networks


def test_an_arm_is_a_method_its_parameters_the_runs_options_and_an_activation():
    from art_saliency.trainers.arms import parse_arm

    arm = parse_arm("fsr+trades:hidden=8:beta=3:ema=0.99:awp=0.005@silu")
    assert (arm.trainer, arm.method, arm.network) == ("fsr", "fsr+trades", {"activation": "silu"})
    assert arm.parameters == {"base": "trades", "hidden": 8, "beta": 3}
    assert arm.options == {"ema": 0.99, "awp": 0.005}
    assert parse_arm("pgd-at:label_smoothing=0.1").parameters == {"label_smoothing": 0.1}, (
        "the method's own comes first"
    )
    assert parse_arm("mart:label_smoothing=0.1").options == {"label_smoothing": 0.1}
    for layered in ("fsr+aalp", "fsr:base=aalp", "fsr"):
        assert parse_arm(f"{layered}:label_smoothing=0.1").options == {}, "a base's own, however it is named"


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("pgd-at:ema=2", ("ema",), "ema: got 2"),
        ("pgd-at:ema=0.9", (), "'ema'"),
        ("pgd-at:emma=0.9", ("ema",), "'emma'"),
        ("fsr+pgd", ("ema",), "base: got 'pgd'"),
        ("pgd-at@silo", ("ema",), "'silo'"),
    ],
)
def test_a_wrong_arm_is_refused_before_anything_is_trained(text, options, said):
    from art_saliency.errors import InputError, UnknownOptionError
    from art_saliency.trainers.arms import parse_arm

    with pytest.raises((InputError, UnknownOptionError), match=re.escape(said)):
        parse_arm(text, options=options)
