"""PGD against a loop over samples and coordinates, against closed forms, and against everything it must leave alone."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_saliency.attacks import LOSSES, attack_loss, cross_entropy, dlr, fgsm, margin, pgd
from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.evaluation.transfer_attacks import transfer_attack
from art_saliency.randomness import RandomSource
from art_saliency.threat import NORMS, ThreatModel
from tests.references import attacks_reference as reference

both_norms = pytest.mark.parametrize("norm", NORMS)


def linear_network(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 5, classes)).double()


def conv_network(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), activation(), nn.Conv2d(4, 4, 2), activation(), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


def norm_network(seed=0):
    """BatchNorm and dropout in train mode: both would couple or blur the samples if the attack ran in train mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 4)
    ).double()
    for _ in range(3):
        model(torch.rand(8, 2, 5, 5, dtype=torch.float64))
    return model


def batch(count=5, classes=3, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(count, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=generator)


# ---- losses --------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits = torch.tensor([[4.0, 1.0, 2.0, -1.0], [4.0, 1.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    y = torch.tensor([0, 3, 1])
    assert margin(logits, y).tolist() == [2 - 4, 4 - -1, 0]
    assert dlr(logits, y).tolist()[:2] == pytest.approx([-(4 - 2) / (4 - 1), -(-1 - 4) / (4 - 1)])
    total = sum(math.exp(z) for z in (4, 1, 2, -1))
    assert cross_entropy(logits, y).tolist() == pytest.approx(
        [-math.log(math.exp(z) / total) for z in (4, -1)] + [math.log(4)]
    )
    one_hot = F.one_hot(y, 4).float()
    for loss in LOSSES.values():
        assert loss(logits, y).shape == (3,)
        torch.testing.assert_close(loss(logits, one_hot), loss(logits, y))


@given(seed=st.integers(0, 999), classes=st.integers(3, 6))
def test_losses_equal_the_oracles(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(3, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (3,), generator=generator)
    for ours, slow in ((cross_entropy, reference.cross_entropy), (margin, reference.margin), (dlr, reference.dlr)):
        expected = torch.stack([slow(row, int(label)) for row, label in zip(logits, y, strict=True)])
        torch.testing.assert_close(ours(logits, y), expected, atol=1e-10, rtol=1e-9)


@given(seed=st.integers(0, 999), shift=st.floats(-100, 100), scale=st.floats(1e-3, 1e3))
def test_dlr_does_not_change_when_logits_are_shifted_or_scaled(seed, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (4,), generator=generator)
    torch.testing.assert_close(dlr(scale * logits + shift, y), dlr(logits, y), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(margin(scale * logits + shift, y), scale * margin(logits, y), atol=1e-9, rtol=1e-9)


@given(seed=st.integers(0, 999))
def test_margin_and_dlr_are_above_0_exactly_where_the_sample_is_misclassified(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 4, generator=generator)
    y = torch.randint(4, (20,), generator=generator)
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)
    assert float(dlr(logits, y).min()) >= -1  # a correct sample's margin is at most the spread of the three highest


def test_dlr_of_three_tied_logits_is_finite():
    assert bool(dlr(torch.zeros(2, 5), torch.tensor([0, 1])).isfinite().all())


def test_two_classes_have_a_margin_but_no_dlr():
    logits = torch.tensor([[1.0, 3.0]])
    assert margin(logits, torch.tensor([0])).tolist() == [2]
    with pytest.raises(InputError, match=r"^dlr: got 2 classes, expected at least 3; use the margin loss$"):
        dlr(logits, torch.tensor([0]))


def test_cross_entropy_of_soft_labels_is_the_mean_over_them():
    logits, rows = torch.randn(4, 3), torch.rand(4, 3)
    rows = rows / rows.sum(1, keepdim=True)
    expected = sum(rows[:, k] * cross_entropy(logits, torch.full((4,), k)) for k in range(3))
    torch.testing.assert_close(cross_entropy(logits, rows), expected)


def test_losses_by_name_or_function():
    for name, loss in LOSSES.items():
        assert attack_loss(name) is loss
    assert attack_loss(max) is max
    with pytest.raises(InputError, match=r"^loss: got 'ce', expected one of 'cross-entropy', 'margin', 'dlr'"):
        attack_loss("ce")


# ---- PGD is the algorithm ------------------------------------------------------------------------------------------

SLOW_LOSSES = {"cross-entropy": reference.cross_entropy, "margin": reference.margin, "dlr": reference.dlr}


@both_norms
@pytest.mark.parametrize("loss", SLOW_LOSSES)
@pytest.mark.parametrize("network", [linear_network, conv_network])
def test_pgd_equals_the_slow_oracle(norm, loss, network):
    model, (x, y) = network(), batch(classes=2)
    with torch.no_grad():
        model[-1].bias[2:] -= (
            5  # the true class stays among the two highest: with it third, DLR is constant, its gradient rounding
        )
    threat = ThreatModel(norm, 0.08 if norm == "Linf" else 0.5)
    options = {"eps_step": 0.3 * threat.eps, "max_iter": 4}
    start = threat.random_start(x, RandomSource(3))
    result = pgd(model, x, y, threat=threat, loss=loss, random=RandomSource(3), **options)
    expected = reference.pgd(model, x, y, start, norm=norm, eps=threat.eps, loss=SLOW_LOSSES[loss], **options)
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)
    assert float((expected - start).abs().max()) > 0.1 * threat.eps  # the oracle went somewhere

    result = pgd(model, x, y, threat=threat, loss=loss, random_start=False, **options)
    expected = reference.pgd(model, x, y, x, norm=norm, eps=threat.eps, loss=SLOW_LOSSES[loss], **options)
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


@both_norms
def test_the_default_step_is_two_and_a_half_radii_over_the_steps(norm):
    model, (x, y) = conv_network(), batch()
    threat = ThreatModel(norm, 0.1)
    implicit = pgd(model, x, y, threat=threat, max_iter=5, random_start=False)
    assert torch.equal(implicit, pgd(model, x, y, threat=threat, max_iter=5, eps_step=0.05, random_start=False))


@both_norms
def test_soft_labels_are_ascended_as_the_oracle_does(norm):
    model, (x, _) = conv_network(), batch()
    rows = torch.softmax(torch.randn(5, 4, dtype=torch.float64), 1)
    threat = ThreatModel(norm, 0.1)
    result = pgd(model, x, rows, threat=threat, max_iter=3, eps_step=0.04, random_start=False)
    for i in range(5):
        expected = reference.pgd_one(
            model,
            x[i],
            i,
            x[i],
            norm=norm,
            eps=0.1,
            eps_step=0.04,
            max_iter=3,
            loss=lambda z, i: sum(rows[i, k] * reference.cross_entropy(z, k) for k in range(4)),
        )
        torch.testing.assert_close(result[i], expected, atol=1e-9, rtol=0)
    hard = torch.tensor([0, 1, 2, 3, 0])
    one_hot = F.one_hot(hard, 4).double()
    ours = [pgd(model, x, y, threat=threat, restarts=2, random=RandomSource(0)) for y in (hard, one_hot)]
    torch.testing.assert_close(*ours, atol=1e-12, rtol=0)


@pytest.mark.parametrize("random_start", [False, True])
def test_fgsm_is_one_signed_step_of_eps(random_start):
    """Goodfellow et al. 2015: x + eps * sign(grad). With a start of its own and 1.25 eps, Wong et al. 2020."""
    model, (x, y) = conv_network(), batch()
    threat, eps_step = ThreatModel("Linf", 0.1), 0.125 if random_start else None
    result = fgsm(model, x, y, threat=threat, eps_step=eps_step, random_start=random_start, random=RandomSource(1))
    start = threat.random_start(x, RandomSource(1)) if random_start else x
    leaf = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    moved = start + (eps_step or 0.1) * gradient.sign()
    expected = torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


# ---- PGD is as strong as it can be ---------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("random_start", [False, True])
def test_on_a_linear_model_pgd_reaches_the_worst_case(norm, loss, random_start):
    """
    Of two classes z1 - z0 = w.x: in the interior the worst case is eps * sign(w), or eps * w / ||w||.

    DLR needs a third class, constant and far below; with z0 = -z1 the ratio still rises with w.x alone.
    """
    model = linear_network(classes=3)
    with torch.no_grad():
        model[1].weight[0] = -model[1].weight[1]
        model[1].weight[2] = 0
        model[1].bias.copy_(torch.tensor([0, 0, -50]))
    x, _ = batch(low=0.35, high=0.65)
    y = torch.tensor([0, 1, 0, 1, 1])
    threat = ThreatModel(norm, 0.2)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    away = torch.where(y == 0, 1.0, -1.0).double()[:, None] * w
    unit = away.sign() if norm == "Linf" else away / away.norm(dim=1, keepdim=True)
    expected = x + 0.2 * unit.view_as(x)
    result = pgd(model, x, y, threat=threat, loss=loss, max_iter=80, eps_step=0.1, random_start=random_start)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    dual = w.abs().sum() if norm == "Linf" else w.norm()
    torch.testing.assert_close(margin(model(result), y), margin(model(x), y) + 0.2 * dual, atol=1e-6, rtol=0)


def test_at_the_border_linf_still_reaches_the_worst_case():
    model, (x, y) = linear_network(classes=2), batch(classes=2)
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 2, 5, 5)
    sign = torch.where(y == 0, 1.0, -1.0).double().view(-1, 1, 1, 1)
    result = pgd(model, x, y, threat=ThreatModel("Linf", 0.5), max_iter=20)
    torch.testing.assert_close(result, (x + 0.5 * (sign * w).sign()).clamp(0, 1), atol=1e-12, rtol=0)


