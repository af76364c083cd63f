"""The report: whole or not at all, every accuracy with its interval, every key documented, every figure drawn."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from art_saliency.cli import main
from art_saliency.cli._side_by_side import compare
from art_saliency.data import load_data
from art_saliency.errors import CheckpointError, InputError, MissingDependencyError, UnsupportedModelError
from art_saliency.evaluation import report as module
from art_saliency.evaluation._report_page import Evaluation
from art_saliency.evaluation.accuracy import pgd_accuracy
from art_saliency.evaluation.audit import AuditBudget, audit
from art_saliency.evaluation.autoattack import autoattack
from art_saliency.evaluation.corruptions import corruption_accuracy
from art_saliency.evaluation.figures_report import distance_surface, loss_surface, loss_surface_figure
from art_saliency.evaluation.report import STEPS, full_report
from art_saliency.evaluation.report_text import markdown
from art_saliency.evaluation.saliency import saliency_report
from art_saliency.evaluation.summary import summarise
from art_saliency.evaluation.transfer import transfer
from art_saliency.networks import build_network
from art_saliency.threat import ThreatModel
from tests.helpers import plainly_trained, spell, write_few_digits

QUICK = AuditBudget(max_iter=4, restarts=1, long=1, noise_draws=2, square_queries=10)


@pytest.fixture(scope="module")
def network():
    """A standard network on digits: a few steps, so that some images stand and some fall."""
    model, data = plainly_trained(width=6, epochs=6, lr=0.02)
    return model, data.x_test[:30], data.y_test[:30]


@pytest.fixture(scope="module")
def report(network):
    model, x, y = network
    twin = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4)
    return full_report(
        model, x, y, eps=0.05, name="net", data_name="digits", budget=QUICK, audit_images=20, saliency_images=8,
        surrogates={"twin": twin}, progress=False,
    )  # fmt: skip


LEAST = AuditBudget(max_iter=1, restarts=1, long=1, noise_draws=1, square_queries=1, repeats=1, eot=1)
LINF = ThreatModel("Linf", 0.05)

MEASURES = {
    "PGD": lambda of, **how: pgd_accuracy(*of, threat=LINF, max_iter=1, **how),
    "AutoAttack": lambda of, **how: autoattack(
        *of, eps=0.05, version="custom", attacks=["square"], square_queries=np.int64(2), progress=False, **how
    ).to_json(),
    "audit": lambda of, **how: audit(*of, eps=0.05, budget=LEAST, progress=False, **how).to_json(),
    "transfer": lambda of, **how: transfer(
        *of, surrogates={"itself": of[0]}, threat=LINF, max_iter=np.int64(1), **how
    ).to_json(),
    "corruptions": lambda of, **how: corruption_accuracy(
        *of, corruptions=["shot_noise"], severities=np.array([1]), **how
    ).to_json(),
    "saliency": lambda of, **how: saliency_report(
        *of, of[1], saliency_map="smoothgrad", steps=1, samples=np.int64(1), stages=np.int64(1), **how
    ).to_json(),
}
"""The parts of a report that draw random numbers, each alone."""


@pytest.mark.parametrize("name", MEASURES)
def test_numpys_whole_numbers_are_pythons_and_a_seed_that_starts_no_generator_is_refused(network, name):
    of = (network[0], network[1][:3], network[2][:3])
    pages = [MEASURES[name](of, seed=kind(2), batch_size=kind(2)) for kind in (int, np.int64)]
    plain, numpys = (re.sub(r'"seconds": [^,}]*', "", json.dumps(page)) for page in pages)
    assert plain == numpys
    for seed in (-1, 2**64, 1.0, "0", None):
        with pytest.raises(InputError, match=rf"^seed: got {seed!r}, expected a whole number"):
            MEASURES[name](of, seed=seed)


@pytest.mark.parametrize("name", [*MEASURES, "summary"])
def test_bytes_of_0_and_1_alone_would_be_black_and_are_refused(network, name):
    measure = {**MEASURES, "summary": lambda of: summarise(*of, threat=LINF)}[name]
    with pytest.raises(InputError, match=r"^x: got uint8 of 0 and 1 alone, .*: convert it to float$"):
        measure((network[0], (network[1][:3] > 0.5).byte(), network[2][:3]))


def test_a_report_and_an_audits_budget_take_numpys_whole_numbers(network):
    assert type(AuditBudget(square_queries=np.int64(5)).square_queries) is int
    with pytest.raises(InputError, match=r"^long: got 0, expected a whole number, 1 <= long"):
        AuditBudget(long=0)
    found = full_report(
        network[0], network[1][:3], network[2][:3], eps=0.05, budget=LEAST, saliency_images=1, version="rand",
        corrupt=False, batch_size=np.int64(3), seed=np.int64(0), progress=False,
    )  # fmt: skip
    assert json.loads(json.dumps(found.page))["seed"] == 0
    with pytest.raises(InputError, match=r"^seed: got -1"):
        full_report(*network, eps=0.05, seed=-1)


def rows_of(value, path=""):
    """Every place in a page that holds an accuracy."""
    if isinstance(value, dict):
        if "accuracy" in value and isinstance(value["accuracy"], float):
            yield path, value
        for key, item in value.items():
            yield from rows_of(item, f"{path}/{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from rows_of(item, f"{path}/{number}")


def test_every_accuracy_has_its_interval(report):
    found = list(rows_of(report.page))
    assert len(found) > 60
    for path, row in found:
        low, high = row["interval_95"]
        assert low - 1e-9 <= row["accuracy"] <= high + 1e-9, path
    page = report.page
    assert page["autoattack"]["accuracy"] <= page["pgd20"]["accuracy"] <= page["clean"]["accuracy"]
    assert list(page["accuracy_against_steps"]) == [str(n) for n in STEPS]
    left = [row["accuracy"] for row in page["waterfall"].values()]
    assert left == sorted(left, reverse=True)
    assert left[0] == page["clean"]["accuracy"]
    assert left[-1] == page["autoattack"]["accuracy"]
    radii = page["accuracy_against_eps"]
    assert next(iter(radii)) == "0"
    assert radii["0"]["accuracy"] == page["audit"]["accuracies"]["clean"]["accuracy"]
    assert [float(eps) for eps in radii] == sorted(map(float, radii))


def test_every_key_is_documented_and_no_other(report):
    text = files("art_saliency.evaluation").joinpath("report.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`(\w+)`", " ".join(table)))
    assert documented == set(report.page)
    assert f"schema {module.SCHEMA}" in text


def test_it_is_written_whole_and_reads_on_its_own(report, tmp_path):
    folder = report.write(tmp_path / "deep" / "report")
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report.page))
    text = (folder / "report.md").read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors(256) or range(300)) > 20, "an empty picture"
    assert len(re.findall(r"!\[", text)) == 5
    assert report.audit.verdict in text
    assert all(check.name in text for check in report.audit.checks)
    assert "twin" in text
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    with pytest.raises(InputError, match="which is there already"):
        report.write(folder)


def test_a_report_that_cannot_be_finished_leaves_the_old_one(report, tmp_path, monkeypatch):
    folder = report.write(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupted(page, figures):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "markdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_report_that_cannot_take_its_place_leaves_the_old_one(report, tmp_path, monkeypatch):
    folder = report.write(tmp_path / "report")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rename, moves = os.rename, []

    def failing(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        report.write(folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_was_done_is_said_as_it_was_done(report, tmp_path, monkeypatch):
    """The audit's budget, not the usual one, is in words and titles; a mean says of what."""
    titles = []
    monkeypatch.setattr(module.draw, "accuracy_curve", lambda _, path, **said: titles.append(said["title"]) or path)
    figures = report.draw_figures(tmp_path)
    text = markdown(report.page, [path.relative_to(tmp_path) for path in figures])
    assert f"PGD-{QUICK.max_iter})" in titles[0]
    assert f"the worst of PGD-{QUICK.max_iter} on cross-entropy" in text
    assert "PGD-50" not in text + titles[0]
    assert f"| corruptions, mean of {len(report.page['corruptions']['corruptions'])} " in text


