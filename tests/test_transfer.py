"""Transfer attacks against loops written from the papers, identities among them, and the surrogates a run is given."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_saliency.attacks import fgsm, pgd
from art_saliency.augmentation import augmentation_by_name
from art_saliency.cli import main
from art_saliency.data import load_data
from art_saliency.errors import CheckpointError, InputError, UnsupportedModelError
from art_saliency.evaluation.accuracy import accuracy, binomial_interval
from art_saliency.evaluation.transfer import ENSEMBLE, SURROGATES, surrogates_for, transfer
from art_saliency.evaluation.transfer_attacks import (
    TRANSFER_ATTACKS,
    ensemble_logits,
    kernel_side,
    resize_and_pad,
    smooth,
    transfer_attack,
)
from art_saliency.files import sha256_of_tensors
from art_saliency.networks import build_network
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.trainers import surrogates
from art_saliency.trainers.methods import TRAINERS
from art_saliency.trainers.runs import make_classifier, read_run, save
from art_saliency.trainers.surrogates import Recipe, describe_optimizer, load_weights, train_surrogates
from tests.references import transfer_reference as reference

LINF, L2 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7)


def fitted(network, x, y, steps=30):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad(set_to_none=True)
    return network


@pytest.fixture(scope="module")
def networks(digits, tiny_network):
    """Three digit networks, each right on most images: the one under test and two surrogates, of three kinds."""
    x, y = digits[0][:500], digits[1][:500]
    torch.manual_seed(1)
    made = {
        "model": nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
        "a": nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
        "b": nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 10)),
    }
    return {name: fitted(network, x, y) for name, network in made.items()}


@pytest.fixture(scope="module")
def sample(digits):
    return digits[2][:100], digits[3][:100]


# ---- against the papers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
@pytest.mark.parametrize(("momentum", "kernel"), [(1.0, 1), (0.7, 1), (1.0, 3), (0.0, 5)])
def test_momentum_and_kernel_are_the_papers(networks, sample, threat, momentum, kernel):
    """In double precision, where no sign of a gradient hangs on rounding."""
    x, y = sample[0][:3].double(), sample[1][:3]
    sources = [copy.deepcopy(networks[name]).double().eval() for name in ("a", "b")]
    options = {"eps_step": 0.3 * threat.eps, "max_iter": 4, "momentum": momentum, "kernel": kernel}
    found = transfer_attack(sources, x, y, threat=threat, **options)
    for i in range(len(x)):
        expected = reference.mi_one(sources, x[i], int(y[i]), norm=threat.norm, eps=threat.eps, **options)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 32, 32), (1, 9, 14), (2, 2, 1)])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_diversity_is_resizing_and_padding_image_by_image(shape, probability):
    x = torch.rand(12, *shape, dtype=torch.float64)
    numbers = RandomSource(3).uniform(x.flatten(1)[:, :1].expand(-1, 4))
    found = resize_and_pad(x, probability, RandomSource(3))
    expected = torch.stack([reference.shrunk(x[i], *numbers[i].tolist(), probability) for i in range(len(x))])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    untouched = [torch.equal(a, b) for a, b in zip(found, x, strict=True)]
    assert untouched == [bool(coin >= probability) or max(shape[1:]) == 1 for coin in numbers[:, 0]]


@pytest.mark.parametrize(("side", "sizes"), [(8, {7}), (28, {25, 26, 27}), (32, {29, 30, 31})])
def test_images_shrink_to_every_size_they_may_and_go_everywhere(side, sizes):
    white = resize_and_pad(torch.ones(2000, 1, side, side), 1.0, RandomSource(0))[:, 0]
    assert set(white.amax(1).sum(1).round().int().tolist()) == sizes
    starts = set(white.amax(2).argmax(1).tolist())
    assert starts == set(range(side - min(sizes) + 1))
    assert torch.allclose(white.amax((1, 2)), torch.ones(2000))


def test_combined_attack_is_the_papers_too(networks, sample):
    x, y = sample[0][:3].double(), sample[1][:3]
    source = copy.deepcopy(networks["a"]).double().eval()
    random = RandomSource(5)
    numbers = [random.uniform(x.flatten(1)[:, :1].expand(-1, 4)) for _ in range(3)]
    options = {"eps_step": 0.04, "max_iter": 3, "momentum": 1.0, "kernel": 3}
    found = transfer_attack([source], x, y, threat=LINF, diversity=0.6, random=RandomSource(5), **options)
    for i in range(len(x)):

        def see(image, step, i=i):
            return reference.shrunk(image, *numbers[step][i].tolist(), 0.6)

        expected = reference.mi_one([source], x[i], int(y[i]), norm="Linf", eps=0.1, see=see, **options)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [3, 5, 15])
def test_smoothing_is_the_convolution_at_every_scale(side):
    gradient = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    expected = torch.stack([reference.convolve(one, reference.gaussian(side)) for one in gradient])
    torch.testing.assert_close(smooth(gradient, side), expected)
    assert smooth(gradient, 1) is gradient
    tiny = (gradient * 1e-37).float()  # a confident network's
    torch.testing.assert_close(smooth(tiny, side).double() * 1e37, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(smooth(torch.zeros(1, 1, 4, 4), side), torch.zeros(1, 1, 4, 4))


def test_the_kernel_suits_the_images():
    sides = {side: kernel_side(torch.empty(1, 3, side, side)) for side in (8, 28, 32, 64, 224, 299)}
    assert sides == {8: 3, 28: 3, 32: 3, 64: 3, 224: 11, 299: 15}


# ---- identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
def test_without_momentum_diversity_and_kernel_it_is_pgd_bit_for_bit(networks, sample, threat):
    x, y = sample
    for source in networks.values():
        expected = pgd(source, x, y, threat=threat, random_start=False)
        nothing = {"momentum": 0.0, "diversity": 0.0, "kernel": 1}
        assert torch.equal(transfer_attack([source], x, y, threat=threat, **nothing), expected)
        assert torch.equal(transfer_attack([source], x, y, threat=threat, **TRANSFER_ATTACKS["plain"]), expected)
        one_step = fgsm(source, x, y, threat=threat)
        for preset in ("plain", "mi"):  # the first step knows no momentum yet
            kept = TRANSFER_ATTACKS[preset]
            found = transfer_attack([source], x, y, threat=threat, max_iter=1, eps_step=threat.eps, **kept)
            assert torch.equal(found, one_step) or threat.norm == "L2"
            torch.testing.assert_close(found, one_step)


def test_presets_differ_in_what_they_are_named_for(networks, sample):
    x, y = sample
    made = {
        name: transfer_attack([networks["a"]], x, y, threat=LINF, random=RandomSource(0), **preset)
        for name, preset in TRANSFER_ATTACKS.items()
    }
    names = list(made)
    for i, one in enumerate(names):
        assert not any(torch.equal(made[one], made[other]) for other in names[i + 1 :])
    assert set(TRANSFER_ATTACKS) == {"plain", "mi", "di", "ti", "mi-di-ti"}
    combined = {**TRANSFER_ATTACKS["mi"], "diversity": TRANSFER_ATTACKS["di"]["diversity"], "kernel": None}
    assert TRANSFER_ATTACKS["mi-di-ti"] == combined
    assert TRANSFER_ATTACKS["ti"]["kernel"] is None


def test_an_ensemble_of_one_or_of_copies_is_that_network(networks, sample):
    x, y = sample
    one = networks["a"]
    alone = transfer_attack([one], x, y, threat=LINF)
    assert torch.equal(transfer_attack([one, one], x, y, threat=LINF), alone)
    assert torch.equal(ensemble_logits([one], x), one(x))
    mean = (networks["a"].eval()(x) + networks["b"].eval()(x)) / 2
    torch.testing.assert_close(ensemble_logits([networks["a"], networks["b"]], x), mean)


def test_the_same_seed_gives_the_same_images_and_another_one_others(networks, sample):
    x, y = sample

    def made(seed):
        random = RandomSource(seed)
        return transfer_attack([networks["a"]], x, y, threat=LINF, random=random, **TRANSFER_ATTACKS["di"])

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    state = torch.get_rng_state()
    made(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("attack", ["plain", "mi"])
def test_linear_networks_have_a_closed_form(norm, attack):
    """Two classes and one weight vector: every gradient points along it, whatever the step, so the end is the ball's edge."""
    torch.manual_seed(0)
    weight = torch.randn(2, 12)
    source = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    source[1].weight.data.copy_(weight)
    x, y, eps = 0.5 + 0.05 * torch.randn(20, 3, 2, 2), torch.arange(20) % 2, 0.2
    along = (weight[1] - weight[0]).view(3, 2, 2) * torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    expected = x + eps * (along.sign() if norm == "Linf" else along / along.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    found = transfer_attack([source], x, y, threat=ThreatModel(norm, eps), **TRANSFER_ATTACKS[attack])
    torch.testing.assert_close(found, expected)
    victim = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    margin = (victim(expected).gather(1, y[:, None]) - victim(expected).gather(1, 1 - y[:, None]))[:, 0]
    result = transfer(victim, x, y, surrogates={"s": source}, threat=ThreatModel(norm, eps), attacks=[attack])
    assert result.rows[0].correct == int((margin > 0).sum())


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60)
@given(
    threat=st.one_of(
        st.builds(ThreatModel, st.just("Linf"), st.floats(0, 1)),
        st.builds(ThreatModel, st.just("L2"), st.floats(0, 10)),
    ),
    shape=shapes,
    attack=st.sampled_from(list(TRANSFER_ATTACKS)),
    seed=st.integers(0, 1000),
)
def test_images_stay_within_the_threat_model(threat, shape, attack, seed):
    torch.manual_seed(seed)
    pixels = shape[0] * shape[1] * shape[2]
    sources = [nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    x, y = torch.rand(4, *shape).round(decimals=1), torch.tensor([0, 1, 2, 0])
    found = transfer_attack(
        sources, x, y, threat=threat, max_iter=3, random=RandomSource(seed), **TRANSFER_ATTACKS[attack]
    )
    assert found.shape == x.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert bool((threat.distance(found.double(), x.double()) <= threat.eps + 1e-6).all())
    assert not found.requires_grad
    if threat.eps == 0:
        assert torch.equal(found, x)
        assert found.data_ptr() != x.data_ptr()


def everything(network):
    return (
        [module.training for module in network.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in network.parameters()],
        sha256_of_tensors(network.state_dict()),
    )


def test_nothing_is_touched(networks, sample):
    x, y = sample
    chosen = {name: copy.deepcopy(network).train() for name, network in networks.items()}
    chosen["model"][1].eval()
    chosen["a"][0].weight.requires_grad_(False)
    before = [everything(network) for network in chosen.values()]
    kept, state = x.clone(), torch.get_rng_state()
    model, others = chosen["model"], {"a": chosen["a"], "b": chosen["b"]}
    transfer(model, x, y, surrogates=others, threat=LINF, max_iter=2)
    with pytest.raises(InputError):
        transfer(model, x, y, surrogates={"a": chosen["a"], "odd": TooWide()}, threat=LINF)
    assert [everything(network) for network in chosen.values()] == before
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attack_works_where_gradients_are_switched_off(networks, sample):
    expected = transfer_attack([networks["a"]], *sample, threat=LINF)
    with torch.no_grad():
        assert torch.equal(transfer_attack([networks["a"]], *sample, threat=LINF), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources: got no network, expected at least one"),
        ({"sources": nn.Sequential(nn.Flatten())}, "sources: got one network, expected a sequence of networks"),
        ({"sources": [3]}, "sources: got a int, expected torch.nn.Modules"),
        ({"x": torch.rand(2, 8, 8)}, r"x: got shape \(2, 8, 8\), expected 4 axes"),
        ({"momentum": -0.1}, "momentum: got -0.1, expected 0 <= momentum"),
        ({"diversity": 1.1}, "diversity: got 1.1, expected 0 <= diversity <= 1"),
        ({"kernel": 4}, "kernel: got 4, expected an odd side"),
        ({"kernel": 0}, "kernel: got 0, expected a whole number, 1 <= kernel"),
        ({"max_iter": -1}, "max_iter: got -1"),
        ({"eps_step": -1}, "eps_step: got -1"),
        ({"loss": "squares"}, "loss: got 'squares', expected one of"),
    ],
)
def test_bad_arguments_of_an_attack_are_refused(networks, sample, change, message):
    arguments = {"sources": [networks["a"]], "x": sample[0], "y": sample[1], "threat": LINF, **change}
    with pytest.raises(InputError, match=f"^{message}"):
        transfer_attack(**arguments)


