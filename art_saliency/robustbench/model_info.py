"""RobustBench's ``model_info`` JSON: its fields, its conventions, and the boards that it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from art_saliency import _checks

__all__ = [
    "BOARDS",
    "PREPROCESSINGS",
    "Board",
    "as_options",
    "board",
    "eps_text",
    "is_address",
    "known_fields",
    "percent_text",
    "prepared_board",
    "problems",
    "unfilled",
]


@dataclass(frozen=True)
class Board:
    """
    A data set as RobustBench knows it.

    :ivar num_classes: K. :ivar input_shape: (C, H, W), before any preprocessing of its own. :ivar images: Of the full evaluation.
    :ivar eps: The radius of its leaderboard, by threat model; ``None`` for corruptions, which have none.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    images: int
    eps: Mapping[str, float | None]


BOARDS = {
    "cifar10": Board(10, (3, 32, 32), 10_000, {"Linf": 8 / 255, "L2": 0.5, "corruptions": None}),
    "cifar100": Board(100, (3, 32, 32), 10_000, {"Linf": 8 / 255, "corruptions": None}),
    "imagenet": Board(1000, (3, 224, 224), 5_000, {"Linf": 4 / 255, "corruptions": None}),
}
"""RobustBench's leaderboards."""


PREPROCESSINGS = {"Res256Crop224": 224, "Crop288": 288, "Res224": 224, "BicubicRes256Crop224": 224}
"""What RobustBench can do to an ImageNet picture before a network sees it, by its own names; and the pixels a side of what it sees."""


def board(dataset: str, threat_model: str) -> Board:
    """:return: The board. :raises InputError: When RobustBench has no such data set or threat model."""
    found = BOARDS[_checks.one_of("dataset", dataset, BOARDS)]
    _checks.one_of("threat_model", threat_model, found.eps)
    return found


def prepared_board(dataset: str, threat_model: str, preprocessing: str | None) -> Board:
    """
    A board as a network meets it.

    :param preprocessing: For ImageNet one of :data:`PREPROCESSINGS`, by which images get their size; else ``None``.
    :raises InputError: When RobustBench has no such data set, threat model or preprocessing.
    """
    found = board(dataset, threat_model)
    if dataset == "imagenet":
        side = PREPROCESSINGS[_checks.one_of("preprocessing", preprocessing, PREPROCESSINGS)]
        return replace(found, input_shape=(3, side, side))
    if preprocessing is not None:
        raise _checks.refuse("preprocessing", repr(preprocessing), f"None for {dataset}", "it is for ImageNet")
    return found


def eps_text(eps: float) -> str:
    """
    A radius as RobustBench writes it.

    :param eps: In units of [0, 1].
    :return: ``"0.5"`` where that is short and exact, else ``"8/255"`` where it is one, else all its digits.
    """
    if float(short := f"{eps:g}") == eps and len(short) <= 5:
        return short
    levels = eps * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else repr(eps)


def percent_text(share: float) -> str:
    """:param share: 0 to 1. :return: In percent, ``"52.48"``."""
    return f"{100 * share:.2f}"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"\w", value))


