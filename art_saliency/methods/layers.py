"""A layer by name: the one that feature methods guide, found by a dry run, and what acts on its features for one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import UnsupportedModelError
from art_saliency.modes import evaluating

__all__ = ["at_layer", "find_guided_layer"]


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
    maps = [place for place, call in enumerate(calls) if _is_feature_map(call.output, logits)]
    after = calls[maps[-1] + 1 :] if maps else []
    if maps and not any(call.output is not None and call.output.ndim == 3 for call in after):
        last = calls[maps[-1]]
        shared = sum(call.module is last.module for call in calls) > 1
        return f"{after[0].name}:input" if after and _guided_instead(last, after[0], shared) else last.name
    for call in reversed(calls):
        if isinstance(call.module, nn.Linear) and call.consumed is not None and call.consumed.ndim == 2:
            return f"{call.name}:input"
    raise UnsupportedModelError(
        "layer: got None and a network without a feature map or a linear head, expected either; name the guided layer"
    )


class _Call(NamedTuple):
    """One call of a submodule in a dry run: its first input and its output, where they are tensors."""

    name: str
    module: nn.Module
    consumed: Tensor | None
    output: Tensor | None


def _trace(model: nn.Module, x: Tensor) -> tuple[list[_Call], Tensor]:
    """:return: The calls of a forward in eval mode, in the order in which they finished, and the logits."""
    calls: list[_Call] = []

    def copied(value: Any) -> Tensor | None:
        return value.clone() if isinstance(value, Tensor) else None  # what follows may work in place

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:

                def record(module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                    calls.append(_Call(name, module, copied(inputs[0]) if inputs else None, copied(output)))

                stack.callback(module.register_forward_hook(record).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        return calls, model(x)


def _is_feature_map(output: Tensor | None, logits: Tensor) -> bool:
    if output is None or output.ndim != 4 or output.shape[2] * output.shape[3] == 1:
        return False
    # A map of class scores (a convolutional head) is no feature map: its mask would say which class is the true one.
    return output.shape[1] != logits.shape[1] or not torch.allclose(output.mean((2, 3)), logits, rtol=1e-3, atol=1e-4)


def _guided_instead(last: _Call, consumer: _Call, shared: bool) -> bool:
    """:return: Whether to guide the next module's input instead: it is the map after its ReLU, or `last` is used more than once."""
    if last.output is None or consumer.consumed is None or consumer.consumed.ndim not in (2, 4):
        return False
    if consumer.consumed.shape[1] != last.output.shape[1]:
        return False
    return shared or (bool((last.output < 0).any()) and not bool((consumer.consumed < 0).any()))


def _resolve(model: nn.Module, layer: str) -> tuple[nn.Module, bool]:
    """:return: The named module, also under a wrapper's ``module.`` prefix, and whether its input is meant."""
    name, _, side = layer.partition(":")
    modules = dict(model.named_modules())
    if name not in modules:
        inside = sorted((known for known in modules if known.endswith("." + name)), key=len)
        name = inside[0] if inside else name
    if not name or name not in modules or side not in ("", "input"):
        wrapped = getattr(model, "network", model)  # as a trainer wraps it: names count from there as well
        names = [known for known, _ in wrapped.named_modules() if known]
        hint = (
            _checks.suggestion(name, names) or f"; its children are {', '.join(n for n, _ in wrapped.named_children())}"
        )
        raise _checks.refuse("layer", repr(layer), f"the name of a submodule{hint}")
    return modules[name], side == "input"


@contextmanager
def at_layer(model: nn.Module, layer: str, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """
    Put `act` on the features of one layer for the one forward of the block; nothing stays on the model, also on error.

    :param layer: A submodule's name, also as it was before a wrapper; ``"name:input"`` for what goes into it.
    :param act: Features (N, C, H, W) or (N, C) -> what takes their place.
    :raises InputError: When there is no such layer, or it runs never or twice, or gives something else.
    """
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
        handle = module.register_forward_pre_hook(
            lambda _, inputs: (checked(inputs[0] if inputs else None), *inputs[1:])
        )
    else:
        handle = module.register_forward_hook(lambda _, __, output: checked(output))
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise _checks.refuse(
            "layer",
            f"{layer!r}, which the forward never calls",
            "a module that runs",
            "a compiled network hides its layers",
        )
