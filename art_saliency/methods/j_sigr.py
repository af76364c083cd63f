"""
J-SIGR: Jacobian norm with selective input gradient regularization, a reconstruction from the abstract.

| Source: Liu, Wu, Li, Boussaid, Bennamoun, Xie, Liang: Jacobian norm with Selective Input Gradient Regularization for
  improved and interpretable adversarial defense. arXiv 2207.13036; Pattern Recognition 145:109902, 2024. The authors'
  repository holds no code of the method; the abstract's clauses are quoted beside the lines that implement them, and
  everything else is a choice (see j_sigr.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, InnerAttack, Reachable, cross_entropy
from art_saliency.gradients import check_second_derivatives, input_gradient, jacobian_projection, sphere_directions
from art_saliency.methods.base import Batch, LossTerms, Objective, warmup
from art_saliency.methods.baselines import full_precision
from art_saliency.methods.points import Point, extreme_point, image_itself, random_point
from art_saliency.modes import refuse_dropout, side_pass, training
from art_saliency.perturbation_saliency import (
    SCORES,
    load_or_compute,
    maps_fingerprint,
    perturbation_saliency,
    salient_mask,
)
from art_saliency.randomness import RandomSource, uniform
from art_saliency.threat import NORMS, ThreatModel

__all__ = [
    "DIRECTIONS",
    "JACOBIAN",
    "JSIGR",
    "LINEARISE_AT",
    "PENALTIES",
    "SELECTIVE_SCORES",
    "dual_norm",
    "margin_directions",
    "selective_penalty",
    "squared_norm",
]

# --- the size of a gradient: (rows, threat) -> (N,) -------------------------------------------------------------------


def squared_norm(rows: Tensor, threat: ThreatModel | None = None) -> Tensor:
    """:return: (N,) half the squared L2 norm of (N, C, H, W), as double backpropagation has it; `threat` is not read."""
    return 0.5 * rows.square().flatten(1).sum(1)


def dual_norm(rows: Tensor, threat: ThreatModel) -> Tensor:
    """
    The most that a perturbation of the threat model can move a function of this gradient, to first order.

    :param rows: (N, C, H, W) gradients.
    :return: (N,): eps * ||g||_1 for Linf, eps * ||g||_2 for L2 (whose derivative at 0 is 0 here).
    """
    flat = rows.flatten(1)
    if threat.norm == "Linf":
        return threat.eps * flat.abs().sum(1)
    squares = flat.square().sum(1)
    # The square root has no derivative at 0.
    return threat.eps * torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)


PENALTIES: dict[str, Callable[[Tensor, ThreatModel], Tensor]] = {"dual": dual_norm, "squared": squared_norm}
"""How the size of J^T w is measured: (rows, threat) -> (N,)."""

# --- directions of logit space: what the Jacobian is projected on -----------------------------------------------------

Directions = list[tuple[Tensor, "Tensor | float"]]
"""Pairs of w (N, K), detached, and its weight, a number or (N,): the norm of J is the weighted sum of the sizes of J^T w."""


def sphere(logits: Tensor, y: Tensor, projections: int | None, random: RandomSource | None) -> Directions:
    """:return: :func:`art_saliency.gradients.sphere_directions`: with the squared norm, half of ||J||_F^2."""
    return [(w, weight) for w, weight in sphere_directions(logits, projections, random)]


def margin_directions(
    logits: Tensor, y: Tensor, projections: int | None = 1, random: RandomSource | None = None
) -> Directions:
    """
    e_y - e_k, the true class against a wrong one: J^T of it is the gradient of a margin, which is what an attack must close.

    The wrong class k is drawn with its share q_k of the wrong classes' softmax, so that the closest ones are met most.

    :param logits: (N, K), K at least 2.
    :param y: (N,) int64.
    :param projections: How many draws, at least 1; ``None`` gives all K, weighed by q_k (and 0 for the true class).
    :param random: Where the draws come from; ``None`` is torch's global generator.
    :return: Pairs of w (N, K), of length sqrt(2), and a weight.
    """
    classes = logits.shape[1]
    true = F.one_hot(y, classes).to(logits.dtype)
    shares = logits.detach().masked_fill(true > 0, -torch.inf).softmax(1)
    if projections is None:
        axes = torch.eye(classes, dtype=logits.dtype, device=logits.device)
        return [(true - axes[k], shares[:, k]) for k in range(classes)]
    _checks.whole("projections", projections, least=1)
    upto = shares.cumsum(1)
    drawn = [(upto <= uniform(shares[:, :1], random) * upto[:, -1:]).sum(1) for _ in range(projections)]
    return [(true - F.one_hot(k.clamp_max(classes - 1), classes).to(true), 1 / projections) for k in drawn]


DIRECTIONS: dict[str, Callable[[Tensor, Tensor, int | None, RandomSource | None], Directions]] = {
    "margin": margin_directions,
    "sphere": sphere,
}
"""Which directions of logit space: (logits, y, projections, random) -> pairs of direction and weight."""

# --- where gradients are taken ----------------------------------------------------------------------------------------


LINEARISE_AT: dict[str, Point] = {
    "extreme-point": extreme_point,
    "random-point": random_point,
    "image": image_itself,
}
"""Where the network is linearised: (x, threat, random) -> x0."""

# --- how the Jacobian's norm enters the loss --------------------------------------------------------------------------

Sizes = list[tuple[Tensor, "Tensor | float", Tensor]]
"""Direction w (N, K), its weight, and the size (N,) of J^T w, in the graph."""


def margin_cross_entropy(logits: Tensor, y: Tensor, sizes: Sizes, weight: float) -> Tensor:
    """
    "Linearized robustness": the cross-entropy after an attack has taken `weight` |J^T (e_y - e_k)| from the margin to class k.

    With the dual norm and `weight` 1 that is the most that an attack can take, to first order. Unlike a sum, it asks nothing more of
    an image whose margin is wide enough.

    :param logits: (N, K). :param y: (N,). :param sizes: Along :func:`margin_directions`.
    :return: (N,): sum_k q_k CE(z + weight |J^T (e_y - e_k)| e_k, y), or its estimate by the drawn k.
    """
    return torch.stack(
        [share * cross_entropy(logits + weight * size[:, None] * F.relu(-w), y) for w, share, size in sizes]
    ).sum(0)


def added_norm(logits: Tensor, y: Tensor, sizes: Sizes, weight: float) -> Tensor:
    """:return: (N,) CE + weight |J|, |J| the weighted sum of the sizes."""
    return cross_entropy(logits, y) + weight * _total(sizes)


def _total(sizes: Sizes) -> Tensor:
    return torch.stack([share * size for _, share, size in sizes]).sum(0)


class JacobianForm(NamedTuple):
    """A way into the loss, (logits, y, sizes, weight) -> (N,), and the weight that suits it."""

    loss: Callable[[Tensor, Tensor, Sizes, float], Tensor]
    lambda_j: float


JACOBIAN: dict[str, JacobianForm] = {
    "in-margin": JacobianForm(margin_cross_entropy, 1.0),
    "added": JacobianForm(added_norm, 0.25),
}
"""By name."""

# --- the selective term -----------------------------------------------------------------------------------------------


def true_logit(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (N,) z_y."""
    return logits.gather(1, y[:, None])[:, 0]


