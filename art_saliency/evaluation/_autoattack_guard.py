"""What AutoAttack changes in a process, put back: tracer, random states, gradients, modes, its own counter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from art_saliency.modes import evaluating, frozen
from art_saliency.randomness import global_generators_kept


@contextmanager
def process_kept(model: nn.Module, counter: dict[str, int]) -> Iterator[None]:
    """
    Evaluate a network with AutoAttack and leave no trace, on error too.

    Gradients are taken off the parameters rather than copied: FAB's ``backward()`` would add to them in place.

    :param model: In eval mode and frozen for the duration.
    :param counter: AutoAttack's count of calls that look like a dynamic defence; emptied before and after.
    """
    tracer = sys.gettrace()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    counter.update(dict.fromkeys(counter, 0))
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        # A caller's inference_mode() cannot be undone by AutoAttack's enable_grad(); its no_grad() can.
        with global_generators_kept(), torch.inference_mode(False), evaluating(model), frozen(model):
            yield
    finally:
        sys.settrace(tracer)  # AutoAttack ends with settrace(None), which switches off debuggers and coverage
        for parameter, gradient in gradients:
            parameter.grad = gradient
        counter.update(dict.fromkeys(counter, 0))
