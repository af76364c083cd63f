"""Maps and metrics against closed forms, hand-worked cases, slow loops, SciPy and Quantus."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import nn

from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.evaluation.figures import saliency_panel
from art_saliency.evaluation.saliency import METRICS, mean_and_error, saliency_report
from art_saliency.evaluation.saliency_maps import (
    gradient_times_input,
    integrated_gradients,
    logit_gradient,
    loss_saliency,
    named_maps,
    occlusion,
    smoothgrad,
    unit_maps,
)
from art_saliency.evaluation.saliency_metrics import (
    consensus,
    deletion_auc,
    edge_alignment,
    etmann_alignment,
    gini,
    insertion_auc,
    max_sensitivity,
    rank_correlation,
    sobel_edges,
    top_mass,
    top_overlap,
)
from art_saliency.evaluation.saliency_sanity import model_randomisation
from art_saliency.gradients import cosine, importance
from art_saliency.randomness import RandomSource

X = torch.rand(5, 2, 6, 7, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 2, 1, 2, 0])


def linear(*, bias=True, classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 7, classes, bias=bias))


def smooth(*, classes=3):
    """A curved network with BatchNorm (one in eval mode on purpose), dropout and a parameter that may not be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * 42, 8),
            nn.Softplus(),
            nn.Linear(8, classes),
        )
        model(torch.rand(64, 2, 6, 7))  # running statistics of its own
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


def rows(model):
    """The linear network's weights as images."""
    return model[1].weight.detach().view(-1, 2, 6, 7)


class Probabilities(nn.Module):
    """Two classes, the first one's probability a linear function of the image: curves can be worked out by hand."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        share = (x[:, 0] * self.weights).sum((1, 2))
        return torch.stack([share.log(), (1 - share).log()], 1)


class Blind(nn.Module):
    """Logits that do not depend on the image, though a gradient, of zero, exists."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(84, 3)

    def forward(self, x):
        return self.layer(0 * x.flatten(1))


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(84, 3)

    def forward(self, x):
        return self.layer((x * 255).round().detach().flatten(1))


def snapshot(model):
    return (
        [child.training for child in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [value.clone() for value in model.state_dict().values()],
        [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in model.modules()],
        torch.get_rng_state(),
        str(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_maps_of_a_linear_network_have_closed_forms():
    model = linear()
    w = rows(model)[Y]
    p = model(X).softmax(1).detach() - F.one_hot(Y, 3)
    assert torch.allclose(loss_saliency(model, X, Y), torch.einsum("nk,kchw->nchw", p, rows(model)), atol=1e-6)
    assert torch.equal(logit_gradient(model, X, Y), w)
    assert torch.allclose(gradient_times_input(model, X, Y), w * X)
    assert torch.allclose(smoothgrad(model, X, Y, samples=3), w, atol=1e-6)
    assert torch.allclose(integrated_gradients(model, X, Y, steps=4), w * X, atol=1e-6)
    baseline = torch.rand(2, 6, 7)
    given_baseline = integrated_gradients(model, X, Y, baseline=baseline, steps=1)
    assert torch.allclose(given_baseline, w * (X - baseline), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 13, 1000])
def test_integrated_gradients_are_complete(batch_size):
    """Also against a midpoint sum of many steps, pixel by pixel."""
    model, baseline = smooth().double(), torch.full((2, 6, 7), 0.3).double()
    x = X.double()
    found = integrated_gradients(model, x, Y, baseline=baseline, batch_size=batch_size)
    model.eval()
    with torch.no_grad():
        rise = (model(x) - model(baseline[None])).gather(1, Y[:, None])[:, 0]
    assert torch.allclose(found.sum((1, 2, 3)), rise, atol=1e-9)
    total = torch.zeros_like(x)
    for k in range(400):
        point = (baseline + (k + 0.5) / 400 * (x - baseline)).requires_grad_(True)
        total += torch.autograd.grad(model(point).gather(1, Y[:, None]).sum(), point)[0] / 400
    assert torch.allclose(found, total * (x - baseline), atol=1e-6)


def test_smoothgrad_is_the_mean_gradient_over_noise_from_the_seed():
    model = smooth()
    found = smoothgrad(model, X, Y, samples=4, noise=0.3, seed=11)
    model.eval()
    for image, target, row in zip(X, Y, found, strict=True):
        gradients = []
        noise = torch.normal(0, torch.full((4, *image.shape), 0.3), generator=torch.Generator().manual_seed(11))
        for one in noise:
            copy = (image + one)[None].requires_grad_(True)
            gradients.append(torch.autograd.grad(model(copy)[0, target], copy)[0][0])
        assert torch.allclose(row, torch.stack(gradients).mean(0), atol=1e-6)
    assert not torch.allclose(found, smoothgrad(model, X, Y, samples=4, noise=0.3, seed=12), atol=1e-3)


def test_occlusion_finds_the_only_spot_that_counts():
    class Spot(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 4, 11], -x[:, 0, 4, 11]], 1)

    x = torch.zeros(1, 1, 16, 16)
    x[0, 0, 4, 11] = 1
    found = occlusion(Spot(), x, torch.tensor([0]))
    assert found.shape == (1, 1, 16, 16)
    assert float(found.min()) >= 0
    peak = divmod(int(found.flatten().argmax()), 16)
    assert max(abs(peak[0] - 4), abs(peak[1] - 11)) <= 1  # the grid's points lie two pixels apart
    assert float(found[0, 0, 12:, :4].max()) < 1e-6


