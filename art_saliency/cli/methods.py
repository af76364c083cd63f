"""``art-saliency methods``: what there is to choose from, and each method's card."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "methods",
        help="list the methods, or show the card of one",
        description="Lists the training methods, or shows one's card: when to use it, how, what it costs, and its known weaknesses.",
        epilog="Examples:\n  art-saliency methods\n  art-saliency methods aalp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="METHOD", help="whose card to show")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.evaluation.table import markdown_table
    from art_saliency.trainers.methods import TRAINERS

    if args.name is None:
        rows = [
            (name, trainer.__name__, _first_sentence(trainer), f"art-saliency methods {name}" if card(name) else "")
            for name, trainer in TRAINERS.items()
        ]
        print(markdown_table(("method", "trainer", "what it is", "card"), rows, left=4))
        return 0
    name = _checks.one_of("METHOD", args.name, TRAINERS)
    trainer = TRAINERS[name]
    print(card(name) or f"{name} ({trainer.__name__}) is a baseline without a card: {_first_sentence(trainer)}.")
    return 0


def card(name: str) -> str | None:
    """:return: The method's card, Markdown; ``None`` for a baseline, which has none."""
    from importlib.resources import files

    page = files("art_saliency") / "methods" / f"{name.replace('-', '_')}.md"
    return page.read_text(encoding="utf-8") if page.is_file() else None


def _first_sentence(trainer: type) -> str:
    return (trainer.__doc__ or "").strip().split("\n")[0].rstrip(".")
