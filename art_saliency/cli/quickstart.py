"""``art-saliency quickstart``: three networks, the truth about each, in three minutes on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, pick_device, say, vacant
from art_saliency.words import fraction

_METHODS = ("standard", "pgd-at", "adv-gsct")


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "quickstart",
        help="train three networks on handwritten digits and learn how robust each one is",
        description="Trains a standard network, one by PGD adversarial training and one by Adv-GSCT on scikit-learn's "
        "handwritten digits (real data, no download), and evaluates all three with the real AutoAttack on the whole test split.",
        epilog="Examples:\n  art-saliency quickstart\n  art-saliency quickstart --out demo --eps 0.15 --epochs 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="quickstart", help="folder for checkpoints, figures, table (default: %(default)s)"
    )
    parser.add_argument(
        "--eps", type=fraction, default=0.2, help="Linf radius (default: %(default)s of the pixel range)"
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (default: %(default)s)")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.cli._arms import run_arm
    from art_saliency.cli._results import finish
    from art_saliency.data import load_data
    from art_saliency.threat import ThreatModel
    from art_saliency.trainers.arms import Budget, parse_arm

    _checks.real("--eps", args.eps, above=0, most=1)
    _checks.whole("--epochs", args.epochs, least=1)
    device = pick_device(args.device)
    out = vacant("--out", Path(args.out), "folder", force=args.force)
    data = load_data("digits")
    budget = Budget(
        data=data,
        spec={"spec": "digits"},
        network={
            "name": "small-cnn",
            "num_classes": data.num_classes,
            "input_shape": list(data.input_shape),
            "width": 24,
        },
        threat=ThreatModel("Linf", args.eps),
        epochs=args.epochs,
        batch_size=128,
        lr=0.01,
        images=len(data.x_test),
        seed=args.seed,
        device=device,
        quiet=args.quiet,
    )
    say(
        args,
        f"digits: {len(data.x_train)} training and {len(data.x_test)} test images of 8x8; Linf eps {args.eps:g}; {device}",
    )
    finish({method: run_arm(parse_arm(method), budget, out) for method in _METHODS}, budget, out)
    print(f"Checkpoints and pictures: {out}/METHOD/weights.pt and {out}/METHOD/saliency.png")
    print(
        "Next: train your own, `art-saliency train adv-gsct --data YOUR.npz --eps 8/255 --out runs/mine`, then "
        "`art-saliency evaluate runs/mine`."
    )
    return 0
