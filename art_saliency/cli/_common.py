"""Options and small steps that several commands share."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from art_saliency.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from art_saliency.data import DataSet
    from art_saliency.threat import ThreatModel

__all__ = [
    "KEPT",
    "add_run_options",
    "check_attackable",
    "check_seed",
    "data_of_run",
    "own_device",
    "page_of_run",
    "pick_device",
    "refuse_unused",
    "say",
    "shown_and_written",
    "threat_of_run",
    "vacant",
    "writable",
]


KEPT = "checkpoints"
"""The folder, in that of a run, where it is kept until it is over."""

_T = TypeVar("_T")


def refuse_unused(args: argparse.Namespace, names: Iterable[str], when: str) -> None:
    """
    Refuse options that were given and that nothing would look at.

    :param args: With the parser's ``get_default`` as `default`. :param names: Of the options, as attributes. :param when: ``"without --full"``, say.
    """
    from art_saliency import _checks

    for name in names:
        given = getattr(args, name)
        if given != args.default(name):
            got = "it" if given is True else repr(given)
            raise _checks.refuse(f"--{name.replace('_', '-')}", got, f"no such option {when}", "leave it out")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--seed``, ``--quiet`` and ``--force``."""
    group = parser.add_argument_group("every command")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU when there is one)")
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    group.add_argument("--quiet", action="store_true", help="no progress, only results")
    group.add_argument("--force", action="store_true", help="replace files that are there")


def check_seed(seed: int) -> None:
    """:raises InputError: When it is none that torch, NumPy and AutoAttack all take."""
    # Without _checks, which imports torch: `verify` first looks where modules would come from.
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: got {seed}, expected a whole number from 0 to {2**32 - 1}")


def check_attackable(threat: ThreatModel, images: Tensor, version: str = "standard") -> None:
    """:param images: (N, C, H, W). :raises InputError: When an attack of that version of AutoAttack would fail on them."""
    from art_saliency import _checks
    from art_saliency.evaluation._autoattack_plan import VERSIONS, square_needs

    needed = square_needs(threat, images) if "square" in VERSIONS[version] else None
    if needed is not None:
        got = f"{threat.norm} with images of {images.shape[2]} x {images.shape[3]} pixels"
        raise _checks.refuse("--norm", got, needed, "say --norm Linf, or bring the images to another size")


def pick_device(name: str) -> torch.device:
    """:return: The device of that name; one that is not there is refused."""
    import torch

    from art_saliency import _checks

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _checks.refuse("--device", repr(name), "auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise _checks.refuse("--device", repr(name), "auto, cpu, cuda or cuda:N", "ART runs on these only")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _checks.refuse(
            "--device", repr(name), f"one of the {torch.cuda.device_count()} GPUs here", "use --device cpu"
        )
    return device


def own_device(name: str) -> torch.device:
    """:return: The device of this process among several on a machine: a GPU of its own, or the CPU."""
    device = pick_device(name)
    return device if device.type == "cpu" else pick_device(f"cuda:{os.environ['LOCAL_RANK']}")


def writable(option: str, folder: Path) -> None:
    """
    Make sure, before any work, that files can be written into a folder, be it there yet or not. It is not made, and nothing is left.

    :param option: That named it. :raises InputError: When a file is in its place, or nothing can be written there.
    """
    from art_saliency import _checks

    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        where = str(folder) if place == folder.absolute() else f"{folder}, below {place}"
        raise _checks.refuse(option, f"{where}, which is no folder", "a folder", "choose another")
    try:
        # Without a name, where the system can: other processes of the run may look whether the folder is empty.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        got = f"{folder}, where nothing can be written ({error.strerror})"
        raise _checks.refuse(option, got, "a folder that can be written to", "choose another") from error


