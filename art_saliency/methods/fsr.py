"""
Feature separation and recalibration (Kim, Cho, Jung, Yoon; CVPR 2023, arXiv 2303.13846): see ``fsr.md``.

"Disentangle the feature map into the robust feature [...] and the non-robust feature [...], then adjust the non-robust
activations to restore useful cues." FSR is a layer that is put into a network, not a trainer: :func:`insert_fsr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.attacks import AdaptiveAttack, AttackLoss, InnerAttack, cross_entropy
from art_saliency.errors import InputError
from art_saliency.methods.base import LossTerms, warmup
from art_saliency.methods.surgery import FeatureLayer, Features, TokenGrid, bottleneck, insert_after, remove_inserted
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource, uniform

__all__ = [
    "AuxiliaryLogits",
    "FSRLayer",
    "LayerOptions",
    "Separated",
    "best_wrong_class",
    "capture",
    "deterministic",
    "drop_auxiliary_heads",
    "fsr_layers",
    "fsr_loss",
    "insert_fsr",
    "logistic_noise",
    "mask_share_inside",
    "randomised",
    "remove_fsr",
]


class AuxiliaryLogits(NamedTuple):
    """
    What the auxiliary head says of the three features, (N, K) each.

    :ivar robust: A(f+). :ivar non_robust: A(f-). :ivar recalibrated: A(f~-).
    """

    robust: Tensor
    non_robust: Tensor
    recalibrated: Tensor


class Separated(NamedTuple):
    """
    The parts of one forward pass, (N, C, H, W) each.

    :ivar mask: m+, in float32 at least. :ivar robust: f+. :ivar non_robust: f-. :ivar recalibrated: f~-.
    """

    mask: Tensor
    robust: Tensor
    non_robust: Tensor
    recalibrated: Tensor


# --- the losses -----------------------------------------------------------------------------------------------------------


def best_wrong_class(logits: Tensor, y: Tensor) -> Tensor:
    """
    y', the highest-scoring wrong class; no gradient passes through the choice.

    :param logits: (N, K), K at least 2.
    :param y: (N,).
    :return: (N,) int64.
    """
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def fsr_loss(
    logits: Tensor, auxiliary: AuxiliaryLogits, y: Tensor, lambda_sep: float = 1.0, lambda_rec: float = 1.0
) -> LossTerms:
    """
    What FSR adds to a base loss: lambda_sep L_sep + lambda_rec L_rec. Nothing is detached but the choice of y'.

    L_sep = CE(A(f+), y) + CE(A(f-), y'), L_rec = CE(A(f~-), y).

    :param logits: (N, K), the network's own, which name y'.
    :param auxiliary: (N, K) three times, of the same forward pass.
    :param y: (N,) int64; of soft labels (N, K) the highest counts.
    :param lambda_sep: At least 0.
    :param lambda_rec: At least 0.
    :return: The weighted sum, the logits, and the terms ``fsr_separation`` and ``fsr_recalibration``.
    """
    y = y if y.ndim == 1 else y.argmax(1)
    if logits.shape != auxiliary.robust.shape or len(y) != len(logits):
        raise _checks.refuse(
            "logits",
            f"{tuple(logits.shape)} beside auxiliary logits {tuple(auxiliary.robust.shape)} and {len(y)} labels",
            "one row for each label and equal shapes",
        )
    if logits.shape[1] < 2:
        raise _checks.refuse("logits", f"{logits.shape[1]} column", "at least 2 classes", "one class has no wrong one")
    robust, non_robust, recalibrated = (part if part.dtype == torch.float64 else part.float() for part in auxiliary)
    separation = F.cross_entropy(robust, y) + F.cross_entropy(non_robust, best_wrong_class(logits, y))
    recalibration = F.cross_entropy(recalibrated, y)
    terms = {"fsr_separation": separation.detach(), "fsr_recalibration": recalibration.detach()}
    return LossTerms(lambda_sep * separation + lambda_rec * recalibration, logits, terms)


# --- the layer ------------------------------------------------------------------------------------------------------------


def logistic_noise(like: Tensor, random: RandomSource | None = None) -> Tensor:
    """
    The noise n = log u - log(1 - u), u ~ U(0, 1): a difference of two Gumbel variables, in float32 whatever `like` is.

    Written with log(log(u)) it would underflow in half precision.

    :return: Finite, of the shape of `like`.
    """
    # u may be 0, though never 1, in steps of 2^-24: half a step stands for 0.
    u = uniform(torch.empty_like(like, dtype=torch.float32), random).clamp_min(2.0**-25)
    return u.log() - torch.log1p(-u)


class LayerOptions(TypedDict, total=False):
    """The parameters of :class:`FSRLayer` that :func:`insert_fsr` and the trainer hand on."""

    hidden: int
    tau: float
    zero_init: bool
    lambda_sep: float
    lambda_rec: float
    aux_warmup_share: float


class FSRLayer(FeatureLayer):
    """
    Separates features into robust and non-robust activations, and recalibrates the latter: f + m- R(m- f).

    Noise if and only if the layer is in train mode, and not inside :func:`deterministic`; in eval mode the layer is a
    function of its input, so that attacks measure the network that is deployed.

    :param channels: C.
    :param num_classes: K, at least 2.
    :param hidden: h, the width of S and R.
    :param tau: Temperature of the mask, above 0: the gate's steepness is 1 / tau.
    :param zero_init: Whether R's last convolution starts at zero: the layer is then the identity at first.
    :param lambda_sep: The weight of L_sep in :meth:`auxiliary_loss`, at least 0.
    :param lambda_rec: The weight of L_rec in :meth:`auxiliary_loss`, at least 0.
    :param aux_warmup_share: The share of the run over which both weights rise linearly from 0; 0 is the full weights from the first
        step on, as published. On small networks these keep training at its beginning, where a network predicts one class.
    :param randomised: Whether the mask is noisy in eval mode as well, for the study of that variant; such a network must be
        evaluated as a randomised one. See :func:`randomised`.
    :param tokens: As for :class:`~art_saliency.methods.surgery.FeatureLayer`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 64,
        tau: float = 0.1,
        zero_init: bool = False,
        lambda_sep: float = 1.0,
        lambda_rec: float = 1.0,
        aux_warmup_share: float = 0.0,
        randomised: bool = False,
        tokens: TokenGrid | None = None,
    ) -> None:
        super().__init__(tokens)
        self.channels = _checks.whole("channels", channels, least=1)
        self.num_classes = _checks.whole("num_classes", num_classes, least=2, remedy="L_sep needs a wrong class")
        self.hidden = _checks.whole("hidden", hidden, least=1, most=1 << 16)
        self.tau = _checks.real("tau", tau, above=0, most=_checks.GREATEST)
        self.lambda_sep = _checks.weight("lambda_sep", lambda_sep)
        self.lambda_rec = _checks.weight("lambda_rec", lambda_rec)
        self.aux_warmup_share = _checks.real("aux_warmup_share", aux_warmup_share, least=0, most=1)
        self.randomised = _checks.flag("randomised", randomised)
        self.separation = bottleneck(channels, hidden)
        self.recalibration = bottleneck(channels, hidden)
        self.auxiliary: nn.Linear | None = nn.Linear(channels, num_classes)
        self.zero_init = _checks.flag("zero_init", zero_init)
        if self.zero_init:
            nn.init.zeros_(self.recalibration[-1].weight)  # type: ignore[arg-type]
        self.recording = False
        """Whether train-mode forward passes keep their auxiliary logits for a loss."""
        self.noiseless = False
        """Whether the mask is without noise in train mode too: what :func:`deterministic` sets for a while, or a control for good."""
        # These belong to the moment.
        self._gate = "exact"
        self._listeners: list[Callable[[Separated], None]] = []
        self._latest: AuxiliaryLogits | None = None
        self._random: RandomSource | None = None
        self._progress = 1.0
        self._drawn: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What belongs to the moment is neither copied nor pickled: tensors inside a graph cannot be."""
        moment: dict[str, Any] = {
            "_listeners": [],
            "_latest": None,
            "_random": None,
            "_progress": 1.0,
            "_drawn": {},
            "_gate": "exact",
        }
        return {**self.__dict__, **moment}

    @property
    def noisy(self) -> bool:
        """:return: Whether the next forward pass is random."""
        return (self.training or self.randomised) and not self.noiseless

    def mask(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """
        The soft mask, m+ = sigmoid((r + n) / tau), r = S(f), and m- = 1 - m+.

        :param f: (N, C, H, W).
        :return: m+ and m-, in float32 (float64 where `f` is).
        """
        r = self.separation(f)
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        if self.noisy:
            r = r + self._noise(r).to(r.dtype)
        # m- as the sigmoid of -r: 1 - m+ would round to 0 long before, and the gradient of an attack with it.
        masks = torch.sigmoid(r / self.tau), torch.sigmoid(-r / self.tau)
        if self._gate == "exact":
            return masks
        m_plus, m_minus = masks[0].detach(), masks[1].detach()
        if self._gate == "softened":  # the derivative of tau = 1; what is added is exactly 0
            soft = torch.sigmoid(r)
            m_plus, m_minus = m_plus + (soft - soft.detach()), m_minus - (soft - soft.detach())
        return m_plus, m_minus

    def _noise(self, like: Tensor) -> Tensor:
        """
        Fresh noise outside a step; inside one, a function of the step and the shape.

        So the clean and the adversarial pass of one batch see the same noise, and a joint pass over both has its own.
        """
        if self._random is None:
            return logistic_noise(like)
        key = (like.shape, like.device)
        if key not in self._drawn:
            self._drawn[key] = logistic_noise(like, self._random).to(like.device)
        return self._drawn[key]

    def transform(self, f: Tensor) -> Tensor:
        """
        f+ + f~- = f + m- R(m- f): a gated residual, so the identity path always survives.

        :param f: (N, C, H, W), any H and W.
        :return: As `f`, shape and dtype.
        """
        m_plus, m_minus = self.mask(f)
        f_minus = (m_minus * f).to(f.dtype)
        correction: Tensor = (m_minus * self.recalibration(f_minus)).to(f.dtype)
        if self._listeners or (self.recording and self.training):
            parts = Separated(m_plus, (m_plus * f).to(f.dtype), f_minus, f_minus + correction)
            if self.recording and self.training:
                self._latest = self.auxiliary_logits(parts)
            for listener in self._listeners:
                listener(parts)
        return f + correction

    def auxiliary_logits(self, parts: Separated) -> AuxiliaryLogits:
        """:return: A of the three features: global average pool, then the one linear layer that they share."""
        head = self.auxiliary
        if head is None:
            raise InputError("FSR: the auxiliary head was dropped; insert the layer anew to train it")
        return AuxiliaryLogits(*(head(part.mean((2, 3))) for part in parts[1:]))

    # The protocol of art_saliency.methods.base.AuxiliaryLoss.

    def start_step(self, random: RandomSource | None, progress: float = 1.0) -> None:
        """
        Forget the previous step. From now on train-mode forward passes keep their auxiliary logits.

        :param random: Where this step's noise comes from: one draw for each shape, shared by all forward passes. ``None`` goes
            back to fresh noise from torch's global generator: call it so once the last step is over.
        :param progress: The share of the run that is over, for `aux_warmup_share`.
        """
        self._random, self._progress, self._drawn, self._latest = random, progress, {}, None
        self.recording = True

    def auxiliary_loss(self, logits: Tensor, y: Tensor) -> LossTerms:
        """
        :func:`fsr_loss` of the last ``len(y)`` rows of the last train-mode forward pass, which is then forgotten, at the weights in force.

        :param logits: (N, K), the network's, of those rows.
        :param y: (N,), or (N, K) soft labels.
        """
        share = warmup(self._progress, self.aux_warmup_share)
        return fsr_loss(logits, self.take_auxiliary(len(y)), y, share * self.lambda_sep, share * self.lambda_rec)

    def take_auxiliary(self, rows: int) -> AuxiliaryLogits:
        """:return: The auxiliary logits of the last recorded forward pass, of `rows` images, which is then forgotten."""
        latest, self._latest = self._latest, None
        if latest is None or len(latest.robust) < rows:
            got = "no train-mode forward pass" if latest is None else f"a forward pass of {len(latest.robust)} rows"
            raise _checks.refuse(
                "FSR", got, f"one of at least {rows} rows since the last loss", "put the network in train mode"
            )
        return AuxiliaryLogits(*(part[-rows:] for part in latest))

    def stop_recording(self) -> None:
        """From now on forward passes keep nothing; what the last one kept is forgotten."""
        self.recording, self._latest = False, None

    def adaptive_variants(self) -> Mapping[str, AdaptiveAttack]:
        """:return: Attacks that know this layer, for the audit: a general one in each of :meth:`attack_contexts`."""
        return {name: partial(_attack_inside, context) for name, context in self.attack_contexts().items()}

    def attack_contexts(self) -> Mapping[str, Callable[[], AbstractContextManager[AttackLoss | None]]]:
        """
        What an attack that knows this layer changes: by name, a context manager to attack in.

        Inside, attack the network as usual; where the context yields a loss, with that loss. The forward pass is unchanged in
        all of them. With several layers, enter the contexts of all.
        """
        variants: dict[str, Callable[[], AbstractContextManager[AttackLoss | None]]] = {
            "gate softened": lambda: _gated(self, "softened"),
            "gate frozen": lambda: _gated(self, "frozen"),
        }
        if self.auxiliary is not None:
            variants["auxiliary logits"] = lambda: _auxiliary_attack(self)
        return variants

    def extra_repr(self) -> str:
        """:return: The arguments, as ``repr`` shows them."""
        return (
            f"channels={self.channels}, num_classes={self.num_classes}, hidden={self.hidden}, tau={self.tau}"
            f"{', randomised=True' if self.randomised else ''}"
        )


def _attack_inside(
    context: Callable[[], AbstractContextManager[AttackLoss | None]],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: InnerAttack,
) -> Tensor:
    with context() as loss:
        return attack(model, x, y, loss)


@contextmanager
def _gated(layer: FSRLayer, gate: str) -> Iterator[None]:
    before, layer._gate = layer._gate, gate
    try:
        yield
    finally:
        layer._gate = before


@contextmanager
def _auxiliary_attack(layer: FSRLayer) -> Iterator[AttackLoss]:
    """CE of the network's logits, plus CE of the three auxiliary ones, all against the true label."""
    with capture(layer) as captured:

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return torch.stack([cross_entropy(part, y) for part in (logits, *captured[""])]).sum(0)

        yield loss


