"""Numbers and settings as words of a command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

__all__ = ["fraction", "read_settings"]


def fraction(text: str) -> float:
    """Read a number such as ``0.3`` or ``8/255``. :return: It. :raises argparse.ArgumentTypeError: When it is neither."""
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number such as 0.3 or 8/255") from None


def read_settings(option: str, pairs: Sequence[str], *, common: Sequence[str] = ("eps", "norm")) -> dict[str, Any]:
    """
    Read ``NAME=VALUE``: JSON where it is JSON, a fraction where it is one, else a word.

    :param common: Names that have an option of their own, which all that is announced goes by; they are refused. :return: By name.
    """
    from art_saliency import _checks

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise _checks.refuse(option, repr(pair), "NAME=VALUE, such as rho=0.2")
        if name in common:
            raise _checks.refuse(option, repr(pair), f"no {name} here", f"use --{name}")
        if name in settings:
            raise _checks.refuse(option, f"{name} twice", "each name once", "leave one out")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            try:
                settings[name] = fraction(text)
            except argparse.ArgumentTypeError:
                settings[name] = text
    return settings
