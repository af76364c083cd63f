"""What must be equal in a run that goes on where another one was interrupted: data, method, network, optimizer, options."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency.files import sha256_of_tensors
from art_saliency.modes import tensor_float32
from art_saliency.trainers.network import ClassifierNetwork
from art_saliency.training.batches import ImageView

if TYPE_CHECKING:
    from art_saliency.trainers.base import ObjectiveTrainer
    from art_saliency.trainers.options import RunOptions

__all__ = ["FREE_OPTIONS", "digest_of_pair", "identity_of_run", "word"]

FREE_OPTIONS = ("extensions", "verbose", "checkpoint_dir", "checkpoint_every", "resume", "validation_split")
"""Options that may change: they do not touch what is computed, or (extensions, the split) are compared by other means."""

_MOVING = ("lr", "initial_lr", "max_lr", "min_lr", "params", "param_names")
_MOVED_BY_CYCLES = ("momentum", "betas")
_MOVING_OF_SCHEDULERS = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i")
_CHUNK = 1 << 22  # elements brought to the CPU in one go
_PLAIN = (bool, int, float, str, type(None))


def digest_of_pair(x: Tensor | ImageView, y: Tensor) -> str:
    """
    Tell a set of images from others.

    :param x: (N, C, H, W). :param y: (N,) or (N, K).
    :return: How many there are, and the first half of a SHA-256 of types, shapes and content.
    """
    digest = hashlib.sha256()
    for tensor in (x, y):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}|".encode())
        for start in range(0, len(tensor), rows := max(1, _CHUNK // max(1, tensor.shape[1:].numel()))):
            digest.update(tensor[start : start + rows].cpu().contiguous().numpy().data)
    return f"{len(x)} images, {digest.hexdigest()[:32]}"


def identity_of_run(
    trainer: ObjectiveTrainer,
    network: ClassifierNetwork,
    optimizer: Optimizer,
    scheduler: Any,
    options: RunOptions,
    *,
    device: torch.device,
    data: dict[str, Any],
    epochs: int,
    batch_size: int,
) -> dict[str, Any]:
    """
    Describe a run for :meth:`art_saliency.training.checkpoint.Checkpoints.belong_to`.

    :param data: Digests of the training and validation data, or what is known of a stream.
    :return: JSON-able, so that each difference can be named.
    """
    teacher = getattr(trainer.objective, "teacher", None)
    return {
        "data": data,
        "method": trainer.method_name(),
        "settings": trainer.config(),
        "teacher_epochs": trainer.teacher_epochs,
        "teacher": sha256_of_tensors(teacher.state_dict()) if isinstance(teacher, nn.Module) else None,
        "network": _network(network),
        "input": _input(network),
        "optimizer": _optimizer(optimizer, scheduler),
        "scheduler": scheduler if isinstance(scheduler, str) else _scheduler(scheduler),
        "nb_epochs": epochs,
        "batch_size": batch_size,
        "device": device.type,
        **({"tf32": tensor_float32()} if device.type == "cuda" else {}),
        **{f.name: word(getattr(options, f.name)) for f in fields(options) if f.name not in FREE_OPTIONS},
    }


def _input(network: ClassifierNetwork) -> dict[str, Any] | None:
    """How images come from [0, 1] to the model; ``None`` where they come as they are."""
    if (network.low, network.high) == (0.0, 1.0) and not network.steps:
        return None
    steps = []
    for step in network.steps:
        own = [name for name in vars(step) if not name.startswith("_")]
        names = step.params or own  # some of ART's name no parameter
        settings = {name: word(getattr(step, name, None)) for name in names if name != "verbose"}
        steps.append({"name": type(step).__name__, **settings})
    return {"clip_values": [network.low, network.high], "preprocessing": steps}


def word(value: Any) -> Any:
    """A plain value as it is, a digest of an array; of anything else its words, without addresses, which change with the process."""
    if isinstance(value, (np.ndarray, Tensor)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        return f"{array.dtype} {array.shape} {array.ravel()[:3].tolist()} {digest}"
    if isinstance(value, _PLAIN):
        return value
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    except RecursionError:  # of some of ART's attacks, which show a method of their own as a part of themselves
        if isinstance(value, (list, tuple)):
            return [word(part) for part in value]
        return getattr(value, "__qualname__", type(value).__qualname__)


def _network(network: nn.Module) -> dict[str, Any]:
    shapes = {name: f"{tuple(value.shape)} {value.dtype}" for name, value in network.state_dict().items()}
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    return {"modules": _word_lines(network), "tensors": shapes, "frozen": frozen}


def _word_lines(network: nn.Module) -> list[str]:
    return str(word(network)).splitlines()


def _optimizer(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Its class and its groups' settings; the learning rate is the one that a scheduler starts from."""
    own = scheduler is None or isinstance(scheduler, str)  # else the user's scheduler may have moved them already

    def first_rate(group: dict[str, Any]) -> float:
        now = group["lr"] if own else optimizer.defaults.get("lr", group["lr"])
        return float(group.get("initial_lr", now))

    groups = [
        {
            "lr": word(first_rate(group)),
            "parameters": len(group["params"]),
            **{
                key: word(value)
                for key, value in group.items()
                if key not in _MOVING and not (key in _MOVED_BY_CYCLES and "base_momentum" in group)
            },
        }
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": groups}


def _scheduler(scheduler: Any) -> dict[str, Any] | None:
    """The settings of a scheduler object, without what moves while it runs."""
    if scheduler is None:
        return None
    state = scheduler.state_dict()
    kept = {key: word(v) for key, v in state.items() if not key.startswith("_") and key not in _MOVING_OF_SCHEDULERS}
    return {"name": type(scheduler).__name__, **kept}