# --- surgery --------------------------------------------------------------------------------------------------------------


def insert_fsr(
    model: nn.Module,
    target: str,
    num_classes: int,
    example: Tensor,
    *,
    hidden: int = 64,
    tau: float = 0.1,
    zero_init: bool = False,
    lambda_sep: float = 1.0,
    lambda_rec: float = 1.0,
    aux_warmup_share: float = 0.0,
    randomised: bool = False,
) -> nn.Module:
    """
    Put an :class:`FSRLayer` behind a submodule, in place; the network still returns plain logits.

    Its tensors are ``<target>.fsr.*``, all others keep their names. An optimizer built before does not know the new
    parameters: add a parameter group.

    :param model: Maps `example` to logits (N, K).
    :param target: The dotted name of a submodule that puts out (N, C, H, W), before the pooling (``"layer4"``), or tokens
        (N, L, C) of a vision transformer.
    :param num_classes: K, at least 2.
    :param example: Images that the network takes, for a dry run that tells C, device and dtype; one is enough.
    :return: The same network. The other parameters are those of :class:`FSRLayer`.
    :raises InputError: When there is no such submodule, or one with an FSR layer already, or `num_classes` is not the network's.
    :raises UnsupportedModelError: When the submodule puts out neither feature maps nor tokens.
    """
    _checks.whole("num_classes", num_classes, least=2, remedy="L_sep needs a wrong class")
    if not isinstance(example, Tensor):
        raise _checks.refuse(
            "example", type(example).__name__, "a tensor (N, C, H, W) of images that the network takes"
        )

    def build(features: Features) -> nn.Module:
        if features.num_classes != num_classes:
            raise _checks.refuse("num_classes", str(num_classes), f"{features.num_classes}, the columns of the logits")
        return FSRLayer(
            features.channels,
            num_classes,
            hidden=hidden,
            tau=tau,
            zero_init=zero_init,
            lambda_sep=lambda_sep,
            lambda_rec=lambda_rec,
            aux_warmup_share=aux_warmup_share,
            randomised=randomised,
            tokens=features.tokens,
        )

    insert_after(model, target, example, "fsr", build)
    return model