@pytest.mark.parametrize("name", named_maps())
def test_an_images_map_is_its_own_and_nothing_else_changes(name):
    explain, model = named_maps(seed=4)[name], smooth()
    model(X).sum().backward()  # gradients that have to stay
    before = snapshot(model)
    found = explain(model, X, Y)
    assert found.shape in (X.shape, (5, 1, 6, 7))
    assert not found.requires_grad
    assert not X.requires_grad
    assert float(found.abs().amin((1, 2, 3)).min()) >= 0
    assert bool((found != 0).flatten(1).any(1).all())
    for k in range(len(X)):
        assert torch.allclose(explain(model, X[k : k + 1], Y[k : k + 1])[0], found[k], atol=1e-5)
    torch.rand(3)
    moved = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(explain(model, X, Y), found)  # whatever the global state, and without gradients around
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(before[5])
    assert same(snapshot(model), before)


@pytest.mark.parametrize("name", ["loss-gradient", "logit-gradient", "gradient-x-input", "smoothgrad"])
def test_signs_are_kept(name):
    assert float(named_maps()[name](smooth(), X, Y).min()) < 0


@pytest.mark.parametrize("name", [name for name in named_maps() if name != "occlusion"])
def test_a_network_without_input_gradients_is_refused_and_untouched(name):
    model = Cut()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="logits without a gradient to the images"):
        named_maps()[name](model, X, Y)
    assert same(snapshot(model), before)


def test_errors_of_the_network_itself_come_through():
    model = smooth()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logit_gradient(model, torch.ones(2, 2, 9, 9), Y[:2])
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: smoothgrad(m, X, Y, samples=0), "samples: got 0"),
        (lambda m: smoothgrad(m, X, Y, noise=0), "noise: got 0, expected 0 < noise"),
        (lambda m: smoothgrad(m, X, Y, seed=-1), "seed: got -1"),
        (lambda m: integrated_gradients(m, X, Y, steps=0), "steps: got 0"),
        (lambda m: integrated_gradients(m, X, Y, batch_size=0), "batch_size: got 0"),
        (lambda m: top_overlap(X, X, 0), "share: got 0"),
        (lambda m: top_mass(X, 1.5), "share: got 1.5"),
        (lambda m: deletion_auc(m, X, Y, X, steps=0), "steps: got 0"),
        (lambda m: insertion_auc(m, X, Y, X, sigma=0), "sigma: got 0"),
        (lambda m: max_sensitivity(m, X, Y, loss_saliency, radius=0), "radius: got 0"),
        (lambda m: max_sensitivity(m, X, Y, loss_saliency, samples=0), "samples: got 0"),
        (lambda m: max_sensitivity(m, X, Y, loss_saliency, seed=-1), "seed: got -1"),
        (lambda m: max_sensitivity(m, X, Y, loss_saliency, batch_size=0), "batch_size: got 0"),
        (lambda m: model_randomisation(m, X, Y, loss_saliency, stages=0), "stages: got 0"),
        (lambda m: model_randomisation(m, X, Y, loss_saliency, seed=0.5), "seed: got 0.5"),
        (lambda m: model_randomisation(nn.Flatten(), X, Y, loss_saliency), "model: got a network without parameters"),
        (lambda m: etmann_alignment(nn.Sequential(m, nn.Linear(3, 1)), X), "model: got 1 logit"),
    ],
)
def test_impossible_settings_are_refused_and_nothing_changes(call, message):
    model = smooth()
    before = snapshot(model)
    with pytest.raises(InputError) as caught:
        call(model)
    assert message in str(caught.value)
    after = snapshot(model)
    assert same(after[:5], before[:5])


