"""
Adversarial weight perturbation (Wu, Xia, Wang 2020): every objective's gradient, taken at weights that an adversary moved.

| Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization. NeurIPS 2020, arXiv 2004.05884, algorithm 1.

min_w max_{v in V} L(w + v), V = {v: ||v_l|| <= gamma ||w_l|| for every layer l} (eq. 8), v by one step (eq. 9, with K2 = 1):
v_l = gamma ||w_l|| g_l / ||g_l||, g the gradient of the loss in the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from art_saliency import _checks
from art_saliency.methods.base import Batch, LossTerms
from art_saliency.modes import side_pass
from art_saliency.randomness import global_generators_kept
from art_saliency.training.extensions import Extension

if TYPE_CHECKING:
    from art_saliency.training.loop import Run

__all__ = ["WeightPerturbation", "ascent_in_weights"]

_TINY = 1e-20  # as the authors': a layer without a gradient is not moved


def ascent_in_weights(weights: list[Tensor], gradients: list[Tensor], gamma: float) -> list[Tensor]:
    """
    The perturbation of every layer: gamma ||w_l|| g_l / ||g_l||.

    :param weights: w. :param gradients: g, of the same shapes. :param gamma: At least 0.
    :return: v, of the same shapes.
    """
    lengths = torch._foreach_norm(weights)
    slopes = torch._foreach_norm(gradients)
    return [g * (gamma * length / (slope + _TINY)) for g, length, slope in zip(gradients, lengths, slopes, strict=True)]


class WeightPerturbation(Extension):
    """
    AWP around any objective: the loss is ascended in the weights, the gradient is taken there, and the weights come back bit for bit.

    What is ascended is the whole loss of the step, FSR's auxiliary loss included, with the very random numbers of the step
    (noise, dropout, start of the attack). Where the objective has an inner maximisation, its images are found once, at the
    unmoved weights, and kept (algorithm 1); an objective that forms its inputs itself (Adv-GSCT) forms them again.

    Choices: as in the authors' code, layers are parameters of more than one axis, so neither biases nor normalisation move, and
    BatchNorm's statistics are those of the second pass. Unlike there, the weights come back before the optimizer's step, not
    after it, so that weight decay acts on the weights themselves.

    Costs: one more forward and backward pass of the outer loss a step (PGD-10: 2 passes on 22; methods without an attack: twice
    the time), a copy of the weights and one of their gradients.

    :param gamma: At least 0, 0.005 to 0.01 in the paper; 0 trains like the plain objective, bit for bit.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = _checks.real("awp", gamma, least=0)

    def on_start(self, run: Run) -> None:
        """Write it down."""
        run.history.meta["awp"] = {"gamma": self.gamma}

    @contextmanager
    def around_gradient(self, run: Run, batch: Batch, loss_terms: Callable[[], LossTerms]) -> Iterator[None]:
        """Move the weights; put them back."""
        weights: list[Tensor] = [
            weight for weight in run.model.parameters() if weight.requires_grad and weight.ndim > 1
        ]
        batch.kept = {}
        gradients = self._gradients(run, loss_terms, weights)
        before = [weight.detach().clone() for weight in weights]
        moved = [weight.detach() for weight in weights]
        try:
            torch._foreach_add_(moved, ascent_in_weights(before, gradients, self.gamma))
            yield
        finally:
            torch._foreach_copy_(moved, before)
            batch.kept = None

    def _gradients(self, run: Run, loss_terms: Callable[[], LossTerms], weights: list[Tensor]) -> list[Tensor]:
        """The gradient of the step's loss; afterwards every random source stands where it stood."""
        drawn = run.random.state_dict()
        with global_generators_kept(), side_pass(run.model):
            found = torch.autograd.grad(loss_terms().loss, weights, allow_unused=True)
        run.random.load_state_dict(drawn)
        return [
            run.engine.mean_over_ranks(torch.zeros_like(weight) if gradient is None else gradient.contiguous())
            for weight, gradient in zip(weights, found, strict=True)
        ]