def remove_fsr(model: nn.Module, target: str | None = None) -> nn.Module:
    """
    The inverse of :func:`insert_fsr`, in place.

    :param target: Where; ``None`` removes all FSR layers.
    :return: The same network.
    """
    return remove_inserted(model, target, "fsr")


def fsr_layers(model: nn.Module) -> dict[str, FSRLayer]:
    """
    The FSR layers of a network, by target, in order (a layer by itself is called ``""``).

    :raises InputError: When there is none.
    """
    named = {f".{name}": module for name, module in model.named_modules() if isinstance(module, FSRLayer)}
    layers = {name.removesuffix(".fsr")[1:]: module for name, module in named.items()}
    if not layers:
        raise _checks.refuse("model", "no FSR layer", "at least one", "insert_fsr(model, target, ...) puts one in")
    return layers


def drop_auxiliary_heads(model: nn.Module) -> nn.Module:
    """
    Take A, which serves training only, out of a network that is to be deployed, in place: its logits are the same.

    :return: The same network, whose state dict has no ``<target>.fsr.auxiliary.*``.
    """
    for layer in fsr_layers(model).values():
        layer.stop_recording()
        layer.auxiliary = None
    return model


# --- looking inside -------------------------------------------------------------------------------------------------------


@contextmanager
def _listening(model: nn.Module, listener: Callable[[str, FSRLayer, Separated], None]) -> Iterator[None]:
    pairs = [
        (layer, lambda parts, name=name, layer=layer: listener(name, layer, parts))
        for name, layer in fsr_layers(model).items()
    ]
    for layer, heard in pairs:
        layer._listeners.append(heard)
    try:
        yield
    finally:
        for layer, heard in pairs:
            layer._listeners.remove(heard)