# ---- metrics of maps -----------------------------------------------------------------------------------------------


def one_hot_map(place=3):
    flat = torch.zeros(1, 1, 20)
    flat[0, 0, place] = -7.0
    return flat.view(1, 1, 4, 5)


def test_sparseness_of_even_and_of_one_hot_maps():
    even = torch.full((1, 3, 4, 5), -2.0)
    for scale in (1.0, 1e-30, 1e30):
        assert float(gini(even * scale)) == pytest.approx(0, abs=1e-6)
        assert float(gini(one_hot_map() * scale)) == pytest.approx(1 - 1 / 20)
        assert float(top_mass(even * scale)) == pytest.approx(2 / 20)
        assert float(top_mass(one_hot_map() * scale)) == 1
    assert float(top_mass(even, 0.01)) == pytest.approx(1 / 20)  # at least one pixel
    assert float(top_mass(even, 1)) == pytest.approx(1)


@given(st.lists(st.integers(0, 50), min_size=12, max_size=12).filter(any))
def test_gini_is_half_the_relative_mean_difference(values):
    total = sum(abs(a - b) for a in values for b in values)
    expected = total / (2 * len(values) ** 2 * np.mean(values))
    assert float(gini(torch.tensor(values).float().view(1, 1, 3, 4))) == pytest.approx(expected, abs=1e-5)


def test_consensus_is_the_cosine_that_training_uses_but_a_zero_map_has_none():
    a, b = torch.randn(4, 2, 5, 5), torch.randn(4, 2, 5, 5)
    assert torch.equal(consensus(a, b), cosine(a, b))
    assert torch.allclose(consensus(a, 3e-20 * a), torch.ones(4))
    assert torch.allclose(consensus(a, -a), -torch.ones(4))
    assert torch.equal(cosine(a, 0 * b), torch.ones(4))
    assert bool(consensus(a, 0 * b).isnan().all())


def test_overlap_counts_pixels():
    """20 pixels, the top tenth two of them."""
    a, b = torch.zeros(3, 1, 4, 5), torch.zeros(3, 1, 4, 5)
    for k, (first, second) in enumerate((((0, 1), (0, 1)), ((0, 1), (1, 2)), ((0, 1), (7, 8)))):
        a.view(3, 20)[k, list(first)] = torch.tensor([2.0, -1.0])
        b.view(3, 20)[k, list(second)] = 1.0
    assert top_overlap(a, b).tolist() == pytest.approx([1, 1 / 3, 0])
    sparse = [torch.zeros(2, 1, 10, 10), torch.zeros(2, 1, 10, 10)]
    sparse[0][:, 0, 2, 2] = sparse[1][0, 0, 3, 3] = sparse[1][1, 0, 2, 2] = 1
    assert top_overlap(*sparse).tolist() == [0, 1]  # nine more pixels of ten would be ties among zeros
    many = [torch.rand(4000, 1, 10, 10) for _ in range(2)]
    assert float(top_overlap(*many).mean()) == pytest.approx(0.1 / 1.9, abs=0.01)  # what chance gives


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=6, max_size=30))
def test_rank_correlation_is_scipys_with_ties(pairs):
    a, b = (torch.tensor(side).float().view(1, 1, 1, -1) for side in zip(*pairs, strict=True))
    found = float(rank_correlation(a, b))
    if min(len(a.abs().unique()), len(b.abs().unique())) == 1:
        assert math.isnan(found)
    else:
        expected = stats.spearmanr(a.abs().flatten(), b.abs().flatten()).statistic
        assert found == pytest.approx(float(expected), abs=1e-6)


