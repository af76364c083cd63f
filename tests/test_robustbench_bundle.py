"""A bundle's parts without RobustBench: fields and conventions, evidence of these weights alone, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch

from art_saliency import autoattack, build_network
from art_saliency.errors import CheckpointError, InputError
from art_saliency.files import sha256_of_tensors
from art_saliency.robustbench.bundle import SUMS, sealed, sum_problems, write_text
from art_saliency.robustbench.deployable import deployable
from art_saliency.robustbench.evidence import autoattack_log, gather, spread
from art_saliency.robustbench.model_info import (
    board,
    eps_text,
    known_fields,
    percent_text,
    prepared_board,
    problems,
    unfilled,
)
from art_saliency.robustbench.submission import TO_FILL_IN, entry, submission
from art_saliency.robustbench.writing import Architecture
from art_saliency.threat import ThreatModel

# ---- model_info ----------------------------------------------------------------------------------------------------

PAGE = {
    "link": "https://arxiv.org/abs/2601.00001",
    "name": "Saliency",
    "authors": "Jane Doe, John Roe",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "arXiv, Jan 2026",
    "architecture": "ResNet-18",
    "eps": "8/255",
    "clean_acc": "85.71",
    "reported": "52.48",
    "autoattack_acc": "52.4",
}
"""As RobustBench's own pages are: the fields that all 236 of them have, and AutoAttack's."""


def test_a_page_as_robustbench_has_them_is_good():
    assert problems(PAGE, "cifar10", "Linf") == []
    assert list(known_fields("cifar10", "Linf")[0]) == list(PAGE)
    assert problems({**PAGE, "external": "51.00", "unreliable": True, "footnote": "A note."}, "cifar10", "Linf") == []
    corrupted = {key: value for key, value in PAGE.items() if key != "autoattack_acc"} | {"eps": None}
    assert problems({**corrupted, "corruptions_acc": "88.1"}, "cifar10", "corruptions") == []
    more = {"corruptions_mce": "103.2", "corruptions_acc_3d": None, "corruptions_mce_3d": None, "dataset": "imagenet"}
    assert problems({**corrupted, **more, "corruptions_acc": "88.1"}, "imagenet", "corruptions") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eps": 8 / 255}, "has 'eps': 0.03137254901960784, expected a radius as text"),
        ({"eps": "8 / 255"}, "has 'eps'"),
        ({"eps": None}, "has 'eps': None"),
        ({"eps": "0"}, "has 'eps': '0'"),
        ({"clean_acc": 85.71}, "has 'clean_acc': 85.71, expected a percentage as text"),
        ({"clean_acc": "0.8571000"}, "has 'clean_acc'"),
        ({"clean_acc": "101"}, "has 'clean_acc'"),
        ({"autoattack_acc": "90.00"}, "has a robust accuracy of 90.00, above the clean 85.71"),
        ({"link": "arxiv"}, "has 'link': 'arxiv', expected a web address"),
        ({"additional_data": "no"}, "has 'additional_data': 'no', expected true or false"),
        ({"number_forward_passes": True}, "has 'number_forward_passes': True"),
        ({"number_forward_passes": None}, "has 'number_forward_passes': None"),
        ({"authors": " "}, "has 'authors': ' ', expected text"),
        ({"dataset": "cifar100"}, "has 'dataset': 'cifar100', expected 'cifar10'"),
        ({"architecure": "x"}, "has an unknown field 'architecure'; did you mean 'architecture'?"),
        ({"corruptions_acc": "1"}, "has an unknown field 'corruptions_acc'"),
    ],
)
def test_what_breaks_a_convention_is_said(change, says):
    (problem,) = problems({**PAGE, **change}, "cifar10", "Linf")
    assert problem.startswith(says)


def test_all_problems_are_said_at_once_and_what_is_not_known_yet_may_be_null():
    page = {key: value for key, value in PAGE.items() if key != "venue"} | {"eps": 0.1, "clean_acc": 3}
    assert len(problems(page, "cifar10", "Linf")) == 3
    open_page = {**PAGE, "link": None, "reported": None, "autoattack_acc": None}
    assert problems(open_page, "cifar10", "Linf") == []
    published = dict.fromkeys(("code_url", "license", "checkpoint_url", "gdrive_id"), "said")
    assert unfilled(open_page, published) == ["paper_url", "reported", "evaluation"]
    assert unfilled(PAGE, {**published, "license": None}) == ["license"]
    assert unfilled(PAGE, published) == []
    assert problems([], "cifar10", "Linf") == ["is a list, expected an object"]


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (4 / 255, "4/255"),
        (0.5, "0.5"),
        (128 / 255, "128/255"),
        (1.0, "1"),
        (0.3, "0.3"),
        (0.0123456, "0.0123456"),
    ],
)
def test_radii_are_written_as_robustbench_writes_them(eps, text):
    assert eps_text(eps) == text
    assert problems({**PAGE, "eps": text}, "cifar10", "Linf") == []
    above, _, below = text.partition("/")
    assert float(above) / float(below or 1) == eps  # nothing is lost


def test_percentages_and_boards():
    assert percent_text(0.5248) == "52.48"
    assert percent_text(1) == "100.00"
    assert percent_text(0) == "0.00"
    assert board("imagenet", "Linf").eps["Linf"] == 4 / 255
    assert prepared_board("imagenet", "Linf", "Crop288").input_shape == (3, 288, 288)
    assert prepared_board("imagenet", "Linf", "Res256Crop224") == board("imagenet", "Linf")
    assert prepared_board("cifar10", "L2", None) == board("cifar10", "L2")
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        board("cifar-10", "Linf")
    with pytest.raises(InputError, match="threat_model: got 'L2'"):
        board("cifar100", "L2")


# ---- evidence ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated():
    """A network, and its evaluation under two seeds on four images: one attack, said to be the standard version."""
    torch.manual_seed(0)
    model = build_network("small-cnn", num_classes=10, input_shape=(3, 8, 8), width=4).eval()
    x = torch.rand(4, 3, 8, 8)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10

    def evaluate(seed):
        options = {"version": "custom", "attacks": ["apgd-ce"], "batch_size": 32, "progress": False}
        result = autoattack(model, x, y, eps=0.5, seed=seed, **options)
        return dataclasses.replace(result, version="standard", standard=True, deviations=[])

    return model, [evaluate(0), evaluate(1)]


THREAT = ThreatModel("Linf", 0.5)


def test_an_evaluation_of_these_weights_is_taken_from_a_result_or_a_file(evaluated, tmp_path):
    model, results = evaluated
    (one,) = gather(results[0], deployable(model), THREAT)
    assert torch.equal(one.x_adv, results[0].x_adv)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"data": "mine", "autoattack_details": results[0].to_json()}))
    (read,) = gather(path, deployable(model), THREAT)
    assert read.record == one.record
    assert (read.data, read.x_adv) == ("mine", None)
    images = {"x_adv": results[0].x_adv}
    torch.save(images, tmp_path / "x_adv.pt")
    path.write_text(json.dumps({"autoattack_details": results[0].to_json(), "x_adv_sha256": sha256_of_tensors(images)}))
    assert torch.equal(gather(str(path), deployable(model), THREAT)[0].x_adv, results[0].x_adv)
    assert spread([one]) is None


def test_several_seeds_give_the_spread(evaluated):
    model, results = evaluated
    found = gather(results, deployable(model), THREAT)
    values = [result.robust_accuracy for result in results]
    assert spread(found) == {"seeds": [0, 1], "low": min(values), "high": max(values)}
    log = autoattack_log(found)
    for result in results:
        assert f"seed {result.seed}, batch size 32, 4 images" in log
        assert f"initial accuracy: {result.clean_accuracy:.2%}" in log
        assert result.weights_sha256 in log
    with pytest.raises(InputError, match="two with the same seed"):
        gather([results[0], results[0]], deployable(model), THREAT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights_sha256": "0" * 64}, "is of the weights 000000000000..., not of"),
        ({"eps": 0.4}, "is for Linf eps 0.4, not Linf eps 0.5"),
        ({"norm": "L2"}, "is for L2 eps 0.5"),
        ({"standard": False, "deviations": ["fewer targets"]}, "is not AutoAttack's standard version (fewer targets)"),
        ({"robust_accuracy": 1.0, "clean_accuracy": 0.5}, "has a robust accuracy that is not between"),
    ],
)
def test_an_evaluation_of_anything_else_is_refused(evaluated, tmp_path, change, says):
    model, results = evaluated
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**results[0].to_json(), **change}))
    with pytest.raises(InputError) as caught:
        gather(path, deployable(model), THREAT)
    assert says in str(caught.value)


def test_one_changed_weight_makes_it_another_network(evaluated):
    model, results = evaluated
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.linear.bias[0] += 1e-3
    with pytest.raises(InputError, match="is of the weights"):
        gather(results[0], deployable(other), THREAT)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 0}'])
def test_files_that_are_no_evaluation_are_refused(evaluated, tmp_path, text):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="evaluate again"):
        gather(path, deployable(evaluated[0]), THREAT)
    with pytest.raises(InputError, match="a float"):
        gather(0.5, deployable(evaluated[0]), THREAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("robust_accuracy_after", {"apgd-ce": "x"}),
        ("robust_accuracy_after", {"apgd-ce": None}),
        ("deviations", [1]),
        ("warnings", [["x"]]),
        ("versions", {"torch": 2}),
        ("versions", ["2"]),
    ],
)
def test_an_evaluation_whose_parts_are_of_another_type_is_no_evaluation(evaluated, tmp_path, field, value):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**evaluated[1][0].to_json(), field: value}))
    with pytest.raises(CheckpointError, match=f"no evaluation with AutoAttack, {field} missing or not what"):
        gather(path, deployable(evaluated[0]), THREAT)


def test_a_file_of_other_tensors_beside_an_evaluation_is_refused(evaluated, tmp_path):
    model, results = evaluated
    other = {"x_adv": torch.tensor(0.5)}
    torch.save(other, tmp_path / "x_adv.pt")
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"autoattack_details": results[0].to_json(), "x_adv_sha256": sha256_of_tensors(other)}))
    with pytest.raises(CheckpointError, match="no adversarial images, expected x_adv with 4 axes"):
        gather(path, deployable(model), THREAT)


def test_adversarial_images_of_another_evaluation_are_refused(evaluated, tmp_path):
    model, results = evaluated
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"autoattack_details": results[0].to_json(), "x_adv_sha256": "0" * 64}))
    torch.save({"x_adv": results[0].x_adv}, tmp_path / "x_adv.pt")
    with pytest.raises(CheckpointError, match="not the adversarial images of evaluation"):
        gather(path, deployable(model), THREAT)


# ---- the pages that a human sends ----------------------------------------------------------------------------------

OWN = Architecture("own", "ResNet-18", "code", ("from robustbench.model_zoo.architectures.doe import doe\n", "doe"))


def test_what_only_a_human_knows_is_left_open_in_words_and_never_made_up(evaluated):
    empty = dict.fromkeys(known_fields("cifar10", "Linf")[0]) | {
        "dataset": "cifar10",
        "eps": "8/255",
        "number_forward_passes": 1,
    }
    text = submission(empty, name="Doe2026X", threat_model="Linf", architecture=OWN, human={}, stated=None, seeds=None)
    for label in (
        "Paper title",
        "Paper URL",
        "Paper authors",
        "Venue",
        "Clean accuracy",
        "Robust accuracy, %",
        "Additional data",
        "License",
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(f"- **{label}"))
        assert line.endswith(TO_FILL_IN)
    assert "still to be filled in, by exporting again with --force: --paper-url, --paper-title, --authors" in text
    stated = evaluated[1][0].to_json()
    seeds = {"seeds": [0, 1], "low": 0.25, "high": 0.5}
    human = {"license": "MIT", "code_url": "https://c.org", "checkpoint_url": "https://w.org"}
    text = submission(
        PAGE, name="Doe2026X", threat_model="Linf", architecture=OWN, human=human, stated=stated, seeds=seeds
    )
    assert TO_FILL_IN not in text
    assert "evaluated on 4 of 10000 images: the leaderboard takes the whole set only" in text
    assert "over the seeds 0, 1 it was 25.00% to 50.00%" in text
    assert "- **Additional data**: no" in text
    assert "- [x] the weights may be shared under the MIT license" in text


@pytest.mark.parametrize(("eps", "warned"), [("8/255", False), ("4/255", True)])
def test_another_radius_than_the_leaderboards_is_told_before_it_is_sent(evaluated, eps, warned):
    human = {"license": "MIT", "code_url": "https://c.org", "checkpoint_url": "https://w.org"}
    words = {"name": "Doe2026X", "threat_model": "Linf", "architecture": OWN, "human": human, "seeds": None}
    text = submission({**PAGE, "eps": eps}, stated=None, **words)
    assert ("- for eps 4/255: the leaderboard is for 8/255 alone" in text) == warned
    corrupted = {**PAGE, "eps": None, "corruptions_acc": "88.1"}
    assert "leaderboard" not in submission(corrupted, stated=None, **{**words, "threat_model": "corruptions"})


def test_the_entry_is_code_that_defines_one_row():
    text = entry("Doe2026X", "imagenet", "Linf", OWN, "Res224")
    assert "robustbench/model_zoo/architectures/doe2026x.py" in text
    names = {}
    exec(text.replace(OWN.definition[0], "doe = 3"), names)
    assert names["ENTRY"] == ("Doe2026X", {"model": 3, "gdrive_id": None, "preprocessing": "Res224"})
    exec(entry("Doe2026X", "imagenet", "Linf", OWN, "Res224", "1a").replace(OWN.definition[0], "doe = 3"), names)
    assert names["ENTRY"][1]["gdrive_id"] == "1a"


# ---- on disk -------------------------------------------------------------------------------------------------------


def fill(folder, text="one"):
    write_text(folder / "bundle.json", "{}")
    write_text(folder / "a" / "file.txt", text)


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_bundle_appears_with_sums_that_the_usual_tool_reads(tmp_path):
    with sealed(tmp_path / "b", force=False) as folder:
        fill(folder)
        assert not (tmp_path / "b").exists()
    assert everything(tmp_path) == {"b", "b/SHA256SUMS", "b/bundle.json", "b/a", "b/a/file.txt"}
    assert sum_problems(tmp_path / "b") == []
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "b", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("OK")) == (0, 2)


@pytest.mark.parametrize("force", [False, True])
def test_what_has_appeared_meanwhile_is_replaced_only_where_it_may_be(tmp_path, force):
    def written_twice(other):
        with sealed(tmp_path / "b", force=force) as folder:
            fill(folder, "ours")
            other()

    def another():
        with sealed(tmp_path / "b", force=True) as folder:
            fill(folder, "theirs")

    def notes():
        shutil.rmtree(tmp_path / "b")
        write_text(tmp_path / "b" / "notes.txt", "mine")

    with nullcontext() if force else pytest.raises(InputError, match="add --force"):
        written_twice(another)
    assert (tmp_path / "b" / "a" / "file.txt").read_text() == ("ours" if force else "theirs")
    with pytest.raises(InputError, match=r"holds other files|there already"):
        written_twice(notes)
    assert force == (tmp_path / "b" / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_nothing_or_the_old_one(tmp_path, error, there):
    if there:
        with sealed(tmp_path / "b", force=False) as folder:
            fill(folder, "old")
    before = everything(tmp_path)

    def interrupted():
        with sealed(tmp_path / "b", force=True) as folder:
            fill(folder, "new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert everything(tmp_path) == before
    assert not there or sum_problems(tmp_path / "b") == []
    assert not there or (tmp_path / "b" / "a" / "file.txt").read_text() == "old"


def test_an_interruption_between_the_two_moves_brings_the_old_one_back(tmp_path, monkeypatch):
    with sealed(tmp_path / "b", force=False) as folder:
        fill(folder, "old")
    rename, calls = os.rename, []

    def interrupted(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(a, b)

    def replace():
        with sealed(tmp_path / "b", force=True) as folder:
            fill(folder, "new")
            monkeypatch.setattr(os, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert (tmp_path / "b" / "a" / "file.txt").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_nothing_is_overwritten_without_force_and_nothing_else_than_a_bundle_ever(tmp_path):
    with sealed(tmp_path / "b", force=False) as folder:
        fill(folder, "old")
    with pytest.raises(InputError, match="add --force"), sealed(tmp_path / "b", force=False):
        pass
    with sealed(tmp_path / "b", force=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "b" / "a" / "file.txt").read_text() == "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name in ("mine", "file", "link"):
        with pytest.raises(InputError), sealed(tmp_path / name, force=True):
            pass
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    with sealed(tmp_path / "empty", force=False) as folder:
        fill(folder)
    assert sum_problems(tmp_path / "empty") == []
    with pytest.raises(CheckpointError, match="could not be written"), sealed(tmp_path / "file" / "b", force=False):
        pass


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "a" / "file.txt").write_text("two"), "a/file.txt is not the file that was written"),
        (lambda f: (f / "a" / "file.txt").unlink(), "a/file.txt is missing"),
        (lambda f: (f / "more.py").write_text("x"), "more.py is not listed"),
        (lambda f: (f / "link").symlink_to("/etc/passwd"), "link is no plain file"),
        (lambda f: (f / SUMS).unlink(), "SHA256SUMS is missing"),
        (
            lambda f: (f / SUMS).write_text("0" * 64 + "  ../../etc/passwd\n"),
            "line 1: no sum of a file inside the bundle",
        ),
        (lambda f: (f / SUMS).write_text((f / SUMS).read_text() * 2), "no sum of a file inside the bundle"),
        (lambda f: (f / SUMS).write_bytes(b"\xff\xfe"), "line 1: no sum"),
    ],
)
def test_every_change_of_a_bundle_is_seen(tmp_path, harm, says):
    with sealed(tmp_path / "b", force=False) as folder:
        fill(folder)
    harm(tmp_path / "b")
    found = sum_problems(tmp_path / "b")
    assert any(says in problem for problem in found), found