def test_a_surrogate_without_gradients_is_refused(sample):
    class Steps(nn.Module):
        def forward(self, x):
            return F.one_hot(x.flatten(1).argmax(1) % 10, 10).float()

    with pytest.raises(UnsupportedModelError, match="differentiable forward pass"):
        transfer_attack([Steps()], *sample, threat=LINF)


# ---- the measurement ----------------------------------------------------------------------------------------------------


def test_figures_are_those_of_a_loop_over_attacks(networks, sample):
    x, y = sample
    model, others = networks["model"], {"a": networks["a"], "b": networks["b"]}
    result = transfer(model, x, y, surrogates=others, threat=LINF, attacks=("mi", "ti", "plain"), max_iter=3)
    sources = {**{name: [network] for name, network in others.items()}, ENSEMBLE: list(others.values())}
    assert [(row.surrogate, row.attack) for row in result.rows] == [
        (source, attack) for source in ("a", "b", ENSEMBLE) for attack in ("mi", "ti", "plain")
    ]
    for network in networks.values():
        network.eval()
    right = model(x).argmax(1) == y
    assert result.clean_correct == int(right.sum())
    for row in result.rows:
        x_adv = transfer_attack(sources[row.surrogate], x, y, threat=LINF, max_iter=3, **TRANSFER_ATTACKS[row.attack])
        resisted = model(x_adv).argmax(1) == y
        own = ensemble_logits(sources[row.surrogate], x_adv).argmax(1) == y
        assert (row.correct, row.surrogate_correct, row.count) == (int(resisted.sum()), int(own.sum()), 100)
        assert (row.accuracy, row.surrogate_accuracy) == (row.correct / 100, row.surrogate_correct / 100)
        right = right & resisted
    assert torch.equal(result.correct, right)
    assert result.robust_accuracy == int(right.sum()) / 100
    assert result.interval == binomial_interval(int(right.sum()), 100)
    assert result.clean_accuracy == accuracy(model, x, y)
    assert result.surrogates_correct == {name: round(100 * accuracy(net, x, y)) for name, net in others.items()}
    assert 0 < result.robust_accuracy < result.clean_accuracy, "a test on images that tell nothing"


