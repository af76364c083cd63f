"""``art-saliency export DIR``: a bundle for a submission to RobustBench."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, say
from art_saliency.words import fraction, read_settings

_QUESTIONS = {
    "paper_title": "Title of the paper",
    "paper_url": "Where all can read it (an address)",
    "authors": "Its authors, with commas",
    "venue": "Its venue ('ICML 2026', 'arXiv, Jan 2026')",
    "additional_data": "Was other data than the set's used in training? (yes/no)",
    "license": "License of the weights",
    "code_url": "Address of the training code",
}
"""What only a human knows. Asked for on a terminal; an empty answer leaves it open."""


def _address(said: str) -> str | None:
    from art_saliency.robustbench.model_info import is_address

    return said if is_address(said) else None


_YES_NO = {"yes": "yes", "y": "yes", "no": "no", "n": "no"}
_ANSWERS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "additional_data": ("yes or no", lambda said: _YES_NO.get(said.lower())),
    "paper_url": ("a web address, with nothing left out", _address),
    "code_url": ("a web address, with nothing left out", _address),
}
"""The questions that take certain answers only: which, and what an answer stands for; ``None`` when it is none of them."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "export",
        help="write a bundle for RobustBench",
        description="Takes the network out of a run, checks RobustBench's rules, and proves in a fresh process that RobustBench's own "
        "code loads what is written.",
        epilog="Examples:\n  art-saliency evaluate runs/c10 --batch-size 32\n  art-saliency export runs/c10 --name Doe2026Saliency "
        "--dataset cifar10 --threat-model Linf --authors 'Jane Doe, John Roe'\n\nWhat only you know may be said later: what is left open is "
        "listed, and asked for on a terminal.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="what `art-saliency train --out DIR` wrote")
    parser.add_argument("--name", required=True, help="AuthorYEARFirstwordoftitle, such as Doe2026Saliency")
    parser.add_argument("--out", help="the bundle's folder (default: the name, in this folder)")
    parser.add_argument("--dataset", default="cifar10", help="cifar10, cifar100 or imagenet (default: %(default)s)")
    parser.add_argument("--threat-model", default="Linf", help="Linf, L2 or corruptions (default: %(default)s)")
    parser.add_argument("--eps", type=fraction, help="radius in units of [0, 1] (default: the leaderboard's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--evaluation",
        action="append",
        metavar="FILE",
        help="evaluation.json of these weights; more of them, with other seeds, tell the spread (default: the one in DIR, when "
        "it is for this threat model and radius)",
    )
    which.add_argument("--no-evaluation", action="store_true", help="leave the accuracies open")
    parser.add_argument("--source", metavar="FILE:FACTORY", help="the network's code, when it is not this package's")
    parser.add_argument("--architecture", help="what the leaderboard shows (default: what is known)")
    parser.add_argument(
        "--preprocessing", help="for ImageNet, what RobustBench does to the pictures: Res256Crop224, say"
    )
    human = parser.add_argument_group("what only you know")
    human.add_argument("--paper-title")
    human.add_argument("--paper-url", help="RobustBench requires a public paper")
    human.add_argument("--authors", help="with commas")
    human.add_argument("--venue", help="such as 'ICML 2026' or 'arXiv, Jan 2026'")
    human.add_argument("--reported", type=float, help="the robust accuracy that the paper reports, in percent")
    human.add_argument("--additional-data", choices=("yes", "no"), help="whether other data than the set's was used")
    human.add_argument(
        "--number-forward-passes", type=int, default=1, help="of one classification (default: %(default)s)"
    )
    human.add_argument("--footnote", help="for the leaderboard")
    human.add_argument("--license", help="of the weights")
    human.add_argument("--code-url", help="of the training code")
    human.add_argument("--checkpoint-url", help="where the weights can be fetched")
    human.add_argument(
        "--gdrive-id", help="of the weights on Google Drive; once they are there, export again with --force"
    )
    human.add_argument(
        "--corruptions",
        action="append",
        metavar="FIELD=PERCENT",
        help="for the threat model corruptions: clean_acc=93.1 corruptions_acc=85.2, say, one at a time",
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.robustbench.export import export_robustbench
    from art_saliency.trainers.runs import load

    in_percent = args.reported
    reported = None if in_percent is None else _checks.real("--reported", in_percent, least=0, most=100) / 100
    classifier = load(args.folder)
    evaluation = args.evaluation or (None if args.no_evaluation else _own_evaluation(args))
    human = _asked({name: getattr(args, name) for name in _QUESTIONS}, quiet=args.quiet)
    answer = human.pop("additional_data")
    target = export_robustbench(
        classifier,
        args.name,
        out=args.out or args.name,
        dataset=args.dataset,
        threat_model=args.threat_model,
        eps=args.eps,
        evaluation=evaluation,
        source=args.source,
        architecture=args.architecture,
        preprocessing=args.preprocessing,
        reported=reported,
        additional_data=None if answer is None else answer == "yes",
        number_forward_passes=args.number_forward_passes,
        footnote=args.footnote,
        checkpoint_url=args.checkpoint_url,
        gdrive_id=args.gdrive_id,
        corruptions=_shares(args.corruptions),
        force=args.force,
        **human,
    )
    print(f"{target}: RobustBench's load_model loads it, with the same logits. Read {target / 'SUBMISSION.md'}")
    if missing := _missing(target):
        print(f"Still to be filled in, by exporting again with --force: {missing}")
    if (size := _batch_size(target)) not in (None, 32):
        print(
            f"Evaluated with batch size {size}: RobustBench's is 32, with which its benchmark would return the same number"
        )
    print(f"Next: art-saliency verify {target}")
    return 0


def _own_evaluation(args: argparse.Namespace) -> list[str] | None:
    """:return: The run's ``evaluation.json``, when it is for what is exported; None, and why on the error stream, when not."""
    from art_saliency.robustbench.evidence import is_under, read_evidence
    from art_saliency.robustbench.export import threat_of
    from art_saliency.robustbench.model_info import board, eps_text

    threat = threat_of(args.threat_model, args.eps, board(args.dataset, args.threat_model))
    own = Path(args.folder) / "evaluation.json"
    if threat is None:
        return None
    if not own.is_file():
        say(args, f"{args.folder} has no evaluation.json: accuracies stay null (art-saliency evaluate {args.folder})")
        return None
    if is_under(record := read_evidence(own).record, threat):
        return [str(own)]
    got, wanted = f"{record['norm']} eps {eps_text(record['eps'])}", f"{threat.norm} eps {eps_text(threat.eps)}"
    again = f"art-saliency evaluate {args.folder} --norm {threat.norm} --eps {eps_text(threat.eps)}"
    say(args, f"{own} is for {got}, not {wanted}: accuracies stay null ({again})")
    return None


def _shares(pairs: list[str] | None) -> dict[str, float] | None:
    """:return: What ``--corruptions`` says in percent, by field, 0 to 1."""
    from art_saliency import _checks

    if pairs is None:
        return None
    given = read_settings("--corruptions", pairs)
    return {name: _checks.real(f"--corruptions {name}", value) / 100 for name, value in given.items()}


def _batch_size(bundle: Path) -> int | None:
    """:return: That of the evaluation that is stated."""
    path = bundle / "evaluation.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["stated"]["batch_size"]) if path.is_file() else None


def _missing(bundle: Path) -> str:
    """:return: The options by which is said what the bundle leaves open."""
    from art_saliency.robustbench.bundle import Layout
    from art_saliency.robustbench.model_info import as_options, unfilled

    page = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    layout = Layout(bundle, page["name"], page["dataset"], page["threat_model"])
    return as_options(unfilled(json.loads(layout.model_info.read_text(encoding="utf-8")), page["publication"]))


def _asked(known: dict[str, str | None], *, quiet: bool) -> dict[str, str | None]:
    """:return: What was given, and on a terminal what was answered; an empty answer, or none, is None."""
    if quiet or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return known
    found = dict(known)
    for name, question in _QUESTIONS.items():
        if known[name] is None:
            found[name] = _answer(question, _ANSWERS.get(name))
    return found


def _answer(question: str, takes: tuple[str, Callable[[str], str | None]] | None) -> str | None:
    """Ask until the answer is one that is taken, where only these will do. :return: It; None when it is empty."""
    expected, read = takes or ("", str)
    while True:
        print(f"{question} [leave open]: ", end="", file=sys.stderr, flush=True)
        said = sys.stdin.readline().strip()
        if not said or (answer := read(said)) is not None:
            return answer if said else None
        print(f"got {said!r}, expected {expected}", file=sys.stderr)
