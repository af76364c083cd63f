"""The stored experiments: every run is the grid's, every table and figure shows what the runs say, and the runner does what it says."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import benchmark  # noqa: E402
from benchmarking import grids, pages, running  # noqa: E402
from benchmarking.claims import CLAIMS, HEADLINE, TARGETS, Target  # noqa: E402
from benchmarking.figures import drawn, figure_names, frontier, recorded  # noqa: E402

from art_saliency.data import load_data  # noqa: E402
from art_saliency.errors import InputError  # noqa: E402
from art_saliency.training.engine import Engine  # noqa: E402
from tests.helpers import write_few_digits  # noqa: E402

RESULTS = ROOT / "examples" / "results"
STORED = sorted(RESULTS.glob("*/*.json"))


@pytest.fixture(scope="module")
def runs():
    return pages.load_runs(RESULTS)


# --- what is stored -------------------------------------------------------------------------------------------------


def test_pages_are_current(runs):
    stale = [str(path) for path, text in pages.rendered(runs, ROOT).items() if path.read_text() != text]
    assert stale == [], "python examples/benchmark.py pages"


@pytest.mark.parametrize("name", figure_names(pages.load_runs(RESULTS)))
def test_a_figure_shows_what_the_runs_say(name, runs):
    assert recorded(RESULTS / "figures" / f"{name}.png", runs, name), "python examples/benchmark.py pages"


@pytest.mark.parametrize("name", figure_names(pages.load_runs(RESULTS)))
def test_a_figure_has_something_in_every_panel_and_no_word_outside(name, runs):
    figure = drawn(runs, name)
    figure.draw_without_rendering()
    canvas = figure.bbox.padded(1)
    for axis in figure.get_axes():
        assert axis.has_data() or not axis.axison
        drawn_on = axis.get_tightbbox()
        assert drawn_on is None or (canvas.contains(*drawn_on.min) and canvas.contains(*drawn_on.max)), axis.get_title()


def test_the_frontier_is_of_arms_that_nothing_cheaper_or_as_cheap_beats():
    points = [(2.0, 30.0), (1.0, 0.0), (3.0, 30.0), (2.0, 40.0), (4.0, 39.0), (8.0, 41.0)]
    assert frontier(points) == [(1.0, 0.0), (2.0, 40.0), (8.0, 41.0)]
    for price, worth in points:
        beaten = any(p <= price and w >= worth and (p, w) != (price, worth) for p, w in points)
        assert ((price, worth) in frontier(points)) != beaten


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_stored_run_is_the_grids_own_and_can_be_traced(path):
    page = json.loads(path.read_text())
    assert page["arm"] in grids.GRIDS[page["grid"]].arms
    assert path == running.file_of(RESULTS, page["grid"], page["arm"], page["seed"])
    assert benchmark.standing(RESULTS, page["grid"], page["arm"], page["seed"]), "its settings are no longer the grid's"
    words = shlex.split(page["command"])
    assert words[:4] == ["python", "examples/benchmark.py", "run", page["grid"]]
    assert words[words.index("--arms") + 1] == page["arm"]
    assert words[-1] == str(page["seed"])
    assert len(page["data_sha256"]) == len(page["autoattack_details"]["weights_sha256"]) == 64
    assert {"python", "torch", "numpy", "art-saliency", "pyautoattack"} <= set(page["versions"])
    assert len(page["history"]["loss"]) == grids.GRIDS[page["grid"]].epochs
    assert page["autoattack"]["accuracy"] <= page["pgd20"]["accuracy"] <= page["clean"]["accuracy"]
    maps = page["maps"]
    assert len(base64.b64decode(maps["base64"])) == np.prod(maps["shape"])


def test_one_data_set_a_grid():
    found = {}
    for path in STORED:
        page = json.loads(path.read_text())
        found.setdefault(page["grid"], set()).add(page["data_sha256"])
    assert found == {grid: {grids.GRIDS[grid].data_sha256} for grid in found}


def test_one_pair_of_surrogates_a_grid_and_seed():
    found = {}
    for path in STORED:
        page = json.loads(path.read_text())
        key = page["grid"], page["seed"]
        found.setdefault(key, set()).add(json.dumps(page["transfer"]["surrogates_sha256"], sort_keys=True))
    assert {key: len(pairs) for key, pairs in found.items()} == dict.fromkeys(found, 1)


# --- what is declared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", grids.GRIDS)
def test_every_arm_of_a_grid_can_be_trained_and_has_a_file_of_its_own(key):
    grid = grids.GRIDS[key]
    entries = [grids.contestant(name, grid) for name in grid.arms]
    assert len({running.file_of(RESULTS, key, e.name, 0).name for e in entries}) == len(grid.arms)
    for entry in entries:
        assert json.dumps(running.settings_of(grid, entry, 0))
        if entry.arm.trainer == "fsr":
            assert entry.arm.parameters["hidden"] == grid.hidden


def test_claims_name_arms_that_are_run():
    known = {*grids.GRIDS["digits"].arms, *grids.GRIDS["digits-held-out"].arms}
    for claim in CLAIMS.values():
        assert set(claim.arms) <= known
        assert {arm for pair in claim.differences for arm in pair} <= known
    headline = {*HEADLINE, *(arm for target in TARGETS for arm in (target.arm, target.versus))}
    assert headline == set(grids.HEADLINE_ARMS)
    assert headline <= set(grids.GRIDS["digits"].arms)


def test_a_grid_runs_its_headline_arms_with_more_seeds_than_others():
    grid = replace(grids.GRIDS["digits"], arms=("standard", "fsr+aalp", "pgd-at"), seeds=1, headline_seeds=2)
    assert grid.runs == [("standard", 0), ("fsr+aalp", 0), ("pgd-at", 0), ("standard", 1), ("pgd-at", 1)]
    assert replace(grid, headline_seeds=0).runs == grid.runs[:3]
    for found in grids.GRIDS.values():
        assert sorted(found.runs) == sorted((arm, seed) for arm in found.arms for seed in found.seeds_of(arm))


def test_what_is_tuned_is_judged_on_training_images_that_are_not_trained_on():
    grid = grids.GRIDS["digits-held-out"]
    data = running.read_data(grid, None)
    held_out = running._budget(grid, data, 0).data
    assert (len(held_out.y_train), len(held_out.y_test)) == (len(data.y_train) - grid.images, grid.images)
    rows = {image.numpy().tobytes() for image in data.x_train}
    assert {image.numpy().tobytes() for image in held_out.x_test} <= rows
    assert not {image.numpy().tobytes() for image in held_out.x_test} & {i.numpy().tobytes() for i in data.x_test}
    assert torch.equal(torch.cat([held_out.y_train, held_out.y_test]).bincount(), data.y_train.bincount())
    assert running._budget(grids.GRIDS["digits"], data, 0).data.x_test is data.x_test


def test_controls_differ_from_fsr_as_they_say():
    from art_saliency.methods.adapter import AdapterLayer
    from art_saliency.methods.fsr import FSRLayer
    from art_saliency.networks import build_network

    grid, x = grids.GRIDS["digits"], torch.rand(2, 1, 8, 8)

    def prepared(name):
        model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=16)
        bare = sum(p.numel() for p in model.parameters())
        grids.contestant(name, grid).prepare(model, x)
        return model, sum(p.numel() for p in model.parameters()) - bare

    adapter, more = prepared("adapter+pgd-at")
    noiseless, as_many = prepared("fsr+pgd-at without noise")
    assert [type(m) for m in adapter.modules() if isinstance(m, (AdapterLayer, FSRLayer))] == [AdapterLayer]
    assert abs(more - as_many) / as_many < 0.1
    noiseless.train()
    (layer,) = [m for m in noiseless.modules() if isinstance(m, FSRLayer)]
    f = torch.rand(2, layer.channels, 4, 4)
    assert layer.training
    assert torch.equal(layer.mask(f)[0], layer.mask(f)[0]), "noise"


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A grid of seconds."""
    small = replace(
        grids.GRIDS["digits"],
        epochs=1,
        train_images=128,
        images=16,
        seeds=2,
        headline_seeds=0,
        audited=0,
        arms=("standard", "fsr+pgd-at"),
        network={"name": "small-cnn", "activation": "relu", "width": 4},
        parameters={"max_iter": 1},
        hidden=4,
    )
    monkeypatch.setitem(grids.GRIDS, "digits", small)
    return small