def vacant(option: str, target: Path, kind: str, *, force: bool, writes: bool = True) -> Path:
    """
    Make sure, before any work, that a file or a folder can be written in its place. It is not made yet.

    :param option: That named it. :param kind: ``"file"``, in a folder that is there; or ``"folder"``, of which an empty one is vacant.
    :param force: Whether what is there may be replaced; never a file by a folder, or the reverse.
    :param writes: Whether it is this process that writes it. :return: The place.
    :raises InputError: When it is taken, or nothing can be written there.
    """
    from art_saliency import _checks

    folder = kind == "folder"
    if target.exists() and target.is_dir() != folder:
        got = f"{target}, which is a {'file' if folder else 'folder'}"
        raise _checks.refuse(option, got, f"a {kind}", "choose another, or move it away")
    if not folder and not target.parent.is_dir():
        got = f"{target}, in a folder that is not there"
        raise _checks.refuse(option, got, "a file in a folder that is", f"make {target.parent} first")
    if target.exists() and not force and (not folder or any(target.iterdir())):
        got, expected = ("not empty", "a new or empty folder") if folder else ("there already", "a new file")
        raise _checks.refuse(option, f"{target}, which is {got}", expected, "add --force, or choose another")
    if writes:
        writable(option, target if folder else target.parent)
    return target


def page_of_run(folder: str | Path) -> dict[str, Any]:
    """:return: Its ``run.json``. :raises CheckpointError: When the folder holds none; a run that is not over is told from no run."""
    from art_saliency import _checks
    from art_saliency.trainers.runs import read_run

    if (Path(folder) / KEPT).is_dir() and not (Path(folder) / "run.json").exists():
        remedy = "go on with the words of its training and --resume"
        raise CheckpointError(
            str(_checks.refuse(f"{folder}", "a run that was interrupted", "one that is over", remedy))
        )
    page = read_run(folder)
    given = {"method": page["method"], **{f"data.{name}": page["data"].get(name, "") for name in ("spec", "root")}}
    for name, value in given.items():
        if not isinstance(value, str) and not (name == "data.root" and value is None):
            got = f"{json.dumps(value)[:60]} as {name}"
            raise CheckpointError(
                str(_checks.refuse(str(Path(folder) / "run.json"), got, "a text", "copy it again, or train again"))
            )
    return page


def threat_of_run(args: Any, page: dict[str, Any]) -> ThreatModel:
    """:return: What ``--eps`` and ``--norm`` say, where they say nothing the run's own (`page` is its ``run.json``)."""
    from art_saliency import _checks
    from art_saliency.threat import ThreatModel

    eps = page["settings"].get("eps") if args.eps is None else args.eps
    if eps is None:
        raise _checks.refuse("--eps", "nothing", "a radius", "the run was trained without one: add --eps 8/255, say")
    return ThreatModel(args.norm or page["settings"].get("norm", "Linf"), eps)


def data_of_run(args: Any, page: dict[str, Any]) -> DataSet:
    """:return: What ``--data`` names, else the run's own data, whose content must still be that of the training."""
    from art_saliency import _checks
    from art_saliency.streaming import open_data

    known = page["data"]
    own = args.data is None
    if own and "spec" not in known:
        raise _checks.refuse("--data", "nothing", "data", "the run does not say on which it was trained")
    try:
        data: Any = open_data(
            known["spec"] if own else args.data,
            root=args.data_root or known.get("root"),
            size=known.get("size"),
            stream=own and known.get("streamed", False),
        )
    except (CheckpointError, InputError) as error:
        if not own:
            raise
        raise type(error)(f"{error}; or say with --data or --data-root where the run's data are now") from error
    if own and "fingerprint" in known and data.fingerprint() != known["fingerprint"]:
        got = f"{known['spec']} with other content than in training"
        raise _checks.refuse("data", got, "the same", "say so on purpose: --data " + known["spec"])
    found: DataSet = data  # a streamed set is used as one
    return found


def shown_and_written(text: str, write: Callable[[], _T]) -> _T:
    """Print what was found, and write it: a full disk leaves it on the screen, and a screen that is gone leaves it on the disk."""
    try:
        print(text)
    finally:
        written = write()
    return written


def say(args: Any, text: str) -> None:
    """Tell what is going on, on the error stream, unless ``--quiet``."""
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)
