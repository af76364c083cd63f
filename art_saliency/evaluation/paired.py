"""Two attacks on the same images: how far apart they are, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from art_saliency import _checks

__all__ = ["Difference", "paired_difference"]


@dataclass(frozen=True)
class Difference:
    """
    A difference of two accuracies on the same images, -1 to 1, with its 95 % interval.

    :ivar value: First minus second. :ivar low: Lower end. :ivar high: Upper end. :ivar count: Images.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def paired_difference(first: Tensor, second: Tensor, *, z: float = 1.96) -> Difference:
    """
    The mean of `first` - `second` over images, and Agresti and Min's (2005) interval of it.

    Their interval is Wald's after half an image was added to each of the four cells of a matched pair, so that a few images, or a
    difference of none at all, do not look certain. Written for scores between 0 and 1, which for 0 and 1 alone is theirs.

    :param first: (N,) scores in [0, 1]; 1 is a right answer.
    :param second: (N,) scores of the same images.
    :param z: 1.96 for 95 %.
    :return: The difference.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise _checks.refuse(
            "scores", f"shapes {tuple(first.shape)} and {tuple(second.shape)}", "two of the same shape (N,), N >= 1"
        )
    gaps = first.double() - second.double()
    count = len(gaps)
    centre = float(gaps.sum()) / (count + 2)
    square = (float(gaps.square().sum()) + 1) / (count + 2)
    half = z * math.sqrt(max(square - centre * centre, 0.0) / (count + 2))
    return Difference(float(gaps.mean()), max(-1.0, centre - half), min(1.0, centre + half), count)
