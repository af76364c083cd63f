"""Networks: RobustBench's names and logits, the same features by any route, input gradients, and names from elsewhere."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from art_saliency.errors import ArtSaliencyError, InputError, MissingDependencyError, UnsupportedModelError
from art_saliency.gradients import second_derivatives
from art_saliency.networks import (
    ACTIVATIONS,
    NETWORKS,
    PreActResNet18,
    ResNet18,
    SmallCNN,
    WideResNet,
    build_network,
    check_network,
    default_network,
)

SMALL = {
    "small-cnn": lambda **options: SmallCNN(width=6, **options),
    "resnet18": lambda **options: ResNet18(width=4, **options),
    "preactresnet18": lambda **options: PreActResNet18(width=4, **options),
    "wrn": lambda **options: WideResNet(depth=10, widen_factor=1, **options),
    "wrn-wide": lambda **options: WideResNet(depth=16, widen_factor=2, **options),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
quick = settings(max_examples=30, deadline=None, derandomize=True)


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 and eval mode, with BatchNorm statistics and biases as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return network.double().eval()


def images(count: int = 2, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 1) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return SMALL[name](**{"num_classes": 7, "in_channels": 3, **options})


# RobustBench


def robustbench_file(name: str) -> ModuleType:
    """One architecture file, by path: the package itself cannot be imported as it comes."""
    package = importlib.util.find_spec("robustbench")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("robustbench is not installed: pip install 'art-saliency[robustbench]'")
    path = Path(package.submodule_search_locations[0], "model_zoo", "architectures", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_robustbench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(name: str, normalised: bool = False, widen_factor: int = 10) -> nn.Module:
    """RobustBench's network of that name, and its idiom for normalisation: a subclass with two buffers."""
    if name.startswith("wrn"):
        base = robustbench_file("wide_resnet").WideResNet
        arguments: dict[str, Any] = {"depth": int(name[4:6]), "widen_factor": widen_factor, "sub_block1": False}
    else:
        source = robustbench_file("resnet")
        base, block = (
            (source.ResNet, source.BasicBlock) if name == "resnet18" else (source.PreActResNet, source.PreActBlock)
        )
        arguments = {"block": block, "num_blocks": [2, 2, 2, 2]}

    class Normalising(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(**arguments)
            self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
            self.register_buffer("sigma", torch.ones(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - self.mu) / self.sigma)  # type: ignore[no-any-return]

    return Normalising() if normalised else base(**arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 64), ("preactresnet18", 64), ("wrn-28-10", 2), ("wrn-34-10", 1)]
)
def test_robustbench_loads_the_weights_strictly_and_gives_the_same_logits(
    name: str, width: int, normalised: bool
) -> None:
    torch.manual_seed(0)
    mean, std = (MEAN, STD) if normalised else (None, None)
    ours = lively(build_network(name, num_classes=10, input_shape=(3, 32, 32), mean=mean, std=std, width=width))
    robustbench = theirs(name, normalised, widen_factor=width).double().eval()
    robustbench.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        logits, expected = ours(images()), robustbench(images())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith("-cnn")])
def test_the_full_size_networks_have_robustbench_s_tensors(name: str) -> None:
    with torch.device("meta"):
        ours, robustbench = build_network(name, num_classes=10, input_shape=(3, 32, 32)), theirs(name)
    shapes = [{key: tuple(t.shape) for key, t in net.state_dict().items()} for net in (ours, robustbench)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.174),
        ("preactresnet18", 11.171),
        ("wrn-28-10", 36.479),
        ("wrn-34-10", 46.160),
        ("small-cnn", 0.057),
    ],
)
def test_parameter_counts_are_the_known_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_network(name, num_classes=10, input_shape=(3, 32, 32))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("name", SMALL)
def test_no_key_is_one_that_robustbench_would_cut(name: str) -> None:
    keys = make(name, mean=MEAN, std=STD).state_dict()
    assert not [key for key in keys if "model." in key or "module." in key]


# One forward pass