def test_the_network_as_its_own_surrogate_is_a_white_box_attack(networks, sample):
    x, y = sample
    model = networks["model"]
    result = transfer(model, x, y, surrogates={"itself": model}, threat=LINF, attacks=["plain"])
    (row,) = result.rows
    assert row.correct == row.surrogate_correct
    assert row.accuracy == accuracy(model, pgd(model, x, y, threat=LINF, random_start=False), y)


def test_a_zero_radius_is_clean_accuracy(networks, sample):
    result = transfer(
        networks["model"], *sample, surrogates={"a": networks["a"]}, threat=ThreatModel("L2", 0), max_iter=1
    )
    assert {row.correct for row in result.rows} == {result.clean_correct}
    assert result.robust_accuracy == result.clean_accuracy


def test_batches_change_nothing_where_nothing_is_drawn(networks, sample):
    options = {"surrogates": {"a": networks["a"].double()}, "threat": LINF, "attacks": ["mi", "ti"], "max_iter": 3}
    model, x, y = copy.deepcopy(networks["model"]).double(), sample[0].double(), sample[1]
    try:
        results = [transfer(model, x, y, batch_size=size, **options) for size in (7, 100, 1000)]
    finally:
        networks["a"].float()
    assert all(torch.equal(result.correct, results[0].correct) for result in results)
    assert all(result.rows == results[0].rows for result in results)


