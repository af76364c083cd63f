"""Which of AutoAttack's attacks can run for a number of classes, and how that differs from the standard version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from art_saliency import _checks
from art_saliency.threat import ThreatModel

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""What AutoAttack's versions run, in order; each attack sees only the images that all before it left standing."""

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""What ``version="custom"`` may name."""

QUERIES = 5000
"""Of Square, in the standard version."""

_TARGETS = 9  # that the standard version gives APGD-T and FAB-T, so it needs ten classes
# The DLR loss divides by z_(1) - z_(3), its targeted form by z_(1) - (z_(3) + z_(4)) / 2: logits in descending order.
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


@dataclass(frozen=True)
class Plan:
    """
    What runs.

    :ivar attacks: In order.
    :ivar target_classes: Of APGD-T and FAB-T each.
    :ivar deviations: From the standard version, in words; empty when there are none.
    """

    attacks: tuple[str, ...]
    target_classes: int
    deviations: list[str]


def plan_attacks(version: str, attacks: Sequence[str] | None, classes: int, square_queries: int) -> Plan:
    """
    Adapt a version to the number of classes.

    :param version: A key of :data:`VERSIONS`, or ``"custom"``.
    :param attacks: Names from :data:`ATTACKS` for a custom version, else None.
    :param classes: K, at least 2.
    :param square_queries: Of Square.
    :raises InputError: When a custom list names what cannot run: nothing that was named is dropped in silence.
    """
    if version == "custom":
        names, deviations = _custom(attacks, classes), [_other(version)]
    elif attacks is not None:
        raise _checks.refuse(
            "attacks", repr(attacks), f"None with version={version!r}", "version='custom' takes a list"
        )
    else:
        names, deviations = _fitting(VERSIONS[version], classes)
        if version != "standard":
            deviations.insert(0, _other(version))
    targeted = [name for name in names if name in ("apgd-t", "fab-t")]
    if targeted and classes - 1 < _TARGETS:
        fewer = f"{classes - 1} instead of {_TARGETS} targets"
        deviations.append(f"{classes} classes: {' and '.join(targeted)} with {fewer}")
    if "square" in names and square_queries != QUERIES:
        deviations.append(f"square with {square_queries} instead of {QUERIES} queries")
    return Plan(tuple(names), min(_TARGETS, classes - 1), deviations)


def changes_of(version: str, deviations: Sequence[str]) -> list[str]:
    """:return: What was changed of a version of AutoAttack; that it is another one than the standard version is no change of it."""
    return [each for each in deviations if each != _other(version)]


def in_words(version: str, deviations: Sequence[str]) -> str:
    """:return: The version's name and, where anything of it was changed, what: ``"standard, changed: 5 classes"``."""
    causes = dict.fromkeys(each.partition(":")[0] for each in changes_of(version, deviations))
    return f"{version}, changed: {', '.join(causes)}" if causes else version


def _other(version: str) -> str:
    return f"version {version!r}"


def _custom(attacks: Sequence[str] | None, classes: int) -> list[str]:
    names = [] if attacks is None or isinstance(attacks, str) else list(attacks)
    if not names or len(set(names)) < len(names):
        raise _checks.refuse("attacks", repr(attacks), f"a list, each once, of {', '.join(ATTACKS)}")
    for name in names:
        least = _LEAST_CLASSES.get(_checks.one_of("attacks", name, ATTACKS), 2)
        if classes < least:
            raise _checks.refuse(
                "attacks", f"{name!r} for {classes} classes", f"at least {least} classes", "leave it out"
            )
    return names


def _fitting(wanted: Sequence[str], classes: int) -> tuple[list[str], list[str]]:
    """:return: The attacks that can run, in order, and what was changed."""
    names, changes = [], []
    for name in wanted:
        least = _LEAST_CLASSES.get(name, 2)
        if classes >= least:
            names.append(name)
        elif name == "apgd-t" and classes >= _LEAST_CLASSES["apgd-dlr"] and "apgd-dlr" not in wanted:
            names.append("apgd-dlr")
            changes.append(f"{classes} classes: apgd-t needs {least}, untargeted apgd-dlr runs in its place")
        else:
            changes.append(f"{classes} classes: {name} needs {least} and is left out")
    return names, changes


def square_needs(threat: ThreatModel, images: Tensor) -> str | None:
    """
    What Square would have of images (N, C, H, W) that they are not; ``None`` where it can run.

    Under L2 it starts from square tiles a fifth as high as the image, laid from a margin that centres five of them. Where they end
    beyond an edge it fails, after all other attacks have run; of a row of single pixels the surplus is cut off without harm.
    """
    height, width = images.shape[2:]
    tile = height // 5
    if threat.norm != "L2":
        return None
    if tile == 0:
        return "at least 5 rows, which Square needs under L2"
    margin = (height - 5 * tile) // 2
    beyond = any(margin + side // tile * tile > side for side in (height, width))
    if tile == 1 or width < tile or not beyond:
        return None
    return (
        f"sides that Square's tiles under L2, {tile} x {tile} pixels from row and column {margin} on, do not overrun; heights and widths "
        "that are multiples of 5 fit"
    )


def check_images_fit(plan: Plan, threat: ThreatModel, images: Tensor) -> None:
    """Refuse images on which Square would fail, before the attacks that run ahead of it: see :func:`square_needs`."""
    needed = square_needs(threat, images) if "square" in plan.attacks else None
    if needed is not None:
        size = f"images of {images.shape[2]} x {images.shape[3]} pixels"
        raise _checks.refuse("x", size, needed, "or name the other attacks: version='custom'")
