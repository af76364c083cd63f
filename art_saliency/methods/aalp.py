"""
Adaptive adversarial logits pairing, reconstructed from the abstract of Wu et al. (arXiv 2005.11904): see ``aalp.md``.

"An adaptive feature optimization module with Guided Dropout" and "an adaptive sample weighting module" on top of ALP;
with both off it *is* ALP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, InnerAttack, cross_entropy
from art_saliency.errors import UnsupportedModelError
from art_saliency.gradients import top_share_mask
from art_saliency.methods.base import Batch, LossTerms, warmup
from art_saliency.methods.baselines import ALP, AttackOptions, alp_loss, full_precision, joint_logits
from art_saliency.methods.layers import at_layer, find_guided_layer
from art_saliency.modes import evaluating, frozen
from art_saliency.randomness import RandomSource, uniform

__all__ = [
    "AALP",
    "BRANCHES",
    "GUIDES",
    "WEIGHTINGS",
    "aalp_loss",
    "channel_contributions",
    "channels_for_share",
    "contributions",
    "guided_mask",
    "mask_leak",
    "opposing_share",
    "pairing_weights",
]

GUIDES = ("true", "predicted", "random")
"""Whose logit a contribution is to: the true class, the predicted class; or a mask that ranks at random, as a control."""

WEIGHTINGS = ("p_y", "correct", "p_y_above", "constant")
"""What a sample's pairing counts: p_y(x); 1[x is classified correctly]; 1[p_y(x) >= p_y(x~)]; 1."""

BRANCHES = ("clean", "separate", "both")
"""
Which features are masked: the clean ones, so that the adversarial logits are paired with what the high-contribution features
alone say; either branch by its own contributions; both by the clean ones.
"""


# --- observation and mask -------------------------------------------------------------------------------------------------


def channel_contributions(features: Tensor, gradients: Tensor) -> Tensor:
    """
    c_k = mean(ds/dA_k) * mean(A_k), the means over positions (choice: the abstract says "contribution" only).

    :param features: (N, C, H, W) or (N, C), A.
    :param gradients: As `features`, ds/dA.
    :return: (N, C), detached.
    """
    scores = [full_precision(tensor.detach()) for tensor in (features, gradients)]
    a, g = (tensor.mean((2, 3)) if tensor.ndim == 4 else tensor for tensor in scores)
    return a * g


def channels_for_share(contributions: Tensor, share: float = 0.9) -> Tensor:
    """
    How many channels, highest first, hold a share of the summed |c_k|: observation 1 expects few in a robust network.

    :param contributions: (N, C).
    :param share: 0 to 1.
    :return: (N,) int64; 0 where every contribution is 0.
    """
    _checks.real("share", share, above=0, most=1)
    held = contributions.abs().double().sort(1, descending=True).values.cumsum(1)
    # The last cumulative sum, not a sum of its own: their roundings differ, and a share of 1 would never be reached.
    return torch.where(held[:, -1] > 0, (held < share * held[:, -1:]).sum(1) + 1, 0)


