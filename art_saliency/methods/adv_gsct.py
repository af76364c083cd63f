"""
Adv-GSCT: adversarially gradient-based saliency consensus training, a reconstruction from the abstract.

| Source: Li, Shen, Hu, Lin, Ji, Qi: Towards Gradient-Based Saliency Consensus Training for Adversarial Robustness.
  IEEE TDSC 21(2):530-541, 2024. Only the abstract is public; its clauses are quoted beside the lines that implement them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, InnerAttack, Reachable, cross_entropy, margin
from art_saliency.gradients import check_second_derivatives, cosine, importance, input_gradient, top_share_mask
from art_saliency.methods.base import Batch, LossTerms, Objective, warmup
from art_saliency.methods.baselines import full_precision, kl_divergence
from art_saliency.methods.points import Point, extreme_point, image_itself, random_point
from art_saliency.modes import evaluating, frozen, refuse_dropout, side_pass, training
from art_saliency.randomness import RandomSource, uniform
from art_saliency.threat import ThreatModel

__all__ = [
    "BASELINES",
    "OFFENDING",
    "PSEUDO_INPUTS",
    "SALIENCIES",
    "AdvGSCT",
    "Ingredients",
    "consensus_by_differences",
    "consensus_loss",
    "l2_consensus_loss",
    "linearity_error",
    "log_odds",
    "prediction_divergence",
]


# --- saliency: what is differentiated; each returns (N,) scores that rise as the true class loses -------------------


def negative_logit(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) minus the true class's logit."""
    return -logits.gather(1, (y if y.ndim == 1 else y.argmax(1))[:, None])[:, 0]


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """
    :return: (N,) logsumexp of the wrong classes minus the true logit: its gradient has the loss gradient's direction at every
        confidence, without its vanishing size (CE = log(1 + exp(log_odds))).
    """
    true = (y if y.ndim == 1 else y.argmax(1))[:, None]
    return logits.scatter(1, true, -torch.inf).logsumexp(1) - logits.gather(1, true)[:, 0]


SALIENCIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": cross_entropy,
    "logit": negative_logit,
    "margin": margin,  # its best wrong class is 'the most offending' one
}
"""What saliency may be the gradient of: (logits (N, K), y) -> (N,)."""

# --- baseline: what a pixel without information looks like ------------------------------------------------------------


def zero_baseline(x: Tensor) -> Tensor:
    """:return: Black: the background of MNIST and digits."""
    return torch.zeros_like(x)


def channel_mean_baseline(x: Tensor) -> Tensor:
    """:return: Each image's mean per channel."""
    return x.mean((2, 3), keepdim=True).expand_as(x)


def automatic_baseline(x: Tensor) -> Tensor:
    """:return: Black for one channel, the channel mean for colour."""
    return zero_baseline(x) if x.shape[1] == 1 else channel_mean_baseline(x)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": automatic_baseline,
    "zero": zero_baseline,
    "channel-mean": channel_mean_baseline,
}
"""What a drained pixel may move to: x -> (N, C, H, W)."""

# --- offending: the point x0 where the learned saliency is taken ------------------------------------------------------


def noise_augmented(x: Tensor, threat: ThreatModel, random: RandomSource | None) -> Tensor:
    """:return: x + U(-2 eps, 2 eps), clamped to [0, 1] but not to the ball (as N-FGSM, de Jorge et al. 2022)."""
    return ThreatModel(threat.norm, min(2 * threat.eps, 1.0) if threat.norm == "Linf" else 2 * threat.eps).random_start(
        x, random
    )


OFFENDING: dict[str, Point] = {
    "extreme-point": extreme_point,
    "random-start": random_point,
    "zero-start": image_itself,
    "noise-augmented": noise_augmented,
}
"""Where the learned saliency may be taken: (x, threat, random) -> x0."""

# --- pseudo-input: "a constructed pseudo-input, coupled with feature importance" --------------------------------------