@both_norms
@pytest.mark.parametrize("confidence", [1.0, 20.0, 60.0, 85.0])
def test_a_confident_network_is_attacked_like_a_modest_one(norm, confidence):
    """
    At a margin of 60 the softmax leaves gradients of 1e-26, whose squares are 0 in float32.

    An attack that divides by max(norm, 1e-12) stands still there and finds the network robust.
    """
    torch.manual_seed(0)
    w = torch.randn(50)
    w = w / w.norm()
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2, bias=False))
    x, y = torch.full((1, 2, 5, 5), 0.5), torch.tensor([0])
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([w, -w]))
        reach = float(margin(model(x), y))
        model[1].weight *= confidence / abs(reach)
        y = torch.tensor([0 if reach < 0 else 1])  # whichever is right
        assert float(margin(model(x), y)) == pytest.approx(-confidence, rel=1e-4)
    threat = ThreatModel(norm, 0.1)
    result = pgd(model, x, y, threat=threat, max_iter=20, random_start=False)
    away = (w if int(y) == 1 else -w).view(1, 2, 5, 5)
    torch.testing.assert_close(result, x + 0.1 * threat.ascent_direction(away), atol=1e-5, rtol=0)


@both_norms
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_more_steps_and_a_wider_ball_never_lose_on_a_linear_model_from_the_clean_image(norm, loss):
    """Of a convex function every projected ascent step raises the value; of two classes all steps go one way."""
    model, (x, y) = linear_network(classes=2), batch(classes=2, low=0.4, high=0.6)

    def scores(eps, max_iter):
        options = {"max_iter": max_iter, "eps_step": 0.02, "random_start": False, "loss": loss}
        return attack_loss(loss)(model(pgd(model, x, y, threat=ThreatModel(norm, eps), **options)), y)

    by_steps = [scores(0.1, steps) for steps in range(8)]
    by_radius = [scores(eps, 20) for eps in (0.0, 0.05, 0.1, 0.2, 0.3)]
    for low, high in (*pairwise(by_steps), *pairwise(by_radius)):
        assert bool((high >= low - 1e-9).all())
    assert bool((by_steps[-1] > by_steps[0]).all())