SELECTIVE_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"loss": cross_entropy, "logit": true_logit}
"""What the selective term may be the input gradient of, beside what the Jacobian is projected on: (logits, y) -> (N,)."""
_OWN = "jacobian"


def selective_penalty(g: Tensor, S: Tensor, size: Callable[[Tensor], Tensor] = squared_norm) -> Tensor:
    """
    "Selective input gradient regularization": the size of the input gradient where the image is *not* salient, M * g, M = 1 - S.

    :param g: (N, C, H, W) input gradients, in the graph.
    :param S: (N, 1, H, W) of 0 and 1, 1 = salient; a label, detached here. S = 0 everywhere is double backpropagation.
    :param size: (N, C, H, W) -> (N,).
    :return: (N,), half the squared L2 norm unless said otherwise.
    """
    return size((1 - S.detach()) * g)


class _Row(NamedTuple):
    """A function of the logits, (N, K) -> (N,), its weight, a number or (N,), and its input gradient (N, C, H, W)."""

    on: Callable[[Tensor], Tensor]
    weight: Tensor | float
    gradient: Tensor


class _Linearised(NamedTuple):
    """Logits as the network returned them, the same in full precision, the Jacobian's sizes, the selective sizes (N,), and g."""

    logits: Tensor
    z: Tensor
    sizes: Sizes
    selective: Tensor | None
    g: Tensor | None


