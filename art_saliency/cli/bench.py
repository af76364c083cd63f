"""``art-saliency bench``: what a training step costs beside what it could cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import add_run_options, pick_device, refuse_unused, vacant
from art_saliency.cli._scaling import METHODS, counts, table
from art_saliency.words import fraction

if TYPE_CHECKING:
    from art_saliency.trainers.benchmark import Benchmark

_METHODS = "standard,fgsm-rs,pgd-at,trades,mart,alp,adv-gsct,j-sigr@silu,aalp,fsr+pgd-at"

_ONLY_MEASURED = (
    "network",
    "width",
    "input_shape",
    "num_classes",
    "eps",
    "batch_size",
    "steps",
    "rounds",
    "precision",
    "out",
    "device",
    "seed",
    "force",
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "bench",
        help="measure what a training step costs beside its ideal, plain torch, and ART's own trainers",
        description="Measures the training step of every method, interleaved in one process with its ideal passes, with loops "
        "written by hand and with ART's own trainers, on random images. Prints ratios: the median over the rounds, and what two "
        "thirds of them lie between.",
        epilog="Examples:\n  art-saliency bench --methods pgd-at,adv-gsct --network resnet18 --width 16 --rounds 10\n"
        "  art-saliency bench --network resnet18 --device cuda --steps 10 --precision bf16-mixed --out bench.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods",
        default=_METHODS,
        help="comma-separated, as for compare; without pgd-at nothing can be compared with it (default: %(default)s)",
    )
    parser.add_argument("--network", default="resnet18", help="a name, as for train (default: %(default)s)")
    parser.add_argument("--width", type=int, help="channels of the first stage")
    parser.add_argument("--input-shape", default="3,32,32", help="C,H,W of the images (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--eps", type=fraction, default=8 / 255, help="radius (default: 8/255)")
    parser.add_argument("--max-iter", type=int, default=10, help="attack steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=2, help="steps of one turn; 20 for a tiny network (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns that count (default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: %(default)s)")
    parser.add_argument("--out", help="a .json file for everything that was measured")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure nothing: count the operations of a ResNet-50's step by each method, and print what training it on ImageNet would "
        "cost in GPU-hours, on paper",
    )
    add_run_options(parser)
    parser.set_defaults(run=run, default=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    import json

    from tqdm.auto import tqdm

    from art_saliency import _checks
    from art_saliency.files import write_file
    from art_saliency.trainers.arms import parse_arms
    from art_saliency.trainers.benchmark import Setting, benchmark

    _checks.whole("--max-iter", args.max_iter, least=1)
    if args.scaling:
        refuse_unused(args, _ONLY_MEASURED, "with --scaling")
        methods = METHODS if args.methods == _METHODS else args.methods
        found = counts(methods, network="torchvision:resnet50", side=64, eps=4 / 255, max_iter=args.max_iter)
        print(table(found))
        return 0
    arms = parse_arms("--methods", args.methods, options=(), common=("eps",))
    setting = Setting(
        network={
            "name": args.network,
            "num_classes": _checks.whole("--num-classes", args.num_classes, least=2),
            "input_shape": _shape(args.input_shape),
            "width": args.width,
        },
        eps=args.eps,
        max_iter=args.max_iter,
        batch_size=args.batch_size,
        steps=args.steps,
        rounds=args.rounds,
        precision=args.precision,
        device=str(pick_device(args.device)),
        seed=args.seed,
    )
    out = None if args.out is None else vacant("--out", Path(args.out), "file", force=args.force)
    with tqdm(desc="bench", unit="turn", dynamic_ncols=True, disable=args.quiet) as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = benchmark(arms, setting, progress=moved)
    if out is not None:
        write_file(out, lambda file: file.write(json.dumps(result.to_json(), indent=1).encode()))
    print(report(result))
    return 0


def report(result: Benchmark) -> str:
    """:return: One table of all methods, Markdown, and below it what its columns are."""
    from art_saliency.evaluation.table import markdown_table
    from art_saliency.trainers.benchmark import RATIOS

    columns = [name for name in RATIOS if any(name in figures.ratios for figures in result.methods.values())]
    mixed = len({figures.precision for figures in result.methods.values()}) > 1
    rows = [
        (
            name,
            *([figures.precision] if mixed else []),
            *(figures.ratios.get(column, "-") for column in columns),
            figures.images_per_second,
            "-" if figures.extra_bytes is None else f"{figures.extra_bytes / 1e6:.1f}",
        )
        for name, figures in result.methods.items()
    ]
    header = ("method", *(["precision"] if mixed else []), *columns, "images/s", "extra MB")
    setting, network = result.setting, result.setting.network
    shape = " x ".join(map(str, network["input_shape"]))
    width = f" of width {network['width']}" if network.get("width") is not None else ""
    note = (
        f"{network['name']}{width}, images {shape}, batch {setting.batch_size}, PGD-{setting.max_iter}, {setting.rounds} rounds of "
        f"{setting.steps} steps, seed {setting.seed}, {result.meta['chip']}, {setting.device}, {next(iter(result.methods.values())).precision if not mixed else 'mixed precision'}, {result.meta['threads']} threads, "
        f"torch {result.meta['versions']['torch']}. Each figure: the median over the rounds (16th to 84th percentile)."
    )
    meanings = [f"{column}: {RATIOS[column]}" for column in columns]
    meanings.append(
        "extra MB: peak memory of our trainer beyond that of the ideal (network, optimizer, batch, activations)"
    )
    return "\n".join([markdown_table(header, rows, left=1 + mixed), "", note, *meanings])


def _shape(text: str) -> list[int]:
    from art_saliency import _checks

    words = text.split(",")
    if len(words) != 3 or not all(word.strip().isdigit() for word in words):
        raise _checks.refuse("--input-shape", repr(text), "C,H,W", "write 3,32,32")
    return [int(word) for word in words]