def test_arrays_are_measured_in_batches_of_the_size_asked_for(network, monkeypatch):
    asked = {}
    monkeypatch.setattr(module, "array_corruption_accuracy", lambda *_, **options: asked.update(options))
    model, x, y = network
    module._from_arrays(Evaluation(model, x, y, ThreatModel("Linf", 0.1), 7, 0, False), "folder")
    assert asked["batch_size"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "L2", "eps": 9}, "eps: got 9, expected 0 < eps <= 8"),
        ({"double": True}, "model: got a network of torch.float64"),
    ],
)
def test_what_a_part_would_refuse_in_the_end_is_refused_at_once(network, monkeypatch, change, message):
    model, x, y = network
    monkeypatch.setattr(module, "accuracy", lambda *_, **__: pytest.fail("something was measured"))
    options = {"eps": 0.1, **change}
    model = copy.deepcopy(model).double() if options.pop("double", False) else model
    with pytest.raises((InputError, UnsupportedModelError), match=message):
        full_report(model, x, y, progress=False, **options)


@pytest.mark.parametrize(
    ("package", "extra"), [("matplotlib", "eval"), ("captum.metrics", "explain"), ("skimage", "corruptions")]
)
def test_a_package_that_the_last_part_needs_is_missed_at_once(network, runs, monkeypatch, capsys, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(module, "accuracy", lambda *_, **__: pytest.fail("something was measured"))
    with pytest.raises(MissingDependencyError, match=f"art-saliency.{extra}."):
        full_report(*network, eps=0.1, progress=False)
    assert main(["evaluate", str(runs / "standard"), "--full", "--quiet", "--force", "--device", "cpu"]) == 2
    assert f"pip install 'art-saliency[{extra}]'" in capsys.readouterr().err
    if extra == "eval":  # two networks are drawn side by side
        words = [str(runs / "standard"), str(runs / "fgsm-rs"), "--out", str(runs / "both")]
        assert main(["evaluate", *words, "--quiet", "--force"]) == 2


ARRAYS = {
    "shape": ((10, 9, 9), 0, "images of shape (1, 9, 9), expected (1, 8, 8), which the network takes"),
    "classes": ((10, 8, 8), 10, "labels from 10 to 10, expected labels from 0 to 9"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_corrupted_arrays_of_other_images_or_classes_are_refused_at_once(
    network, runs, tmp_path, monkeypatch, capsys, case
):
    shape, label, message = ARRAYS[case]
    np.save(tmp_path / "fog.npy", np.full(shape, 9, np.uint8))
    np.save(tmp_path / "labels.npy", np.full(shape[0], label))
    monkeypatch.setattr(module, "accuracy", lambda *_, **__: pytest.fail("something was measured"))
    with pytest.raises(InputError, match=re.escape(message)):
        full_report(*network, eps=0.1, corruption_folder=tmp_path, progress=False)
    words = ["evaluate", str(runs / "standard"), "--full", "--corruptions", str(tmp_path), "--quiet", "--force"]
    assert main([*words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_are_not_corrupted_but_drawn_by_their_mean(channels, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 36, 3))
        x, y = torch.rand(3, channels, 6, 6), torch.arange(3)
    options = {"eps": 0.05, "budget": LEAST, "saliency_images": 2, "version": "rand", "progress": False}
    message = f"x: got images of {channels} channels, expected 1 or 3; say corrupt=False to leave the corruptions out"
    with pytest.raises(InputError, match=f"^{message}$"):
        full_report(model, x, y, **options)
    pictures, draw = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, p, **o: (pictures.append(p), draw(self, p, **o))[1])
    assert (
        full_report(model, x, y, corrupt=False, **options).write(tmp_path / "r") / "figures" / "saliency.png"
    ).exists()
    assert np.array_equal(pictures[0], x[0].mean(0).numpy())


def test_a_loss_surface_is_the_margin_at_its_places():
    """Of a linear network, by hand: it rises along the gradient's sign by the sum of its weights, and is flat across classes."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0] * 4]))
        model[1].bias.zero_()
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    places, surface = loss_surface(model, x, y, threat=ThreatModel("Linf", 0.1), reach=2.0)
    middle = len(places) // 2
    assert abs(float(places[middle])) < 1e-6
    torch.testing.assert_close(surface[middle], 1.0 + 0.1 * places * 10)  # -w.x = 1 at x = 1/2; ||w||_1 = 10
    assert surface.shape == (len(places), len(places))


def test_the_ball_in_a_loss_surface_is_a_diamond_or_an_ellipse_and_not_a_square(monkeypatch, tmp_path):
    """Worked out from the two directions alone: |a| + |b| for signs, which agree somewhere and differ somewhere else."""
    from matplotlib.axes import Axes

    torch.manual_seed(1)  # the random direction's seed is 0
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    x, y = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    drawn = []
    monkeypatch.setattr(Axes, "contour", lambda self, *given, **options: drawn.append((*given, options["levels"])))
    for norm in ("Linf", "L2"):
        threat = ThreatModel(norm, 0.1)
        places, distances = distance_surface(model, x, y, threat=threat)
        across, along = places[:, None].double(), places[None, :].double()
        if norm == "Linf":
            expected = across.abs() + along.abs()
        else:
            corner = float(distances[-1, -1]) ** 2  # 4 + 4 + 8 cos: what is left to know is the directions' angle
            expected = (across**2 + along**2 + 2 * across * along * (corner - 8) / 8).clamp_min(0).sqrt()
            assert abs(corner - 8) < 4
        torch.testing.assert_close(distances.double(), expected, atol=1e-4, rtol=0)
        loss_surface_figure(model, x, y, tmp_path / "surface.png", threat=threat, title="t")
        assert torch.equal(drawn[-1][2], distances)
        assert drawn[-1][3] == [1.0]


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for method in ("standard", "fgsm-rs"):
        words = spell("train", method, data="digits", eps=0.1, epochs=2, width=6, device="cpu")
        assert main([*words, "--quiet", "--out", str(place / method)]) == 0
    return place


def test_evaluate_full_writes_a_report_with_three_surrogates(runs, capsys, monkeypatch):
    monkeypatch.setattr("art_saliency.evaluation.audit.AuditBudget", lambda: QUICK)
    words = spell("evaluate", runs / "fgsm-rs", full=True, images=16, audit_images=12, device="cpu", quiet=True)
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "Audit: " in out
    assert err == ""
    page = json.loads((runs / "fgsm-rs" / "report" / "report.json").read_text())
    assert set(page["transfer"]["surrogates"]) == {"standard", "pgd-at", "same recipe, other seed"}
    assert main(words) == 2
    assert "add --force" in capsys.readouterr().err
    state = runs / "fgsm-rs" / "autoattack-state"
    assert not state.exists(), "what an interrupted report would go on from is not left behind"
    with monkeypatch.context() as patch:
        patch.setattr("art_saliency.evaluation.report.transfer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*words, "--force"])
        patch.setattr("art_saliency.evaluation.report.audit", lambda *_, **__: 1 / 0)
        patch.setattr("torch.get_num_threads", lambda: 77)
        with pytest.raises(ZeroDivisionError):  # and not refused for what lies there of other threads
            main([*words, "--force", "--no-surrogates"])
    assert len(list(state.iterdir())) == 2
    left = sorted(state.rglob("*"))
    assert main([*words, "--force", "--images", "14", "--no-surrogates"]) == 0, "of other images: a report of its own"
    assert sorted(state.rglob("*")) == left, "what the interrupted report goes on from is still there"


def test_several_runs_are_put_side_by_side(runs, capsys, tmp_path):
    out = tmp_path / "both"
    words = ["evaluate", str(runs / "standard"), str(runs / "fgsm-rs"), "--images", "12", "--device", "cpu", "--quiet"]
    assert main([*words, "--out", str(out), "--force"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| standard") == 3  # its own table, and name and method in the common one
    assert shown.count("\n\ntest images of digits, Linf eps 0.1\n") == 2
    assert "\n\ntest images of digits, Linf eps 0.1, AutoAttack version standard\n" in shown
    page = json.loads((out / "comparison.json").read_text())
    assert list(page) == ["standard", "fgsm-rs"]
    page["fgsm-rs"]["autoattack_details"]["eps"] = 0.25
    compare(page, tmp_path / "differing")
    shown = (tmp_path / "differing" / "comparison.md").read_text()
    assert [line.split("|")[3].strip() for line in shown.splitlines()[:4:2]] == ["threat model", "Linf eps 0.1"]
    assert "| Linf eps 0.25 |" in shown
    assert "\n\ntest images of digits, AutoAttack version standard\n" in shown
    with Image.open(out / "comparison.png") as image:
        assert min(image.size) > 300
    assert main([*words, "--out", str(out)]) == 2
    assert "add --force" in capsys.readouterr().err


def test_all_runs_are_opened_before_the_first_is_worked_on(runs, capsys, tmp_path, monkeypatch):
    """The second one's weights, its data, the images it has, and the surrogates."""
    monkeypatch.setattr("art_saliency.evaluation.summary.summarise", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    bad, small = tmp_path / "bad", tmp_path / "small"
    for copied in (bad, small):
        shutil.copytree(runs / "fgsm-rs", copied)
    (bad / "weights.pt").write_bytes((bad / "weights.pt").read_bytes()[:1000])
    page = json.loads((small / "run.json").read_text())
    data = load_data(write_few_digits(tmp_path / "few.npz", 60, 10))
    page["data"] = {"spec": str(tmp_path / "few.npz"), "fingerprint": data.fingerprint()}
    (small / "run.json").write_text(json.dumps(page))
    first = str(runs / "standard")
    for words, said in (
        ([first, str(bad)], "damaged"),
        ([first, str(small), "--images", "12"], "--images: got 12, expected a whole number, 1 <= --images <= 10"),
        ([first, "--full", "--surrogate", str(bad)], "damaged"),
    ):
        assert main(["evaluate", *words, "--force", "--device", "cpu", "--quiet"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{standard}", "{standard}"], "the same run twice"),
        (["{standard}", "nowhere"], "nowhere: no run.json"),
        (["{standard}", "--version", "fast"], "--version: got 'fast'"),
        (["{standard}", "--images", "0"], "--images: got 0"),
        (["{standard}", "--eps", "2"], "eps: got 2"),
        (["{standard}", "--eps", "0"], "--eps: got 0, expected 0 < --eps"),
        (["{standard}", "--full", "--surrogate", "nowhere"], "nowhere: no run.json"),
        (["{standard}", "--full", "--audit-images", "0"], "--audit-images: got 0"),
        (["{standard}", "--audit-images", "9"], "--audit-images: got 9, expected no such option without --full"),
        (["{standard}", "--no-surrogates"], "--no-surrogates: got it, expected no such option without --full"),
        (["{standard}", "--out", "x"], "--out: got 'x', expected no such option with one run"),
        (["{standard}", "--full", "--corruptions", "nowhere"], "nowhere: no CORRUPTION.npy in it"),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(runs, capsys, monkeypatch, words, message, tmp_path):
    given = [word.format(standard=runs / "standard") for word in words]
    before = sorted(path.name for path in (runs / "standard").iterdir())
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *given, "--force", "--device", "cpu", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in (runs / "standard").iterdir()) == before


def test_what_runs_for_few_classes_is_not_called_the_standard_version(tmp_path, capsys, monkeypatch):
    """Two and five classes: evaluate's table, the report, the comparison, where they are two conditions, and compare's table."""
    data = load_data("digits")
    monkeypatch.setattr("art_saliency.evaluation.audit.AuditBudget", lambda: QUICK)
    same = {"eps": 0.1, "epochs": 1, "width": 4, "device": "cpu", "quiet": True}
    for classes in (2, 5):
        parts = {}
        for part, count in (("train", 60), ("test", 6)):
            x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
            parts |= {f"x_{part}": x[y < classes][:count].numpy(), f"y_{part}": y[y < classes][:count].numpy()}
        np.savez(tmp_path / f"{classes}.npz", **parts)
        out = tmp_path / f"run{classes}"
        assert main(spell("train", "standard", data=tmp_path / f"{classes}.npz", out=out, **same)) == 0
    words = [str(tmp_path / "run2"), str(tmp_path / "run5"), "--device", "cpu", "--quiet"]
    capsys.readouterr()
    assert main(["evaluate", *words, "--out", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    assert "| AutoAttack (standard, changed: 5 classes)" in shown
    assert "standard)" not in shown
    lines = (tmp_path / "both" / "comparison.md").read_text().splitlines()
    assert "| AutoAttack " in lines[0]
    for classes, line in zip((2, 5), lines[2:4], strict=True):
        assert f"| standard, changed: {classes} classes " in line
    assert "AutoAttack: 5 classes: apgd-t and fab-t with 4 instead of 9 targets" in lines
    assert "AutoAttack: 2 classes: apgd-t needs 4 and is left out" in lines
    assert main(["evaluate", words[1], "--full", "--no-surrogates", *words[2:]]) == 0
    report = (tmp_path / "run5" / "report" / "report.md").read_text()
    assert "stand against AutoAttack (standard, changed: 5 classes). Audit: " in report
    assert "AutoAttack (standard)" not in report
    assert main(spell("compare", arms="standard", data=tmp_path / "5.npz", out=tmp_path / "arms", **same)) == 0
    results = (tmp_path / "arms" / "results.md").read_text()
    assert "AutoAttack: version standard, changed: 5 classes, by " in results
    assert results.endswith("\n\nAutoAttack: 5 classes: apgd-t and fab-t with 4 instead of 9 targets\n")


def test_what_an_attack_would_refuse_is_refused_before_the_first_run_is_measured(tmp_path, capsys, monkeypatch):
    """Images too small for the tiles of Square under L2, those of the second run, and a radius beyond the audit's."""
    for side in (14, 15):
        parts = {f"x_{part}": torch.rand(20, 1, side, side).numpy() for part in ("train", "test")}
        np.savez(tmp_path / f"{side}.npz", **parts, y_train=np.arange(20) % 10, y_test=np.arange(20) % 10)
        words = spell("train", "standard", data=tmp_path / f"{side}.npz", out=tmp_path / f"run{side}", width=4)
        assert main([*words, *spell(eps=0.1, epochs=1, device="cpu", quiet=True)]) == 0
    before = sorted(tmp_path.rglob("*"))
    for part in ("trainers.arms.try_arms", "evaluation.summary.summarise", "trainers.surrogates.train_surrogates"):
        monkeypatch.setattr(f"art_saliency.{part}", lambda *_, **__: 1 / 0)
    runs = [str(tmp_path / "run15"), str(tmp_path / "run14")]
    tiles = "--norm: got L2 with images of 14 x 14 pixels, expected sides that Square's tiles"
    capsys.readouterr()
    for given, said in (
        (["evaluate", *runs, "--norm", "L2", "--out", str(tmp_path / "both")], tiles),
        (spell("compare", data=tmp_path / "14.npz", norm="L2", out=tmp_path / "arms"), tiles),
        (spell("evaluate", runs[0], full=True, norm="L2", eps=100), "eps: got 100, expected 0 < eps <= 15"),
    ):
        assert main([*given, "--device", "cpu", "--quiet"]) == 2
        assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_by_a_method_of_the_users_own_is_evaluated_without_copies_of_it(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("art_saliency.evaluation.audit.AuditBudget", lambda: QUICK)
    shutil.copytree(runs / "fgsm-rs", run := tmp_path / "own", ignore=shutil.ignore_patterns("report"))
    page = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**page, "method": "my-defence"}))
    assert main(spell("evaluate", run, full=True, images=6, audit_images=6, device="cpu")) == 0
    out, err = capsys.readouterr()
    assert "my-defence, 6 images" in out
    assert "'my-defence' is no method known here (--surrogate DIR)" in err
    assert json.loads((run / "report" / "report.json").read_text())["transfer"] is None
