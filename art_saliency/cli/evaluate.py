"""``art-saliency evaluate DIR``: how robust a trained network really is; several networks side by side; or everything about it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import (
    add_run_options,
    page_of_run,
    pick_device,
    refuse_unused,
    say,
    shown_and_written,
    threat_of_run,
    vacant,
    writable,
)
from art_saliency.cli._side_by_side import compare, table_of_run
from art_saliency.errors import CheckpointError
from art_saliency.words import fraction

if TYPE_CHECKING:
    from torch import nn

    from art_saliency.cli._subjects import Subject

_PAGE = "evaluation.json"
_ONLY_FULL = ("surrogate", "no_surrogates", "audit_images", "corruptions")


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure trained networks with the real AutoAttack",
        description="Evaluates a run's network on its test images: clean accuracy, PGD-20 and AutoAttack, with 95 % intervals. "
        "With --full also a gradient-masking audit, transferred attacks, corruptions and saliency, as a report with figures. "
        "Several runs are put side by side in one table and one figure. What was measured before of the same weights, images and settings, "
        "and stands in DIR/evaluation.json, is not measured again, but with --force.",
        epilog="Examples:\n  art-saliency evaluate runs/digits\n  art-saliency evaluate runs/mnist --eps 0.2 --images 1000\n"
        "  art-saliency evaluate runs/digits --full\n  art-saliency evaluate runs/pgd-at runs/adv-gsct runs/fsr --out runs/side-by-side",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="what `art-saliency train --out DIR` wrote")
    parser.add_argument("--out", help="folder for the comparison of several runs (default: comparison)")
    parser.add_argument("--data", help="other data than the run's own (default: the run's)")
    parser.add_argument("--data-root", help="where torchvision's sets lie")
    parser.add_argument("--eps", type=fraction, help="radius (default: the run's)")
    parser.add_argument("--norm", help="Linf or L2 (default: the run's)")
    parser.add_argument("--images", type=int, help="how many test images, the first ones (default: all)")
    parser.add_argument(
        "--version", default="standard", help="of AutoAttack: standard, plus or rand (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=250, help="images at once (default: %(default)s)")
    full = parser.add_argument_group("with --full")
    full.add_argument("--full", action="store_true", help="measure everything and write DIR/report")
    full.add_argument(
        "--surrogate",
        action="append",
        metavar="DIR",
        help="a run whose network transferred attacks are made on; may be repeated (default: three are trained on the spot)",
    )
    full.add_argument("--no-surrogates", action="store_true", help="leave transferred attacks out")
    full.add_argument("--audit-images", type=int, default=200, help="images for the audit (default: %(default)s)")
    full.add_argument("--corruptions", metavar="FOLDER", help="arrays such as CIFAR-10-C's")
    add_run_options(parser)
    parser.set_defaults(run=run, default=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.cli._subjects import named_surrogates, opened

    folders = _checked(args)
    out = None
    if len(folders) > 1:
        _checks.optional("matplotlib", "eval", "Drawing a figure")  # before the work, not after it
        out = vacant("--out", Path(args.out or "comparison"), "folder", force=args.force)
    device = pick_device(args.device)
    subjects = opened(args, dict(zip(_names(folders), folders, strict=True)), device)
    # Before any of them is measured; and after all were opened, as nothing that was measured is worth more than weights that can be read.
    known = {name: _measured(args, of) for name, of in subjects.items()}
    measure = partial(_full, named=named_surrogates(args, subjects, device)) if args.full else _short
    pages = {}
    for name, of in subjects.items():
        words = f"{of.count} test images, {of.threat.norm} eps {of.threat.eps:g}, {device}"
        say(args, f"{of.page['method']} on {of.data.name}: {words}")
        pages[name] = known[name] or measure(args, of)
        if known[name]:
            print(
                f"{_in_words(of, pages[name])}\nRead from {of.folder / _PAGE}: measured before (--force measures anew)"
            )
    if out is not None:
        compare(pages, out)
    return 0


def _checked(args: argparse.Namespace) -> list[Path]:
    """:return: The folders of the runs; what is wrong with the words, or with the places that are written to, is refused."""
    from art_saliency import _checks

    _checks.one_of("--version", args.version, ("standard", "plus", "rand"))
    _checks.whole("--batch-size", args.batch_size, least=1)
    if args.images is not None:
        _checks.whole("--images", args.images, least=1)
    _checks.whole("--audit-images", args.audit_images, least=1)
    if not args.full:
        refuse_unused(args, _ONLY_FULL, "without --full")
    if args.surrogate:
        refuse_unused(args, ["no_surrogates"], "beside --surrogate")
    folders = [Path(folder) for folder in args.folders]
    if len(folders) == 1:
        refuse_unused(args, ["out"], "with one run, in whose folder all is written")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise _checks.refuse("DIR", "the same run twice", "different runs")
    for folder in folders:
        _checks.real("--eps", threat_of_run(args, page_of_run(folder)).eps, above=0, most=1e9)  # as far as records go
        if args.full or args.force or not (folder / _PAGE).exists():
            writable("DIR", folder)  # a report takes the place of the old one as a whole
    return folders


def _names(folders: list[Path]) -> list[str]:
    """:return: The folders' last names, or as much of their paths as tells them apart."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _measured(args: argparse.Namespace, of: Subject) -> dict[str, Any] | None:
    """
    :return: What was measured before of these weights, on these images and by these words; ``None`` when it is to be measured.
    :raises InputError: When the place is taken by anything else. :raises CheckpointError: When it cannot be told what of.
    """
    from art_saliency import _checks
    from art_saliency.data import to_unit
    from art_saliency.evaluation._autoattack_memory import weights_sha256
    from art_saliency.files import sha256_of_tensors
    from art_saliency.robustbench.evidence import read_evidence

    target = of.folder / _PAGE
    if args.full or args.force or not target.is_file():
        vacant("DIR", *((of.folder / "report", "folder") if args.full else (target, "file")), force=args.force)
        return None
    try:
        record = read_evidence(target).record
        page: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        _in_words(of, page)
    except CheckpointError as error:
        raise CheckpointError(f"{error} with --force") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{target}: damaged ({error!r}); evaluate again with --force") from error
    x, y = of.images()
    asked = {
        "weights": ("weights_sha256", weights_sha256(of.model)),
        "images": ("data_sha256", sha256_of_tensors({"x": to_unit(x).float().contiguous(), "y": y.long()})),
        "--norm": ("norm", of.threat.norm),
        "--eps": ("eps", of.threat.eps),
        "--version": ("version", args.version),
        "--batch-size": ("batch_size", args.batch_size),
        "--seed": ("seed", args.seed),
    }
    if others := [words for words, (name, value) in asked.items() if record[name] != value]:
        got = f"{target}, which is of other {', '.join(others)}"
        raise _checks.refuse("DIR", got, "none, or the evaluation that these words ask for", "add --force")
    return page


