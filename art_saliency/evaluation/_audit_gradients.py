"""
An audit's checks of the gradients themselves: whether there are any, and whether attacks along them do what they must.

After Athalye et al. (2018) and Carlini et al. (2019): signs of a network that hides its gradients rather than resists.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from art_saliency.attacks import AttackLoss, cross_entropy, margin
from art_saliency.evaluation._audit_check import MASKED, NOT_RUN, ORDERS, PASS, SCALE, SUSPICIOUS, Check, beats, percent
from art_saliency.evaluation._audit_copies import Averaged, Rescaled
from art_saliency.evaluation._audit_laboratory import Laboratory
from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.evaluation.paired import paired_difference
from art_saliency.gradients import cosine
from art_saliency.modes import full_float32
from art_saliency.randomness import RandomSource, normal, uniform
from art_saliency.threat import ThreatModel

RADII = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the accuracy-against-eps curve, in units of eps; the whole pixel range is added."""


def zero_gradients(lab: Laboratory) -> list[Check]:
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


def smoothness(lab: Laboratory) -> list[Check]:
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
        cosines[f"{share:g} eps"] = _mean_cosine(there, lab.gradients(moved, y, margin))
    ball = ThreatModel(lab.threat.norm, 0.1 * lab.threat.eps)
    moved = (x + ball.eps * ball.ascent_direction(there)).clamp(0, 1)
    rise = margin(lab.logits(moved), y) - margin(lab.logits(x), y)
    foretold = ((moved - x) * there).flatten(1).sum(1)
    error = _finite((rise - foretold).abs().mean() / foretold.abs().mean().clamp_min(1e-12))
    near = cosines["0.01 eps"]
    status = NOT_RUN if near is None else SUSPICIOUS if near < 0.5 else PASS
    said = ", ".join(f"{'none' if value is None else f'{value:.2f}'} over {where}" for where, value in cosines.items())
    wrong = "not to be had" if error is None else f"wrong by {100 * error:.0f} %"
    figure = f"mean cosine of the margin's gradients {said}; linear forecast over 0.1 eps {wrong}"
    if None in (*cosines.values(), error):
        figure += " (gradients or logits are not finite)"
    return [Check("loss linearity", status, figure, threshold, meaning, {"cosine": cosines, "forecast_error": error})]


def true_gradients(lab: Laboratory) -> list[Check]:
    """Whether what autograd returns is the gradient of the function that is attacked: at the images, and where attacks walk."""
    name = "gradients foretell small changes"
    threshold = f"suspicious when the forecast's mean error is above {_ASTRAY:.0%} of the mean change"
    meaning = (
        "A part of the network that is detached, or stands in for another in the backward pass, leaves gradients that are large, smooth and "
        "of another function: attacks follow them past the errors that are there. Some do so only beside the images."
    )
    rows = lab.standing.nonzero()[:, 0].to(lab.x.device)
    if lab.randomised or not lab.differentiable or not len(rows):
        said = "a random network" if lab.randomised else "no gradient, or no image classified right"
        return [Check(name, NOT_RUN, said, threshold, meaning)]
    random = RandomSource(lab.seed, lab.x.device)
    around = lab.threat.random_start(lab.x[rows], random)
    errors = {
        "at the images": _astray(lab, lab.x[rows], rows, random),
        "around them": _astray(lab, around, rows, random),
    }
    said = " and ".join(
        f"not to be had {place} (gradients or logits are not finite)"
        if error is None
        else f"wrong by {100 * error:.0f} % {place}"
        for place, error in errors.items()
    )
    status = NOT_RUN if None in errors.values() else PASS
    if any(error is not None and error > _ASTRAY for error in errors.values()):
        status = SUSPICIOUS
    figure = f"linear forecast along {_DIRECTIONS} random directions {said}"
    figures = {"forecast_error": errors["at the images"], "forecast_error_around": errors["around them"]}
    return [Check(name, status, figure, threshold, meaning, figures)]


