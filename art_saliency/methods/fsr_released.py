"""Checkpoints of FSR's released code, in this package's layers."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.files import read_tensors
from art_saliency.methods.fsr import fsr_layers

__all__ = ["load_released"]


def load_released(model: nn.Module, source: str | PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """
    Load a checkpoint of the released code, in place: all of it, or nothing.

    Its keys ``separation.sep_net.*``, ``recalibration.rec_net.*`` and ``aux.0.*`` become the FSR layer's; a leading ``module.``
    is cut; ``sub_block1.*``, which the WRN of the release never calls, is left out where the network has none.

    :param model: The network, one FSR layer inserted where the release has it, its backbone's names those of the release.
    :param source: A file of tensors, or a state dict.
    :return: The same network.
    :raises CheckpointError: When the file cannot be read, or any key or shape does not fit; all of them are listed.
    """
    layers = fsr_layers(model)
    if len(layers) != 1:
        raise _checks.refuse("model", f"FSR layers behind {', '.join(layers)}", "one, as the release has")
    released = source if isinstance(source, Mapping) else _read(source)
    (target,) = layers
    layer = f"{target}.fsr." if target else ""
    own = model.state_dict()
    state = {_released_name(key, layer): value for key, value in released.items()}
    state = {key: value for key, value in state.items() if key in own or not key.startswith("sub_block1.")}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} of shape {tuple(state[key].shape)} where the network has {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise CheckpointError(f"checkpoint: does not fit the network, nothing was loaded: {'; '.join(problems)}")
    model.load_state_dict(state)
    return model


def _read(path: str | PathLike[str]) -> Mapping[str, Tensor]:
    content = read_tensors(Path(path))
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"checkpoint: {path} holds a dict with the keys {', '.join(map(str, content))}, expected tensors by key; load it yourself and "
            f"hand over its state dict"
        )
    return content


def _released_name(key: str, layer: str) -> str:
    """:return: Our name of a tensor of the release."""
    key = key.removeprefix("module.")
    for theirs, ours in (
        ("separation.sep_net.", "separation."),
        ("recalibration.rec_net.", "recalibration."),
        ("aux.0.", "auxiliary."),
    ):
        if key.startswith(theirs):
            return layer + ours + key[len(theirs) :]
    return key
