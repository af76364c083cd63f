"""``art-saliency explain`` as a user meets it, and its figure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from art_saliency import load
from art_saliency.attacks import pgd
from art_saliency.cli import main
from art_saliency.cli.explain import _MAPS
from art_saliency.data import load_data
from art_saliency.errors import CheckpointError
from art_saliency.evaluation.figures_maps import maps_panel
from art_saliency.evaluation.saliency import saliency_report
from art_saliency.evaluation.saliency_maps import named_maps
from art_saliency.evaluation.saliency_metrics import etmann_alignment
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from tests.helpers import spell, write_few_digits

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A short run on a few digits; nothing else in the folder of the run but what training wrote."""
    folder = tmp_path_factory.mktemp("explain")
    few = write_few_digits(folder / "few.npz", 200, 30)
    words = spell("train", "fgsm-rs", data=few, eps=0.1, epochs=2, width=4)
    assert main([*words, "--out", str(folder / "run"), "--device", "cpu", "--quiet"]) == 0
    return folder


@pytest.fixture
def run(place, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def table(printed, first):
    """The cells of the table whose header begins with these words."""
    lines = printed.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("| image") and first in line)
    body = lines[start + 2 :]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in body[: next((k for k, line in enumerate(body) if not line.startswith("|")), len(body))]
    ]


