"""One row a method: settings under which it trains something in seconds. A test fails when a public method has no row."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_saliency.trainers import methods


@dataclass(frozen=True)
class Row:
    """How to try a method on digits."""

    trainer: type
    settings: dict[str, Any] = field(default_factory=lambda: {"eps": 0.15})


ROWS = {
    "standard": Row(methods.StandardTrainer),
    "fgsm-rs": Row(methods.FGSMTrainer),
    "pgd-at": Row(methods.PGDATTrainer, {"eps": 0.15, "max_iter": 3}),
    "trades": Row(methods.TRADESTrainer, {"eps": 0.15, "max_iter": 3}),
    "mart": Row(methods.MARTTrainer, {"eps": 0.15, "max_iter": 3}),
    "alp": Row(methods.ALPTrainer, {"eps": 0.15, "max_iter": 3}),
    "adv-gsct": Row(methods.AdvGSCTTrainer),
    "j-sigr": Row(methods.JSIGRTrainer),
    "aalp": Row(methods.AALPTrainer, {"eps": 0.15, "max_iter": 3}),
    "fsr": Row(methods.FSRTrainer, {"eps": 0.15, "max_iter": 3, "target": "features", "hidden": 8}),
}


def small_network(*, norm: bool = False, classes: int = 10) -> nn.Module:
    """A network for 8x8 digits that trains in a second; with BatchNorm when asked."""
    first: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1)]
    if norm:
        first.append(nn.BatchNorm2d(8))
    features = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
    layers = {"features": features, "flat": nn.Flatten(), "linear": nn.Linear(16 * 9, classes)}
    return nn.Sequential(OrderedDict(layers))


def classifier(model: nn.Module | None = None, *, lr: float = 0.01, **options: Any) -> PyTorchClassifier:
    """An ART classifier of digits on the CPU, with an optimizer."""
    torch.manual_seed(0)
    model = small_network() if model is None else model
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": (1, 8, 8),
        "nb_classes": 10,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
        **options,
    }
    if "optimizer" not in settings:
        settings["optimizer"] = torch.optim.Adam(model.parameters(), lr=lr)
    return PyTorchClassifier(model=model, **settings)
