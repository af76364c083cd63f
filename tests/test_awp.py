"""Adversarial weight perturbation: a slow step by hand, weights that come back bit for bit, and gamma = 0 for every method."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from art_saliency.errors import InputError, NonFiniteLossError
from art_saliency.methods.base import Batch, LossTerms
from art_saliency.methods.baselines import PGDAT, TRADES, Standard
from art_saliency.methods.fsr import insert_fsr
from art_saliency.randomness import RandomSource
from art_saliency.trainers.methods import PGDATTrainer, StandardTrainer
from art_saliency.training import Extension, train
from art_saliency.training.awp import WeightPerturbation, ascent_in_weights
from art_saliency.training.batches import ResidentBatches
from art_saliency.training.engine import Engine
from tests.method_settings import ROWS, classifier, small_network

CPU = torch.device("cpu")


class Grads(Extension):
    """The gradient that the optimizer took, and the weights when it did."""

    def __init__(self):
        self.grads = []

    def after_step(self, run):
        self.grads.append([parameter.grad.clone() for parameter in run.model.parameters()])


def fit(digits, objective, extensions, *, model=None, epochs=1, lr=0.05, count=100, **options):
    torch.manual_seed(0)
    model = small_network(norm=True) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)
    batches = ResidentBatches(digits[0][:count], digits[1][:count], batch_size=50, device=CPU)
    train(
        model,
        objective,
        optimizer,
        batches,
        epochs=epochs,
        engine=Engine("cpu"),
        seed=0,
        extensions=extensions,
        **options,
    )
    return model


def by_hand(model, loss, gamma):
    """The gradient of `loss` at w + gamma ||w_l|| g_l / ||g_l||, layer by layer, on a copy."""
    model.zero_grad()
    loss(model).backward()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for own, other in zip(moved.parameters(), model.parameters(), strict=True):
            if own.ndim > 1:
                own += gamma * other.norm() * other.grad / other.grad.norm()
    moved.zero_grad()
    loss(moved).backward()
    return [parameter.grad for parameter in moved.parameters()]


@pytest.mark.parametrize("make", [PGDAT, TRADES])
def test_a_step_is_the_slow_step(make, digits):
    """The attack at the unmoved weights, then the gradient at the moved ones, then the optimizer at the unmoved ones."""
    x, y = digits[0][:50], digits[1][:50]
    torch.manual_seed(0)
    start = small_network(norm=True).train()
    objective, recorder, model = make(eps=0.1, max_iter=3), Grads(), copy.deepcopy(start)
    fit(digits, objective, [WeightPerturbation(0.05), recorder], model=model, count=50)

    random = RandomSource(0)
    index = random.permutation(50)
    x, y = x[index], y[index]
    x_adv = objective.adversarial(start, Batch(x, y, random=random))

    def loss(network):
        ce = nn.functional.cross_entropy
        if make is PGDAT:
            return ce(network(x_adv), y)
        z, z_adv = network(x), network(x_adv)
        p, q = z.softmax(1), z_adv.softmax(1)
        return ce(z, y) + 6 * (p * (p.log() - q.log())).sum(1).mean()

    expected = by_hand(copy.deepcopy(start), loss, 0.05)
    for found, hand in zip(recorder.grads[0], expected, strict=True):
        torch.testing.assert_close(found, hand, atol=1e-6, rtol=1e-4)
    for after, before, gradient in zip(model.parameters(), start.parameters(), recorder.grads[0], strict=True):
        torch.testing.assert_close(after, before - 0.05 * (gradient + 1e-2 * before), atol=1e-7, rtol=1e-5)
    plain = Grads()
    fit(digits, objective, [plain], model=copy.deepcopy(start), count=50)
    assert not torch.allclose(plain.grads[0][0], recorder.grads[0][0], rtol=1e-2)


def test_the_auxiliary_loss_of_fsr_is_ascended_too(digits):
    """Its head is moved along the gradient that only the auxiliary loss gives it, with the noise of the step."""
    torch.manual_seed(0)
    model = small_network()
    insert_fsr(model, "features", 10, digits[0][:2], hidden=4)
    moved, noise = [], []

    class Look(Extension):
        def around_gradient(self, run, batch, loss_terms):
            layer = model.features.fsr
            moved.append(layer.auxiliary.weight.detach().clone())
            return super().around_gradient(run, batch, loss_terms)

    class Noise(Standard):
        def forward(self, network, batch):
            result = super().forward(network, batch)
            noise.append(next(iter(network.features.fsr._drawn.values())).clone())
            return result

    before = model.features.fsr.auxiliary.weight.detach().clone()
    fit(digits, Noise(), [WeightPerturbation(0.05), Look()], model=model, count=50)
    assert torch.dist(moved[0], before) == pytest.approx(0.05 * float(before.norm()), rel=1e-4)
    assert len(noise) == 2
    assert torch.equal(*noise)


@pytest.mark.filterwarnings("ignore:.*catastrophic overfitting")  # four steps are no training
@pytest.mark.parametrize("method", ROWS)
def test_gamma_0_is_the_plain_method_bit_for_bit(method, digits):
    """Weights, statistics, figures: the second pass sees the images and the random numbers of the first."""
    found = []
    for awp in (None, 0.0):
        torch.manual_seed(0)
        network = small_network(norm=True)
        network.add_module("flat", nn.Sequential(nn.Flatten(), nn.Dropout(0.2)))
        art_classifier = classifier(network)
        torch.manual_seed(1)
        trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
        trainer.fit(digits[0][:96], digits[1][:96], nb_epochs=2, batch_size=48, seed=0, verbose=False, awp=awp)
        found.append((copy.deepcopy(art_classifier.model.state_dict()), trainer.history.column("loss")))
    (plain, losses), (perturbed, same_losses) = found
    assert losses == same_losses
    assert all(torch.equal(plain[name], value) for name, value in perturbed.items())
    assert trainer.history.meta["awp"] == {"gamma": 0.0}


@pytest.mark.parametrize("method", ROWS)
def test_every_method_trains_with_it(method, digits):
    x, y, x_test, y_test = digits
    art_classifier = classifier()
    trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
    trainer.fit(x[:600], y[:600], batch_size=100, nb_epochs=4, seed=0, verbose=False, awp=0.005)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]
    assert float((trainer.predict(x_test).argmax(1) == y_test.numpy()).mean()) > 0.4


def test_weights_come_back_bit_for_bit_also_after_an_error(digits):
    torch.manual_seed(0)
    model = small_network(norm=True)
    before, inside = copy.deepcopy(model.state_dict()), []

    class Fails(Standard):
        def forward(self, network, batch):
            inside.append([weight.detach().clone() for weight in network.parameters()])
            if len(inside) == 2:
                raise KeyboardInterrupt
            return super().forward(network, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(digits, Fails(), [WeightPerturbation(0.05)], model=model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    weights = list(model.parameters())
    for weight, first, second in zip(weights, *inside, strict=True):
        assert torch.equal(weight, first)
        assert torch.equal(weight, second) == (weight.ndim == 1)
        if weight.ndim > 1:
            assert torch.dist(weight, second).item() == pytest.approx(0.05 * weight.norm().item(), rel=1e-4)


def test_frozen_weights_stay_where_they_are(digits):
    torch.manual_seed(0)
    model = small_network()
    model.features[0].weight.requires_grad_(False)
    inside = []

    class Looks(Standard):
        def forward(self, network, batch):
            inside.append(network.features[0].weight.detach().clone())
            return super().forward(network, batch)

    before = model.features[0].weight.clone()
    fit(digits, Looks(), [WeightPerturbation(0.1)], model=model, count=50)
    assert all(torch.equal(before, seen) for seen in inside)


def test_an_attack_runs_once_a_step(digits):
    calls = []

    def attack(model, x, y):
        calls.append(len(x))
        return x

    fit(digits, PGDAT(eps=0.1, attack=attack), [WeightPerturbation(0.01)])
    assert calls == [50, 50]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_attack_of_the_users_own_draws_anew_in_every_step_as_it_does_without(digits, dropout):
    def starts(extensions):
        found = []

        def attack(model, x, y):
            found.append(torch.rand_like(x) * float(np.random.rand()))  # noqa: NPY002, as ART's attacks do
            return x + 0.1 * (found[-1] - 0.5)

        model = nn.Sequential(small_network(norm=True), nn.Dropout(dropout))
        trained = fit(digits, PGDAT(eps=0.1, attack=attack), extensions, model=model, epochs=2)
        return found, trained.state_dict()

    plain, weights = starts([])
    perturbed, same_weights = starts([WeightPerturbation(0.0)])
    assert len({float(start.sum()) for start in perturbed}) == 4
    assert all(map(torch.equal, plain, perturbed))
    assert all(torch.equal(weights[name], value) for name, value in same_weights.items())


def test_a_layer_without_a_gradient_is_not_moved_and_the_length_is_gammas_share():
    weights, gradients = [torch.randn(4, 3), torch.randn(2, 2)], [torch.randn(4, 3), torch.zeros(2, 2)]
    moved, still = ascent_in_weights(weights, gradients, 0.1)
    assert torch.equal(still, torch.zeros(2, 2))
    torch.testing.assert_close(moved.norm(), 0.1 * weights[0].norm())
    torch.testing.assert_close(
        nn.functional.cosine_similarity(moved.flatten(), gradients[0].flatten(), 0), torch.tensor(1.0)
    )


def test_a_loss_that_is_not_finite_still_stops_the_run_with_good_weights(digits):
    class Breaks(Standard):
        calls = 0

        def forward(self, network, batch):
            result = super().forward(network, batch)
            Breaks.calls += 1
            return LossTerms(result.loss * (float("nan") if Breaks.calls > 4 else 1), result.logits, result.terms)

    torch.manual_seed(0)
    model = small_network(norm=True)
    with pytest.raises(NonFiniteLossError):
        fit(digits, Breaks(), [WeightPerturbation(0.05)], model=model, epochs=3)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize(("value", "words"), [(-0.1, "awp: got -0.1, expected 0 <= awp"), ("much", "awp: got 'much'")])
def test_a_bad_gamma_is_refused_and_nothing_changes(value, words, digits):
    art_classifier = classifier()
    before = copy.deepcopy(art_classifier.model.state_dict())
    for trainer in (StandardTrainer(art_classifier), PGDATTrainer(art_classifier, eps=0.1)):
        with pytest.raises(InputError, match=words):
            trainer.fit(digits[0][:64], digits[1][:64], awp=value)
    assert all(torch.equal(before[name], value) for name, value in art_classifier.model.state_dict().items())