@both_norms
def test_fgsm_raises_the_loss_and_pgd_raises_it_further(norm, tiny_network, digits):
    model, x, y = tiny_network(), digits[0][:100], digits[1][:100]
    threat = ThreatModel(norm, 0.1 if norm == "Linf" else 0.5)
    clean = cross_entropy(model(x), y)
    one = cross_entropy(model(fgsm(model, x, y, threat=threat)), y)
    many = cross_entropy(model(pgd(model, x, y, threat=threat, max_iter=40, random_start=False)), y)
    assert bool((one > clean).all())
    assert float((many - one).detach().mean()) > 0
    assert float((many > one - 1e-5).float().mean()) > 0.95


def several_starts(model, x, y, threat, count, **options):
    """Each start by itself, from one source: the draws of `count` restarts."""
    random = RandomSource(9)
    return [pgd(model, x, y, threat=threat, random=random, **options) for _ in range(count)]


@both_norms
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_restarts_keep_the_worst_of_each_sample(norm, loss):
    """Of the starts run one by one: fooled before not fooled, then the higher score; so one more start never loses."""
    model, (x, y) = conv_network(activation=nn.ReLU), batch(12, classes=4)
    y = torch.where(torch.arange(12) % 3 == 0, y, model(x).argmax(1))  # a third may be wrong from the start
    threat = ThreatModel(norm, 0.3 if norm == "Linf" else 1.0)
    options = {"max_iter": 2, "eps_step": 0.1 * threat.eps, "loss": loss}
    runs = several_starts(model, x, y, threat, 4, **options)

    def rank(x_adv, i):
        logits = model(x_adv[i : i + 1])
        return (bool(margin(logits, y[i : i + 1]) > 0), float(attack_loss(loss)(logits, y[i : i + 1]).detach()))

    previous = None
    chosen = set()
    for restarts in (1, 2, 3, 4):
        result = pgd(model, x, y, threat=threat, restarts=restarts, random=RandomSource(9), **options)
        for i in range(12):
            best = max(range(restarts), key=lambda k: rank(runs[k], i))
            chosen.add(best)
            assert torch.equal(result[i], runs[best][i])
            if previous is not None:
                assert rank(result, i) >= rank(previous, i)
        previous = result
    assert len(chosen) > 1  # restarts mattered


