"""Averages of the weights: closed forms over recorded weights, BatchNorm's statistics, and a run that does not notice them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from art_saliency.errors import InputError
from art_saliency.methods.adv_gsct import AdvGSCT
from art_saliency.methods.baselines import PGDAT, Standard
from art_saliency.randomness import RandomSource
from art_saliency.trainers.methods import AdvGSCTTrainer, PGDATTrainer, StandardTrainer
from art_saliency.training import Extension, train
from art_saliency.training.averaging import (
    ExponentialAverage,
    StochasticWeightAverage,
    recompute_batch_statistics,
)
from art_saliency.training.batches import ResidentBatches
from art_saliency.training.engine import Engine
from tests.method_settings import classifier, small_network

CPU = torch.device("cpu")


class Recorder(Extension):
    """Every step's tensors, and every epoch's, in float64."""

    def __init__(self):
        self.steps, self.epochs, self.seen = [], [], []

    def on_start(self, run):
        self.steps.append(tensors(run.model))

    def after_step(self, run):
        self.steps.append(tensors(run.model))
        self.seen.append(run.batch.target_model)

    def after_epoch(self, run, record):
        self.epochs.append(tensors(run.model))


def tensors(model):
    return {name: value.double().clone() for name, value in model.state_dict().items()}


def fit(digits, extensions, *, epochs=3, objective=None, norm=True, count=150, seed=0):
    torch.manual_seed(0)
    model = small_network(norm=norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = ResidentBatches(digits[0][:count], digits[1][:count], batch_size=50, device=CPU)
    objective = Standard() if objective is None else objective
    train(model, objective, optimizer, batches, epochs=epochs, engine=Engine("cpu"), seed=seed, extensions=extensions)
    return model


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("warmup", [True, False])
def test_an_exponential_average_is_its_closed_form_and_ends_in_the_network(digits, warmup):
    """a_T = (prod d_t) w_0 + sum_t (1 - d_t) (prod_{s > t} d_s) w_t, for weights and running statistics alike."""
    recorder, average = Recorder(), ExponentialAverage(0.9, warmup=warmup)
    model = fit(digits, [average, recorder])
    decays = [min(0.9, (1 + t) / (10 + t)) if warmup else 0.9 for t in range(9)]
    expected = {}
    for name in recorder.steps[0]:
        terms, rest = [], 1.0
        for step in range(9, 0, -1):
            terms.append((1 - decays[step - 1]) * rest * recorder.steps[step][name])
            rest *= decays[step - 1]
        expected[name] = sum(terms) + rest * recorder.steps[0][name]
        if name.endswith("num_batches_tracked"):
            expected[name] = recorder.steps[9][name]
    assert expected["features.1.running_var"].std() > 0
    assert_close(model.state_dict(), expected)


def test_a_decay_of_0_is_the_run_without_an_average(digits):
    plain, followed = fit(digits, []), fit(digits, [ExponentialAverage(0.0)])
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), followed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("make", [lambda: ExponentialAverage(0.99), lambda: StochasticWeightAverage(0.0)])
def test_an_average_changes_nothing_in_the_run_itself(digits, make):
    alone, beside = Recorder(), Recorder()
    objective = PGDAT(eps=0.1, max_iter=2)
    fit(digits, [alone], objective=objective)
    fit(digits, [make(), beside], objective=objective)
    for a, b in zip(alone.steps, beside.steps, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def batch_statistics(model, batches):
    """The mean of the batches' own mean and unbiased variance at the one BatchNorm layer, by hand."""
    means, variances = [], []
    for batch in batches:
        h = model.features[0](batch.x).double().transpose(0, 1).flatten(1)
        means.append(h.mean(1))
        variances.append(h.var(1))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.5, 2), (0.74, 2), (0.75, 3), (0.99, 3)])
def test_swa_is_the_mean_of_the_epochs_with_statistics_of_the_training_data(digits, start, first):
    recorder, average = Recorder(), StochasticWeightAverage(start)
    model = fit(digits, [average, recorder], epochs=4)
    averaged = recorder.epochs[first:]
    expected = {name: sum(epoch[name] for epoch in averaged) / len(averaged) for name in averaged[0]}
    found = model.state_dict()
    batches = ResidentBatches(digits[0][:150], digits[1][:150], batch_size=50, device=CPU)
    mean, variance = batch_statistics(model, batches.epoch(RandomSource(0)))
    expected["features.1.running_mean"], expected["features.1.running_var"] = mean, variance
    expected["features.1.num_batches_tracked"] = torch.tensor(3.0).double()
    assert_close(found, expected)


