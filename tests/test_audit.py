"""The audit on networks that mask their gradients on purpose, and on honest ones: it convicts the former and clears the latter."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from art_saliency.attacks import fgsm, pgd
from art_saliency.data import load_data, to_unit
from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.evaluation import _audit_gradients as gradients
from art_saliency.evaluation import _audit_others as others
from art_saliency.evaluation import audit as module
from art_saliency.evaluation._audit_laboratory import Laboratory
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.evaluation.audit import VERDICTS, AuditBudget, audit, collect_variants
from art_saliency.evaluation.autoattack import autoattack
from art_saliency.evaluation.paired import paired_difference
from art_saliency.evaluation.transfer import transfer
from art_saliency.networks import build_network
from art_saliency.threat import ThreatModel
from art_saliency.trainers.methods import TRAINERS
from art_saliency.trainers.runs import make_classifier
from tests.helpers import plainly_trained

BUDGET = AuditBudget(max_iter=20, restarts=2, long=4, noise_draws=8, square_queries=300)
NOISY_BUDGET = AuditBudget(max_iter=10, noise_draws=2, square_queries=20, repeats=6, eot=4)
CONSISTENT, SUSPICIOUS, MASKED = VERDICTS.values()


@pytest.fixture(scope="module")
def data():
    digits = load_data("digits")
    return to_unit(digits.x_test).float(), digits.y_test.clone()


_TRAINED: dict[str, nn.Module] = {}


def trained(method, eps=0.2, *, epochs=15, width=12, seed=0, **parameters):
    key = repr((method, eps, epochs, width, seed, parameters))
    if key not in _TRAINED:
        digits = load_data("digits")
        torch.manual_seed(seed)
        model = build_network("small-cnn", num_classes=10, input_shape=digits.input_shape, width=width)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        classifier = make_classifier(
            model, input_shape=digits.input_shape, num_classes=10, optimizer=optimizer, device=torch.device("cpu")
        )
        trainer = TRAINERS[method](classifier, eps=eps, **parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(
                digits.x_train,
                digits.y_train,
                batch_size=128,
                nb_epochs=epochs,
                scheduler="onecycle",
                seed=seed,
                verbose=False,
            )
        _TRAINED[key] = model
    return _TRAINED[key]


def label_smoothed():
    """A standard network trained with label smoothing, whose loss is so curved that one step does far less than many."""
    if "label-smoothed" not in _TRAINED:
        digits = load_data("digits")
        x, y = to_unit(digits.x_train).float(), digits.y_train
        torch.manual_seed(0)
        layers = []
        for channels in (1, 32, 32):
            layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if channels == 1 else []
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        for _ in range(30):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()
                optimizer.step()
        _TRAINED["label-smoothed"] = model.eval()
    return _TRAINED["label-smoothed"]


def audited(model, data, eps=0.2, count=None, **options):
    """150 images; a network that answers at random, or that is right on half of them only, needs more."""
    usual, budget = (
        (360, NOISY_BUDGET) if getattr(model, "change", None) is noisy else (150 if eps < 0.3 else 360, BUDGET)
    )
    count = usual if count is None else count
    return audit(model, *(part[:count] for part in data), eps=eps, budget=budget, progress=False, **options)


# --- networks that mask on purpose ----------------------------------------------------------------------------------------


class Before(nn.Module):
    """Something done to the image before the network sees it."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.model(self.change(x))


class After(Before):
    """Something done to the logits."""

    def forward(self, x):
        return self.change(self.model(x))


def quantised(x):
    return (8 * x).round() / 8


def saturated(x):
    return torch.sigmoid(400 * (x - 0.5))


def shattered(x):
    return x + 0.02 * torch.sin(500 * x)


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


class Turned(torch.autograd.Function):
    """The identity, with the gradient the other way around."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def trained_with_noise():
    """A standard network that has learnt to see through noise, and is given fresh noise in every pass."""
    model, _ = plainly_trained(width=12, epochs=15, lr=0.01, change=noisy)
    return Before(model, noisy)


def overfitted():
    """A network that single-step training overfitted: of the first seed whose network keeps much of its accuracy under that step."""
    digits, ball = load_data("digits"), ThreatModel("Linf", 0.4)
    x, y = to_unit(digits.x_test).float(), digits.y_test
    for seed in range(8):
        model = trained("fgsm-rs", ball.eps, epochs=30, width=24, seed=seed, random_start=False)
        model.eval()
        clean, withstood = (model(images).argmax(1) == y for images in (x, fgsm(model, x, y, threat=ball)))
        if binomial_interval(int((clean & withstood).sum()), len(y))[0] > 0.42 * float(clean.float().mean()):
            return model
    raise AssertionError("no seed's network keeps its accuracy under one step")


class OnlyWhenDeployed(nn.Module):
    """Quantises in eval mode alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x if self.training else quantised(x))


