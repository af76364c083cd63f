"""
What every table compares with: standard training, FGSM-RS, PGD-AT, TRADES, MART and ALP.

Two rules hold for all of them and for the methods that build on :class:`AdversarialObjective`. The inner maximisation runs
in eval mode, and whatever found the adversarial images, a user's own attack included, they are projected into the threat
model. Of a step's train-mode forwards the last one holds the adversarial rows last, and it alone moves BatchNorm's running
statistics: ALP makes one joint forward of [x; x~], TRADES and MART two separate ones, as their authors do.
"""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from art_saliency import _checks
from art_saliency.attacks import cross_entropy, pgd
from art_saliency.methods.base import Attack, Batch, LossTerms, Objective
from art_saliency.modes import evaluating, frozen, side_pass
from art_saliency.randomness import global_states, normal, set_global_states
from art_saliency.threat import ThreatModel

__all__ = [
    "ALP",
    "FGSMRS",
    "MART",
    "PGDAT",
    "TRADES",
    "AdversarialObjective",
    "AttackOptions",
    "SingleStepOptions",
    "Standard",
    "StartlessOptions",
    "alp_loss",
    "boosted_cross_entropy",
    "doubted_kl",
    "full_precision",
    "joint_logits",
    "kl_divergence",
    "mart_loss",
    "pairing_distance",
    "separate_logits",
    "trades_loss",
]

_TRADES_START = 0.001  # the standard deviation of the authors' start, in pixel units of [0, 1]


def full_precision(logits: Tensor) -> Tensor:
    """:return: The logits in float32 at least: a loss formed in half precision loses its small differences."""
    return logits if logits.dtype == torch.float64 else logits.float()