class JSIGR(Objective):
    """
    J-SIGR, reconstructed: L = mean_i [ CE(z_i + lambda_j |J_i| e_k, y_i) + lambda_s |M_i * g_i| ]. No adversarial examples.

    J = dz/dx is the Jacobian of the logits at a random corner of the ball, |J| the size of its row e_y - e_k, k a wrong class, which
    the cross-entropy has taken from the margin; g is that row too, the input gradient of the margin, M = 1 - S the pixels that
    perturbation saliency leaves out. |.| is the size of a gradient, see `penalty`.

    :param eps: Radius of the threat model, in pixel units: checkpoints are selected at it, ``penalty="dual"`` weighs by it, and
        `linearise_at` draws from its ball.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param lambda_j: Weight of the Jacobian's norm, at least 0; 0 leaves the term and its cost out. ``None`` takes 1 in the margin, the
        bound to first order (more allows for curvature), and 0.25 beside it.
    :param lambda_s: Weight of the selective term, at least 0; 0 leaves the term, its maps and its cost out.
    :param penalty: ``"dual"``: eps times the dual norm (L1 for Linf), the first-order effect of the worst perturbation.
        ``"squared"``: half the squared L2 norm, as in double backpropagation.
    :param directions: What the Jacobian is projected on: ``"margin"``, true class against a drawn wrong one;
        ``"sphere"``, a random direction of all logits: with ``penalty="squared"`` that estimates ||J||_F^2 / 2.
    :param jacobian: ``"in-margin"``: CE(z + lambda_j |J| e_k), for margin directions; ``"added"``: CE + lambda_j |J|.
    :param linearise_at: Where logits and gradients are taken: a random ``"extreme-point"`` of the ball (a corner for
        Linf), a ``"random-point"`` inside it, or the ``"image"`` itself.
    :param projections: Directions a sample and step, at least 1; ``None`` takes all K.
    :param selective_on: What g is the gradient of: ``"jacobian"``, what J is projected on, so that one row serves both terms; the
        ``"loss"`` or the true class's ``"logit"``, at half as much again.
    :param saliency_share: The share of the pixels that is salient and left free, 0 to 1.
    :param saliency_score: ``"logits"`` or ``"log-probability"``; this and the next three are those of
        :func:`~art_saliency.perturbation_saliency.perturbation_saliency`.
    :param saliency_stride: Pixels between grid points.
    :param saliency_sigma: Of the blur, in pixels.
    :param saliency_radius: Of the soft disc, in pixels.
    :param warmup_share: The share of the run over which both weights rise from 0.
    :param form: ``"double-backward"``, or ``"finite-difference"``: no second derivatives, three forward passes.
    :param h: Length of the finite difference, in units of the [0, 1] pixel (a step of `h` in every pixel for Linf's dual).
    :param teacher: The frozen network whose saliency is imitated. Batches that bring no maps are explained on the fly by it, or by the
        network in training itself when it is ``None``; either costs some twenty plain steps a step. It lies where its owner put it.
    """

    name = "j-sigr"
    double_backward: ClassVar[bool] = True
    pixel_units: ClassVar[tuple[str, ...]] = ("eps",)
    map_fill: ClassVar[float] = 0.0
    """What augmentation pads maps with: S = 0, so M = 1."""

    def __init__(
        self,
        *,
        eps: float | None = None,
        norm: str = "Linf",
        lambda_j: float | None = None,
        lambda_s: float = 0.25,
        penalty: str = "dual",
        directions: str = "margin",
        jacobian: str = "in-margin",
        linearise_at: str = "extreme-point",
        projections: int | None = 1,
        selective_on: str = _OWN,
        saliency_share: float = 0.3,
        saliency_score: str = "logits",
        saliency_stride: float | None = None,
        saliency_sigma: float | None = None,
        saliency_radius: float | None = None,
        warmup_share: float = 0.2,
        form: str = "double-backward",
        h: float = 1e-2,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.threat = None if eps is None else ThreatModel(norm, eps)
        self.eps, self.norm = None if self.threat is None else self.threat.eps, _checks.one_of("norm", norm, NORMS)
        self.jacobian = _checks.one_of("jacobian", jacobian, JACOBIAN)
        self.lambda_j = JACOBIAN[jacobian].lambda_j if lambda_j is None else _checks.weight("lambda_j", lambda_j)
        self.lambda_s = _checks.weight("lambda_s", lambda_s)
        self.penalty = _checks.one_of("penalty", penalty, PENALTIES)
        if penalty == "dual" and eps is None:
            raise _checks.refuse("eps", None, "a radius, which weighs the dual norm", "or say penalty='squared'")
        self.linearise_at = _checks.one_of("linearise_at", linearise_at, LINEARISE_AT)
        if linearise_at != "image" and eps is None:
            raise _checks.refuse("eps", None, "a radius, within which a point is drawn", "or say linearise_at='image'")
        self.directions = _checks.one_of("directions", directions, DIRECTIONS)
        if jacobian == "in-margin" and directions != "margin":
            got = f"{directions!r}, which has no margin"
            raise _checks.refuse("directions", got, "'margin'", "or say jacobian='added'")
        self.projections = (
            None if projections is None else _checks.whole("projections", projections, least=1, most=10_000)
        )
        if projections is None and directions == "sphere" and penalty == "dual":
            remedy = "say penalty='squared' or directions='margin'"
            raise _checks.refuse(
                "projections", None, "a number: the axes do not stand for the sphere in this norm", remedy
            )
        self.selective_on = _checks.one_of("selective_on", selective_on, (_OWN, *SELECTIVE_SCORES))
        self.saliency_share = _checks.real("saliency_share", saliency_share, least=0, most=1)
        self.saliency_score = _checks.one_of("saliency_score", saliency_score, SCORES)
        self.saliency_stride = _pixels("saliency_stride", saliency_stride)
        self.saliency_sigma = _pixels("saliency_sigma", saliency_sigma)
        self.saliency_radius = _pixels("saliency_radius", saliency_radius)
        self.warmup_share = _checks.real("warmup_share", warmup_share, least=0, most=1)
        self.form = _checks.one_of("form", form, ("double-backward", "finite-difference"))
        self.full_float32 = form == "finite-difference"
        self.h = _checks.real("h", h, above=0, most=1)
        self.teacher = teacher

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the teacher out of ``parameters()`` and ``state_dict()``: it is frozen, and somebody else's."""
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- saliency maps ------------------------------------------------------------------------------------------------

    @property
    def needs_maps(self) -> bool:
        """Whether ``batch.maps`` is read: the masks S, (N, 1, H, W), moved with the images, padded with ``map_fill``."""
        return self.lambda_s > 0

    def compute_maps(
        self,
        teacher: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        *,
        batch_size: int = 256,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """
        "Perturbation-based saliency maps" of a teacher, at grid size: once an image before training, some 21 plain epochs.

        :param teacher: Maps (N, C, H, W) in [0, 1] to logits, where it lies; run in eval mode.
        :param x: (N, C, H, W) in [0, 1] or uint8. :param y: (N,), read by ``saliency_score="log-probability"``.
        :param progress: Called with the number of images finished: ``tqdm.update``.
        :return: (N, 1, h, w) scores, on the device of `x`; :meth:`full_maps` makes masks of them.
        """
        return perturbation_saliency(teacher, x, y, batch_size=batch_size, progress=progress, **self._map_settings())

    def cached_maps(
        self,
        cache: str | os.PathLike[str] | None,
        teacher: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """
        :meth:`compute_maps` through a file that is used when teacher, images and settings are those it was made of.

        :param cache: The file; ``None`` computes.
        :param options: ``batch_size`` and ``progress`` of :meth:`compute_maps`.
        """
        labels = y if self.saliency_score == "log-probability" else None
        fingerprint = maps_fingerprint(teacher, x, self._map_settings(), labels) if cache is not None else ""
        return load_or_compute(cache, fingerprint, lambda: self.compute_maps(teacher, x, y, **options)).to(x.device)

    def full_maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """:return: S (N, 1, H, W) of 0 and 1 at the images' resolution, of scores (N, 1, h, w); each image's depends on it alone."""
        return salient_mask(scores, size, self.saliency_share)

    def _map_settings(self) -> dict[str, Any]:
        names = ("stride", "sigma", "radius", "score")
        return {name: getattr(self, f"saliency_{name}") for name in names}

    def _salient(self, model: nn.Module, batch: Batch) -> Tensor:
        """S of the batch: what came with it, or what the teacher (else the network itself) finds salient right now."""
        if batch.maps is None:
            explainer = model if self.teacher is None else self.teacher
            scores = self.compute_maps(explainer, batch.x, batch.y, batch_size=len(batch.x))
            return self.full_maps(scores, (batch.x.shape[-2], batch.x.shape[-1]))
        count, _, height, width = batch.x.shape
        if batch.maps.shape != (count, 1, height, width):
            got = f"shape {tuple(batch.maps.shape)}"
            raise _checks.refuse("maps", got, f"({count}, 1, {height}, {width})", "apply full_maps before augmentation")
        return batch.maps.detach().to(batch.x.dtype)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """
        See :class:`Objective`. Terms: ce, logit_norm; jacobian with `lambda_j`; selective, gradient_salient and gradient_other
        (mean L2 norms of g inside and outside S) with `lambda_s`. Logits and terms are those of the point of `linearise_at`.
        """
        x = LINEARISE_AT[self.linearise_at](batch.x, self._threat, batch.random)
        if not (self.lambda_j or self.lambda_s):
            logits = model(x)
            return self._assembled(logits, full_precision(logits), batch, [], None, {})
        salient = self._salient(model, batch) if self.lambda_s else None
        # Second derivatives, and differences of logits, drown in the rounding of half precision.
        with torch.autocast(batch.x.device.type, enabled=False):
            logits, z, sizes, selective, g = self._linearise(model, x, batch, salient)
            figures = {}
            if g is not None and salient is not None:
                inside, outside = salient * g.detach(), (1 - salient) * g.detach()
                figures = {"gradient_salient": _mean_length(inside), "gradient_other": _mean_length(outside)}
            return self._assembled(logits, z, batch, sizes, selective, figures)

    def _assembled(
        self,
        logits: Tensor,
        z: Tensor,
        batch: Batch,
        sizes: Sizes,
        selective: Tensor | None,
        figures: dict[str, Tensor],
    ) -> LossTerms:
        factor, parts = warmup(batch.progress, self.warmup_share), {}
        ce = cross_entropy(z, batch.y).mean()
        loss = ce
        if sizes:
            loss = JACOBIAN[self.jacobian].loss(z, batch.y, sizes, factor * self.lambda_j).mean()
            parts["jacobian"] = _total(sizes).mean()
        if selective is not None:
            parts["selective"] = selective.mean()
            loss = loss + factor * self.lambda_s * parts["selective"]
        terms = {"ce": ce, **parts, **figures, "logit_norm": _mean_length(z)}
        return LossTerms(loss, logits, {name: value.detach() for name, value in terms.items()})

    @property
    def _threat(self) -> ThreatModel:
        # Without a radius there is neither a ball to draw in nor a dual norm: nothing reads this one's.
        return self.threat or ThreatModel(self.norm, 0.0)

    def _size(self, rows: Tensor) -> Tensor:
        return PENALTIES[self.penalty](rows, self._threat)

    def _directions(self, logits: Tensor, batch: Batch) -> Directions:
        detached = full_precision(logits).detach()
        return DIRECTIONS[self.directions](detached, batch.y, self.projections, batch.random)

    def check_network(self, model: nn.Module, x: Tensor) -> None:
        """
        See :class:`Objective`.

        :raises UnsupportedModelError: When the network has no second derivatives, or, in ``form="finite-difference"``, dropout.
        """
        if not (self.lambda_j or self.lambda_s):
            return
        if self.form == "finite-difference":
            with training(model):
                refuse_dropout(model)
        else:
            check_second_derivatives(model, x)

    def _linearise(self, model: nn.Module, point: Tensor, batch: Batch, salient: Tensor | None) -> _Linearised:
        """
        One forward pass for the cross-entropy, J and g, whose sizes are taken from them, or, without double backward, from differences
        along the detached steepest directions (Finlay and Oberman 2019).

        The shifted passes are side passes: what hangs on a forward pass (BatchNorm's statistics, auxiliary losses) hangs on the
        one whose logits are returned.
        """
        exact, own = self.form == "double-backward", self.selective_on == _OWN
        if not exact:
            refuse_dropout(model)
        x = point.detach().requires_grad_(True)
        logits = model(x)
        z = full_precision(logits)

        def size(on: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
            return self._size(gradient) if exact else self._slope(model, x, gradient, on, z)

        rows: list[_Row] = []
        sizes: Sizes = []
        selective = g = None
        with nullcontext() if exact else side_pass(model):
            if self.lambda_j or own:
                # "Linearized robustness through Jacobian normalization".
                directions = self._directions(z, batch)
                for w, weight in directions:
                    gradient = jacobian_projection(z, x, w, create_graph=exact, retain_graph=True)
                    rows.append(_Row(partial(_along, w), weight, gradient))
                if self.lambda_j:
                    sizes = [
                        (w, row.weight, size(row.on, row.gradient))
                        for (w, _), row in zip(directions, rows, strict=True)
                    ]
            if salient is not None:
                # "Regularizes the perturbation-based saliency maps to imitate the model's interpretable predictions".
                if not own:
                    score = SELECTIVE_SCORES[self.selective_on]
                    gradient = input_gradient(score(z, batch.y).sum(), x, create_graph=exact, retain_graph=True)
                    rows = [_Row(lambda moved: score(moved, batch.y), 1.0, gradient)]
                parts = [row.weight * selective_penalty(row.gradient, salient, partial(size, row.on)) for row in rows]
                selective, g = torch.stack(parts).sum(0), rows[0].gradient
        return _Linearised(logits, z, sizes, selective, g)

    def _slope(
        self, model: nn.Module, x: Tensor, gradient: Tensor, on: Callable[[Tensor], Tensor], logits: Tensor
    ) -> Tensor:
        """
        :param gradient: (N, C, H, W), along which the function `on` of the logits rises most. :param logits: Those of `x`.
        :return: (N,) sizes of the gradient: the slope along its steepest direction is its dual norm, whose penalty is that of a gradient of one pixel.
        """
        difference = on(self._shifted_logits(model, x, gradient)) - on(logits)
        return self._size((difference / self.h)[:, None])

    def _shifted_logits(self, model: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        """:return: (N, K) logits at a distance `h` along the direction in which a function of gradient `rows` rises most."""
        ball = ThreatModel(self.norm if self.penalty == "dual" else "L2", self.h)
        x = x.detach()
        return full_precision(model(x + self.h * ball.ascent_direction(rows.detach())))

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def adaptive_variants(self) -> Mapping[str, AdaptiveAttack]:
        """
        An attack that perturbs the salient pixels alone, which the mask leaves unregularised.

        :return: ``"salient pixels"``; nothing without a selective term.
        """
        return {"salient pixels": self._attack_salient} if self.lambda_s else {}

    def _attack_salient(self, model: nn.Module, x: Tensor, y: Tensor, attack: InnerAttack) -> Tensor:
        explainer = model if self.teacher is None else self.teacher
        salient = self.full_maps(self.compute_maps(explainer, x, y), (x.shape[-2], x.shape[-1]))
        reachable = Reachable(model, x, salient)
        return reachable.confined(attack(reachable, x, y))


def _along(direction: Tensor, logits: Tensor) -> Tensor:
    return (logits * direction).sum(1)


def _mean_length(rows: Tensor) -> Tensor:
    length: Tensor = rows.detach().flatten(1).norm(dim=1).mean()
    return length


def _pixels(name: str, value: float | None) -> float | None:
    return None if value is None else _checks.real(name, value, above=0, most=10_000)