GUILTY = {
    "quantising": (lambda: Before(trained("standard"), quantised), 0.1, "gradients exist"),
    "saturating": (lambda: Before(trained("standard"), saturated), 0.2, "gradients beat queries"),
    "noisy": (
        trained_with_noise,
        0.1,
        "nothing rests on noise that the attacker cannot know|averaging over the randomness adds nothing",
    ),
    "shattered": (lambda: Before(trained("standard"), shattered), 0.1, "gradients beat queries"),
    "logits x 100": (
        lambda: After(trained("standard"), lambda z: 100 * z),
        0.1,
        "the size of the logits hides nothing",
    ),
    "eval mode only": (lambda: OnlyWhenDeployed(trained("standard")), 0.1, "train and eval mode agree"),
    "overfitted": (
        overfitted,
        0.4,
        "what withstands one step withstands many",
    ),
}
INNOCENT = {
    "standard": (lambda: trained("standard"), {}),
    "pgd-at": (lambda: trained("pgd-at"), {}),
    "trades": (lambda: trained("trades"), {}),
    "label-smoothed": (label_smoothed, {"eps": 0.16, "count": 360}),
}


@pytest.mark.parametrize("name", GUILTY)
def test_the_guilty_are_convicted_for_the_right_reason(name, data):
    make, eps, reason = GUILTY[name]
    report = audited(make(), data, eps)
    found = [(c.status, c.name, c.figure) for c in report.checks if c.status != "pass" or c.name in reason.split("|")]
    assert report.verdict == MASKED, found
    assert set(reason.split("|")) & set(report.reasons), found


@pytest.mark.parametrize("name", INNOCENT)
def test_the_innocent_are_not_convicted(name, data):
    make, options = INNOCENT[name]
    report = audited(make(), data, **options)
    found = [(check.status, check.name, check.figure) for check in report.checks if check.status != "pass"]
    assert report.verdict == CONSISTENT, found


def test_what_many_steps_find_and_one_does_not_is_no_masking_at_any_radius(data):
    """Gradients lead to every one of these images: what a single step misses convicts nobody who hides nothing."""
    falls = []
    for eps in (0.1, 0.13, 0.15, 0.16, 0.17, 0.19):
        lab = Laboratory(label_smoothed(), *data, ThreatModel("Linf", eps), BUDGET, batch_size=250, seed=0)
        checks = gradients.single_step(lab)
        assert [check.status for check in checks] == ["pass"] * 3, (eps, [check.figure for check in checks])
        falls.append(checks[2].figures["many"] / checks[2].figures["one"])
    assert falls[0] > 0.5
    assert falls[-1] < 0.05


# --- what else it must do -------------------------------------------------------------------------------------------------


def test_an_audit_leaves_the_network_and_the_process_as_they_were(data):
    model = Before(build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4), noisy)
    model.train()
    model.model.layer2.eval()
    modes = [child.training for child in model.modules()]
    weight = model.model.layer1[0].weight
    weight.grad = torch.ones_like(weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=5, repeats=2, eot=2)
    first, second = (audit(model, data[0][:8], data[1][:8], eps=0.1, budget=quick, progress=False) for _ in range(2))
    assert [child.training for child in model.modules()] == modes
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert first.accuracies == second.accuracies
    page = json.loads(json.dumps(first.to_json()))
    assert page["checks"][0]["status"] == "suspicious"
    for row in page["accuracies"].values():
        assert row["interval_95"][0] <= row["accuracy"] <= row["interval_95"][1]
    text = first.to_markdown()
    assert first.verdict in text
    assert all(check.name in text for check in first.checks)


def test_a_network_without_gradients_is_convicted_and_not_a_crash(data):
    class Detached(Before):
        def forward(self, x):
            return self.model(x.detach())

    report = audited(Detached(trained("standard"), None), data, 0.1)
    assert report.verdict == MASKED
    assert {"gradients exist", "gradients beat queries"} <= set(report.reasons)