def test_a_run_is_written_left_alone_and_made_anew_when_its_settings_change(tiny, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path)]
    assert benchmark.main(["run", "digits", "--seeds", "0", *out]) == 0
    files = sorted((tmp_path / "digits").glob("*.json"))
    assert [path.stem for path in files] == ["fsr+pgd-at-seed0", "standard-seed0"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert benchmark.main(["run", "digits", "--seeds", "0", *out]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    capsys.readouterr()
    assert benchmark.main(["list", *out]) == 0
    assert "digits: 2 of 4 runs; next: standard seed 1" in capsys.readouterr().out
    monkeypatch.setitem(grids.GRIDS, "digits", replace(tiny, audited=16))
    assert benchmark.main(["list", *out]) == 0
    assert "digits: 2 of 4 runs; 0 of 2 audits; next: standard seed 0" in capsys.readouterr().out
    assert benchmark.main(["run", "digits", "--seeds", "0", "--arms", "standard", *out]) == 0
    assert files[0].stat().st_mtime_ns == before[files[0]] < files[1].stat().st_mtime_ns > before[files[1]]
    assert benchmark.main(["list", *out]) == 0
    assert "digits: 2 of 4 runs; 1 of 2 audits; next: fsr+pgd-at seed 0" in capsys.readouterr().out
    monkeypatch.setitem(grids.GRIDS, "digits", replace(tiny, lr=0.02))
    assert not benchmark.standing(tmp_path, "digits", "standard", 0)
    monkeypatch.setitem(grids.GRIDS, "digits", tiny)
    assert benchmark.standing(tmp_path, "digits", "fsr+pgd-at", 0)
    for name in (
        "random_start",
        "lambda_sep",
    ):  # of the base method and of the layer: what a default was, when it was run
        page = json.loads(files[0].read_text())
        page["method"][name] = 0.5
        assert not running.stands(page)
        del page["method"][name]
        assert running.stands(page)
    page = json.loads(files[0].read_text())
    assert page["method"]["hidden"] == 4
    assert page["mask_share_inside"]
    assert page["data_sha256"]


def test_passes_are_counted_anew_in_units_of_the_bare_network_and_nothing_else_of_a_file_changes(
    tiny, tmp_path, capsys
):
    out = ["--out", str(tmp_path)]
    assert benchmark.main(["run", "digits", "--seeds", "0", *out]) == 0
    path, other = (running.file_of(tmp_path, "digits", name, 0) for name in ("fsr+pgd-at", "standard"))
    before, untouched = json.loads(path.read_text()), other.stat().st_mtime_ns
    assert before["cost"]["passes_per_step"] > 2.5, (
        "FSR's layer is larger than this network: its PGD-1 step costs more than its own 1.7"
    )
    counted = before["cost"].pop("passes_per_step")
    path.write_text(json.dumps({**before, "cost": {**before["cost"], "passes_per_step": 1.5}}))
    capsys.readouterr()
    assert benchmark.main(["recount", "digits", *out]) == 0
    assert capsys.readouterr().out == f"digits fsr+pgd-at seed 0: 1.5000 -> {counted:.4f}\n"
    after = json.loads(path.read_text())
    assert after["cost"].pop("passes_per_step") == counted
    assert (after, other.stat().st_mtime_ns) == (before, untouched)
    assert benchmark.main(["recount", "mnist-0.2", *out]) == 2
    assert "--data: got nothing" in capsys.readouterr().err


def _differences(first, second):
    """What two pages differ in beside the time it took."""
    for page in (first, second):
        page["autoattack_details"].pop("seconds")
        page["history"].pop("seconds")
        page["cost"].pop("seconds_per_epoch")
    return {key for key in {*first, *second} if first.get(key) != second.get(key)}


def test_equal_seeds_give_equal_networks(tiny, tmp_path):
    for folder in ("a", "b"):
        assert (
            benchmark.main(["run", "digits", "--arms", "standard", "--seeds", "1", "--out", str(tmp_path / folder)])
            == 0
        )
    first, second = (json.loads((tmp_path / f / "digits" / "standard-seed1.json").read_text()) for f in ("a", "b"))
    assert _differences(first, second) == set()


def test_runs_side_by_side_are_those_one_after_another_and_share_their_surrogates(tiny, tmp_path, capfd):
    assert benchmark.main(["run", "digits", "--out", str(tmp_path / "a")]) == 0
    one_by_one = capfd.readouterr().out.splitlines()
    kept = ["--checkpoints", str(tmp_path / "kept")]
    assert benchmark.main(["run", "digits", "--jobs", "2", "--out", str(tmp_path / "b"), *kept]) == 0
    beside = capfd.readouterr().out.splitlines()
    assert sorted(line.rpartition("  ")[0] for line in beside) == sorted(
        line.rpartition("  ")[0] for line in one_by_one
    )
    pages = {f: {p.name: json.loads(p.read_text()) for p in (tmp_path / f / "digits").iterdir()} for f in ("a", "b")}
    assert len(pages["a"]) == len(one_by_one) == 4
    for name, page in pages["a"].items():
        assert _differences(page, pages["b"][name]) == set()
    assert len(list((tmp_path / "kept" / "digits").iterdir())) == 4 + 2 * 2, "runs, and two surrogates a seed"
    assert benchmark.main(["run", "digits", "--jobs", "2", "--out", str(tmp_path / "b"), *kept]) == 0
    assert capfd.readouterr().out == "", "nothing is left to do"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_reaches_all_runs_side_by_side(tmp_path, capfd):
    kept, out = tmp_path / "trainings", tmp_path / "out"
    words = ["run", "digits", "--arms", "pgd-at,trades", "--jobs", "2", "--out", str(out), "--checkpoints", str(kept)]
    with subprocess.Popen([sys.executable, "examples/benchmark.py", *words], cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while (
            len(list(kept.glob("digits/*/checkpoint.lock"))) < 2 and time.monotonic() < deadline
        ):  # both are in their trainings
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.count("interrupted by SIGTERM") == 2
    assert not list(out.rglob("*.json"))


def test_a_run_says_of_each_image_whether_it_was_withstood(tiny, tmp_path):
    assert benchmark.main(["run", "digits", "--arms", "standard", "--seeds", "0", "--out", str(tmp_path)]) == 0
    page = json.loads((tmp_path / "digits" / "standard-seed0.json").read_text())
    for attack in ("autoattack", "transfer"):
        bits = page["withstood"][attack]
        assert set(bits) <= {"0", "1"}
        assert (len(bits), bits.count("1") / len(bits)) == (tiny.images, page[attack]["accuracy"])
    assert page["hardware"]["capability"] == torch.backends.cpu.get_cpu_capability()


def test_kept_trainings_are_gone_on_with_and_what_is_judged_anew_is_not_trained_anew(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(grids.GRIDS, "digits", replace(tiny, batch_size=64))  # two steps an epoch
    steps, backward = [], Engine.backward

    def counted(engine, loss):
        steps.append(loss)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        backward(engine, loss)

    def run(folder, *more):
        running._KEPT.clear()  # as a process of its own
        words = ["--arms", "fsr+pgd-at", "--seeds", "0", "--out", str(tmp_path / folder), *more]
        return benchmark.main(["run", "digits", *words])

    def page_in(folder):
        return json.loads((tmp_path / folder / "digits" / "fsr+pgd-at-seed0.json").read_text())

    kept = ["--checkpoints", str(tmp_path / "kept")]
    assert run("plain") == 0
    monkeypatch.setattr(Engine, "backward", counted)
    assert run("interrupted", *kept) == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM after step 1" in capsys.readouterr().err
    assert list((tmp_path / "interrupted").iterdir()) == []
    assert run("resumed", *kept) == 0
    assert len(steps) == 2 + 2 * 2, "the network's second step, and two of each surrogate"
    assert run("anew", *kept) == 0
    assert len(steps) == 2 + 2 * 2, "nothing is trained"
    assert page_in("resumed")["history"] == page_in("anew")["history"]
    assert _differences(page_in("plain"), page_in("resumed")) == set()
    assert _differences(page_in("plain"), page_in("anew")) == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mnist-0.2"], "--data: got nothing, expected the file of MNIST"),
        (["digits", "--arms", "pgd"], "--arms: got 'pgd', expected some of standard"),
        (["mnist-0.2", "--data", "no.npz"], "no.npz"),
        (["digits", "--threads", "0"], "--threads: got 0"),
        (
            ["mnist-0.2", "--data", "digits"],
            "--data: got digits, whose fingerprint is d6ba04f0e608..., expected a file of which the first 14000 training and 10000 test",
        ),
        (["digits", "--data", "FEW"], "expected the images and labels of digits, Linf 0.2"),
    ],
)
def test_wrong_words_are_answered_with_what_was_expected(words, said, capsys, tmp_path):
    few, out = write_few_digits(tmp_path / "few.npz", 40, 20), tmp_path / "out"
    assert benchmark.main(["run", *(str(few) if word == "FEW" else word for word in words), "--out", str(out)]) == 2
    said_here = capsys.readouterr().err
    assert said in said_here
    assert said_here.count("\n") == 1
    assert not out.exists()


def test_runs_of_a_cpu_and_of_a_gpu_do_not_stand_in_one_table(tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "standard-seed0.json").write_text(json.dumps({"hardware": {"device": "cuda:0"}}))
    assert benchmark.main(["run", "digits", "--out", str(tmp_path)]) == 2
    assert "--device: got cpu, expected cuda, on which " in capsys.readouterr().err


def test_a_longer_file_serves_as_the_one_that_was_cut_from_it(tmp_path):
    long, short = (write_few_digits(tmp_path / f"{n}.npz", n, n // 2) for n in (60, 40))
    grid = replace(grids.GRIDS["digits"], data="", data_sha256=load_data(str(short)).fingerprint(), of_file=(40, 20))
    assert running.read_data(grid, str(long)).fingerprint() == grid.data_sha256
    with pytest.raises(InputError, match="first 41 training and 20 test images"):
        running.read_data(replace(grid, of_file=(41, 20)), str(long))


def test_a_damaged_file_and_a_place_that_cannot_be_written_are_one_line(tiny, tmp_path, capsys):
    path = running.file_of(tmp_path, "digits", "standard", 0)
    path.parent.mkdir()
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        assert benchmark.main(["list", "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err == (
            f"error: --out: got {path}, which is damaged, expected files as `run` writes them; take it away: it is made anew\n"
        )
    assert benchmark.main(["run", "digits", "--out", str(path / "below")]) == 2
    assert capsys.readouterr().err == f"error: {path / 'below'}: Not a directory\n"


@pytest.mark.parametrize(
    "words", [["run", "digit"], ["run", "digits", "--seeds", "one"], ["run", "digits", "--seeds", "-1"], []]
)
def test_words_that_do_not_parse_end_with_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words)
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_difference_is_taken_seed_by_seed_and_judged_by_students_interval():
    def arm(values):
        return [{"seed": seed, "autoattack": {"accuracy": value}} for seed, value in values.items()]

    runs = {"digits": {"a": arm({0: 0.5, 1: 0.52, 2: 0.54, 9: 0.9}), "b": arm({2: 0.5, 0: 0.45, 1: 0.47})}}
    values = pages.difference(runs, "digits", "a", "b")
    assert values == pytest.approx([5, 5, 4])
    # 4.303, the 97.5 % quantile of Student's t with two degrees of freedom, from a printed table
    half = 4.303 * statistics.stdev(values) / 3**0.5
    assert pages.interval(values, 360) == pytest.approx((14 / 3 - half, 14 / 3 + half), abs=1e-3)
    assert pages._judgement(values, 360) == "a gain"
    assert pages._judgement([-v for v in values], 360) == "a loss"
    assert pages._judgement([5.0, -1.0, 3.0], 360) == "open"
    assert pages._judgement([5.0, 5.0], 360) == "too few seeds"
    assert pages._judgement([1.0, 1.0, 1.0], 100) == "a gain"
    assert pages._judgement([1.0, 1.0, 1.0], 50) == "open", "seeds that agree to the one image by which they can differ"


def test_a_target_is_met_by_the_whole_interval(monkeypatch):
    def arm(*values):
        cost = {"passes_per_step": len(values)}
        return [
            {"seed": seed, "cost": cost, "autoattack": {"accuracy": 0.0}, "transfer": {"accuracy": value}}
            for seed, value in enumerate(values)
        ]

    runs = {"digits": {"a": arm(0.50, 0.52, 0.54), "b": arm(0.45, 0.47, 0.50)}}
    low, high = pages.interval([5, 5, 4], 360)
    for least, verdict in (
        (low - 0.1, "met"),
        (low + 0.1, "undecided"),
        (high - 0.1, "undecided"),
        (high + 0.1, "missed"),
    ):
        monkeypatch.setattr(pages, "TARGETS", (Target("a", "b", least, "transfer"), Target("a", "c", 0)))
        first, second = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in pages._targets(runs).splitlines()[2:]
        )
        assert first[:4] == ["a", "b", "transfer", f"{least:+.1f}"]
        assert first[4] == f"+4.7 ({low:+.1f} to {high:+.1f}) at 1.00: {verdict}"
        assert second[4] == "-"
        assert pages._targets(runs).splitlines()[0].split("|")[-2].strip() == "digits, 3 seeds"


def test_what_hangs_on_the_images_is_the_spread_of_their_gains_over_seeds(monkeypatch):
    def arm(outcomes):
        return [{"seed": seed, "withstood": {"autoattack": bits}} for seed, bits in outcomes.items()]

    runs = {"digits": {"a": [*arm({0: "1100", 1: "1110"}), {"seed": 5}], "b": arm({1: "1000", 0: "1000", 7: "1111"})}}
    monkeypatch.setitem(grids.GRIDS, "digits", replace(grids.GRIDS["digits"], images=4))
    gains = [0, 1, 0.5, 0]  # image by image, the mean of seeds 0 and 1
    expected = 100 * 1.96 * np.std(gains, ddof=1) / 2
    assert pages.of_other_images(runs, "digits", "a", "b") == (2, pytest.approx(expected))
    assert pages.of_other_images({"digits": {"a": [{"seed": 5}], "b": runs["digits"]["b"]}}, "digits", "a", "b") is None
    assert pages.of_other_images(runs, "mnist-0.2", "a", "b") is None


def test_what_autoattack_itself_doubted_is_marked_in_the_table_and_told_below_it():
    def run(*warnings):
        return {"autoattack_details": {"warnings": list(warnings)}}

    found = {"a": [run("lost 1.00%. Try more"), run(), run("lost 12.00%. Try more")], "b": [run()], "c": [run("zeros")]}
    marks = pages._marks({"digits": found, "mnist-0.2": {"c": [run("zeros")]}})
    assert marks == {"lost ...%. Try more": "†", "zeros": "‡"}
    assert pages._doubted(found, marks) == ["† `a` 2 of 3 (1.00%, 12.00%).", "", "‡ `c` 1 of 1.", ""]
    assert pages._doubted({"b": [run()]}, marks) == []
    assert pages._marks({"digits": {"b": [run()]}}) == {}
    note = pages._note({"digits": found})
    assert all(f"{mark} beside an accuracy" in note and f'"{words}"' in note for words, mark in marks.items())


def test_a_row_is_marked_where_one_of_its_seeds_was_doubted(runs):
    marked = 0
    for grid, found in runs.items():
        rows = {line.split("|")[1].strip(): line for line in pages._table(runs, grid, found).splitlines()[2:]}
        for arm, those in found.items():
            doubted = any(run["autoattack_details"]["warnings"] for run in those)
            assert ("†" in rows[arm]) == doubted
            marked += doubted
    assert marked


def test_the_page_of_audits_names_each_check_that_gave_the_verdict_and_its_figure():
    checks = [
        {"name": "a check", "status": "pass", "figure": "one"},
        {"name": "another", "status": "masked", "figure": "two"},
    ]
    masked = {"verdict": "masked", "reasons": ["another"], "checks": checks}
    sound = {"verdict": "consistent with true robustness", "reasons": [], "checks": checks[:1]}
    runs = {
        "digits": {"pgd-at": [{"audit": sound}, {}], "aalp": [{"audit": masked}, {}], "alp": [{}]},
        "mnist-0.2": {"alp": [{}]},
    }
    text = "\n".join(pages._audits(runs))
    assert "consistent with true robustness in 1 of 2 arms audited; not in" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| aalp")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["aalp", "masked", "another", "two"]
    assert "| pgd-at" not in text
    assert grids.GRIDS["mnist-0.2"].title not in text