def _in_words(of: Subject, page: dict[str, Any]) -> str:
    """:param page: Of an evaluation. :return: Its table, and what AutoAttack warned of."""
    details = page["autoattack_details"]
    notes = [f"AutoAttack: {note}" for note in (*details["deviations"], *details["warnings"])]
    return "\n".join([table_of_run(page, of.page["method"]), *notes])


def _short(args: argparse.Namespace, of: Subject) -> dict[str, Any]:
    from art_saliency.evaluation.summary import summarise
    from art_saliency.files import sha256_of_tensors, write_file, write_tensors

    summary = summarise(
        of.model,
        *of.images(),
        threat=of.threat,
        version=args.version,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=not args.quiet,
    )
    result = {"run": of.page["method"], "data": of.data.name, **summary.to_json()}
    images = {"x_adv": summary.autoattack.x_adv}
    result["x_adv_sha256"] = sha256_of_tensors(images)
    target = of.folder / _PAGE

    def write() -> None:
        write_tensors(of.folder / "x_adv.pt", images)
        write_file(target, lambda file: file.write(json.dumps(result, indent=1).encode()))

    shown_and_written(_in_words(of, result), write)
    print(f"Written to {target}")
    return result


def _full(args: argparse.Namespace, of: Subject, *, named: Mapping[str, nn.Module]) -> dict[str, Any]:
    from art_saliency.evaluation.report import full_report
    from art_saliency.trainers.surrogates import variants_of_run

    kept = _state_folder(args, of)
    report = full_report(
        of.model,
        *of.images(),
        eps=of.threat.eps,
        norm=of.threat.norm,
        name=of.page["method"],
        data_name=of.data.name,
        surrogates=_surrogates(args, of, named),
        variants=variants_of_run(of.page),
        audit_images=args.audit_images,
        corruption_folder=args.corruptions,
        version=args.version,
        batch_size=args.batch_size,
        seed=args.seed,
        state_dir=kept,
        progress=not args.quiet,
    )
    verdict = f"Audit: {report.audit.verdict}" + "".join(f"\n  {reason}" for reason in report.audit.reasons)
    target = shown_and_written(
        f"{table_of_run(report.page, of.page['method'])}\n{verdict}",
        lambda: report.write(of.folder / "report", force=True),  # it was vacant
    )
    shutil.rmtree(kept, ignore_errors=True)  # it was for an interrupted report
    with contextlib.suppress(OSError):  # where another one is kept beside it
        kept.parent.rmdir()
    print(f"Written to {target}: report.md, report.json, figures")
    return report.page


def _state_folder(args: argparse.Namespace, of: Subject) -> Path:
    """:return: Where an interrupted report goes on; one of other images, weights, settings, threads or devices has a folder of its own."""
    import torch

    from art_saliency.evaluation._autoattack_backend import find_backend

    device, backend = next(of.model.parameters()).device, find_backend()
    settings = [of.page["weights_sha256"], of.data.fingerprint(), of.count, of.threat.norm, of.threat.eps]
    settings += [args.version, args.batch_size, args.seed, backend.name, backend.version, torch.__version__]
    settings += [torch.get_num_threads(), device.type, torch.backends.cpu.get_cpu_capability()]
    if device.type == "cuda":
        settings.append(torch.cuda.get_device_name(device))
    return of.folder / "autoattack-state" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _surrogates(args: argparse.Namespace, of: Subject, named: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """:return: The networks that were named, or three that are trained now."""
    from art_saliency.trainers.surrogates import train_surrogates

    if named or args.no_surrogates:
        return named
    if not of.can_be_repeated():
        method = of.page["method"]
        say(
            args, f"no network is trained for transferred attacks: {method!r} is no method known here (--surrogate DIR)"
        )
        return {}
    device = next(of.model.parameters()).device
    say(args, "training three networks for transferred attacks (--no-surrogates leaves them out)")
    return train_surrogates(of.page, of.data, seed=args.seed, device=device, threat=of.threat, quiet=args.quiet)