class CutOff(nn.Module):
    """Has a gradient to the images in train mode alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x if self.training else quantised(x).detach())


class Beneath(nn.Module):
    """Cuts the gradient, and publishes the attack that goes around the cut."""

    def forward(self, x):
        return quantised(x).detach()

    def adaptive_variants(self):
        return {"around the cut": lambda model, x, y, inner: inner(model[1], x, y)}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: CutOff(trained("standard")), "train and eval mode agree"),
        (lambda: nn.Sequential(Beneath(), trained("standard")), "adaptive: around the cut"),
    ],
    ids=["train mode", "adaptive"],
)
def test_views_that_have_gradients_are_attacked_along_them_though_the_network_has_none(make, reason, data):
    report = audited(make(), data, 0.1)
    assert reason in report.reasons
    left, clean = report.accuracies[reason]["accuracy"], report.accuracies["clean"]["accuracy"]
    assert left < 0.6 * clean
    assert report.accuracies["PGD, margin (random starts only: no gradient)"]["accuracy"] > 0.8 * clean
    assert report.accuracies["FGSM at 1 eps (clean images: no gradient)"]["accuracy"] == clean
    assert {"PGD, margin", "FGSM at 1 eps"}.isdisjoint(report.accuracies)
    compared = next(check for check in report.checks if check.name == reason)
    assert "random starts only" in compared.figure


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_attack_of_somebody_elses_making_is_held_to_the_threat_model(data, norm):
    eps, quick = 0.01, AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=5)
    seen = []

    def watched(images):
        seen.append(images.clone())
        return images

    model = Before(trained("standard"), watched)
    x, y = data[0][:100], data[1][:100]
    lab = Laboratory(model, x, y, ThreatModel(norm, eps), quick, batch_size=100, seed=0)
    lab.white_box()
    seen.clear()
    beyond = {"far": lambda model, x, y, inner: 1 - x, "near": lambda model, x, y, inner: (x + eps / 100).clamp(0, 1)}
    others.adaptive(lab, beyond)
    far, near = seen
    assert float(lab.threat.distance(far, x).max()) <= eps + 1e-6
    assert torch.equal(near[lab.standing], (x + eps / 100).clamp(0, 1)[lab.standing]), "what is inside stays as it is"
    size = rf"\({int(lab.standing.sum())}, 1, 8, 8\)"
    expected = f"images of shape {size}, torch.float32 on cpu; return one adversarial image for each"
    for got, change in (
        (r"images of shape \(1, 1, 8, 8\), torch.float32 on cpu", lambda x: x[:1]),
        (f"images of shape {size}, torch.float64 on cpu", lambda x: x.double()),
        ("a ndarray", lambda x: x.numpy()),
        ("a tuple", lambda x: (x, x)),
    ):
        with pytest.raises(InputError, match=rf"variants\['odd'\]: got {got}, expected {expected}"):
            others.adaptive(lab, {"odd": lambda model, x, y, inner, change=change: change(x)})


class OneClass(nn.Module):
    """A network that has collapsed: no image in the pixel range is of another class."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(64, 10)
        with torch.no_grad():
            self.out.weight.mul_(0.01)
            self.out.bias[3] = 5

    def forward(self, x):
        return self.out(x.flatten(1))


def test_a_network_that_gives_one_class_to_every_image_has_nothing_that_larger_balls_must_find():
    x, y, quick = torch.rand(100, 1, 8, 8), torch.full((100,), 3), AuditBudget(5, 1, 2, 2, 10)
    report = audit(OneClass(), x, y, eps=0.1, budget=quick, progress=False)
    check = next(check for check in report.checks if check.name == "accuracy falls to 0 as eps grows")
    assert check.status == "not run"
    assert report.verdict.startswith(f"{CONSISTENT}, on thin evidence: not run: accuracy falls to 0 as eps grows")
    assert "one class to every image" in check.figure
    x[0] = 0.0  # the same, but for an answer on one image that shows what every ball of the whole range holds
    seen = Before(OneClass(), lambda x: x)
    seen.model.out.register_forward_hook(lambda _, given, z: torch.where((given[0].sum(1) == 0)[:, None], -z, z))
    report = audit(seen, x, y, eps=0.1, budget=quick, progress=False)
    assert "accuracy falls to 0 as eps grows" in report.reasons


class Stubborn(nn.Module):
    """A layer that publishes an attack of its own."""

    def __init__(self, name, seen):
        super().__init__()
        self.attack_name, self.seen = name, seen

    def forward(self, x):
        return quantised(x)

    def adaptive_variants(self):
        def attack(model, x, y, inner):
            self.seen.append(type(model).__name__)
            return inner(model[1], x, y)  # straight through: the network behind the quantisation

        return {self.attack_name: attack}


def test_a_layers_own_attack_is_found_and_convicts(data):
    seen = []
    report = audited(nn.Sequential(Stubborn("straight through", seen), trained("standard")), data, 0.1)
    assert set(seen) == {"Sequential"}
    assert "adaptive: straight through" in report.reasons


