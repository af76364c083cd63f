"""Does a network resist attacks, or does it hide its gradients from them? Checks with evidence, and a verdict."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, AttackLoss, InnerAttack
from art_saliency.evaluation import _audit_gradients as gradients
from art_saliency.evaluation import _audit_others as others
from art_saliency.evaluation._audit_check import MASKED, NOT_RUN, ORDERS, PASS, SUSPICIOUS, Check
from art_saliency.evaluation._audit_laboratory import AuditBudget, Laboratory
from art_saliency.evaluation._autoattack_guard import process_kept
from art_saliency.evaluation._autoattack_memory import weights_sha256
from art_saliency.evaluation._autoattack_plan import in_words, square_needs
from art_saliency.evaluation._inputs import placed, refuse_double
from art_saliency.evaluation.accuracy import with_interval
from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
from art_saliency.evaluation.paired import paired_difference
from art_saliency.evaluation.table import markdown_table, percent
from art_saliency.evaluation.transfer import transfer
from art_saliency.files import sha256_of_tensors
from art_saliency.randomness import seed_everything
from art_saliency.threat import ThreatModel

__all__ = [
    "THIN",
    "TOO_FEW",
    "VERDICTS",
    "AuditBudget",
    "AuditReport",
    "Check",
    "audit",
    "check_radius",
    "collect_variants",
]

VERDICTS = {
    PASS: "consistent with true robustness",
    SUSPICIOUS: "suspicious",
    MASKED: "masked",
}
"""What the worst check's status makes of the whole. 'Consistent' is no proof: no set of attacks is."""


@dataclass(frozen=True)
class AuditReport:
    """
    What an audit found.

    :ivar verdict: A value of :data:`VERDICTS`, after :data:`TOO_FEW` where so few images are right that no difference between
        attacks convicts, unless the gradients alone do; where nothing was found but decisive checks could not be made, *consistent*
        goes on with :data:`THIN` and what is missing. :ivar reasons: Names of the checks that decided it; empty when none did.
    :ivar missing: What of the decisive evidence there is not, in words.
    :ivar checks: All of them. :ivar accuracies: Accuracy under each attack that ran, 0 to 1, with its 95 % interval.
    :ivar count: Images. :ivar smallest: The smallest difference, 0 to 1, that could have convicted with so many images.
    :ivar eps: In units of the [0, 1] pixel range. :ivar norm: ``"Linf"`` or ``"L2"``.
    """

    verdict: str
    reasons: list[str]
    missing: list[str]
    checks: list[Check]
    accuracies: dict[str, dict[str, Any]]
    count: int
    smallest: float
    eps: float
    norm: str
    budget: dict[str, int]
    seed: int
    batch_size: int
    weights_sha256: str
    data_sha256: str
    versions: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """:return: Everything, JSON-able."""
        return asdict(self)

    def to_markdown(self) -> str:
        """:return: The verdict, a table of the checks and what those that did not pass mean."""
        lines = [f"**Verdict: {self.verdict}**" + (f" ({'; '.join(self.reasons)})" if self.reasons else "")]
        lines += [
            "",
            f"{self.count} images, {self.norm} eps {self.eps:g}; with so many, a difference below "
            f"{percent(self.smallest)} points cannot convict. {_CAUTION}",
            "",
            *([f"Missing: {'; '.join(self.missing)}.", ""] if self.missing else []),
            markdown_table(("check", "status", "found"), [(c.name, c.status, c.figure) for c in self.checks], left=3),
        ]
        lines += [f"\n{c.name} ({c.threshold}). {c.meaning}" for c in self.checks if c.status in (SUSPICIOUS, MASKED)]
        return "\n".join(lines)


TOO_FEW = "too few images to tell"
"""What a verdict says first that no comparison of attacks could have turned into a conviction."""

THIN = "on thin evidence"
"""What a verdict of *consistent* says last, with what is missing: that no sign was found says little where none could show."""

_BLACK_BOX = {"gradients beat queries", "gradients beat transfer"}
_DECISIVE = {
    "gradients exist",
    "loss linearity",
    "gradients foretell small changes",
    "accuracy falls to 0 as eps grows",
    "copies of the network",
    "nothing rests on noise that the attacker cannot know",
}
# Missing by design, and no gap: what a random network is asked in another way, a smoothed copy of what has no kink, figures not given.

_CAUTION = "'Consistent' means that no sign of masking was found, which no set of attacks turns into a proof."