@given(
    name=st.sampled_from(list(SMALL)),
    count=st.integers(1, 3),
    channels=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    classes=st.integers(2, 12),
)
@quick
def test_any_size_gives_logits_that_do_not_depend_on_the_batch(
    name: str, count: int, channels: int, height: int, width: int, classes: int
) -> None:
    network = lively(make(name, num_classes=classes, in_channels=channels))
    x = images(count, (channels, height, width))
    with torch.no_grad():
        logits = network(x)
        alone = torch.cat([network(image[None]) for image in x])
    assert logits.shape == (count, classes)
    torch.testing.assert_close(logits, alone)


@pytest.mark.parametrize("name", SMALL)
def test_every_submodule_is_called_once_a_pass(name: str) -> None:
    network, calls = make(name), Counter[str]()
    names = [child for child, _ in network.named_modules()]
    for child, module in network.named_modules():
        module.register_forward_hook(lambda *_, child=child: calls.update([child]))
    network(images().float())
    assert calls == Counter(names)


@pytest.mark.parametrize(
    ("name", "target", "shape"),
    [
        ("small-cnn", "layer3", (64, 16, 16)),
        ("mnist-cnn", "layer3", (64, 8, 8)),
        ("resnet18", "layer4", (512, 4, 4)),
        ("preactresnet18", "layer4", (512, 4, 4)),
        ("wrn-28-10", "relu", (640, 8, 8)),
    ],
)
def test_the_last_stage_puts_out_the_features_that_the_head_sees(
    name: str, target: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network: Any = build_network(name, num_classes=10, input_shape=(3, 32, 32)).eval()
    assert network.stages[-1] == target
    seen: list[Tensor] = []
    network.get_submodule(target).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        logits = network(images(1).float())
        (features,) = seen
        pooled = torch.nn.functional.adaptive_avg_pool2d(features, 1).flatten(1)
        expected = network.get_submodule(network.head)(pooled)
    assert features.shape == (1, *shape)
    torch.testing.assert_close(logits, expected)
    # All but the pre-activation network's are post-activation: no entry is negative, some are zero.
    assert bool((features < 0).any()) == (name == "preactresnet18")
    assert bool((features > 0).any())


@pytest.mark.parametrize("name", SMALL)
def test_normalisation_inside_is_normalisation_outside(name: str) -> None:
    plain, inside = lively(make(name)), lively(make(name, mean=MEAN, std=STD))
    assert set(inside.state_dict()) - set(plain.state_dict()) == {"mu", "sigma"}
    assert inside.get_buffer("mu").shape == inside.get_buffer("sigma").shape == (1, 3, 1, 1)
    # Float32 first, as the buffers were made.
    mean, std = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (MEAN, STD))
    x = images()
    torch.testing.assert_close(inside(x), plain((x - mean) / std))
    assert not torch.allclose(inside(x), plain(x))


@pytest.mark.parametrize("name", SMALL)
def test_identity_normalisation_has_no_buffers(name: str) -> None:
    given, plain = make(name, mean=[0.0] * 3, std=[1.0] * 3), make(name)
    assert list(given.state_dict()) == list(plain.state_dict())
    assert not {"mu", "sigma"} & set(plain.state_dict())
    assert {"mu", "sigma"} < set(make(name, mean=[0.5] * 3).state_dict())
    assert {"mu", "sigma"} < set(make(name, std=torch.tensor([0.5, 1, 1])).state_dict())


# Activations and derivatives


@pytest.mark.parametrize("name", SMALL)
def test_the_activation_changes_logits_and_no_key(name: str) -> None:
    networks = {activation: lively(make(name, activation=activation)) for activation in ACTIVATIONS}
    keys = {tuple(network.state_dict()) for network in networks.values()}
    assert len(keys) == 1
    logits = [network(images()) for network in networks.values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(logits) for b in logits[:i])
    own = lively(make(name, activation=lambda: nn.Softplus(beta=1)))
    torch.testing.assert_close(own(images()), networks["softplus"](images()))