def test_attacks_of_one_name_are_made_inside_each_other_and_their_losses_add_up():
    def layer(value):
        class Layer(nn.Module):
            def adaptive_variants(self):
                return {
                    "both": lambda model, x, y, inner: inner(model, x, y, lambda z, t: torch.full((len(t),), value))
                }

        return Layer()

    def base(model, x, y, loss=None):
        return loss(torch.zeros(len(y), 3), y)

    attacks = collect_variants(nn.Sequential(layer(1.0), layer(10.0), layer(100.0)))
    assert list(attacks) == ["both"]
    assert attacks["both"](nn.Identity(), torch.zeros(2, 1), torch.zeros(2), base).tolist() == [111.0, 111.0]


def test_the_published_attacks_of_this_packages_methods_run(data):
    from art_saliency.methods.aalp import AALP
    from art_saliency.methods.adv_gsct import AdvGSCT
    from art_saliency.methods.fsr import insert_fsr
    from art_saliency.methods.j_sigr import JSIGR

    x, y = data[0][:6], data[1][:6]
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4).eval()
    insert_fsr(model, "layer2", 10, x, hidden=4)
    insert_fsr(model, "layer3", 10, x, hidden=4)
    threat = ThreatModel("Linf", 0.1)

    def inner(network, images, labels, loss=None):
        return pgd(network, images, labels, threat=threat, max_iter=2, loss=loss or "cross-entropy")

    variants = collect_variants(model)
    assert list(variants) == ["gate softened", "gate frozen", "auxiliary logits"]
    for objective in (AALP(eps=0.1, layer="layer3"), AdvGSCT(eps=0.1), JSIGR(eps=0.1)):
        variants.update(objective.adaptive_variants())
    assert len(variants) == 6
    before = model(x).detach()
    for name, attack in variants.items():
        x_adv = attack(model, x, y, inner)
        assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6, name
        assert not torch.equal(x_adv, x), name
        assert torch.equal(model(x), before), name


def test_an_attack_is_run_once_and_what_counts_is_kept(data):
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4).eval()
    x = data[0][:6]
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # one image is wrong without an attack
    quick = AuditBudget(max_iter=20, restarts=1, long=1, noise_draws=2, square_queries=5, repeats=2, eot=2)
    lab = Laboratory(model, x, y, ThreatModel("Linf", 0.1), quick, batch_size=4, seed=0)
    attacked = []

    def attack(x, y):
        attacked.append(len(x))
        return x

    kept = lab.scored("one", attack)
    assert attacked == [4, 1]
    assert kept.tolist() == [0, 1, 1, 1, 1, 1]
    assert lab.scored("one", attack) is kept
    lab.under("passing", attack)
    assert attacked == [4, 1, 4, 1]
    assert torch.equal(lab.record("claimed", torch.ones(6, dtype=torch.bool)), lab.clean)
    assert list(lab.scores) == ["clean", "one", "claimed"]
    report = audit(model, x, y, eps=0.1, budget=quick, progress=False)
    assert {"PGD-20", "PGD-20, margin"} <= set(report.accuracies), "of as many steps, on another loss"


@pytest.mark.parametrize("change", [lambda x: x, noisy])
def test_a_radius_of_the_curve_is_attacked_once_unless_the_network_answers_at_random(data, change, monkeypatch):
    model, x, y = Before(trained("standard").eval(), change), data[0][:30], data[1][:30]
    lab = Laboratory(model, x, y, ThreatModel("Linf", 0.1), NOISY_BUDGET, batch_size=30, seed=0)
    under, attacked = lab.under, []
    monkeypatch.setattr(lab, "under", lambda name, attack: attacked.append(name) or under(name, attack))
    first, second = (gradients._curve_at(lab, 0.05) for _ in range(2))
    assert len(attacked) == (4 if lab.randomised else 2) == (4 if change is noisy else 2)
    lab.curve.clear()
    assert lab.randomised or torch.equal(gradients._curve_at(lab, 0.05), first)
    assert lab.randomised or torch.equal(first, second)
    assert not [name for name in lab.scores if "0.05" in name]


def test_an_attack_that_returns_no_images_has_found_nothing(data):
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4).eval()
    y = model(data[0][:6]).argmax(1)
    lab = Laboratory(model, data[0][:6], y, ThreatModel("Linf", 0.1), AuditBudget(), batch_size=4, seed=0)
    assert lab.under("broken", lambda x, y: torch.full_like(x, torch.nan)).tolist() == [1.0] * 6