def test_arrays_uint8_and_one_hot_labels_are_taken(networks, sample):
    x, y = (sample[0] * 255).round().byte(), sample[1]
    options = {"surrogates": {"a": networks["a"]}, "threat": LINF, "attacks": ["mi"], "max_iter": 2}
    plain = transfer(networks["model"], x.float() / 255, y, **options)
    assert torch.equal(
        transfer(networks["model"], x.numpy(), F.one_hot(y, 10).numpy(), **options).correct, plain.correct
    )


def test_a_result_is_json_and_repeats(networks, sample):
    def run(seed):
        return transfer(
            networks["model"],
            *sample,
            surrogates={"a": networks["a"], "b": networks["b"]},
            threat=LINF,
            attacks=["di", "mi"],
            max_iter=2,
            seed=seed,
        )

    page = json.loads(json.dumps(run(4).to_json()))
    again = run(4).to_json()
    assert page.pop("seconds") >= 0
    again.pop("seconds")
    assert page == again
    assert page["seed"] == 4
    assert page["batch_size"] == 250
    assert page["attacks"]["di"] == {"momentum": 0.0, "diversity": 0.5, "kernel": 1}
    assert page["weights_sha256"] == sha256_of_tensors(networks["model"].state_dict())
    assert set(page["surrogates_sha256"]) == set(page["surrogates"]) == {"a", "b"}
    for figure in (page, page["clean"], *page["surrogates"].values(), *page["rows"]):
        assert figure["accuracy"] == figure["correct"] / figure["count"]
        assert figure["interval_95"] == list(binomial_interval(figure["correct"], figure["count"]))
    assert len(page["rows"]) == 6
    assert page["rows"][0]["on_surrogate"]["count"] == 100
    assert page["eps_step"] == 2.5 * LINF.eps / 2