def test_a_fooled_restart_beats_a_higher_loss_that_fools_nobody():
    """A loss that falls where the label flips: the attack must still return the sample that fools."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
    model.append(_Shift())
    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])

    def misleading(logits, y):
        return -margin(logits, y)  # highest where the sample is safest

    threat = ThreatModel("Linf", 0.4)
    for seed in range(8):
        random = RandomSource(seed)
        starts = [float(threat.random_start(x, random)) for _ in range(6)]
        fooling = [start for start in starts if start > 0.5]
        if fooling:
            result = pgd(model, x, y, threat=threat, max_iter=0, restarts=6, loss=misleading, random=RandomSource(seed))
            assert float(result) == min(fooling)


class _Shift(nn.Module):
    def forward(self, logits):
        return logits - torch.tensor([[0.0, 0.5]], dtype=logits.dtype)


@both_norms
def test_a_given_start_is_projected_and_is_the_first_of_the_restarts(norm):
    model, (x, y) = conv_network(), batch(classes=4)
    threat = ThreatModel(norm, 0.1)
    far = x + 3
    from_far = pgd(model, x, y, threat=threat, max_iter=3, eps_step=0.01, start=far)
    expected = reference.pgd(model, x, y, threat.project(far, x), norm=norm, eps=0.1, eps_step=0.01, max_iter=3)
    torch.testing.assert_close(from_far, expected, atol=1e-9, rtol=0)
    # With three restarts the source is drawn from twice: the other two starts are those of a run without `start`.
    options = {"max_iter": 3, "eps_step": 0.01}
    random = RandomSource(4)
    others = [pgd(model, x, y, threat=threat, random=random, **options) for _ in range(2)]
    result = pgd(model, x, y, threat=threat, restarts=3, start=far, random=RandomSource(4), **options)
    for i in range(len(x)):
        assert any(torch.equal(result[i], candidate[i]) for candidate in (from_far, *others))


# ---- identities ----------------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("options", [{"threat": 0.0}, {"threat": 0.1, "max_iter": 0, "random_start": False}])
def test_no_budget_or_no_step_is_the_identity_in_memory_of_its_own(norm, options):
    model, (x, y) = conv_network(), batch()
    options = {**options, "threat": ThreatModel(norm, options["threat"])}
    before = x.clone()
    for result in (pgd(model, x, y, **options), pgd(model, x, y, **options, restarts=2)):
        assert torch.equal(result, x)
        result.fill_(9)
        assert torch.equal(x, before)


@both_norms
def test_no_step_from_a_random_start_is_the_start(norm):
    model, (x, y) = conv_network(), batch()
    threat = ThreatModel(norm, 0.1)
    result = pgd(model, x, y, threat=threat, max_iter=0, random=RandomSource(5))
    assert torch.equal(result, threat.random_start(x, RandomSource(5)))


@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    eps_step=st.none() | st.floats(0, 2),
    max_iter=st.integers(0, 4),
    restarts=st.integers(1, 2),
    loss=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60)
def test_every_attack_stays_in_ball_and_range(norm, eps, eps_step, max_iter, restarts, loss, seed, dtype):
    model = conv_network(activation=nn.ReLU).to(dtype)
    x, y = batch(3, classes=4, seed=seed)
    x, threat = x.to(dtype), ThreatModel(norm, eps)
    result = pgd(
        model,
        x,
        y,
        threat=threat,
        eps_step=eps_step,
        max_iter=max_iter,
        restarts=restarts,
        loss=loss,
        random=RandomSource(seed),
    )
    assert result.dtype == dtype
    assert not result.requires_grad
    assert float(threat.distance(result, x).max()) <= eps + (1e-6 if dtype == torch.float32 else 1e-12)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


@both_norms
@pytest.mark.parametrize("network", [conv_network, norm_network])
def test_a_sample_is_attacked_alike_in_any_company(norm, network):
    """From the clean image; with BatchNorm and dropout in train mode too, since the attack runs in eval mode."""
    model, (x, y) = network(), batch(6, classes=4)
    options = {"threat": ThreatModel(norm, 0.1), "random_start": False, "max_iter": 5}
    whole = pgd(model, x, y, **options)
    for size in (1, 4):
        parts = [pgd(model, x[i : i + size], y[i : i + size], **options) for i in range(0, 6, size)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(pgd(model, x[order], y[order], **options), whole[order], atol=1e-12, rtol=0)


@both_norms
def test_the_source_alone_decides_the_randomness(norm):
    model, (x, y) = conv_network(), batch(classes=4)
    options = {"threat": ThreatModel(norm, 0.1), "max_iter": 2, "restarts": 2}
    first = pgd(model, x, y, **options, random=RandomSource(1))
    state = torch.get_rng_state()
    assert torch.equal(pgd(model, x, y, **options, random=RandomSource(1)), first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(pgd(model, x, y, **options, random=RandomSource(1)), first)
    assert not torch.equal(pgd(model, x, y, **options, random=RandomSource(2)), first)
    torch.manual_seed(5)
    globally = pgd(model, x, y, **options)
    assert not torch.equal(pgd(model, x, y, **options), globally)
    torch.manual_seed(5)
    assert torch.equal(pgd(model, x, y, **options), globally)


# ---- what an attack leaves alone -----------------------------------------------------------------------------------


class _Breaks(nn.Module):
    """The identity, until the forward pass of that number."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def forward(self, x):
        self.count += 1
        if self.count == self.at:
            raise ArithmeticError("broken on purpose")
        return x