def test_rank_correlation_of_equal_maps_is_exactly_one_and_sees_order_only():
    a = torch.rand(200, 3, 9, 9)
    assert torch.equal(rank_correlation(a, a), torch.ones(200))
    assert torch.equal(rank_correlation(a[:, :1], -(a[:, :1] ** 3)), torch.ones(200))
    assert torch.allclose(rank_correlation(a[:, :1], 1 / a[:, :1]), -torch.ones(200))


def test_edges_are_scipys_and_a_map_of_edges_is_aligned():
    x = torch.rand(2, 3, 7, 9)
    edges = sobel_edges(x)
    for image, found in zip(x, edges, strict=True):
        gray = image.mean(0).double().numpy()
        slopes = [ndimage.sobel(gray, axis=axis, mode="nearest") / 8 for axis in (0, 1)]
        assert np.allclose(found[0], np.hypot(*slopes), atol=1e-6)
    assert torch.equal(edge_alignment(edges, x), torch.ones(2))
    assert torch.equal(edge_alignment(torch.cat([edges, -edges], 1), x), torch.ones(2))
    assert torch.allclose(edge_alignment(1 - edges, x), -torch.ones(2))
    assert bool(edge_alignment(edges, torch.full_like(x, 0.5)).isnan().all())


@pytest.mark.parametrize(
    "metric",
    [
        gini,
        top_mass,
        lambda m: consensus(m, torch.rand_like(m)),
        lambda m: top_overlap(m, torch.rand_like(m)),
        lambda m: rank_correlation(torch.rand_like(m), m),
        lambda m: edge_alignment(m, torch.rand_like(m)),
        lambda m: deletion_auc(linear(), X[:3], Y[:3], m),
        lambda m: insertion_auc(linear(), X[:3], Y[:3], m),
    ],
)
def test_a_map_that_says_nothing_has_no_score(metric):
    maps = torch.rand(3, 2, 6, 7)
    maps[1] = 0
    maps[2, 0, 0, 0] = torch.inf
    assert metric(maps).isnan().tolist() == [False, True, True]


# ---- insertion and deletion ----------------------------------------------------------------------------------------

WEIGHTS = [[0.32, 0.24], [0.16, 0.08]]


def test_deletion_worked_out_by_hand():
    """The probability is 0.8 and falls by the weight of each pixel: 0.8, 0.48, 0.24, 0.08, 0 in the best order."""
    model, x, y = Probabilities(WEIGHTS), torch.ones(1, 1, 2, 2), torch.tensor([0])
    best = torch.tensor(WEIGHTS)[None, None]
    worst = 1 - best
    assert float(deletion_auc(model, x, y, best, steps=4)) == pytest.approx((0.4 + 0.48 + 0.24 + 0.08) / 4)
    assert float(deletion_auc(model, x, y, worst, steps=4)) == pytest.approx((0.4 + 0.72 + 0.56 + 0.32) / 4)
    assert float(deletion_auc(model, x, y, -best, steps=4)) == pytest.approx(0.3)  # importance is a magnitude
    assert float(deletion_auc(model, x, y, best, steps=1)) == pytest.approx(0.4)
    half = deletion_auc(model, x, y, best, steps=4, baseline=torch.full((1, 1, 2, 2), 0.5))
    assert float(half) == pytest.approx((0.3 + 0.8) / 2)
    other = deletion_auc(model, x, torch.tensor([1]), best, steps=4)
    assert float(other) == pytest.approx(1 - 0.3)
    assert float(insertion_auc(model, x, y, best, steps=4)) == pytest.approx(0.8)  # a constant image has no blur


