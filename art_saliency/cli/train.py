"""``art-saliency train METHOD``: train a network by any method on any data, into a folder."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import KEPT, add_run_options, own_device, pick_device, say, vacant, writable
from art_saliency.cli._launch import on_ranks
from art_saliency.cli._stream import device_augmentation, held_out, training_data, way_to_fit
from art_saliency.cli._train_options import (
    GREATEST,
    RECIPES,
    add_data_options,
    add_method_options,
    add_network_options,
    add_run_group,
)
from art_saliency.errors import TrainingInterrupted
from art_saliency.words import read_settings

if TYPE_CHECKING:
    import torch
    from art.estimators.classification import PyTorchClassifier

    from art_saliency.data import DataSet
    from art_saliency.streaming import StreamedSet
    from art_saliency.trainers.base import ObjectiveTrainer
    from art_saliency.trainers.surrogates import Recipe

_OWN = (KEPT, "weights.pt", "run.json", "best.pt", "last.pt")


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a network by one of the methods",
        description="Trains a network by one of the methods and writes a folder with weights.pt and run.json; "
        "beside them best.pt (last.pt with --selection best), the weights of the other epoch, where images are held out. "
        "While it trains, the run is kept in OUT/checkpoints; killed or interrupted, it goes on with the same words and --resume.",
        epilog="Examples:\n"
        "  art-saliency train adv-gsct --data digits --eps 0.2 --out runs/digits\n"
        "  art-saliency train pgd-at --data mnist.npz --eps 0.3 --set max_iter=20 --out runs/mnist\n"
        "  art-saliency train adv-gsct --data cifar10 --network resnet18 --eps 8/255 --augment crop-flip --epochs 30 --out runs/c10\n"
        "  art-saliency train adv-gsct --data cifar10 --network resnet18 --eps 8/255 --augment crop-flip --epochs 30 --out runs/c10 --resume\n"
        "  art-saliency train trades --data images/ --size 64 --network my_package.nets:make --weights start.pt --eps 4/255 --out runs/own",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", metavar="METHOD", help="standard, fgsm-rs, pgd-at, adv-gsct, ...")
    parser.add_argument("--out", required=True, help="folder for the run")
    add_data_options(parser)
    add_network_options(parser)
    add_method_options(parser)
    add_run_group(parser)
    add_run_options(parser)
    parser.set_defaults(run=run)
    parser.elsewhere = _parameters


def _parameters(words: Sequence[str]) -> dict[str, str]:
    """:return: How parameters of the method are given, by what may have been taken for their options."""
    from art_saliency.trainers.methods import TRAINERS

    methods = [TRAINERS[word] for word in words if word in TRAINERS]
    names = [name for method in methods[:1] for name in method.parameter_names() if name not in ("eps", "norm")]
    return {f"--{name.replace('_', '-')}": f"--set {name}=..." for name in names}


def _folder(args: argparse.Namespace, *, writes: bool) -> Path:
    """:return: Where the run goes: a vacant folder, or with ``--resume`` one that holds a run and nothing else, over or not."""
    from art_saliency import _checks
    from art_saliency.trainers.runs import MEASURED

    folder = Path(args.out)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # It may have been killed while it wrote its last files.
    own = all(name in (*_OWN, *MEASURED) or name.startswith(".") for name in names)
    begun = own and KEPT in names
    if args.resume and own and names & {KEPT, "run.json"}:
        if writes:
            writable("--out", folder)
        return folder
    if begun and not args.force:
        raise _checks.refuse(
            "--out",
            f"{folder}, where a run was interrupted",
            "a new or empty folder",
            "add --resume to go on with it, or --force to start anew",
        )
    return vacant("--out", folder, "folder", force=args.force, writes=writes)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    if args.devices > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # as torchrun and on_ranks itself leave it
        return on_ranks(args.words, args.devices)
    from art_saliency import _checks
    from art_saliency.trainers.methods import TRAINERS
    from art_saliency.training.checkpoint import cadence
    from art_saliency.training.engine import launched

    rank, ranks = launched()
    _checks.whole("--devices", args.devices, least=1)
    alone, args.quiet = ranks == 1, args.quiet or rank > 0
    trainer_class = TRAINERS[_checks.one_of("METHOD", args.method, TRAINERS)]
    settings = {"eps": args.eps, "norm": args.norm, **read_settings("--set", args.set)}
    trainer_class.check_parameters(settings)  # refused before any data is read
    device = pick_device(args.device) if alone else own_device(args.device)
    _checks.real("--validation-split", args.validation_split, least=0, below=1)
    _check_words(args)
    augment = device_augmentation(args.augment)
    cadence(args.checkpoint_every)
    folder = _folder(args, writes=rank == 0)

    data = training_data(args)
    network = _network(args, data)
    classifier = _classifier(args, network, device)
    parameters = {**trainer_class.defaults_for(classifier.model), **settings}
    recipe = _recipe(args, parameters, classifier)
    if args.resume and not args.force and (folder / "run.json").is_file() and not (folder / KEPT).exists():
        return _is_over(args, folder, data, recipe, told=rank == 0)
    trainer = trainer_class(classifier, **parameters)
    if trainer.objective.needs_target_model and args.ema is None:
        raise _checks.refuse("--ema", "nothing", f"a decay: {args.method} as set keeps a slow copy", "say --ema 0.999")
    aside = held_out(args, data)
    say(
        args,
        f"{args.method} on {data.name}: {len(data.y_train) - aside} training images, {aside} held out; "
        f"{network['name']}; {args.norm} eps {args.eps:g}; {device}",
    )
    interrupted = _interruption(
        way_to_fit(trainer, data, args, rank=rank, ranks=ranks),
        nb_epochs=args.epochs,
        scheduler=recipe.scheduler,
        seed=args.seed,
        augment=augment,
        verbose=not args.quiet,
        checkpoint_dir=folder / KEPT,
        checkpoint_every=args.checkpoint_every,
        resume="auto" if args.resume else "never",
        **recipe.run_options(),
    )
    if interrupted is not None:
        if rank == 0:
            raise interrupted
        return interrupted.exit_code
    if rank:  # of several processes the first alone writes
        return 0
    _write(args, folder, trainer, network, data, recipe)
    return 0


def _is_over(args: argparse.Namespace, folder: Path, data: DataSet | StreamedSet, recipe: Recipe, *, told: bool) -> int:
    """Of a run that is over there is nothing to go on with, if it is the run of these words. :return: 0."""
    from art_saliency import _checks
    from art_saliency.trainers.runs import read_run

    page = read_run(folder)
    then = {**(page.get("recipe") or {}), "method": page["method"], "data": page["data"].get("fingerprint")}
    now = {**json.loads(json.dumps(recipe.to_json())), "method": args.method, "data": data.fingerprint()}
    if others := [name for name in now if now[name] != then.get(name)]:
        got = f"{folder}, where a run of other {', '.join(others)} is over"
        raise _checks.refuse("--out", got, "the run of these words", "choose another, or add --force to train anew")
    if told:
        print(f"{folder}: this run is over, nothing was left to do. Next: art-saliency evaluate {folder}")
    return 0


def _check_words(args: argparse.Namespace) -> None:
    """Refuse, in the command line's own words, what ``fit`` has other words for."""
    from art_saliency import _checks
    from art_saliency.training.schedules import SCHEDULES

    _checks.whole("--epochs", args.epochs, least=1)
    _checks.whole("--batch-size", args.batch_size, least=1)
    _checks.one_of("--scheduler", args.scheduler, [*SCHEDULES, "none"])
    for option, measures in (("--selection", args.selection == "best"), ("--patience", args.patience is not None)):
        if measures and not args.validation_split:
            given = getattr(args, option[2:])
            remedy = "say --validation-split 0.1"
            raise _checks.refuse(option, f"{given} without images held out", "some to measure on", remedy)


