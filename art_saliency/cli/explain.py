"""``art-saliency explain DIR``: what a trained network looks at in single images, clean and attacked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import add_run_options, data_of_run, page_of_run, pick_device, say, threat_of_run, vacant
from art_saliency.words import fraction

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from art_saliency.data import DataSet

_MOST = 16  # images a figure: more could not be read on paper
_MAPS = "loss-gradient,logit-gradient,gradient-x-input,smoothgrad,integrated-gradients,occlusion"
_COLUMNS = {
    "consensus": "cosine",
    "top_overlap": "top-10 % IoU",
    "gini": "Gini",
    "top_mass": "top-10 % mass",
    "edge_alignment": "edges",
    "insertion": "insertion",
    "deletion": "deletion",
}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "explain",
        help="draw and measure saliency maps of single images",
        description="Draws what a run's network looks at in single test images, clean and under PGD-20, and measures the maps.",
        epilog="Examples:\n  art-saliency explain runs/digits --index 7\n  art-saliency explain runs/mnist --index 7 --index 3 "
        "--maps loss-gradient,smoothgrad --out maps.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="what `art-saliency train --out DIR` wrote")
    parser.add_argument(
        "--index", type=int, action="append", required=True, help=f"of a test image, from 0; up to {_MOST} times"
    )
    parser.add_argument("--maps", default=_MAPS, help="names, separated by commas (default: all: %(default)s)")
    parser.add_argument("--out", metavar="FILE.png", help="the figure (default: DIR/explain.png)")
    parser.add_argument("--data", help="other data than the run's own (default: the run's)")
    parser.add_argument("--data-root", help="where torchvision's sets lie")
    parser.add_argument("--eps", type=fraction, help="radius of the attack (default: the run's)")
    parser.add_argument("--norm", help="Linf or L2 (default: the run's)")
    add_run_options(parser)
    parser.set_defaults(run=run)


def _names_of_maps(text: str) -> list[str]:
    """:return: The names, each once, in the order given."""
    from art_saliency import _checks
    from art_saliency.evaluation.saliency_maps import named_maps

    return list(dict.fromkeys(_checks.one_of("--maps", word.strip(), named_maps()) for word in text.split(",")))


def _target(out: str | None, folder: str, force: bool) -> Path:
    """:return: Where the figure goes, checked before any work is done."""
    from art_saliency import _checks

    target = Path(folder) / "explain.png" if out is None else Path(out)
    if target.suffix.lower() != ".png":
        raise _checks.refuse("--out", target, "a file that ends in .png")
    return vacant("--out", target, "file", force=force)


def _chosen(data: DataSet, indices: list[int], shape: tuple[int, ...]) -> tuple[list[int], Tensor, Tensor]:
    """:return: The indices, each once, and their images in [0, 1] and labels."""
    from art_saliency import _checks
    from art_saliency.data import to_unit

    if data.input_shape != shape:
        raise _checks.refuse("--data", f"images of shape {data.input_shape}", f"{shape}, which the network takes")
    order = list(dict.fromkeys(_checks.whole("--index", i, most=len(data.x_test) - 1) for i in indices))
    if len(order) > _MOST:
        raise _checks.refuse("--index", f"{len(order)} images", f"at most {_MOST}", "draw several figures")
    return order, _checks.images(to_unit(_checks.bytes_of_pixels("x_test", data.x_test)[order])), data.y_test[order]


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.attacks import pgd
    from art_saliency.evaluation.figures_maps import maps_panel
    from art_saliency.evaluation.saliency import METRICS
    from art_saliency.evaluation.saliency_maps import named_maps
    from art_saliency.randomness import RandomSource
    from art_saliency.trainers.runs import load

    _checks.optional("matplotlib", "explain", "Drawing a figure")  # before the work, not after it
    page = page_of_run(args.folder)
    names = _names_of_maps(args.maps)
    target = _target(args.out, args.folder, args.force)
    threat = threat_of_run(args, page)
    device = pick_device(args.device)
    model = load(args.folder, device=device).model
    data = data_of_run(args, page)
    order, x, y = _chosen(data, args.index, tuple(page["network"]["input_shape"]))
    y = _checks.labels(y, len(y), page["network"]["num_classes"])
    x, y = x.to(device), y.to(device)
    say(args, f"{page['method']} on {data.name}: PGD-20, {threat.norm} eps {threat.eps:g}, {device}")
    x_adv = pgd(model, x, y, threat=threat, max_iter=20, random=RandomSource(args.seed, device))
    known, maps = named_maps(args.seed), {}
    for name in names:
        say(args, f"  {name}")
        maps[name] = (known[name](model, x, y), known[name](model, x_adv, y))
    title = f"{page['method']}: {data.name} under PGD-20, {threat.norm} eps {threat.eps:g}"
    labels = [f"image {i}" for i in order]
    maps_panel(model, x, x_adv, y, maps, target, title=title, names=labels, classes=data.class_names)
    _print_tables(model, x, y, x_adv, order, maps)
    if not args.quiet:
        print("\n".join(f"{column}: {METRICS[metric]}" for metric, column in _COLUMNS.items()) + "\n")
    print(f"Written to {target}")
    return 0


def _print_tables(
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    order: list[int],
    maps: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Print what the network says of each image, and the metrics of each map of it."""
    import math

    import torch

    from art_saliency.evaluation.saliency import map_metrics
    from art_saliency.evaluation.table import markdown_table

    def shown(value: Tensor) -> str:
        return f"{float(value):.2f}" if math.isfinite(value) else "-"

    values = {name: map_metrics(model, x, y, *pair) for name, pair in maps.items()}
    with torch.no_grad():  # in eval mode, as `load` gave it
        guesses = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    some = next(iter(values.values()))  # these two are of the image, whatever the map
    header = ("image", "true", "clean →", "PGD-20 →", "probability of true, clean", "Etmann's alignment")
    answers = [
        (i, int(y[k]), guesses[0][k], guesses[1][k], shown(some["confidence"][k]), shown(some["etmann_alignment"][k]))
        for k, i in enumerate(order)
    ]
    print(markdown_table(header, answers))
    rows = [
        (i, name, *(shown(values[name][metric][k]) for metric in _COLUMNS))
        for k, i in enumerate(order)
        for name in maps
    ]
    print("\n" + markdown_table(("image", "map", *_COLUMNS.values()), rows, left=2) + "\n")
