"""Adv-GSCT against its slow oracle, its identities, and the effect it exists for."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_saliency.data import load_data, to_unit
from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.gradients import cosine, input_gradient
from art_saliency.methods.adv_gsct import (
    AdvGSCT,
    consensus_loss,
    l2_consensus_loss,
    linearity_error,
    log_odds,
    prediction_divergence,
)
from art_saliency.methods.base import Batch
from art_saliency.networks import build_network
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from tests.references import adv_gsct_reference as reference

WEIGHTS = ("consensus", "l2_consensus", "prediction_consensus", "linearity")
OFF = dict.fromkeys(WEIGHTS, 0.0)


def smooth_network(channels=1, classes=4):
    torch.manual_seed(3)
    layers = [nn.Conv2d(channels, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 5, 3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 3 * 4, classes)).double()


def batch(channels=1, count=3, classes=4, seed=0, progress=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, channels, 5, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=generator)
    return Batch(x, y, progress=progress, random=RandomSource(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("on", [*WEIGHTS, None, "all"])
@pytest.mark.parametrize(
    ("offending", "draw"),
    [
        ("extreme-point", ThreatModel.random_extreme_point),
        ("random-start", ThreatModel.random_start),
        ("zero-start", lambda threat, x, random: x),
    ],
)
def test_loss_and_weight_gradient_equal_the_slow_oracle(channels, rho, on, offending, draw):
    weights = {name: {"all": 0.7, None: 0.0}.get(on, 0.7 if name == on else 0.0) for name in WEIGHTS}
    model, data = smooth_network(channels), batch(channels)
    objective = AdvGSCT(eps=0.1, eps_step=0.125, rho=rho, warmup_share=0.0, offending=offending, **weights)
    starts = draw(objective.threat, data.x, RandomSource(0))  # the first draw of the same source
    data.random = RandomSource(0)

    result = objective(model, data)
    expected = reference.loss(model, data.x, data.y, starts, eps=0.1, alpha=0.125, rho=rho, **weights)
    torch.testing.assert_close(result.loss, expected, atol=1e-10, rtol=1e-9)
    ours = torch.autograd.grad(result.loss, list(model.parameters()))
    slow = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("saliency", ["loss", "logit", "margin"])
@pytest.mark.parametrize("confidence", [1.0, 30.0])
def test_differences_have_the_value_and_the_weight_gradient_of_the_double_backward(saliency, confidence):
    model, data = smooth_network(3), batch(3, count=6)
    with torch.no_grad():
        model[-1].weight.mul_(confidence)
    found = {}
    for form in ("double-backward", "finite-difference"):
        data.random = RandomSource(0)
        objective = AdvGSCT(eps=0.1, warmup_share=0, saliency=saliency, form=form, h=1e-5)
        result = objective(model, data)
        gradient = torch.autograd.grad(result.loss, list(model.parameters()))
        found[form] = result, torch.cat([g.flatten() for g in gradient])
    (exact, slope), (close, other) = found.values()
    torch.testing.assert_close(close.loss, exact.loss, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(close.terms["consensus"], exact.terms["consensus"], atol=1e-9, rtol=1e-9)
    assert float((slope - other).norm() / slope.norm()) < 1e-3
    without = torch.autograd.grad(AdvGSCT(eps=0.1, **OFF)(model, batch(3, count=6)).loss, list(model.parameters()))
    assert float((slope - torch.cat([g.flatten() for g in without])).norm() / slope.norm()) > 1e-2  # the term is felt


def test_log_odds_are_what_the_cross_entropy_is_made_of():
    logits, y = 5 * torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    torch.testing.assert_close(
        nn.functional.softplus(log_odds(logits, y)), nn.functional.cross_entropy(logits, y, reduction="none")
    )
    soft = nn.functional.one_hot(y, 4).double()
    assert torch.equal(log_odds(logits, soft), log_odds(logits, y))


def test_differences_make_no_second_derivatives_and_leave_the_statistics_to_the_pseudo_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).train()
    twin = copy.deepcopy(model)
    data = Batch(torch.rand(8, 1, 5, 6), torch.randint(4, (8,)), progress=1.0, random=RandomSource(0))
    # Through BatchNorm each sample's score weighs in the others' gradients, so that the loss and its log-odds differ a little.
    AdvGSCT(eps=0.1, saliency="logit", form="finite-difference")(model, data).loss.backward()
    data.random = RandomSource(0)
    AdvGSCT(eps=0.1, saliency="logit", form="double-backward")(twin, data).loss.backward()
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
    model[2] = OnceDifferentiable()
    AdvGSCT(eps=0.1, form="finite-difference")(model, data).loss.backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        AdvGSCT(eps=0.1)(model, data).loss.backward()


class OnceDifferentiable(nn.Module):
    """A ReLU whose backward pass cannot be differentiated."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp_min(0)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * (ctx.saved_tensors[0] > 0)

    def forward(self, x):
        return self.Function.apply(x)


