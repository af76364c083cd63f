"""The baselines: their losses against slow references, their attacks, and the rules that they promise the loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from art_saliency.attacks import pgd
from art_saliency.errors import InputError
from art_saliency.evaluation.accuracy import pgd_accuracy
from art_saliency.methods.aalp import AALP
from art_saliency.methods.base import Batch, LossTerms, Objective
from art_saliency.methods.baselines import (
    ALP,
    FGSMRS,
    MART,
    PGDAT,
    TRADES,
    AdversarialObjective,
    Standard,
    alp_loss,
    boosted_cross_entropy,
    kl_divergence,
    mart_loss,
    trades_loss,
)
from art_saliency.randomness import RandomSource, normal
from art_saliency.threat import ThreatModel
from tests.references import baselines_reference as reference

EPS = 0.1
ADVERSARIAL: list[type[AdversarialObjective]] = [FGSMRS, PGDAT, TRADES, MART, ALP]
TWO_FORWARDS = {TRADES, MART}
quick = settings(max_examples=25, deadline=None, derandomize=True)


def network(seed: int = 0, classes: int = 10, channels: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )


def images(count: int = 7, classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *shape, generator=generator)
    return Batch(x, torch.randint(classes, (count,), generator=generator), random=RandomSource(seed))


def ready(seed: int = 0) -> tuple[nn.Sequential, Batch]:
    model, batch = network(seed), images()
    with torch.no_grad():
        model.eval()(batch.x)  # gives the lazy layer its shape
    return model.train(), batch


def stepped(objective: Objective, model: nn.Module, batch: Batch) -> tuple[LossTerms, dict[str, Tensor]]:
    """One forward and backward from a fresh random source: the terms and the weights' gradients."""
    model.zero_grad()
    out = objective(model, Batch(batch.x, batch.y, random=RandomSource(5)))
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pairs(draw: st.DataObject) -> tuple[Tensor, Tensor, Tensor]:
    n, k = draw.draw(st.integers(1, 6)), draw.draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 999)))
    scale = draw.draw(st.sampled_from([0.01, 1.0, 8.0]))
    z, z_adv = scale * torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    return z, z_adv, torch.randint(k, (n,), generator=generator)


# --- losses ---------------------------------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_losses_equal_the_references(data: st.DataObject) -> None:
    z, z_adv, y = pairs(data)
    weight, smoothing = data.draw(st.floats(0, 9)), data.draw(st.sampled_from([0.0, 0.2]))
    share = data.draw(st.floats(0, 1))
    rows, rows_adv, labels = z.numpy(), z_adv.numpy(), y.tolist()
    expected = {
        "trades": reference.trades(rows, rows_adv, labels, weight, smoothing),
        "mart": reference.mart(rows, rows_adv, labels, weight),
        "alp": reference.alp(rows, rows_adv, labels, weight, share, smoothing),
    }
    got = {
        "trades": trades_loss(z, z_adv, y, beta=weight, label_smoothing=smoothing),
        "mart": mart_loss(z, z_adv, y, lam=weight),
        "alp": alp_loss(z, z_adv, y, lam=weight, clean_weight=share, label_smoothing=smoothing),
    }
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_the_defaults_are_the_papers() -> None:
    assert (TRADES(eps=EPS).beta, MART(eps=EPS).lam, ALP(eps=EPS).lam, ALP(eps=EPS).clean_weight) == (6, 5, 0.5, 0.5)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_losses_and_derivatives_stay_finite_where_probabilities_round_to_0_and_1(scale: float) -> None:
    z = scale * torch.eye(4)[:, :3].repeat(2, 1)
    for loss in (trades_loss, mart_loss, alp_loss):
        clean, adv = z.clone().requires_grad_(True), z.flip(1).clone().requires_grad_(True)
        value = loss(clean, adv, torch.arange(8) % 3)
        value.backward()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in (value, clean.grad, adv.grad)), loss


