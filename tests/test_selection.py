"""Which weights stay: exactly those of the best epoch; early stopping; smoothed labels; and what a run says about it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from art_saliency import load
from art_saliency.cli import main
from art_saliency.errors import InputError
from art_saliency.evaluation.accuracy import pgd_accuracy
from art_saliency.files import sha256_of_tensors
from art_saliency.methods.baselines import Standard
from art_saliency.threat import ThreatModel
from art_saliency.trainers.methods import JSIGRTrainer, MARTTrainer, PGDATTrainer, StandardTrainer
from art_saliency.trainers.surrogates import Recipe
from art_saliency.training import Extension, train
from art_saliency.training.averaging import StochasticWeightAverage
from art_saliency.training.batches import ResidentBatches
from art_saliency.training.engine import Engine
from art_saliency.training.selection import LabelSmoothing, Selection, smoothed_labels
from tests.helpers import spell
from tests.method_settings import classifier, small_network

CPU = torch.device("cpu")


class Scripted(Extension):
    """Measurements as a test wants them, (robust, clean) or None, and the weights of every epoch."""

    def __init__(self, scores):
        self.scores, self.weights = scores, []

    def after_epoch(self, run, record):
        self.weights.append(copy.deepcopy(run.candidate.state_dict()))
        if self.scores[run.epoch] is not None:
            record["validation_robust_accuracy"], record["validation_accuracy"] = self.scores[run.epoch]


def fit(digits, scores, selection, *, before=()):
    torch.manual_seed(0)
    model, script = small_network(norm=True), Scripted(scores)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = ResidentBatches(digits[0][:100], digits[1][:100], batch_size=50, device=CPU)
    history = train(
        model,
        Standard(),
        optimizer,
        batches,
        epochs=len(scores),
        engine=Engine("cpu"),
        seed=0,
        extensions=[*before, script, selection],
    )
    return model, script.weights, history


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SCORES = {
    "in the middle": ([(0.1, 0.5), (0.4, 0.5), (0.3, 0.9)], 1),
    "first": ([(0.5, 0.5), (0.4, 0.5), (0.3, 0.9)], 0),
    "last": ([(0.1, 0.5), (0.4, 0.5), (0.5, 0.2)], 2),
    "equals: the clean accuracy": ([(0.4, 0.5), (0.4, 0.6), (0.4, 0.55)], 1),
    "full equals: the earlier": ([(0.1, 0.5), (0.4, 0.5), (0.4, 0.5)], 1),
    "unmeasured epochs": ([None, (0.2, 0.5), None, (0.1, 0.9)], 1),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("which", ["best", "last"])
def test_the_weights_that_stay_are_exactly_those_of_the_epoch(kind, which, digits):
    scores, best = SCORES[kind]
    selection = Selection(which)
    model, weights, history = fit(digits, scores, selection)
    assert same(selection.weights["best"], weights[best])
    assert same(selection.weights["last"], weights[-1])
    chosen = best if which == "best" else len(scores) - 1
    assert same(model.state_dict(), weights[chosen])
    last = len(scores) - 1
    expected = {"selection": which, "epoch": chosen, "last_epoch": last, "best_epoch": best, "stopped_early": False}
    assert history.meta["weights"] == expected
    assert len(history) == len(scores)


@pytest.mark.parametrize(("patience", "epochs", "stopped"), [(1, 3, True), (2, 6, True), (3, 7, False)])
def test_patience_counts_measurements_without_a_better_one(patience, epochs, stopped, digits):
    scores = [(0.1, 0.5), (0.2, 0.5), (0.2, 0.4), (0.3, 0.5), (0.1, 0.5), (0.2, 0.9), (0.25, 0.5)]
    selection = Selection("best", patience=patience)
    model, weights, history = fit(digits, scores, selection)
    assert len(history) == epochs
    assert history.meta["weights"]["stopped_early"] is stopped
    assert same(model.state_dict(), weights[1 if epochs == 3 else 3])
    assert same(selection.weights["last"], weights[epochs - 1])


def test_the_choice_goes_on_from_its_state(digits):
    """A selection that took up another's state after two epochs ends like the one that saw them all."""
    scores = [(0.1, 0.5), (0.4, 0.5), (0.3, 0.5), (0.2, 0.5)]
    whole = Selection("best", patience=2)
    fit(digits, scores, whole)
    first, second = Selection("best", patience=2), Selection("best", patience=2)
    fit(digits, scores[:2], first)
    state = first.state_dict()
    assert all(type(value) in (int, float, bool) for name, value in state.items() if name != "best")
    second.load_state_dict(copy.deepcopy(state))
    _, _, history = fit(digits, [(0.3, 0.5), (0.2, 0.5), (0.9, 0.9)], second)
    assert len(history) == 2
    assert history.meta["weights"]["stopped_early"]
    assert second.best_epoch == whole.best_epoch == 1
    assert same(second.weights["best"], whole.weights["best"])
    empty = Selection("best")
    empty.load_state_dict(Selection("best").state_dict())
    assert empty.weights == {}