def test_logits_that_are_not_finite_are_errors(networks, sample):
    class Broken(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :10].clone()
            logits[::2] = torch.nan
            return logits

    y = Broken()(sample[0]).argmax(1)
    result = transfer(Broken(), sample[0], y, surrogates={"a": networks["a"]}, threat=LINF, attacks=["mi"], max_iter=1)
    assert not result.correct[::2].any()


class Rooted(nn.Module):
    """The roots of ten pixels' light: its gradient is infinite on black."""

    def forward(self, x):
        return x.flatten(1)[:, 18:28].sqrt()


@pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
def test_a_surrogate_whose_gradient_is_partly_no_number_convicts_nobody(networks, sample, threat):
    x, tiny = sample[0], ThreatModel(threat.norm, 1e-7)
    y = networks["a"].eval()(x).argmax(1)
    result = transfer(networks["a"], x, y, surrogates={"rooted": Rooted()}, threat=tiny, max_iter=2)
    assert bool(result.correct.all())


@pytest.mark.parametrize("attack", ["plain", "mi", "ti"])
def test_the_finite_entries_of_a_surrogates_gradient_still_count(sample, attack):
    x, y = sample[0][:20], sample[1][:20]
    x_adv = transfer_attack([Rooted()], x, y, threat=LINF, max_iter=2, **TRANSFER_ATTACKS[attack])
    assert bool(torch.isfinite(x_adv).all())
    assert bool(((x_adv - x).flatten(1).abs().amax(1) > 0).all())