@pytest.mark.parametrize("loss", [trades_loss, mart_loss, alp_loss])
def test_losses_are_formed_in_float32_from_half_precision(loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 10, generator=generator).bfloat16()
    z_adv = z + 0.05 * torch.randn(64, 10, generator=generator).bfloat16()
    y = torch.randint(10, (64,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z, z_adv, y)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(z.double(), z_adv.double(), y)), rel=1e-5)


def test_pairing_pulls_both_branches_equally() -> None:
    z, z_adv = torch.randn(2, 5, 4, dtype=torch.float64)
    z.requires_grad_(True), z_adv.requires_grad_(True)
    y = torch.arange(5) % 4
    (alp_loss(z, z_adv, y, lam=1.0) - alp_loss(z, z_adv, y, lam=0.0)).backward()
    assert torch.allclose(z.grad, -z_adv.grad, atol=1e-12)
    assert torch.allclose(z.grad, 2 * (z - z_adv).detach() / 20, atol=1e-12)


def test_kl_is_the_clean_one_first() -> None:
    z, z_adv = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = z.softmax(1)[0]
    assert float(kl_divergence(z, z_adv)) == pytest.approx(float((p * (p * 2).log()).sum()), abs=1e-6)
    assert abs(float(kl_divergence(z, z_adv)) - float(kl_divergence(z_adv, z))) > 0.5


# --- identities on a network ----------------------------------------------------------------------------------------------


def test_trades_without_kl_is_the_clean_cross_entropy() -> None:
    model, batch = ready()
    out, _ = stepped(TRADES(eps=EPS, beta=0.0, max_iter=2), model, batch)
    assert torch.equal(out.loss, F.cross_entropy(model.train()(batch.x), batch.y))


def test_mart_without_kl_is_the_boosted_cross_entropy() -> None:
    model, batch = ready()
    out, _ = stepped(MART(eps=EPS, lam=0.0, max_iter=2), model, batch)
    rows = [reference.bce(row, label) for row, label in zip(_rows(out.logits), batch.y.tolist(), strict=True)]
    assert float(out.loss.detach()) == pytest.approx(float(np.mean(rows)), rel=1e-5)


def test_alp_without_pairing_is_the_mean_of_the_cross_entropies() -> None:
    model, batch = ready()
    out, gradients = stepped(ALP(eps=EPS, lam=0.0, max_iter=2), model, batch)
    assert float(out.loss.detach()) == pytest.approx(float(out.terms["ce_clean"] + out.terms["ce_adv"]) / 2, rel=1e-6)
    twin, _ = ready()
    x_adv = PGDAT(eps=EPS, max_iter=2).adversarial(twin, Batch(batch.x, batch.y, random=RandomSource(5)))
    F.cross_entropy(twin(torch.cat([batch.x, x_adv])), batch.y.repeat(2)).backward()
    for name, parameter in twin.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pgd_at_in_an_empty_ball_is_standard_training(smoothing: float) -> None:
    (model, batch), (twin, _) = ready(), ready()
    out, gradients = stepped(PGDAT(eps=0.0, label_smoothing=smoothing), model, batch)
    standard, expected = stepped(Standard(label_smoothing=smoothing), twin, batch)
    assert torch.equal(out.loss, standard.loss)
    assert torch.equal(out.logits, standard.logits)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("method", [Standard, *ADVERSARIAL])
def test_one_hot_rows_are_their_indices_and_soft_rows_are_refused_where_a_true_class_is_needed(
    method: type[Objective],
) -> None:
    (model, batch), (twin, _) = ready(), ready()
    rows = Batch(batch.x, F.one_hot(batch.y, 10).float())
    objective = method(eps=EPS) if method is FGSMRS or method is Standard else method(eps=EPS, max_iter=2)
    if not method.soft_labels:
        with pytest.raises(InputError, match="y: got soft labels"):
            objective(model, rows)
        return
    assert torch.allclose(stepped(objective, model, batch)[0].loss, stepped(objective, twin, rows)[0].loss, atol=1e-6)


def _rows(logits: Tensor) -> np.ndarray:
    return logits.detach().double().numpy()


