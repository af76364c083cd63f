"""The code of a network as a submission needs it: RobustBench's own class, a file that needs torch alone, or the user's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from art_saliency import architectures
from art_saliency.errors import UnsupportedModelError
from art_saliency.methods.fsr import FSRLayer, fsr_layers
from art_saliency.methods.surgery import Inserted, inserted
from art_saliency.residual_blocks import ActivationFirst, BasicBlock, PreActBlock, WideBlock, group, pooled
from art_saliency.robustbench import standalone
from art_saliency.robustbench.user_source import UserSource, user_architecture
from art_saliency.robustbench.writing import Architecture, buffers, factory, identifier, imported, sources, surgery

__all__ = ["architectures_of"]


def architectures_of(
    network: nn.Module, name: str, *, imagenet: bool = False, source: UserSource | None = None, label: str | None = None
) -> list[Architecture]:
    """
    The ways in which a network can be written down, best first; which of them holds is for the logits to say.

    :param network: What :func:`~art_saliency.robustbench.deployable.deployable` made.
    :param name: Of the entry.
    :param imagenet: Whether RobustBench will load it for ImageNet.
    :param source: Of a network that is not this package's.
    :param label: What the leaderboard is to show; ``None`` takes what is known of this package's networks.
    :raises UnsupportedModelError: When it is neither this package's network nor has a source.
    """
    added = {type(m.added).__name__ for m in inserted(network).values() if not isinstance(m.added, FSRLayer)}
    if added:
        raise UnsupportedModelError(
            f"model: got a network with {', '.join(sorted(added))}, expected FSR layers at most"
        )
    function, names = identifier(name), buffers(network)
    if source is not None:
        return [user_architecture(network, function, source, label, imagenet, names)]
    call, words = _own_call(network)
    layers = list(fsr_layers(network)) if inserted(network, "fsr") else []
    title = label or words + (" + FSR" if layers else "")
    found = [] if imagenet else _robustbenchs(network, name, title, names)
    return [*found, Architecture("own", title, _own_code(network, name, call, imagenet, names), imported(function))]


# --- this package's networks ----------------------------------------------------------------------------------------------


def _own_call(network: nn.Module) -> tuple[str, str]:
    """:return: The expression that makes it out of a class of `standalone`, and its name in words."""
    kind, state = type(network), network.state_dict()
    known = (architectures.SmallCNN, architectures.ResNet18, architectures.PreActResNet18, architectures.WideResNet)
    if kind not in known:
        raise UnsupportedModelError(
            f"model: got a {kind.__module__}.{kind.__name__}, expected one of this package's networks; name a Python file that "
            f"makes it with torch alone: source='network.py:factory' (--source network.py:factory)"
        )
    act, act_words = _activation(network)
    if kind is architectures.SmallCNN:
        first = state["layer1.0.weight"]
        stride = network.get_submodule("layer1.0").stride[0]  # type: ignore[index]
        common = f"num_classes={len(state['linear.weight'])}, in_channels={first.shape[1]}"
        call = f"SmallCNN({common}, width={len(first)}, stem_stride={stride}, act={act})"
        return call, f"small CNN (width {len(first)}{act_words})"
    first = state["conv1.weight"]
    if kind is architectures.WideResNet:
        blocks = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
        depth, widen = 6 * blocks + 4, state["fc.weight"].shape[1] // 64
        common = f"num_classes={len(state['fc.weight'])}, in_channels={first.shape[1]}"
        call = f"WideResNet({common}, depth={depth}, widen_factor={widen}, act={act})"
        return call, f"WideResNet-{depth}-{widen}" + (f" ({act_words[2:]})" if act_words else "")
    common = f"num_classes={len(state['linear.weight'])}, in_channels={first.shape[1]}"
    details = (f", width {len(first)}" if len(first) != 64 else "") + act_words
    call = f"{kind.__name__}({common}, width={len(first)}, act={act})"
    return call, kind.__name__.removesuffix("18") + "-18" + (f" ({details[2:]})" if details else "")


def _activation(network: nn.Module) -> tuple[str, str]:
    """:return: The activation as an expression, and in words unless it is ReLU. FSR's own are its own."""
    inside = {id(child) for layer in network.modules() if isinstance(layer, FSRLayer) for child in layer.modules()}
    structure = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Linear, Inserted)
    own = {architectures.SmallCNN, architectures.ResNet18, architectures.PreActResNet18, architectures.WideResNet}
    parts = [
        m
        for m in network.modules()
        if id(m) not in inside and not isinstance(m, structure) and type(m) not in own and not hasattr(m, "conv1")
    ]
    shown = {repr(part) for part in parts}
    foreign = {type(part) for part in parts if type(part).__module__ != "torch.nn.modules.activation"}
    if foreign or len(shown) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in foreign) or sorted(shown))
        raise UnsupportedModelError(
            f"model: got a network with {names} inside, expected one activation of torch.nn throughout; name a Python file that "
            f"makes it with torch alone: source='network.py:factory' (--source network.py:factory)"
        )
    (text,) = shown
    kind = type(parts[0]).__name__
    return (f"nn.{kind}" if text == f"{kind}()" else f"lambda: nn.{text}"), ("" if kind == "ReLU" else f", {kind}")


