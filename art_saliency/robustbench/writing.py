"""How a network's code is put together: parts of :mod:`art_saliency.robustbench.standalone`, and a factory that uses them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from art_saliency.methods.fsr import fsr_layers
from art_saliency.methods.surgery import inserted
from art_saliency.robustbench import standalone

__all__ = ["Architecture", "buffers", "factory", "identifier", "imported", "sources", "surgery"]


@dataclass(frozen=True)
class Architecture:
    """
    One way to write a network down.

    :ivar kind: ``"robustbench"``, ``"own"`` or ``"user"``. :ivar label: As the leaderboard shows it; ``None`` when unknown.
    :ivar code: Of ``architecture.py``; ``None`` where RobustBench has the class.
    :ivar definition: The lines of ``model_zoo_entry.py`` that bring the factory into being, and its name.
    """

    kind: str
    label: str | None
    code: str | None
    definition: tuple[str, str]


def identifier(name: str) -> str:
    """:return: The name of an entry as that of a Python module or function."""
    return re.sub(r"\W", "_", name).lower()


def surgery(network: nn.Module, names: list[tuple[str, str]], imagenet: bool) -> tuple[list[Any], list[str]]:
    """:return: The parts of `standalone` that are needed beside the bare network, and the lines that apply them."""
    parts: list[Any] = []
    lines = []
    layers = fsr_layers(network) if inserted(network, "fsr") else {}
    for target, layer in layers.items():
        tokens = "" if layer.tokens is None else f", leading={layer.tokens.prefix}, rows={layer.tokens.height}"
        made = f"FSR(channels={layer.channels}, hidden={layer.hidden}, tau={layer.tau!r}{tokens})"
        lines.append(f'put_behind(model, "{target}", {made})')
    if layers:
        parts += [standalone.FSR, standalone.put_behind]
    for mean, std in names:
        lines.append(f'normalise_input(model, {tuple(network.get_buffer(mean).shape)}, "{mean}", "{std}")')
    if names:
        parts.append(standalone.normalise_input)
    if imagenet:
        parts.append(standalone.ImageNetWrapper)
        lines.append("model = ImageNetWrapper(model)")
    return parts, lines


def buffers(network: nn.Module) -> list[tuple[str, str]]:
    """
    The buffers by which a network standardises its input, where this package's code sees to it.

    :return: Pairs of names; what meets the image first comes first, as hooks run in the order in which they are registered.
    """
    hooks = {getattr(hook, "__module__", "") for hook in network._forward_pre_hooks.values()}
    baked = standalone.__name__ in hooks
    second = "input_mu" in network._buffers and baked
    ours = type(network).__module__ == "art_saliency.architectures" or "art_saliency.networks" in hooks
    found = [("input_mu", "input_sigma")] if second else []
    return found + ([("mu", "sigma")] if "mu" in network._buffers and (ours or (baked and not second)) else [])


def sources(parts: list[Any]) -> str:
    """:return: The code of parts of `standalone`, without the remarks that are for its type checker."""
    texts = (inspect.getsource(part) for part in parts)
    return "\n\n".join(re.sub(r"  # type: ignore\[[^\]]*\]", "", text) for text in texts)


def factory(name: str, call: str, lines: list[str]) -> str:
    """:return: The function that makes the network: an expression, then lines that change what it made."""
    body = "".join(f"    {line}\n" for line in [f"model = {call}", *lines, "return model"])
    annotation = " -> nn.Module" if "nn." in body or lines else ""
    docstring = f'    """:return: The network of {name}: images in [0, 1] to logits."""\n'
    return f"def {identifier(name)}(){annotation}:\n{docstring}{body}"


def imported(function: str) -> tuple[str, str]:
    """:return: The definition of an entry whose code is in a file of its own, where the pull request will put it."""
    return f"from robustbench.model_zoo.architectures.{function} import {function}\n", function