def guarded_network(at=None):
    model = norm_network()
    model.insert(0, _Breaks(at))
    model[2].eval()  # its owner put this BatchNorm into eval mode, and froze a bias
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    return model


def snapshot(model):
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone()) for p in model.parameters()],
        {name: value.clone() for name, value in model.named_buffers()},
    )


def assert_same(before, after):
    assert before[0] == after[0]
    for (flag, grad, value), (new_flag, new_grad, new_value) in zip(before[1], after[1], strict=True):
        assert flag == new_flag
        assert (grad is None) == (new_grad is None)
        assert grad is None or torch.equal(grad, new_grad)
        assert torch.equal(value, new_value)
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


@both_norms
@pytest.mark.parametrize("at", [None, 1, 2, 3, 5], ids=["whole", "first", "second", "score", "restart"])
def test_the_network_and_the_batch_are_left_as_they_were_also_by_an_exception(norm, at):
    model, (x, y) = guarded_network(at), batch(classes=4)
    x.requires_grad_(True)
    before, x_before, y_before = snapshot(model), x.detach().clone(), y.clone()
    options = {"threat": ThreatModel(norm, 0.1), "max_iter": 2, "restarts": 2}
    if at is None:
        assert not pgd(model, x, y, **options).requires_grad
    else:
        with pytest.raises(ArithmeticError, match="on purpose"):
            pgd(model, x, y, **options)
    assert_same(before, snapshot(model))
    assert x.grad is None
    assert x.requires_grad
    assert torch.equal(x.detach(), x_before)
    assert torch.equal(y, y_before)


