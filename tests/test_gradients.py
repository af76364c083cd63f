"""Input gradients, importance, masks by rank and the cosine, against finite differences, sorting and NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from art_saliency.errors import InputError, UnsupportedModelError
from art_saliency.gradients import cosine, importance, input_gradient, top_share_mask
from art_saliency.randomness import RandomSource

# ---- input_gradient ------------------------------------------------------------------------------------------------


def smooth_network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()


def images(count=3, seed=0):
    return torch.rand(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite_differences(function, x, step=1e-6):
    """d function / dx for a scalar function, one coordinate at a time."""
    gradient = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):
        up, down = x.clone(), x.clone()
        up[place] += step
        down[place] -= step
        gradient[place] = (float(function(up).detach()) - float(function(down).detach())) / (2 * step)
    return gradient


def test_input_gradient_is_the_derivative_of_each_samples_score():
    model, x = smooth_network(), images()
    leaf = x.clone().requires_grad_(True)
    gradient = input_gradient(model(leaf).square().sum(), leaf)
    assert not gradient.requires_grad
    assert leaf.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    for i in range(len(x)):
        alone = finite_differences(lambda image: model(image).square().sum(), x[i : i + 1])
        torch.testing.assert_close(gradient[i : i + 1], alone, atol=1e-8, rtol=1e-6)


def test_with_create_graph_a_penalty_on_the_gradient_can_be_differentiated_by_the_weights():
    model, x = smooth_network(), images()
    weight = model[3].weight

    def penalty():
        leaf = x.clone().requires_grad_(True)
        return input_gradient(model(leaf).square().sum(), leaf, create_graph=True).square().sum()

    (gradient,) = torch.autograd.grad(penalty(), weight)

    def at(value):
        with torch.no_grad():
            kept = weight.clone()
            weight.copy_(value)
        result = penalty().detach()
        with torch.no_grad():
            weight.copy_(kept)
        return result

    expected = finite_differences(at, weight.detach().clone())
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "alive"), [({}, False), ({"retain_graph": True}, True), ({"create_graph": True}, True)]
)
def test_the_forward_pass_is_kept_only_when_asked(options, alive):
    model, x = smooth_network(), images().requires_grad_(True)
    score = model(x).square().sum()
    first = input_gradient(score, x, **options)
    if alive:
        assert torch.equal(input_gradient(score, x), first)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            input_gradient(score, x)


@pytest.mark.parametrize(
    "score",
    [
        lambda x, w: (x.detach() * w).sum(),  # a graph, but not to the images
        lambda x, w: x.detach().sum(),  # no graph at all
        lambda x, w: x.argmax(1).double().sum(),
        lambda x, w: torch.from_numpy(x.detach().numpy()).sum(),
    ],
    ids=["detached", "no-graph", "argmax", "numpy"],
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_score_without_a_path_to_the_images_is_refused(score, create_graph):
    x, weight = images().requires_grad_(True), torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match=r"^model: got logits without a gradient .*; look for \.detach\(\)"):
        input_gradient(score(x, weight), x, create_graph=create_graph)


def test_a_score_under_no_grad_is_refused():
    x = images().requires_grad_(True)
    with torch.no_grad():
        score = x.sum()
    with pytest.raises(UnsupportedModelError, match="differentiable forward pass"):
        input_gradient(score, x)


# ---- importance ----------------------------------------------------------------------------------------------------


def test_importance_is_the_sum_over_channels_of_absolute_values():
    gradient = torch.randn(2, 3, 4, 5)
    result = importance(gradient)
    assert result.shape == (2, 1, 4, 5)
    for n, h, w in np.ndindex(2, 4, 5):
        assert float(result[n, 0, h, w]) == pytest.approx(sum(abs(float(gradient[n, c, h, w])) for c in range(3)))


# ---- top_share_mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_mask_is_what_sorting_gives_with_ties_in_the_order_of_their_lots(share):
    scores = (torch.rand(6, 1, 8, 9, generator=torch.Generator().manual_seed(0)) * 5).floor()
    flat, lots = scores.flatten(1), RandomSource(3).uniform(scores.flatten(1))
    shuffled = lots.argsort(1)
    ranked = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)[:, : round(share * 72)]
    expected = torch.zeros_like(flat).scatter_(1, shuffled.gather(1, ranked), 1.0).view_as(scores)
    assert torch.equal(top_share_mask(scores, share, RandomSource(3)), expected)


@given(
    share=st.floats(0, 1),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    levels=st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_mask_marks_exactly_the_rounded_share_and_nothing_below_anything_unmarked(share, size, levels, seed):
    """An oracle by sorting: the marked values are the highest ones, whatever the ties. levels=1: all pixels are tied."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, 1, *size), generator=generator).float() - levels // 2
    mask = top_share_mask(scores, share, RandomSource(seed))
    kept = round(share * size[0] * size[1])
    assert mask.shape == scores.shape
    assert mask.dtype == scores.dtype
    for values, marks in zip(scores.flatten(1), mask.flatten(1), strict=True):
        assert set(marks.tolist()) <= {0.0, 1.0}
        assert int(marks.sum()) == kept
        assert sorted(values[marks == 1].tolist()) == sorted(values.tolist())[len(values) - kept :]


