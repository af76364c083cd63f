"""``art-saliency compare``: methods, baselines and compositions under one budget, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, check_attackable, pick_device, say, vacant, writable
from art_saliency.cli._train_options import GREATEST
from art_saliency.words import fraction

_ARMS = (
    "standard,fgsm-rs,pgd-at,trades,mart,alp,adv-gsct,j-sigr@silu,aalp,"
    "fsr+pgd-at,fsr+trades,fsr+mart,fsr+alp,fsr+aalp,fsr+j-sigr@silu,fsr+adv-gsct"
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "compare",
        help="train several methods under one budget and put them into one table",
        description="Trains methods, baselines and FSR compositions with the same network, data, epochs, optimizer and seed, and "
        "evaluates each with AutoAttack.",
        epilog="Examples:\n  art-saliency compare --data digits --out runs/compare\n"
        "  art-saliency compare --data mnist.npz --eps 0.3 --arms pgd-at,adv-gsct,fsr+trades --images 500 --out runs/mnist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for the runs and the table")
    parser.add_argument(
        "--arms",
        default=_ARMS,
        help="methods, comma-separated; fsr+BASE puts FSR on BASE, METHOD:NAME=VALUE sets a parameter or ema, swa_from, awp, "
        "label_smoothing, grad_clip, precision; METHOD@silu gives the "
        "network another activation, which J-SIGR needs (default: %(default)s)",
    )
    parser.add_argument("--data", default="digits", help="as for train (default: %(default)s)")
    parser.add_argument("--data-root", help="where torchvision's sets lie")
    parser.add_argument("--size", type=int, help="side of the images that a folder of pictures is brought to")
    parser.add_argument("--network", help="a name (default: by the image size)")
    parser.add_argument("--activation", default="relu", help="as for train (default: %(default)s)")
    parser.add_argument("--width", type=int, help="channels of the first stage")
    parser.add_argument("--eps", type=fraction, default=0.2, help="radius (default: %(default)s)")
    parser.add_argument("--norm", default="Linf", help="Linf or L2 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="Adam's highest learning rate (default: %(default)s)")
    parser.add_argument("--images", type=int, help="test images to evaluate on, the first ones (default: all)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the comparison in --out, if there is one: arms that are over stay, one in progress goes on; more may be added",
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.cli._arms import run_arm
    from art_saliency.cli._results import begin, finish, go_on, has_begun, keep
    from art_saliency.cli.train import spec_of
    from art_saliency.data import load_data
    from art_saliency.networks import default_network
    from art_saliency.threat import ThreatModel
    from art_saliency.trainers.arms import Budget, parse_arms, try_arms

    arms = parse_arms("--arms", args.arms)
    threat = ThreatModel(args.norm, _checks.real("--eps", args.eps, above=0))
    _checks.whole("--epochs", args.epochs, least=1)
    _checks.whole("--batch-size", args.batch_size, least=1)
    _checks.real("--lr", args.lr, above=0, most=GREATEST)
    device = pick_device(args.device)
    data = load_data(args.data, root=args.data_root, size=args.size)
    check_attackable(threat, data.x_test)
    count = len(data.x_test)
    images = count if args.images is None else _checks.whole("--images", args.images, least=1, most=count)
    out = Path(args.out)
    resumed = args.resume and has_begun(out)
    if resumed:
        writable("--out", out)
    else:
        vacant("--out", out, "folder", force=args.force)
    budget = Budget(
        data=data,
        spec={"spec": spec_of(args.data), "root": args.data_root, "size": args.size},
        network={
            "name": args.network or default_network(data.input_shape),
            "num_classes": data.num_classes,
            "input_shape": list(data.input_shape),
            "activation": args.activation,
            "width": args.width,
        },
        threat=threat,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        images=images,
        seed=args.seed,
        device=device,
        quiet=args.quiet,
    )
    say(args, "a step of every arm, to see that all can be trained")
    results = go_on(budget, arms, out) if resumed else {}
    try_arms([arm for arm in arms if arm.name not in results], budget)
    if not resumed:
        begin(budget, arms, out)
    for number, arm in enumerate(arms, 1):
        say(args, f"[{number}/{len(arms)}] {arm.name}" + (": measured" if arm.name in results else ""))
        if arm.name not in results:
            results[arm.name] = run_arm(arm, budget, out, resume="auto" if resumed else "never")
            keep(results, out)
    finish(results, budget, out)
    return 0