def test_dropout_is_refused_where_passes_are_compared():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(30, 4)).double()
    with pytest.raises(UnsupportedModelError, match="dropout \\('1'\\)"):
        AdvGSCT(eps=0.1, form="finite-difference")(model, batch())
    AdvGSCT(eps=0.1, form="finite-difference")(model.eval(), batch())


def test_pseudo_input_keeps_to_the_ball_and_drains_exactly_the_share_rho():
    data = batch(3, count=16)
    for rho in (0.0, 0.3, 0.5, 1.0):
        objective = AdvGSCT(eps=0.07, rho=rho)
        for black in (False, True):  # on an all-zero gradient every pixel ties
            g = torch.zeros_like(data.x) if black else torch.randn_like(data.x)
            x_pseudo, mask = objective.pseudo_inputs(data.x, data.x, g, RandomSource(0))
            assert float((x_pseudo - data.x).abs().max()) <= 0.07 + 1e-12
            assert float(x_pseudo.min()) >= 0
            assert float(x_pseudo.max()) <= 1
            assert mask.flatten(1).mean(1).tolist() == pytest.approx([round((1 - rho) * 30) / 30] * 16)


def test_rho_zero_is_the_one_step_construction():
    data, model = batch(), smooth_network()
    a = AdvGSCT(eps=0.1, rho=0.0, **OFF)(model, data)
    data.random = RandomSource(0)
    b = AdvGSCT(eps=0.1, rho=0.6, pseudo_input="one-step", **OFF)(model, data)
    torch.testing.assert_close(a.terms["ce"], b.terms["ce"])


def test_all_weights_zero_is_cross_entropy_on_the_pseudo_input_and_needs_no_double_backward():
    data, model = batch(), smooth_network()
    result = AdvGSCT(eps=0.1, **OFF)(model, data)
    assert set(result.terms) == {"ce"}
    expected = nn.functional.cross_entropy(result.logits, data.y)
    torch.testing.assert_close(result.loss, expected, atol=1e-6, rtol=1e-6)


def test_during_warm_up_the_weights_rise_linearly():
    model = smooth_network()
    losses = {}
    for progress in (0.0, 0.1, 0.2, 1.0):
        objective = AdvGSCT(eps=0.1, warmup_share=0.2, eps_warmup_share=0.0)
        losses[progress] = objective(model, batch(progress=progress)).loss.item()
    ce = AdvGSCT(eps=0.1, **OFF)(model, batch()).loss.item()
    assert losses[0.0] == pytest.approx(ce)
    assert losses[0.1] - ce == pytest.approx((losses[0.2] - ce) / 2)
    assert losses[0.2] == pytest.approx(losses[1.0])


def test_the_radius_rises_linearly_from_the_clean_image():
    data = batch(count=8)
    objective, g = AdvGSCT(eps=0.08, eps_warmup_share=0.5), torch.randn_like(data.x)
    for radius in (0.0, 0.25, 1.0):
        x_pseudo, _ = objective.pseudo_inputs(data.x, data.x, g, radius=radius)
        assert float((x_pseudo - data.x).abs().max()) == pytest.approx(radius * 0.08)
    model = smooth_network()
    data.progress = 0.0
    clean = nn.functional.cross_entropy(model(data.x), data.y).item()
    assert objective(model, data).terms["ce"].item() == pytest.approx(clean)
    data.progress, data.random = 0.25, RandomSource(0)
    half = AdvGSCT(eps=0.04, warmup_share=0.5, eps_warmup_share=0.0)
    expected = half(model, data).loss.item()
    data.random = RandomSource(0)
    assert AdvGSCT(eps=0.08, warmup_share=0.5, eps_warmup_share=0.5)(model, data).loss.item() == pytest.approx(expected)


