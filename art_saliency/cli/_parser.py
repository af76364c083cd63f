"""The parser of a command's words: an option that does not exist is named, with those that come near it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """
    Takes options by their whole names only, as an abbreviation would come to mean another option with the next one that is added.

    :ivar elsewhere: Of the words given: what is said in another way than by an option of its own, as ``{"--max-iter": "--set max_iter=..."}``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.elsewhere: Callable[[Sequence[str]], Mapping[str, str]] = lambda words: {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """:return: What the words say, and nothing that is left over: that ends the process with 2, before argparse looks what is missing."""
        words = list(takewhile(lambda word: word != "--", args or ()))
        if not {"-h", "--help"} & set(words):
            for word in words:
                name = word.partition("=")[0]
                if name.startswith("--") and " " not in word and name not in self._option_string_actions:
                    self._refuse(name, words)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest[0], words)
        return found, rest

    def _refuse(self, word: str, words: Sequence[str]) -> NoReturn:
        wrong, near = "no such option" if word.startswith("-") else "one word too many", ""
        if word.startswith("--"):
            known = {**{name: name for name in self._option_string_actions}, **self.elsewhere(words)}
            bare = {name.lstrip("-"): shown for name, shown in known.items()}
            close = [bare[name] for name in difflib.get_close_matches(word[2:].replace("_", "-"), bare)]
            near = f"; did you mean {' or '.join(close)}?" if close else ""
        self.exit(2, f"{self.prog}: error: {word}: {wrong}{near} ({self.prog} --help shows them all)\n")