class Rooted(nn.Module):
    """A square root of each pixel, added as nothing: its gradient is no number on black."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + 0 * x.sqrt().sum((1, 2, 3))[:, None]


def test_a_network_whose_gradients_are_no_numbers_is_convicted_of_that_alone_and_its_report_is_json(data):
    quick = AuditBudget(max_iter=3, restarts=1, long=2, noise_draws=2, square_queries=5)
    report = audit(Rooted(trained("standard")), *(part[:60] for part in data), eps=1e-6, budget=quick, progress=False)
    assert report.reasons == ["gradients exist"]
    linearity = next(check for check in report.checks if check.name == "loss linearity")
    assert linearity.status == "not run"
    assert linearity.figures == {"cosine": {"0.01 eps": None, "1 eps": None}, "forecast_error": None}
    json.dumps(report.to_json(), allow_nan=False)


def silent_on(row, *, sometimes=False):
    """Changes the logits of one row to no numbers in every pass over the whole batch; or in every other pass."""
    passes = []

    def change(z):
        passes.append(len(z))
        return (
            torch.where((torch.arange(len(z)) == row)[:, None], torch.nan, z) if len(passes) % 2 or not sometimes else z
        )

    return change


def test_logits_that_are_no_numbers_are_left_out_of_what_is_measured_and_missing_once_they_are_a_difference(data):
    x, y = data[0][:20], data[1][:20]
    model, row = trained("standard").eval(), 7
    others_rows = torch.arange(20) != row

    def lab(network, keep=slice(None)):
        return Laboratory(network, x[keep], y[keep], ThreatModel("Linf", 0.1), AuditBudget(), batch_size=20, seed=0)

    plain, spoilt = lab(model, others_rows), lab(After(model, silent_on(row)))
    assert (spoilt.gap, spoilt.answers) == (pytest.approx(plain.gap), plain.answers)
    assert (spoilt.spread, spoilt.randomised) == (0, False)
    assert spoilt.alone == pytest.approx(plain.alone, abs=1e-6)
    sometimes = lab(After(model, silent_on(row, sometimes=True)))
    assert (sometimes.spread, sometimes.randomised) == (1, True)
    nowhere = lab(After(model, lambda z: z / 0))
    assert (nowhere.gap, nowhere.spread, nowhere.alone, nowhere.answers) == (1, 0, 0, 0)


class NowhereOn(nn.Module):
    """A network that says nothing of one image."""

    def __init__(self, model, image):
        super().__init__()
        self.model, self.image = model, image

    def forward(self, x):
        same = (x - self.image).abs().flatten(1).amax(1) < 1e-6
        return torch.where(same[:, None], torch.nan, self.model(x))


def test_one_image_without_logits_hides_nothing_of_the_others(data):
    quick = AuditBudget(max_iter=20, restarts=1, long=1, noise_draws=2, square_queries=5)
    x, y = (part[:60] for part in data)
    network = NowhereOn(After(trained("standard"), lambda z: 100 * z), x[50])
    report = audit(network, x, y, eps=0.1, budget=quick, batch_size=60, progress=False)
    assert "the size of the logits hides nothing" in report.reasons
    deterministic = next(check for check in report.checks if check.name == "deterministic forward pass")
    assert deterministic.status == "pass"
    json.dumps(report.to_json(), allow_nan=False)


def test_square_is_left_out_with_its_reason_where_it_cannot_run():
    model = nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, 10))
    x = torch.rand(8, 1, 14, 14)
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=5)
    found = {}
    for norm in ("L2", "Linf"):
        report = audit(model, x, model(x).argmax(1), eps=0.01, norm=norm, budget=quick, progress=False)
        found[norm] = next(check for check in report.checks if check.name == "gradients beat queries")
    assert found["L2"].status == "not run"
    assert "got images of 14 x 14 pixels, expected sides that Square's tiles" in found["L2"].figure
    assert found["Linf"].status == "pass"


def test_consistent_without_any_black_box_attack_says_so():
    """Square has no place for images of this size under L2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, 10))
    x, quick = torch.rand(100, 1, 14, 14), AuditBudget(max_iter=5, restarts=1, long=1, noise_draws=2, square_queries=5)
    options = {"eps": 0.01, "norm": "L2", "budget": quick, "progress": False}
    y = model(x).argmax(1)
    thin = audit(model, x, y, **options)
    assert thin.missing == ["no black-box attack was run"]
    assert thin.verdict == f"{CONSISTENT}, on thin evidence: no black-box attack was run"
    assert f"**Verdict: {thin.verdict}**" in thin.to_markdown()
    assert thin.to_json()["missing"] == thin.missing
    assert audit(model, x, y, transferred=torch.ones(100, dtype=torch.bool), **options).verdict == CONSISTENT
    assert audit(model, x, y, **{**options, "norm": "Linf"}).verdict == CONSISTENT


# --- what AutoAttack says of itself ----------------------------------------------------------------------------------------


