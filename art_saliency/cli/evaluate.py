"""``art-saliency evaluate DIR``: how robust a trained network really is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, fraction, pick_device, say


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a trained network with the real AutoAttack",
        description="Evaluates a run's network on its test images: clean accuracy, PGD-20 and AutoAttack, with 95 % intervals.",
        epilog="Examples:\n  art-saliency evaluate runs/digits\n  art-saliency evaluate runs/mnist --eps 0.2 --images 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="what `art-saliency train --out DIR` wrote")
    parser.add_argument("--data", help="other data than the run's own (default: the run's)")
    parser.add_argument("--data-root", help="where torchvision's sets lie")
    parser.add_argument("--eps", type=fraction, help="radius (default: the run's)")
    parser.add_argument("--norm", help="Linf or L2 (default: the run's)")
    parser.add_argument("--images", type=int, help="how many test images, the first ones (default: all)")
    parser.add_argument(
        "--version", default="standard", help="of AutoAttack: standard, plus or rand (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=250, help="images at once (default: %(default)s)")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.data import load_data
    from art_saliency.evaluation.summary import summarise
    from art_saliency.evaluation.table import markdown_table, percent
    from art_saliency.files import write_file
    from art_saliency.threat import ThreatModel
    from art_saliency.trainers.runs import load, read_run

    page = read_run(args.folder)
    eps = page["settings"].get("eps") if args.eps is None else args.eps
    if eps is None:
        raise _checks.refuse("--eps", "nothing", "a radius", "the run was trained without one: add --eps 8/255, say")
    threat = ThreatModel(args.norm or page["settings"].get("norm", "Linf"), eps)
    target = Path(args.folder) / "evaluation.json"
    if target.exists() and not args.force:
        raise _checks.refuse("DIR", f"{target}, which is there already", "a run without an evaluation", "add --force")
    device = pick_device(args.device)
    classifier = load(args.folder, device=device)
    known = page["data"]
    data = load_data(args.data or known["spec"], root=args.data_root or known.get("root"), size=known.get("size"))
    if args.data is None and data.fingerprint() != known["fingerprint"]:
        raise _checks.refuse(
            "data",
            f"{known['spec']} with other content than in training",
            "the same",
            "say so on purpose: --data " + known["spec"],
        )
    count = (
        len(data.x_test)
        if args.images is None
        else _checks.whole("--images", args.images, least=1, most=len(data.x_test))
    )
    say(args, f"{page['method']} on {data.name}: {count} test images, {threat.norm} eps {threat.eps:g}, {device}")
    summary = summarise(
        classifier.model,
        data.x_test[:count],
        data.y_test[:count],
        threat=threat,
        version=args.version,
        batch_size=_checks.whole("--batch-size", args.batch_size, least=1),
        seed=args.seed,
        progress=not args.quiet,
    )
    result = {"run": page["method"], "data": data.name, **summary.to_json()}
    write_file(target, lambda file: file.write(json.dumps(result, indent=1).encode()))
    rows = [
        (
            name,
            percent(result[key]["accuracy"]),
            "{:.1f}-{:.1f}".format(*(100 * end for end in result[key]["interval_95"])),
        )
        for name, key in (("clean", "clean"), ("PGD-20", "pgd20"), (f"AutoAttack ({args.version})", "autoattack"))
    ]
    print(markdown_table((f"{page['method']}, {count} images", "accuracy %", "95 % interval"), rows))
    for warning in [*summary.autoattack.deviations, *summary.autoattack.warnings]:
        print(f"AutoAttack: {warning}")
    print(f"Written to {target}")
    return 0