def opposing_share(clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
    """
    The share of samples whose pairing gradient opposes their classification gradient: (p - onehot(y)) . (z - z~) < 0.

    Observation 2: on these "the logits pairing loss is overemphasized and obstructs minimizing the classification loss".

    :param clean_logits: (N, K), z; p is its softmax.
    :param adv_logits: (N, K), z~.
    :param y: (N,) int64.
    :return: Scalar, 0 to 1, detached.
    """
    z, z_adv = full_precision(clean_logits.detach()), full_precision(adv_logits.detach())
    classification = z.softmax(1) - F.one_hot(y, z.shape[1])
    return ((classification * (z - z_adv)).sum(1) < 0).to(z.dtype).mean()


def guided_mask(
    contributions: Tensor,
    rate: float,
    *,
    probability: float = 1.0,
    rescale: bool = False,
    random: RandomSource | None = None,
) -> Tensor:
    """
    Guided Dropout: "systematically pursue fewer high-contribution features" by dropping the lowest |c_k| of each sample.

    Ranking by |c|, not by c: a signed ranking for the true class tells the label, which the network then reads off the mask.

    :param contributions: (N, C).
    :param rate: The share of channels that are candidates, from 0 to below 1: all but round((1 - rate) * C) of them, and never all. Ties
        are broken at random.
    :param probability: With which each candidate is dropped.
    :param rescale: Whether what is left is scaled up to a mean of 1, as in ordinary dropout.
    :param random: Where the random numbers come from; ``None`` is torch's global generator.
    :return: (N, C), 0 where dropped, detached.
    """
    _checks.real("rate", rate, least=0, below=1)
    share = max(1 - rate, 1 / contributions.shape[1])
    kept = top_share_mask(contributions.detach().abs()[:, None, None], share, random)[:, 0, 0]
    if probability < 1:
        kept = torch.maximum(kept, (uniform(kept, random) >= probability).to(kept.dtype))
    return kept / kept.mean(1, keepdim=True) if rescale else kept


def mask_leak(masked_ce: float, unmasked_ce: float) -> bool:
    """
    Whether the mask tells the label: the network is good with the mask on and bad without it, as it will be deployed.

    :param masked_ce: The epoch's mean of ``ce_clean``.
    :param unmasked_ce: The epoch's mean of ``ce_unmasked``.
    :return: True when the cross-entropy without the mask is more than twice that with it, plus 0.25 nats.
    """
    return unmasked_ce > 2 * masked_ce + 0.25


# --- contributions --------------------------------------------------------------------------------------------------------


def _guiding_pass(
    model: nn.Module, x: Tensor, y: Tensor, layers: Sequence[str], guide: str
) -> tuple[list[Tensor], Tensor]:
    """
    One forward in eval mode, and one backward through what comes after the first guided layer.

    :return: (N, channels) contributions for each layer, and the unmasked logits (N, K), detached.
    """
    features: dict[str, Tensor] = {}

    def watch(output: Tensor, layer: str) -> Tensor:
        # Weights are frozen and x needs no gradient, so nothing before the layer is in a graph: the backward is the head's.
        features[layer] = output if output.requires_grad else output.detach().requires_grad_()
        return features[layer].clone()  # what follows may work in place

    with ExitStack() as stack:
        for manager in (evaluating(model), frozen(model), torch.enable_grad()):
            stack.enter_context(manager)
        for layer in layers:
            stack.enter_context(at_layer(model, layer, partial(watch, layer=layer)))
        logits = model(x.detach())
        index = logits.detach().argmax(1) if guide == "predicted" else y
        score = full_precision(logits).gather(1, index[:, None]).sum()
    inputs = [features[layer] for layer in layers]
    gradients = torch.autograd.grad(score, inputs, allow_unused=True) if score.requires_grad else [None] * len(inputs)
    found = [channel_contributions(a, g) for a, g in zip(inputs, gradients, strict=True) if g is not None]
    if len(found) != len(layers):
        raise UnsupportedModelError(
            f"layer: got {', '.join(layers)}, expected features that the logits depend on differentiably; name another layer"
        )
    return found, logits.detach()


def contributions(model: nn.Module, x: Tensor, y: Tensor, *, layer: str | None = None, guide: str = "true") -> Tensor:
    """
    What each channel of the guided layer adds to a logit of each image: :func:`channel_contributions`, in eval mode.

    :param model: Any network; its modes, statistics and ``param.grad`` stay as they are.
    :param x: (N, C, H, W) in [0, 1].
    :param y: (N,) int64; unused with ``guide="predicted"``.
    :param layer: As for :class:`AALP`.
    :param guide: ``"true"`` or ``"predicted"``.
    :return: (N, channels), detached.
    """
    _checks.one_of("guide", guide, GUIDES[:2])
    name = find_guided_layer(model, x) if layer is None else layer
    return _guiding_pass(model, x, y, [name], guide)[0][0]


def _layer_names(layers: Any) -> list[str]:
    names = list(layers) if isinstance(layers, Sequence) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise _checks.refuse("layer", repr(layers), "None, a submodule's name, or several names")
    return names


# --- weights and loss -----------------------------------------------------------------------------------------------------


def pairing_weights(
    clean_logits: Tensor, adv_logits: Tensor, y: Tensor, weighting: str = "p_y", *, normalise: bool = False
) -> Tensor:
    """
    "Adaptive sample weighting" balances pairing and classification of each sample (which weights is a choice).

    :param clean_logits: (N, K), z.
    :param adv_logits: (N, K), z~.
    :param y: (N,) int64.
    :param weighting: One of :data:`WEIGHTINGS`.
    :param normalise: Whether the weights of the batch are divided by their mean.
    :return: (N,), at least 0, detached.
    """
    _checks.one_of("weighting", weighting, WEIGHTINGS)
    z, z_adv, index = full_precision(clean_logits.detach()), full_precision(adv_logits.detach()), y[:, None]
    p_y = z.softmax(1).gather(1, index)[:, 0]
    if weighting == "constant":
        weights = torch.ones_like(p_y)
    elif weighting == "correct":
        weights = (z.argmax(1) == y).to(p_y.dtype)
    elif weighting == "p_y_above":
        weights = (p_y >= z_adv.softmax(1).gather(1, index)[:, 0]).to(p_y.dtype)
    else:
        weights = p_y
    return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny) if normalise else weights