def penalty(network: nn.Module, x: Tensor) -> Tensor:
    """The squared length of an input gradient, in the graph."""
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_double_backward_is_the_derivative_of_the_input_gradient(name: str, training: bool) -> None:
    network = lively(make(name, activation="silu")).train(training)
    x, weights = images(4, (3, 16, 16)), list(network.parameters())
    gradients = torch.autograd.grad(penalty(network, x), weights, allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) * w.detach().abs().mean() for w in weights]
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-5, -1e-5):
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for w, v in zip(moved.parameters(), directions, strict=True):
                w += step * v
        values.append(float(penalty(moved, x).detach()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_piecewise_linear_networks_have_no_curvature(name: str, activation: str) -> None:
    network, x = lively(make(name, activation=activation)), images(2, (3, 8, 8)).requires_grad_(True)
    gradient = torch.autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)[0]
    (curvature,) = torch.autograd.grad(gradient.square().sum(), x, allow_unused=True, materialize_grads=True)
    assert bool(curvature.abs().sum() == 0) == (activation in ("relu", "leaky-relu"))


# Copies, seeds, initial weights


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_computes_the_same_and_is_independent(name: str, duplicate: Any) -> None:
    network = lively(make(name, activation="gelu", mean=MEAN, std=STD))
    twin, before = duplicate(network), network(images())
    assert torch.equal(twin(images()), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.add_(1)
    assert torch.equal(network(images()), before)


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_weights(name: str) -> None:
    one, same, other = make(name, seed=3), make(name, seed=3), make(name, seed=4)
    weights = [nn.utils.parameters_to_vector(network.parameters()) for network in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("network", [SmallCNN(width=32), ResNet18(width=16), WideResNet(depth=10, widen_factor=2)])
def test_convolutions_start_with_kaiming_s_variance(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            channels = module.in_channels if isinstance(network, SmallCNN) else module.out_channels
            expected = math.sqrt(2 / (channels * math.prod(module.kernel_size)))
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.06), name
        bias = getattr(module, "bias", None)
        assert bias is None or not bool(bias.any()), name


def test_the_small_network_keeps_the_scale_of_its_input() -> None:
    torch.manual_seed(0)
    network, x = SmallCNN(width=64), torch.randn(64, 1, 28, 28)
    for stage in network.stages:
        x = getattr(network, stage)(x)
        assert 0.5 < float(x.detach().square().mean()) < 2  # He et al.: E[y^2] stays, but for the zeros at the border


# By name


def test_the_default_network_is_small_up_to_28_pixels() -> None:
    shapes = {(1, 8, 8): "small-cnn", (3, 28, 28): "mnist-cnn", (1, 8, 29): "resnet18", (3, 32, 32): "resnet18"}
    assert {shape: default_network(shape) for shape in shapes} == shapes
    assert set(shapes.values()) <= set(NETWORKS)


def test_width_counts_channels_or_widens() -> None:
    def first(name: str, width: int | None) -> int:
        with torch.device("meta"):
            network = build_network(name, num_classes=10, input_shape=[3, 32, 32], width=width)
        return next(
            p for p in network.get_submodule("layer1" if "wrn" not in name else "block1.layer").parameters()
        ).shape[0]

    assert [first("small-cnn", width) for width in (None, 8)] == [32, 8]
    assert [first("resnet18", width) for width in (None, 16)] == [64, 16]
    assert [first("preactresnet18", width) for width in (None, 16)] == [64, 16]
    for depth, blocks in ((28, 4), (34, 5)):
        with torch.device("meta"):
            network: Any = build_network(f"wrn-{depth}-10", num_classes=10, input_shape=(3, 32, 32), width=2)
        assert network.fc.in_features == 128
        assert [len(getattr(network, f"block{number}").layer) for number in (1, 2, 3)] == [blocks] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet81"}, r"network: got 'resnet81', expected one of .*did you mean 'resnet18'"),
        ({"name": 18}, "network: got 18, expected one of"),
        ({"num_classes": 1}, "num_classes: got 1, expected a whole number, 2 <= num_classes"),
        ({"input_shape": (32, 32)}, r"input_shape: got \(32, 32\), expected \(C, H, W\)"),
        ({"input_shape": (3, 0, 32)}, "input_shape: got 0, expected a whole number"),
        ({"width": 0}, "width: got 0, expected a whole number, 1 <= width"),
        ({"mean": (0.5,)}, r"mean: got \(0.5,\), expected 3 numbers, one for each channel"),
        ({"mean": 0.5}, "mean: got 0.5, expected 3 numbers"),
        ({"mean": (123.7, 116.8, 103.9)}, "mean: got 123.7, expected 0 <= mean <= 1; divide by 255"),
        ({"std": (0.2, 0.0, 0.2)}, "std: got 0, expected 0 < std <= 1"),
        ({"std": (0.2, float("nan"), 0.2)}, "std: got nan, expected a number"),
        ({"activation": "rleu"}, "activation: got 'rleu', expected one of .*did you mean 'relu'"),
        ({"activation": nn.ReLU()}, r"activation: got ReLU\(\), expected a name, or a function.*write nn.SiLU, not"),
        (
            {"activation": lambda: nn.ReLU(inplace=True)},
            r"activation: got ReLU\(inplace=True\), expected .*not in place",
        ),
        ({"activation": nn.PReLU}, r"activation: got PReLU\(num_parameters=1\), expected .*without parameters"),
        ({"activation": lambda: torch.relu}, "activation: got <built-in method relu"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    arguments = {"name": "resnet18", "num_classes": 10, "input_shape": (3, 32, 32), **options}
    with pytest.raises(InputError, match=message):
        build_network(**arguments)


@pytest.mark.parametrize("depth", [4, 27, 30])
def test_a_depth_that_no_wide_resnet_has_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match="depth: got"):
        WideResNet(depth=depth)


# From elsewhere

_SOURCE = """
import torch
from torch import nn

def both(num_classes, in_channels):
    net = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(num_classes))
    net[1].eval()
    return net

def anything(**options):
    return Net(**options)

def nothing():
    return Net(5, 2)

def classes(num_classes=10):
    return Net(num_classes, 2)

class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=3):
        super().__init__()
        self.drop, self.conv, self.fc = nn.Dropout(0.5), nn.Conv2d(in_channels, 4, 3), nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(self.drop(self.conv(x)).relu().mean((2, 3)))

class Mean(Net):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.mu = 0.5

class namespace:
    Inner = Net

def broken(num_classes):
    raise RuntimeError("no such weights\\nsecond line")

def word():
    return "resnet"

number = 3
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere_networks.py").write_text(_SOURCE)
    (tmp_path / "elsewhere_damaged.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "elsewhere_networks", raising=False)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("factory", ["both", "anything", "nothing", "classes", "Net", "namespace.Inner"])
def test_a_factory_of_the_user_s_own_is_called_with_what_it_accepts(factory: str) -> None:
    network = build_network(f"elsewhere_networks:{factory}", num_classes=5, input_shape=(2, 9, 8))
    assert network(torch.rand(3, 2, 9, 8)).shape == (3, 5)
    flags = {name: child.training for name, child in network.named_modules()}
    assert flags == {name: not (factory == "both" and name == "1") for name in flags}  # as the factory left them
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("duplicate", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_network_from_elsewhere_is_normalised_under_robustbench_s_names(duplicate: Any) -> None:
    torch.manual_seed(0)
    network = build_network("elsewhere_networks:Net", num_classes=5, input_shape=(3, 8, 8), mean=MEAN, std=STD)
    network = duplicate(network.double().eval())
    state = network.state_dict()
    plain = type(network)(5, 3).double().eval()
    mean, std = state.pop("mu"), state.pop("sigma")
    plain.load_state_dict(state, strict=True)
    x = images(2, (3, 8, 8))
    torch.testing.assert_close(network(x), plain((x - mean) / std))
    torch.testing.assert_close(mean.flatten(), torch.tensor(MEAN).double())
    torch.testing.assert_close(std.flatten(), torch.tensor(STD).double())
    identity = build_network("elsewhere_networks:Net", num_classes=5, input_shape=(3, 8, 8), mean=(0, 0, 0))
    assert not identity._forward_pre_hooks


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_package:net", {}, r"could not be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        ("elsewhere_damaged:net", {}, r"could not be imported \(SyntaxError: .*expected package.module:factory"),
        ("elsewhere_networks:nte", {}, r"could not be imported \(AttributeError: "),
        ("elsewhere_networks:", {}, "could not be imported"),
        (":net", {}, "could not be imported"),
        (
            "elsewhere_networks:broken",
            {},
            r"could not be made \(RuntimeError: no such weights\), expected a network for 5",
        ),
        ("elsewhere_networks:number", {}, r"could not be made \(TypeError: 'int' object is not callable\)"),
        ("elsewhere_networks:word", {}, "model: got a str, expected a torch.nn.Module"),
        ("elsewhere_networks:nothing", {"num_classes": 6}, r"got shape \(2, 5\), expected logits of shape \(2, 6\)"),
        ("elsewhere_networks:nothing", {"input_shape": (3, 8, 8)}, r"got RuntimeError: .*channels.* \(2, 3, 8, 8\)"),
        (
            "elsewhere_networks:Net",
            {"width": 8},
            "got a width or an activation for 'elsewhere_networks:Net', expected neither",
        ),
        ("elsewhere_networks:Net", {"activation": "silu"}, "got a width or an activation"),
        (
            "elsewhere_networks:Mean",
            {"mean": (0.5, 0.5)},
            "mean: got one for a network with a 'mu' of its own, expected None",
        ),
        (
            "elsewhere_networks:both",
            {"mean": (0.5, 0.5)},
            "mean: got one for .*nn.Sequential, expected None; normalise",
        ),
    ],
)
def test_a_network_from_elsewhere_that_cannot_be_used_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, UnsupportedModelError), match=message) as caught:
        build_network(name, **{"num_classes": 5, "input_shape": (2, 9, 8), **options})
    assert "\n" not in str(caught.value)


class _Odd(nn.Module):
    """A network whose last step is wrong in one way."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.last = last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def _fails(z: Tensor) -> Tensor:
    raise ValueError("not today")


ODD: dict[str, tuple[Any, str]] = {
    "fine": (lambda z: z, ""),
    "nonnegative": (lambda z: z.square(), ""),
    "tuple": (lambda z: (z, z), "got a tuple, expected logits"),
    "columns": (lambda z: z[:, :2], r"got shape \(2, 2\)"),
    "rows": (lambda z: z[:1], r"got shape \(1, 3\)"),
    "detached": (lambda z: z.detach(), "without a gradient to the images"),
    "labels": (lambda z: z.argmax(1, keepdim=True).expand(-1, 3), "without a gradient to the images"),
    "constant": (lambda z: nn.Parameter(torch.ones(2, 3)), "without a gradient to the images"),
    "fails": (_fails, r"got ValueError: not today for input of shape \(2, 1, 8, 8\)"),
    "nan": (lambda z: z * torch.nan, "got NaN or Inf, expected finite"),
    "softmax": (lambda z: z.softmax(1), "got probabilities, expected logits"),
}


@pytest.mark.parametrize("case", ODD)
def test_the_check_finds_what_is_wrong_and_leaves_the_network_as_it_was(case: str) -> None:
    last, message = ODD[case]
    network = _Odd(last).train()
    network.conv.eval()  # but BatchNorm would move
    network.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    network.fc.weight.grad = torch.ones(3, 4)

    def snapshot() -> list[Any]:
        flags = [module.training for module in network.modules()]
        return [flags, [(p.requires_grad, p.grad is None) for p in network.parameters()]]

    before, state = snapshot(), copy.deepcopy(network.state_dict())
    with torch.no_grad():
        if message:
            with pytest.raises(UnsupportedModelError, match=message) as caught:
                check_network(network, (1, 8, 8), 3)
            assert "\n" not in str(caught.value)
        else:
            check_network(network, (1, 8, 8), 3)
    assert snapshot() == before
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert torch.equal(network.fc.weight.grad, torch.ones(3, 4))


def test_the_check_follows_dtype_and_device() -> None:
    check_network(SmallCNN().double(), (1, 8, 8), 10)
    check_network(SmallCNN().to("meta"), (1, 8, 8), 10)


# timm's and torchvision's


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet10t", (1, 28, 28)),
        ("timm:mobilenetv3_small_050", (2, 33, 40)),
        ("timm:test_vit", (3, 32, 64)),  # made for 160 x 160
        ("timm:test_vit", (1, 224, 224)),
        ("timm:test_byobnet.r160_in1k", (3, 224, 224)),
        ("torchvision:mobilenet_v3_small", (3, 224, 224)),
        ("torchvision:squeezenet1_1", (3, 32, 32)),
        ("torchvision:googlenet", (3, 32, 32)),
    ],
)
def test_a_library_s_network_is_made_for_the_classes_channels_and_size(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    mean, std = [0.4] * shape[0], [0.5] * shape[0]
    network = build_network(name, num_classes=7, input_shape=shape, mean=mean, std=std)
    torch.manual_seed(0)
    plain = build_network(name, num_classes=7, input_shape=shape)
    x = torch.rand(2, *shape)
    logits = network.eval()(x)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, plain.eval()((x - 0.4) / 0.5))  # the same fresh weights, from the seed alone
    assert isinstance(network.train()(x), Tensor)  # no auxiliary logits beside them


def test_a_vision_transformer_of_torchvision_gets_the_size() -> None:
    pytest.importorskip("torchvision")
    with torch.device("meta"):  # 86 million weights
        network = build_network("torchvision:vit_b_16", num_classes=5, input_shape=(3, 32, 32))
    assert network.get_parameter("encoder.pos_embedding").shape == (1, 5, 768)  # 2 x 2 patches and a class token


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "timm:resnet19",
            (3, 32, 32),
            "got 'timm:resnet19', expected a classifier that timm lists; did you mean '.*' or '.*' or",
        ),
        (
            "torchvision:resnet81",
            (3, 32, 32),
            "a classifier that torchvision lists; did you mean 'resnet18' or 'resnet",
        ),
        ("torchvision:qqqq", (3, 32, 32), "a classifier that torchvision lists$"),
        ("torchvision:fasterrcnn_resnet50_fpn", (3, 32, 32), "a classifier that torchvision lists"),
        ("timm:hf-hub:some/thing", (3, 32, 32), "a classifier that timm lists"),
        ("torchvision:resnet18", (1, 32, 32), "for images of 1 channel, expected images of 3 channels.*timm:NAME"),
        ("torchvision:vit_b_16", (3, 32, 48), "for images of 32x48 pixels, expected square ones"),
        ("torchvision:vit_b_16", (3, 30, 30), r"could not be made \(.*patch size"),
        ("timm:test_vit", (3, 28, 32), "for images of 28x32 pixels, expected sides that patches of 16x16 pixels fill"),
        ("torchvision:inception_v3", (3, 32, 32), "for input of shape .*look at the channels and the size"),
    ],
)
def test_a_library_s_network_that_does_not_suit_is_refused(
    name: str, shape: tuple[int, int, int], message: str
) -> None:
    pytest.importorskip(name.partition(":")[0])
    where = "cpu" if name.startswith("timm") else "meta"  # timm reads values while it makes a network
    with torch.device(where), pytest.raises(ArtSaliencyError, match=message) as caught:
        build_network(name, num_classes=7, input_shape=shape)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("library", "extra"), [("timm", "timm"), ("torchvision", "vision")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        MissingDependencyError, match=rf"'{library}:resnet18'.*{library}.*art-saliency\[{extra}\]"
    ) as caught:
        build_network(f"{library}:resnet18", num_classes=7, input_shape=(3, 32, 32))
    assert isinstance(caught.value, ArtSaliencyError)


