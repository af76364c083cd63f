"""The geometry of the threat models, against coordinate-by-coordinate oracles and its own definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from art_saliency.errors import InputError
from art_saliency.randomness import RandomSource
from art_saliency.threat import NORMS, ThreatModel
from tests.references import attacks_reference as reference

both_norms = pytest.mark.parametrize("norm", NORMS)


def images(seed=0, count=4, low=0.0, high=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, 2, 3, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("Linf", -0.1, "eps: got -0.1, expected 0 <= eps <= 1; for images of 0 to 255 write eps=8 / 255"),
        ("Linf", 8, "eps: got 8, expected 0 <= eps <= 1; for images of 0 to 255 write eps=8 / 255"),
        ("L2", -1, "eps: got -1, expected 0 <= eps"),
        ("L2", float("nan"), "eps: got nan, expected a number, 0 <= eps"),
        ("L2", float("inf"), "eps: got inf, expected a number, 0 <= eps"),
        ("L2", None, "eps: got None, expected a number, 0 <= eps"),
        ("linf", 0.1, "norm: got 'linf', expected one of 'Linf', 'L2'; did you mean 'Linf'?"),
        ("L1", 0.1, "norm: got 'L1', expected one of 'Linf', 'L2'"),
        (2, 0.1, "norm: got 2, expected one of 'Linf', 'L2'; did you mean 'L2'?"),
    ],
)
def test_bad_threat_models_are_refused(norm, eps, message):
    with pytest.raises(InputError) as caught:
        ThreatModel(norm, eps)
    assert str(caught.value) == message


def test_a_threat_model_is_a_value():
    assert ThreatModel("L2", 20).eps == 20  # an L2 radius may exceed 1
    assert ThreatModel("Linf", 0.1) == ThreatModel("Linf", 0.1) != ThreatModel("L2", 0.1)
    assert len({ThreatModel("Linf", 0.1), ThreatModel("Linf", 0.1)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        ThreatModel("L2", 1.0).eps = 2.0


# ---- projection ----------------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("reach", [0.01, 0.3, 30.0])
def test_projection_equals_the_oracle(norm, eps, reach):
    x = images()
    moved = x + images(1, low=-reach, high=reach)
    result = ThreatModel(norm, eps).project(moved, x)
    for i in range(len(x)):
        slow = reference.project(moved[i].flatten().tolist(), x[i].flatten().tolist(), norm=norm, eps=eps)
        assert result[i].flatten().tolist() == pytest.approx(slow, abs=1e-12)


@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    seed=st.integers(0, 999),
    exponent=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_projection_lands_in_ball_and_range_and_then_stays(norm, eps, seed, exponent, dtype):
    threat, x = ThreatModel(norm, eps), images(seed, dtype=dtype)
    moved = x + images(seed + 1, low=-1, dtype=dtype) * 10.0**exponent
    result = threat.project(moved, x)
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert result.dtype == dtype
    assert float(threat.distance(result, x).max()) <= eps + rounding
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1
    torch.testing.assert_close(threat.project(result, x), result, atol=rounding, rtol=0)


@both_norms
def test_an_image_of_the_threat_model_is_its_own_projection(norm):
    x = images(low=0.3, high=0.7)
    inside = x + images(1, low=-0.02, high=0.02)
    torch.testing.assert_close(ThreatModel(norm, 0.2).project(inside, x), inside, atol=1e-15, rtol=0)


@given(norm=st.sampled_from(NORMS), seed=st.integers(0, 999))
def test_no_other_point_of_the_ball_is_nearer(norm, seed):
    """The definition of a projection, away from the border of [0, 1]: nothing that random search finds is nearer."""
    threat, x = ThreatModel(norm, 0.1), images(seed, low=0.4, high=0.6)
    moved = x + images(seed + 1, low=-0.3, high=0.3)
    result = threat.project(moved, x)
    best = (moved - result).flatten(1).norm(dim=1)
    for i in range(20):
        other = result + (1 if i % 2 else 0.01) * images(seed + 2 + i, low=-0.1, high=0.1)
        inside = threat.distance(other, x) <= threat.eps
        nearer = (moved - other).flatten(1).norm(dim=1) < best - 1e-12
        assert not bool((inside & nearer).any())
    corner = x + threat.eps * (moved - x).sign() * (1 if norm == "Linf" else 1 / x[0].numel() ** 0.5)
    assert bool(((moved - corner).flatten(1).norm(dim=1) >= best - 1e-12).all())


@both_norms
def test_samples_are_projected_one_by_one(norm):
    threat, x = ThreatModel(norm, 0.1), images(count=5)
    moved = x + images(1, count=5, low=-1) * torch.tensor([0.01, 0.1, 1, 10, 100], dtype=x.dtype).view(-1, 1, 1, 1)
    alone = torch.cat([threat.project(moved[i : i + 1], x[i : i + 1]) for i in range(5)])
    assert torch.equal(threat.project(moved, x), alone)


# ---- starts --------------------------------------------------------------------------------------------------------


@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 1), seed=st.integers(0, 999))
def test_starts_are_inside(norm, eps, seed):
    threat, x = ThreatModel(norm, eps), images(seed, dtype=torch.float32)
    start = threat.random_start(x, RandomSource(seed))
    assert float(threat.distance(start, x).max()) <= eps + 1e-6
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1


@both_norms
def test_starts_come_from_the_source_and_from_torch_without_one(norm):
    threat, x = ThreatModel(norm, 0.1), images()
    start = threat.random_start(x, RandomSource(1))
    before = torch.get_rng_state()
    assert torch.equal(threat.random_start(x, RandomSource(1)), start)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(threat.random_start(x, RandomSource(2)), start)
    torch.manual_seed(7)
    first = threat.random_start(x)
    torch.manual_seed(7)
    assert torch.equal(threat.random_start(x), first)
    assert len({float(distance) for distance in threat.distance(start, x)}) == len(x)  # a start of its own for each


def test_linf_starts_are_uniform_in_the_cube():
    x = torch.full((500, 1, 4, 5), 0.5, dtype=torch.float64)
    delta = (ThreatModel("Linf", 0.2).random_start(x, RandomSource(0)) - x).flatten(1)
    assert stats.kstest(delta.flatten().numpy(), stats.uniform(-0.2, 0.4).cdf).pvalue > 0.01
    correlation = np.corrcoef(delta.numpy().T) - np.eye(20)
    assert np.abs(correlation).max() < 5 / 500**0.5  # coordinates are independent


def test_l2_starts_have_a_uniform_radius_and_a_uniform_direction():
    x = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
    delta = (ThreatModel("L2", 0.2).random_start(x, RandomSource(0)) - x).flatten(1)
    radius = delta.norm(dim=1, keepdim=True)
    assert stats.kstest(radius.flatten().numpy(), stats.uniform(0, 0.2).cdf).pvalue > 0.01
    # On the sphere of three dimensions every coordinate is uniform (Archimedes).
    for coordinate in (delta / radius).T:
        assert stats.kstest(coordinate.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01


@both_norms
def test_extreme_points_are_as_far_as_the_ball_goes_and_each_as_likely(norm):
    x = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
    threat = ThreatModel(norm, 0.2)
    there = threat.random_extreme_point(x, RandomSource(0))
    assert torch.equal(there, threat.random_extreme_point(x, RandomSource(0)))
    torch.testing.assert_close(threat.distance(there, x), torch.full((4000,), 0.2, dtype=torch.float64))
    delta = (there - x).flatten(1) / 0.2
    if norm == "Linf":
        corners = ((delta > 0).long() * torch.tensor([4, 2, 1])).sum(1).bincount()
        torch.testing.assert_close(delta.abs(), torch.ones_like(delta))
        assert stats.chisquare(corners.numpy()).pvalue > 0.01
    else:
        for coordinate in delta.T:
            assert stats.kstest(coordinate.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    edge = threat.random_extreme_point(torch.zeros(8, 1, 4, 4), RandomSource(0))
    assert float(edge.min()) == 0
    assert float(edge.max()) <= 0.2 + 1e-7


# ---- steepest ascent and distance ----------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-6, 1.0, 1e15, 1e25])
def test_the_step_raises_a_linear_function_by_the_dual_norm_at_any_scale(norm, scale):
    """max over ||d|| <= 1 of g.d is the L1 norm of g for Linf, its L2 norm for L2 (Hoelder)."""
    shape = images(low=-1)
    direction = ThreatModel(norm, 0.1).ascent_direction((shape * scale).float()).double()
    reached = (shape * direction).flatten(1).sum(1)
    dual = shape.flatten(1).abs().sum(1) if norm == "Linf" else shape.flatten(1).norm(dim=1)
    torch.testing.assert_close(reached, dual, rtol=1e-5, atol=0)
    length = direction.flatten(1).abs().amax(1) if norm == "Linf" else direction.flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0)


@both_norms
def test_the_step_of_a_zero_gradient_is_zero_and_leaves_its_neighbours_alone(norm):
    gradient = images(low=-1)
    gradient[2] = 0
    threat = ThreatModel(norm, 0.1)
    direction = threat.ascent_direction(gradient)
    assert not direction[2].any()
    for i in (0, 1, 3):
        assert direction[i].flatten().tolist() == pytest.approx(
            reference.step(gradient[i].flatten().tolist(), norm=norm)
        )


@both_norms
def test_entries_of_a_gradient_that_are_not_finite_count_as_zero(norm):
    gradient, broken = images(low=-1), images(low=-1)
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        broken[image, 0, 1] = value
        gradient[image, 0, 1] = 0
    broken[3], gradient[3] = torch.nan, 0
    threat = ThreatModel(norm, 0.1)
    assert torch.equal(threat.ascent_direction(broken), threat.ascent_direction(gradient))


@both_norms
def test_distance_is_numpys_norm(norm):
    x, other = images(), images(1)
    expected = np.linalg.norm((x - other).flatten(1).numpy(), ord={"Linf": np.inf, "L2": 2}[norm], axis=1)
    assert ThreatModel(norm, 0.1).distance(other, x).numpy() == pytest.approx(expected, rel=1e-12)