# --- inner maximisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_the_attack_is_the_papers(method: type[AdversarialObjective]) -> None:
    model, batch = ready()
    model = model.double()
    x = batch.x.double()
    threat, source = ThreatModel("Linf", EPS), RandomSource(5)
    if method is TRADES:  # maximises the KL, from x + 0.001 N(0, 1)
        start, steps, step, kind = x + 0.001 * normal(x, source), 4, 2.5 * EPS / 4, "kl"
    elif method is FGSMRS:
        start, steps, step, kind = threat.random_start(x, source), 1, 1.25 * EPS, "ce"
    else:
        start, steps, step, kind = threat.random_start(x, source), 4, 2.5 * EPS / 4, "ce"
    objective = method(eps=EPS) if method is FGSMRS else method(eps=EPS, max_iter=4)
    found = objective.adversarial(model, Batch(x, batch.y, random=RandomSource(5)))
    expected = reference.ascend(model.eval(), x, start, batch.y, EPS, step, steps, kind)
    assert torch.allclose(found, expected, atol=1e-9)
    assert float((found - x).abs().max()) > EPS / 2  # and it went somewhere


@pytest.mark.parametrize("method", ADVERSARIAL)
@pytest.mark.parametrize("eps_step", [None, 0.02])
def test_a_radius_that_warms_up_is_that_share_of_the_radius_and_of_the_step(method, eps_step) -> None:
    model, batch = ready()

    def found(progress: float, share: float = 1.0, **parameters: float) -> Tensor:
        step = None if eps_step is None else share * eps_step
        objective = method(eps=share * EPS, eps_step=step, **parameters)
        return objective.adversarial(model, Batch(batch.x, batch.y, progress=progress, random=RandomSource(5)))

    assert torch.equal(found(0.2, eps_warmup_share=0.4), found(0.9, share=0.5))
    assert torch.equal(found(0.0, eps_warmup_share=0.4), batch.x)
    for over in (0.4, 0.7, 1.0):
        assert torch.equal(found(over, eps_warmup_share=0.4), found(0.0))


def test_a_users_attack_is_held_to_the_radius_in_force() -> None:
    model, batch = ready()
    objective = PGDAT(eps=EPS, eps_warmup_share=0.4, attack=lambda net, x, y: 1 - x)
    x_adv = objective.adversarial(model, Batch(batch.x, batch.y, progress=0.1))
    assert float((x_adv - batch.x).abs().max()) == pytest.approx(EPS / 4, abs=1e-6)


@quick
@given(st.data())
def test_a_users_attack_is_projected_into_the_threat_model(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6)), data.draw(st.integers(3, 6)))
    batch = images(data.draw(st.integers(1, 5)), shape=shape, seed=data.draw(st.integers(0, 99)))
    threat = ThreatModel(data.draw(st.sampled_from(["Linf", "L2"])), data.draw(st.sampled_from([0.0, 0.03, 0.7])))
    wild = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0)) * 50
    wild[0, 0, 0, 0], wild[-1, 0, 1, 1] = torch.nan, torch.inf
    method = data.draw(st.sampled_from(ADVERSARIAL))
    objective = method(eps=threat.eps, norm=threat.norm, attack=lambda model, x, y: x + wild)
    x_adv = objective.adversarial(nn.Flatten(), batch)
    assert torch.isfinite(x_adv).all()
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert bool((threat.distance(x_adv, batch.x) <= threat.eps + 1e-6).all())


def test_a_users_attack_inside_the_ball_is_taken_as_it_is_and_gets_eval_mode() -> None:
    model, batch = ready()
    seen: list[bool] = []

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(any(child.training for child in net.modules()))
        x = x.clone().requires_grad_(True)
        F.cross_entropy(net(x), y).backward()  # the way to leave param.grad behind
        return (x + 0.5 * EPS).clamp(0, 1)

    x_adv = PGDAT(eps=EPS, attack=attack).adversarial(model, batch)
    assert seen == [False]
    assert not x_adv.requires_grad
    assert torch.allclose(x_adv, (batch.x + 0.5 * EPS).clamp(0, 1), atol=1e-7)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_failing_attack_leaves_the_network_as_it_was() -> None:
    model, batch = ready()
    model[1].eval()  # a child that its owner froze

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ALP(eps=EPS, attack=attack)(model, batch)
    assert [child.training for child in model] == [True, False, True, True, True]
    assert all(p.requires_grad for p in model.parameters())