def test_without_ties_the_mask_is_the_oracles_and_needs_no_luck():
    scores = torch.randn(4, 1, 5, 6)
    for share in (0.0, 0.1, 0.5, 0.95, 1.0):
        kept = round(share * 30)
        expected = torch.zeros(4, 30)
        for i, values in enumerate(scores.flatten(1).tolist()):
            for place in sorted(range(30), key=lambda k: -values[k])[:kept]:
                expected[i, place] = 1
        for seed in range(3):
            assert torch.equal(top_share_mask(scores, share, RandomSource(seed)).flatten(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_are_broken_uniformly(dtype):
    """Of 16 pixels one is higher and 15 are tied; 5 are marked: the high one always, each of the others 4 times in 15."""
    trials = 6000
    scores = torch.zeros(trials, 1, 4, 4, dtype=dtype)
    scores[:, 0, 1, 2] = 1
    counts = top_share_mask(scores, 5 / 16, RandomSource(0)).float().sum(0).flatten()
    assert int(counts[6]) == trials
    others = torch.cat([counts[:6], counts[7:]]).numpy()
    # A draw of 4 out of 15: chi-square with the variance of a draw without replacement, 14 degrees of freedom.
    expected, variance = trials * 4 / 15, trials * 4 / 15 * 11 / 15 * 15 / 14
    assert stats.chi2(14).sf(float(((others - expected) ** 2).sum() / variance)) > 0.001


def test_tied_pixels_are_chosen_anew_for_each_image_and_call_and_reproducibly():
    scores = torch.zeros(8, 1, 6, 6)
    source = RandomSource(0)
    first, second = top_share_mask(scores, 0.5, source), top_share_mask(scores, 0.5, source)
    assert torch.equal(top_share_mask(scores, 0.5, RandomSource(0)), first)
    assert not torch.equal(first, second)
    assert len({tuple(mask.tolist()) for mask in first.flatten(1)}) == 8


def test_mask_is_cut_from_the_graph_and_does_not_alter_the_scores():
    scores = torch.randn(2, 1, 3, 3, requires_grad=True)
    before = scores.detach().clone()
    for share in (0.0, 0.4, 1.0):
        assert not top_share_mask(scores, share).requires_grad
    assert torch.equal(scores, before)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), None])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(InputError, match=r"^share: got .* 0 <= share <= 1$"):
        top_share_mask(torch.zeros(1, 1, 2, 2), share)


# ---- cosine --------------------------------------------------------------------------------------------------------