def _fitted(name: str, method: str, **parameters: Any) -> Any:
    """
    Two steps of a method on six images of 32 x 32, by its trainer: residual branches that start from zero move in the second.

    :return: The classifier and its weights before.
    """
    from art_saliency.trainers.methods import TRAINERS
    from art_saliency.trainers.runs import make_classifier

    torch.manual_seed(0)
    network = build_network(name, num_classes=3, input_shape=(3, 32, 32))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    classifier = make_classifier(network, input_shape=(3, 32, 32), num_classes=3, optimizer=optimizer)
    before = copy.deepcopy(network.state_dict())
    trainer = TRAINERS[method](classifier, eps=0.03, **parameters)
    x, y = images(6).float().repeat(3, 1, 1, 1)[:6], torch.arange(6) % 3
    trainer.fit(x, y, nb_epochs=2, batch_size=6, seed=0, verbose=False)
    return classifier, before


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [
        ("timm:vit_tiny_patch16_224", "adv-gsct", {}),  # attention: fused kernels have no second derivative
        ("timm:test_vit", "j-sigr", {}),
        ("torchvision:squeezenet1_1", "adv-gsct", {}),  # ReLUs in place, dropout
        ("torchvision:squeezenet1_1", "aalp", {"max_iter": 1}),
        ("timm:resnet10t", "fsr", {"max_iter": 1}),
        ("torchvision:squeezenet1_1", "fsr", {"target": "features", "base": "adv-gsct"}),
    ],
)
def test_training_moves_every_weight_of_a_library_s_network(name: str, method: str, parameters: dict[str, Any]) -> None:
    pytest.importorskip(name.partition(":")[0])
    classifier, before = _fitted(name, method, **parameters)
    after = dict(classifier.model.named_parameters())
    assert {key for key, value in before.items() if key in after and torch.equal(value, after[key])} <= {
        key
        for key in before
        if key.endswith("attn.qkv.bias")  # a softmax does not see the keys' part of it
    }
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_an_operation_without_a_second_derivative_is_named() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(UnsupportedModelError, match="got a network with hardsigmoid, of which torch has no second"):
        _fitted("torchvision:mobilenet_v3_small", "adv-gsct")
    _fitted("torchvision:mobilenet_v3_small", "fgsm-rs")