def aalp_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    y: Tensor,
    *,
    lam: float = 0.5,
    clean_weight: float = 0.0,
    weighting: str = "p_y",
    normalise: bool = False,
    balance: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """
    The loss a CE(z^m, y) + (1 - a) CE(z~^m, y) + lam mean_i w_i mean_k (z^m_ik - z~^m_ik)^2: ALP's, with sample weights.

    :param clean_logits: (N, K), z^m, of the masked network where the branch is masked.
    :param adv_logits: (N, K), z~^m.
    :param y: (N,) int64.
    :param clean_weight: a.
    :param balance: Whether mean_i (1 - w_i) CE(z~^m_i, y_i) is added: what a sample's pairing loses, its classification gains.
        The other parameters are those of :func:`~art_saliency.methods.baselines.alp_loss` and :func:`pairing_weights`.
    :return: Scalar.
    """
    weights = pairing_weights(clean_logits, adv_logits, y, weighting, normalise=normalise)
    loss = alp_loss(
        clean_logits,
        adv_logits,
        y,
        lam=lam,
        clean_weight=clean_weight,
        label_smoothing=label_smoothing,
        pairing_weights=weights,
    )
    if not balance:
        return loss
    return loss + ((1 - weights).clamp_min(0) * cross_entropy(full_precision(adv_logits), y)).mean()