@pytest.mark.parametrize("steps", [1, 5, 42])
def test_insertion_and_deletion_are_a_loop_over_sorted_pixels(steps):
    model, maps = smooth(), torch.randn(5, 2, 6, 7)
    before = snapshot(model)
    inserted = insertion_auc(model, X, Y, maps, sigma=1.5, steps=steps)
    deleted = deletion_auc(model, X, Y, maps, steps=steps)
    assert same(snapshot(model), before)
    model.eval()
    for k in range(len(X)):
        soft = ndimage.gaussian_filter(X[k].numpy(), (0, 1.5, 1.5), mode="nearest", truncate=3.34)
        soft, black = torch.from_numpy(soft), torch.zeros_like(X[k])
        order = maps[k].abs().sum(0).flatten().argsort(descending=True)
        for start, end, found in ((soft, X[k], inserted[k]), (X[k], black, deleted[k])):
            shares, curve = [], []
            for step in range(steps + 1):
                count = round(step / steps * 42)
                image = start.clone().view(2, 42)
                image[:, order[:count]] = end.reshape(2, 42)[:, order[:count]]
                with torch.no_grad():
                    curve.append(float(model(image.view(1, 2, 6, 7)).softmax(1)[0, Y[k]]))
                shares.append(count / 42)
            assert float(found) == pytest.approx(np.trapezoid(curve, shares), abs=2e-4)


# ---- alignment and sensitivity -------------------------------------------------------------------------------------


def test_etmanns_alignment_of_a_linear_network_is_the_distance_to_the_boundary():
    model = linear(bias=False)
    before = snapshot(model)
    found = etmann_alignment(model, X)
    assert same(snapshot(model), before)
    for image, value in zip(X, found, strict=True):
        first, second = model(image[None])[0].topk(2).indices
        difference = rows(model)[first] - rows(model)[second]
        assert float(value) == pytest.approx(float(abs((image * difference).sum()) / difference.norm()), rel=1e-4)
        at_boundary = model((image - value * difference / difference.norm())[None])[0].detach()
        assert float(at_boundary[first] - at_boundary[second]) == pytest.approx(0, abs=1e-5)
    scaled = linear(bias=False)
    scaled[1].weight.data *= 1e-25  # squares of such gradients vanish in float32
    assert torch.allclose(etmann_alignment(scaled, X), found, rtol=1e-3)
    assert bool(etmann_alignment(Blind(), X).isnan().all())


def test_sensitivity_of_linear_networks_has_a_closed_form():
    model = linear()
    moves = 0.1 * (2 * RandomSource(5).uniform(torch.empty(7, 2, 6, 7)) - 1)
    assert torch.equal(max_sensitivity(model, X, Y, logit_gradient, radius=0.1, samples=7, seed=5), torch.zeros(5))
    found = max_sensitivity(model, X, Y, gradient_times_input, radius=0.1, samples=7, seed=5)
    for image, target, value in zip(X, Y, found, strict=True):
        w = rows(model)[target]
        shifts = [float((w * ((image + move).clamp(0, 1) - image)).norm() / (w * image).norm()) for move in moves]
        assert float(value) == pytest.approx(max(shifts), rel=1e-4)


def test_sensitivity_depends_on_the_seed_alone():
    model = smooth()
    before = snapshot(model)
    explain = named_maps()["smoothgrad"]
    found = max_sensitivity(model, X, Y, explain, samples=3)
    for batch_size in (1, 6, 7):
        assert torch.allclose(max_sensitivity(model, X, Y, explain, samples=3, batch_size=batch_size), found, atol=1e-5)
    assert torch.allclose(max_sensitivity(model, X[3:4], Y[3:4], explain, samples=3), found[3:4], atol=1e-5)
    assert not torch.allclose(max_sensitivity(model, X, Y, explain, samples=3, seed=1), found, rtol=1e-3)
    assert same(snapshot(model), before)
    assert bool(max_sensitivity(Blind(), X, Y, loss_saliency).isnan().all())


# ---- the sanity check ----------------------------------------------------------------------------------------------


def test_nothing_randomised_is_one_and_everything_randomised_is_not():
    model = smooth()
    before = snapshot(model)
    check = model_randomisation(model, X, Y, loss_saliency)
    assert same(snapshot(model), before), "the user's network was touched"
    assert check.layers == ("", "7", "5", "1", "0")
    assert check.similarity.shape == (5, 5)
    assert torch.equal(check.similarity[0], torch.ones(5))
    assert float(check.similarity[-1].abs().mean()) < 0.5
    again = model_randomisation(model, X, Y, loss_saliency)
    assert torch.equal(again.similarity, check.similarity)
    assert not torch.equal(model_randomisation(model, X, Y, loss_saliency, seed=1).similarity, check.similarity)