def test_attention_of_twice_differentiated_steps_has_the_derivative_of_the_input_gradient() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, attention.in_proj_weight).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).square().sum()

    with second_derivatives():
        assert torch.autograd.gradgradcheck(network, [x.requires_grad_(True)])
    with pytest.raises(UnsupportedModelError, match="scaled_dot_product"), second_derivatives(True):
        raise RuntimeError("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented")
    for needed in (True, False):
        with pytest.raises(RuntimeError, match=r"^another$"), second_derivatives(needed):
            raise RuntimeError("another")


def test_a_run_with_a_library_s_network_goes_from_training_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    import numpy as np

    from art_saliency import load
    from art_saliency.cli import main
    from art_saliency.methods.fsr import fsr_layers

    x, y = images(40, (3, 16, 16)).float().numpy(), np.arange(40) % 10
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    run, common = str(tmp_path / "run"), ["--device", "cpu", "--quiet"]
    words = ["train", "fsr", "--data", str(tmp_path / "set.npz"), "--network", "timm:resnet10t", "--eps", "0.1"]
    words += ["--epochs", "1", "--set", "max_iter=1", "--set", "hidden=8", "--normalise", "--out", run]
    assert main([*words, *common]) == 0
    model = load(run).model
    assert type(model).__module__ == "timm.models.resnet"
    assert list(fsr_layers(model)) == ["layer4"]
    assert model.get_buffer("mu").shape == (1, 3, 1, 1)
    assert main(["evaluate", run, "--images", "2", *common]) == 0
    assert main(["explain", run, "--index", "1", "--maps", "loss-gradient", *common]) == 0
    assert (tmp_path / "run" / "explain.png").is_file()
    capsys.readouterr()
    arguments = ["--name", "Doe2026Timm", "--dataset", "cifar10", "--threat-model", "Linf", "--eps", "0.1"]
    assert main(["export", run, *arguments, "--out", str(tmp_path / "bundle"), *common]) == 2
    assert "timm.models.resnet.ResNet" in (said := capsys.readouterr().err)
    assert "--source network.py:factory" in said
    assert not (tmp_path / "bundle").exists()
    misspelt = [word.replace("resnet10t", "resnet10x") for word in words[:-1]]
    assert main([*misspelt, str(tmp_path / "other"), *common]) == 2
    assert "did you mean 'resnet10t'" in capsys.readouterr().err
