"""Where an audit's attacks are run: each image's score under each attack, on a network that may answer at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.attacks import AttackLoss, fgsm, margin, pgd
from art_saliency.errors import UnsupportedModelError
from art_saliency.evaluation._audit_copies import Averaged
from art_saliency.evaluation._inputs import right_answers, unbroken
from art_saliency.gradients import input_gradient
from art_saliency.modes import full_float32
from art_saliency.randomness import RandomSource, uniform
from art_saliency.threat import ThreatModel

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AuditBudget:
    """
    How hard an audit tries: whole numbers of at least 1.

    :param max_iter: Steps of the gradient attacks. :param restarts: Of the two strongest ones.
    :param long: How many times as many steps the long attack has.
    :param noise_draws: Random perturbations an image has to stand. :param square_queries: Of the black-box attack.
    :param repeats: Forward passes that a randomised network is scored over.
    :param eot: Passes that each of its gradients averages; its attacks are not restarted, and the long one is twice as long.
    """

    max_iter: int = 100
    restarts: int = 5
    long: int = 10
    noise_draws: int = 20
    square_queries: int = 1000
    repeats: int = 10
    eot: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _checks.whole(name, value, least=1))


class Laboratory:
    """
    One network, one set of images, one threat model. The network is in eval mode and frozen as long as it is used.

    :param model: Maps (N, C, H, W) in [0, 1] to logits.
    :param x: (N, C, H, W) where the network is. :param y: (N,).
    :ivar randomised: Whether two forward passes of the same images differ.
    :ivar gap: Between the two highest logits, the median over images; as all that is measured of clean logits, over finite ones.
    :ivar differentiable: Whether logits have a gradient to the images at all.
    :ivar answers: How many classes the network gives to the clean images, each counted once.
    :ivar clean: (N,) scores: the share of forward passes in which a clean image is classified right.
    :ivar scores: Those of every attack that counts, clean first, by name: each attack is run once.
    :ivar curve: Those at other radii, by radius; they do not count.
    :ivar without_steps: What those attacks did that found no gradient to follow, by their names.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        budget: AuditBudget,
        *,
        batch_size: int,
        seed: int,
        bar: Any = None,
    ) -> None:
        self.model, self.x, self.y, self.threat, self.budget = model, x, y, threat, budget
        self.batch_size, self.seed = batch_size, seed
        self.bar = tqdm(disable=True) if bar is None else bar
        with full_float32():  # a GPU takes other kernels for one image, and the rounding of TF32 would tell them apart
            first, second = self.logits(x), self.logits(x)
            self.alone = max(_relative(self.logits(x[i : i + 1]), first[i : i + 1]) for i in range(min(4, len(x))))
        self.spread = _relative(first, second)
        self.randomised = self.spread > 1e-4  # AutoAttack's own threshold
        answered = first[torch.isfinite(first).all(1)]
        gaps = (answered.topk(2, dim=1).values @ first.new_tensor([1.0, -1.0])).abs()
        self.gap = float(gaps.median()) if len(gaps) else 1.0
        self.answers = len(torch.unique(answered.argmax(1)))
        self.restarts, self.long = (1, 2) if self.randomised else (budget.restarts, budget.long)
        self.differentiable = self._is_differentiable()
        self.clean = self.score(x)
        self.scores = {"clean": self.clean}
        self.curve: dict[float, Tensor] = {}
        self.without_steps: dict[str, str] = {}
        self._instead: list[str] = []  # what batches of the attack at work were met with
        self.standing = self.clean > 0

    def logits(self, x: Tensor) -> Tensor:
        """:return: (N, K) float32, without a graph."""
        with torch.no_grad():
            return torch.cat([self.model(part).float() for part in torch.split(x, self.batch_size)])

    def score(self, x: Tensor) -> Tensor:
        """:return: (N,) the share of forward passes in which the class is right; logits that are not finite are no answer."""
        found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        passes = self.budget.repeats if self.randomised else 1
        for _ in range(passes):
            logits = self.logits(x)
            found += right_answers(logits, self.y)
        return (found / passes).cpu()

    def _is_differentiable(self) -> bool:
        try:
            self.gradients(self.x[:1], self.y[:1], lambda logits, y: logits.gather(1, y[:, None])[:, 0])
        except UnsupportedModelError:
            return False
        return True

    def gradients(self, x: Tensor, y: Tensor, loss: AttackLoss) -> Tensor:
        """:return: (N, C, H, W) input gradients of a loss."""
        found = []
        for images, labels in zip(torch.split(x, self.batch_size), torch.split(y, self.batch_size), strict=True):
            with torch.enable_grad():
                images = images.detach().requires_grad_(True)
                found.append(input_gradient(loss(self.model(images), labels).sum(), images))
        return torch.cat(found)

    def under(self, name: str, attack: Attack) -> Tensor:
        """
        Score every image under an attack; images that are wrong without one are left out of it and count 0. Where an attack
        returns pixels that are not finite it has found nothing.

        :param attack: (x, y) -> x_adv. :return: (N,) scores, none above the clean one.
        """
        self.bar.set_postfix(attack=name, refresh=True)
        self._instead.clear()
        x_adv = self.x.clone()
        rows = self.standing.to(self.x.device).nonzero()[:, 0]
        # Where none stands the split is one batch of no images, on which many a network fails.
        for some in torch.split(rows, self.batch_size) if len(rows) else ():
            x_adv[some] = unbroken(attack(self.x[some], self.y[some]), self.x[some])
        if self._instead:
            self.without_steps[name] = self._instead[0]
        return torch.minimum(self.score(x_adv), self.clean) * self.standing

    def record(self, name: str, score: Tensor) -> Tensor:
        """
        Keep what an attack left.

        :param score: (N,) bool, or scores. :return: It, nowhere above the clean one.
        """
        self.scores[name] = torch.minimum(score.double(), self.clean)
        return self.scores[name]

    def scored(self, name: str, attack: Attack) -> Tensor:
        """:return: (N,) scores :meth:`under` an attack; they are kept, and an attack of that name is not run again."""
        return self.scores[name] if name in self.scores else self.record(name, self.under(name, attack))

    def title(self, name: str) -> str:
        """:return: What an attack is called in a report: its name, and what it did instead where there was no gradient."""
        return f"{name} ({self.without_steps[name]}: no gradient)" if name in self.without_steps else name

    def strongest(self) -> tuple[str, Tensor]:
        """:return: The two strongest gradient attacks in words, and (N,) the score each image is left with by both."""
        words = f"PGD-{self.budget.max_iter} x {self.restarts} on cross-entropy and margin"
        return (words if self.differentiable else f"{words} (random starts only: no gradient)"), self.white_box()

    def white_box(self) -> Tensor:
        """:return: (N,) the score each image is left with by the two strongest gradient attacks."""
        first = self.scored("PGD, cross-entropy", self.pgd(restarts=self.restarts))
        return torch.minimum(first, self.scored("PGD, margin", self.pgd(restarts=self.restarts, loss="margin")))

    def pgd20(self) -> Tensor:
        """:return: (N,) scores under 20 steps on the cross-entropy."""
        return self.scored("PGD-20", self.pgd(max_iter=20))

    def pgd(
        self,
        *,
        model: nn.Module | None = None,
        threat: ThreatModel | None = None,
        max_iter: int | None = None,
        restarts: int = 1,
        eps_step: float | None = None,
        loss: str | AttackLoss = "cross-entropy",
    ) -> Attack:
        """
        PGD at the audit's budget, on the network or on another view of it; gradients of a randomised one are averaged.

        What is attacked and has no gradients, be it the network or the view, is met with random starts only.

        :return: The attack.
        """
        network = self._attacked() if model is None else model

        def attack_of(steps: int, x: Tensor, y: Tensor) -> Tensor:
            return pgd(
                network,
                x,
                y,
                threat=self.threat if threat is None else threat,
                max_iter=steps,
                restarts=restarts,
                eps_step=eps_step,
                loss=loss,
                random=RandomSource(self.seed, x.device),
            )

        def attack(x: Tensor, y: Tensor) -> Tensor:
            if model is not None or self.differentiable:
                try:
                    return attack_of(self.budget.max_iter if max_iter is None else max_iter, x, y)
                except UnsupportedModelError:
                    pass
            self._instead.append("random starts only")
            return attack_of(0, x, y)

        return attack

    def _attacked(self) -> nn.Module:
        return Averaged(self.model, self.budget.eot) if self.randomised else self.model

    def fgsm(self, share: float) -> Attack:
        """:return: One gradient step of a share of the radius, from the image itself."""
        threat = ThreatModel(self.threat.norm, share * self.threat.eps)

        def attack(x: Tensor, y: Tensor) -> Tensor:
            if self.differentiable:
                return fgsm(self._attacked(), x, y, threat=threat)
            self._instead.append("clean images")
            return x

        return attack

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """:return: The random perturbation, of several, that raises the loss most; half of them on the ball's rim."""
        random = RandomSource(self.seed, x.device)
        worst, score = x, torch.full((len(x),), -torch.inf, device=x.device)
        for draw in range(self.budget.noise_draws):
            if draw % 2:
                moved = self.threat.random_start(x, random)
            else:
                moved = self.threat.project(
                    x + self.threat.eps * self.threat.ascent_direction(uniform(x, random) - 0.5), x
                )
            wrong = margin(self.logits(moved), y)
            better = wrong > score
            worst = torch.where(better.view(-1, *[1] * (x.ndim - 1)), moved, worst)
            score = torch.where(better, wrong, score)
        return worst


def _relative(first: Tensor, second: Tensor) -> float:
    """
    :return: The greatest distance of two passes' logits, relative to the logits' own size, over rows that are finite in both; at
        least 1 where a row is so in one of them alone.
    """
    finite, again = torch.isfinite(first).all(1), torch.isfinite(second).all(1)
    both, least = finite & again, 0.0 if torch.equal(finite, again) else 1.0
    if not bool(both.any()):
        return least
    return max(least, float((first[both] - second[both]).abs().max() / first[both].abs().max().clamp_min(1e-12)))
