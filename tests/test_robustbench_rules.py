"""The lint: every rule broken on purpose, in a named submodule, and found there; honest networks pass; nothing is left changed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from art_saliency import build_network, insert_fsr
from art_saliency.methods.fsr import randomised
from art_saliency.robustbench.rules import key_violations, network_violations, probe_images

SHAPE = (3, 16, 16)


class Noise(nn.Module):
    def forward(self, x):
        return x + 1e-3 * torch.randn_like(x)


class PythonsNoise(nn.Module):
    def forward(self, x):
        return x + 1e-3 * random.random() + 1e-3 * np.random.rand()  # noqa: NPY002


class Rounded(nn.Module):
    def forward(self, x):
        return (8 * x).round() / 8


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Purified(nn.Module):
    """Three steps down the gradient of an energy, as some defences do."""

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_(True)
            for _ in range(3):
                z = (z - 0.1 * torch.autograd.grad((z**2).sum(), z)[0]).detach().requires_grad_(True)
        return x + (z - x).detach()


class PurifiedWhenAttacked(nn.Module):
    """As above, but only where somebody could take a gradient."""

    def forward(self, x):
        return Purified()(x) if torch.is_grad_enabled() else x


class NoiseWhenAttacked(nn.Module):
    def forward(self, x):
        return x + 0.3 * torch.randn_like(x) if x.requires_grad else x


class OtherWhenAttacked(nn.Module):
    def forward(self, x):
        return 2 * x if torch.is_grad_enabled() else x


class RoundedWhenAttacked(nn.Module):
    """As kernels differ with and without gradients: in the last bits."""

    def forward(self, x):
        return x * (1 + 3e-7) if torch.is_grad_enabled() else x


class OneWayOrTheOther(nn.Module):
    """Chance decides which of two submodules is called."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.ways[self.calls % 2](x)


class Optimised(nn.Module):
    def forward(self, x):
        with torch.enable_grad():
            z = nn.Parameter(torch.zeros_like(x))
            optimizer = torch.optim.SGD([z], 0.1)
            ((z - x.detach()) ** 2).sum().backward()
            optimizer.step()
        return x + z.detach()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Exploding(nn.Module):
    def forward(self, x):
        return x / (x - x)


class Two(nn.Module):
    def forward(self, x):
        return x, x


def network(*middle: nn.Module, end: tuple[nn.Module, ...] = (), classes: int = 10) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 4, 3, padding=1), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, classes), *end)


def found(model, classes=10):
    return {(v.place, v.problem.split(" (")[0][:45]) for v in network_violations(model, SHAPE, classes)}


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "preactresnet18"])
@pytest.mark.parametrize("fsr", [False, True])
def test_networks_of_this_package_pass(name, fsr):
    model = build_network(name, num_classes=10, input_shape=SHAPE, width=4)
    if fsr:
        insert_fsr(model, model.stages[-1], 10, torch.rand(2, *SHAPE), hidden=4)
    assert network_violations(model, SHAPE, 10) == []


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (network(Noise()), ("1", "gives different results in two passes")),
        (network(nn.Sequential(nn.ReLU(), PythonsNoise())), ("1.1", "gives different results in two passes")),
        (network(Rounded()), ("1", "lets no gradient through")),
        (network(Detached()), ("1", "lets no gradient through")),
        (network(Purified()), ("1", "computes gradients in its forward pass")),
        (network(nn.Sequential(Optimised())), ("1.0", "computes an optimizer's step in its forward pass")),
        (network(PurifiedWhenAttacked()), ("1", "computes gradients in its forward pass")),
        (network(NoiseWhenAttacked()), ("1", "gives different results in two passes")),
        (network(OtherWhenAttacked()), ("1", "classifies images differently while gradients are computed")),
        (network(OneWayOrTheOther()), ("", "gives different results in two passes")),
        (network(Counting()), ("1.calls", "changes when images are classified")),
        (network(nn.BatchNorm2d(4, track_running_stats=False)), ("1", "classifies an image differently by the batch")),
        (network(end=(nn.Softmax(1),)), ("5", "puts out probabilities (softmax)")),
        (network(end=(nn.LogSoftmax(1),)), ("5", "puts out probabilities (log-softmax)")),
        (network(Exploding()), ("1", "puts out NaN or infinite numbers")),
        (network(classes=9), ("", "returns shape (6, 9) for 6 images, expected logits of shape (6, 10)")),
        (network(end=(Two(),)), ("", "returns more than one tensor for 6 images")),
        (network(nn.Conv2d(5, 5, 1)), ("", "fails on images of shape (6, 3, 16, 16) in [0, 1] (RuntimeError")),
        (network().half(), ("", "")),
        (network().double(), ("", "fails on images of shape (6, 3, 16, 16) in [0, 1] (RuntimeError")),
    ],
    ids=lambda value: value[1][:30] if isinstance(value, tuple) else "",
)
def test_what_is_broken_is_found_where_it_is(broken, expected):
    violations = network_violations(broken, SHAPE, 10)
    assert any(v.place == expected[0] and v.problem.startswith(expected[1]) for v in violations), violations
    assert all(v.cure for v in violations)


def test_everything_is_said_at_once():
    places = {place for place, _ in found(network(Noise(), Rounded(), Purified()))}
    assert places == {"1", "2", "3"}