def test_an_attack_that_changes_the_shape_is_refused() -> None:
    model, batch = ready()
    with pytest.raises(InputError, match="attack: got images of shape"):
        PGDAT(eps=EPS, attack=lambda net, x, y: x[:1])(model, batch)


# --- what the loop relies on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Standard, *ADVERSARIAL])
def test_the_last_train_mode_forward_alone_moves_batchnorm_and_gives_the_logits(method: type[Objective]) -> None:
    model, batch = ready()
    before = copy.deepcopy(model)
    calls: list[tuple[bool, Tensor, Tensor]] = []
    handle = model.register_forward_hook(
        lambda net, inputs, output: calls.append((net[1].training, inputs[0].detach().clone(), output.detach().clone()))
    )
    out = method(eps=EPS)(model, batch)
    handle.remove()
    trained = [(x, logits) for training, x, logits in calls if training]
    assert len(trained) == (2 if method in TWO_FORWARDS else 1)
    assert calls[-1][0]
    assert torch.equal(calls[-1][2][-len(batch.y) :], out.logits)
    before(trained[-1][0])
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(model[1].running_mean, before[1].running_mean)
    assert torch.equal(model[1].running_var, before[1].running_var)
    assert len(trained[-1][0]) == (14 if method is ALP else 7)


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_a_step_touches_nothing_but_returns_a_differentiable_loss(method: type[AdversarialObjective]) -> None:
    model, batch = ready()
    weights, modes = copy.deepcopy(list(model.parameters())), [child.training for child in model.modules()]
    state = torch.get_rng_state()
    out = method(eps=EPS)(model, batch)
    assert torch.equal(state, torch.get_rng_state())  # batch.random is the only source
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert modes == [child.training for child in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not batch.x.requires_grad
    assert all(term.ndim == 0 and not term.requires_grad for term in out.terms.values())
    assert out.loss.ndim == 0
    out.loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model[4].parameters())


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_the_step_follows_the_random_source_alone(method: type[AdversarialObjective]) -> None:
    losses = []
    for source, global_seed in ((3, 0), (3, 1), (4, 0)):
        model, batch = ready()
        torch.manual_seed(global_seed)
        options = {} if method is FGSMRS else {"max_iter": 1, "eps_step": 0.01}
        losses.append(
            float(method(eps=EPS, **options)(model, Batch(batch.x, batch.y, random=RandomSource(source))).loss.detach())
        )
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", [Standard, *ADVERSARIAL])
def test_a_configuration_survives_json(method: type[Objective]) -> None:
    changed = {"eps": 0.07, "norm": "L2", "eps_step": 0.02, "max_iter": 3, "beta": 2.0, "lam": 1.5, "clean_weight": 0.2}
    chosen = {name: value for name, value in changed.items() if name in method.parameter_names()}
    config = method(**chosen).config()
    assert chosen.items() <= config.items()
    assert method(**json.loads(json.dumps(config))).config() == config
    assert set(method.pixel_units) <= set(method.parameter_names())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (PGDAT, {"eps": -1}, "eps: got -1"),
        (PGDAT, {"eps": 8}, "write eps=8 / 255"),
        (PGDAT, {"eps": 0.1, "norm": "L1"}, "norm: got 'L1'"),
        (PGDAT, {"eps": 0.1, "max_iter": -2}, "max_iter: got -2"),
        (FGSMRS, {"eps": 0.1, "eps_step": -0.1}, "eps_step: got -0.1"),
        (PGDAT, {"eps": 0.1, "label_smoothing": 1}, "label_smoothing: got 1"),
        (PGDAT, {"eps": 0.1, "attack": "pgd"}, "attack: got 'pgd'"),
        (PGDAT, {"eps": 0.1, "random_start": 1}, "random_start: got 1"),
        (MART, {"eps": 0.1, "eps_warmup_share": 1.5}, "eps_warmup_share: got 1.5"),
        (TRADES, {"eps": 0.1, "beta": -1}, "beta: got -1"),
        (MART, {"eps": 0.1, "lam": -1}, "lam: got -1"),
        (ALP, {"eps": 0.1, "clean_weight": 2}, "clean_weight: got 2"),
        (Standard, {"eps": 2}, "eps: got 2"),
    ],
)
def test_bad_arguments_are_named(method: type[Objective], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(**options)


# --- effect ---------------------------------------------------------------------------------------------------------------


def trained(objective: Objective, epochs: int = 6) -> nn.Module:
    digits = load_digits()
    x, y = torch.tensor(digits.images[:600] / 16).float()[:, None], torch.tensor(digits.target[:600])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer, random = torch.optim.Adam(model.parameters(), 3e-3), RandomSource(0)
    for _ in range(epochs):
        for rows in random.permutation(600).split(60):
            loss = objective(model.train(), Batch(x[rows], y[rows], random=random)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def test_every_adversarial_baseline_makes_digits_robust_and_standard_training_does_not() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.images[900:1300] / 16).float()[:, None], torch.tensor(digits.target[900:1300])
    threat = ThreatModel("Linf", 0.15)
    robust = {}
    for method in (Standard, *ADVERSARIAL):
        options = {} if method in (Standard, FGSMRS) else {"max_iter": 3}
        robust[method.name] = pgd_accuracy(trained(method(eps=0.15, **options)), x, y, threat=threat, max_iter=20)
    standard = robust.pop("standard")
    assert min(robust.values()) > standard + 0.2, (standard, robust)  # 400 images: a standard error of 0.025


def test_trades_moves_its_images_to_a_higher_kl_than_pgd_on_the_label_does() -> None:
    model, batch = ready()
    by_kl = TRADES(eps=EPS, max_iter=10).adversarial(model, batch)
    model.eval()
    by_label = pgd(model, batch.x, batch.y, threat=ThreatModel("Linf", EPS), random_start=False)
    with torch.no_grad():
        clean = model(batch.x)
        assert float(kl_divergence(clean, model(by_kl)).mean()) > float(kl_divergence(clean, model(by_label)).mean())


def test_boosted_cross_entropy_exceeds_the_cross_entropy_by_its_margin_term() -> None:
    z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    p = z.softmax(1)[0]
    assert float(boosted_cross_entropy(z, y) - F.cross_entropy(z, y)) == pytest.approx(
        -float((1 - p[1]).log()), abs=1e-6
    )


class Patient(PGDAT):
    name = "patient"

    def __init__(self, *, patience: int = 2, max_iter: int = 4, **options: Any) -> None:
        super().__init__(max_iter=max_iter, **options)
        self.patience = patience


def test_a_signature_names_what_is_handed_on_and_a_users_method_needs_no_list() -> None:
    assert Patient.parameter_names() == (
        *("eps", "norm", "eps_step", "random_start", "attack", "eps_warmup_share", "label_smoothing"),
        *("patience", "max_iter"),
    )
    assert Patient(eps=0.1, label_smoothing=0.5).config() == {
        **PGDAT(eps=0.1, label_smoothing=0.5, max_iter=4).config(),
        "patience": 2,
    }
    assert set(PGDAT.parameter_names()) - set(FGSMRS.parameter_names()) == {"max_iter"}
    assert set(PGDAT.parameter_names()) - set(TRADES.parameter_names()) == {"random_start"}
    for method, name in ((FGSMRS, "max_iter"), (TRADES, "rate"), (AALP, "beta"), (Patient, "beta")):
        with pytest.raises(TypeError, match=name):
            method(eps=0.1, **{name: 1})
