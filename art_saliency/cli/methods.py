"""``art-saliency methods``: what there is to choose from, and each method's card."""

from __future__ import annotations

import argparse
import re
from typing import Any

from art_saliency.cli._common import refuse_unused

_SHORT = ("What it does", "Hyper-parameters", "Known weaknesses", "Cost")
"""The beginnings of the headings of the sections that are shown without ``--all``."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "methods",
        help="list the methods, or show the card of one",
        description="Lists the training methods, or shows what to know of one: when to use it, its parameters, its known weaknesses, what it "
        "costs, and how it stands beside its baselines.",
        epilog="Examples:\n  art-saliency methods\n  art-saliency methods aalp\n  art-saliency methods aalp --all",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="METHOD", help="whose card to show")
    parser.add_argument(
        "--all",
        action="store_true",
        help="the whole card: also how to use it in Python, what of it is the paper's, every stored run, and sources",
    )
    parser.set_defaults(run=run, default=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.evaluation.table import markdown_table
    from art_saliency.trainers.methods import TRAINERS

    if args.name is None:
        refuse_unused(args, ["all"], "without a METHOD")
        rows = [
            (name, trainer.__name__, _first_sentence(trainer), f"art-saliency methods {name}" if card(name) else "")
            for name, trainer in TRAINERS.items()
        ]
        print(markdown_table(("method", "trainer", "what it is", "card"), rows, left=4))
        return 0
    name = _checks.one_of("METHOD", args.name, TRAINERS)
    trainer = TRAINERS[name]
    page = card(name)
    if page is None:
        print(f"{name} ({trainer.__name__}) is a baseline without a card: {_first_sentence(trainer)}.")
    else:
        print(page if args.all else f"{in_short(page)}\nThe whole card: art-saliency methods {name} --all")
    return 0


def card(name: str) -> str | None:
    """:return: The method's card, Markdown; ``None`` for a baseline, which has none."""
    from importlib.resources import files

    page = files("art_saliency") / "methods" / f"{name.replace('-', '_')}.md"
    return page.read_text(encoding="utf-8") if page.is_file() else None


def in_short(page: str) -> str:
    """
    The part of a card that a choice is made by.

    :param page: The card. :return: What it does, parameters, weaknesses and cost; and of the stored runs the arms of the first table that were
        trained as they come.
    """
    first, *sections = re.split(r"^(?=##+ )", page, flags=re.MULTILINE)
    by_heading = {section.lstrip("# ").partition("\n")[0]: section for section in sections}
    shown = [section for words in _SHORT for heading, section in by_heading.items() if heading.startswith(words)]
    runs = by_heading.get("Stored runs", "")
    if table := re.search(r"^\*\*.*?\n\n(?:\|.*\n)+", runs, re.MULTILINE):
        plain = [line for line in table[0].splitlines() if not re.match(r"\| [^|]*:[^|]* \|", line)]
        shown.append("## Measured, in short\n\n" + "\n".join(plain) + "\n")
    return first + "".join(shown)


def _first_sentence(trainer: type) -> str:
    return (trainer.__doc__ or "").strip().split("\n")[0].rstrip(".")