def test_images_of_an_attack_that_are_no_images_are_not_found_by_it(networks, sample, monkeypatch):
    broken = torch.full_like(sample[0], torch.nan)
    monkeypatch.setattr("art_saliency.evaluation.transfer.transfer_attack", lambda sources, x, y, **_: broken[: len(x)])
    y = networks["model"].eval()(sample[0]).argmax(1)
    result = transfer(networks["model"], sample[0], y, surrogates={"a": networks["a"]}, threat=LINF, attacks=["mi"])
    assert bool(result.correct.all())


class TooWide(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 11, device=x.device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surrogates": {}}, "surrogates: got none, expected at least one network"),
        ({"surrogates": [nn.Flatten()]}, "surrogates: got a list, expected at least one network by its name"),
        ({"surrogates": {"s": 3}}, r"surrogates\['s'\]: got a int, expected a torch.nn.Module"),
        ({"surrogates": {ENSEMBLE: nn.Flatten()}}, "surrogates: got the name 'ensemble'"),
        (
            {"surrogates": {"s": TooWide()}},
            r"surrogates\['s'\]: got shape \(1, 11\) for one image, expected logits of \(1, 10\)",
        ),
        ({"surrogates": {"s": nn.Linear(3, 2)}}, r"surrogates\['s'\]: got a failure \(.*shapes cannot be multiplied"),
        (
            {"surrogates": {"s": nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double())}},
            r"surrogates\['s'\]: got a network of torch.float64 on cpu, expected torch.float32 on cpu",
        ),
        ({"attacks": []}, "attacks: got no name"),
        ({"attacks": "mi"}, r"attacks: got 'mi', expected a sequence of names; write \['mi'\]"),
        ({"attacks": ["mim"]}, "attacks: got 'mim', expected one of .*did you mean 'mi'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"max_iter": 1.5}, "max_iter: got 1.5"),
        ({"eps_step": float("nan")}, "eps_step: got nan"),
        ({"y": torch.full((100,), 10)}, "y: got labels from 10 to 10"),
        ({"x": torch.full((100, 1, 8, 8), 2.0)}, "x: got values from 2 to 2"),
    ],
)
def test_bad_arguments_of_the_measurement_are_refused(networks, sample, change, message):
    arguments = {"x": sample[0], "y": sample[1], "surrogates": {"a": networks["a"]}, "threat": LINF, **change}
    before = everything(networks["model"])
    with pytest.raises(InputError, match=f"^{message}"):
        transfer(networks["model"], **arguments)
    assert everything(networks["model"]) == before


# ---- surrogates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "own", "expected"), [(0, 0, [1, 2, 3]), (0, 7, [0, 1, 2]), (5, 6, [5, 7, 8]), (2, None, [2, 3, 4])]
)
def test_three_surrogates_of_three_seeds_none_of_them_the_networks_own(seed, own, expected):
    calls = []

    def train_copy(method, seed):
        calls.append((method, seed))
        return nn.Identity()

    made = surrogates_for(train_copy, "aalp", seed=seed, own_seed=own)
    assert calls == list(zip(("standard", "pgd-at", "aalp"), expected, strict=True))
    assert tuple(made) == SURROGATES == ("standard", "pgd-at", "same recipe, other seed")
    with pytest.raises(InputError, match=r"^seed: got -1"):
        surrogates_for(train_copy, "aalp", seed=-1)


NETWORK = {"name": "small-cnn", "num_classes": 10, "input_shape": [1, 8, 8], "width": 4}