def kl_divergence(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """
    KL(p(x) || p(x~)) of each sample.

    :param clean_logits: (N, K) of p(x).
    :param adv_logits: (N, K) of p(x~).
    :return: (N,), at least 0 up to rounding.
    """
    log_p = F.log_softmax(full_precision(clean_logits), dim=1)
    log_q = F.log_softmax(full_precision(adv_logits), dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def trades_loss(
    clean_logits: Tensor, adv_logits: Tensor, y: Tensor, *, beta: float = 6.0, label_smoothing: float = 0.0
) -> Tensor:
    """
    CE(z, y) + beta * mean_i KL(p(x_i) || p(x~_i)) (Zhang et al. 2019).

    :param clean_logits: (N, K).
    :param adv_logits: (N, K).
    :param y: (N,) int64, or (N, K) soft labels.
    :param beta: At least 0; 1 / lambda in the paper.
    :param label_smoothing: From 0 to below 1, in the cross-entropy.
    :return: Scalar.
    """
    return _smoothed(clean_logits, y, label_smoothing) + beta * kl_divergence(clean_logits, adv_logits).mean()


def boosted_cross_entropy(adv_logits: Tensor, y: Tensor) -> Tensor:
    """
    BCE = -log p_y(x~) - log(1 - max_{k != y} p_k(x~)) (Wang et al. 2020).

    :param adv_logits: (N, K).
    :param y: (N,) int64.
    :return: (N,).
    """
    logits = full_precision(adv_logits)
    best_wrong = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    # log(1 - p_w) = log sum_{k != w} exp z_k - log sum_k exp z_k stays finite where 1 - p_w rounds to 0.
    log_rest = logits.scatter(1, best_wrong, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    return cross_entropy(logits, y) - log_rest


def doubted_kl(clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
    """
    KL(p(x) || p(x~)) * (1 - p_y(x)) of each sample: the less sure the network is of the clean image, the more it counts.

    :param clean_logits: (N, K); nothing is detached.
    :param adv_logits: (N, K).
    :param y: (N,) int64.
    :return: (N,), at least 0 up to rounding.
    """
    doubt = 1 - F.softmax(full_precision(clean_logits), dim=1).gather(1, y[:, None])[:, 0]
    return kl_divergence(clean_logits, adv_logits) * doubt


def mart_loss(clean_logits: Tensor, adv_logits: Tensor, y: Tensor, *, lam: float = 5.0) -> Tensor:
    """
    mean_i BCE(x~_i, y_i) + lam * mean_i KL(p(x_i) || p(x~_i)) * (1 - p_y(x_i)) (Wang et al. 2020).

    :param clean_logits: (N, K).
    :param adv_logits: (N, K).
    :param y: (N,) int64.
    :param lam: At least 0.
    :return: Scalar.
    """
    return boosted_cross_entropy(adv_logits, y).mean() + lam * doubted_kl(clean_logits, adv_logits, y).mean()


def pairing_distance(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """:return: (N,) the logit pairing of each sample, mean_k (z_ik - z~_ik)^2."""
    return (full_precision(clean_logits) - full_precision(adv_logits)).square().mean(1)


def alp_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    *,
    lam: float = 0.5,
    clean_weight: float = 0.5,
    label_smoothing: float = 0.0,
    pairing_weights: Tensor | None = None,
) -> Tensor:
    """
    clean_weight * CE(z, y) + (1 - clean_weight) * CE(z~, y) + lam * mean_i w_i mean_k (z_ik - z~_ik)^2.

    With the defaults it is adversarial logit pairing as its authors released it (Kannan et al. 2018).

    :param clean_logits: (N, K), z.
    :param adv_logits: (N, K), z~; neither branch is detached.
    :param y: (N,) int64, or (N, K) soft labels.
    :param lam: At least 0. Other code sums the two cross-entropies: its 0.5 is 0.25 here.
    :param clean_weight: 0 (adversarial cross-entropy only) to 1.
    :param label_smoothing: From 0 to below 1, in both cross-entropies.
    :param pairing_weights: (N,), w; ``None`` is 1 for every sample.
    :return: Scalar.
    """
    clean = _smoothed(clean_logits, y, label_smoothing)
    adversarial = _smoothed(adv_logits, y, label_smoothing)
    distance = pairing_distance(clean_logits, adv_logits)
    pairing = distance if pairing_weights is None else pairing_weights * distance
    return clean_weight * clean + (1 - clean_weight) * adversarial + lam * pairing.mean()


def _smoothed(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(full_precision(logits), y, label_smoothing=label_smoothing)


def joint_logits(model: nn.Module, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """One forward of [x; x~]. :return: The logits of either branch, (N, K) each; the adversarial rows are the last ones."""
    logits: Tensor = model(torch.cat([x, x_adv]))
    return logits[: len(x)], logits[len(x) :]


def separate_logits(model: nn.Module, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Two forwards, of which that of x~ alone moves BatchNorm's running statistics. :return: The logits of either, (N, K) each."""
    with side_pass(model):
        clean_logits = model(x)
    return clean_logits, model(x_adv)


class Standard(Objective):
    """
    Empirical risk minimisation: cross-entropy on clean images.

    :param eps: Read by nothing here; the trainer selects checkpoints by robust accuracy at this radius. ``None`` is clean.
    :param norm: The norm of that radius.
    :param label_smoothing: From 0 to below 1.
    """

    name = "standard"
    pixel_units: ClassVar[tuple[str, ...]] = ("eps",)
    soft_labels: ClassVar[bool] = True

    def __init__(self, *, eps: float | None = None, norm: str = "Linf", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.threat = None if eps is None else ThreatModel(norm, eps)
        self.eps, self.norm = None if self.threat is None else self.threat.eps, norm
        self.label_smoothing = _checks.real("label_smoothing", label_smoothing, least=0, below=1)

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """:return: CE(z, y), the clean logits, ``ce_clean``."""
        logits = model(batch.x)
        loss = _smoothed(logits, batch.y, self.label_smoothing)
        return LossTerms(loss, logits, {"ce_clean": loss.detach()})


_MOST_STEPS = 10_000  # of an attack in training: with more than that no epoch would end


class _CommonOptions(TypedDict, total=False):
    eps: float
    norm: str
    eps_step: float | None
    attack: Attack | None
    eps_warmup_share: float


class SingleStepOptions(_CommonOptions, total=False):
    """The parameters of :class:`AdversarialObjective` that a method of one step hands on."""

    random_start: bool


class StartlessOptions(_CommonOptions, total=False):
    """Those that a method with a start of its own hands on."""

    max_iter: int


class AttackOptions(SingleStepOptions, StartlessOptions, total=False):
    """All of them."""


class AdversarialObjective(Objective):
    """
    The inner maximisation that every adversarial method shares; subclasses define the loss.

    :param eps: The radius, in pixel units of [0, 1]; 0 trains on clean images.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param eps_step: Length of an attack step in pixel units of [0, 1]; ``None`` is 2.5 * eps / max_iter.
    :param max_iter: Attack steps, at least 1.
    :param random_start: Whether the attack starts at a random point of the ball.
    :param attack: (model, x, y) -> x_adv in place of PGD; the result is projected into the threat model. A callable, so it
        does not serialise.
    :param eps_warmup_share: The share of the run over which the radius, and the steps with it, rise from 0; 0 is the full radius
        from the first step on, as published. On MNIST a network may never start without.
    """

    def __init__(
        self,
        *,
        eps: float,
        norm: str = "Linf",
        eps_step: float | None = None,
        max_iter: int = 10,
        random_start: bool = True,
        attack: Attack | None = None,
        eps_warmup_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.threat = ThreatModel(norm, eps)
        self.eps, self.norm = self.threat.eps, norm
        self.eps_step = eps_step
        if eps_step is not None:
            remedy = "eps=0 trains on clean images"
            self.eps_step = _checks.real("eps_step", eps_step, above=0, most=_checks.GREATEST, remedy=remedy)
        remedy = "without a step nothing is attacked; eps=0 trains on clean images"
        self.max_iter = _checks.whole("max_iter", max_iter, least=1, most=_MOST_STEPS, remedy=remedy)
        self.random_start = _checks.flag("random_start", random_start)
        if attack is not None and not callable(attack):
            raise _checks.refuse("attack", repr(attack), "a callable (model, x, y) -> x_adv, or None for PGD")
        self.attack = attack
        self.eps_warmup_share = _checks.real("eps_warmup_share", eps_warmup_share, least=0, most=1)

    def adversarial(self, model: nn.Module, batch: Batch) -> Tensor:
        """
        The inner maximisation, in eval mode, without gradients to the weights; done once for a batch that keeps its images.

        :param model: In any mode, which it gets back.
        :param batch: Its ``random`` is where the attack's random numbers come from.
        :return: (N, C, H, W) in [0, 1], within the threat model, detached.
        """
        if batch.y.ndim != 1 and not self.soft_labels:
            raise _checks.refuse("y", "soft labels", "class indices (N,)", f"{self.name} needs one true class an image")
        if batch.kept:
            # What draws after the attack, dropout say, and the next step's attack, go on as if it had been made here.
            set_global_states(batch.kept)
            if batch.random is not None:
                batch.random.load_state_dict({"generator": batch.kept["generator"]})
            found: Tensor = batch.kept["x_adv"]
            return found
        x, share = batch.x.detach(), self.radius(batch.progress)
        threat = self.threat.scaled(share)
        with evaluating(model), frozen(model):
            if self.attack is None:
                x_adv = self.maximise(model, batch, threat, None if self.eps_step is None else share * self.eps_step)
            else:
                x_adv = self.attack(model, x.clone(), batch.y)  # it may work in place
        if x_adv.shape != x.shape:
            raise _checks.refuse("attack", f"images of shape {tuple(x_adv.shape)}", f"the batch's {tuple(x.shape)}")
        x_adv = x_adv.detach().to(x)
        # An attack is not to be trusted: what it returns may be outside the ball, and a NaN would end the training.
        x_adv = threat.project(torch.where(torch.isfinite(x_adv), x_adv, x), x)
        if batch.kept is not None:
            own = {} if batch.random is None else batch.random.state_dict()
            batch.kept.update({"x_adv": x_adv, **own, **global_states()})
        return x_adv

    def maximise(self, model: nn.Module, batch: Batch, threat: ThreatModel, eps_step: float | None) -> Tensor:
        """
        The method's own attack: PGD on the cross-entropy.

        :param threat: With the radius in force. :param eps_step: Likewise; ``None`` is the attack's default.
        :return: (N, C, H, W), the adversarial images.
        """
        return pgd(
            model,
            batch.x,
            batch.y,
            threat=threat,
            max_iter=self.max_iter,
            eps_step=eps_step,
            random_start=self.random_start,
            random=batch.random,
        )


class PGDAT(AdversarialObjective):
    """
    Adversarial training (Madry et al. 2018): cross-entropy on the images of PGD.

    :param label_smoothing: From 0 to below 1. The other parameters are those of :class:`AdversarialObjective`.
    """

    name = "pgd-at"
    soft_labels: ClassVar[bool] = True

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(**options)
        self.label_smoothing = _checks.real("label_smoothing", label_smoothing, least=0, below=1)

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """:return: CE(z~, y), the adversarial logits, ``ce_adv``."""
        logits = model(self.adversarial(model, batch))
        loss = _smoothed(logits, batch.y, self.label_smoothing)
        return LossTerms(loss, logits, {"ce_adv": loss.detach()})


class FGSMRS(PGDAT):
    """
    Fast adversarial training (Wong et al. 2020): PGD-AT with one step from a random start.

    It can fall to catastrophic overfitting: robust against its own step, not at all against PGD. Select by PGD accuracy.

    :param eps_step: Length of the step in pixel units of [0, 1]; ``None`` is 1.25 * eps. The other parameters are those of
        :class:`PGDAT`.
    """

    name = "fgsm-rs"
    single_step: ClassVar[bool] = True

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        **options: Unpack[SingleStepOptions],
    ) -> None:
        super().__init__(max_iter=1, label_smoothing=label_smoothing, **options)

    def maximise(self, model: nn.Module, batch: Batch, threat: ThreatModel, eps_step: float | None) -> Tensor:
        """:return: (N, C, H, W), the images of one step of 1.25 * eps (or `eps_step`) from a random start."""
        return super().maximise(model, batch, threat, 1.25 * threat.eps if eps_step is None else eps_step)


class TRADES(AdversarialObjective):
    """
    TRADES (Zhang et al. 2019): clean cross-entropy and the KL divergence between clean and adversarial predictions.

    The inner maximisation is of the KL itself, from x + 0.001 N(0, 1): at x its gradient is exactly zero, so there is no
    ``random_start`` to turn off. Clean and adversarial images go through the network in two forwards, as in the authors' code;
    only the adversarial one moves BatchNorm's running statistics.

    :param beta: Weight of the KL, at least 0; larger trades clean accuracy for robustness.
    :param label_smoothing: From 0 to below 1, in the cross-entropy. The other parameters are those of :class:`AdversarialObjective`.
    """

    name = "trades"
    soft_labels: ClassVar[bool] = True

    def __init__(
        self,
        *,
        beta: float = 6.0,
        label_smoothing: float = 0.0,
        **options: Unpack[StartlessOptions],
    ) -> None:
        super().__init__(**options)
        self.beta = _checks.weight("beta", beta)
        self.label_smoothing = _checks.real("label_smoothing", label_smoothing, least=0, below=1)

    def maximise(self, model: nn.Module, batch: Batch, threat: ThreatModel, eps_step: float | None) -> Tensor:
        """:return: (N, C, H, W), the images of PGD on KL(p(x) || p(x~)), p(x) held fixed."""
        with torch.no_grad():
            clean_logits = model(batch.x)
        return pgd(
            model,
            batch.x,
            batch.y,
            threat=threat,
            max_iter=self.max_iter,
            eps_step=eps_step,
            loss=lambda adv_logits, _: kl_divergence(clean_logits, adv_logits),
            start=batch.x + _TRADES_START * normal(batch.x, batch.random),
        )

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """:return: CE(z, y) + beta * KL(p(x) || p(x~)), the adversarial logits, ``ce_clean`` and ``kl``."""
        clean_logits, adv_logits = separate_logits(model, batch.x, self.adversarial(model, batch))
        loss = trades_loss(clean_logits, adv_logits, batch.y, beta=self.beta, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            ce = _smoothed(clean_logits, batch.y, self.label_smoothing)
            kl = kl_divergence(clean_logits, adv_logits).mean()
        return LossTerms(loss, adv_logits, {"ce_clean": ce, "kl": kl})


class MART(AdversarialObjective):
    """
    MART (Wang et al. 2020): a boosted adversarial cross-entropy, and the KL weighted by the doubt about the clean image.

    The attack is PGD on the cross-entropy. Clean and adversarial images go through the network in two forwards, as in the
    authors' code; only the adversarial one moves BatchNorm's running statistics.

    :param lam: Weight of the KL, at least 0. The other parameters are those of :class:`AdversarialObjective`.
    """

    name = "mart"

    def __init__(
        self,
        *,
        lam: float = 5.0,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(**options)
        self.lam = _checks.weight("lam", lam)

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """:return: :func:`mart_loss`, the adversarial logits, ``bce_adv`` and ``doubted_kl``."""
        clean_logits, adv_logits = separate_logits(model, batch.x, self.adversarial(model, batch))
        loss = mart_loss(clean_logits, adv_logits, batch.y, lam=self.lam)
        with torch.no_grad():
            bce = boosted_cross_entropy(adv_logits, batch.y).mean()
            kl = doubted_kl(clean_logits, adv_logits, batch.y).mean()
        return LossTerms(loss, adv_logits, {"bce_adv": bce, "doubted_kl": kl})


class ALP(AdversarialObjective):
    """
    Adversarial logit pairing (Kannan et al. 2018) as its authors released it: :func:`alp_loss` on one joint forward.

    Alone it fell to 0.6 % under stronger attack on ImageNet-64 (Engstrom et al. 2018): judge it by AutoAttack.

    :param lam: Weight of the pairing, at least 0.
    :param clean_weight: Share of the clean cross-entropy, 0 (adversarial only) to 1; 0.5 is the authors' average.
    :param label_smoothing: From 0 to below 1. The other parameters are those of :class:`AdversarialObjective`.
    """

    name = "alp"
    soft_labels: ClassVar[bool] = True

    def __init__(
        self,
        *,
        lam: float = 0.5,
        clean_weight: float = 0.5,
        label_smoothing: float = 0.0,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(**options)
        self.lam = _checks.weight("lam", lam)
        self.clean_weight = _checks.real("clean_weight", clean_weight, least=0, most=1)
        self.label_smoothing = _checks.real("label_smoothing", label_smoothing, least=0, below=1)

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """:return: :func:`alp_loss`, the adversarial logits, ``ce_clean``, ``ce_adv`` and ``pairing``."""
        clean_logits, adv_logits = joint_logits(model, batch.x, self.adversarial(model, batch))
        loss = alp_loss(
            clean_logits,
            adv_logits,
            batch.y,
            lam=self.lam,
            clean_weight=self.clean_weight,
            label_smoothing=self.label_smoothing,
        )
        return LossTerms(loss, adv_logits, self.log_terms(clean_logits, adv_logits, batch.y))

    def log_terms(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        """:return: The unweighted components, detached."""
        with torch.no_grad():
            return {
                "ce_clean": _smoothed(clean_logits, y, self.label_smoothing),
                "ce_adv": _smoothed(adv_logits, y, self.label_smoothing),
                "pairing": pairing_distance(clean_logits, adv_logits).mean(),
            }