def _astray(lab: Laboratory, x: Tensor, rows: Tensor, random: RandomSource) -> float | None:
    """:return: The mean error of the margin's linear forecast over small random steps from images, relative to the mean change."""
    y, changes, errors = lab.y[rows], [], []
    there = lab.gradients(x, y, margin)
    length = min(1e-3, 0.06 / math.sqrt(x[0].numel()))  # of a step, a pixel: far below every radius, far above rounding
    with full_float32():
        for _ in range(_DIRECTIONS):
            step = length * normal(x, random)
            change = margin(lab.logits(x + step), y) - margin(lab.logits(x - step), y)
            changes.append(change.abs().mean())
            errors.append((change - 2 * (there * step).flatten(1).sum(1)).abs().mean())
    return _finite(torch.stack(errors).mean() / torch.stack(changes).mean().clamp_min(1e-30))


# Of networks on digits, defended and not, whatever their activation, 0 to 2 %; of one with most of its input detached, or with
# activations that jump, 77 to 99 %.
_ASTRAY, _DIRECTIONS = 0.5, 4


def boundary(lab: Laboratory) -> list[Check]:
    """Whether the margin says how near the decision boundary is: on the way to an image of another class it must come to 0."""
    name = "margins lead to the boundary"
    threshold = f"suspicious when, in the median, over {_LEAP:.0%} of the way's whole rise lies in the 1/{2**_HALVINGS} of it that holds the boundary"
    meaning = (
        "Attacks climb the margin to where the decision changes. One that leaps there, as after an argmax or under a steep squashing of "
        "the logits, says nothing before it, and what gradients and queries climb may be something else that was added to it."
    )
    rows = lab.standing.nonzero()[:_PAIRS, 0].to(lab.x.device)
    others = lab.logits(lab.x).argmax(1)[None] != lab.y[rows][:, None]
    if lab.randomised or not len(rows) or not bool(others.any(1).all()):
        said = "a random network" if lab.randomised else "no images that are given two classes, one of them right"
        return [Check(name, NOT_RUN, said, threshold, meaning)]
    x, y = lab.x[rows], lab.y[rows]
    # of each image one of another class, by lot
    end = lab.x[(others * (0.5 + uniform(others.float(), RandomSource(lab.seed, x.device)))).argmax(1)]

    def along(way: Tensor) -> Tensor:
        return margin(lab.logits(x + way.view(-1, *[1] * (x.ndim - 1)) * (end - x)), y)

    low, high = torch.zeros(len(x), device=x.device), torch.ones(len(x), device=x.device)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        right = along(middle) < 0
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    leap = (along(high) - along(low)) / (along(torch.ones_like(high)) - along(torch.zeros_like(low)))
    leap = leap[torch.isfinite(leap)]
    share = float(leap.median()) if len(leap) else None
    status = NOT_RUN if share is None else SUSPICIOUS if share > _LEAP else PASS
    figure = (
        "logits are not finite"
        if share is None
        else f"{100 * share:.1f} % of the rise, in the median of {len(leap)} ways"
    )
    return [Check(name, status, figure, threshold, meaning, {"leap": share})]


# Of a straight line it would be a thousandth.
_LEAP, _HALVINGS, _PAIRS = 0.1, 10, 100


def _mean_cosine(first: Tensor, second: Tensor) -> float | None:
    """:return: Over the images both of whose gradients are finite; None where there are none."""
    live = torch.isfinite(first).flatten(1).all(1) & torch.isfinite(second).flatten(1).all(1)
    return _finite(cosine(first[live], second[live]).mean())


def _finite(value: Tensor) -> float | None:
    """:return: A number, or None where it is none: JSON knows neither NaN nor infinity."""
    return float(value) if bool(torch.isfinite(value)) else None