def audit(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    eps: float,
    norm: str = "Linf",
    autoattack_result: AutoAttackResult | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    transferred: Tensor | None = None,
    variants: Mapping[str, AdaptiveAttack] | None = None,
    budget: AuditBudget | None = None,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """
    Look for masked gradients.

    The network and the process are left as they were: modes, gradients and their flags, random states.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode.
    :param x: (N, C, H, W) in [0, 1] or uint8: images that it was not trained on, 100 at least for a verdict that means much.
    :param y: (N,) int64, or one-hot rows. :param eps: Radius, in units of the [0, 1] pixel range. :param norm: ``"Linf"`` or ``"L2"``.
    :param autoattack_result: Of these images at this radius; ``None`` leaves the comparison with AutoAttack out.
    :param surrogates: Other networks for transferred attacks, by name. :param transferred: (N,) bool, what
        :attr:`~art_saliency.evaluation.transfer.TransferResult.correct` of these images already holds.
    :param variants: Attacks made for the defence, as an objective's ``adaptive_variants()``; those of the network's own layers
        are found.
    :param budget: How hard to try. :param batch_size: Images at once. :param seed: Of everything random.
    :param progress: Whether a bar is shown on stderr.
    :return: The report.
    :raises UnsupportedModelError: When the network's weights are not float32.
    :raises MissingDependencyError: When no distribution of AutoAttack is installed: Square is its authors'.
    """
    threat = ThreatModel(norm, _checks.real("eps", eps, above=0))
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    seed = _checks.seed(seed)
    budget, began = budget or AuditBudget(), time.perf_counter()
    images, labels = placed(model, x, y)
    refuse_double(images)
    check_radius(threat, images)
    fingerprint = sha256_of_tensors({"x": images.cpu(), "y": labels.cpu()})
    found = _of_these(autoattack_result, fingerprint, threat)
    variants = {**collect_variants(model), **(variants or {})}
    if transferred is not None:
        transferred = _one_each(transferred, len(images))
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": False}
    needed = square_needs(threat, images)
    square = (
        autoattack(
            model,
            images,
            labels,
            eps=eps,
            norm=norm,
            version="custom",
            attacks=["square"],
            square_queries=budget.square_queries,
            **options,
        )
        if needed is None
        else None
    )
    if surrogates and transferred is None:
        transferred = transfer(model, images, labels, surrogates=surrogates, threat=threat, **options).correct
    with process_kept(model, {}), tqdm(desc="audit", unit="check", disable=not progress, leave=None) as bar:
        seed_everything(seed)
        lab = Laboratory(model, images, labels, threat, budget, batch_size=batch_size, seed=seed, bar=bar)
        words = "AutoAttack" if found is None else f"AutoAttack ({in_words(found.version, found.deviations)})"
        steps: list[Callable[[Laboratory], list[Check]]] = [
            *_STEPS,
            partial(others.black_box, square=_scored(lab, square), transferred=transferred, needed=needed),
            partial(others.autoattack_gap, found=_scored(lab, found), words=words),
            lambda _: others.square_in_autoattack(found) + others.autoattack_warns(found, square),
            partial(others.adaptive, variants=variants),
        ]
        bar.total = len(steps)
        outcome: list[Check] = []
        for step in steps:
            outcome += step(lab)
            bar.update()
    missing = _missing(outcome, randomised=lab.randomised)
    status = next((s for s in (MASKED, SUSPICIOUS) if s in [c.status for c in outcome]), PASS)
    smallest = _smallest_conviction(len(images))
    too_few = status != MASKED and smallest > float(lab.clean.mean()) + 1e-9  # no attack can take more than is right
    return AuditReport(
        verdict=_verdict(status, missing, too_few=too_few),
        reasons=[c.name for c in outcome if c.status == status != PASS],
        missing=missing,
        checks=outcome,
        accuracies={lab.title(name): _with_interval(score) for name, score in lab.scores.items()},
        count=len(images),
        smallest=smallest,
        eps=threat.eps,
        norm=norm,
        budget=asdict(budget),
        seed=seed,
        batch_size=batch_size,
        weights_sha256=weights_sha256(model),
        data_sha256=fingerprint,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        seconds=time.perf_counter() - began,
    )


_STEPS = (
    others.determinism,
    gradients.zero_gradients,
    gradients.smoothness,
    gradients.true_gradients,
    gradients.boundary,
    gradients.plateau,
    gradients.single_step,
    gradients.random_noise,
    gradients.logit_scale,
    gradients.radius,
    others.other_views,
    others.randomness,
)


def _missing(checks: list[Check], *, randomised: bool) -> list[str]:
    """:return: What of the decisive evidence could not be had, in words."""
    left_out = [check.name for check in checks if check.status == NOT_RUN]
    found = ["no black-box attack was run"] if set(left_out) >= _BLACK_BOX else []
    asked = _DECISIVE - ({"gradients foretell small changes"} if randomised else set())
    return found + [f"not run: {name}" for name in left_out if name in asked]


def _verdict(status: str, missing: list[str], *, too_few: bool) -> str:
    if too_few:
        return f"{TOO_FEW}; {VERDICTS[status]}"
    thin = f", {THIN}: {'; '.join(missing)}" if missing and status == PASS else ""
    return f"{VERDICTS[status]}{thin}"


def _scored(lab: Laboratory, result: AutoAttackResult | None) -> Tensor | None:
    """:return: (N,) scores of AutoAttack's images: its own count, or over repeated passes of a network that answers at random."""
    if result is None:
        return None
    return lab.score(result.x_adv.to(lab.x)) if lab.randomised else result.correct


def collect_variants(model: nn.Module) -> dict[str, AdaptiveAttack]:
    """
    The attacks that a network's own layers publish by ``adaptive_variants()``.

    :param model: The network. :return: By name; several layers' attacks of one name are made at once.
    """
    found: dict[str, list[AdaptiveAttack]] = {}
    for module in model.modules():
        publish = getattr(module, "adaptive_variants", None)
        for name, attack in (publish() if callable(publish) else {}).items():
            found.setdefault(name, []).append(attack)
    return {name: reduce(_both, attacks) for name, attacks in found.items()}


def _both(first: AdaptiveAttack, second: AdaptiveAttack) -> AdaptiveAttack:
    """:return: One attack inside the other; where both bring a loss, the sum is maximised."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, inner: InnerAttack) -> Tensor:
        def within(model: nn.Module, x: Tensor, y: Tensor, loss: AttackLoss | None = None) -> Tensor:
            def innermost(model: nn.Module, x: Tensor, y: Tensor, other: AttackLoss | None = None) -> Tensor:
                return inner(model, x, y, _sum_of([part for part in (loss, other) if part is not None]))

            return second(model, x, y, innermost)

        return first(model, x, y, within)

    return attack


def _sum_of(losses: list[AttackLoss]) -> AttackLoss | None:
    return (lambda logits, y: torch.stack([loss(logits, y) for loss in losses]).sum(0)) if losses else None


def _of_these(result: AutoAttackResult | None, fingerprint: str, threat: ThreatModel) -> AutoAttackResult | None:
    """:return: The result, when it is of these very images at this radius."""
    if result is None:
        return None
    if result.data_sha256 != fingerprint or (result.norm, result.eps) != (threat.norm, threat.eps):
        raise _checks.refuse(
            "autoattack_result",
            f"one of other images, or at {result.norm} eps {result.eps:g}",
            f"one of these images at {threat.norm} eps {threat.eps:g}",
            "run autoattack() with the same x, y, eps and norm",
        )
    return result


def check_radius(threat: ThreatModel, images: Tensor) -> None:
    """Refuse a radius beyond the pixel range's diameter, (N, C, H, W) given: every radius of a curve would be the same."""
    whole = gradients.diameter(threat, images)
    _checks.real("eps", threat.eps, most=whole, above=0, remedy="no two images of that size are further apart")


def _one_each(transferred: Tensor, count: int) -> Tensor:
    """:return: (N,) on the CPU."""
    found = _checks.as_tensor("transferred", transferred).cpu()
    if found.shape != (count,):
        remedy = "hand over what attacks transferred to these very images have left"
        raise _checks.refuse("transferred", f"shape {tuple(found.shape)}", f"({count},), one for each image", remedy)
    return found


def _with_interval(score: Tensor) -> dict[str, Any]:
    return {**with_interval(float(score.mean()), len(score)), "count": len(score)}


def _smallest_conviction(count: int) -> float:
    """:return: The smallest difference that convicts when no image points the other way; above 1 when none can."""
    for wrong in range(count + 1):
        scores = torch.zeros(count)
        scores[:wrong] = 1
        if ORDERS.status(paired_difference(scores, torch.zeros(count))) == MASKED:
            return wrong / count
    return (count + 1) / count
