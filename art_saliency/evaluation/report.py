"""One evaluation of one network: everything this package can measure, as JSON, Markdown and figures. See ``report.md``."""

from __future__ import annotations

import dataclasses
import json
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
from art_saliency.evaluation._audit_gradients import curve_steps
from art_saliency.evaluation._autoattack_backend import find_backend
from art_saliency.evaluation._inputs import checked, placed, refuse_double
from art_saliency.evaluation._report_page import Evaluation, page_of, row
from art_saliency.evaluation.accuracy import accuracy, pgd_accuracy
from art_saliency.evaluation.audit import AuditBudget, AuditReport, audit, check_radius
from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
from art_saliency.evaluation.corruption_arrays import array_corruption_accuracy, open_corruption_arrays
from art_saliency.evaluation.corruptions import CorruptionResult, check_corruptible, corruption_accuracy
from art_saliency.evaluation.figures import saliency_panel
from art_saliency.evaluation.report_text import markdown
from art_saliency.evaluation.saliency import SaliencyReport, saliency_report
from art_saliency.evaluation.transfer import TransferResult, transfer
from art_saliency.files import appearing, sha256_of_tensors, write_file
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel

__all__ = ["SCHEMA", "STEPS", "Report", "check_feasible", "full_report"]

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
        :raises CheckpointError: When it cannot be written there.
        """
        with appearing(Path(folder), force=force) as made:
            (made / "figures").mkdir()
            figures = [path.relative_to(made) for path in self.draw_figures(made / "figures")]
            write_file(made / "report.json", lambda file: file.write(json.dumps(self.page, indent=1).encode()))
            text = markdown(self.page, figures)
            write_file(made / "report.md", lambda file: file.write(text.encode()))
        return Path(folder)


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
    :param corrupt: Whether those are made; they need scikit-image, and images of 1 or 3 channels.
    :param version: Of AutoAttack. :param batch_size: Images at once. :param seed: Of everything random.
    :param state_dir: Where AutoAttack keeps what it finished, so that an interrupted report continues there.
    :param progress: Whether bars are shown on stderr: the parts, and below them the part at work.
    :return: The report.
    """
    threat = ThreatModel(norm, _checks.real("eps", eps, above=0))
    some = slice(0, _checks.whole("audit_images", audit_images, least=1))
    few = slice(0, _checks.whole("saliency_images", saliency_images, least=1))
    batch_size, seed = _checks.whole("batch_size", batch_size, least=1), _checks.seed(seed)
    of = Evaluation(model, *placed(model, x, y), threat, batch_size, seed, progress)
    refuse_double(of.x)
    check_feasible(model, of.x.shape[1:], corrupt=corrupt, corruption_folder=corruption_folder)
    check_radius(threat, of.x)
    ball: dict[str, Any] = {"eps": eps, "norm": norm}
    with _parts(progress, 7) as part:
        plain = part("clean and PGD", lambda: _plain(of))
        attacked = part(
            "AutoAttack",
            lambda: autoattack(model, of.x, of.y, version=version, state_dir=state_dir, **ball, **of.options()),
        )
        transferred = part("transfer", lambda: _transfer(of, surrogates))
        evidence: dict[str, Any] = {
            "autoattack_result": _first(attacked, of, some),
            "transferred": None if transferred is None else transferred.correct[some],
            "variants": variants,
        }
        audited = part(
            "audit",
            lambda: audit(model, of.x[some], of.y[some], budget=budget, **evidence, **ball, **of.options()),
        )
        corrupted = part("corruptions", lambda: _corruptions(of, corrupt))
        from_arrays = part("corruption arrays", lambda: _from_arrays(of, corruption_folder))
        x_adv = pgd(model, of.x[few], of.y[few], threat=threat, max_iter=20, random=RandomSource(seed, of.x.device))
        explained = part("saliency", lambda: saliency_report(model, of.x[few], of.y[few], x_adv, seed=seed))
    page = page_of(
        of,
        attacked,
        audited,
        head={"schema": SCHEMA, "art_saliency": __version__, "network": name, "data": data_name},
        plain=plain,
        parts={
            "transfer": transferred,
            "corruptions": corrupted,
            "corruption_arrays": from_arrays,
            "saliency": explained,
        },
    )
    return Report(
        page, attacked, audited, transferred, explained, corrupted, lambda folder: _figures(folder, of, x_adv, page)
    )


def check_feasible(
    model: nn.Module, shape: tuple[int, ...], *, corrupt: bool = True, corruption_folder: str | Path | None = None
) -> None:
    """
    Refuse, before hours of attacks, what a later part of :func:`full_report` or its figures would refuse.

    :param shape: (C, H, W) of the images. The other parameters are those of :func:`full_report`.
    :raises MissingDependencyError: When a package is missing that a part needs.
    :raises InputError: When images cannot be corrupted, or the arrays are none of the network's images and classes.
    """
    find_backend()
    _checks.optional("matplotlib", "eval", "Drawing a figure")
    _checks.optional("captum.metrics", "explain", "The sensitivity of a saliency map")
    if corrupt:
        check_corruptible(shape[0], remedy="say corrupt=False to leave the corruptions out")
    if corruption_folder is not None:
        arrays = open_corruption_arrays(corruption_folder, shape=shape)
        checked(model, arrays.block(next(iter(arrays.images)), 1), arrays.labels)


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


def _plain(of: Evaluation) -> dict[str, dict[str, Any]]:
    """:return: Clean accuracy, PGD-20, and accuracy against steps."""
    steps = {
        n: pgd_accuracy(of.model, of.x, of.y, threat=of.threat, max_iter=n, batch_size=of.batch_size, seed=of.seed)
        for n in STEPS
    }
    return {
        "clean": row(accuracy(of.model, of.x, of.y, batch_size=of.batch_size), len(of.x)),
        "pgd20": row(steps[20], len(of.x)),
        "accuracy_against_steps": {str(n): row(share, len(of.x)) for n, share in steps.items()},
    }


def _first(result: AutoAttackResult, of: Evaluation, some: slice) -> AutoAttackResult:
    """:return: The result of the first images: what AutoAttack did to each is the same, whatever is counted."""
    fingerprint = sha256_of_tensors({"x": of.x[some].cpu(), "y": of.y[some].cpu()})
    return dataclasses.replace(result, x_adv=result.x_adv[some], correct=result.correct[some], data_sha256=fingerprint)


def _transfer(of: Evaluation, surrogates: Mapping[str, nn.Module] | None) -> TransferResult | None:
    if not surrogates:
        return None
    return transfer(of.model, of.x, of.y, surrogates=surrogates, threat=of.threat, **of.options())


def _corruptions(of: Evaluation, wanted: bool) -> CorruptionResult | None:
    return corruption_accuracy(of.model, of.x, of.y, **of.options()) if wanted else None


def _from_arrays(of: Evaluation, folder: str | Path | None) -> CorruptionResult | None:
    return (
        None
        if folder is None
        else array_corruption_accuracy(of.model, folder, batch_size=of.batch_size, progress=of.progress)
    )


def _figures(folder: Path, of: Evaluation, x_adv: Tensor, page: dict[str, Any]) -> list[Path]:
    model, x, y, threat = of.model, of.x, of.y, of.threat
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
            title=f"{name}: accuracy against the radius ({page['data']}, PGD-{curve_steps(page['audit']['budget']['max_iter'])})",
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
            model,
            x[chosen],
            y[chosen],
            folder / "loss_surface.png",
            threat=threat,
            title=f"{name}: {where}",
            seed=of.seed,
        ),
    ]
