"""
The checks of an audit: each a figure, a threshold that respects how many images there are, and what the figure means.

After Athalye et al. (2018), Carlini et al. (2019) and Tramer et al. (2020): signs of a network that hides its gradients rather than
resists. Two attacks are compared image by image (:mod:`art_saliency.evaluation.paired`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency.attacks import AdaptiveAttack, AttackLoss, cross_entropy, margin
from art_saliency.evaluation._audit_copies import Averaged, InTrainMode, Rescaled, SameNoise, smoothed_copy
from art_saliency.evaluation._audit_laboratory import Laboratory
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.evaluation.paired import Difference, paired_difference
from art_saliency.gradients import cosine
from art_saliency.threat import ThreatModel

PASS, SUSPICIOUS, MASKED, NOT_RUN = "pass", "suspicious", "masked", "not run"

RADII = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the accuracy-against-eps curve, in units of eps; the whole pixel range is added."""


@dataclass(frozen=True)
class Check:
    """
    One check.

    :ivar name: What is checked. :ivar status: ``"pass"``, ``"suspicious"``, ``"masked"`` or ``"not run"``.
    :ivar figure: What was found, in words. :ivar threshold: What would be suspicious or convict.
    :ivar meaning: In plain language. :ivar figures: The numbers, JSON-able.
    """

    name: str
    status: str
    figure: str
    threshold: str
    meaning: str
    figures: dict[str, Any] = field(default_factory=dict)


def _worse(*statuses: str) -> str:
    for status in (MASKED, SUSPICIOUS, PASS):
        if status in statuses:
            return status
    return NOT_RUN


@dataclass(frozen=True)
class Bounds:
    """
    From where on a difference that should not be above 0 is suspicious, and convicts.

    :ivar doubts: Suspicious at this difference or more, when its 95 % interval lies above 0.
    :ivar convicts: Masked when the whole interval lies above this.
    """

    doubts: float
    convicts: float

    def status(self, difference: Difference) -> str:
        """:return: What the difference means."""
        if difference.low > self.convicts:
            return MASKED
        return SUSPICIOUS if difference.low > 0 and difference.value >= self.doubts else PASS

    def __str__(self) -> str:
        return (
            f"suspicious: at least {100 * self.doubts:.0f} points with a 95 % interval above 0; masked: interval above "
            f"{100 * self.convicts:.0f} points"
        )


ORDERS = Bounds(doubts=0.02, convicts=0.05)
"""For two attacks of which one cannot honestly be the stronger: honest networks were seen up to 2 points apart."""
SCALE = Bounds(doubts=0.1, convicts=0.1)
"""For the cross-entropy of rescaled logits: another temperature was seen to find up to 6 points more on honest networks."""
GAP = Bounds(doubts=0.05, convicts=0.15)
"""For AutoAttack against PGD: it does find a few points more on an honest network."""


def _percent(scores: Tensor) -> str:
    return f"{100 * float(scores.mean()):.1f} %"


def _beats(
    name: str, ours: tuple[str, Tensor], other: tuple[str, Tensor], meaning: str, bounds: Bounds = ORDERS
) -> Check:
    """A check that an attack that should be weaker than `ours` is not stronger."""
    difference = paired_difference(ours[1], other[1])
    return Check(
        name,
        bounds.status(difference),
        f"{ours[0]} leaves {_percent(ours[1])}, {other[0]} {_percent(other[1])}: {difference}",
        str(bounds),
        meaning,
        {"difference": difference.value, "interval_95": [difference.low, difference.high]},
    )


def white_box(lab: Laboratory, scores: dict[str, Tensor]) -> Tensor:
    """Run the two strongest gradient attacks, once. :return: (N,) the score each image is left with by both."""
    for name, loss in (("PGD, cross-entropy", "cross-entropy"), ("PGD, margin", "margin")):
        if name not in scores:
            scores[name] = lab.under(name, lab.pgd(restarts=lab.restarts, loss=loss))
    return torch.minimum(scores["PGD, cross-entropy"], scores["PGD, margin"])


def _ours(lab: Laboratory) -> str:
    return f"PGD-{lab.budget.max_iter} x {lab.restarts} on cross-entropy and margin"


# --- the network itself ---------------------------------------------------------------------------------------------------