def test_statistics_are_recomputed_in_one_pass_and_everything_else_stays(digits):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    model.train()
    model[1].eval()
    modes, before = [child.training for child in model.modules()], copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    recompute_batch_statistics(model, digits[0][:90].split(30))
    h = [model[0](x).transpose(0, 1).flatten(1) for x in digits[0][:90].split(30)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([part.mean(1) for part in h]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([part.var(1) for part in h]).mean(0))
    assert [child.training for child in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert torch.equal(torch.get_rng_state(), state), "dropout was on"
    assert all(
        torch.equal(before[name], value)
        for name, value in model.state_dict().items()
        if "running" not in name and "num" not in name
    )
    bare = nn.Linear(3, 3)
    recompute_batch_statistics(bare, iter(lambda: pytest.fail("a pass for nothing"), None))


@pytest.mark.parametrize("make", [lambda: ExponentialAverage(0.9), lambda: StochasticWeightAverage(0.3)])
@pytest.mark.parametrize("before_start", [True, False])
def test_an_average_goes_on_from_its_state(digits, make, before_start):
    """Plain tensors and numbers, taken after an epoch and loaded into another, before or after it starts."""

    class Interrupt(Extension):
        def __init__(self, average, taken=None):
            self.average, self.taken, self.saved = average, taken, None

        def on_start(self, run):
            if self.taken is not None:
                self.average.load_state_dict(self.taken)

        def after_epoch(self, run, record):
            if run.epoch == 1:
                self.saved = copy.deepcopy(self.average.state_dict())
                if self.taken is None:  # what happens from here on is repeated below
                    self.average.load_state_dict(self.saved)

    average = make()
    interrupt = Interrupt(average)
    fit(digits, [average, interrupt])
    saved = interrupt.saved
    assert isinstance(saved["count"], int)
    assert all(type(value) is torch.Tensor for value in saved["model"].values())
    other = make()
    if before_start:
        other.load_state_dict(saved)
        extensions = [other]
    else:
        extensions = [other, Interrupt(other, saved)]
    seen = []

    class Look(Extension):
        def on_start(self, run):
            seen.append((other.count, run.candidate is other.model, tensors(other.model)))

    fit(digits, [*extensions, Look()], epochs=1)
    count, offered, found = seen[0]
    assert (count, offered) == (saved["count"], True)
    assert_close(found, {name: value.double() for name, value in saved["model"].items()})


def test_the_average_is_what_is_validated_selected_and_written_down(digits):
    x, y, x_test, y_test = digits
    art_classifier = classifier(small_network(norm=True))
    trainer = StandardTrainer(art_classifier)
    trainer.fit(x[:200], y[:200], nb_epochs=3, seed=0, verbose=False, validation_data=(x_test, y_test), ema=0.9)
    meta = trainer.history.meta
    assert meta["ema"] == {"decay": 0.9, "warmup": True}
    assert meta["weights"]["average"] == "ema"
    right = float((trainer.predict(x_test).argmax(1) == y_test.numpy()).mean())
    assert trainer.history[-1]["validation_accuracy"] == pytest.approx(right)
    last = trainer.kept_weights["last"]
    assert all(torch.equal(value, last[name]) for name, value in art_classifier.model.state_dict().items())


def test_the_average_is_the_slow_copy_that_an_objective_asks_for(digits):
    """Adv-GSCT's label is the saliency of the average as it stood before the step."""
    recorder, average = Recorder(), ExponentialAverage(0.9)
    fit(digits, [average, recorder], objective=AdvGSCT(eps=0.1, target_network="ema"), epochs=1)
    assert all(slow is average.model for slow in recorder.seen)
    current, slow = (classifier() for _ in range(2))
    AdvGSCTTrainer(current, eps=0.1).fit(
        digits[0][:100], digits[1][:100], nb_epochs=1, batch_size=50, seed=0, verbose=False, ema=0.9
    )
    AdvGSCTTrainer(slow, eps=0.1, target_network="ema").fit(
        digits[0][:100], digits[1][:100], nb_epochs=1, batch_size=50, seed=0, verbose=False, ema=0.9
    )
    assert not torch.equal(current.model.linear.weight, slow.model.linear.weight)


BAD = {
    "decay": ({"ema": 1.0}, "ema: got 1, expected 0 <= ema < 1"),
    "decay type": ({"ema": "slow"}, "ema: got 'slow'"),
    "share": ({"swa_from": 1}, "swa_from: got 1, expected 0 <= swa_from < 1"),
    "both": ({"ema": 0.9, "swa_from": 0.5}, "one average of the weights"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_averages_are_refused_and_nothing_changes(kind, digits):
    options, words = BAD[kind]
    art_classifier = classifier()
    before = copy.deepcopy(art_classifier.model.state_dict())
    with pytest.raises(InputError, match=words):
        PGDATTrainer(art_classifier, eps=0.1).fit(digits[0][:64], digits[1][:64], **options)
    assert all(torch.equal(before[name], value) for name, value in art_classifier.model.state_dict().items())


def test_an_objective_that_asks_for_a_slow_copy_needs_an_average(digits):
    art_classifier = classifier()
    before = copy.deepcopy(art_classifier.model.state_dict())
    with pytest.raises(InputError, match=r"ema: got None, expected a decay: adv-gsct asks for a slow copy.*ema=0\.999"):
        AdvGSCTTrainer(art_classifier, eps=0.1, target_network="ema").fit(digits[0][:64], digits[1][:64])
    assert all(torch.equal(before[name], value) for name, value in art_classifier.model.state_dict().items())
