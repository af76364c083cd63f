"""``art-saliency quickstart``: three networks, the truth about each, in three minutes on a CPU."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from art_saliency.cli._common import add_run_options, fraction, pick_device, say

_METHODS = ("standard", "pgd-at", "adv-gsct")
_PICTURES = 8


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "quickstart",
        help="train three networks on handwritten digits and learn how robust each one is",
        description="Trains a standard network, one by PGD adversarial training and one by Adv-GSCT on scikit-learn's handwritten "
        "digits (real data, no download), and evaluates all three with the real AutoAttack on the whole test split.",
        epilog="Examples:\n  art-saliency quickstart\n  art-saliency quickstart --out demo --eps 0.15 --epochs 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="quickstart", help="folder for checkpoints, figures and the table (default: %(default)s)")
    parser.add_argument("--eps", type=fraction, default=0.2, help="Linf radius of the threat model (default: %(default)s of the pixel range)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images (default: %(default)s)")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.data import load_data
    from art_saliency.evaluation.table import markdown_table, percent
    from art_saliency.threat import ThreatModel
    from art_saliency.trainers.runs import claim_folder

    threat = ThreatModel("Linf", _checks.real("--eps", args.eps, above=0, most=1))
    _checks.whole("--epochs", args.epochs, least=1)
    _checks.whole("--seed", args.seed)
    device = pick_device(args.device)
    out = claim_folder(args.out, force=args.force)
    data = load_data("digits")
    say(args, f"digits: {len(data.x_train)} training and {len(data.x_test)} test images of 8x8; Linf eps {threat.eps:g}; {device}")
    results = {method: _one(method, data, threat, device, out, args) for method in _METHODS}
    rows = [
        (
            method,
            percent(result["clean"]["accuracy"]),
            percent(result["pgd20"]["accuracy"]),
            percent(result["autoattack"]["accuracy"]),
            "{:.1f}-{:.1f}".format(*(100 * end for end in result["autoattack"]["interval_95"])),
            f"{result['seconds_per_epoch']:.2f}",
            f"{result['passes_per_step']:.1f}",
        )
        for method, result in results.items()
    ]
    header = ("network", "clean %", "PGD-20 %", "AutoAttack %", "95 % interval", "s / epoch", "passes / step")
    table = markdown_table(header, rows)
    note = (
        f"Accuracy on all {len(data.x_test)} test digits, Linf eps {threat.eps:g}, seed {args.seed}. AutoAttack: version standard, by "
        f"{results['adv-gsct']['autoattack_details']['backend']}. One pass is a forward-backward pass of standard training."
    )
    (out / "results.md").write_text(f"{table}\n\n{note}\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    say(args, "")
    print(table)
    print(f"\n{note}")
    print(f"Checkpoints and figures: {out}/{{{','.join(_METHODS)}}}/weights.pt and saliency.png")
    print(
        "Next: train your own, `art-saliency train adv-gsct --data YOUR.npz --eps 8/255 --out runs/mine`, then "
        "`art-saliency evaluate runs/mine`."
    )
    return 0


def _one(method: str, data: Any, threat: Any, device: Any, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train, save, evaluate and draw one network. :return: Its figures."""
    import torch

    from art_saliency.evaluation.figures import saliency_panel
    from art_saliency.evaluation.summary import summarise
    from art_saliency.methods.base import Batch
    from art_saliency.networks import build_network
    from art_saliency.trainers.methods import TRAINERS
    from art_saliency.trainers.runs import make_classifier, save
    from art_saliency.training.cost import forward_backward_passes

    torch.manual_seed(args.seed)
    network = {"name": "small-cnn", "num_classes": data.num_classes, "input_shape": list(data.input_shape)}
    model = build_network("small-cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    classifier = make_classifier(
        model, input_shape=data.input_shape, num_classes=data.num_classes, optimizer=optimizer, device=device
    )
    trainer = TRAINERS[method](classifier, eps=threat.eps)
    trainer.fit(data.x_train, data.y_train, nb_epochs=args.epochs, scheduler="onecycle", seed=args.seed, verbose=not args.quiet)
    folder = save(
        out / method,
        classifier,
        network=network,
        method=method,
        settings=trainer.config(),
        data={"spec": "digits", "fingerprint": data.fingerprint()},
        history=trainer.history,
        force=args.force,
    )
    summary = summarise(classifier.model, data.x_test, data.y_test, threat=threat, seed=args.seed, progress=not args.quiet)
    shown = slice(0, _PICTURES)
    saliency_panel(
        classifier.model,
        data.x_test[shown].to(device),
        summary.autoattack.x_adv[shown].to(device),
        data.y_test[shown].to(device),
        folder / "saliency.png",
        title=f"{method}: digits, Linf eps {threat.eps:g}, clean {summary.clean:.1%}, AutoAttack {summary.autoattack.robust_accuracy:.1%}",
    )
    batch = Batch(data.x_train[:128].to(device), data.y_train[:128].to(device))
    return {
        **summary.to_json(),
        "seconds_per_epoch": statistics.median(trainer.history.column("seconds")),
        "passes_per_step": forward_backward_passes(classifier.model, trainer.objective, batch),
    }