def test_it_draws_and_measures_the_images_asked_for(run, capsys):
    words = ["explain", str(run), "--index", "7", "--index", "3", "--index", "7", "--maps", "smoothgrad,loss-gradient"]
    assert main([*words, "--eps", "16/255", "--seed", "5", "--device", "cpu", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (run / "explain.png").read_bytes().startswith(PNG)
    assert out.endswith(f"Written to {run / 'explain.png'}\n")

    model = load(run).model
    data = load_data(json.loads((run / "run.json").read_text())["data"]["spec"])
    x, y = data.x_test[[7, 3]], data.y_test[[7, 3]]
    x_adv = pgd(model, x, y, threat=ThreatModel("Linf", 16 / 255), max_iter=20, random=RandomSource(5))
    with torch.no_grad():
        guesses = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    first = table(out, "true")
    assert [row[:4] for row in first] == [
        [str(i), str(int(y[k])), str(guesses[0][k]), str(guesses[1][k])] for k, i in enumerate((7, 3))
    ]
    sure = model(x).softmax(1).detach()
    assert [float(row[4]) for row in first] == pytest.approx([float(sure[k, y[k]]) for k in (0, 1)], abs=0.0051)
    assert [float(row[5]) for row in first] == pytest.approx(etmann_alignment(model, x).tolist(), abs=0.0051)
    rows = table(out, "map")
    assert [row[:2] for row in rows] == [[i, m] for i in ("7", "3") for m in ("smoothgrad", "loss-gradient")]
    columns = (
        *("consensus", "top_overlap", "gini", "top_mass", "edge_alignment"),
        *("insertion", "deletion"),
    )
    for row in rows:
        report = saliency_report(model, x, y, x_adv, saliency_map=row[1], stages=1, seed=5)
        expected = [float(report.values[name][("7", "3").index(row[0])]) for name in columns]
        assert [float(cell) for cell in row[2:]] == pytest.approx(expected, abs=0.0051)


def test_without_words_it_draws_every_map_at_the_runs_radius_and_says_what_is_what(run, tmp_path, capsys):
    out, before = tmp_path / "all.png", set(run.iterdir())
    assert main(["explain", str(run), "--index", "0", "--out", str(out), "--device", "cpu"]) == 0
    printed, err = capsys.readouterr()
    assert "Linf eps 0.1" in err
    assert [row[1] for row in table(printed, "map")] == list(named_maps())
    assert "edges: rank correlation of importance and the image's Sobel edges" in printed
    assert out.read_bytes().startswith(PNG)
    assert set(run.iterdir()) == before


def test_a_figure_that_is_there_is_replaced_only_by_force(run, capsys):
    (run / "explain.png").write_bytes(b"mine")
    words = ["explain", str(run), "--index", "0", "--maps", "loss-gradient", "--device", "cpu", "--quiet"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "which is there already, expected a new file; add --force" in err
    assert (run / "explain.png").read_bytes() == b"mine"
    assert main([*words, "--force"]) == 0
    assert (run / "explain.png").read_bytes().startswith(PNG)


def test_the_same_words_give_the_same_table_and_figure(run, tmp_path, capsys):
    seen = []
    for name in ("a.png", "b.png"):
        words = ["explain", str(run), "--index", "2", "--maps", "smoothgrad", "--device", "cpu", "--quiet"]
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        seen.append((capsys.readouterr().out.replace(name, ""), (tmp_path / name).read_bytes()))
    assert seen[0] == seen[1]


WRONG = {
    "index beyond": (["--index", "30"], "--index: got 30, expected a whole number, 0 <= --index <= 29"),
    "index below": (["--index", "-1"], "--index: got -1"),
    "too many": ([w for i in range(17) for w in ("--index", str(i))], "--index: got 17 images, expected at most 16"),
    "map": (["--index", "0", "--maps", "loss-gradient,smoothgrd"], "did you mean 'smoothgrad'"),
    "no map": (["--index", "0", "--maps", ""], "--maps: got ''"),
    "eps": (["--index", "0", "--eps", "8"], "eps: got 8, expected 0 <= eps <= 1"),
    "norm": (["--index", "0", "--norm", "L1"], "norm: got 'L1'"),
    "seed": (["--index", "0", "--seed", "-1"], "--seed: got -1"),
    "device": (["--index", "0", "--device", "gpu"], "auto, cpu, cuda or cuda:N"),
    "no picture": (["--index", "0", "--out", "maps.pdf"], "expected a file that ends in .png"),
    "no folder": (["--index", "0", "--out", "nowhere/maps.png"], "make nowhere first"),
    "a folder": (["--index", "0", "--out", "folder.png"], "folder.png, which is a folder"),
    "data": (["--index", "0", "--data", "nowhere.npz"], "nowhere.npz"),
    "other shape": (["--index", "0", "--data", "wide.npz"], "images of shape (1, 9, 9), expected (1, 8, 8)"),
    "bits": (["--index", "0", "--data", "bits.npz"], "x_test: got uint8 of 0 and 1 alone"),
    "other classes": (["--index", "0", "--data", "many.npz"], "labels from 11 to 11, expected labels from 0 to 9"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_word_is_explained_in_one_sentence_and_leaves_nothing(kind, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for name, size, label, kind_of_pixel in (
        ("wide.npz", 9, 1, np.float32), ("many.npz", 8, 11, np.float32), ("bits.npz", 8, 1, np.uint8)
    ):  # fmt: skip
        x, y = np.zeros((12, 1, size, size), kind_of_pixel), np.full(12, label)
        y[1:] = np.arange(11)
        x[0, 0, 0, 0] = 1
        np.savez(tmp_path / name, x_train=x, y_train=y, x_test=x, y_test=y)
    before = sorted(tmp_path.rglob("*"))
    words, expected = WRONG[kind]
    assert main(["explain", str(run), *words, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("art-saliency explain: error: ")
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [["explain"], ["explain", "x"], ["explain", "x", "--index", "a"]])
def test_words_that_do_not_parse_end_with_2_and_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: art-saliency explain" in capsys.readouterr().err


def damage(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_content(path):
    page = json.loads(path.read_text())
    page["data"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(page))


def without_radius(path):
    page = json.loads(path.read_text())
    del page["settings"]["eps"]
    path.write_text(json.dumps(page))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights.pt", damage, "expected a state dict that torch.load"),
        ("weights.pt", lambda path: path.unlink(), "no such file"),
        ("run.json", damage, "damaged"),
        ("run.json", lambda path: path.unlink(), "no run.json"),
        ("run.json", other_content, "with other content than in training"),
        ("run.json", without_radius, "--eps: got nothing, expected a radius"),
    ],
)
def test_a_damaged_run_is_refused(run, name, change, words, capsys):
    change(run / name)
    before = sorted(run.iterdir())
    assert main(["explain", str(run), "--index", "0", "--device", "cpu", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert sorted(run.iterdir()) == before


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "nowhere"), "--index", "0"]) == 2
    assert "nowhere: no run.json" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "occlusion"), ("captum.attr", "smoothgrad")])
def test_a_package_that_is_missing_is_named_with_its_extra(run, package, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["explain", str(run), "--index", "0", "--maps", name, "--device", "cpu", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"needs the package '{package.split('.')[0]}'" in err
    assert "pip install 'art-saliency[explain]'" in err
    assert not (run / "explain.png").exists()


def test_help_names_every_map_and_answers_without_torch():
    code = "import sys; from art_saliency.cli import main\ntry: main(['explain', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "art-saliency explain runs/digits --index 7" in done.stdout.split("Examples:")[1]
    assert done.stdout.endswith("False\n")
    assert _MAPS.split(",") == list(named_maps())


# ---- the figure ----------------------------------------------------------------------------------------------------


def drawn(monkeypatch, model, x, x_adv, y, maps, **options):
    """The figure's own words and pictures, caught before they become pixels."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: kept.append(self))
    maps_panel(model, x, x_adv, y, maps, options.pop("path"), title="t", **options)
    return kept[0].axes


def test_the_figure_shows_what_the_network_says_and_the_maps_by_their_shape(monkeypatch, tmp_path):
    class Corner(torch.nn.Module):
        """Class 1 where the first pixel is bright."""

        def forward(self, x):
            return torch.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], 1)

    x, x_adv, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    x_adv[0, 0, 0, 0] = 1
    gradient = named_maps()["loss-gradient"]
    maps = {"loss-gradient": (gradient(Corner(), x, y), gradient(Corner(), x_adv, y)), "ignores": (0 * x, 0 * x)}
    options = {"names": ["image 4", "image 9"], "classes": ("dark", "bright"), "path": tmp_path / "a.png"}
    axes = drawn(monkeypatch, Corner(), x, x_adv, y, maps, **options)
    assert len(axes) == 2 * 2 * 3
    firsts = axes[::3]
    expected = [("dark → dark", True), ("dark → bright", False), ("bright → dark", False), ("bright → dark", False)]
    for axis, (text, right) in zip(firsts, expected, strict=True):
        assert axis.get_title() == text
        assert axis.title.get_color() == ("#1b5e20" if right else "#b00020")
    labels = [axis.get_ylabel() for axis in firsts]
    assert labels == ["image 4\nclean", "image 4\nadversarial", "image 9\nclean", "image 9\nadversarial"]
    assert [axis.get_title() for axis in axes[1:3]] == ["loss\ngradient", "ignores"]
    assert axes[4].get_title() == "cos 1.00"
    assert axes[5].get_title() == "a map is 0"
    picture = np.asarray(axes[1].images[0].get_array())
    assert picture[0, 0] == 1
    assert picture.sum() == 1
    assert axes[2].images[0].get_array().max() == 0


def test_no_label_meets_another(tmp_path, monkeypatch):
    """Long names of classes and every map: the boxes that the texts take on paper are apart."""
    from matplotlib.figure import Figure

    kept = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), real(self, *a, **k))[1])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    path = maps_panel(
        model,
        x,
        x,
        y,
        dict.fromkeys(named_maps(), (x, x)),
        tmp_path / "a.png",
        title="t",
        names=["image 1", "image 59999"],
        classes=("automobile", "Chesapeake Bay retriever"),
    )
    assert path.read_bytes().startswith(PNG)
    boxes = []
    renderer = kept[0].canvas.get_renderer()
    for axis in kept[0].axes:
        boxes += [text.get_window_extent(renderer) for text in (axis.title, axis.yaxis.label) if text.get_text()]
    boxes += [text.get_window_extent(renderer) for text in kept[0].texts]
    boxes += [axis.get_window_extent() for axis in kept[0].axes]
    boxes = [box.padded(-1) for box in boxes]  # pixels: letters end above the line of their box
    for k, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= kept[0].bbox.x1
        assert not [other.bounds for other in boxes[k + 1 :] if box.overlaps(other)], box.bounds


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    x, y = torch.rand(1, 3, 4, 4), torch.tensor([0])
    with pytest.raises(CheckpointError, match="could not be written"):
        maps_panel(model, x, x, y, {"a": (x, x)}, tmp_path / "no" / "a.png", title="t", names=["a"])
    assert not list(tmp_path.iterdir())
