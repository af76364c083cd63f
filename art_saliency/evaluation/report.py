"""One evaluation of one network: everything this package can measure, as JSON, Markdown and figures. See ``report.md``."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency._version import __version__
from art_saliency.attacks import AdaptiveAttack, pgd
from art_saliency.evaluation import figures_report as draw
from art_saliency.evaluation._inputs import placed
from art_saliency.evaluation.accuracy import accuracy, binomial_interval, pgd_accuracy
from art_saliency.evaluation.audit import AuditBudget, AuditReport, audit
from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
from art_saliency.evaluation.corruption_arrays import array_corruption_accuracy
from art_saliency.evaluation.corruptions import CorruptionResult, corruption_accuracy
from art_saliency.evaluation.figures import saliency_panel
from art_saliency.evaluation.report_text import markdown
from art_saliency.evaluation.saliency import SaliencyReport, saliency_report
from art_saliency.evaluation.transfer import TransferResult, transfer
from art_saliency.files import sha256_of_tensors, write_file
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel

__all__ = ["SCHEMA", "STEPS", "Report", "full_report"]

SCHEMA = 1
"""Of ``report.json``; ``report.md`` beside this module says what every key holds."""

STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Of the PGD attacks of the accuracy-against-steps curve."""

_PICTURES, _SURFACES = 8, 4
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Report:
    """
    What one evaluation found. Every accuracy is of the images given, the audit's and the saliency's of the first ones of them.

    :ivar page: All of it, JSON-able, as ``report.json`` holds it. :ivar autoattack: :ivar audit: :ivar transfer:
    :ivar saliency: :ivar corruptions: The parts; ``None`` where a part was left out.
    """

    page: dict[str, Any]
    autoattack: AutoAttackResult
    audit: AuditReport
    transfer: TransferResult | None
    saliency: SaliencyReport
    corruptions: CorruptionResult | None
    draw_figures: Callable[[Path], list[Path]] = field(repr=False)

    def write(self, folder: str | Path, *, force: bool = False) -> Path:
        """
        Write ``report.json``, ``report.md`` and ``figures/``: whole, or not at all.

        :param folder: A new folder. :param force: Whether one that is there may be replaced. :return: The folder.
        :raises InputError: When it is there and `force` is false.
        """
        target = Path(folder)
        if target.exists() and not force:
            raise _checks.refuse("folder", f"{target}, which is there already", "a new folder", "add --force")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            (made / "figures").mkdir()
            figures = [path.relative_to(made) for path in self.draw_figures(made / "figures")]
            write_file(made / "report.json", lambda file: file.write(json.dumps(self.page, indent=1).encode()))
            text = markdown(self.page, figures)
            write_file(made / "report.md", lambda file: file.write(text.encode()))
            if target.exists():
                shutil.rmtree(target)
            os.replace(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return target


def full_report(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    eps: float,
    norm: str = "Linf",
    name: str = "network",
    data_name: str = "data",
    surrogates: Mapping[str, nn.Module] | None = None,
    variants: Mapping[str, AdaptiveAttack] | None = None,
    budget: AuditBudget | None = None,
    audit_images: int = 200,
    saliency_images: int = 64,
    corruption_folder: str | Path | None = None,
    corrupt: bool = True,
    version: str = "standard",
    batch_size: int = 250,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """
    Measure everything: clean, PGD and AutoAttack accuracy, curves, the audit, transfer, corruptions, saliency.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode, left as it was.
    :param x: (N, C, H, W) in [0, 1] or uint8: images it was not trained on. :param y: (N,) int64, or one-hot rows.
    :param eps: Radius, in units of the [0, 1] pixel range. :param norm: ``"Linf"`` or ``"L2"``.
    :param name: Of the network, for headings. :param data_name: Of the images.
    :param surrogates: Networks that transferred attacks are made on; none leaves transfer out.
    :param variants: Attacks made for the defence, see :func:`art_saliency.evaluation.audit.audit`.
    :param budget: The audit's. :param audit_images: How many images it gets, the first ones.
    :param saliency_images: How many images the saliency metrics get, the first ones.
    :param corruption_folder: Arrays like CIFAR-10-C's, beside the corruptions that are made on the spot.
    :param corrupt: Whether those are made; they need scikit-image.
    :param version: Of AutoAttack. :param batch_size: Images at once. :param seed: Of everything random.
    :param state_dir: Where AutoAttack keeps what it finished, so that an interrupted report continues there.
    :param progress: Whether bars are shown on stderr: the parts, and below them the part at work.
    :return: The report.
    """
    threat = ThreatModel(norm, _checks.real("eps", eps, above=0))
    images, labels = placed(model, x, y)
    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    with _parts(progress, 7) as part:
        plain = part("clean and PGD", lambda: _plain(model, images, labels, threat, batch_size, seed))
        attacked = part(
            "AutoAttack",
            lambda: autoattack(
                model, images, labels, eps=eps, norm=norm, version=version, state_dir=state_dir, **shared
            ),
        )
        some = slice(0, _checks.whole("audit_images", audit_images, least=1))
        transferred = part(
            "transfer",
            lambda: (
                transfer(model, images, labels, surrogates=surrogates, threat=threat, **shared) if surrogates else None
            ),
        )
        audited = part(
            "audit",
            lambda: audit(
                model,
                images[some],
                labels[some],
                eps=eps,
                norm=norm,
                autoattack_result=_first(attacked, images, labels, some),
                transferred=None if transferred is None else transferred.correct[some],
                variants=variants,
                budget=budget,
                **shared,
            ),
        )
        corrupted = part(
            "corruptions", lambda: _corruptions(model, images, labels, corrupt, batch_size, seed, progress)
        )
        from_arrays = part(
            "corruption arrays",
            lambda: (
                None
                if corruption_folder is None
                else array_corruption_accuracy(model, corruption_folder, progress=progress)
            ),
        )
        few = slice(0, _checks.whole("saliency_images", saliency_images, least=1))
        x_adv = pgd(
            model, images[few], labels[few], threat=threat, max_iter=20, random=RandomSource(seed, images.device)
        )
        explained = part("saliency", lambda: saliency_report(model, images[few], labels[few], x_adv, seed=seed))
    page = {
        "schema": SCHEMA,
        "art_saliency": __version__,
        "network": name,
        "data": data_name,
        "images": len(images),
        "threat_model": {"norm": norm, "eps": threat.eps},
        "seed": seed,
        "weights_sha256": attacked.weights_sha256,
        **plain,
        "autoattack": {**_row(attacked.robust_accuracy, len(images)), "details": attacked.to_json()},
        "waterfall": _waterfall(attacked, len(images)),
        "accuracy_against_eps": _against_eps(audited),
        "audit": audited.to_json(),
        "transfer": None if transferred is None else transferred.to_json(),
        "corruptions": None if corrupted is None else corrupted.to_json(),
        "corruption_arrays": None if from_arrays is None else from_arrays.to_json(),
        "saliency": explained.to_json(),
    }

    def figures(folder: Path) -> list[Path]:
        return _figures(folder, model, images, labels, x_adv, page, threat, seed)

    return Report(page, attacked, audited, transferred, explained, corrupted, figures)


@contextmanager
def _parts(shown: bool, count: int) -> Iterator[Callable[[str, Callable[[], _T]], _T]]:
    """One bar over the parts; the bar of the part at work lies below it and goes when it is done."""
    with tqdm(total=count, desc="report", unit="part", disable=not shown) as bar:

        def part(name: str, work: Callable[[], _T]) -> _T:
            bar.set_postfix_str(name)
            found = work()
            bar.update()
            return found

        yield part


def _row(share: float, count: int) -> dict[str, Any]:
    return {"accuracy": share, "interval_95": list(binomial_interval(round(share * count), count)), "count": count}


def _plain(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """:return: Clean accuracy, PGD-20, and accuracy against steps."""
    steps = {n: pgd_accuracy(model, x, y, threat=threat, max_iter=n, batch_size=batch_size, seed=seed) for n in STEPS}
    return {
        "clean": _row(accuracy(model, x, y, batch_size=batch_size), len(x)),
        "pgd20": _row(steps[20], len(x)),
        "accuracy_against_steps": {str(n): _row(share, len(x)) for n, share in steps.items()},
    }


def _first(result: AutoAttackResult, x: Tensor, y: Tensor, some: slice) -> AutoAttackResult:
    """:return: The result of the first images: what AutoAttack did to each is the same, whatever is counted."""
    fingerprint = sha256_of_tensors({"x": x[some].cpu(), "y": y[some].cpu()})
    return dataclasses.replace(result, x_adv=result.x_adv[some], correct=result.correct[some], data_sha256=fingerprint)


def _corruptions(
    model: nn.Module, x: Tensor, y: Tensor, wanted: bool, batch_size: int, seed: int, progress: bool
) -> CorruptionResult | None:
    if not wanted:
        return None
    return corruption_accuracy(model, x, y, batch_size=batch_size, seed=seed, progress=progress)


def _waterfall(result: AutoAttackResult, count: int) -> dict[str, Any]:
    """:return: What is left, clean first, after each of AutoAttack's attacks in turn."""
    left = {"clean": result.clean_accuracy, **result.robust_accuracy_after}
    return {name: _row(share, count) for name, share in left.items()}


def _against_eps(report: AuditReport) -> dict[str, Any]:
    """:return: The audit's curve, with intervals."""
    curve = next(check.figures["accuracy"] for check in report.checks if check.name == "accuracy never rises with eps")
    clean = {"0": report.accuracies["clean"]["accuracy"]}
    return {eps: _row(share, report.count) for eps, share in {**clean, **curve}.items()}


def _figures(
    folder: Path,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    page: dict[str, Any],
    threat: ThreatModel,
    seed: int,
) -> list[Path]:
    name, where = page["network"], f"{page['data']}, {threat.norm} eps {threat.eps:g}"

    def curve(key: str) -> dict[str, dict[float, dict[str, Any]]]:
        return {name: {float(place): row for place, row in page[key].items()}}

    # One image of each of the first classes, so that the pictures differ.
    chosen = [int((y == label).nonzero()[0, 0]) for label in torch.unique(y)][:_SURFACES]
    shown = slice(0, min(_PICTURES, len(x_adv)))
    return [
        draw.waterfall(
            page["waterfall"], folder / "waterfall.png", title=f"{name}: AutoAttack, attack by attack ({where})"
        ),
        draw.accuracy_curve(
            curve("accuracy_against_eps"),
            folder / "accuracy_against_eps.png",
            title=f"{name}: accuracy against the radius ({page['data']}, PGD-50)",
            label=f"{threat.norm} eps",
            marked=threat.eps,
        ),
        draw.accuracy_curve(
            curve("accuracy_against_steps"),
            folder / "accuracy_against_steps.png",
            title=f"{name}: accuracy against the attack's steps ({where})",
            label="PGD steps",
            logarithmic=True,
        ),
        saliency_panel(
            model, x[shown], x_adv[shown], y[shown], folder / "saliency.png", title=f"{name}: {where}, PGD-20"
        ),
        draw.loss_surface_figure(
            model, x[chosen], y[chosen], folder / "loss_surface.png", threat=threat, title=f"{name}: {where}", seed=seed
        ),
    ]