def trained_run(folder, method, *, seed=0, split=None, recipe=True, weights=None, **parameters):
    """A run of one epoch on digits. :return: Its page, its classifier, its data."""
    data = load_data("digits")
    torch.manual_seed(seed)
    model = build_network(**NETWORK)
    if weights is not None:
        load_weights(model, str(weights))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.02)
    art = make_classifier(model, input_shape=(1, 8, 8), num_classes=10, optimizer=optimizer)
    known = Recipe(
        parameters=parameters,
        optimizer=describe_optimizer(optimizer),
        epochs=1,
        batch_size=100,
        seed=seed,
        scheduler="cosine",
        augment="crop",
        grad_clip=1.0,
        validation_split=0.2,
        weights=None if weights is None else str(weights),
    )
    trainer = TRAINERS[method.partition("+")[0]](art, **parameters)
    (x, y), _ = data.split(0.2, seed if split is None else split)
    trainer.fit(
        x,
        y,
        batch_size=100,
        nb_epochs=1,
        scheduler="cosine",
        seed=seed,
        augment=augmentation_by_name("crop"),
        grad_clip=1.0,
        verbose=False,
    )
    save(
        folder,
        art,
        network=NETWORK,
        method=method,
        settings=trainer.config(),
        data={"spec": "digits", "fingerprint": data.fingerprint()},
        history=trainer.history,
        recipe=known.to_json() if recipe else None,
    )
    return read_run(folder), art, data


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pgd-at", {"eps": 0.1, "max_iter": 2}),
        ("fsr+pgd-at", {"base": "pgd-at", "target": "layer3", "hidden": 4, "eps": 0.1, "max_iter": 1}),
    ],
)
def test_surrogates_are_bit_for_bit_what_training_by_the_recipe_from_their_seeds_makes(tmp_path, method, parameters):
    page, _, data = trained_run(tmp_path / "run", method, seed=1, **parameters)
    state = torch.get_rng_state()
    made = train_surrogates(page, data, seed=1, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert tuple(made) == SURROGATES
    assert not any(module.training for network in made.values() for module in network.modules())
    at = parameters if method == "pgd-at" else {"eps": 0.1}
    for name, (trainer, seed, chosen) in zip(
        SURROGATES, [("standard", 2, {}), ("pgd-at", 3, at), (method, 4, parameters)], strict=True
    ):
        expected, _, _ = trained_run(tmp_path / name, trainer, seed=seed, split=1, **chosen)
        assert sha256_of_tensors(made[name].state_dict()) == expected["weights_sha256"] != page["weights_sha256"]


@pytest.mark.parametrize(
    "words",
    [
        "pgd-at --set max_iter=2 --optimizer sgd --lr 0.05 --scheduler step --augment crop --grad-clip 1 --batch-size 90",
        "fsr --set max_iter=1 --set hidden=4 --scheduler none --weight-decay 0.01 --validation-split 0 --normalise",
    ],
)
def test_what_the_command_line_records_repeats_the_run_bit_for_bit(tmp_path, monkeypatch, words):
    """From the run's own seed, which surrogates never take, its twin would be itself."""
    method, *options = words.split()
    common = ["--data", "digits", "--eps", "0.1", "--epochs", "1", "--width", "4", "--seed", "3", "--device", "cpu"]
    assert main(["train", method, *options, *common, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    page = read_run(tmp_path / "run")
    monkeypatch.setattr(surrogates, "surrogates_for", lambda copy, method, **_: {"itself": copy(method, 3)})
    again = train_surrogates(page, load_data("digits"), seed=0, quiet=True)["itself"]
    assert sha256_of_tensors(again.state_dict()) == page["weights_sha256"]


def test_surrogates_attack_the_network_they_were_made_for(tmp_path):
    page, art, data = trained_run(tmp_path / "run", "standard")
    with pytest.raises(InputError, match=r"^threat: got nothing, expected a threat model"):
        train_surrogates(page, data, seed=0, quiet=True)
    made = train_surrogates(page, data, seed=0, threat=ThreatModel("L2", 0.5), epochs=4, quiet=True)
    result = transfer(
        art.model, data.x_test, data.y_test, surrogates=made, threat=ThreatModel("Linf", 0.2), attacks=["mi"]
    )
    assert result.robust_accuracy <= result.clean_accuracy
    assert len(result.rows) == 4


def test_surrogates_begin_from_the_weights_the_run_began_from(tmp_path):
    first, _, data = trained_run(tmp_path / "first", "standard")
    page, _, _ = trained_run(tmp_path / "second", "standard", weights=tmp_path / "first" / "weights.pt")
    assert page["recipe"]["weights"] == str(tmp_path / "first" / "weights.pt")
    threat = ThreatModel("Linf", 0.1)
    page["recipe"]["optimizer"] = {"name": "SGD", "lr": 0.0}  # then they stay where they begin
    page["recipe"]["scheduler"] = None
    made = train_surrogates(page, data, seed=0, threat=threat, quiet=True)
    assert {sha256_of_tensors(network.state_dict()) for network in made.values()} == {first["weights_sha256"]}
    (tmp_path / "first" / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.pt: no such file"):
        train_surrogates(page, data, seed=0, threat=threat, quiet=True)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2, 3)}}, tmp_path / "w.pt")
    layer = nn.Linear(3, 2, bias=False)
    load_weights(layer, str(tmp_path / "w.pt"))
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match=r"w\.pt: these weights do not fit the network: size mismatch"):
        load_weights(nn.Linear(4, 2, bias=False), str(tmp_path / "w.pt"))


