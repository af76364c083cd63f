"""Accuracies against a loop over single images, and the interval against SciPy's and by its coverage."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.estimators.classification import PyTorchClassifier
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from art_saliency.attacks import dlr, fgsm, margin, pgd
from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.evaluation.accuracy import accuracy, binomial_interval, pgd_accuracy
from art_saliency.evaluation.audit import audit
from art_saliency.evaluation.autoattack import autoattack
from art_saliency.evaluation.corruptions import corruption_accuracy
from art_saliency.evaluation.report import full_report
from art_saliency.evaluation.saliency import saliency_report
from art_saliency.evaluation.summary import summarise
from art_saliency.evaluation.transfer import transfer
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel

# ---- the interval --------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.999]))
def test_the_interval_is_scipys_wilson_interval(count, share, confidence):
    successes = round(share * count)
    expected = stats.binomtest(successes, count).proportion_ci(confidence, method="wilson")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    low, high = binomial_interval(successes, count, z=z)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= successes / count <= high + 1e-12
    assert high <= 1
    assert low < high
    mirrored = binomial_interval(count - successes, count, z=z)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_the_default_is_95_percent_and_covers_the_truth_about_that_often():
    """Exactly, over all outcomes of 360 images: no simulation. Wilson's interval is a little off, never by much."""
    for truth in (0.02, 0.1, 0.5, 0.9, 0.98):
        covered = [low <= truth <= high for low, high in (binomial_interval(k, 360) for k in range(361))]
        assert 0.93 < stats.binom(360, truth).pmf(np.flatnonzero(covered)).sum() < 0.975