def _recipe(args: argparse.Namespace, parameters: dict[str, Any], classifier: PyTorchClassifier) -> Recipe:
    """:return: How the words say that the run goes, for ``run.json``."""
    from art_saliency.trainers.surrogates import RUN_OPTIONS, Recipe, describe_optimizer

    return Recipe(
        parameters=parameters,
        optimizer=describe_optimizer(classifier.optimizer),
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        scheduler=None if args.scheduler == "none" else args.scheduler,
        augment=None if args.augment == "none" else args.augment,
        validation_split=args.validation_split,
        weights=str(Path(args.weights).resolve()) if args.weights else None,
        **{name: getattr(args, name) for name in RUN_OPTIONS},
    )


def _write(
    args: argparse.Namespace,
    folder: Path,
    trainer: ObjectiveTrainer,
    network: dict[str, Any],
    data: DataSet | StreamedSet,
    recipe: Recipe,
) -> None:
    """Write the run and the weights of the other epoch, forget its checkpoints, and say what came of it."""
    from art_saliency.data import DataSet
    from art_saliency.files import write_tensors
    from art_saliency.trainers.runs import save
    from art_saliency.training.checkpoint import clear

    save(
        folder,
        trainer.get_classifier(),
        network=network,
        method=args.method,
        settings=trainer.config(),
        data={
            "spec": spec_of(args.data),
            "root": args.data_root,
            "size": args.size,
            "streamed": not isinstance(data, DataSet),
            "fingerprint": data.fingerprint(),
        },
        history=trainer.history,
        recipe=recipe.to_json(),
        force=True,  # it was vacant, or the user's word was taken, before the training
    )
    kept = trainer.history.meta["weights"]
    # Of a run that was here before: weights.pt holds them now.
    (folder / f"{kept['selection']}.pt").unlink(missing_ok=True)
    for which, weights in trainer.kept_weights.items():
        if which != kept["selection"]:
            write_tensors(folder / f"{which}.pt", weights)
    clear(folder / KEPT)
    print(
        f"{folder}: {_weights(kept)}; {_summary(trainer.history[kept['epoch']])}. Next: art-saliency evaluate {folder}"
    )


