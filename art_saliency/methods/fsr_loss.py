"""FSR under ART's own trainers: a loss for ``PyTorchClassifier`` that adds the terms of the network's FSR layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.methods.fsr import fsr_layers, fsr_loss

__all__ = ["FSRLoss"]


class _LastOutput:
    """A forward hook that keeps a module's last train-mode output; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if module.training:
            self.output = output

    def __getstate__(self) -> dict[str, Any]:
        return {"output": None}

    def take(self) -> Tensor | None:
        output, self.output = self.output, None
        return output


class FSRLoss(nn.CrossEntropyLoss):
    """
    A loss to hand to ART's ``PyTorchClassifier``, so that ART's *own* trainers train the network's FSR layers.

    The base loss of the logits that it is given, plus lambda_sep L_sep + lambda_rec L_rec (their mean over the layers) of the
    *last train-mode forward pass*, which is then forgotten. With ART's TRADES, whose loss is given the clean logits after a
    clean and an adversarial pass, the base loss so sees the clean branch, and FSR's terms the adversarial one, y' included,
    as they should. In eval mode it is the base loss alone: attacks differentiate the plain loss.

    A cross-entropy by descent: ART reduces labels by the type of the loss. It belongs to this network and its copies together
    with the classifier; give another network a loss of its own.

    :param model: The network, FSR layers inserted.
    :param loss: The base loss (logits, y) -> scalar; ``None`` is the cross-entropy.
    :param lambda_sep: At least 0.
    :param lambda_rec: At least 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        lambda_sep: float = 1.0,
        lambda_rec: float = 1.0,
    ) -> None:
        if loss is not None and not callable(loss):
            raise _checks.refuse("loss", repr(loss), "None or a function (logits, y) -> scalar")
        super().__init__(reduction=getattr(loss, "reduction", "mean"))
        self.base = loss
        self.lambda_sep = _checks.real("lambda_sep", lambda_sep, least=0)
        self.lambda_rec = _checks.real("lambda_rec", lambda_rec, least=0)
        self._layers = tuple(fsr_layers(model).values())  # a tuple, so that they do not become the loss's submodules
        for layer in self._layers:
            layer.recording = True
        # ART runs a root nn.Sequential child by child, past its hooks: its last child emits the logits.
        emitter = model[-1] if isinstance(model, nn.Sequential) else model
        self._logits = _LastOutput()
        self._hook = emitter.register_forward_hook(self._logits)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """:param input: (N, K) logits. :param target: (N,), or (N, K) soft labels. :return: A scalar."""
        loss = self._base_loss(input, target)
        if not any(layer.training for layer in self._layers):
            return loss
        logits = self._logits.take()
        if logits is None:
            raise _checks.refuse("FSRLoss", "no train-mode forward pass", "one of its network since the last loss")
        rows = len(target)
        parts = [
            fsr_loss(logits[-rows:], layer.take_auxiliary(rows), target, self.lambda_sep, self.lambda_rec).loss
            for layer in self._layers
        ]
        return loss + torch.stack(parts).mean()

    def _base_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.base is None:
            return super().forward(logits, y)
        if hasattr(self.base, "reduction"):
            self.base.reduction = self.reduction  # ART sets it on the loss that it was given
        return self.base(logits, y)

    def close(self) -> None:
        """Take the hook off the network and stop recording."""
        self._hook.remove()
        for layer in self._layers:
            layer.stop_recording()