def test_more_images_narrow_the_interval():
    widths = [high - low for low, high in (binomial_interval(count // 2, count) for count in (10, 100, 1000, 10_000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 10_000), rel=1e-3)


@pytest.mark.parametrize(
    ("successes", "count", "message"),
    [
        (0, 0, "count: got 0, expected a whole number, 1 <= count"),
        (-1, 5, "successes: got -1, expected a whole number, 0 <= successes <= 5"),
        (6, 5, "successes: got 6, expected a whole number, 0 <= successes <= 5"),
        (0.5, 5, "successes: got 0.5, expected a whole number, 0 <= successes <= 5"),
    ],
)
def test_impossible_counts_are_refused(successes, count, message):
    with pytest.raises(InputError) as caught:
        binomial_interval(successes, count)
    assert str(caught.value) == message


# ---- accuracies ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tiny_network):
    """A network that is right on most digits and easily fooled, with BatchNorm and dropout, in train mode."""
    torch.manual_seed(0)
    network = tiny_network()
    model = nn.Sequential(
        network[0], nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = digits[0][:400], digits[1][:400]
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model[1].eval()  # and one child that its owner put into eval mode
    return model


@pytest.fixture(scope="module")
def sample(digits):
    return digits[2][:120], digits[3][:120]


LINF = ThreatModel("Linf", 0.1)


def test_accuracy_is_the_share_of_images_that_are_right_one_by_one_in_eval_mode(trained, sample):
    x, y = sample
    trained.eval()
    with torch.no_grad():
        right = sum(int(trained(x[i : i + 1])[0].argmax()) == int(y[i]) for i in range(len(x)))
    trained.train()
    trained[1].eval()
    assert 0.5 * len(x) < right < len(x)
    for batch_size in (1, 7, 120, 1000):
        assert accuracy(trained, x, y, batch_size=batch_size) == right / len(x)
    assert [module.training for module in trained] == [True, False, True, True, True, True]


def test_arrays_uint8_one_hot_and_other_types_give_the_same_figure(trained, sample):
    x, y = sample
    x = (x * 255).round() / 255
    expected = accuracy(trained, x, y)
    for images in (
        x.numpy(),
        (x * 255).round().to(torch.uint8),
        (x * 255).round().numpy().astype(np.uint8),
        x.tolist(),
    ):
        assert accuracy(trained, images, y) == expected
    for labels in (y.numpy(), y.tolist(), y[:, None], F.one_hot(y, 10), F.one_hot(y, 10).double().numpy()):
        assert accuracy(trained, x, labels) == expected
    attacked = pgd_accuracy(trained, x, y, threat=LINF, max_iter=3)
    assert pgd_accuracy(trained, (x * 255).round().to(torch.uint8), y.numpy(), threat=LINF, max_iter=3) == attacked


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("loss", "function"), [("cross-entropy", None), ("margin", margin), ("dlr", dlr)])
def test_pgd_accuracy_is_the_accuracy_on_what_pgd_returns(trained, sample, norm, loss, function):
    x, y = sample
    threat = ThreatModel(norm, 0.1 if norm == "Linf" else 0.5)
    options = {"threat": threat, "max_iter": 4, "eps_step": 0.4 * threat.eps, "restarts": 2}
    random, right = RandomSource(11), 0
    for start in range(0, len(x), 50):
        part, labels = x[start : start + 50], y[start : start + 50]
        x_adv = pgd(trained, part, labels, loss=loss, random=random, **options)
        trained.eval()
        right += int((trained(x_adv).argmax(1) == labels).sum())
        trained.train()
        trained[1].eval()
    figures = [
        pgd_accuracy(trained, x, y, loss=choice, batch_size=50, seed=11, **options)
        for choice in (loss, function)
        if choice is not None
    ]
    assert all(figure == right / len(x) for figure in figures)
    assert figures[0] < accuracy(trained, x, y) - 0.1  # the attack bites


def test_no_budget_is_clean_accuracy_and_a_wider_ball_lowers_it(trained, sample):
    x, y = sample
    figures = [
        pgd_accuracy(trained, x, y, threat=ThreatModel("Linf", eps), max_iter=10) for eps in (0.0, 0.05, 0.1, 0.2, 0.5)
    ]
    assert figures[0] == accuracy(trained, x, y)
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] < 0.05


def test_restarts_never_raise_the_figure(trained, sample):
    options = {"threat": ThreatModel("Linf", 0.06), "max_iter": 2, "eps_step": 0.01, "batch_size": 120}
    figures = [pgd_accuracy(trained, *sample, restarts=restarts, **options) for restarts in (1, 2, 4, 8)]
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] < figures[0]


def test_the_seed_decides_and_the_global_generator_does_not(trained, sample):
    options = {"threat": ThreatModel("Linf", 0.08), "max_iter": 0}  # a random start alone: luck decides
    state = torch.get_rng_state()
    figures = [pgd_accuracy(trained, *sample, seed=seed, **options) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(figures)) > 1
    torch.manual_seed(123)
    assert [pgd_accuracy(trained, *sample, seed=seed, **options) for seed in range(12)] == figures


def test_batch_norm_and_gradients_are_left_alone(trained, sample):
    buffers = {name: value.clone() for name, value in trained.named_buffers()}
    accuracy(trained, *sample)
    pgd_accuracy(trained, *sample, threat=LINF, max_iter=2)
    assert all(torch.equal(value, buffers[name]) for name, value in trained.named_buffers())
    assert [module.training for module in trained] == [True, False, True, True, True, True]
    assert all(parameter.requires_grad for parameter in trained.parameters())


class _Fails(nn.Module):
    def forward(self, x):
        if len(x) > 1:
            raise ArithmeticError("on purpose")
        return x.flatten(1)[:, :10]


def test_modes_come_back_after_an_exception(sample):
    model = nn.Sequential(nn.Dropout(), _Fails())
    model[1].eval()
    for measure in (accuracy, lambda *args: pgd_accuracy(*args, threat=LINF)):
        with pytest.raises(ArithmeticError, match="on purpose"):
            measure(model, *sample)
        assert [module.training for module in model.modules()] == [True, True, False]


def measures():
    return pytest.mark.parametrize(
        "measure",
        [accuracy, lambda *args, **options: pgd_accuracy(*args, threat=LINF, max_iter=1, **options)],
        ids=["clean", "pgd"],
    )


@measures()
def test_labels_that_the_network_does_not_know_are_refused_not_counted_as_errors(trained, sample, measure):
    x, y = sample
    with pytest.raises(InputError, match=r"^y: got labels from 1 to 10, expected labels from 0 to 9$"):
        measure(trained, x, y + 1)
    with pytest.raises(InputError, match=r"^y: got labels from -1 to 8, expected labels from 0 to 9$"):
        measure(trained, x, y - 1)
    with pytest.raises(InputError, match=r"^y: got shape \(120, 11\), expected \(120, 10\)$"):
        measure(trained, x, F.one_hot(y, 11))
    with pytest.raises(InputError, match=r"^y: got soft labels, expected indices or one-hot rows"):
        measure(trained, x, torch.full((120, 10), 0.1))
    with pytest.raises(InputError, match=r"^y: got 119 labels, expected 120, one for each image$"):
        measure(trained, x, y[1:])


@measures()
def test_images_outside_the_range_are_refused(trained, sample, measure):
    x, y = sample
    with pytest.raises(InputError, match=r"^x: got values from 0 to 255, expected values in \[0, 1\]; divide by 255$"):
        measure(trained, x * 255, y)
    with pytest.raises(InputError, match=r"^x: got an empty set, expected at least one image$"):
        measure(trained, x[:0], y[:0])
    with pytest.raises(InputError, match=r"^batch_size: got 0, expected a whole number, 1 <= batch_size$"):
        measure(trained, x, y, batch_size=0)


def test_a_network_without_gradients_has_a_clean_accuracy_and_no_pgd_accuracy(sample):
    class Steps(nn.Module):
        def forward(self, x):
            return F.one_hot((x.flatten(1).argmax(1)) % 10, 10).float()

    assert 0 <= accuracy(Steps(), *sample) <= 1
    with pytest.raises(UnsupportedModelError, match="differentiable forward pass"):
        pgd_accuracy(Steps(), *sample, threat=LINF)


class _Broken(nn.Module):
    """Answers class 0, with a logit that is no number among them where an image is bright."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        bright = x.flatten(1).amax(1) > 0.6
        return torch.stack([torch.where(bright, self.value, 1.0) + 0 * x.flatten(1).sum(1), torch.zeros(len(x))], 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_never_right(value):
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    x[:2] = 0.7
    assert accuracy(_Broken(value), x, y) == 4 / 6
    assert pgd_accuracy(_Broken(value), x, y, threat=ThreatModel("Linf", 0.01), max_iter=2) == 4 / 6


class _Rooted(nn.Module):
    """Answers class 1 as long as it is dark; the gradient of a square root is infinite on black."""

    def forward(self, x):
        light = x.sqrt().flatten(1).sum(1)
        return torch.stack([light, 9 - light], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_cure_and_autocast_is_not(trained, sample, dtype):
    x, y = sample
    half = copy.deepcopy(trained).to(dtype)
    for measure in (accuracy, lambda *given: pgd_accuracy(*given, threat=LINF)):
        with pytest.raises(
            UnsupportedModelError, match=rf"^model: got a network of {dtype}, expected torch.float32: .*\.float\(\)$"
        ):
            measure(half, x.to(dtype), y)
    with torch.autocast("cpu", dtype):
        assert abs(accuracy(trained, x, y) - accuracy(half.float(), x, y)) < 0.05


def test_a_bare_radius_is_refused_with_the_cure(trained, sample):
    for attack in (pgd, fgsm, pgd_accuracy, lambda *given, threat: pgd(*given, threat=threat, eps_step=0.1)):
        with pytest.raises(
            InputError, match=r'^threat: got 0\.1, expected a ThreatModel; write ThreatModel\("Linf", 8 / 255\)$'
        ):
            attack(trained, *sample, threat=0.1)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda model, x, y: accuracy(model, x, y),
        lambda model, x, y: pgd_accuracy(model, x, y, threat=LINF),
        lambda model, x, y: autoattack(model, x, y, eps=0.1),
        lambda model, x, y: audit(model, x, y, eps=0.1),
        lambda model, x, y: transfer(model, x, y, surrogates={"itself": nn.Identity()}, threat=LINF),
        lambda model, x, y: saliency_report(model, x, y, x),
        lambda model, x, y: corruption_accuracy(model, x, y, corruptions=["gaussian_noise"], severities=[1]),
        lambda model, x, y: summarise(model, x, y, threat=LINF),
        lambda model, x, y: full_report(model, x, y, eps=0.1),
    ],
)
def test_a_classifier_around_a_network_is_refused_with_the_cure(trained, sample, evaluate):
    classifier = PyTorchClassifier(trained, nn.CrossEntropyLoss(), tuple(sample[0].shape[1:]), 10, clip_values=(0, 1))
    with pytest.raises(
        InputError, match=r"^model: got a PyTorchClassifier, expected a torch.nn.Module; pass art_saliency\.network_of"
    ):
        evaluate(classifier, *sample)
    with pytest.raises(InputError, match=r"^model: got a str, expected a torch.nn.Module$"):
        evaluate("network", *sample)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_attack_on_a_gradient_that_is_partly_no_number_makes_no_error_of_its_own(norm):
    x, y = torch.zeros(5, 1, 4, 4), torch.ones(5, dtype=torch.long)
    x[:, :, :, 0] = 0.3
    threat = ThreatModel(norm, 0.01)
    x_adv = pgd(_Rooted(), x, y, threat=threat, max_iter=5, random_start=False)
    assert bool(torch.isfinite(x_adv).all())
    assert not torch.equal(x_adv, x), "the finite entries of the gradient still count"
    assert pgd_accuracy(_Rooted(), x, y, threat=threat, max_iter=5) == 1


@pytest.mark.gpu
def test_images_are_moved_to_the_network(trained, sample):
    import copy

    expected = accuracy(trained, *sample)
    assert accuracy(copy.deepcopy(trained).cuda(), *sample) == pytest.approx(expected, abs=1 / 120)
