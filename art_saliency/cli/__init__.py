"""The command line: one file a command. Heavy imports happen when a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from art_saliency._version import __version__
from art_saliency.cli import bench, compare, evaluate, explain, export, methods, quickstart, train, verify
from art_saliency.cli._common import check_seed
from art_saliency.cli._parser import CommandParser
from art_saliency.errors import ArtSaliencyError, TrainingInterrupted

__all__ = ["main", "make_parser"]

_COMMANDS = (quickstart, train, evaluate, explain, compare, methods, export, verify, bench)


def make_parser() -> argparse.ArgumentParser:
    """:return: The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="art-saliency",
        description="Train classifiers with saliency- and feature-based adversarial defences, and learn the truth about them.",
        epilog="Start here:\n  art-saliency quickstart\n\nThen:\n  art-saliency train adv-gsct --data mnist.npz --eps 0.2 --out "
        "runs/mnist\n  art-saliency evaluate runs/mnist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(own_code=True)
    parser.add_argument("--version", action="version", version=f"art-saliency {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: The words after ``art-saliency``; ``None`` takes the process's own.
    :return: 0, 2 for an error that was explained, 130 when interrupted, 141 when nobody reads what is printed any more, 143 when a
        training was terminated and kept.
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)
    except OSError as error:  # what is printed cannot be
        broken, nowhere = isinstance(error, BrokenPipeError), os.open(os.devnull, os.O_WRONLY)
        if not broken:
            print(f"art-saliency: error: standard output: {error.strerror}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):  # else Python would complain when it flushes them at its end
            os.dup2(nowhere, stream.fileno())
        return 141 if broken else 2


def _run(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else list(argv)
    if args.own_code and os.getcwd() not in sys.path:
        # Where the user's own package.module:factory lies; last, so that it shadows nothing.
        sys.path.append(os.getcwd())
    try:
        if "seed" in args:
            check_seed(args.seed)
        return int(args.run(args))
    except TrainingInterrupted as error:
        print(f"art-saliency {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except ArtSaliencyError as error:
        print(f"art-saliency {args.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # of the system: a disk that is full, a file that may not be read
        if error.filename is None:
            print(end="", flush=True)  # where it is what is printed that cannot be, that is said by `main`
        what = " ".join((error.strerror or str(error)).split())
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"art-saliency {args.command}: error: {where}{what}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        words = str(error).strip().partition("\n")[0]
        if not isinstance(error, MemoryError) and not re.search("(allocate|out of|not enough) memory", words):
            raise
        remedy = "fewer images, or a smaller --batch-size, --width or --size, take less"
        print(f"art-saliency {args.command}: error: out of memory ({words}); {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"art-saliency {args.command}: interrupted", file=sys.stderr)
        return 130
