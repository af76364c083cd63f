"""
Gradient attacks: one function each, tensors in, tensors out, on the device of their input.

Every attack leaves the network as it was: train/eval flags, ``requires_grad`` and ``param.grad`` are restored or never
touched. Attacks run in eval mode, as in ART, so BatchNorm neither couples samples nor moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.gradients import input_gradient
from art_saliency.modes import evaluating, frozen
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel, a_threat_model

__all__ = [
    "LOSSES",
    "AdaptiveAttack",
    "AttackLoss",
    "InnerAttack",
    "Reachable",
    "attack_loss",
    "cross_entropy",
    "dlr",
    "fgsm",
    "margin",
    "pgd",
]

AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), y (N,) or (N, K)) -> (N,), to be maximised."""


class InnerAttack(Protocol):
    """An attack that an :data:`AdaptiveAttack` calls."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, loss: AttackLoss | None = None, /) -> Tensor:
        """:return: (N, C, H, W), adversarial images; a loss of ``None`` is the attack's own."""


AdaptiveAttack = Callable[[nn.Module, Tensor, Tensor, InnerAttack], Tensor]
"""
(model, x, y, attack) -> x_adv: an attack made for one defence, on top of a general one.

Layers and objectives publish theirs by ``adaptive_variants()``; the audit supplies the general one, with its own budget.
"""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) cross-entropy; `y` may be indices or soft labels."""
    return F.cross_entropy(logits, y, reduction="none")


def _true_and_best_wrong(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    index = (y if y.ndim == 1 else y.argmax(1))[:, None]
    return logits.gather(1, index)[:, 0], logits.scatter(1, index, -torch.inf).amax(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) best wrong logit minus true logit: above 0 where the sample is misclassified (Carlini and Wagner 2017)."""
    true, wrong = _true_and_best_wrong(logits, y)
    return wrong - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """
    Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin divided by the spread of the three highest logits.

    :return: (N,), unchanged when logits are shifted or scaled.
    """
    if logits.shape[1] < 3:
        raise _checks.refuse("dlr", f"{logits.shape[1]} classes", "at least 3", "use the margin loss")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, AttackLoss] = {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr}
"""What an attack may maximise, by name."""


def attack_loss(loss: str | AttackLoss) -> AttackLoss:
    """:return: The loss of that name, or the callable itself."""
    return _checks.function("loss", loss, LOSSES)


def _ascend(
    model: nn.Module,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    max_iter: int,
    eps_step: float,
    loss: AttackLoss,
) -> Tensor:
    """The inner maximisation: steepest ascent from `start`, projected after each step."""
    x_adv = start
    for _ in range(max_iter):
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_(True)
            gradient = input_gradient(loss(model(x_adv), y).sum(), x_adv)
        x_adv = threat.project(x_adv.detach() + eps_step * threat.ascent_direction(gradient), x)
    return x_adv.detach()


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    max_iter: int = 10,
    eps_step: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: str | AttackLoss = "cross-entropy",
    random: RandomSource | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """
    Projected gradient descent (Madry et al. 2018).

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K).
    :param x: (N, C, H, W) in [0, 1].
    :param y: (N,) int64, or (N, K) soft labels for the cross-entropy.
    :param threat: Norm and radius; a radius of 0 returns `x`.
    :param max_iter: Steps.
    :param eps_step: Length of a step in [0, 1] pixel units; ``None`` is 2.5 * eps / max_iter.
    :param restarts: Independent starts; the worst of each sample is kept. One start costs no extra forward pass.
    :param random_start: Whether to start at a random point of the ball.
    :param loss: ``"cross-entropy"``, ``"margin"``, ``"dlr"`` or any :data:`AttackLoss`.
    :param random: Where random numbers come from; ``None`` is torch's global generator.
    :param start: (N, C, H, W), the first start, projected into the threat model; further restarts are as without it.
    :return: (N, C, H, W) in [0, 1], within the threat model, detached.
    :raises InputError: When the images are no tensor, of half precision, or no floats: steps of the size of an attack's are lost in the rounding.
    """
    if _checks.a_tensor("x", x).dtype not in (torch.float32, torch.float64):
        raise _checks.refuse("x", f"images of {x.dtype}", "float32 or float64 in [0, 1]", "convert them with .float()")
    _checks.whole("max_iter", max_iter)
    _checks.whole("restarts", restarts, least=1)
    a_threat_model(threat)
    step = 2.5 * threat.eps / max(max_iter, 1) if eps_step is None else _checks.real("eps_step", eps_step, least=0)
    objective = attack_loss(loss)
    x = x.detach()
    if threat.eps == 0:
        return x.clone()
    with evaluating(model), frozen(model):
        best: Tensor | None = None
        for restart in range(restarts):
            if restart == 0 and start is not None:
                first = threat.project(start, x)
            else:
                first = threat.random_start(x, random) if random_start else x.clone()  # no step, no alias of the input
            x_adv = _ascend(model, first, x, y, threat, max_iter, step, objective)
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
                score, fooled = objective(logits, y), margin(logits, y) > 0
            if best is None:
                best, best_score, best_fooled = x_adv, score, fooled
                continue
            better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (score > best_score))
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, best)
            best_score, best_fooled = torch.where(better, score, best_score), fooled | best_fooled
    assert best is not None
    return best


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    eps_step: float | None = None,
    random_start: bool = False,
    loss: str | AttackLoss = "cross-entropy",
    random: RandomSource | None = None,
) -> Tensor:
    """
    The fast gradient (sign) method (Goodfellow et al. 2015): one step of :func:`pgd`.

    :param eps_step: ``None`` is eps. With a random start, 1.25 * eps is the FGSM-RS of Wong et al. 2020.
    :return: (N, C, H, W) in [0, 1], within the threat model, detached. The other parameters are those of :func:`pgd`.
    """
    step = a_threat_model(threat).eps if eps_step is None else eps_step
    return pgd(
        model, x, y, threat=threat, max_iter=1, eps_step=step, random_start=random_start, loss=loss, random=random
    )


class Reachable(nn.Module):
    """
    A network as an adversary sees it who can reach some pixels only.

    :param model: Maps (N, C, H, W) to logits.
    :param x: (N, C, H, W), the clean images; the wrapped network serves these alone, in this order.
    :param reach: (N, 1, H, W), above 0 on the pixels in reach.
    """

    def __init__(self, model: nn.Module, x: Tensor, reach: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.reach = model, x.detach(), reach.detach()

    def confined(self, x_adv: Tensor) -> Tensor:
        """:return: (N, C, H, W), the clean images with what the adversary did to the pixels in reach."""
        return torch.where(self.reach > 0, x_adv, self.x)

    def forward(self, x_adv: Tensor) -> Tensor:
        """:return: (N, K), the logits of the confined images."""
        logits: Tensor = self.model(self.confined(x_adv))
        return logits