def test_what_autoattacks_own_square_finds_beyond_its_gradients_convicts(data):
    quick = AuditBudget(max_iter=5, restarts=1, long=1, noise_draws=2, square_queries=5)
    x, y = data[0][:60], data[1][:60]
    name = "AutoAttack's Square finds little that its gradients miss"
    options = {"eps": 0.1, "version": "custom", "attacks": ["apgd-ce", "square"], "progress": False}
    for change, status in ((Turned.apply, "masked"), (lambda x: x, "pass")):
        model = Before(trained("standard"), change)
        found = autoattack(model, x, y, **options, square_queries=300)
        report = audit(model, x, y, eps=0.1, autoattack_result=found, budget=quick, progress=False)
        check = next(check for check in report.checks if check.name == name)
        assert check.status == status, check.figure
        told = [line for line in found.warnings if "Square Attack has decreased" in line]
        assert told or status == "pass"
        for line in told:  # its own words, in every form of the report
            assert line in json.dumps(report.to_json())
            assert line.partition(" See ")[0] in report.to_markdown()


@pytest.mark.parametrize(("taken", "status"), [(1, "pass"), (3, "pass"), (6, "suspicious"), (20, "masked")])
def test_a_few_images_of_autoattacks_square_are_no_sign(data, taken, status):
    found = autoattack(trained("standard"), *(part[:100] for part in data), eps=0.01, version="custom",
                       attacks=["apgd-ce"], progress=False)  # fmt: skip
    left = {"apgd-ce": 0.5, "square": 0.5 - taken / 100}
    (check,) = others.square_in_autoattack(dataclasses.replace(found, robust_accuracy_after=left))
    assert check.status == status, check.figure
    assert others.square_in_autoattack(found) == []
    assert others.square_in_autoattack(None) == []


def test_autoattacks_doubts_about_its_own_figure_are_reasons(data):
    """Probabilities in the place of logits; the audit's own Square hears it, whether or not AutoAttack was run before."""
    quick = AuditBudget(max_iter=5, restarts=1, long=1, noise_draws=2, square_queries=5)
    x, y = data[0][:60], data[1][:60]
    for change, doubted in ((lambda z: z.softmax(1), True), (lambda z: z.log_softmax(1), False)):
        report = audit(After(trained("standard"), change), x, y, eps=0.1, budget=quick, progress=False)
        assert ("AutoAttack's warnings" in report.reasons) is doubted
        assert ("probability distribution" in report.to_markdown()) is doubted
        assert ("probability distribution" in json.dumps(report.to_json())) is doubted


def test_transfer_and_autoattack_join_the_evidence(data):
    model, quick = trained("standard"), AuditBudget(max_iter=5, restarts=1, long=1, noise_draws=2, square_queries=10)
    x, y = data[0][:40], data[1][:40]
    found = autoattack(model, x, y, eps=0.1, version="custom", attacks=["apgd-ce"], progress=False)
    options = {"eps": 0.1, "budget": quick, "progress": False}
    report = audit(model, x, y, autoattack_result=found, surrogates={"twin": trained("standard", seed=1)}, **options)
    assert report.accuracies["AutoAttack (custom)"]["accuracy"] == found.robust_accuracy
    assert "attacks transferred from other networks" in report.accuracies
    with pytest.raises(InputError, match="autoattack_result: got one of other images"):
        audit(model, x[:30], y[:30], autoattack_result=found, **options)
    with pytest.raises(InputError, match=r"eps 0\.1"):
        audit(model, x, y, autoattack_result=found, **{**options, "eps": 0.2})


def test_a_fingerprint_does_not_depend_on_the_form_of_the_pixels():
    """Bytes, float32 and float64 of the same images, the result of one of them handed to the audit of another."""

    class Halves(nn.Module):  # without weights, and so without a type
        def forward(self, x):
            return torch.stack([x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))], 1)

    model, quick = Halves(), AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=2)
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)
    y = model(images.float()).argmax(1)
    forms = (images, images.float() / 255, images.double() / 255)
    results = [autoattack(model, x, y, eps=0.01, version="custom", attacks=["square"], progress=False) for x in forms]
    for x in forms:
        for result in results:
            report = audit(model, x, y, eps=0.01, autoattack_result=result, budget=quick, progress=False)
            assert report.data_sha256 == results[1].data_sha256
    moved = transfer(model, images, y, surrogates={"itself": model}, threat=ThreatModel("Linf", 0.01), max_iter=1)
    assert moved.data_sha256 == results[1].data_sha256


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_images_are_said_to_be_too_few(data, count):
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=2)
    model = trained("standard")
    x = data[0][:count]
    report = audit(model, x, model.eval()(x).argmax(1), eps=0.01, budget=quick, progress=False)
    assert report.verdict == f"too few images to tell; {CONSISTENT}"
    assert f"**Verdict: {report.verdict}**" in report.to_markdown()