def test_identical_saliencies_cost_nothing_and_opposite_ones_cost_two():
    g = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert float(consensus_loss(g, 1e-12 * g)) == pytest.approx(0, abs=1e-6)
    assert float(consensus_loss(g, -g)) == pytest.approx(2)
    assert float(l2_consensus_loss(g, g)) == 0
    with_zero_row = g.clone()
    with_zero_row[0] = 0
    assert float(consensus_loss(with_zero_row, -g)) == pytest.approx(2 * 3 / 4)


def test_the_target_saliency_is_a_label_and_receives_no_gradient():
    g = torch.randn(2, 1, 3, 3, requires_grad=True)
    t = torch.randn(2, 1, 3, 3, requires_grad=True)
    consensus_loss(g, t).backward()
    assert t.grad is None
    l2_consensus_loss(g, t).backward()
    assert t.grad is not None, "the squared distance diverges against a detached target: both branches live"


def test_linearity_error_is_zero_for_a_linear_score_and_divergence_for_equal_predictions():
    g, delta = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    score0 = torch.randn(3)
    assert float(linearity_error(score0, score0 + (g * delta).flatten(1).sum(1), g, delta)) == pytest.approx(
        0, abs=1e-5
    )
    logits = torch.randn(3, 5)
    assert float(prediction_divergence(logits, logits + 7)) == pytest.approx(0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    saliency=st.sampled_from(["loss", "logit", "margin"]),
    offending=st.sampled_from(["extreme-point", "random-start", "zero-start", "noise-augmented"]),
    pseudo_input=st.sampled_from(["essential", "one-step", "lowest-noise", "convex-mix"]),
    label_on=st.sampled_from(["pseudo-input", "both"]),
    norm=st.sampled_from(["Linf", "L2"]),
)
def test_every_choice_trains_any_batch(count, channels, saliency, offending, pseudo_input, label_on, norm):
    model, data = smooth_network(channels), batch(channels, count)
    objective = AdvGSCT(
        eps=0.1, norm=norm, saliency=saliency, offending=offending, pseudo_input=pseudo_input, label_on=label_on
    )
    result = objective(model, data)
    assert result.logits.shape == (count, 4)
    gradients = torch.autograd.grad(result.loss, list(model.parameters()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_last_forward_moves_batch_statistics():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 4, 4)).double().train()
    AdvGSCT(eps=0.1, label_on="both")(model, batch())
    assert int(norm.num_batches_tracked) == 1


def test_the_slow_copy_gives_the_target_where_it_is_asked_to():
    data, model = batch(), smooth_network()
    with pytest.raises(InputError, match="slow copy"):
        AdvGSCT(eps=0.1, target_network="ema")(model, data)
    data.target_model = smooth_network().double()
    data.random = RandomSource(0)
    same = AdvGSCT(eps=0.1, target_network="ema")(model, data)
    data.random = RandomSource(0)
    current = AdvGSCT(eps=0.1)(model, data)
    torch.testing.assert_close(same.terms["consensus"], current.terms["consensus"])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"eps": -1}, "eps: got -1, expected 0 <= eps <= 1"),
        ({"eps": 8}, "8 / 255"),
        ({"rho": 1.5}, "rho: got 1.5, expected 0 <= rho <= 1"),
        ({"saliency": "los"}, "did you mean 'loss'"),
        ({"norm": "L1"}, "'Linf', 'L2'"),
        ({"consensus": float("nan")}, "consensus: got nan"),
        ({"form": "differences"}, "'double-backward', 'finite-difference'"),
        ({"form": "finite-difference", "linearity": 1}, "linearity: got 1, expected 0"),
        ({"target_network": "ema", "l2_consensus": 1}, "l2_consensus: got 1 with target_network='ema', expected 0"),
        ({"h": 0}, "h: got 0"),
        ({"label_on": "clean"}, "'pseudo-input', 'both'"),
    ],
)
def test_bad_parameters_are_named(bad, words):
    with pytest.raises(InputError, match=r".*".join(map(str, [words.replace("(", r"\(")]))):
        AdvGSCT(**{"eps": 0.1, **bad})