def plateau(lab: Laboratory) -> list[Check]:
    """Whether many more steps still find something."""
    ours, white = lab.strongest()
    steps, twenty = lab.long * lab.budget.max_iter, lab.pgd20()
    longest = torch.minimum(white, lab.scored(f"PGD-{steps}, margin", lab.pgd(max_iter=steps, loss="margin")))
    meaning = (
        "An attack that still gains when it is given many times the steps has not converged, and the accuracy it leaves is too high: "
        "noisy or shattered gradients make it wander."
    )
    check = beats("attacks have converged", (ours, white), (f"with PGD-{steps} on the margin", longest), meaning)
    check.figures["pgd_20"] = float(twenty.mean())
    return [check]


def single_step(lab: Laboratory) -> list[Check]:
    """Whether one step does more than many, or a long step less than a short one."""
    shares = (0.25, 0.5, 0.75, 1.0)
    step = {share: lab.scored(f"FGSM at {share:g} eps", lab.fgsm(share)) for share in shares}
    whole = step[1.0]
    stronger = beats(
        "one step does not beat many",
        lab.strongest(),
        ("FGSM", whole),
        "Many small steps can do all that one large step does; where they do less, the gradients along the way lead astray.",
    )
    rises = {share: paired_difference(whole, step[share]) for share in shares[:-1]}
    share = max(rises, key=lambda share: rises[share].low)
    figure = f"accuracy under a step of eps is above that under a step of {share:g} eps by {rises[share]}"
    distorted = Check(
        "a longer step does not help the network",
        ORDERS.status(rises[share]),
        figure,
        str(ORDERS),
        "A network that answers right after a step of the whole radius and wrong after a part of it has learnt the single step itself: "
        "catastrophic overfitting (Kim et al. 2021). Its accuracy against single steps says nothing.",
        {"accuracy": {f"{share:g}": float(step[share].mean()) for share in shares}},
    )
    return [stronger, distorted, _overfitted(lab, whole, lab.white_box())]


def _overfitted(lab: Laboratory, one: Tensor, many: Tensor) -> Check:
    """Whether the network withstands one step well and many not at all, not even within half the radius."""
    count = len(one)
    ends = {
        name: binomial_interval(round(float(score.sum())), count)
        for name, score in (("clean", lab.clean), ("one", one), ("many", many))
    }
    withstands = ends["one"][0] > _WITHSTANDS * float(lab.clean.mean())
    falls = {name: ends["many"][1] < share * ends["one"][0] for name, share in _FALLS.items()}
    status, figure = PASS, f"{percent(lab.clean)} clean, {percent(one)} after one step, {percent(many)} after many"
    figures = {"clean": float(lab.clean.mean()), "one": float(one.mean()), "many": float(many.mean())}
    if withstands and falls[SUSPICIOUS]:
        half = _curve_at(lab, 0.5 * lab.threat.eps)
        early = ORDERS.status(paired_difference(one, half))
        status = MASKED if falls[MASKED] and early == MASKED else SUSPICIOUS if early != PASS else PASS
        figure += f", {percent(half)} after many within half the radius"
        figures["many_within_half"] = float(half.mean())
    return Check(
        "what withstands one step withstands many",
        status,
        figure,
        f"one step leaves over {100 * _WITHSTANDS:.0f} % of the clean accuracy; many leave less than a quarter (suspicious) or an eighth "
        "(masked) of what one does, by the intervals' ends; and many within half the radius leave less than one step of the whole "
        f"({ORDERS})",
        "A network that keeps much of its accuracy under one step and loses it to many small ones, most of it within half the radius, is "
        "flat at the images alone: after single-step training, catastrophic overfitting (Wong et al. 2020); after gradient "
        "regularisation, a penalty that reaches no further than the images. Its accuracy against single steps says nothing.",
        figures,
    )


# An undefended network on MNIST keeps half of its accuracy under one step where many leave a fifth of that (eps 0.1), and less
# under one step where many leave less (0.125: a third, and a sixteenth); adversarial training keeps over half of it. Label
# smoothing curves the loss of an undefended one on the digits so much that one step leaves half and many a twentieth (0.16), but
# many steps of half the radius then leave 15 points more and over than one of the whole. After catastrophic overfitting on the
# digits they leave 23 points less and over.
_WITHSTANDS = 0.4
_FALLS = {SUSPICIOUS: 1 / 4, MASKED: 1 / 8}


