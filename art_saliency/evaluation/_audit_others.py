"""
An audit's checks by other attacks than those along the network's own gradients, and of a network that answers at random.

After Athalye et al. (2018), Carlini et al. (2019) and Tramer et al. (2020): other views of the network, attackers who see less of
it, AutoAttack, and attacks made for the defence; none may do much more than the network's own gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, AttackLoss, margin
from art_saliency.evaluation._audit_check import GAP, NOT_RUN, ORDERS, PASS, SUSPICIOUS, Check, beats
from art_saliency.evaluation._audit_copies import InTrainMode, SameNoise, smoothed_copy
from art_saliency.evaluation._audit_laboratory import Attack, Laboratory
from art_saliency.evaluation.autoattack import AutoAttackResult

_ROUNDING = 1e-6  # of float32 pixels


def other_views(lab: Laboratory) -> list[Check]:
    """Attacks through the network in train mode and through a smoothed copy, carried over to the network as it is deployed."""
    white = lab.strongest()
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
            score = lab.scored(name, _both_losses(lab, view))
        except Exception as error:  # a network need not work in train mode on its own; that is no verdict
            checks.append(Check(name, NOT_RUN, f"failed: {str(error).splitlines()[0][:160]}", str(ORDERS), meaning))
            continue
        checks.append(beats(name, white, ("the attack on the copy", score), meaning))
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
    lab: Laboratory, square: Tensor | None, transferred: Tensor | None, needed: str | None = None
) -> list[Check]:
    """
    Whether an attack that sees answers only, or other networks only, does more than one that sees everything.

    :param needed: What Square would have of the images, where it cannot run on them.
    """
    white, checks = lab.strongest(), []
    size = "images of {} x {} pixels".format(*lab.x.shape[2:])
    for name, found, words, missing in (
        (
            "gradients beat queries",
            square,
            f"Square with {lab.budget.square_queries} queries",
            f"not measured: got {size}, expected {needed}",
        ),
        ("gradients beat transfer", transferred, "attacks transferred from other networks", "not measured"),
    ):
        meaning = (
            "Whoever knows the network can do all that an outsider can. Where the outsider does more, the gradients were masked: "
            "the sign by which most broken defences were found."
        )
        if found is None:
            checks.append(Check(name, NOT_RUN, missing, str(ORDERS), meaning))
            continue
        checks.append(beats(name, white, (words, lab.record(words, found)), meaning))
    return checks


def autoattack_gap(lab: Laboratory, found: Tensor | None, words: str) -> list[Check]:
    """Whether AutoAttack finds much that PGD does not."""
    name, meaning = (
        "PGD comes near AutoAttack",
        "AutoAttack adapts its step and tries every other class as a target, so it finds a little more. Much more means that plain "
        "gradient attacks, and any figure that rests on them, are led astray.",
    )
    if found is None:
        return [Check(name, NOT_RUN, "not measured", str(ORDERS), meaning)]
    return [beats(name, lab.strongest(), (words, lab.record(words, found)), meaning, GAP)]


def square_in_autoattack(found: AutoAttackResult | None) -> list[Check]:
    """Whether AutoAttack's Square still finds what the attacks before it missed."""
    left = [] if found is None else list(found.robust_accuracy_after.items())
    place = next((n for n, (attack, _) in enumerate(left) if attack == "square"), 0)
    if found is None or not place:  # no attack came before it, or none of the images was left to it
        return []
    # Square gets what those before it left, so no image points the other way; the shares may be of more images than these.
    count = len(found.correct)
    before, after = (torch.arange(count) < round(share * count) for _, share in left[place - 1 : place + 1])
    meaning = (
        "In AutoAttack Square comes after gradient attacks and sees answers only. Where it still takes many images they were led astray, "
        "and AutoAttack's own figure is too high: its authors ask for more queries or an adaptive attack."
    )
    ours = f"AutoAttack up to {left[place - 1][0]}"
    name = "AutoAttack's Square finds little that its gradients miss"
    return [beats(name, (ours, before.double()), ("Square after it", after.double()), meaning)]


