"""
What a check of an audit is: a figure, a threshold that respects how many images there are, and what the figure means.

Two attacks are compared image by image (:mod:`art_saliency.evaluation.paired`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from art_saliency.evaluation.paired import Difference, paired_difference

PASS, SUSPICIOUS, MASKED, NOT_RUN = "pass", "suspicious", "masked", "not run"


@dataclass(frozen=True)
class Check:
    """
    One check.

    :ivar name: What is checked. :ivar status: ``"pass"``, ``"suspicious"``, ``"masked"`` or ``"not run"``.
    :ivar figure: What was found, in words. :ivar threshold: What would be suspicious or convict.
    :ivar meaning: In plain language. :ivar figures: The numbers, JSON-able.
    """

    name: str
    status: str
    figure: str
    threshold: str
    meaning: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """
    From where on a difference that should not be above 0 is suspicious, and convicts.

    :ivar doubts: Suspicious at this difference or more, when its 95 % interval lies above 0.
    :ivar convicts: Masked when the whole interval lies above this.
    """

    doubts: float
    convicts: float

    def status(self, difference: Difference) -> str:
        """:return: What the difference means."""
        if difference.low > self.convicts:
            return MASKED
        return SUSPICIOUS if difference.low > 0 and difference.value >= self.doubts else PASS

    def __str__(self) -> str:
        return (
            f"suspicious: at least {100 * self.doubts:.0f} points with a 95 % interval above 0; masked: interval above "
            f"{100 * self.convicts:.0f} points"
        )


ORDERS = Bounds(doubts=0.02, convicts=0.05)
"""For two attacks of which one cannot honestly be the stronger: honest networks were seen up to 2 points apart."""
SCALE = Bounds(doubts=0.1, convicts=0.1)
"""For the cross-entropy of rescaled logits: another temperature was seen to find up to 6 points more on honest networks."""
GAP = Bounds(doubts=0.05, convicts=0.15)
"""For AutoAttack against PGD: it does find a few points more on an honest network."""


def percent(scores: Tensor) -> str:
    """:return: An attack's accuracy, in words."""
    return f"{100 * float(scores.mean()):.1f} %"


def beats(
    name: str, ours: tuple[str, Tensor], other: tuple[str, Tensor], meaning: str, bounds: Bounds = ORDERS
) -> Check:
    """A check that an attack that should be weaker than `ours` is not stronger."""
    difference = paired_difference(ours[1], other[1])
    return Check(
        name,
        bounds.status(difference),
        f"{ours[0]} leaves {percent(ours[1])}, {other[0]} {percent(other[1])}: {difference}",
        str(bounds),
        meaning,
        {"difference": difference.value, "interval_95": [difference.low, difference.high]},
    )
