"""``art-saliency verify BUNDLE``: is a bundle for RobustBench what it says?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, pick_device, refuse_unused, say
from art_saliency.errors import InputError


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify",
        help="check a bundle for RobustBench",
        description="Checks sums, tensors, keys, JSON and the syntax of a bundle. Nothing in it is executed without --trust.",
        epilog="Examples:\n  art-saliency verify Doe2026Saliency\n  art-saliency verify Doe2026Saliency --trust --benchmark --images "
        "cifar10.npz\n\nRun it from outside a bundle that you do not trust, best as `art-saliency`: `python -m art_saliency` makes "
        "Python itself\nlook for modules in the working directory, before this command can refuse to.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="what `art-saliency export` wrote")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let RobustBench load it, which runs the bundle's own code with your rights",
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="run RobustBench's benchmark and compare its number; needs --trust"
    )
    parser.add_argument(
        "--images",
        help="with --benchmark: .npz with the test images in RobustBench's order (default: it downloads them)",
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        help="with --benchmark: where RobustBench keeps its data sets (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    add_run_options(parser)
    parser.set_defaults(run=run, own_code=False, default=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0, or 1 when something is wrong with the bundle."""
    _keep_out(Path(args.bundle))  # before torch and all that it imports are looked for
    from art_saliency.robustbench.model_info import as_options
    from art_saliency.robustbench.verify import verify_bundle

    refuse_unused(
        args, ["seed", "force"], "here, where nothing is written and the seed is the evaluation's that is stated"
    )
    if not args.benchmark:
        refuse_unused(args, ["images", "data_dir", "device"], "without --benchmark")
    elif args.trust:  # else it is refused
        say(args, "RobustBench's benchmark takes as long as the evaluation did")
    found = verify_bundle(
        args.bundle,
        trust=args.trust,
        benchmark=args.benchmark,
        images=args.images,
        data_dir=args.data_dir,
        device=str(pick_device(args.device)) if args.benchmark else "cpu",
    )
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
        return 0 if found.ok else 1
    print(f"{found.bundle}: {'good, as far as it was checked' if found.ok else 'NOT GOOD'}")
    for title, lines in (("checked", found.checked), ("not checked", found.unchecked)):
        for line in lines:
            print(f"  {title}: {line}")
    if found.benchmark is not None:
        numbers = found.benchmark
        print(
            f"  RobustBench's benchmark on {numbers['count']} images, seed {numbers['seed']}: clean "
            f"{numbers['clean_accuracy']:.2%} (stated {numbers['stated_clean_accuracy']:.2%}), robust "
            f"{numbers['robust_accuracy']:.2%} (stated {numbers['stated_robust_accuracy']:.2%})"
        )
    if found.unfilled:
        print(f"  still to be filled in, by exporting again with --force: {as_options(found.unfilled)}")
    for problem in found.problems:
        print(f"  wrong: {problem}", file=sys.stderr)
    return 0 if found.ok else 1


def _keep_out(bundle: Path) -> None:
    """:raises InputError: When Python looks for modules inside the bundle: any import could run its code."""
    place = bundle.resolve()
    for entry in sys.path:
        if Path(entry or ".").resolve().is_relative_to(place):
            raise InputError(
                f"bundle: got {bundle}, from which Python takes modules ({entry or 'the working directory'} is on sys.path), "
                f"expected one whose code cannot be imported; verify it from another folder"
            )
