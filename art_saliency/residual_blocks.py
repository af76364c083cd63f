"""
The blocks that CIFAR's ResNets are made of, under RobustBench's names, in which ``relu...`` is the activation, whichever.

A bundle carries what it needs of these word for word, so each must stand by itself with torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Activation", "ActivationFirst", "BasicBlock", "PreActBlock", "WideBlock", "group", "pooled"]

Activation = Callable[[], nn.Module]
"""Makes an activation without parameters that does not work in place; called once for every place in a network."""


def pooled(x: Tensor) -> Tensor:
    """:return: (N, C), the average of each channel; as RobustBench's classes take it, bit for bit."""
    return nn.functional.avg_pool2d(x, x.shape[2:]).flatten(1)


def group(block: type[nn.Module], count: int, inputs: int, outputs: int, stride: int, act: Activation) -> nn.Sequential:
    """:return: `count` blocks, the first of which changes resolution and channels."""
    first = block(inputs, outputs, stride, act)
    return nn.Sequential(first, *(block(outputs, outputs, 1, act) for _ in range(count - 1)))


class BasicBlock(nn.Module):
    """The activation follows the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(outputs), act()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), act()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            adapt = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(adapt, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class ActivationFirst(nn.Module):
    """What the two blocks below have in common: the way beside the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), act()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), act()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)


class PreActBlock(ActivationFirst):
    """The activation comes first; the shortcut takes the block's input as it is."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: Activation) -> None:
        super().__init__(inputs, outputs, stride, act)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, outputs, H / stride, W / stride)."""
        y = self.conv1(self.relu1(self.bn1(x)))
        out: Tensor = self.conv2(self.relu2(self.bn2(y))) + self.shortcut(x)
        return out


class WideBlock(ActivationFirst):
    """The activation comes first; a shortcut that has a convolution takes the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: Activation) -> None:
        super().__init__(inputs, outputs, stride, act)
        same = stride == 1 and inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """:return: (N, outputs, H / stride, W / stride)."""
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = y + (x if self.convShortcut is None else self.convShortcut(activated))
        return out