@pytest.mark.parametrize(("right", "few"), [(2, True), (20, False)])
def test_few_right_answers_are_too_few_among_however_many_images(data, right, few):
    """An attack takes from a network no more than what it has right."""
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=2)
    x, model = data[0][:42], trained("standard").eval()
    y = model(x).argmax(1)
    y[right:] = (y[right:] + 1) % 10
    report = audit(model, x, y, eps=0.01, budget=quick, progress=False)
    assert report.smallest < 1
    assert report.verdict.startswith("too few images to tell; ") == few


class View(nn.Module):
    """Cannot reshape a batch of no images."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(x.view(len(x), -1))


def test_nothing_right_is_too_few_and_no_attack_is_run(data):
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=2)
    x, model = data[0][:100], View()
    report = audit(model, x, (model(x).argmax(1) + 1) % 10, eps=0.1, budget=quick, progress=False)
    assert report.verdict == f"too few images to tell; {CONSISTENT}"
    assert all(row["accuracy"] == 0 for row in report.accuracies.values())


def test_the_widest_radius_is_that_of_the_pixel_range(data):
    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=2)
    x, y = data[0][:4], data[1][:4]
    audit(trained("standard"), x, y, eps=8, norm="L2", budget=quick, progress=False)
    with pytest.raises(InputError, match=r"eps: got 8\.5, expected 0 < eps <= 8; no two images"):
        audit(trained("standard"), x, y, eps=8.5, norm="L2", budget=quick, progress=False)


def test_a_network_of_float64_is_refused_with_the_cure(data):
    model = View().double()
    with pytest.raises(
        UnsupportedModelError, match=r"model: got a network of torch.float64.*convert it with .float\(\)"
    ):
        audit(model, data[0][:4].double(), data[1][:4], eps=0.1, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": 0}, "eps: got 0"),
        ({"norm": "L1"}, "norm: got 'L1'"),
        ({"x": torch.rand(3, 8, 8)}, "x: got"),
        ({"y": torch.tensor([11] * 4)}, "y: got"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"transferred": torch.ones(1, dtype=torch.bool)}, r"transferred: got shape \(1,\), expected \(4,\)"),
        ({"transferred": torch.ones(4, 1)}, r"transferred: got shape \(4, 1\), expected \(4,\)"),
    ],
)
def test_bad_arguments_are_named_and_touch_nothing(change, words):
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=4)
    given = {"x": torch.rand(4, 1, 8, 8), "y": torch.tensor([0, 1, 2, 3]), "eps": 0.1, **change}
    with pytest.raises(InputError, match=words):
        audit(model, given.pop("x"), given.pop("y"), progress=False, **given)
    assert model.training


# --- comparing two attacks ------------------------------------------------------------------------------------------------


def test_a_matched_pairs_interval_is_agresti_and_mins():
    """Their cells are n11, n12, n21, n22, each with half an image more."""
    first = torch.tensor([1.0] * 30 + [1.0] * 9 + [0.0] * 4 + [0.0] * 17)
    second = torch.tensor([1.0] * 30 + [0.0] * 9 + [1.0] * 4 + [0.0] * 17)
    found = paired_difference(first, second)
    n, b, c = 60 + 2, 9.5, 4.5
    centre = (b - c) / n
    half = 1.96 * math.sqrt((b + c) / n - centre**2) / math.sqrt(n)
    assert found.value == pytest.approx(5 / 60)
    assert (found.low, found.high) == (pytest.approx(centre - half), pytest.approx(centre + half))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_a_difference_lies_in_its_interval_and_turns_its_sign_with_the_order(pairs):
    first, second = (torch.tensor([pair[i] / 4 for pair in pairs], dtype=torch.float64) for i in (0, 1))
    forward, backward = paired_difference(first, second), paired_difference(second, first)
    assert -1 <= forward.low <= forward.high <= 1
    assert forward.value == pytest.approx(-backward.value)
    assert forward.low == pytest.approx(-backward.high)


def test_few_images_convict_nobody():
    """A dozen images that all point one way are the least that a verdict can rest on."""
    report_at = {count: module._smallest_conviction(count) for count in (3, 10, 100, 1000)}
    assert report_at[3] > 1
    assert report_at[10] > 0.4
    assert 0.1 < report_at[100] < 0.2
    assert report_at[1000] < 0.08
    with pytest.raises(InputError, match="scores: got shapes"):
        paired_difference(torch.zeros(3), torch.zeros(4))


# --- whose gradient it is ---------------------------------------------------------------------------------------------


class Detached(nn.Module):
    """Attaches three pixels in ten to its graph: autograd's gradient is of another function."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.keep = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float()

    def forward(self, x):
        return self.model(x * self.keep + (x * (1 - self.keep)).detach())


def forecast(model, data):
    laboratory = Laboratory(
        model.eval(), *(part[:60] for part in data), ThreatModel("Linf", 0.1), BUDGET, batch_size=60, seed=0
    )
    (check,) = gradients.true_gradients(laboratory)
    return check


