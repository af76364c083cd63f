"""The threat model: which perturbations an adversary may choose, and the geometry that attacks need of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.randomness import RandomSource, normal, uniform

__all__ = ["NORMS", "ThreatModel", "a_threat_model", "finite_entries"]

NORMS = ("Linf", "L2")
"""Names as in RobustBench."""


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """:return: One number a sample, shaped (N, 1, ...) to broadcast."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _norms(delta: Tensor) -> Tensor:
    """:return: L2 norms of (N, ...), shaped (N, 1, ...) to broadcast."""
    return _rows(delta.flatten(1).norm(dim=1), delta)


def _unit(delta: Tensor) -> Tensor:
    """
    Rows of L2 norm 1, at any scale; 0 where a row is exactly 0.

    The gradients of a confident network are tiny and their squares vanish: without the first division an L2 attack would
    stand still where a Linf attack moves, and report the network as robust.
    """
    delta = delta / _rows(delta.flatten(1).abs().amax(1), delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta / _norms(delta).clamp_min(1e-12)


def finite_entries(gradient: Tensor) -> Tensor:
    """
    A gradient whose entries that are NaN or infinite count as 0: they name no direction.

    The others do. One entry among thousands, from a square root at 0 for instance, must neither stop an attack nor put NaN
    into the image, which the network would then get wrong whatever it resists.

    :param gradient: Of any shape. :return: Of the same.
    """
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class ThreatModel:
    """
    All images within `eps` of the clean one, inside the pixel range [0, 1].

    :param norm: ``"Linf"`` or ``"L2"``.
    :param eps: The radius, in units of the [0, 1] pixel range; 0 is the identity.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        _checks.one_of("norm", self.norm, NORMS)
        remedy = "for images of 0 to 255 write eps=8 / 255" if self.norm == "Linf" else ""
        eps = _checks.real("eps", self.eps, least=0, most=1 if self.norm == "Linf" else None, remedy=remedy)
        object.__setattr__(self, "eps", eps)  # NumPy's numbers are no JSON

    def scaled(self, share: float) -> ThreatModel:
        """:return: The same norm at `share` of the radius."""
        return self if share == 1 else ThreatModel(self.norm, share * self.eps)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """
        Bring images back into the ball around `x` and into [0, 1].

        The nearest such image for Linf. For L2 the nearest of the ball, then clamped: the nearest of both too, unless
        both had to move it.

        :param x_adv: (N, C, H, W), anything finite.
        :param x: (N, C, H, W) in [0, 1], the centre.
        :return: (N, C, H, W) in [0, 1].
        """
        if self.norm == "Linf":
            return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        delta = x_adv - x
        # Clamping to [0, 1] afterwards only shrinks each coordinate of delta, since x is inside: the ball still holds it.
        return (x + delta * (self.eps / _norms(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)

    def random_start(self, x: Tensor, random: RandomSource | None = None) -> Tensor:
        """
        A point of the ball: uniform in the cube for Linf, a uniform direction and a uniform radius for L2.

        ART's L2 start is uniform in volume, which in hundreds of dimensions is the sphere itself.

        :param x: (N, C, H, W) in [0, 1].
        :param random: Where the random numbers come from; ``None`` is torch's global generator.
        :return: (N, C, H, W) in [0, 1].
        """
        if self.norm == "Linf":
            return (x + self.eps * (2 * uniform(x, random) - 1)).clamp(0, 1)
        direction = normal(x, random)
        radius = _rows(uniform(x.flatten(1)[:, :1], random), x)
        return (x + self.eps * radius * _unit(direction)).clamp(0, 1)

    def random_extreme_point(self, x: Tensor, random: RandomSource | None = None) -> Tensor:
        """
        A point as far away as the ball goes: a corner of the cube for Linf, each with the same probability, a uniform direction for L2.

        What is linear on the ball is greatest at such a point. (What leaves the pixel range is clipped.)

        :param x: (N, C, H, W) in [0, 1].
        :param random: Where the random numbers come from; ``None`` is torch's global generator.
        :return: (N, C, H, W) in [0, 1].
        """
        if self.norm == "Linf":
            signs = 2 * (uniform(x, random) >= 0.5).to(x.dtype) - 1
            return (x + self.eps * signs).clamp(0, 1)
        return (x + self.eps * _unit(normal(x, random))).clamp(0, 1)

    def ascent_direction(self, gradient: Tensor) -> Tensor:
        """
        The unit step that raises a linear function most: the sign for Linf, the normalised gradient for L2.

        :param gradient: (N, C, H, W).
        :return: (N, C, H, W), finite; 0 where the gradient is exactly 0 or not finite.
        """
        gradient = finite_entries(gradient)
        return gradient.sign() if self.norm == "Linf" else _unit(gradient)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """:return: (N,) distances of the images in this model's norm."""
        delta = (x_adv - x).flatten(1)
        return delta.abs().amax(1) if self.norm == "Linf" else delta.norm(dim=1)


def a_threat_model(threat: object) -> ThreatModel:
    """:return: It, when it is one; a bare radius, which has no norm, is refused."""
    if not isinstance(threat, ThreatModel):
        raise _checks.refuse("threat", repr(threat), "a ThreatModel", 'write ThreatModel("Linf", 8 / 255)')
    return threat