def test_config_gives_the_constructor_back():
    objective = AdvGSCT(eps=0.1, rho=0.2, saliency="margin")
    assert AdvGSCT(**objective.config()).config() == objective.config()
    assert AdvGSCT(eps=0.1, saliency=lambda z, y: z.sum(1)).config()["saliency"].keys() == {"callable"}


def saliency_consensus(model, x, y, eps):
    """cos between the loss saliency of an image and of its own one-step adversarial neighbour."""
    model.eval()
    x = x.clone().requires_grad_(True)
    g = input_gradient(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)
    moved = (x + eps * g.sign()).clamp(0, 1).detach().requires_grad_(True)
    t = input_gradient(nn.functional.cross_entropy(model(moved), y, reduction="sum"), moved)
    return float(cosine(g, t).mean())


def test_training_raises_saliency_consensus_over_the_same_method_without_it(digits):
    """The effect the method exists for, at its defaults: in each of eight seeds. The control differs in one weight only."""
    x, y, x_test, y_test = digits
    gains = []
    for seed in range(8):
        found = []
        for weight in ({}, {"consensus": 0.0}):
            torch.manual_seed(seed)
            layers = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU()]
            model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 10))
            optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
            objective, random = AdvGSCT(eps=0.15, **weight), RandomSource(seed)
            for step in range(220):
                index = random.permutation(len(x))[:96]
                terms = objective(model, Batch(x[index], y[index], progress=step / 220, random=random))
                optimizer.zero_grad()
                terms.loss.backward()
                optimizer.step()
            found.append(saliency_consensus(model, x_test, y_test, 0.15))
        gains.append(found[0] - found[1])
    assert min(gains) > 0, gains  # by chance once in 256 times


# --- what a GPU rounds ----------------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """To the 10 bits of TF32."""

    @staticmethod
    def forward(ctx, x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _RoundedBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _Rounded.apply(gradient)


def _gradient_of_consensus(form, dtype):
    """Of the consensus alone to the weights, on digits."""

    class Source(RandomSource):
        def uniform(self, like):
            return super().uniform(like.float()).to(like.dtype)

    data = load_data("digits")
    x, y = to_unit(data.x_train[:64]).to(dtype), data.y_train[:64]
    torch.manual_seed(0)
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), activation="silu").to(dtype).train()
    found = []
    for weight in (1.0, 0.0):
        settings = {**OFF, "consensus": weight, "warmup_share": 0.0, "eps_warmup_share": 0.0}
        loss = AdvGSCT(eps=0.1, form=form, **settings)(model, Batch(x, y, progress=1.0, random=Source(0))).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return found[0] - found[1]


@pytest.mark.parametrize("form", ["double-backward", "finite-difference"])
def test_under_autocast_the_objective_is_what_it_is_without(form):
    model, data = smooth_network().float(), batch()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = AdvGSCT(eps=0.1, form=form)(
                model, Batch(data.x.float(), data.y, progress=1.0, random=RandomSource(0))
            )
        found.append([result.loss, *torch.autograd.grad(result.loss, list(model.parameters()))])
    assert all(torch.equal(mine, yours) for mine, yours in zip(*found, strict=True))


@pytest.mark.parametrize("form", ["double-backward", "finite-difference"])
def test_the_form_that_subtracts_passes_asks_for_full_float32_and_the_other_needs_none(form, monkeypatch):
    exact, plain = _gradient_of_consensus(form, torch.float64), nn.Conv2d._conv_forward
    in_full = _gradient_of_consensus(form, torch.float32)

    def as_tf32(self, x, weight, bias):
        return _RoundedBack.apply(plain(self, _Rounded.apply(x), _Rounded.apply(weight), bias))

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", as_tf32)
    rounded = _gradient_of_consensus(form, torch.float32)
    full, tf32 = (float((found - exact).norm() / exact.norm()) for found in (in_full, rounded))
    assert full < 0.002
    assert (tf32 > 0.05) == AdvGSCT(eps=0.1, form=form).full_float32
    assert tf32 < 0.3