@contextmanager
def capture(model: nn.Module) -> Iterator[dict[str, AuxiliaryLogits]]:
    """
    See the auxiliary logits of the last forward pass, in either mode, with their graph.

    :return: By target; filled by every forward pass inside the context, emptied on exit.
    """
    captured: dict[str, AuxiliaryLogits] = {}
    try:
        with _listening(model, lambda name, layer, parts: captured.update({name: layer.auxiliary_logits(parts)})):
            yield captured
    finally:
        captured.clear()


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """No noise for the duration, though in train mode. :param model: The network."""
    with _flag(model, "noiseless"):
        yield


@contextmanager
def randomised(model: nn.Module) -> Iterator[None]:
    """
    Noise in eval mode too, for the duration: the variant that the released code evaluates unless told otherwise.

    Its layers say ``randomised``, and an evaluation must treat the network as a random one.

    :param model: The network.
    """
    with _flag(model, "randomised"):
        yield


@contextmanager
def _flag(model: nn.Module, name: str) -> Iterator[None]:
    before = [(layer, getattr(layer, name)) for layer in fsr_layers(model).values()]
    try:
        for layer, _ in before:
            setattr(layer, name, True)
        yield
    finally:
        for layer, flag in before:
            setattr(layer, name, flag)


def mask_share_inside(model: nn.Module, x: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """
    The share of the masks m+ that are inside (0.01, 0.99): the gate is steep, and where it saturates gradients vanish.

    :param model: The network, measured in eval mode.
    :param x: (N, C, H, W), what the network takes.
    :return: 0 to 1, by target.
    """
    inside: dict[str, list[Tensor]] = {name: [] for name in fsr_layers(model)}

    def count(name: str, _: FSRLayer, parts: Separated) -> None:
        inside[name].append(((parts.mask > 0.01) & (parts.mask < 0.99)).double().flatten(1).mean(1))

    with evaluating(model), torch.no_grad(), _listening(model, count):
        for batch in torch.split(x, _checks.whole("batch_size", batch_size, least=1)):
            model(batch.to(next(model.parameters()).device))
    return {name: float(torch.cat(shares).mean()) for name, shares in inside.items()}
