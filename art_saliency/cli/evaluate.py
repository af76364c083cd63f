"""``art-saliency evaluate DIR``: how robust a trained network really is; several networks side by side; or everything about it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_saliency.cli._common import (
    add_run_options,
    data_of_run,
    fraction,
    pick_device,
    say,
    shown_and_written,
    threat_of_run,
    writable,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from art_saliency.data import DataSet
    from art_saliency.threat import ThreatModel

_MEASURES = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure trained networks with the real AutoAttack",
        description="Evaluates a run's network on its test images: clean accuracy, PGD-20 and AutoAttack, with 95 %% intervals. "
        "With --full also a gradient-masking audit, transferred attacks, corruptions and saliency, as a report with figures. "
        "Several runs are put side by side in one table and one figure.",
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it. :return: 0."""
    from art_saliency import _checks
    from art_saliency.trainers.runs import read_run

    _checks.one_of("--version", args.version, ("standard", "plus", "rand"))
    _checks.whole("--batch-size", args.batch_size, least=1)
    _checks.whole("--audit-images", args.audit_images, least=1)
    _checks.whole("--seed", args.seed)
    folders = [Path(folder) for folder in args.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise _checks.refuse("DIR", "the same run twice", "different runs")
    for folder in folders:  # all that can be refused is, before any of them is worked on
        threat_of_run(args, read_run(folder))
        _vacant("DIR", folder / ("report" if args.full else "evaluation.json"), folder=args.full, force=args.force)
        writable("DIR", folder)
    out = None
    if len(folders) > 1:
        out = Path(args.out or "comparison")
        _vacant("--out", out, folder=True, force=args.force)
        writable("--out", out)
    device = pick_device(args.device)
    pages = {}
    for name, folder in zip(_names(folders), folders, strict=True):
        pages[name] = _one(args, folder, device)
    if out is not None:
        _compare(pages, out)
    return 0


def _vacant(option: str, target: Path, *, folder: bool, force: bool) -> None:
    """Refuse what would be replaced without a word, and what cannot be replaced: a file by a folder, or the reverse."""
    from art_saliency import _checks

    if target.exists() and target.is_dir() != folder:
        got, expected = ("file", "folder") if folder else ("folder", "file")
        raise _checks.refuse(option, f"{target}, which is a {got}", f"a {expected}", "move it away")
    if target.exists() and not force:
        what = "a new folder" if folder else "a run without an evaluation"
        raise _checks.refuse(option, f"{target}, which is there already", what, "add --force")


def _names(folders: list[Path]) -> list[str]:
    """:return: The folders' last names, or as much of their paths as tells them apart."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@dataclass(frozen=True, eq=False)
class _Subject:
    """One run and what it is measured on: the first `count` test images of the data."""

    folder: Path
    page: dict[str, Any]
    model: nn.Module
    data: DataSet
    count: int
    threat: ThreatModel

    def images(self) -> tuple[Tensor, Tensor]:
        return self.data.x_test[: self.count], self.data.y_test[: self.count]


def _one(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Evaluate one run, write what was found, print its table. :return: The page that was written."""
    from art_saliency import _checks
    from art_saliency.trainers.runs import load, read_run

    page = read_run(folder)
    threat = threat_of_run(args, page)
    model = load(folder, device=device).model
    data = data_of_run(args, page)
    shape = tuple(page["network"]["input_shape"])
    if data.input_shape != shape:
        raise _checks.refuse("--data", f"images of shape {data.input_shape}", f"{shape}, which the network takes")
    most = len(data.x_test)
    count = most if args.images is None else _checks.whole("--images", args.images, least=1, most=most)
    say(args, f"{page['method']} on {data.name}: {count} test images, {threat.norm} eps {threat.eps:g}, {device}")
    return (_full if args.full else _short)(args, _Subject(folder, page, model, data, count, threat))


def _short(args: argparse.Namespace, of: _Subject) -> dict[str, Any]:
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
    target = of.folder / "evaluation.json"
    notes = [f"AutoAttack: {note}" for note in (*summary.autoattack.deviations, *summary.autoattack.warnings)]

    def write() -> None:
        write_tensors(of.folder / "x_adv.pt", images)
        write_file(target, lambda file: file.write(json.dumps(result, indent=1).encode()))

    shown_and_written("\n".join([_table(result, of.page["method"], args.version), *notes]), write)
    print(f"Written to {target}")
    return result


def _full(args: argparse.Namespace, of: _Subject) -> dict[str, Any]:
    from art_saliency.evaluation.report import full_report
    from art_saliency.trainers.surrogates import variants_of_run

    # An interrupted report goes on where it stopped; one of other images, weights or settings has a folder of its own.
    settings = [of.page["weights_sha256"], of.data.fingerprint(), of.count, of.threat.norm, of.threat.eps]
    settings += [args.version, args.batch_size, args.seed]
    kept = of.folder / "autoattack-state" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    report = full_report(
        of.model,
        *of.images(),
        eps=of.threat.eps,
        norm=of.threat.norm,
        name=of.page["method"],
        data_name=of.data.name,
        surrogates=_surrogates(args, of),
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
        f"{_table(report.page, of.page['method'], args.version)}\n{verdict}",
        lambda: report.write(of.folder / "report", force=args.force),
    )
    shutil.rmtree(kept, ignore_errors=True)  # it was for an interrupted report
    with contextlib.suppress(OSError):  # where another one is kept beside it
        kept.parent.rmdir()
    print(f"Written to {target}: report.md, report.json, figures")
    return report.page


def _surrogates(args: argparse.Namespace, of: _Subject) -> dict[str, nn.Module]:
    """:return: The networks that were named, or three that are trained now."""
    from art_saliency.trainers.runs import load
    from art_saliency.trainers.surrogates import train_surrogates

    device = next(of.model.parameters()).device
    if args.no_surrogates:
        return {}
    if args.surrogate:
        return {str(folder): load(folder, device=device).model for folder in args.surrogate}
    say(args, "training three networks for transferred attacks (--no-surrogates leaves them out)")
    return train_surrogates(of.page, of.data, seed=args.seed, device=device, threat=of.threat, quiet=args.quiet)


def _table(page: dict[str, Any], method: str, version: str) -> str:
    from art_saliency.evaluation.report_text import interval
    from art_saliency.evaluation.table import markdown_table, percent

    rows = [
        (
            f"AutoAttack ({version})" if key == "autoattack" else words,
            percent(page[key]["accuracy"]),
            interval(page[key]),
        )
        for key, words in _MEASURES.items()
    ]
    return markdown_table((f"{method}, {page['images']} images", "accuracy %", "95 % interval"), rows)


def _compare(pages: dict[str, dict[str, Any]], out: Path) -> None:
    """Print and write one table of all runs, and draw one figure."""
    from art_saliency.evaluation.report_text import interval
    from art_saliency.evaluation.table import markdown_table, percent

    full = all("audit" in page for page in pages.values())
    header = ["run", "method", *(f"{words} %" for words in _MEASURES.values()), "95 % interval", "images"]
    rows: list[tuple[Any, ...]] = []
    for name, page in pages.items():
        method = page.get("run") or page["network"]
        shares = (percent(page[key]["accuracy"]) for key in _MEASURES)
        more = (page["audit"]["verdict"],) if full else ()
        rows.append((name, method, *shares, interval(page["autoattack"]), page["images"], *more))
    table = markdown_table([*header, "audit"] if full else header, rows, left=2)
    shown_and_written(f"\n{table}\n", lambda: _write_comparison(pages, table, out, full=full))
    print(f"Written to {out}: comparison.md, comparison.json, comparison.png")


def _write_comparison(pages: dict[str, dict[str, Any]], table: str, out: Path, *, full: bool) -> None:
    from art_saliency.evaluation.figures_report import accuracy_curve, side_by_side
    from art_saliency.files import write_file

    out.mkdir(parents=True, exist_ok=True)
    side_by_side(
        pages,
        out / "comparison.png",
        title=f"{len(pages)} networks, 95 % intervals",
        measures=list(_MEASURES),
        words=lambda key: _MEASURES[key],
    )
    if full:
        curves = {
            name: {float(eps): row for eps, row in page["accuracy_against_eps"].items()} for name, page in pages.items()
        }
        accuracy_curve(
            curves, out / "accuracy_against_eps.png", title="Accuracy against the radius (PGD-50)", label="eps"
        )
    write_file(out / "comparison.md", lambda file: file.write(f"{table}\n\n![comparison](comparison.png)\n".encode()))
    write_file(out / "comparison.json", lambda file: file.write(json.dumps(pages, indent=1).encode()))