def test_during_the_attack_the_network_evaluates_and_asks_for_no_weight_gradients():
    """They would cost a third of every step."""
    model, (x, y) = guarded_network(), batch(classes=4)
    seen = []

    def look(module, inputs):
        seen.append((any(m.training for m in model.modules()), any(p.requires_grad for p in model.parameters())))

    model[0].register_forward_pre_hook(look)
    pgd(model, x, y, threat=ThreatModel("Linf", 0.1), max_iter=2, restarts=2)
    assert seen == [(False, False)] * 6


@pytest.mark.parametrize(("restarts", "forwards"), [(1, 7), (3, 3 * 8)])
def test_one_start_costs_no_extra_forward_pass(restarts, forwards):
    model, (x, y) = guarded_network(), batch(classes=4)
    pgd(model, x, y, threat=ThreatModel("Linf", 0.1), max_iter=7, restarts=restarts)
    assert model[0].count == forwards


def test_the_callers_grad_mode_does_not_matter_and_is_kept():
    model, (x, y) = conv_network(), batch(classes=4)
    options = {"threat": ThreatModel("Linf", 0.1), "random_start": False}
    expected = pgd(model, x, y, **options)
    with torch.no_grad():
        assert torch.equal(pgd(model, x, y, **options), expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_training_graph_of_the_same_network_survives_an_attack():
    """Frozen for the attack only: a loss that was built before still reaches the weights."""
    model, (x, y) = conv_network(), batch(classes=4)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    loss = F.cross_entropy(model(x), y)
    pgd(model, x, y, threat=ThreatModel("Linf", 0.1))
    loss.backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


class _Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@both_norms
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_network_without_gradients_is_refused_and_restored(norm, restarts):
    model = guarded_network()
    model.insert(1, _Detached())
    before, (x, y) = snapshot(model), batch(classes=4)
    with pytest.raises(UnsupportedModelError, match="differentiable forward pass"):
        pgd(model, x, y, threat=ThreatModel(norm, 0.1), restarts=restarts)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": -1}, "max_iter: got -1, expected a whole number, 0 <= max_iter"),
        ({"max_iter": 2.5}, "max_iter: got 2.5, expected a whole number, 0 <= max_iter"),
        ({"restarts": 0}, "restarts: got 0, expected a whole number, 1 <= restarts"),
        ({"eps_step": -0.1}, "eps_step: got -0.1, expected 0 <= eps_step"),
        ({"eps_step": float("nan")}, "eps_step: got nan, expected a number, 0 <= eps_step"),
        ({"loss": "crossentropy"}, "loss: got 'crossentropy', expected one of .*; did you mean 'cross-entropy'?"),
    ],
)
def test_bad_settings_are_refused_even_without_a_budget(options, message):
    model, (x, y) = guarded_network(), batch(classes=4)
    for eps in (0.0, 0.1):
        with pytest.raises(InputError, match=f"^{message}".replace("?", r"\?")):
            pgd(model, x, y, threat=ThreatModel("Linf", eps), **options)
    assert model[0].count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_images_in_which_a_step_is_lost_are_refused(dtype):
    model, (x, y) = guarded_network(), batch(classes=4)
    with pytest.raises(InputError, match=f"x: got images of {dtype}, expected float32 or float64"):
        pgd(model, x.to(dtype), y, threat=ThreatModel("Linf", 0.1))
    assert model[0].count == 0


@pytest.mark.parametrize("attack", [pgd, fgsm, transfer_attack])
def test_an_array_is_told_from_a_tensor(attack):
    model, (x, y) = guarded_network(), batch(classes=4)
    with pytest.raises(InputError, match=r"^x: got a ndarray, expected a tensor; convert it with torch.as_tensor\(\)$"):
        attack([model] if attack is transfer_attack else model, x.numpy(), y, threat=ThreatModel("Linf", 0.1))


@pytest.mark.gpu
@both_norms
def test_on_a_gpu_the_attack_is_that_of_the_cpu(norm):
    model, (x, y) = conv_network(), batch(classes=4)
    options = {"threat": ThreatModel(norm, 0.1), "random_start": False, "max_iter": 5}
    expected = pgd(model, x, y, **options)
    result = pgd(model.cuda(), x.cuda(), y.cuda(), **options)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), expected, atol=1e-9, rtol=0)