def numpy_cosine(a, b):
    a, b = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    a, b = a / np.abs(a).max(1, keepdims=True), b / np.abs(b).max(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [1e-30, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("second", [1e-30, 1e-10, 1.0, 1e15])
def test_cosine_is_numpys_at_every_scale(dtype, first, second):
    a, b = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    b += 0.5 * a
    a, b = (a * first).to(dtype), (b * second).to(dtype)
    tolerance = 5e-7 if dtype == torch.float32 else 1e-14
    result = cosine(a, b)
    assert result.dtype == dtype
    assert result.double().numpy() == pytest.approx(numpy_cosine(a, b), abs=tolerance)


@given(seed=st.integers(0, 999), power=st.integers(-30, 15), negate=st.booleans())
def test_cosine_depends_on_direction_alone(seed, power, negate):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    b = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    sign = -1 if negate else 1
    torch.testing.assert_close(cosine(a, sign * 10.0**power * b), sign * cosine(a, b), atol=1e-14, rtol=0)
    torch.testing.assert_close(cosine(a, sign * 10.0**power * a), torch.full_like(a[:, 0], sign), atol=1e-14, rtol=0)
    assert torch.equal(cosine(a, b), cosine(b, a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    a, b = (torch.randn(5, 200) * 1e-3).to(dtype), (torch.randn(5, 200) * 1e-3).to(dtype)
    result = cosine(a, b)
    assert result.dtype == torch.float32
    assert result.double().numpy() == pytest.approx(numpy_cosine(a, b), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e15])
def test_the_derivative_of_the_cosine_is_that_of_finite_differences(scale):
    a, b = (torch.randn(2, 2, 3, dtype=torch.float64) for _ in range(2))
    leaf = (a * scale).requires_grad_(True)
    other = b.clone().requires_grad_(True)
    gradients = torch.autograd.grad(cosine(leaf, other).sum(), (leaf, other))
    torch.testing.assert_close(
        gradients[0] * scale, finite_differences(lambda v: cosine(v * scale, b).sum(), a), atol=1e-8, rtol=1e-6
    )
    torch.testing.assert_close(
        gradients[1], finite_differences(lambda v: cosine(a * scale, v).sum(), b), atol=1e-8, rtol=1e-6
    )


def test_the_derivative_in_float32_keeps_its_digits_where_squares_vanish():
    a, b = (torch.randn(3, 50, dtype=torch.float64) for _ in range(2))

    def derivative(scale, dtype):
        leaf = (a * scale).to(dtype).requires_grad_(True)
        return torch.autograd.grad(cosine(leaf, b.to(dtype)).sum(), leaf)[0].double() * scale

    expected = derivative(1.0, torch.float64)
    for scale in (1e-30, 1e-25, 1e-10, 1.0, 1e15):
        torch.testing.assert_close(derivative(scale, torch.float32), expected, atol=1e-6, rtol=1e-4)


def test_second_derivatives_of_the_cosine():
    torch.manual_seed(1)
    a, b = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(cosine, (a, b))
    assert torch.autograd.gradgradcheck(cosine, (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_a_zero_row_gives_exactly_1_and_exactly_no_derivative(dtype, zero):
    a, b = torch.randn(3, 4, 4, dtype=dtype), torch.randn(3, 4, 4, dtype=dtype)
    if zero in ("a", "both"):
        a[1] = 0
    if zero in ("b", "both"):
        b[1] = 0
    a.requires_grad_(True), b.requires_grad_(True)
    similarity = cosine(a, b)
    assert float(similarity.detach()[1]) == 1
    gradients = torch.autograd.grad(similarity.sum(), (a, b), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (a, b), retain_graph=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):  # nor is a NaN made and masked on the way
        watched = cosine(a, b)
        again = torch.autograd.grad(watched.sum(), (a, b), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in again), (a, b))
    for tensor in (*gradients, *second):
        assert bool(tensor.isfinite().all())
        assert not tensor[1].any()
        assert tensor[0].any()  # the other rows go on
        assert tensor[2].any()
    alone = cosine(a[[0, 2]], b[[0, 2]])
    assert torch.equal(similarity[[0, 2]], alone)


def test_a_penalty_on_input_gradients_stays_finite_when_a_networks_gradient_vanishes():
    """A row of gradients that is zero through a dead ReLU, in double backward to the weights: finite, and no NaN."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.rand(4, 1, 2, 2)
    x[0] = -100  # with weights below, every unit is dead for this image
    with torch.no_grad():
        model[1].weight.abs_()
        model[1].bias.zero_()
    leaf = x.clone().requires_grad_(True)
    first = input_gradient(model(leaf)[:, 0].sum(), leaf, create_graph=True)
    second = input_gradient(model(leaf)[:, 1].square().sum(), leaf, create_graph=True)
    assert not first[0].any()
    assert first[1].any()
    loss = (1 - cosine(first, second)).mean()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.ndim == 2])
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert all(bool(g.any()) for g in gradients)
    assert math.isfinite(float(loss.detach()))


def test_subnormal_rows_are_neither_zero_nor_nan():
    a = torch.tensor([[3e-39, 4e-39]])
    assert float(cosine(a, torch.tensor([[3.0, 4.0]]))) == pytest.approx(1, abs=1e-5)
    assert float(cosine(a, torch.tensor([[4.0, -3.0]]))) == pytest.approx(0, abs=1e-5)
