"""
Networks for images in [0, 1]: a small CNN, and CIFAR's ResNets under RobustBench's parameter names.

Normalisation lies inside the network, so that attacks and penalties are in pixel units. Activations are modules without
parameters and never in place: the choice changes no key of the state dict, and input gradients can be differentiated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.residual_blocks import Activation as ActivationFactory
from art_saliency.residual_blocks import BasicBlock, PreActBlock, WideBlock, group, pooled

__all__ = [
    "ACTIVATIONS",
    "ActivationFactory",
    "PreActResNet18",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "add_normalisation",
    "normalised",
]

ACTIVATIONS: dict[str, ActivationFactory] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
"""By name. From ``"elu"`` on the derivative is continuous: a penalty on the input gradient sees the curvature."""


class _Chain(nn.Module):
    """
    Normalisation, stages one after the other, global average pooling, a linear head.

    :cvar stages: The children that lead to the last feature map, in order. The last of them puts it out, called once a
        forward pass: the place for FSR, ``insert_fsr(model, model.stages[-1], ...)``.
    :cvar head: The child that makes logits of the pooled features.
    """

    stages: ClassVar[tuple[str, ...]]
    head: ClassVar[str] = "linear"

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1], any H and W. :return: (N, K) logits."""
        x = normalised(self, x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        # Not x.mean((2, 3)): so that RobustBench's own classes give the same logits bit for bit, and its AutoAttack the same number.
        logits: Tensor = getattr(self, self.head)(pooled(x))
        return logits


class SmallCNN(_Chain):
    """
    Three convolutions, for digits of 8 x 8 to 28 x 28; its last feature map is ``layer3``, half as high and wide, or a quarter.

    :param num_classes: K.
    :param in_channels: C.
    :param width: Channels of the first layer; the other two have twice as many.
    :param stem_stride: Of the first layer. With 1 a feature sees 9 x 9 pixels, with 2 it sees 15 x 15: at 28 x 28 adversarial
        training of the former does not leave the plateau on which one class is predicted for everything.
    :param activation: A name of :data:`ACTIVATIONS`, or a function like those there.
    :param mean: Of each channel, in units of [0, 1]; ``None`` is 0.
    :param std: Of each channel, in units of [0, 1]; ``None`` is 1.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        width: int = 32,
        stem_stride: int = 1,
        activation: str | ActivationFactory = "relu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        add_normalisation(self, in_channels, mean, std)
        act = _activation(activation)
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1), act())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), act())
        self.layer3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), act())
        self.linear = nn.Linear(2 * width, num_classes)
        _initialise(self, "fan_in")  # keeps the scale of the forward pass, which no BatchNorm mends here


class ResNet18(_Chain):
    """
    ResNet-18 with CIFAR's stem, 3 x 3 at full resolution; its last feature map, after the activation, is ``layer4``.

    Its weights are those of RobustBench's ``ResNet(BasicBlock, [2, 2, 2, 2])``, for 3 channels, width 64 and ReLU.

    :param width: Channels of the first of four stages, each of which has twice as many as the one before; 16 suits a CPU.
        The other parameters are those of :class:`SmallCNN`.
    """

    stages: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4")
    block: ClassVar[type[nn.Module]] = BasicBlock

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: int = 64,
        activation: str | ActivationFactory = "relu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        add_normalisation(self, in_channels, mean, std)
        act = _activation(activation)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        if "bn1" in self.stages:
            self.bn1, self.relu = nn.BatchNorm2d(width), act()
        channels = (width, width, 2 * width, 4 * width, 8 * width)
        for number, (before, after) in enumerate(pairwise(channels), start=1):
            self.add_module(f"layer{number}", group(self.block, 2, before, after, 1 if number == 1 else 2, act))
        self.linear = nn.Linear(channels[-1], num_classes)
        _initialise(self, "fan_out")


class PreActResNet18(ResNet18):
    """
    Pre-activation ResNet-18; its last feature map is ``layer4``, a sum that no activation follows.

    Its weights are those of RobustBench's ``PreActResNet(PreActBlock, [2, 2, 2, 2])``, for 3 channels, width 64 and ReLU.
    The parameters are those of :class:`ResNet18`.
    """

    stages = ("conv1", "layer1", "layer2", "layer3", "layer4")
    block = PreActBlock


class WideResNet(_Chain):
    """
    Wide ResNet (WRN-28-10, WRN-34-10); its last feature map, after BatchNorm and activation, is ``relu``.

    Its weights are those of RobustBench's ``WideResNet(depth, widen_factor=..., sub_block1=False)``, for 3 channels and ReLU.

    :param depth: 6 n + 4, for n blocks in each of three stages.
    :param widen_factor: The stages have 16, 32 and 64 times as many channels.
        The other parameters are those of :class:`SmallCNN`.
    """

    stages = ("conv1", "block1", "block2", "block3", "bn1", "relu")
    head = "fc"

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        depth: int = 28,
        widen_factor: int = 10,
        activation: str | ActivationFactory = "relu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if _checks.whole("depth", depth, least=10) % 6 != 4:
            raise _checks.refuse("depth", depth, "6 n + 4: 10, 16, 22, 28, 34, ...")
        add_normalisation(self, in_channels, mean, std)
        act = _activation(activation)
        channels = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        for number, (before, after) in enumerate(pairwise(channels), start=1):
            blocks = group(WideBlock, (depth - 4) // 6, before, after, 1 if number == 1 else 2, act)
            # One more level, since RobustBench's keys read block1.layer.0.conv1.weight.
            self.add_module(f"block{number}", nn.Sequential(OrderedDict[str, nn.Module](layer=blocks)))
        self.bn1, self.relu = nn.BatchNorm2d(channels[-1]), act()
        self.fc = nn.Linear(channels[-1], num_classes)
        _initialise(self, "fan_out")


def _activation(given: str | ActivationFactory) -> ActivationFactory:
    """:return: The function that makes it, tried once."""
    factory = _checks.function("activation", given, ACTIVATIONS)
    expected = "a name, or a function without arguments that makes a module without parameters, not in place"
    try:
        module = factory()
    except TypeError as error:
        raise _checks.refuse("activation", repr(given), expected, "write nn.SiLU, not nn.SiLU()") from error
    if not isinstance(module, nn.Module) or module.state_dict() or getattr(module, "inplace", False):
        raise _checks.refuse("activation", repr(module), expected)
    return factory


def _initialise(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """He et al. (2015) for convolutions, zero for biases, torch's own for the rest."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def add_normalisation(network: nn.Module, channels: int, mean: Any, std: Any) -> bool:
    """
    Register ``mu`` and ``sigma``, (1, C, 1, 1), as RobustBench's own networks call them; nothing for the identity.

    :param network: Whose `forward`, or a hook before it, calls :func:`normalised`.
    :param channels: C.
    :param mean: C numbers from 0 to 1; ``None`` is 0.
    :param std: C numbers above 0, up to 1; ``None`` is 1.
    :return: Whether it is anything but the identity.
    """
    mu = _by_channel("mean", mean, channels, 0.0, least=0.0)
    sigma = _by_channel("std", std, channels, 1.0, above=0.0)
    if mu == [0.0] * channels and sigma == [1.0] * channels:
        return False
    for name, values in (("mu", mu), ("sigma", sigma)):
        if hasattr(network, name):
            raise _checks.refuse(
                "mean", f"one for a network with a {name!r} of its own", "None", "it normalises by itself"
            )
        network.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))
    return True


def _by_channel(name: str, given: Any, channels: int, default: float, **bounds: float) -> list[float]:
    values = [default] * channels if given is None else _checks.as_tensor(name, given).double().tolist()
    if not isinstance(values, list) or len(values) != channels:
        raise _checks.refuse(name, repr(given), f"{channels} numbers, one for each channel")
    return [_checks.real(name, value, most=1, remedy="divide by 255", **bounds) for value in values]


def normalised(network: nn.Module, x: Tensor) -> Tensor:
    """:return: (x - mu) / sigma where the network has them, else `x`."""
    return (x - network.get_buffer("mu")) / network.get_buffer("sigma") if "mu" in network._buffers else x