def _interruption(fit: Callable[..., None], **options: Any) -> TrainingInterrupted | None:
    """:return: What interrupted the training, once it was kept."""
    from art_saliency.trainers.arms import going_on

    try:
        with going_on():
            fit(**options)
    except TrainingInterrupted as error:
        return error.with_traceback(None)  # it would keep the run alive
    return None


def _weights(kept: dict[str, Any]) -> str:
    """:return: Which weights ``weights.pt`` holds, in words; `kept` stands in the history."""
    averaged = f", {kept['average']} average" if "average" in kept else ""
    stopped = f", stopped after epoch {kept['last_epoch'] + 1}" if kept.get("stopped_early") else ""
    return f"{kept['selection']} weights (epoch {kept['epoch'] + 1}{averaged}{stopped})"


def _network(args: argparse.Namespace, data: DataSet | StreamedSet) -> dict[str, Any]:
    """:return: The arguments of ``build_network``, as ``run.json`` keeps them."""
    from art_saliency.networks import default_network

    return {
        "name": args.network or default_network(data.input_shape),
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
        "activation": args.activation,
        "width": args.width,
        "mean": list(data.mean()) if args.normalise else None,
        "std": list(data.std()) if args.normalise else None,
    }


def _classifier(args: argparse.Namespace, network: dict[str, Any], device: torch.device) -> PyTorchClassifier:
    """:return: The network, from the weights given if any, in an ART classifier with its optimizer."""
    import torch

    from art_saliency.networks import build_network
    from art_saliency.trainers.runs import make_classifier, readable
    from art_saliency.trainers.surrogates import load_weights

    torch.manual_seed(args.seed)
    model = build_network(**network)
    if args.weights:
        load_weights(model, str(readable(Path(args.weights))))
    return make_classifier(
        model,
        input_shape=network["input_shape"],
        num_classes=network["num_classes"],
        optimizer=_optimizer(model, args, network["name"]),
        device=device,
    )


def _summary(record: dict[str, Any]) -> str:
    """:return: The last epoch's accuracies, in words."""
    text = f"training accuracy {record['train_accuracy']:.1%}"
    if "validation_accuracy" in record:
        text += f", validation {record['validation_accuracy']:.1%} clean"
    if "validation_robust_accuracy" in record:
        text += f" and {record['validation_robust_accuracy']:.1%} under PGD-10"
    return text


def spec_of(data: str) -> str:
    """A file's or folder's absolute path, so that ``evaluate`` finds it from anywhere; a name, which comes first, as it is."""
    from art_saliency.data import NAMES

    return data if data in NAMES else str(Path(data).expanduser().resolve())


def _optimizer(model: Any, args: argparse.Namespace, network: str) -> Any:
    import torch

    from art_saliency import _checks

    kind = args.optimizer or ("adam" if network in ("small-cnn", "mnist-cnn") else "sgd")
    lr = RECIPES[kind] if args.lr is None else _checks.real("--lr", args.lr, above=0, most=GREATEST)
    decay = (
        (0.0 if kind == "adam" else 5e-4)
        if args.weight_decay is None
        else _checks.real("--weight-decay", args.weight_decay, least=0, most=GREATEST)
    )
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