def test_gradients_of_another_function_are_found_and_true_ones_are_not(data):
    assert forecast(Detached(trained("standard")), data).status == "suspicious"
    for model in (trained("standard"), trained("pgd-at"), After(trained("standard"), lambda z: 1e-3 * z)):
        check = forecast(model, data)
        assert (check.status, max(check.figures.values()) < 0.1) == ("pass", True), check.figure
    assert forecast(Before(trained("standard"), noisy), data).status == "not run"


def turned_beside_the_images(x):
    """Digits have 17 grey levels: where the pixels are others an attack is at work."""
    beside = ((16 * x - (16 * x).round()).abs() / 16).flatten(1).mean(1) > 0.01
    return torch.where(beside.view(-1, 1, 1, 1), Turned.apply(x), x)


def test_gradients_that_are_true_at_the_images_alone_are_found(data):
    check = forecast(Before(trained("standard"), turned_beside_the_images), data)
    assert check.figures["forecast_error"] < 0.1
    assert check.figures["forecast_error_around"] > 1
    assert check.status == "suspicious"


def decided(z):
    return 20 * nn.functional.one_hot(z.argmax(1), 10).float()


class Decoy(nn.Module):
    """The decision of one network, on whose argmax no gradient gets through, and the gradients and margins of another."""

    def __init__(self, model, other):
        super().__init__()
        self.model, self.other = model, other

    def forward(self, x):
        return decided(self.model(x)) + 0.5 * self.other(x)


def smoothly_activated():
    """A network of SiLU, without a kink, trained plainly."""
    torch.manual_seed(0)
    digits = load_data("digits")
    x, y = to_unit(digits.x_train).float(), digits.y_train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def leap(model, data):
    lab = Laboratory(
        model.eval(), *(part[:100] for part in data), ThreatModel("Linf", 0.1), BUDGET, batch_size=100, seed=0
    )
    return gradients.boundary(lab)[0]


def test_a_decision_that_margins_do_not_lead_to_is_found_where_gradients_are_true_to_what_they_are_of(data):
    decoy = Decoy(trained("standard"), trained("standard", seed=1))
    assert forecast(decoy, data).status == "pass"
    check = leap(decoy, data)
    assert (check.status, check.figures["leap"] > 0.5) == ("suspicious", True), check.figure


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained("standard"),
        lambda: trained("pgd-at"),
        smoothly_activated,
        lambda: After(trained("standard"), lambda z: 1e-3 * z),
        lambda: After(trained("standard"), lambda z: 100 * z),
        lambda: After(trained("pgd-at"), lambda z: z.softmax(1)),
    ],
    ids=["standard", "pgd-at", "silu", "small logits", "large logits", "probabilities"],
)
def test_margins_of_honest_networks_lead_to_the_boundary_whatever_their_scale(make, data):
    check = leap(make(), data)
    assert (check.status, check.figures["leap"] < 0.05) == ("pass", True), check.figure


def test_where_no_way_leads_from_class_to_class_the_margin_is_not_judged(data):
    assert leap(Before(trained("standard"), noisy), data).status == "not run"
    assert leap(OneClass(), (data[0], torch.full_like(data[1], 3))).status == "not run"


def test_small_logits_convict_nobody(data):
    """Multiplied, they would make of the cross-entropy the better loss that it is not."""
    laboratory = Laboratory(
        After(trained("pgd-at"), lambda z: 0.01 * z).eval(),
        *(part[:150] for part in data),
        ThreatModel("Linf", 0.2),
        BUDGET,
        batch_size=150,
        seed=0,
    )
    (check,) = gradients.logit_scale(laboratory)
    assert laboratory.gap < 0.2
    assert (check.status, "divided by 1 " in check.figure) == ("pass", True), check.figure


@pytest.mark.parametrize(("source", "known"), [("torch", True), ("numpy", True), ("own", False)])
def test_noise_is_known_to_the_attacker_or_the_check_is_not_made(source, known, data):
    own = torch.Generator().manual_seed(0)

    def change(x):
        if source == "numpy":
            return x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).to(x)  # noqa: NPY002
        return x + 0.1 * (torch.randn(x.shape, generator=own) if source == "own" else torch.randn_like(x))

    model = Before(trained("standard"), change).eval()
    few = AuditBudget(max_iter=2, eot=1, repeats=2)
    laboratory = Laboratory(model, *(part[:20] for part in data), ThreatModel("Linf", 0.1), few, batch_size=20, seed=0)
    check = others._known_noise(laboratory)
    assert (check.status != "not run") is known
    assert ("noise known to the attacker" in laboratory.scores) is known