_NEEDS: dict[str, tuple[Any, ...]] = {
    "SmallCNN": (pooled, standalone.SmallCNN),
    "ResNet18": (pooled, group, BasicBlock, standalone.ResNet18),
    "PreActResNet18": (pooled, group, ActivationFirst, PreActBlock, standalone.PreActResNet18),
    "WideResNet": (pooled, group, ActivationFirst, WideBlock, standalone.WideResNet),
}


def _own_code(network: nn.Module, name: str, call: str, imagenet: bool, names: list[tuple[str, str]]) -> str:
    parts, lines = surgery(network, names, imagenet)
    texts = sources([*_NEEDS[call.partition("(")[0]], *parts])
    header = f'"""The network of {name}. It needs torch alone; its weights are in {name}.pt."""\n\n{_IMPORTS}'
    uses = "from collections import OrderedDict\n" if "OrderedDict" in texts else ""
    header = header.replace("from collections.abc", f"{uses}from collections.abc", 1)
    alias = "Activation = Callable[[], nn.Module]\n"
    return f"{header}\n{alias}\n\n{texts}\n\n{factory(name, call, lines)}"


_IMPORTS = """from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
"""


# --- RobustBench's classes ------------------------------------------------------------------------------------------------


def _robustbenchs(network: nn.Module, name: str, label: str, names: list[tuple[str, str]]) -> Iterator[Architecture]:
    """The class under whose names this network's tensors go, where everything that can be seen of it agrees."""
    state = network.state_dict()
    plain = not inserted(network) and _activation(network)[0] == "nn.ReLU" and names in ([], [("mu", "sigma")])
    if not plain or isinstance(network, architectures.SmallCNN) or state["conv1.weight"].shape[1] != 3:
        return
    if isinstance(network, architectures.WideResNet):
        depth, widen = (int(word) for word in _own_call(network)[1].split("-")[1:])
        home, imports, base = "wide_resnet", "WideResNet", "WideResNet"
        arguments = f"depth={depth}, num_classes={len(state['fc.weight'])}, widen_factor={widen}, sub_block1=False"
    elif len(state["conv1.weight"]) == 64:
        home, classes = "resnet", len(state["linear.weight"])
        block, base = (
            ("PreActBlock", "PreActResNet")
            if isinstance(network, architectures.PreActResNet18)
            else ("BasicBlock", "ResNet")
        )
        imports, arguments = f"{block}, {base}", f"{block}, [2, 2, 2, 2], num_classes={classes}"
    else:
        return
    lines = f"from robustbench.model_zoo.architectures.{home} import {imports}\n"
    if not names:
        yield Architecture("robustbench", label, None, (lines, f"lambda: {base}({arguments})"))
        return
    own = re.sub(r"\W", "_", name) + "Net"
    mu, sigma = (network.get_buffer(buffer) for buffer in names[0])
    lines = f"""import torch

{lines}

class {own}({base}):
    def __init__(self):
        super().__init__({arguments})
        self.register_buffer("mu", torch.tensor({mu.flatten().tolist()}).view{tuple(mu.shape)})
        self.register_buffer("sigma", torch.tensor({sigma.flatten().tolist()}).view{tuple(sigma.shape)})

    def forward(self, x):
        return super().forward((x - self.mu) / self.sigma)
"""
    yield Architecture("robustbench", label, None, (lines, own))