class Ingredients(NamedTuple):
    """
    What a pseudo-input is made of; images are (N, C, H, W) in [0, 1].

    :ivar x: The clean images. :ivar x0: Where the learned saliency was taken. :ivar ascent: Its unit ascent direction.
    :ivar mask: (N, 1, H, W), 1 on the essential pixels. :ivar baseline: What a pixel without information looks like.
    :ivar alpha: Length of the ascent step. :ivar threat: Norm and radius. :ivar random: Where random numbers come from.
    """

    x: Tensor
    x0: Tensor
    ascent: Tensor
    mask: Tensor
    baseline: Tensor
    alpha: float
    threat: ThreatModel
    random: RandomSource | None


PseudoInput = Callable[[Ingredients], Tensor]
"""-> x~ (N, C, H, W), before it is projected into the ball."""


def one_step(given: Ingredients) -> Tensor:
    """:return: Every pixel goes to the worst case, whatever its importance (a control)."""
    return given.x0 + given.alpha * given.ascent


def essential(given: Ingredients) -> Tensor:
    """:return: "The least but essential information": essential pixels go to the worst case, the others lose information."""
    drained = given.x + given.threat.eps * given.threat.ascent_direction(given.baseline - given.x)
    return torch.where(given.mask > 0, one_step(given), drained)


def lowest_noise(given: Ingredients) -> Tensor:
    """:return: Unimportant pixels become noise (as in saliency-guided training, Ismail et al. 2021)."""
    return torch.where(given.mask > 0, one_step(given), uniform(given.x, given.random))


def convex_mix(given: Ingredients) -> Tensor:
    """:return: Unimportant pixels go half-way between the worst case and the baseline."""
    return (one_step(given) + essential(given)) / 2


PSEUDO_INPUTS: dict[str, PseudoInput] = {
    "essential": essential,
    "one-step": one_step,
    "lowest-noise": lowest_noise,
    "convex-mix": convex_mix,
}
"""Constructions of the pseudo-input."""

# --- losses -----------------------------------------------------------------------------------------------------------


def consensus_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """
    "Preserve the similarity between the learned model saliency and a target saliency, used as label": mean_i [1 - cos(g_i, t_i)].

    :param g: (N, C, H, W) learned saliency, in the graph.
    :param g_target: (N, C, H, W) target saliency; detached here, as a label is.
    :return: Scalar, 0 to 2. Rows whose gradient is exactly zero count 0.
    """
    return (1 - cosine(g, g_target.detach())).mean()


def consensus_by_differences(
    g: Tensor, g_target: Tensor, x0: Tensor, score0: Tensor, score: Callable[[Tensor], Tensor], *, h: float = 0.01
) -> Tensor:
    """
    :func:`consensus_loss` whose derivative with respect to the weights is a difference of scores: no double backward.

    d(1 - cos_i) = u_i . dg_i with u_i fixed, and the u_i . g_i add up to the slope of the summed score along u (after Finlay and
    Oberman 2019). All images move at once, as g couples them where BatchNorm does. On ReLU networks it is several times the
    double backward's: it feels the kinks move, which second derivatives do not.

    :param g: (N, C, H, W), the gradient of the score at `x0`. :param g_target: (N, C, H, W). Both are detached here.
    :param x0: (N, C, H, W). :param score0: (N,), the score at `x0`, in the graph of the weights.
    :param score: x -> (N,), in that graph too; called once, `h` away from `x0`.
    :param h: Length of the largest move of an image, in pixel units (L2).
    :return: Scalar, 0 to 2: the value is exact, the derivative right to first order in `h`.
    """
    leaf = g.detach().requires_grad_(True)
    value = consensus_loss(leaf, g_target)
    u = input_gradient(value, leaf).to(x0.dtype)
    longest = u.flatten(1).norm(dim=1).max().clamp_min(torch.finfo(u.dtype).tiny)
    change = (score(x0 + h / longest * u) - score0).sum() * longest / h
    loss: Tensor = value.detach() + change - change.detach()
    return loss


