"""
Adaptive adversarial logits pairing, reconstructed from the abstract of Wu et al. (arXiv 2005.11904): see ``aalp.md``.

"An adaptive feature optimization module with Guided Dropout" and "an adaptive sample weighting module" on top of ALP;
with both off it *is* ALP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import UnsupportedModelError
from art_saliency.gradients import top_share_mask
from art_saliency.methods.base import Attack, Batch, LossTerms, warmup
from art_saliency.methods.baselines import ALP, alp_loss, full_precision, joint_logits, pairing_distance
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
    "find_guided_layer",
    "guided_mask",
    "mask_leak",
    "opposing_share",
    "pairing_weights",
]

GUIDES = ("true", "predicted", "random")
"""Whose logit a contribution is to: the true class, the predicted class; or a mask that ranks at random, as a control."""

WEIGHTINGS = ("p_y", "correct", "p_y_above", "constant")
"""What a sample's pairing counts: p_y(x); 1[x is classified correctly]; 1[p_y(x) >= p_y(x~)]; 1."""

BRANCHES = ("both", "adversarial")
"""Which logits the mask is on."""


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

    Observation 2: on these "the pairing loss is overemphasised and obstructs minimising the classification loss".

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
    :param rate: The share of channels that are candidates, 0 to 1; C - round((1 - rate) * C) of them. Ties are broken at
        random.
    :param probability: With which each candidate is dropped.
    :param rescale: Whether what is left is scaled up to a mean of 1, as in ordinary dropout.
    :param random: Where the random numbers come from; ``None`` is torch's global generator.
    :return: (N, C), 0 where dropped, detached.
    """
    _checks.real("rate", rate, least=0, below=1)
    kept = top_share_mask(contributions.detach().abs()[:, None, None], 1 - rate, random)[:, 0, 0]
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


# --- the guided layer -----------------------------------------------------------------------------------------------------


def find_guided_layer(model: nn.Module, x: Tensor) -> str:
    """
    The last feature map before global pooling, after its ReLU, by a dry run in eval mode (choice).

    Where the ReLU or the pooling is a function rather than a module, it is the input of the next module. In a network
    without such a map (an MLP, a transformer, whose tokens come after its only map) it is the input of the last linear layer.
    With global average pooling and a linear head both are the same thing: the pooled vector is the map's channel means.

    :param model: Any network.
    :param x: (N, C, H, W) in [0, 1], an example.
    :return: The submodule's name; with ``":input"`` when its input, not its output, is guided.
    :raises UnsupportedModelError: When there is neither; name the layer.
    """
    calls, logits = _trace(model, x[:2])
    maps = [place for place, (_, _, output) in enumerate(calls) if _is_feature_map(output, logits)]
    if maps and not any(isinstance(output, Tensor) and output.ndim == 3 for _, _, output in calls[maps[-1] + 1 :]):
        name, _, found = calls[maps[-1]]
        consumer, consumed, _ = calls[maps[-1] + 1] if maps[-1] + 1 < len(calls) else ("", None, None)
        takes_it = isinstance(consumed, Tensor) and consumed.ndim in (2, 4) and consumed.shape[1] == found.shape[1]
        rectified = takes_it and bool((found < 0).any()) and not bool((consumed < 0).any())
        shared = sum(other == name for other, _, _ in calls) > 1
        return f"{consumer}:input" if takes_it and consumer and (rectified or shared) else name
    modules = dict(model.named_modules())
    for name, consumed, _ in reversed(calls):
        if isinstance(modules[name], nn.Linear) and isinstance(consumed, Tensor) and consumed.ndim == 2:
            return f"{name}:input"
    raise UnsupportedModelError(
        "layer: got None and a network without a feature map or a linear head, expected either; name the guided layer"
    )


def _trace(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, Any, Any]], Tensor]:
    """:return: Every submodule's (name, first input, output) in the order in which they finished, and the logits."""
    calls: list[tuple[str, Any, Any]] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:

                def record(_: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                    consumed = inputs[0].clone() if inputs and isinstance(inputs[0], Tensor) else None
                    calls.append((name, consumed, output.clone() if isinstance(output, Tensor) else None))

                stack.callback(module.register_forward_hook(record).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        return calls, model(x)


def _is_feature_map(output: Any, logits: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] * output.shape[3] == 1:
        return False
    # A map of class scores (a convolutional head) is no feature map: its mask would say which class is the true one.
    return output.shape[1] != logits.shape[1] or not torch.allclose(output.mean((2, 3)), logits, rtol=1e-3, atol=1e-4)


def _resolve(model: nn.Module, layer: str) -> tuple[nn.Module, bool]:
    """:return: The named module, also under a wrapper's ``module.`` prefix, and whether its input is meant."""
    name, _, side = layer.partition(":")
    modules = dict(model.named_modules())
    if name not in modules:
        inside = sorted((known for known in modules if known.endswith("." + name)), key=len)
        name = inside[0] if inside else name
    if not name or name not in modules or side not in ("", "input"):
        names = [known for known in modules if known]
        raise _checks.refuse("layer", repr(layer), "a submodule's name" + _checks.suggestion(name, names))
    return modules[name], side == "input"


@contextmanager
def _at_layer(model: nn.Module, layer: str, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `act` on the features of one layer for the one forward of the block; nothing stays on the model, also on error."""
    module, on_input = _resolve(model, layer)
    calls = 0

    def checked(features: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise _checks.refuse("layer", f"{layer!r}, which runs twice in one forward", "a module that runs once")
        if not isinstance(features, Tensor) or features.ndim not in (2, 4):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise _checks.refuse("layer", f"{layer!r} with features {shape}", "(N, C, H, W) or (N, C)")
        return act(features)

    if on_input:
        handle = module.register_forward_pre_hook(lambda _, inputs: (checked(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: checked(output))
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise _checks.refuse(
            "layer", f"{layer!r}, which the forward never calls", "a module that runs", "a compiled network hides its layers"
        )


def _guiding_pass(
    model: nn.Module, x: Tensor, y: Tensor, layers: Sequence[str], guide: str
) -> tuple[list[Tensor], Tensor]:
    """
    One clean forward in eval mode, and one backward of what comes after the first guided layer.

    :return: (N, C) contributions for each layer, and the unmasked logits (N, K).
    """
    features: list[Tensor] = []

    def watch(output: Tensor) -> Tensor:
        # Weights are frozen and x needs no gradient, so nothing before the layer is in a graph: the backward is the head's.
        features.append(output if output.requires_grad else output.detach().requires_grad_())
        return features[-1].clone()  # what follows may work in place

    with ExitStack() as stack:
        for manager in (evaluating(model), frozen(model), torch.enable_grad()):
            stack.enter_context(manager)
        for layer in layers:
            stack.enter_context(_at_layer(model, layer, watch))
        logits = model(x.detach())
        index = y if guide == "true" else logits.detach().argmax(1)
        score = full_precision(logits).gather(1, index[:, None]).sum()
        gradients = torch.autograd.grad(score, features, allow_unused=True) if score.requires_grad else [None]
    found = []
    for feature, gradient in zip(features, gradients, strict=True):
        if gradient is None:
            raise UnsupportedModelError(f"layer: got {list(layers)}, expected layers that the logits depend on")
        found.append(channel_contributions(feature, gradient))
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


# --- weights and loss -----------------------------------------------------------------------------------------------------


def pairing_weights(
    clean_logits: Tensor, adv_logits: Tensor, y: Tensor, weighting: str = "p_y", *, normalise: bool = False
) -> Tensor:
    """
    "Sample-specific training weights to balance pairing loss and classification loss" (which ones is a choice).

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
    label_smoothing: float = 0.0,
) -> Tensor:
    """
    L_AALP: :func:`~art_saliency.methods.baselines.alp_loss` of the masked logits with a weight on each sample's pairing.

    :param clean_logits: (N, K), z^m.
    :param adv_logits: (N, K), z~^m.
    :param y: (N,) int64. The other parameters are those of :func:`alp_loss` and :func:`pairing_weights`.
    :return: Scalar.
    """
    return alp_loss(
        clean_logits,
        adv_logits,
        y,
        lam=lam,
        clean_weight=clean_weight,
        label_smoothing=label_smoothing,
        pairing_weights=pairing_weights(clean_logits, adv_logits, y, weighting, normalise=normalise),
    )


class AALP(ALP):
    def __init__(
        self,
        *,
        eps: float,
        norm: str = "Linf",
        eps_step: float | None = None,
        max_iter: int = 10,
        random_start: bool = True,
        attack: Attack | None = None,
        lam: float = 0.5,
        clean_weight: float = 0.0,
        rate: float = 0.1,
        ramp: float = 0.0,
        guide: str = "true",
        layer: str | Sequence[str] | None = None,
        probability: float = 1.0,
        rescale: bool = False,
        branches: str = "both",
        weighting: str = "p_y",
        normalise: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            eps=eps,
            norm=norm,
            eps_step=eps_step,
            max_iter=max_iter,
            random_start=random_start,
            attack=attack,
            lam=lam,
            clean_weight=clean_weight,
            label_smoothing=label_smoothing,
        )
        self.rate = _checks.real("rate", rate, least=0, below=1)
        self.ramp = _checks.real("ramp", ramp, least=0, most=1)
        self.guide = _checks.one_of("guide", guide, GUIDES)
        self.layer = layer
        self.probability = _checks.real("probability", probability, above=0, most=1)
        self.rescale = _checks.flag("rescale", rescale)
        self.branches = _checks.one_of("branches", branches, BRANCHES)
        self.weighting = _checks.one_of("weighting", weighting, WEIGHTINGS)
        self.normalise = _checks.flag("normalise", normalise)
        self._found: dict[tuple[str, ...], tuple[str, ...]] = {}

    name = "aalp"
    soft_labels: ClassVar[bool] = False

    def layers(self, model: nn.Module, x: Tensor) -> tuple[str, ...]:
        """:return: The names of the guided layers; found by a dry run the first time that a network is seen."""
        if self.layer is not None:
            return (self.layer,) if isinstance(self.layer, str) else tuple(self.layer)
        structure = tuple(f"{name}:{type(module).__name__}" for name, module in model.named_modules())
        if structure not in self._found:
            self._found[structure] = (find_guided_layer(model, x),)
        return self._found[structure]

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        x_adv = self.adversarial(model, batch)
        rate = self.rate * warmup(batch.progress, self.ramp)
        extra: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if rate > 0:
                extra = self._guide(model, batch, rate, stack)
            clean_logits, adv_logits = joint_logits(model, batch.x, x_adv)
        loss = aalp_loss(
            clean_logits,
            adv_logits,
            batch.y,
            lam=self.lam,
            clean_weight=self.clean_weight,
            weighting=self.weighting,
            normalise=self.normalise,
            label_smoothing=self.label_smoothing,
        )
        weights = pairing_weights(clean_logits, adv_logits, batch.y, self.weighting, normalise=self.normalise)
        terms = self.log_terms(clean_logits, adv_logits, batch.y) | extra
        terms |= {
            "pairing_weight": weights.mean(),
            "opposing": opposing_share(clean_logits, adv_logits, batch.y),
            "logit_norm": full_precision(clean_logits.detach()).norm(dim=1).mean(),
        }
        return LossTerms(loss, adv_logits, terms)

    def _guide(self, model, batch, rate, stack):
        layers = self.layers(model, batch.x)
        extra = {}
        gm = batch.target_model if getattr(self, "ema", False) and batch.target_model is not None else model
        found, logits = _guiding_pass(gm, batch.x, batch.y, layers, "true" if self.guide == "random" else self.guide)
        extra["ce_unmasked"] = F.cross_entropy(full_precision(logits), batch.y)
        for layer, c in zip(layers, found, strict=True):
            if self.guide == "random":
                c = uniform(c, batch.random)
            mask = guided_mask(c, rate, probability=self.probability, rescale=self.rescale, random=batch.random)
            extra["alive"] = ((mask == 0) & (found[0] != 0)).sum() / (mask == 0).sum().clamp_min(1)
            other = mask if self.branches == "both" else torch.ones_like(mask)
            both = torch.cat([other, mask])
            stack.enter_context(_at_layer(model, layer, lambda f, both=both: f * both.to(f.dtype).view(*both.shape, *[1] * (f.ndim - 2))))
        return extra
