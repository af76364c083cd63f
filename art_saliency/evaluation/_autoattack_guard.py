"""What AutoAttack changes in a process, put back: tracer, random states, gradients, modes, its own counter."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from art_saliency.modes import evaluating, frozen


def random_state() -> dict[str, Any]:
    """:return: The state of every global generator, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - what others draw from
    return {
        "torch": torch.get_rng_state(),
        # Asking an idle CUDA for its state would start it: hundreds of MiB, and no fork afterwards.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue where :func:`random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    elif torch.cuda.is_available():
        # Seeds given to an idle CUDA wait for its start. Its state cannot be read, but torch seeds it with the CPU's.
        torch.cuda.manual_seed_all(torch.initial_seed())
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Seed every global generator: a randomised network may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextmanager
def process_kept(model: nn.Module, counter: dict[str, int]) -> Iterator[None]:
    """
    Evaluate a network with AutoAttack and leave no trace, on error too.

    Gradients are taken off the parameters rather than copied: FAB's ``backward()`` would add to them in place.

    :param model: In eval mode and frozen for the duration.
    :param counter: AutoAttack's count of calls that look like a dynamic defence; emptied before and after.
    """
    tracer, randomness = sys.gettrace(), random_state()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    counter.update(dict.fromkeys(counter, 0))
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        # A caller's inference_mode() cannot be undone by AutoAttack's enable_grad(); its no_grad() can.
        with torch.inference_mode(False), evaluating(model), frozen(model):
            yield
    finally:
        sys.settrace(tracer)  # AutoAttack ends with settrace(None), which switches off debuggers and coverage
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_random_state(randomness)
        counter.update(dict.fromkeys(counter, 0))