def l2_consensus_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """
    Squared distance of the saliencies with *both* branches live (as CURE): against a detached, larger target it diverges.

    :return: Scalar, the mean over samples of ||g_i - t_i||^2, in squared units of the [0, 1] pixel's gradient.
    """
    return (full_precision(g) - full_precision(g_target)).square().flatten(1).sum(1).mean()


def prediction_divergence(logits0: Tensor, logits: Tensor) -> Tensor:
    """:return: Scalar, mean_i KL(p(x0_i) || p(x~_i)), both branches live: consensus of the *predictions*."""
    return kl_divergence(logits0, logits).mean()


def linearity_error(score0: Tensor, score: Tensor, g: Tensor, delta: Tensor) -> Tensor:
    """
    How far the score is from linear between the two points: mean_i |s(x~_i) - s(x0_i) - g_i . (x~_i - x0_i)|.

    :param score0: (N,) at x0. :param score: (N,) at x~. :param g: (N, C, H, W) at x0. :param delta: x~ - x0.
    :return: Scalar (the local linearity measure of Qin et al. 2019, along one direction).
    """
    return (score - score0 - (g * delta).flatten(1).sum(1)).abs().mean()


class AdvGSCT(Objective):
    """
    Adv-GSCT, reconstructed. Two forwards, two input gradients, one parameter backward with one double backward.

    :param eps: Radius of the threat model, in pixel units.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param eps_step: alpha, the length of the one ascent step; ``None`` is ``eps``.
    :param rho: The share of the pixels that lose their information; 0 sends every pixel to the worst case.
    :param consensus: Weight of :func:`consensus_loss` (cosine, target detached).
    :param l2_consensus: Weight of :func:`l2_consensus_loss` (both branches live); above 0 it costs a second double backward.
    :param prediction_consensus: Weight of :func:`prediction_divergence`.
    :param linearity: Weight of :func:`linearity_error`.
    :param warmup_share: The share of the run over which these four weights rise from 0.
    :param eps_warmup_share: The share of the run over which the radius rises from 0: a network that is met with the full one at
        first may never leave the plateau on which it predicts one class for everything.
    :param saliency: What is differentiated: ``"loss"``, ``"logit"`` or ``"margin"``, or a function (logits, y) -> (N,), of
        which :meth:`config` keeps the name alone: such a run cannot be repeated from its record.
    :param offending: Where the learned saliency is taken: a random ``"extreme-point"`` of the ball (a corner for Linf), a
        ``"random-start"`` inside it, ``"zero-start"`` (the image) or ``"noise-augmented"``.
    :param pseudo_input: ``"essential"``, ``"one-step"``, ``"lowest-noise"``, ``"convex-mix"``.
    :param baseline: What a drained pixel moves to: ``"auto"``, ``"zero"``, ``"channel-mean"``, or a function
        x -> (N, C, H, W), kept by name likewise.
    :param label_on: Which images the classification loss sees: ``"pseudo-input"``, or ``"both"`` for the mean with clean ones.
    :param target_network: Whose saliency is the label: ``"current"``, or ``"ema"``, the slow copy that the loop keeps.
    :param form: ``"double-backward"``, or ``"finite-difference"``: one more forward pass instead of second derivatives, see
        :func:`consensus_by_differences`, for networks with a smooth activation; it knows the consensus alone, not `l2_consensus`
        and `linearity`, and refuses dropout.
    :param h: Length of the finite difference, in pixel units (L2).
    """

    name = "adv-gsct"
    single_step = True
    double_backward = True

    def __init__(
        self,
        *,
        eps: float,
        norm: str = "Linf",
        eps_step: float | None = None,
        rho: float = 0.1,
        consensus: float = 1.0,
        l2_consensus: float = 0.0,
        prediction_consensus: float = 6.0,
        linearity: float = 0.0,
        warmup_share: float = 0.2,
        eps_warmup_share: float = 0.2,
        saliency: str | Callable[[Tensor, Tensor], Tensor] = "loss",
        offending: str | Point = "extreme-point",
        pseudo_input: str | PseudoInput = "essential",
        baseline: str | Callable[[Tensor], Tensor] = "auto",
        label_on: str = "pseudo-input",
        target_network: str = "current",
        form: str = "double-backward",
        h: float = 0.01,
    ) -> None:
        super().__init__()
        self.threat = ThreatModel(norm, eps)
        self.eps, self.norm = self.threat.eps, norm
        self.eps_step = (
            eps_step if eps_step is None else _checks.real("eps_step", eps_step, least=0, most=_checks.GREATEST)
        )
        self.rho = _checks.real("rho", rho, least=0, most=1)
        self.consensus = _checks.weight("consensus", consensus)
        self.l2_consensus = _checks.weight("l2_consensus", l2_consensus)
        self.prediction_consensus = _checks.weight("prediction_consensus", prediction_consensus)
        self.linearity = _checks.weight("linearity", linearity)
        self.warmup_share = _checks.real("warmup_share", warmup_share, least=0, most=1)
        self.eps_warmup_share = _checks.real("eps_warmup_share", eps_warmup_share, least=0, most=1)
        self.saliency, self._score = saliency, _checks.function("saliency", saliency, SALIENCIES)
        self.offending, self._start = offending, _checks.function("offending", offending, OFFENDING)
        self.pseudo_input, self._construct = pseudo_input, _checks.function("pseudo_input", pseudo_input, PSEUDO_INPUTS)
        self.baseline, self._baseline = baseline, _checks.function("baseline", baseline, BASELINES)
        self.label_on = _checks.one_of("label_on", label_on, ("pseudo-input", "both"))
        self.target_network = _checks.one_of("target_network", target_network, ("current", "ema"))
        self.needs_target_model = target_network == "ema"
        if self.needs_target_model and self.l2_consensus:
            # Beside a slow copy's saliency only one branch is live, and against such a target the squared distance diverges.
            raise _checks.refuse(
                "l2_consensus", f"{self.l2_consensus:g} with target_network='ema'", "0", "it needs both saliencies live"
            )
        self.form = _checks.one_of("form", form, ("double-backward", "finite-difference"))
        self.full_float32 = form == "finite-difference"
        self.h = _checks.real("h", h, above=0, most=1)
        if form == "finite-difference":
            for name in ("l2_consensus", "linearity"):
                if getattr(self, name):
                    raise _checks.refuse(name, f"{getattr(self, name):g}", "0", "it needs form='double-backward'")
            if saliency == "loss":
                self._score = log_odds  # the same direction, and no difference of two losses that are nearly 0

    def pseudo_inputs(
        self, x: Tensor, x0: Tensor, g: Tensor, random: RandomSource | None = None, *, radius: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """
        "The most offending case, representing the least but essential information scenario".

        :param x: (N, C, H, W) in [0, 1]. :param x0: Where `g` was taken. :param g: (N, C, H, W) learned saliency.
        :param radius: The share of eps that is allowed yet, 0 to 1.
        :return: x~ (N, C, H, W) in the ball, and the mask (N, 1, H, W) of the pixels held essential; both detached.
        """
        g, threat = g.detach(), self.threat.scaled(radius)
        mask = top_share_mask(importance(g), 1 - self.rho, random)
        alpha = radius * (self.eps if self.eps_step is None else self.eps_step)
        given = Ingredients(x, x0, threat.ascent_direction(g), mask, self._baseline(x), alpha, threat, random)
        return threat.project(self._construct(given), x).detach(), mask

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """See :class:`Objective`. Terms: ce, consensus, l2_consensus, prediction_consensus, linearity."""
        # The consensus term's weight gradient was measured 19 % off under bfloat16.
        with torch.autocast(batch.x.device.type, enabled=False):
            return self._forward(model, batch)

    def check_network(self, model: nn.Module, x: Tensor) -> None:
        """
        See :class:`Objective`.

        :raises UnsupportedModelError: When the network has no second derivatives, or, in ``form="finite-difference"``, dropout.
        """
        if self.form == "finite-difference":
            with training(model):
                refuse_dropout(model)
        elif self._needs_saliency:
            check_second_derivatives(model, x)

    @property
    def _needs_saliency(self) -> bool:
        return self.consensus > 0 or self.l2_consensus > 0 or self.linearity > 0

    def _forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        x, y, weight = batch.x, batch.y, warmup(batch.progress, self.warmup_share)
        differences = self.form == "finite-difference"
        if differences:
            refuse_dropout(model)
        need_g = self._needs_saliency
        radius = self.radius(batch.progress)
        x0 = self._start(x, self.threat.scaled(radius), batch.random).detach().requires_grad_(True)
        with side_pass(model):
            clean_loss = cross_entropy(model(x), y).mean() if self.label_on == "both" else None
            logits0 = model(x0)
        score0 = self._score(logits0, y)
        # "Intermediate gradient-based saliency": of the model as it stands in mid-training; the graph is kept for the consensus.
        kept = (differences and need_g) or self.prediction_consensus > 0
        g = input_gradient(score0.sum(), x0, create_graph=need_g and not differences, retain_graph=kept)

        x_pseudo, mask = self.pseudo_inputs(x, x0.detach(), g, batch.random, radius=radius)
        x_pseudo.requires_grad_(True)
        logits = model(x_pseudo)  # the one train-mode forward of the step that moves BatchNorm's statistics
        score = self._score(logits, y)
        ce = cross_entropy(full_precision(logits), y).mean()
        if clean_loss is not None:
            ce = (ce + clean_loss) / 2

        parts: dict[str, Tensor] = {}
        if self.consensus or self.l2_consensus:
            # "To ensure the discrimination of the estimated target saliency": it keeps the essential pixels only.
            target = mask * self._target_saliency(batch, score, x_pseudo)
            if self.consensus and differences:
                with side_pass(model):
                    parts["consensus"] = consensus_by_differences(
                        g, target, x0.detach(), score0, lambda moved: self._score(model(moved), y), h=self.h
                    )
            elif self.consensus:
                parts["consensus"] = consensus_loss(g, target)
            if self.l2_consensus:
                parts["l2_consensus"] = l2_consensus_loss(g, target)
        if self.prediction_consensus:
            parts["prediction_consensus"] = prediction_divergence(logits0, logits)
        if self.linearity:
            parts["linearity"] = linearity_error(score0, score, g, (x_pseudo - x0).detach())
        loss = ce + sum(weight * getattr(self, name) * part for name, part in parts.items())
        return LossTerms(loss, logits, {"ce": ce.detach(), **{name: part.detach() for name, part in parts.items()}})

    def _target_saliency(self, batch: Batch, score: Tensor, x_pseudo: Tensor) -> Tensor:
        """The saliency at the pseudo-input, in the graph only where the L2 term needs it live."""
        if self.target_network == "current":
            # The graph of the forward pass is needed again by the loss's own backward.
            return input_gradient(score.sum(), x_pseudo, create_graph=self.l2_consensus > 0, retain_graph=True)
        slow = batch.target_model
        if slow is None:
            raise _checks.refuse(
                "target_network", "'ema' without a slow copy", "a run that keeps one", "pass ema=0.999"
            )
        x_slow = x_pseudo.detach().requires_grad_(True)
        with evaluating(slow), frozen(slow):
            return input_gradient(self._score(slow(x_slow), batch.y).sum(), x_slow)

    def adaptive_variants(self) -> Mapping[str, AdaptiveAttack]:
        """:return: ``"essential pixels"``: an attack on the pixels alone that the target saliency keeps; nothing where it keeps all."""
        return {"essential pixels": self._attack_essential} if self.rho else {}

    def _attack_essential(self, model: nn.Module, x: Tensor, y: Tensor, attack: InnerAttack) -> Tensor:
        with evaluating(model), frozen(model), torch.enable_grad():
            image = x.detach().requires_grad_(True)
            g = input_gradient(self._score(model(image), y).sum(), image)
        reachable = Reachable(model, x, top_share_mask(importance(g), 1 - self.rho, RandomSource(0, x.device)))
        return reachable.confined(attack(reachable, x, y))