def test_the_best_epoch_may_be_one_before_the_first_average(digits):
    scores = [(0.5, 0.5), (0.2, 0.5), (0.3, 0.5)]
    model, weights, history = fit(digits, scores, Selection("best"), before=[StochasticWeightAverage(0.5)])
    assert same(model.state_dict(), weights[0])
    assert "average" not in history.meta["weights"]
    _, _, history = fit(digits, scores[::-1], Selection("best"), before=[StochasticWeightAverage(0.5)])
    assert history.meta["weights"]["average"] == "swa"


def test_a_trainer_leaves_the_weights_that_measured_best_on_the_validation_images(digits):
    """Measured anew, they give the figure of their epoch, and no other images were looked at."""
    x, y, _, _ = digits
    art_classifier = classifier(lr=0.05)
    trainer = PGDATTrainer(art_classifier, eps=0.1, max_iter=2)
    held_out = (x[300:400], y[300:400])
    trainer.fit(
        x[:200], y[:200], validation_data=held_out, batch_size=50, nb_epochs=6, seed=0, verbose=False, selection="best"
    )
    kept, robust = trainer.history.meta["weights"], trainer.history.column("validation_robust_accuracy")
    measured = list(zip(robust, trainer.history.column("validation_accuracy"), strict=True))
    assert kept["epoch"] == kept["best_epoch"] == measured.index(max(measured))
    found = pgd_accuracy(art_classifier.model, *held_out, threat=ThreatModel("Linf", 0.1), max_iter=10, seed=0)
    assert found == max(robust)
    assert same(trainer.kept_weights["best"], art_classifier.model.state_dict())
    art_classifier.model.load_state_dict(trainer.kept_weights["last"])
    found = pgd_accuracy(art_classifier.model, *held_out, threat=ThreatModel("Linf", 0.1), max_iter=10, seed=0)
    assert found == robust[-1]
    trainer.fit(x[:100], y[:100], nb_epochs=1, verbose=False)
    assert trainer.kept_weights == {}
    assert trainer.history.meta["weights"] == {"selection": "last", "epoch": 0}


# ---- label smoothing -----------------------------------------------------------------------------------------------


