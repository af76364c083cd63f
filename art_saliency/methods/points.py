"""Where in the ball a method takes logits and gradients that are not an attack's: (x, threat, random) -> x0."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel

__all__ = ["Point", "extreme_point", "image_itself", "random_point"]

Point = Callable[[Tensor, ThreatModel, RandomSource | None], Tensor]
"""(x (N, C, H, W) in [0, 1], threat, random) -> x0, of the same shape and range."""


def extreme_point(x: Tensor, threat: ThreatModel, random: RandomSource | None) -> Tensor:
    """:return: A random extreme point of the ball (a corner for Linf): as far away as an adversarial example, in no chosen direction."""
    return threat.random_extreme_point(x, random)


def random_point(x: Tensor, threat: ThreatModel, random: RandomSource | None) -> Tensor:
    """:return: A random point inside the ball, half as far from its centre on average."""
    return threat.random_start(x, random)


def image_itself(x: Tensor, threat: ThreatModel, random: RandomSource | None) -> Tensor:
    """:return: `x`."""
    return x