class AALP(ALP):
    """
    AALP, a reconstruction: ALP whose features are optimised by Guided Dropout and whose pairing is weighted by the sample.

    Guided Dropout is on only inside :meth:`forward`, by a hook that is gone afterwards: the trained network is the bare
    backbone. With ``rate=0, weighting="constant"`` the objective is ALP at the same `lam` and `clean_weight`.

    :param lam: Weight of the pairing, at least 0.
    :param clean_weight: Share of the clean cross-entropy, 0 (adversarial only) to 1; 0.5 is ALP's average.
    :param rate: The share of channels that Guided Dropout drops, from 0 (off) to below 1. What is dropped first are channels that are
        off anyway: the logged ``dropped_alive`` says how many of the dropped ones were not.
    :param ramp: The share of the run, 0 to 1, over which the rate rises linearly from 0.
    :param guide: One of :data:`GUIDES`.
    :param layer: The guided layer: a submodule's name, or ``"name:input"`` for what goes into it; several names for several
        layers; ``None`` finds the last feature map before global pooling, see
        :func:`~art_saliency.methods.layers.find_guided_layer`.
    :param probability: With which each candidate is dropped, above 0 to 1.
    :param rescale: Whether what is left is scaled up.
    :param branches: One of :data:`BRANCHES`.
    :param weighting: One of :data:`WEIGHTINGS`; ``"constant"`` turns the module off.
    :param normalise: Whether a batch's weights are divided by their mean.
    :param balance: Whether what a sample's pairing loses, its classification gains; see :func:`aalp_loss`.
    :param label_smoothing: From 0 to below 1. The other parameters are those of
        :class:`~art_saliency.methods.baselines.AdversarialObjective`.
    """

    name = "aalp"
    soft_labels: ClassVar[bool] = False

    def __init__(
        self,
        *,
        lam: float = 0.5,
        clean_weight: float = 0.0,
        rate: float = 0.3,
        ramp: float = 0.0,
        guide: str = "true",
        layer: str | Sequence[str] | None = None,
        probability: float = 1.0,
        rescale: bool = False,
        branches: str = "clean",
        weighting: str = "p_y",
        normalise: bool = False,
        balance: bool = False,
        label_smoothing: float = 0.0,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(lam=lam, clean_weight=clean_weight, label_smoothing=label_smoothing, **options)
        self.rate = _checks.real("rate", rate, least=0, below=1)
        self.ramp = _checks.real("ramp", ramp, least=0, most=1)
        self.guide = _checks.one_of("guide", guide, GUIDES)
        self.layer = layer if layer is None or isinstance(layer, str) else _layer_names(layer)
        self.probability = _checks.real("probability", probability, above=0, most=1)
        self.rescale = _checks.flag("rescale", rescale)
        self.branches = _checks.one_of("branches", branches, BRANCHES)
        self.weighting = _checks.one_of("weighting", weighting, WEIGHTINGS)
        self.normalise = _checks.flag("normalise", normalise)
        self.balance = _checks.flag("balance", balance)
        self._found: dict[tuple[str, ...], str] = {}

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        """
        Attack with the mask off, guide, then one joint train-mode forward of [x; x~] with the mask on.

        :return: :func:`aalp_loss`, the adversarial logits, and the terms ``ce_clean``, ``ce_adv``, ``pairing``,
            ``pairing_weight``, ``logit_norm``, ``opposing`` (:func:`opposing_share`); with a mask also ``ce_unmasked`` (clean, in
            eval mode, as the network will be deployed: see :func:`mask_leak`) and ``dropped_alive``.
        """
        x_adv = self.adversarial(model, batch)
        rate = self.rate * warmup(batch.progress, self.ramp)
        masks, terms = self._masks(model, batch, x_adv, rate) if rate > 0 else ({}, {})
        with ExitStack() as stack:
            for layer, mask in masks.items():
                stack.enter_context(at_layer(model, layer, partial(_masked, mask=mask)))
            clean_logits, adv_logits = joint_logits(model, batch.x, x_adv)
        loss = aalp_loss(
            clean_logits,
            adv_logits,
            batch.y,
            lam=self.lam,
            clean_weight=self.clean_weight,
            weighting=self.weighting,
            normalise=self.normalise,
            balance=self.balance,
            label_smoothing=self.label_smoothing,
        )
        weights = pairing_weights(clean_logits, adv_logits, batch.y, self.weighting, normalise=self.normalise)
        terms |= self.log_terms(clean_logits, adv_logits, batch.y)
        terms["pairing_weight"] = weights.mean()
        terms["logit_norm"] = full_precision(clean_logits.detach()).norm(dim=1).mean()
        terms["opposing"] = opposing_share(clean_logits, adv_logits, batch.y)
        return LossTerms(loss, adv_logits, terms)

    def epoch_warnings(self, record: Mapping[str, Any]) -> list[str]:
        """:return: A sentence when the mask has begun to tell the network the label, see :func:`mask_leak`."""
        masked, unmasked = record.get("ce_clean"), record.get("ce_unmasked")
        if masked is None or unmasked is None or not mask_leak(masked, unmasked):
            return []
        return [
            f"aalp: the clean cross-entropy is {masked:.3f} with Guided Dropout's mask and {unmasked:.3f} without it: the mask tells "
            f"the label, and the network that is deployed has none. Lower rate, or set guide='predicted'"
        ]

    def adaptive_variants(self) -> Mapping[str, AdaptiveAttack]:
        """:return: ``"guided mask on"``: an attack on the network with the mask that training put on it; nothing at rate 0."""
        return {"guided mask on": self._attack_masked} if self.rate else {}

    def _attack_masked(self, model: nn.Module, x: Tensor, y: Tensor, attack: InnerAttack) -> Tensor:
        layers = self.guided_layers(model, x)
        found, _ = _guiding_pass(model, x, y, layers, "predicted" if self.guide == "predicted" else "true")
        masks = {
            layer: guided_mask(scores, self.rate, rescale=self.rescale)
            for layer, scores in zip(layers, found, strict=True)
        }
        return attack(_Masked(model, masks), x, y)

    def guided_layers(self, model: nn.Module, x: Tensor) -> list[str]:
        """
        Name the guided layers; by a dry run the first time that a network of this structure is seen.

        :param model: The network. :param x: (N, C, H, W) in [0, 1], an example.
        :return: Names, as :class:`AALP` takes them.
        """
        if self.layer is not None:
            return [self.layer] if isinstance(self.layer, str) else self.layer
        structure = tuple(f"{name}:{type(module).__qualname__}" for name, module in model.named_modules())
        if structure not in self._found:
            self._found[structure] = find_guided_layer(model, x)
        return [self._found[structure]]

    def check_network(self, model: nn.Module, x: Tensor) -> None:
        """See :class:`Objective`. :raises InputError: When a guided layer is not there, or gives no features to mask."""
        if self.rate:
            y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            for layer in self.guided_layers(model, x):
                contributions(model, x, y, layer=layer)

    def _masks(
        self, model: nn.Module, batch: Batch, x_adv: Tensor, rate: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """:return: The mask (2N, channels) of each guided layer for [x; x~], and what the guiding pass adds to the log."""
        count, layers = len(batch.x), self.guided_layers(model, batch.x)
        own = self.branches == "separate"
        images = torch.cat([batch.x, x_adv]) if own else batch.x
        found, logits = _guiding_pass(model, images, batch.y.repeat(2) if own else batch.y, layers, self.guide)
        masks: dict[str, Tensor] = {}
        alive, dropped = torch.zeros_like(logits[0, 0]), torch.zeros_like(logits[0, 0])
        for layer, contribution in zip(layers, found, strict=True):
            ranked = uniform(contribution, batch.random) if self.guide == "random" else contribution
            mask = guided_mask(ranked, rate, probability=self.probability, rescale=self.rescale, random=batch.random)
            alive, dropped = alive + ((mask == 0) & (contribution != 0)).sum(), dropped + (mask == 0).sum()
            if not own:
                mask = torch.cat([mask, mask if self.branches == "both" else torch.ones_like(mask)])
            masks[layer] = mask
        unmasked = F.cross_entropy(full_precision(logits[:count]), batch.y)
        return masks, {"ce_unmasked": unmasked, "dropped_alive": alive / dropped.clamp_min(1)}


class _Masked(nn.Module):
    """The network with its guided layers masked, each image by the mask of its clean self."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, x: Tensor) -> Tensor:
        with ExitStack() as stack:
            for layer, mask in self.masks.items():
                stack.enter_context(at_layer(self.model, layer, partial(_masked, mask=mask)))
            logits: Tensor = self.model(x)
        return logits


def _masked(features: Tensor, mask: Tensor) -> Tensor:
    return features * mask.to(features.dtype).view(*mask.shape, *[1] * (features.ndim - 2))
