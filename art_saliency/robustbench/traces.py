"""A network's forward pass, call by call: what each submodule was given and put out, and what it did meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["Call", "LoopWatch", "gradient_stops", "same", "trace"]


@dataclass
class Call:
    """
    One call of a submodule.

    :ivar place: Its dotted path; ``""`` is the network.
    :ivar inputs: Copies of the tensors that it was given. :ivar outputs: And of those that it returned.
    :ivar plain: Whether it returned one tensor and nothing else.
    """

    place: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    plain: bool


def trace(model: nn.Module, x: Tensor, *, gradients: bool = False) -> list[Call]:
    """
    Run a forward pass.

    :param gradients: Whether it can be differentiated with respect to the images, as an attack's passes can.
    :return: Every call, in the order in which they ended: inner ones before outer ones, the network's own last.
    """
    calls: list[Call] = []
    given: list[list[Tensor]] = []

    def enter(_: str, inputs: list[Tensor]) -> None:
        given.append(_copies(inputs))  # at once: a module may work in place

    def leave(place: str, output: Any) -> None:
        calls.append(Call(place, given.pop(), _copies(_tensors(output)), isinstance(output, Tensor)))

    with torch.set_grad_enabled(gradients), _listening(model, enter, leave):
        model(x.clone().requires_grad_(True) if gradients else x)
    return calls


def gradient_stops(model: nn.Module, x: Tensor, weights: Tensor) -> list[str]:
    """
    The innermost submodules that a gradient reaches from the logits, and that pass nothing of it on.

    :param weights: (K,), of the logits, whose weighted sum is differentiated.
    :return: Their paths; empty when it ends outside every submodule.
    """
    reached: dict[int, bool] = {}
    calls: list[tuple[str, list[int], list[int], bool]] = []
    given: list[tuple[list[int], bool]] = []

    def watch(tensors: Iterable[Tensor]) -> list[int]:
        numbers = []
        for tensor in tensors:
            if tensor.requires_grad:
                number = len(reached)
                reached[number] = False
                tensor.register_hook(lambda g, n=number: reached.__setitem__(n, bool((g != 0).any())))  # type: ignore[no-untyped-call]
                numbers.append(number)
        return numbers

    def enter(_: str, inputs: list[Tensor]) -> None:
        given.append((watch(inputs), bool(inputs)))

    def leave(place: str, output: Any) -> None:
        inputs, fed = given.pop()
        calls.append((place, inputs, watch(_tensors(output)), fed))

    with _listening(model, enter, leave):
        logits = model(x.clone().requires_grad_(True))
    if logits.requires_grad:
        (logits * weights).sum().backward()
    found = []
    for place, inputs, outputs, fed in calls:
        arrives = any(reached[number] for number in outputs)
        cut = bool(inputs) and not outputs  # what came in had a graph, what went out has none
        if fed and inputs and (cut or arrives) and not any(reached[number] for number in inputs):
            found.append(place)
    return [p for p in dict.fromkeys(found) if not any(o != p and (p == "" or o.startswith(f"{p}.")) for o in found)]


class LoopWatch(AbstractContextManager["LoopWatch"]):
    """
    Notes every gradient that is computed, and every optimizer that steps, inside the context, and in which submodule.

    :ivar seen: Pairs of a path and what was computed there, each once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen, self._stack = model, list[tuple[str, str]](), [""]
        self._mode = _GradientCalls(self)

    def note(self, what: str) -> None:
        """Add an observation, at the submodule that is running."""
        if (entry := (self._stack[-1], what)) not in self.seen:
            self.seen.append(entry)

    def __enter__(self) -> LoopWatch:
        self._hooks = _listening(self.model, lambda place, _: self._stack.append(place), lambda *_: self._stack.pop())
        self._hooks.__enter__()
        self._optimizer: RemovableHandle = register_optimizer_step_pre_hook(lambda *_: self.note("an optimizer's step"))
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        self._optimizer.remove()
        self._hooks.__exit__(None, None, None)


class _GradientCalls(TorchFunctionMode):
    def __init__(self, watch: LoopWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
            self.watch.note("gradients")
        return func(*args, **(kwargs or {}))


@contextmanager
def _listening(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    """Call `enter(place, input tensors)` and `leave(place, output)` around every call of every submodule."""

    def before(place: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:  # what a hook returns would replace the input
            enter(place, _tensors([args, kwargs]))

        return hook

    def after(place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            leave(place, output)

        return hook

    handles = []
    for place, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(place), with_kwargs=True))
        handles.append(module.register_forward_hook(after(place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """:return: The tensors in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def same(ours: Tensor | list[Tensor], theirs: Tensor | list[Tensor]) -> bool:
    """:return: Whether tensors are equal bit for bit, NaN included."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and bool(torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs)))
    return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