def test_a_map_that_ignores_the_network_fails_the_check():
    check = model_randomisation(smooth(), X, Y, lambda model, x, y: sobel_edges(x))
    assert torch.equal(check.similarity, torch.ones(5, 5))


def test_stages_are_points_of_the_same_cascade():
    model = smooth()
    whole = model_randomisation(model, X, Y, loss_saliency)
    for stages, expected in ((1, [0, 4]), (2, [0, 2, 4]), (4, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])):
        some = model_randomisation(model, X, Y, loss_saliency, stages=stages)
        assert some.layers == tuple(whole.layers[k] for k in expected)
        assert torch.equal(some.similarity, whole.similarity[expected])


class Backwards(nn.Module):
    """Registered from the logits up, and with parameters that no rule resets, one of them never called as a module."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 5.0]))])
        self.body = nn.Linear(84, 4)
        self.shift = nn.Parameter(torch.full((84,), 0.5))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1) + self.shift)) * self.scale[0])


def test_layers_go_by_the_order_in_which_they_run_and_none_is_left_out():
    seen = []

    def explain(model, x, y):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return loss_saliency(model, x, y)

    torch.manual_seed(0)  # the check's own seed, too: the first weights do not come back
    model = Backwards()
    check = model_randomisation(model, X, Y, explain)
    assert check.layers[:4] == ("", "head", "body", "")
    assert set(check.layers[4:]) == {"unused", "scale"}
    original, untouched, *changed = seen
    assert same(list(original.values()), list(untouched.values()))
    names = [
        ("head.weight", "head.bias"),
        ("body.weight", "body.bias"),
        ("shift",),
    ]
    done = set()
    for state, fresh in zip(changed, names, strict=False):
        done |= set(fresh)
        assert {name for name in state if not torch.equal(state[name], original[name])} == done
    different = {name for name in original if not torch.equal(changed[-1][name], original[name])}
    assert different >= set(original) - {"unused.weight", "unused.bias"}


def test_layers_of_one_shape_get_different_weights():
    seen = []

    def explain(model, x, y):
        seen.append([child.weight.clone() for child in model if isinstance(child, nn.Linear)])
        return loss_saliency(model, x, y)

    model_randomisation(nn.Sequential(nn.Flatten(), nn.Linear(84, 84), nn.Linear(84, 84)), X, Y, explain, stages=1)
    first, second = seen[-1]
    assert not torch.equal(first, second)


def test_quantus_agrees_where_it_can():
    """Its randomisation test on a network in eval mode whose layers draw no random numbers; its Gini index."""
    quantus = pytest.importorskip("quantus")

    class Fixed(nn.Linear):
        def reset_parameters(self):
            with torch.no_grad():
                self.weight.copy_(0.1 * torch.arange(self.weight.numel()).float().square().cos().view_as(self.weight))
                self.bias.zero_()

    model = nn.Sequential(nn.Flatten(), Fixed(84, 6), nn.Tanh(), Fixed(6, 3)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)

    def explain(model, inputs, targets, **_):
        return loss_saliency(model, torch.as_tensor(inputs), torch.as_tensor(targets)).sum(1, keepdim=True).numpy()

    def one_channel(model, x, y):
        return loss_saliency(model, x, y).sum(1, keepdim=True)

    with torch.random.fork_rng(devices=[]):
        theirs = quantus.MPRT(disable_warnings=True)(
            model=model, x_batch=X.numpy(), y_batch=Y.numpy(), explain_func=explain
        )
    ours = model_randomisation(model, X, Y, one_channel)
    assert [name or "original" for name in ours.layers] == list(theirs)
    for row, scores in zip(ours.similarity, theirs.values(), strict=True):
        assert row.tolist() == pytest.approx(scores, abs=1e-4)
    maps = one_channel(model, X, Y)
    theirs = quantus.Sparseness(disable_warnings=True)(
        model=model, x_batch=X.numpy(), y_batch=Y.numpy(), a_batch=maps.numpy()
    )
    assert gini(maps).tolist() == pytest.approx(theirs, abs=1e-3)


# ---- the report ----------------------------------------------------------------------------------------------------

X_ADV = (X + 0.1 * torch.sign(torch.randn(X.shape, generator=torch.Generator().manual_seed(9)))).clamp(0, 1)


def test_a_report_holds_every_metric_of_every_image_and_leaves_the_network_alone():
    model = smooth()
    before = snapshot(model)
    report = saliency_report(model, X, Y, X_ADV, saliency_map="smoothgrad", seed=3, steps=6, samples=2, radius=0.05)
    assert same(snapshot(model), before)
    explain = named_maps(3)["smoothgrad"]
    clean, adversarial = explain(model, X, Y), explain(model, X_ADV, Y)
    expected = {
        "consensus": consensus(clean, adversarial),
        "rank_consensus": rank_correlation(clean, adversarial),
        "top_overlap": top_overlap(clean, adversarial),
        "gini": gini(clean),
        "top_mass": top_mass(clean),
        "edge_alignment": edge_alignment(clean, X),
        "confidence": (model.eval()(X).softmax(1).detach() * F.one_hot(Y, 3)).sum(1),
        "insertion": insertion_auc(model, X, Y, clean, steps=6),
        "deletion": deletion_auc(model, X, Y, clean, steps=6),
        "etmann_alignment": etmann_alignment(model, X),
        "sensitivity": max_sensitivity(model, X, Y, explain, radius=0.05, samples=2, seed=3),
        "randomised": model_randomisation(model, X, Y, explain, seed=3).similarity[-1],
    }
    assert list(report.values) == list(METRICS) == list(expected)
    for name, values in expected.items():
        assert torch.allclose(report.values[name], values, atol=1e-5), name
    page = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert page["map"] == "smoothgrad"
    assert page["images"] == report.count == 5
    for name, values in expected.items():
        assert page["metrics"][name]["mean"] == pytest.approx(float(np.mean(values.numpy())), abs=1e-5)
        assert page["metrics"][name]["standard_error"] == pytest.approx(float(stats.sem(values.numpy())), abs=1e-5)
        assert page["metrics"][name]["count"] == 5
    assert page["randomisation"][0] == {"layer": "", "mean": 1.0, "standard_error": 0.0, "count": 5, "undefined": 0}
    assert page["settings"]["seed"] == 3


@pytest.mark.parametrize("name", ["loss-gradient", "smoothgrad"])
def test_the_batch_size_does_not_matter(name):
    one, all_at_once = (
        saliency_report(smooth(), X, Y, X_ADV, saliency_map=name, steps=3, samples=2, batch_size=size)
        for size in (1, 64)
    )
    for metric in METRICS:
        assert torch.allclose(one.values[metric], all_at_once.values[metric], atol=1e-4), metric


def test_arrays_bytes_and_one_hot_rows_are_taken_and_a_function_is_a_map():
    x, x_adv = ((images * 255).round() / 255 for images in (X, X_ADV))
    options = {"steps": 2, "samples": 2, "stages": 1, "saliency_map": loss_saliency}
    expected = saliency_report(smooth(), x, Y, x_adv, **options)
    assert expected.map == "loss_saliency"
    numpy = ((x * 255).round().byte().numpy(), F.one_hot(Y, 3).numpy(), (x_adv * 255).round().byte().numpy())
    found = saliency_report(smooth(), *numpy, **options)
    for metric in METRICS:
        assert torch.allclose(found.values[metric], expected.values[metric], atol=1e-4), metric


def test_a_network_without_gradients_gets_no_perfect_scores():
    page = saliency_report(Blind(), X, Y, X_ADV, steps=2, samples=2).to_json()
    for name in set(METRICS) - {"confidence"}:
        assert page["metrics"][name]["mean"] is None
        assert (page["metrics"][name]["count"], page["metrics"][name]["undefined"]) == (0, 5), name


def test_means_errors_and_counts():
    assert mean_and_error(torch.tensor([1.0, torch.nan, 3.0])) == {
        "mean": 2.0,
        "standard_error": pytest.approx(1.0),
        "count": 2,
        "undefined": 1,
    }
    assert mean_and_error(torch.tensor([4.0]))["standard_error"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saliency_map": "smooth-grad"}, "did you mean 'smoothgrad'"),
        ({"share": 0}, "share: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"radius": 2}, "radius: got 2"),
        ({"samples": 0}, "samples: got 0"),
        ({"stages": 0}, "stages: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"x": X[0]}, "add the channel axis"),
        ({"x": 2 * X}, "x: got values from"),
        ({"x_adv": X_ADV[:3]}, "x_adv: got 3 images, expected 5"),
        ({"x_adv": X_ADV[:, :1]}, "x_adv: got shape"),
        ({"x_adv": X_ADV - 1}, "x_adv: got values from"),
        ({"y": Y + 1}, "y: got labels from 1 to 3"),
        ({"y": Y[:2]}, "y: got 2 labels"),
        ({"y": torch.full((5, 3), 1 / 3)}, "y: got soft labels"),
    ],
)
def test_a_report_of_nonsense_is_refused_and_nothing_changes(change, message):
    model = smooth()
    before = snapshot(model)
    words = {"x": X, "y": Y, "x_adv": X_ADV, **change}
    with pytest.raises(InputError) as caught:
        saliency_report(model, words.pop("x"), words.pop("y"), words.pop("x_adv"), **words)
    assert message in str(caught.value)
    assert same(snapshot(model), before)


def test_unit_maps_touch_one_and_keep_zero():
    maps = torch.cat([1e-20 * torch.rand(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)])
    found = unit_maps(importance(maps))
    assert found.amax((1, 2, 3)).tolist() == [1, 0]


def test_a_panel_does_not_call_two_maps_of_nothing_alike(monkeypatch, tmp_path):
    """Logits that are certain in float32 have a loss without a gradient: a cosine of 1 would read as perfect agreement."""
    from matplotlib.axes import Axes

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0] = 1000
    x = torch.full((2, 1, 4, 4), 0.5)
    x[1] = 0
    titles, title = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **rest: titles.append(text) or title(self, text, **rest))
    saliency_panel(model, x, x, torch.zeros(2, dtype=torch.long), tmp_path / "panel.png", title="t")
    assert [text for text in titles if "→" not in text] == ["a map is 0", "cos 1.00"]


METRICS_OF_MAPS = {
    "consensus": lambda m: consensus(m, m),
    "top_overlap": lambda m: top_overlap(m, m),
    "rank_correlation": lambda m: rank_correlation(m, m),
    "gini": gini,
    "top_mass": top_mass,
    "sobel_edges": sobel_edges,
    "edge_alignment": lambda m: edge_alignment(m, X),
    "deletion_auc": lambda m: deletion_auc(linear(), X, Y, m),
    "insertion_auc": lambda m: insertion_auc(linear(), X, Y, m),
    "etmann_alignment": lambda x: etmann_alignment(linear(), x),
    "max_sensitivity": lambda x: max_sensitivity(linear(), x, Y, loss_saliency),
    "unit_maps": unit_maps,
}


@pytest.mark.parametrize("name", METRICS_OF_MAPS)
def test_maps_without_channels_that_are_no_floats_or_no_tensors_are_refused(name):
    measure = METRICS_OF_MAPS[name]
    assert len(measure(X)) == len(X)
    for wrong, message in (
        (X[:, 0], r"got torch.float32 of shape \(5, 6, 7\), expected floats, \(N, C, H, W\); add the channel axis"),
        ((255 * X).byte(), r"got torch.uint8 of shape"),
        (X.numpy(), "got a ndarray, expected a tensor"),
    ):
        with pytest.raises(InputError, match=message):
            measure(wrong)


@pytest.mark.parametrize("other", [X[:1], X[..., :1], X[:, :, :1]])
def test_two_maps_are_of_the_same_images_and_for_the_consensus_of_the_same_channels(other):
    for measure in (consensus, top_overlap, rank_correlation, edge_alignment):
        with pytest.raises(InputError, match=r"got shape \(\d, 2, \d, \d\), expected \(5, 2, 6, 7\), as \w+ is"):
            measure(X, other)
    assert rank_correlation(X, X[:, :1]).shape == (5,)
    with pytest.raises(InputError, match=r"^b: got shape \(5, 1, 6, 7\), expected \(5, 2, 6, 7\)"):
        consensus(X, X[:, :1])