def autoattack_warns(*results: AutoAttackResult | None) -> list[Check]:
    """What AutoAttack, and the Square of this audit, warned of in their own words."""
    given = [result for result in results if result is not None]
    if not given:
        return []
    lines = list(dict.fromkeys(line for result in given for line in result.warnings))
    doubts = [line for line in lines if any(words in line for words in _UNDERMINE)]
    return [
        Check(
            "AutoAttack's warnings",
            SUSPICIOUS if doubts else PASS,
            "; ".join(line.partition(" See ")[0] for line in lines) or "none",
            "suspicious: outputs that are probabilities, work at inference time that looks like a dynamic defence, a state that changes, "
            "images outside the threat model; what it says of Square, randomness and zero gradients is weighed by the checks of these",
            "AutoAttack's figure rests on logits of a network that stays as it is. Where it says that it had none, the figure is no upper "
            "bound that a better attack would come near to.",
            {"warnings": lines},
        )
    ]


# Square's, of randomness and of zero gradients are left to checks that measure how much there is: one image of a thousand is a warning.
_UNDERMINE = ("probability distribution", "dynamic defense", "state_dict changed", "outside the threat model")


def adaptive(lab: Laboratory, variants: Mapping[str, AdaptiveAttack]) -> list[Check]:
    """Attacks that were made for this very defence."""
    white, checks = lab.strongest(), []

    def inner(model: nn.Module, x: Tensor, y: Tensor, loss: AttackLoss | None = None) -> Tensor:
        return lab.pgd(model=model, loss="cross-entropy" if loss is None else loss)(x, y)

    for variant, attack in variants.items():
        name = f"adaptive: {variant}"
        score = lab.scored(name, _held(lab, variant, lambda x, y, attack=attack: attack(lab.model, x, y, inner)))  # type: ignore[misc]
        meaning = "An attack that knows the defence must not do much more than one that does not: it would show what the defence hides."
        checks.append(beats(name, white, ("this attack", score), meaning))
    return checks


def _held(lab: Laboratory, variant: str, attack: Attack) -> Attack:
    """:return: An attack of somebody else's making, held to the threat model; what lies in it stays as it is, bit for bit."""

    def held(x: Tensor, y: Tensor) -> Tensor:
        found = attack(x, y)
        got, expected = _kind(found), _kind(x)
        if got != expected:
            raise _checks.refuse(f"variants[{variant!r}]", got, expected, "return one adversarial image for each")
        inside = lab.threat.project(found, x)
        outside = ((inside - found).abs() > _ROUNDING).flatten(1).any(1)
        return torch.where(outside.view(-1, *[1] * (x.ndim - 1)), inside, found)

    return held


def _kind(images: Any) -> str:
    """:return: What somebody's attack returned, in words."""
    if not isinstance(images, Tensor):
        return f"a {type(images).__name__}"
    return f"images of shape {tuple(images.shape)}, {images.dtype} on {images.device}"


def determinism(lab: Laboratory) -> list[Check]:
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
    return score


def _known_noise(lab: Laboratory) -> Check:
    name = "nothing rests on noise that the attacker cannot know"
    meaning = (
        "What is right under noise drawn anew and wrong once the noise is known was not resisted: it was missed. A random "
        "network's accuracy under averaged gradients overstates how far its images are from the decision boundary."
    )
    fixed = SameNoise(lab.model, lab.seed)
    with torch.no_grad():
        first, second = fixed(lab.x[:4]), fixed(lab.x[:4])
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max())):
        said = "the noise comes from a generator of the network's own, which cannot be held still"
        return Check(name, NOT_RUN, said, str(ORDERS), meaning)
    known = lab.record("noise known to the attacker", _with_known_noise(lab))
    attack = "one that knows the noise of the very pass that is scored"
    return beats(name, ("the attack that averages over the noise", lab.white_box()), (attack, known), meaning)


def randomness(lab: Laboratory) -> list[Check]:
    """For a network that answers at random: what averaging its gradients adds."""
    if not lab.randomised:
        return []
    steps = lab.budget.max_iter
    once = lab.scored("PGD-20, one pass a gradient", lab.pgd(model=lab.model, max_iter=20))
    return [
        _known_noise(lab),
        beats(
            "averaging over the randomness adds nothing",
            ("PGD-20 with one pass a gradient", once),
            (f"PGD-{steps} with {lab.budget.eot} passes a gradient", lab.white_box()),
            "Noise that is drawn anew in each pass blurs the gradient. Where averaging it away fools many more images, the noise hid "
            "them and did not protect them.",
        ),
    ]