def random_noise(lab: Laboratory) -> list[Check]:
    """Whether blind guessing does more than gradients."""
    return [
        beats(
            "gradients beat random noise",
            lab.strongest(),
            (f"the worst of {lab.budget.noise_draws} random perturbations", lab.scored("random noise", lab.noise)),
            "An attack that knows the network must do more harm than one that guesses.",
        )
    ]


def diameter(threat: ThreatModel, images: Tensor) -> float:
    """:return: How far apart two images (N, C, H, W) of the pixel range can be."""
    return 1.0 if threat.norm == "Linf" else math.sqrt(images[0].numel())


def curve_steps(max_iter: int) -> int:
    """:return: Of each attack of the accuracy-against-eps curve, at a budget."""
    return min(50, max_iter)


def _curve_at(lab: Laboratory, eps: float) -> Tensor:
    """
    :return: (N,) the score each image is left with at a radius, by PGD on the cross-entropy and on the margin; of a network that
        answers the same each time, computed once.
    """
    if eps in lab.curve and not lab.randomised:
        return lab.curve[eps]
    ball, steps = ThreatModel(lab.threat.norm, eps), curve_steps(lab.budget.max_iter)
    parts = [
        lab.under(f"PGD-{steps} at eps {eps:g}", lab.pgd(threat=ball, max_iter=steps, loss=loss))
        for loss in ("cross-entropy", "margin")
    ]
    lab.curve[eps] = torch.minimum(*parts)
    return lab.curve[eps]


def radius(lab: Laboratory) -> list[Check]:
    """Accuracy against eps: down to about 0, and never up."""
    whole = diameter(lab.threat, lab.x)
    radii = sorted({min(share * lab.threat.eps, whole) for share in RADII} | {whole})
    curve = {eps: _curve_at(lab, eps) for eps in radii}
    left = curve[whole]
    low = binomial_interval(round(float(left.sum())), len(left))[0]
    rises = [paired_difference(curve[b], curve[a]) for a, b in pairwise(radii)]
    rise = max(rises, key=lambda difference: difference.low)
    figures = {"accuracy": {f"{eps:.6g}": float(score.mean()) for eps, score in curve.items()}}
    status = MASKED if low > ORDERS.convicts else SUSPICIOUS if low > ORDERS.doubts else PASS
    figure = f"{percent(left)} at eps {whole:.3g}, the whole pixel range"
    if lab.answers == 1:  # then no image shows that the range holds one of another class: there may be nothing to find
        status, figure = NOT_RUN, f"{figure}; not judged: the network gives one class to every image"
    return [
        Check(
            "accuracy falls to 0 as eps grows",
            status,
            figure,
            f"suspicious: interval above {100 * ORDERS.doubts:.0f} %; masked: above {100 * ORDERS.convicts:.0f} %",
            "With the whole range any image can be turned into any other, one that the network gives another class included, so nothing "
            "can be left but what an attack fails to find.",
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


def logit_scale(lab: Laboratory) -> list[Check]:
    """Whether the cross-entropy attack is held up by nothing but the size of the logits."""
    network = Averaged(lab.model, lab.budget.eot) if lab.randomised else lab.model
    divisor = max(
        lab.gap, 1.0
    )  # small logits hide nothing: multiplied, they would make the cross-entropy the better loss it is not
    rescaled = lab.scored("PGD-20, logits rescaled", lab.pgd(model=Rescaled(network, divisor), max_iter=20))
    # A cross-entropy that is merely sharp costs an honest attack a few points; one that underflows costs it everything.
    return [
        beats(
            "the size of the logits hides nothing",
            ("PGD-20 on the cross-entropy", lab.pgd20()),
            (f"the same with logits divided by {divisor:.3g}", rescaled),
            "Dividing the logits changes no decision. When it helps an attack, the cross-entropy's gradient had vanished under large "
            "logits, and every figure that rests on it is too high.",
            SCALE,
        )
    ]
