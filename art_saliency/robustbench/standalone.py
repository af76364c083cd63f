"""
The networks of this package as a bundle carries them: torch only, nothing that serves training, nothing to configure.

:mod:`art_saliency.robustbench.architecture` copies the classes that a network needs from here and from
:mod:`art_saliency.residual_blocks`, word for word, so each must stand by itself. Keys and arithmetic are those of
:mod:`art_saliency.architectures` and :mod:`art_saliency.methods.fsr`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency.residual_blocks import Activation, BasicBlock, PreActBlock, WideBlock, group, pooled

__all__ = [
    "FSR",
    "ImageNetWrapper",
    "PreActResNet18",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "normalise_input",
    "put_behind",
]


class SmallCNN(nn.Module):
    """Three convolutions, global average pooling, a linear head."""

    def __init__(self, num_classes: int, in_channels: int, width: int, stem_stride: int, act: Activation) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1), act())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), act())
        self.layer3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), act())
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1]. :return: (N, K) logits."""
        logits: Tensor = self.linear(pooled(self.layer3(self.layer2(self.layer1(x)))))
        return logits


class ResNet18(nn.Module):
    """ResNet-18 with CIFAR's stem, 3 x 3 at full resolution."""

    def __init__(self, num_classes: int, in_channels: int, width: int, act: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), act()
        self.layer1 = group(BasicBlock, 2, width, width, 1, act)
        self.layer2 = group(BasicBlock, 2, width, 2 * width, 2, act)
        self.layer3 = group(BasicBlock, 2, 2 * width, 4 * width, 2, act)
        self.layer4 = group(BasicBlock, 2, 4 * width, 8 * width, 2, act)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1]. :return: (N, K) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(pooled(x))
        return logits


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 with CIFAR's stem."""

    def __init__(self, num_classes: int, in_channels: int, width: int, act: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = group(PreActBlock, 2, width, width, 1, act)
        self.layer2 = group(PreActBlock, 2, width, 2 * width, 2, act)
        self.layer3 = group(PreActBlock, 2, 2 * width, 4 * width, 2, act)
        self.layer4 = group(PreActBlock, 2, 4 * width, 8 * width, 2, act)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1]. :return: (N, K) logits."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(pooled(x))
        return logits


class WideResNet(nn.Module):
    """Wide ResNet of depth 6 n + 4."""

    def __init__(self, num_classes: int, in_channels: int, depth: int, widen_factor: int, act: Activation) -> None:
        super().__init__()
        blocks, one, two, four = (depth - 4) // 6, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(OrderedDict(layer=group(WideBlock, blocks, 16, one, 1, act)))
        self.block2 = nn.Sequential(OrderedDict(layer=group(WideBlock, blocks, one, two, 2, act)))
        self.block3 = nn.Sequential(OrderedDict(layer=group(WideBlock, blocks, two, four, 2, act)))
        self.bn1, self.relu = nn.BatchNorm2d(four), act()
        self.fc = nn.Linear(four, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1]. :return: (N, K) logits."""
        x = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(pooled(x))
        return logits


class FSR(nn.Module):
    """
    Feature separation and recalibration (Kim et al., CVPR 2023) as it is deployed: f + m R(m f), m = sigmoid(-S(f) / tau).

    Deterministic, and without the auxiliary head, which serves training only. Of tokens (N, L, C) the first `leading` pass
    untouched; the others are seen as a feature map of `rows` rows.
    """

    def __init__(self, channels: int, hidden: int, tau: float, leading: int = 0, rows: int = 0) -> None:
        super().__init__()
        self.tau, self.leading, self.rows = tau, leading, rows
        self.separation = self.bottleneck(channels, hidden)
        self.recalibration = self.bottleneck(channels, hidden)

    @staticmethod
    def bottleneck(channels: int, hidden: int) -> nn.Sequential:
        """:return: Three convolutions, `channels` to `hidden` and back."""
        return nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
        )

    def transform(self, f: Tensor) -> Tensor:
        """:param f: (N, C, H, W). :return: The same shape."""
        mask = torch.sigmoid(-self.separation(f) / self.tau)
        correction: Tensor = mask * self.recalibration(mask * f)
        return f + correction

    def forward(self, features: Tensor) -> Tensor:
        """:param features: (N, C, H, W) or (N, L, C). :return: The same shape."""
        if features.ndim == 4:
            return self.transform(features)
        tokens, patches = features[:, : self.leading], features[:, self.leading :]
        grid = patches.transpose(1, 2).reshape(len(patches), -1, self.rows, patches.shape[1] // self.rows)
        return torch.cat([tokens, self.transform(grid).flatten(2).transpose(1, 2)], dim=1)


def put_behind(model: nn.Module, target: str, layer: nn.Module) -> None:
    """Put FSR behind a submodule of any network; its tensors are ``<target>.fsr.*``, all others keep their names."""

    def apply(module: nn.Module, _: Any, output: Tensor) -> Any:
        return module.fsr(output)  # type: ignore[operator]

    place = model.get_submodule(target)
    place.add_module("fsr", layer)
    if type(place).forward is not nn.Sequential.forward:  # a sequence calls its children one by one, the new one last
        place.register_forward_hook(apply)


def normalise_input(
    model: nn.Module, shape: tuple[int, ...], mean: str = "mu", std: str = "sigma", dtype: torch.dtype = torch.float32
) -> None:
    """Let a network subtract a mean from its input and divide by a deviation, both of which are among its tensors."""

    def apply(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((inputs[0] - module.get_buffer(mean)) / module.get_buffer(std), *inputs[1:])

    model.register_buffer(mean, torch.zeros(shape, dtype=dtype))
    model.register_buffer(std, torch.ones(shape, dtype=dtype))
    model.register_forward_pre_hook(apply)


class ImageNetWrapper(nn.Module):
    """RobustBench writes ``model.`` before every key of an ImageNet checkpoint: this is where they then belong."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, 3, H, W) in [0, 1]. :return: (N, 1000) logits."""
        logits: Tensor = self.model(x)
        return logits