def determinism(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Whether the forward pass repeats, and whether an image's logits depend on its neighbours in the batch."""
    meaning = (
        "A network whose answer changes from pass to pass, or with the other images in the batch, can look robust because an attack "
        "that worked once fails on the next pass. Gradient attacks were averaged over passes; AutoAttack needs version 'rand'."
    )
    coupled = not lab.randomised and lab.alone > 1e-3
    status = SUSPICIOUS if lab.randomised or coupled else PASS
    said = (
        "two passes differ" if lab.randomised else "an image's logits depend on its batch" if coupled else "they agree"
    )
    figures = {"between_passes": lab.spread, "alone_and_in_a_batch": lab.alone}
    figure = f"{said} (largest relative difference {max(lab.spread, 0 if lab.randomised else lab.alone):.1e})"
    return [
        Check(
            "deterministic forward pass", status, figure, "suspicious above 1e-4 (1e-3 for the batch)", meaning, figures
        )
    ]


def zero_gradients(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Images, of those classified right, on which an attack has no direction to go in."""
    meaning = (
        "Where the gradient is exactly zero or not finite a gradient attack stands still and the image counts as robust. The margin "
        "loss has a gradient however large the logits are, so only its zeros convict; the cross-entropy's vanish with large logits."
    )
    name, threshold = "gradients exist", "margin: suspicious above 1 %, masked above 10 %, by the interval's lower end"
    if not lab.differentiable:
        return [
            Check(name, MASKED, "the logits have no gradient to the images at all", threshold, meaning, {"margin": 1.0})
        ]
    rows = lab.standing.nonzero()[:, 0].to(lab.x.device)
    shares, ends = {}, {}
    losses: dict[str, AttackLoss] = {"margin": margin, "cross-entropy": cross_entropy}
    for loss, function in losses.items():
        if not len(rows):
            return [Check(name, NOT_RUN, "no image is classified right", threshold, meaning)]
        gradient = lab.gradients(lab.x[rows], lab.y[rows], function).flatten(1)
        dead = int(((gradient == 0).all(1) | ~torch.isfinite(gradient).all(1)).sum())
        shares[loss], ends[loss] = dead / len(rows), binomial_interval(dead, len(rows))[0]
    status = MASKED if ends["margin"] > 0.1 else SUSPICIOUS if ends["margin"] > 0.01 else PASS
    figure = ", ".join(f"{loss}: none on {100 * share:.1f} % of images" for loss, share in shares.items())
    return [Check(name, status, figure, threshold, meaning, shares)]


def smoothness(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Loss linearity: whether the gradient says anything about the image's surroundings."""
    meaning = (
        "Gradients that change completely over a hundredth of the radius are shattered: each step of an attack is led astray. A sharp "
        "change over the whole radius is common in networks without defence; after single-step training it is a sign of overfitting."
    )
    threshold = "suspicious when the mean cosine over eps/100 is below 0.5"
    rows = lab.standing.nonzero()[:, 0].to(lab.x.device)
    if not lab.differentiable or not len(rows):
        return [Check("loss linearity", NOT_RUN, "no gradient, or no image classified right", threshold, meaning)]
    x, y = lab.x[rows], lab.y[rows]
    there = lab.gradients(x, y, margin)
    cosines = {}
    for share in (0.01, 1.0):
        ball = ThreatModel(lab.threat.norm, share * lab.threat.eps)
        moved = (x + ball.eps * ball.ascent_direction(there)).clamp(0, 1)
        cosines[f"{share:g} eps"] = float(cosine(there, lab.gradients(moved, y, margin)).mean())
    ball = ThreatModel(lab.threat.norm, 0.1 * lab.threat.eps)
    moved = (x + ball.eps * ball.ascent_direction(there)).clamp(0, 1)
    rise = margin(lab.logits(moved), y) - margin(lab.logits(x), y)
    foretold = ((moved - x) * there).flatten(1).sum(1)
    error = float((rise - foretold).abs().mean() / foretold.abs().mean().clamp_min(1e-12))
    status = SUSPICIOUS if cosines["0.01 eps"] < 0.5 else PASS
    said = ", ".join(f"{value:.2f} over {where}" for where, value in cosines.items())
    figure = f"mean cosine of the margin's gradients {said}; linear forecast over 0.1 eps wrong by {100 * error:.0f} %"
    return [Check("loss linearity", status, figure, threshold, meaning, {"cosine": cosines, "forecast_error": error})]


# --- gradient attacks against each other ----------------------------------------------------------------------------------


def plateau(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Whether many more steps still find something."""
    white = white_box(lab, scores)
    steps = lab.long * lab.budget.max_iter
    scores["PGD-20"] = lab.under("PGD-20", lab.pgd(max_iter=20))
    scores[f"PGD-{steps}"] = lab.under(f"PGD-{steps}", lab.pgd(max_iter=steps, loss="margin"))
    longest = torch.minimum(white, scores[f"PGD-{steps}"])
    meaning = (
        "An attack that still gains when it is given many times the steps has not converged, and the accuracy it leaves is too high: "
        "noisy or shattered gradients make it wander."
    )
    check = _beats("attacks have converged", (_ours(lab), white), (f"with PGD-{steps} on the margin", longest), meaning)
    check.figures["pgd_20"] = float(scores["PGD-20"].mean())
    return [check]


def single_step(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Whether one step does more than many, or a long step less than a short one."""
    shares = (0.25, 0.5, 0.75, 1.0)
    for share in shares:
        scores[f"FGSM at {share:g} eps"] = lab.under(f"FGSM at {share:g} eps", lab.fgsm(share))
    whole = scores["FGSM at 1 eps"]
    stronger = _beats(
        "one step does not beat many",
        (_ours(lab), white_box(lab, scores)),
        ("FGSM", whole),
        "Many small steps can do all that one large step does; where they do less, the gradients along the way lead astray.",
    )
    rises = {share: paired_difference(whole, scores[f"FGSM at {share:g} eps"]) for share in shares[:-1]}
    share = max(rises, key=lambda share: rises[share].low)
    figure = f"accuracy under a step of eps is above that under a step of {share:g} eps by {rises[share]}"
    distorted = Check(
        "a longer step does not help the network",
        ORDERS.status(rises[share]),
        figure,
        str(ORDERS),
        "A network that answers right after a step of the whole radius and wrong after a part of it has learnt the single step itself: "
        "catastrophic overfitting (Kim et al. 2021). Its accuracy against single steps says nothing.",
        {"accuracy": {f"{share:g}": float(scores[f"FGSM at {share:g} eps"].mean()) for share in shares}},
    )
    return [stronger, distorted, _overfitted(lab, whole, white_box(lab, scores))]


def _overfitted(lab: Laboratory, one: Tensor, many: Tensor) -> Check:
    """Whether the network withstands one step well and many not at all."""
    count = len(one)
    ends = {
        name: binomial_interval(round(float(score.sum())), count)
        for name, score in (("clean", lab.clean), ("one", one), ("many", many))
    }
    withstands = ends["one"][0] > _WITHSTANDS * float(lab.clean.mean())
    falls = {name: ends["many"][1] < share * ends["one"][0] for name, share in _FALLS.items()}
    status = MASKED if withstands and falls[MASKED] else SUSPICIOUS if withstands and falls[SUSPICIOUS] else PASS
    return Check(
        "what withstands one step withstands many",
        status,
        f"{_percent(lab.clean)} clean, {_percent(one)} after one step, {_percent(many)} after many",
        f"one step leaves over {100 * _WITHSTANDS:.0f} % of the clean accuracy; many leave less than a quarter (suspicious) or an eighth "
        "(masked) of what one does; by the intervals' ends",
        "A network that keeps much of its accuracy under one step and loses it to many small ones is flat at the images alone: after "
        "single-step training, catastrophic overfitting (Wong et al. 2020); after gradient regularisation, a penalty that reaches no "
        "further than the images. Its accuracy against single steps says nothing.",
        {"clean": float(lab.clean.mean()), "one": float(one.mean()), "many": float(many.mean())},
    )


# An undefended network on MNIST keeps half of its accuracy under one step where many leave a fifth of that (eps 0.1), and less
# under one step where many leave less (0.125: a third, and a sixteenth); adversarial training keeps over half of it.
_WITHSTANDS = 0.4
_FALLS = {SUSPICIOUS: 1 / 4, MASKED: 1 / 8}


def random_noise(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Whether blind guessing does more than gradients."""
    scores["random noise"] = lab.under("random noise", lab.noise)
    return [
        _beats(
            "gradients beat random noise",
            (_ours(lab), white_box(lab, scores)),
            (f"the worst of {lab.budget.noise_draws} random perturbations", scores["random noise"]),
            "An attack that knows the network must do more harm than one that guesses.",
        )
    ]


def radius(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Accuracy against eps: down to about 0, and never up."""
    whole = 1.0 if lab.threat.norm == "Linf" else math.sqrt(lab.x[0].numel())
    steps = min(50, lab.budget.max_iter)
    radii = sorted({min(share * lab.threat.eps, whole) for share in RADII} | {whole})
    curve = {}
    for eps in radii:
        ball = ThreatModel(lab.threat.norm, eps)
        parts = [
            lab.under(f"PGD-{steps} at eps {eps:g}", lab.pgd(threat=ball, max_iter=steps, loss=loss))
            for loss in ("cross-entropy", "margin")
        ]
        curve[eps] = torch.minimum(*parts)
    left = curve[whole]
    low = binomial_interval(round(float(left.sum())), len(left))[0]
    rises = [paired_difference(curve[b], curve[a]) for a, b in pairwise(radii)]
    rise = max(rises, key=lambda difference: difference.low)
    figures = {"accuracy": {f"{eps:.6g}": float(score.mean()) for eps, score in curve.items()}}
    status = MASKED if low > ORDERS.convicts else SUSPICIOUS if low > ORDERS.doubts else PASS
    return [
        Check(
            "accuracy falls to 0 as eps grows",
            status,
            f"{_percent(left)} at eps {whole:.3g}, the whole pixel range",
            f"suspicious: interval above {100 * ORDERS.doubts:.0f} %; masked: above {100 * ORDERS.convicts:.0f} %",
            "With the whole range any image can be turned into any other, so nothing can be left but what an attack fails to find.",
            figures,
        ),
        Check(
            "accuracy never rises with eps",
            ORDERS.status(rise),
            f"largest rise from one radius to the next: {rise}",
            str(ORDERS),
            "A larger ball holds the smaller one; an attack that does worse in it was led astray by the gradients.",
            figures,
        ),
    ]


def logit_scale(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Whether the cross-entropy attack is held up by nothing but the size of the logits."""
    plain = lab.under("PGD-20", lab.pgd(max_iter=20)) if "PGD-20" not in scores else scores["PGD-20"]
    network = Averaged(lab.model, lab.budget.eot) if lab.randomised else lab.model
    divisor = max(lab.gap, 1e-12)
    scores["PGD-20, logits rescaled"] = lab.under(
        "PGD-20, logits rescaled", lab.pgd(model=Rescaled(network, divisor), max_iter=20)
    )
    # A cross-entropy that is merely sharp costs an honest attack a few points; one that underflows costs it everything.
    return [
        _beats(
            "the size of the logits hides nothing",
            ("PGD-20 on the cross-entropy", plain),
            (f"the same with logits divided by {divisor:.3g}", scores["PGD-20, logits rescaled"]),
            "Dividing the logits changes no decision. When it helps an attack, the cross-entropy's gradient had vanished under large "
            "logits, and every figure that rests on it is too high.",
            SCALE,
        )
    ]


# --- other views of the network -------------------------------------------------------------------------------------------


def other_views(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """Attacks through the network in train mode and through a smoothed copy, carried over to the network as it is deployed."""
    white = (_ours(lab), white_box(lab, scores))
    checks = []
    try:
        in_train, smooth = InTrainMode(lab.model), smoothed_copy(lab.model)
    except Exception as error:  # what cannot be copied is audited without copies
        said = f"the network cannot be copied: {str(error).splitlines()[0][:160]}"
        return [Check("copies of the network", NOT_RUN, said, str(ORDERS), "Attacks through copies were left out.")]
    views: tuple[tuple[str, nn.Module | None, str], ...] = (
        (
            "train and eval mode agree",
            None if _same(lab, in_train) else in_train,
            "A defence that is switched on in eval mode alone is got around through the network in train mode.",
        ),
        (
            "a smoothed copy is no better to attack",
            smooth,
            "With kinks rounded off a gradient sees further; when the images it finds also fool the network itself, the network's own "
            "gradients hide them.",
        ),
    )
    for name, view, meaning in views:
        if view is None:
            said = "both modes compute the same" if "train" in name else "no activation module with a kink"
            checks.append(Check(name, PASS if "train" in name else NOT_RUN, said, str(ORDERS), meaning))
            continue
        try:
            scores[name] = lab.under(name, _both_losses(lab, view))
        except Exception as error:  # a network need not work in train mode on its own; that is no verdict
            checks.append(Check(name, NOT_RUN, f"failed: {str(error).splitlines()[0][:160]}", str(ORDERS), meaning))
            continue
        checks.append(_beats(name, white, ("the attack on the copy", scores[name]), meaning))
    return checks


def _same(lab: Laboratory, view: nn.Module) -> bool:
    """:return: Whether another view of the network gives the same logits; one that fails to does not."""
    try:
        with torch.no_grad():
            return torch.equal(view(lab.x[: lab.batch_size]), lab.model(lab.x[: lab.batch_size]))
    except Exception:
        return False


def _both_losses(lab: Laboratory, view: nn.Module) -> Any:
    """:return: The worse, for the deployed network, of the attacks on cross-entropy and margin through a view of it."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        first, second = (lab.pgd(model=view, loss=loss)(x, y) for loss in ("cross-entropy", "margin"))
        better = margin(lab.logits(first), y) > margin(lab.logits(second), y)
        return torch.where(better.view(-1, *[1] * (x.ndim - 1)), first, second)

    return attack


def black_box(
    lab: Laboratory, scores: dict[str, Tensor], square: Tensor | None, transferred: Tensor | None
) -> list[Check]:
    """Whether an attack that sees answers only, or other networks only, does more than one that sees everything."""
    white, checks = (_ours(lab), white_box(lab, scores)), []
    for name, found, words in (
        ("gradients beat queries", square, f"Square with {lab.budget.square_queries} queries"),
        ("gradients beat transfer", transferred, "attacks transferred from other networks"),
    ):
        meaning = (
            "Whoever knows the network can do all that an outsider can. Where the outsider does more, the gradients were masked: "
            "the sign by which most broken defences were found."
        )
        if found is None:
            checks.append(Check(name, NOT_RUN, "not measured", str(ORDERS), meaning))
            continue
        scores[words] = torch.minimum(found.double(), lab.clean)
        checks.append(_beats(name, white, (words, scores[words]), meaning))
    return checks


def autoattack_gap(lab: Laboratory, scores: dict[str, Tensor], found: Tensor | None, words: str) -> list[Check]:
    """Whether AutoAttack finds much that PGD does not."""
    name, meaning = (
        "PGD comes near AutoAttack",
        "AutoAttack adapts its step and tries every other class as a target, so it finds a little more. Much more means that plain "
        "gradient attacks, and any figure that rests on them, are led astray.",
    )
    if found is None:
        return [Check(name, NOT_RUN, "not measured", str(ORDERS), meaning)]
    scores[words] = torch.minimum(found.double(), lab.clean)
    return [_beats(name, (_ours(lab), white_box(lab, scores)), (words, scores[words]), meaning, GAP)]


def adaptive(lab: Laboratory, scores: dict[str, Tensor], variants: Mapping[str, AdaptiveAttack]) -> list[Check]:
    """Attacks that were made for this very defence."""
    white, checks = (_ours(lab), white_box(lab, scores)), []

    def inner(model: nn.Module, x: Tensor, y: Tensor, loss: AttackLoss | None = None) -> Tensor:
        return lab.pgd(model=model, loss="cross-entropy" if loss is None else loss)(x, y)

    for variant, attack in variants.items():
        name = f"adaptive: {variant}"
        scores[name] = lab.under(name, lambda x, y, attack=attack: attack(lab.model, x, y, inner))  # type: ignore[misc]
        meaning = "An attack that knows the defence must not do much more than one that does not: it would show what the defence hides."
        checks.append(_beats(name, white, ("this attack", scores[name]), meaning))
    return checks


def _with_known_noise(lab: Laboratory) -> Tensor:
    """:return: (N,) scores under PGD on the margin when every pass, the scored one included, draws the same numbers."""
    known, score = SameNoise(lab.model, lab.seed), torch.zeros(len(lab.x), dtype=torch.float64)
    attack = lab.pgd(model=known, loss="margin")
    for rows in torch.split(torch.arange(len(lab.x)), lab.batch_size):
        x, y = lab.x[rows.to(lab.x.device)], lab.y[rows.to(lab.x.device)]
        x_adv = attack(x, y)
        with torch.no_grad():
            right = (known(x).argmax(1) == y) & (known(x_adv).argmax(1) == y)
        score[rows] = right.double().cpu()
    return torch.minimum(score, lab.clean)


def randomness(lab: Laboratory, scores: dict[str, Tensor]) -> list[Check]:
    """For a network that answers at random: what averaging its gradients adds."""
    if not lab.randomised:
        return []
    steps = lab.budget.max_iter
    once = lab.under("one pass a gradient", lab.pgd(model=lab.model, max_iter=20))
    scores["PGD-20, one pass a gradient"] = once
    scores["noise known to the attacker"] = known = _with_known_noise(lab)
    return [
        _beats(
            "nothing rests on noise that the attacker cannot know",
            ("the attack that averages over the noise", white_box(lab, scores)),
            ("one that knows the noise of the very pass that is scored", known),
            "What is right under noise drawn anew and wrong once the noise is known was not resisted: it was missed. A random "
            "network's accuracy under averaged gradients overstates how far its images are from the decision boundary.",
        ),
        _beats(
            "averaging over the randomness adds nothing",
            ("PGD-20 with one pass a gradient", once),
            (f"PGD-{steps} with {lab.budget.eot} passes a gradient", white_box(lab, scores)),
            "Noise that is drawn anew in each pass blurs the gradient. Where averaging it away fools many more images, the noise hid "
            "them and did not protect them.",
        ),
    ]
