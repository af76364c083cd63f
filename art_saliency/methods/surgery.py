"""
Model surgery: put a layer behind a submodule of somebody else's network, by dotted name, and take it out again.

The submodule is *replaced* by :class:`Inserted`, which calls it and then the layer, so the change survives copies, pickles
and wrappers. To everybody outside, the backbone's tensors keep their names, in state dicts and in ``named_parameters`` alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import NoEffectWarning, UnsupportedModelError
from art_saliency.modes import evaluating

__all__ = [
    "FeatureLayer",
    "Features",
    "Inserted",
    "TokenGrid",
    "bottleneck",
    "insert_after",
    "inserted",
    "remove_inserted",
]


class Inserted(nn.Module):
    """
    Calls a submodule and then the layer behind it; in all else it stands for the submodule.

    Attributes are read from and written to the submodule. ``state_dict``, ``named_parameters``, ``named_buffers`` and
    ``get_submodule`` agree on names: the backbone's own, and ``<target>.<name>.*`` for the layer. (ART's weight
    perturbation, for one, looks up parameters by the keys of the state dict.) Not an ``nn.Sequential``: ART runs those
    child by child.

    :ivar inner: The submodule.
    :ivar added_name: The name of the layer, a child of this module.
    """

    inner: nn.Module
    added_name: str

    def __init__(self, inner: nn.Module, name: str, added: nn.Module) -> None:
        super().__init__()
        self.training = inner.training
        self.added_name = name
        self._loading: tuple[str, tuple[list[str], ...]] | None = None
        self.register_load_state_dict_post_hook(_public_names)  # type: ignore[no-untyped-call]
        self.add_module(name, added)
        self.add_module("inner", inner)  # last: from here on, attributes are the submodule's

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add or replace a child, as in torch."""
        super().add_module(name, module)
        if name == "inner" and module is not None:
            # One set of tensors, not two: what the submodule owns directly (a normalisation's weight) is seen, swapped and
            # moved here under its old name.
            self._parameters, self._buffers = module._parameters, module._buffers
            self._non_persistent_buffers_set = module._non_persistent_buffers_set

    @property
    def added(self) -> nn.Module:
        """:return: The layer."""
        layer = self._modules[self.added_name]
        assert layer is not None
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """:return: The layer's output on the submodule's."""
        return self.added(self.inner(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Double underscores are the wrapper's own affair: a submodule's __deepcopy__ would copy the layer away.
            if name.startswith("__") or name == "inner":
                raise
            return getattr(super().__getattr__("inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get("inner")
        foreign = inner is not None and name not in self.__dict__ and name not in self._modules
        if foreign and (name in inner.__dict__ or name in inner._modules):
            setattr(inner, name, value)
        elif name == "inner":
            self.add_module(name, value)
        else:
            super().__setattr__(name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """
        As in torch, with the submodule's descendants under the names that they had.

        The submodule itself is ``<target>.inner`` (tracing needs a name for each module); with duplicates it is ``<target>``,
        so that every name of a tensor is one of the state dict's.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        dot = prefix + "." if prefix else ""
        for name, module in self.inner.named_modules(memo, prefix, remove_duplicate):
            yield (f"{dot}inner" if module is self.inner and remove_duplicate else name), module
        yield from self.added.named_modules(memo, dot + self.added_name, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """:return: The submodule's entries under the keys that they had, and the layer's."""
        destination = self.inner.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.added.state_dict(destination=destination, prefix=f"{prefix}{self.added_name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Nothing is loaded here: torch goes on to the children, and looks for the submodule's entries under "inner".
        layer = f"{prefix}{self.added_name}."
        own = {
            key: state_dict.pop(key) for key in [*state_dict] if key.startswith(prefix) and not key.startswith(layer)
        }
        state_dict.update({f"{prefix}inner.{key[len(prefix) :]}": value for key, value in own.items()})
        self._loading = (prefix, (missing_keys, unexpected_keys, error_msgs))


def _public_names(wrapper: nn.Module, _: Any) -> None:
    """After loading: torch's complaints about the submodule, under the names that the user knows."""
    assert isinstance(wrapper, Inserted)
    assert wrapper._loading is not None
    prefix, complaints = wrapper._loading
    wrapper._loading = None
    for lines in complaints:
        lines[:] = [line.replace(f"{prefix}inner.", prefix) for line in lines]


@dataclass(frozen=True)
class TokenGrid:
    """
    How tokens (N, L, C) of a vision transformer lie on the image: leading tokens (class, registers), then rows of patches.

    :param prefix: The number of leading tokens.
    :param height: Patches from top to bottom in the example; other sizes of the same aspect ratio are accepted.
    :param width: Patches from left to right in the example.
    """

    prefix: int
    height: int
    width: int

    @classmethod
    def of(cls, tokens: Tensor, image: tuple[int, ...], declared: int | None) -> TokenGrid:
        """
        Find the one grid of the image's aspect ratio that leaves no, one or the declared number of leading tokens.

        :param tokens: (N, L, C).
        :param image: The example's shape, (N, C, H, W).
        :param declared: What the network says of itself (timm: ``num_prefix_tokens``).
        """
        grids = []
        if len(image) == 4:
            for prefix in sorted({0, 1, declared or 0}):
                if (sides := _sides(tokens.shape[1] - prefix, image[-2], image[-1])) is not None:
                    grids.append(cls(prefix, *sides))
        if len(grids) != 1:
            raise UnsupportedModelError(
                f"target: got {tokens.shape[1]} tokens for an example of shape {tuple(image)}, expected one grid of square patches, "
                f"with a class token or without; name a submodule whose output is a feature map (N, C, H, W)"
            )
        return grids[0]

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """:return: The leading tokens (N, P, C), and the patches as a feature map (N, C, H, W)."""
        leading, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        sides = _sides(patches.shape[1], self.height, self.width)
        if sides is None:
            raise _checks.refuse(
                "tokens",
                f"{patches.shape[1]} patches",
                f"a grid of the aspect ratio {self.height} x {self.width}",
                "resize the images",
            )
        return leading, patches.transpose(1, 2).reshape(len(patches), -1, *sides)

    def join(self, leading: Tensor, features: Tensor) -> Tensor:
        """:return: (N, L, C), the inverse of :meth:`split`."""
        return torch.cat([leading, features.flatten(2).transpose(1, 2)], dim=1)


def _sides(count: int, height: int, width: int) -> tuple[int, int] | None:
    """:return: The grid of `count` cells whose sides are as height to width, where there is one."""
    rows = isqrt(max(count, 0) * height // width)
    columns = rows * width // height
    return (rows, columns) if rows * columns == count > 0 and rows * width == columns * height else None


@dataclass(frozen=True)
class Features:
    """
    What a layer is built for: the output of the target on the example.

    :ivar channels: C. :ivar tokens: How tokens lie on the image; ``None`` for feature maps (N, C, H, W).
    :ivar num_classes: K, the columns of the logits. :ivar like: The output itself, for its device and dtype.
    """

    channels: int
    tokens: TokenGrid | None
    num_classes: int
    like: Tensor


def bottleneck(channels: int, hidden: int) -> nn.Sequential:
    """
    The network of FSR's S and R, and of its control.

    :return: Conv3x3(C->h) BN ReLU Conv3x3(h->h) BN ReLU Conv3x3(h->C); 18 C h + 9 h^2 + 4 h parameters.
    """

    def conv(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    return nn.Sequential(
        conv(channels, hidden),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        conv(hidden, hidden),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        conv(hidden, channels),
    )


class FeatureLayer(nn.Module, ABC):
    """
    A layer that maps features to features of the same shape: feature maps, or tokens seen as such.

    Subclasses define :meth:`transform`.

    :param tokens: How tokens lie on the image, for features (N, L, C); ``None`` takes (N, C, H, W).
    """

    def __init__(self, tokens: TokenGrid | None = None) -> None:
        super().__init__()
        self.tokens = tokens

    @abstractmethod
    def transform(self, f: Tensor) -> Tensor:
        """:param f: (N, C, H, W), any H and W. :return: The same shape."""

    def forward(self, features: Tensor) -> Tensor:
        """
        Apply :meth:`transform`.

        :param features: (N, C, H, W); (N, L, C) where the layer was built for tokens: leading ones (the class token) pass untouched.
        :return: As `features`.
        """
        if self.tokens is None:
            return self.transform(features)
        leading, f = self.tokens.split(features)
        return self.tokens.join(leading, self.transform(f))


def inserted(model: nn.Module, name: str | None = None) -> dict[str, Inserted]:
    """:return: The places where something was inserted (under that name), by target, in order."""
    found = {target: module for target, module in model.named_modules() if isinstance(module, Inserted)}
    return {target: module for target, module in found.items() if name in (None, module.added_name)}


def insert_after(
    model: nn.Module, target: str, example: Tensor, name: str, build: Callable[[Features], nn.Module]
) -> nn.Module:
    """
    Put a layer behind a submodule, in place, checked by dry runs in eval mode that leave the network as it was.

    :param model: The network; maps `example` to logits (N, K).
    :param target: The dotted name of the submodule.
    :param example: A batch of images that the network takes, (N, C, H, W), N at least 1; moved to its device.
    :param name: What the layer is called: its tensors are ``<target>.<name>.*``.
    :param build: Makes the layer from what the target puts out.
    :return: The layer.
    :raises InputError: When there is no such submodule, or something was inserted there before.
    :raises UnsupportedModelError: When a layer behind it could not do its work; the network is then as it was.
    """
    submodule = _find(model, target, name)
    device = next((p.device for p in model.parameters()), example.device)
    example = example.detach().to(device)
    try:
        outputs, logits = _observe(model, submodule, example)
    except Exception as error:
        raise _checks.refuse(
            "example", f"shape {tuple(example.shape)} ({error})", "a batch that the network takes"
        ) from error
    features = _features(model, submodule, target, outputs, logits, example)
    layer = build(features).to(device=features.like.device, dtype=features.like.dtype).train(submodule.training)
    wrapper = Inserted(submodule, name, layer)
    _replace(model, target, wrapper)
    try:
        with _nudged(layer, features):
            calls, moved = _observe(model, wrapper, example)
    except Exception as error:
        _replace(model, target, submodule)
        raise UnsupportedModelError(
            f"target: got {target!r}, which its parent does more with than call it ({error}); expected a submodule that is only "
            f"called; name one of its children or its parent"
        ) from error
    if len(calls) != 1:
        _replace(model, target, submodule)
        raise UnsupportedModelError(
            f"target: got {target!r}, which the network calls past that name (by a list or an alias of its own), expected a "
            f"submodule that is called by its name; name another"
        )
    if not logits.is_meta and torch.equal(logits, moved):
        warn(
            f"target: the logits do not depend on what comes behind {target!r} (a class token passes a layer on patches "
            f"untouched, say); name a submodule nearer the input",
            NoEffectWarning,
            stacklevel=3,
        )
    return layer


def remove_inserted(model: nn.Module, target: str | None, name: str) -> nn.Module:
    """
    Undo :func:`insert_after`, in place.

    :param target: Where; ``None`` is everywhere.
    :param name: What the layer is called.
    :return: The same network.
    """
    places = inserted(model, name)
    if target is not None and not places:
        raise _checks.refuse("model", f"a network without any {name!r} layer", f"one behind {target!r}")
    if target is not None:
        _checks.one_of("target", target, places)
    elif not places:
        warn(f"model: got a network without any {name!r} layer, nothing was removed", NoEffectWarning, stacklevel=3)
    for place in places if target is None else [target]:
        _replace(model, place, places[place].inner)
    return model


def _replace(model: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, child = target.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _find(model: nn.Module, target: str, name: str) -> nn.Module:
    """:return: The submodule of that name; a wrong name, the root, and places already taken are refused."""
    known: dict[str, nn.Module] = {place: m for place, m in model.named_modules(remove_duplicate=False) if place}
    if target == "":
        raise _checks.refuse("target", "''", "a submodule", "the root cannot be replaced; name its last feature map")
    if target not in known:
        hint = (
            _checks.suggestion(target, known) or f"; its children are {', '.join(n for n, _ in model.named_children())}"
        )
        raise _checks.refuse("target", repr(target), f"the name of a submodule of {type(model).__name__}{hint}")
    for place, wrapper in inserted(model).items():
        added = f"{place}.{wrapper.added_name}"
        if target in (place, added) or target.startswith(f"{added}."):
            raise _checks.refuse(
                "target", repr(target), f"a place without a layer; {added!r} is there already", "remove it first"
            )
    if hasattr(known[target], name):
        raise _checks.refuse(
            "target", repr(target), f"a submodule without an attribute {name!r} of its own", "name its parent"
        )
    return known[target]


def _observe(model: nn.Module, submodule: nn.Module, example: Tensor) -> tuple[list[Any], Any]:
    """:return: What the submodule put out, call by call, in one pass in eval mode, and the network's output."""
    outputs: list[Any] = []
    handle = submodule.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with evaluating(model), torch.no_grad():
            return outputs, model(example)
    finally:
        handle.remove()


def _features(
    model: nn.Module, submodule: nn.Module, target: str, outputs: list[Any], logits: Any, example: Tensor
) -> Features:
    """:return: What the target puts out, where a layer can stand behind it."""

    def refuse(got: str, expected: str, remedy: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"target: got {target!r}, which {got}; expected {expected}; {remedy}")

    if not outputs:
        children = [f"{target}.{child}" for child, _ in submodule.named_children()]
        remedy = f"name one of its children, {children[-1]!r} say" if children else "name a submodule that is used"
        raise refuse("is never called in a forward pass", "a submodule that is called once", remedy)
    if len(outputs) > 1:
        raise refuse(
            f"is called {len(outputs)} times a forward pass", "a submodule that is called once", "name its parent"
        )
    output = outputs[0]
    if not isinstance(output, Tensor):
        raise refuse(f"returns a {type(output).__name__}", "a tensor", "name a submodule inside it or behind it")
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UnsupportedModelError(
            f"model: got {got} as its output, expected logits (N, K); wrap it so that it returns them"
        )
    if output.ndim not in (3, 4) or not output.is_floating_point():
        got = f"returns a {output.dtype} tensor of shape {tuple(output.shape)}"
        raise refuse(got, "features (N, C, H, W), or tokens (N, L, C)", "name a submodule before the pooling")
    _, first, second, last = (*output.shape, 0)[:4]
    if output.ndim == 4 and example.ndim == 4 and example.shape[-2] == example.shape[-1] and first == second != last:
        raise refuse(
            f"returns channels last, {tuple(output.shape)}", "features (N, C, H, W)", "name the permutation behind it"
        )
    tokens = None
    if output.ndim == 3:
        tokens = TokenGrid.of(output, tuple(example.shape), getattr(model, "num_prefix_tokens", None))
    return Features(output.shape[1 if tokens is None else 2], tokens, logits.shape[1], output)


@contextmanager
def _nudged(layer: nn.Module, features: Features) -> Iterator[None]:
    """Move the layer's output a little for the duration: a pattern that no normalisation takes back."""

    def nudge(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leading, moved = (None, output) if features.tokens is None else features.tokens.split(output)
        wave = torch.arange(moved.numel(), device=output.device, dtype=torch.float32).sin().view(moved.shape)
        moved = moved + (1 + moved.abs().mean()) * wave.to(moved.dtype)
        return moved if leading is None or features.tokens is None else features.tokens.join(leading, moved)

    handle = layer.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()