def test_a_run_without_a_recipe_has_no_twin(tmp_path):
    page, _, data = trained_run(tmp_path / "run", "pgd-at", eps=0.1, max_iter=1, recipe=False)
    for damaged in (page, {**page, "recipe": {"epochs": 1}}, {**page, "recipe": {**asdict_of(page), "nonsense": 1}}):
        with pytest.raises(CheckpointError, match="train it again, or give surrogates of your own"):
            train_surrogates(damaged, data, seed=0, quiet=True)
    of_a_function = {**asdict_of(page), "parameters": {"eps": 0.1, "attack": {"callable": "mine"}}}
    with pytest.raises(InputError, match=r"^surrogates: got a run whose attack is a function \(mine\)"):
        train_surrogates({**page, "recipe": of_a_function}, data, seed=0, quiet=True)
    with pytest.raises(InputError, match=r"^method: got 'mine', expected one of this package's"):
        train_surrogates({**page, "method": "mine", "recipe": asdict_of(page)}, data, seed=0, quiet=True)
    with pytest.raises(InputError, match=r"^epochs: got 0"):
        train_surrogates({**page, "recipe": asdict_of(page)}, data, seed=0, epochs=0, quiet=True)


def asdict_of(page):
    optimizer = {"name": "SGD", "lr": 0.1}
    return Recipe(parameters=page["settings"], optimizer=optimizer, epochs=1, batch_size=10, seed=0).to_json()


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam"])
def test_an_optimizer_survives_json(kind):
    """Also AdamW, whose defaults hold more than it takes."""
    model = nn.Linear(2, 2)
    settings = {"lr": 0.03, "weight_decay": 0.1}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **settings)
    known = json.loads(json.dumps(describe_optimizer(optimizer)))
    recipe = Recipe(parameters={}, optimizer=known, epochs=1, batch_size=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = recipe.make_optimizer(nn.Linear(2, 2))
    assert type(again) is type(optimizer)
    assert json.dumps(again.defaults) == json.dumps(optimizer.defaults)


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_figures_of_the_cpu(networks, sample):
    others = {"a": networks["a"], "b": networks["b"]}
    expected = transfer(networks["model"], *sample, surrogates=others, threat=LINF, attacks=["mi", "ti"])
    moved = {name: copy.deepcopy(network).cuda() for name, network in networks.items()}
    model = moved.pop("model")
    found = transfer(model, *sample, surrogates=moved, threat=LINF, attacks=["mi", "ti"])
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert abs(row.correct - other.correct) <= 2
    diverse = transfer(model, *sample, surrogates=moved, threat=LINF)
    assert diverse.correct.device.type == "cpu"
    assert diverse.robust_accuracy <= min(row.accuracy for row in diverse.rows)
    with pytest.raises(InputError, match=r"^surrogates\['a'\]: got a network of torch.float32 on cpu, expected"):
        transfer(model, *sample, surrogates=others, threat=LINF)