def test_another_number_of_classes_is_said_beside_all_else():
    assert {place for place, _ in found(network(Noise(), Rounded(), Purified(), classes=9))} == {"", "1", "2", "3"}
    assert {place for place, _ in found(network(end=(nn.Softmax(1),), classes=9))} == {"", "5"}
    for alone in (
        network(classes=9),
        network(classes=1),
        network(end=(nn.Unflatten(1, (2, 5)),)),
        network(end=(Two(),)),
    ):
        assert [place for place, _ in found(alone)] == [""]


def test_each_of_them_is_said_once():
    for broken in (Noise(), Purified(), OtherWhenAttacked(), NoiseWhenAttacked()):
        assert len(network_violations(network(nn.Sequential(broken)), SHAPE, 10)) == 1


@pytest.mark.parametrize(
    "layer",
    [
        RoundedWhenAttacked(),
        nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(256, 4, 32, batch_first=True), nn.Unflatten(2, (16, 16))
        ),
        nn.ReLU(inplace=True),
    ],
)
def test_rounding_and_kernels_may_differ_while_gradients_are_computed(layer):
    assert network_violations(network(layer), SHAPE, 10) == []


def test_a_network_that_is_right_in_train_mode_only_is_not_blamed_for_it():
    assert network_violations(network(nn.Dropout(0.5), nn.BatchNorm2d(4)).train(), SHAPE, 10) == []


def test_fsr_that_is_noisy_in_eval_mode_is_named():
    model = build_network("small-cnn", num_classes=10, input_shape=SHAPE, width=4)
    insert_fsr(model, "layer3", 10, torch.rand(2, *SHAPE), hidden=4)
    with randomised(model):
        assert [v.place for v in network_violations(model, SHAPE, 10)] == ["layer3.fsr"]


def test_a_network_without_any_use_for_the_image_has_no_gradient():
    model = network()
    model[-1].weight.data.zero_()
    assert [v.problem for v in network_violations(model, SHAPE, 10)] == ["lets no gradient through to the images"]


def test_nothing_is_left_changed():
    model = network(Counting(), nn.Dropout(0.5), Noise()).train()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].bias.requires_grad_(False)
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert network_violations(model, SHAPE, 10)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.is_grad_enabled()


def test_the_lint_works_inside_no_grad_and_inference_mode():
    model = network(Rounded())
    with torch.no_grad():
        assert {place for place, _ in found(model)} == {"1"}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 15, 7)])
def test_probe_images_are_images_and_always_the_same(shape):
    x = probe_images(shape)
    assert x.shape == (6, *shape)
    assert x.dtype == torch.float32
    assert x[0].max() == 0
    assert x[1].min() == 1
    assert torch.equal((x * 255).round() / 255, x)
    assert len({image.numpy().tobytes() for image in x}) == 6
    torch.rand(3)
    assert torch.equal(probe_images(shape), x)


# ---- keys ----------------------------------------------------------------------------------------------------------


def cut_by_robustbench(keys):
    """What RobustBench's loader makes of keys: written from its description, both substrings in turn."""
    for part in ("module.", "model."):
        keys = [key[len(part) :] if part in key else key for key in keys]
    return keys


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (
            "backbone.model.conv1.weight",
            "contains 'model.': RobustBench's loader would read it as 'ne.model.conv1.weight'",
        ),
        ("fsr_module.sep.weight", "contains 'module.': RobustBench's loader would read it as 'ule.sep.weight'"),
        ("module.conv1.weight", "contains 'module.': RobustBench's loader would read it as 'conv1.weight'"),
        ("conv1._orig_mod.weight", "has a name that torch.compile gave"),
        ("state_dict", "is a name that RobustBench's loader takes for a whole state dict"),
        ("layer4.fsr.auxiliary.weight", "belongs to an auxiliary head"),
    ],
)
def test_keys_that_would_not_survive_are_found(key, says):
    (violation,) = key_violations({key: torch.ones(2), "conv1.weight": torch.ones(2)})
    assert violation.place == key
    assert violation.problem.startswith(says)
    if "would read" in says:
        assert says.rpartition("'")[0].rpartition("'")[2] == cut_by_robustbench([key])[0]


def test_values_that_are_no_plain_finite_tensors_are_found():
    state = {
        "a": 3,
        "b": torch.tensor([1.0, float("nan")]),
        "c": torch.ones(2).half(),
        "d": torch.eye(2).to_sparse(),
        "e": torch.tensor(3),
        "f": torch.ones(2).double(),
    }
    assert [violation.place for violation in key_violations(state)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "wrn-28-10"])
def test_keys_of_this_package_survive_with_and_without_fsr(name):
    model = build_network(name, num_classes=10, input_shape=SHAPE, width=1 if "wrn" in name else 2, mean=(0.5,) * 3)
    insert_fsr(model, model.stages[-1], 10, torch.rand(2, *SHAPE), hidden=4)
    keys = [key for key in model.state_dict() if "auxiliary" not in key]
    assert cut_by_robustbench(keys) == keys
    assert key_violations({key: model.state_dict()[key] for key in keys}) == []
    assert len(key_violations(model.state_dict())) == 2  # the auxiliary head's weight and bias