def test_labels_are_smoothed_towards_the_uniform_distribution():
    rows = smoothed_labels(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(rows, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    soft = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(smoothed_labels(soft, 4, 0.2), torch.tensor([[0.45, 0.45, 0.05, 0.05]]))
    assert torch.equal(smoothed_labels(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_smoothing_the_labels_of_a_run_is_torchs_label_smoothing_of_the_loss(digits):
    by_run, by_method = classifier(), classifier()
    quick = {"nb_epochs": 2, "batch_size": 50, "seed": 0, "verbose": False}
    trainer = StandardTrainer(by_run)
    trainer.fit(digits[0][:100], digits[1][:100], label_smoothing=0.1, **quick)
    StandardTrainer(by_method, label_smoothing=0.1).fit(digits[0][:100], digits[1][:100], **quick)
    for a, b in zip(by_run.model.parameters(), by_method.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert trainer.history.meta["label_smoothing"] == 0.1
    plain = classifier()
    StandardTrainer(plain).fit(digits[0][:100], digits[1][:100], **quick)
    assert not torch.allclose(plain.model.linear.weight, by_run.model.linear.weight, atol=1e-4)


def test_the_attack_meets_the_smoothed_labels(digits):
    met = []

    def attack(model, x, y):
        met.append(y)
        return x

    PGDATTrainer(classifier(), eps=0.1, attack=attack).fit(
        digits[0][:50], digits[1][:50], nb_epochs=1, verbose=False, label_smoothing=0.1, seed=0
    )
    assert met[0].shape == (50, 10)
    torch.testing.assert_close(met[0].amax(1), torch.full((50,), 0.91))


# ---- refusals --------------------------------------------------------------------------------------------------------

BAD = {
    "best without data": (StandardTrainer, {"selection": "best"}, "selection: got 'best' without validation data"),
    "patience without data": (StandardTrainer, {"patience": 3}, "patience: got 3 without validation data"),
    "selection": (StandardTrainer, {"selection": "bets"}, "selection: got 'bets'.*did you mean 'best'"),
    "patience": (StandardTrainer, {"patience": 0, "validation_split": 0.2}, "patience: got 0"),
    "smoothing": (StandardTrainer, {"label_smoothing": 1}, "label_smoothing: got 1"),
    "mart": (MARTTrainer, {"label_smoothing": 0.1}, "label_smoothing: got 0.1, expected 0 for mart"),
    "j-sigr": (JSIGRTrainer, {"label_smoothing": 0.1}, "label_smoothing: got 0.1, expected 0 for j-sigr"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_followed_is_refused_and_nothing_changes(kind, digits):
    trainer, options, words = BAD[kind]
    art_classifier = classifier()
    before = copy.deepcopy(art_classifier.model.state_dict())
    with pytest.raises(InputError, match=words) as caught:
        trainer(art_classifier, eps=0.1).fit(digits[0][:64], digits[1][:64], **options)
    assert "\n" not in str(caught.value)
    assert same(before, art_classifier.model.state_dict())


def test_streams_need_validation_data_and_labels_are_not_smoothed_twice(digits):
    art_classifier = classifier()
    before = copy.deepcopy(art_classifier.model.state_dict())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(digits[0][:64], digits[1][:64]), batch_size=32)
    with pytest.raises(InputError, match="selection: got 'best' without validation data"):
        StandardTrainer(art_classifier).fit_generator(loader, selection="best")
    with pytest.raises(InputError, match="it would smooth twice"):
        StandardTrainer(art_classifier, label_smoothing=0.1).fit(digits[0][:64], digits[1][:64], label_smoothing=0.1)
    assert same(before, art_classifier.model.state_dict())
    for bad in ((1.0, 10), (0.1, 0)):
        with pytest.raises(InputError):
            LabelSmoothing(*bad)
    StandardTrainer(art_classifier).fit_generator(
        loader,
        nb_epochs=2,
        selection="best",
        validation_data=(digits[2], digits[3]),
        verbose=False,
        swa_from=0.5,
        ema=None,
    )
    assert not same(before, art_classifier.model.state_dict())


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_keeps_both_and_says_which_is_which(tmp_path, capsys):
    words = spell("train", "pgd-at", data="digits", eps=0.1, set="max_iter=1", width=4, epochs=4)
    extra = ["--ema", "0.9", "--awp", "0.005", "--selection", "best", "--patience", "2", "--label-smoothing", "0.1"]
    folder = tmp_path / "run"
    assert main([*words, *extra, "--out", str(folder), "--device", "cpu", "--quiet"]) == 0
    said = capsys.readouterr().out
    page = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    meta, epochs = page["history"]["meta"], page["history"]["epochs"]
    kept = meta["weights"]
    assert (kept["selection"], kept["average"]) == ("best", "ema")
    assert f"best weights (epoch {kept['epoch'] + 1}, ema average" in said
    assert f"{epochs[kept['epoch']]['validation_robust_accuracy']:.1%} under PGD-10" in said
    recipe = Recipe.of(page)
    assert recipe.run_options()["ema"] == 0.9
    asked = (recipe.awp, recipe.selection, recipe.patience, recipe.label_smoothing, recipe.swa_from)
    assert asked == (0.005, "best", 2, 0.1, None)
    assert sha256_of_tensors(load(folder).model.state_dict()) == page["weights_sha256"]
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last.keys() == load(folder).model.state_dict().keys()
    assert not (folder / "best.pt").exists()
    assert same(last, load(folder).model.state_dict()) == (kept["best_epoch"] == kept["last_epoch"])
    older = {name: value for name, value in page["recipe"].items() if name not in recipe.run_options()}
    assert Recipe.of({"recipe": older}).selection == "last"
    assert (
        main([*words, "--validation-split", "0", "--selection", "best", "--out", str(tmp_path / "no"), "--quiet"]) == 2
    )
    assert "--selection: got best without images held out" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert isinstance(load(folder).model, nn.Module)