def _percent(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\d{1,3}(\.\d{1,2})?", value)) and float(value) <= 100


def _error(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\d{1,3}(\.\d{1,2})?", value))


def _radius(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d+/255|\d+(\.\d+)?", value):
        return False
    above, _, below = value.partition("/")
    return float(above) / float(below or 1) > 0


def is_address(value: Any) -> bool:
    """:return: Whether it is a web address, and not one with something left out, such as ``https://arxiv.org/abs/...``."""
    if not isinstance(value, str) or re.search(r"\.\.\.|…|[<>{}]|x{4}", value, re.IGNORECASE):
        return False
    return bool(re.fullmatch(r"https?://[^\s/]+\.[^\s/]+(/\S*)?", value))


_Kind = tuple[str, Callable[[Any], bool]]
_LINK: _Kind = ("a web address, with nothing left out", is_address)
_TEXT: _Kind = ("text", _text)
_FLAG: _Kind = ("true or false", lambda value: isinstance(value, bool))
_COUNT: _Kind = ("a whole number from 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1)
_PERCENT: _Kind = ('a percentage as text, "52.48"', _percent)
_ERROR: _Kind = ('a percentage as text, "52.48", which may exceed 100', _error)

_HUMAN = ("link", "name", "authors", "additional_data", "venue")
"""What a human knows: the paper's address, title, authors and venue; and whether other data than the set's was used."""

_PUBLICATION = ("code_url", "license", "checkpoint_url", "gdrive_id")
"""And what RobustBench asks for beside the page."""

_ALWAYS: dict[str, _Kind] = {
    "link": _LINK,
    "name": _TEXT,
    "authors": _TEXT,
    "additional_data": _FLAG,
    "number_forward_passes": _COUNT,
    "dataset": _TEXT,
    "venue": _TEXT,
    "architecture": _TEXT,
    "eps": ('a radius as text, "8/255" or "0.5"', _radius),
    "clean_acc": _PERCENT,
    "reported": _PERCENT,
}

_MAY_BE_NULL = {*_HUMAN, "architecture", "clean_acc", "reported", "autoattack_acc", "corruptions_acc"}
_MAY_BE_NULL |= {"corruptions_mce", "corruptions_acc_3d", "corruptions_mce_3d"}


def known_fields(dataset: str, threat_model: str) -> tuple[dict[str, _Kind], dict[str, _Kind]]:
    """:return: The fields that every page of a board has, and those that one may have, each with what it holds."""
    if threat_model != "corruptions":
        needed = {**_ALWAYS, "autoattack_acc": _PERCENT}
        return needed, {"external": _PERCENT, "unreliable": _FLAG, "footnote": _TEXT}
    needed = {**_ALWAYS, "eps": ("null", lambda value: value is None), "corruptions_acc": _PERCENT}
    # A mean corruption error is in units of AlexNet's, and may be above it.
    more = {"corruptions_mce": _ERROR, "corruptions_acc_3d": _PERCENT, "corruptions_mce_3d": _ERROR}
    return needed | (more if dataset == "imagenet" else {}), {"footnote": _TEXT}


def problems(page: Any, dataset: str, threat_model: str) -> list[str]:
    """
    What is wrong with a page, everything at once. What is not known yet may be null: :func:`unfilled` names it.

    :param page: The JSON, read.
    """
    if not isinstance(page, dict):
        return [f"is a {type(page).__name__}, expected an object"]
    needed, optional = known_fields(dataset, threat_model)
    found = [f"lacks {field!r}" for field in needed if field not in page]
    for field, value in page.items():
        words, fits = {**needed, **optional}.get(field, ("", None))
        if fits is None:
            found.append(f"has an unknown field {field!r}{_checks.suggestion(field, [*needed, *optional])}")
        elif not (value is None and field in _MAY_BE_NULL) and not fits(value):
            found.append(f"has {field!r}: {value!r}, expected {words}")
    if page.get("dataset") not in (dataset, None):
        found.append(f"has 'dataset': {page['dataset']!r}, expected {dataset!r}")
    clean, robust = page.get("clean_acc", ""), page.get("autoattack_acc", "")
    if _percent(clean) and _percent(robust) and float(robust) > float(clean):
        found.append(f"has a robust accuracy of {robust}, above the clean {clean}")
    return found


def unfilled(page: Mapping[str, Any], human: Mapping[str, Any]) -> list[str]:
    """
    What has still to be said before a submission is made: the one list of it, for whoever shows one.

    :param page: The ``model_info`` page. :param human: What else is asked for, as ``bundle.json`` has it under ``publication``.
    :return: Arguments of :func:`~art_saliency.robustbench.export.export_robustbench`.
    """
    measured = "corruptions" if "corruptions_acc" in page else "evaluation"
    said_by = {"link": "paper_url", "name": "paper_title"}
    said_by |= {
        field: measured for field in page if field == "clean_acc" or field.startswith(("autoattack_", "corruptions_"))
    }
    null = [said_by.get(field, field) for field in page if page[field] is None and field in _MAY_BE_NULL]
    return list(dict.fromkeys([*null, *(name for name in _PUBLICATION if not human.get(name))]))


def as_options(names: Iterable[str]) -> str:
    """:return: Arguments of ``export_robustbench`` as the command line has them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
