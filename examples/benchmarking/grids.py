"""What is run: for each data set one network, one budget and one schedule for every arm, the controls included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency.methods.adapter import insert_adapter
from art_saliency.methods.fsr import fsr_layers, insert_fsr
from art_saliency.modes import evaluating
from art_saliency.trainers.arms import Arm, parse_arm
from art_saliency.trainers.methods import TRAINERS

__all__ = [
    "ADV_GSCT_FORMS",
    "ADV_GSCT_TRIED",
    "GRIDS",
    "HEADLINE_ARMS",
    "J_SIGR_FORMS",
    "J_SIGR_TRIED",
    "METHODS",
    "Contestant",
    "Grid",
    "contestant",
]

Prepare = Callable[[nn.Module, Tensor], object]
"""(network, images (2, C, H, W) in [0, 1]): changes a fresh network."""


@dataclass(frozen=True)
class Contestant:
    """
    One arm, or a control that no command line can name.

    :ivar name: In files and tables. :ivar arm: How it is trained. :ivar prepare: What is done to the fresh network.
    """

    name: str
    arm: Arm
    prepare: Prepare | None = None


@dataclass(frozen=True)
class Grid:
    """
    One data set, one network, one budget.

    :ivar title: What tables call it. :ivar data: Of the command line's ``--data``; "" must be given, as a file.
    :ivar of_file: How many training and test images of a given file are the data set, the first ones; a longer file serves as well.
    :ivar data_sha256: Of these very images and labels (``DataSet.fingerprint``): a row of a table is of nothing else.
    :ivar network: Arguments of ``build_network`` beside the data's own. :ivar train_images: The first so many; ``None`` is all.
    :ivar images: Test images for AutoAttack, the first ones. :ivar arms: What is trained.
    :ivar parameters: Of every method that takes them. :ivar options: Of every run. :ivar seeds: How many, from 0.
    :ivar headline_seeds: How many for :data:`HEADLINE_ARMS`, where these have more than the others.
    :ivar held_out: The share of the training images that is judged in place of the test images, on which nothing may be tuned.
    :ivar audited: Test images of the audit, for seed 0. :ivar hidden: Width of the FSR layer and of its control.
    """

    title: str
    data: str
    data_sha256: str
    network: dict[str, Any]
    eps: float
    epochs: int
    batch_size: int
    lr: float
    images: int
    arms: tuple[str, ...]
    seeds: int
    audited: int
    hidden: int
    headline_seeds: int = 0
    held_out: float = 0.0
    of_file: tuple[int, int] | None = None
    train_images: int | None = None
    augment: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def seeds_of(self, arm: str) -> range:
        """:return: The seeds that an arm is run with."""
        return range(max(self.seeds, self.headline_seeds) if arm in HEADLINE_ARMS else self.seeds)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """:return: Every arm and seed, the seeds one after another, as runs of one seed share their surrogates."""
        most = max(self.seeds, self.headline_seeds)
        return [(arm, seed) for seed in range(most) for arm in self.arms if seed in self.seeds_of(arm)]


def _last_stage(model: nn.Module) -> str:
    return str(model.stages[-1])


def _adapter(grid: Grid) -> Prepare:
    """F + R(f), as many parameters as the FSR layer: what a gain must exceed to be FSR's."""
    return lambda model, x: insert_adapter(model, _last_stage(model), x, fsr_hidden=grid.hidden)


def _noiseless(grid: Grid) -> Prepare:
    """An FSR layer whose masks are those of eval mode in training too."""

    def prepare(model: nn.Module, x: Tensor) -> None:
        with evaluating(model), torch.no_grad():
            classes = model(x).shape[1]
        insert_fsr(model, _last_stage(model), classes, x, hidden=grid.hidden)
        for layer in fsr_layers(model).values():
            layer.noiseless = True

    return prepare


_CONTROLS: dict[str, tuple[str, Callable[[Grid], Prepare]]] = {
    "adapter+pgd-at": ("pgd-at", _adapter),
    "adapter+trades": ("trades", _adapter),
    "adapter+adv-gsct": ("adv-gsct", _adapter),
    "fsr+pgd-at without noise": ("pgd-at", _noiseless),
}


def contestant(name: str, grid: Grid) -> Contestant:
    """:return: The arm of that name; FSR's layers get the grid's width, and parameters and precision go to all that take them."""
    text, control = _CONTROLS.get(name, (name, None))
    if text.startswith("fsr+") and "hidden=" not in text:
        method, at, activation = text.partition("@")
        text = f"{method}:hidden={grid.hidden}{at}{activation}"
    plain = parse_arm(text)
    objective = TRAINERS[plain.trainer].objective_for(plain.parameters)
    taken = objective.parameter_names()
    parameters = {**{k: v for k, v in grid.parameters.items() if k in taken}, **plain.parameters}
    options = {**grid.options, **plain.options}
    if objective.double_backward:
        options.pop("precision", None)  # input gradients are differentiated in float32 alone
    arm = Arm(name, plain.method, plain.trainer, parameters, plain.network, options)
    return Contestant(name, arm, None if control is None else control(grid))


METHODS = (
    "standard",
    "fgsm-rs",
    "pgd-at",
    "trades",
    "mart",
    "alp",
    "adv-gsct",
    "j-sigr@silu",
    "aalp",
    "fsr+pgd-at",
    "fsr+trades",
)
HEADLINE_ARMS = (
    *METHODS,
    "fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1",
    "adapter+pgd-at",
    "fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1",
    "adapter+adv-gsct",
)
"""What the headline claims are of. How many seeds they get is declared before these are run, never by what they give."""
_FSR_WEAKER = ("fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1", "fsr+pgd-at:aux_warmup_share=1")
ADV_GSCT_FORMS = (
    "adv-gsct:consensus=0",
    "adv-gsct:prediction_consensus=0",
    "adv-gsct:consensus=0:prediction_consensus=0",
    "adv-gsct:rho=0",
    "adv-gsct:offending=random-start",
)
"""Adv-GSCT without each of its parts: controls on test images."""
ADV_GSCT_TRIED = (
    "adv-gsct:offending=random-start:prediction_consensus=3:rho=0.3",
    "adv-gsct:offending=random-start",
    "adv-gsct:prediction_consensus=3",
    "adv-gsct:rho=0.3",
    "adv-gsct:rho=0",
)
"""Adv-GSCT's forms on held-out images; the first is what its defaults were."""
J_SIGR_FORMS = (
    "j-sigr:selective_on=loss@silu",
    "j-sigr:lambda_s=0@silu",
    "j-sigr:lambda_j=2@silu",
    "j-sigr:linearise_at=random-point@silu",
    "j-sigr:linearise_at=image@silu",
    "j-sigr:jacobian=added:linearise_at=image@silu",
)
"""J-SIGR without each of its parts, or with another: controls on test images."""
J_SIGR_TRIED = (
    "j-sigr:lambda_s=0.1@silu",
    "j-sigr:lambda_s=0@silu",
    "j-sigr:selective_on=loss@silu",
    "j-sigr:lambda_j=2:selective_on=loss@silu",
    "j-sigr:lambda_j=3:selective_on=loss@silu",
    "j-sigr:linearise_at=random-point:selective_on=loss@silu",
    "j-sigr:lambda_j=2:linearise_at=random-point:selective_on=loss@silu",
    "j-sigr:linearise_at=image:selective_on=loss@silu",
    "j-sigr:jacobian=added:linearise_at=random-point:selective_on=loss@silu",
    "j-sigr:jacobian=added:linearise_at=image:selective_on=loss@silu",
    "j-sigr:jacobian=added:linearise_at=image:lambda_j=0.5:selective_on=loss@silu",
    "j-sigr:jacobian=added:linearise_at=image:directions=sphere:lambda_j=0.3:selective_on=loss@silu",
)
"""J-SIGR's forms on held-out images; where and how the Jacobian enters was tried before the selective term took its rows."""
_CONTROL_ARMS = (
    "adapter+pgd-at",
    *_FSR_WEAKER,
    "fsr+pgd-at:lambda_sep=0:lambda_rec=0",
    "fsr+pgd-at without noise",
    *ADV_GSCT_FORMS,
    "adv-gsct:form=finite-difference:consensus=0.1",
    "j-sigr",
    *J_SIGR_FORMS,
    "pgd-at@silu",
    "aalp:rate=0",
    "aalp:weighting=constant",
    "aalp:guide=random",
    "alp:clean_weight=0",
)
_CONTROL_OF_EACH = (
    "pgd-at@silu",
    "adapter+pgd-at",
    "adv-gsct:consensus=0",
    "adv-gsct:offending=random-start",
    "aalp:rate=0",
    "j-sigr:selective_on=loss@silu",
)
_COMBINATIONS = (
    "fsr+adv-gsct",
    "fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1",
    "adapter+adv-gsct",
    "fsr+aalp",
    "pgd-at:ema=0.99:awp=0.005",
    "trades:ema=0.99:awp=0.005",
    "aalp:ema=0.99:awp=0.005",
    "fsr+pgd-at:ema=0.99:awp=0.005",
)
_DIGITS: dict[str, Any] = {
    "data": "digits",
    "data_sha256": "d6ba04f0e6087678e1865a32e66574b0384b8973b1bf1ba3cdc9c7792726e957",
    "network": {"name": "small-cnn", "activation": "relu", "width": 16},
    "eps": 0.2,
    "epochs": 30,
    "batch_size": 128,
    "lr": 0.01,
    "hidden": 16,
}
_MNIST: dict[str, Any] = {
    "data": "",
    "of_file": (14_000, 10_000),
    "data_sha256": "693f7ac6308a9b43dbd7636f8c45479735e84d6b21f6e3a4c2f0981721ddcd01",
    "network": {"name": "mnist-cnn", "activation": "relu", "width": 16},
    "epochs": 6,
    "batch_size": 64,
    "lr": 0.01,
    "images": 100,
    "seeds": 3,
    "audited": 100,
    "hidden": 16,
    "train_images": 8000,
    "parameters": {"eps_warmup_share": 0.3, "max_iter": 7},
}

GRIDS: dict[str, Grid] = {
    "digits": Grid(
        title="digits, Linf 0.2, small CNN of width 16",
        images=360,
        arms=(*METHODS, *_CONTROL_ARMS, *_COMBINATIONS),
        seeds=5,
        headline_seeds=8,
        audited=100,
        **_DIGITS,
    ),
    "digits-held-out": Grid(
        title="digits, a fifth of the training images held out and judged in place of the test images, Linf 0.2, small CNN of width 16",
        images=287,
        arms=(
            "pgd-at",
            "fsr+pgd-at",
            "fsr+pgd-at:aux_warmup_share=0.5",
            "fsr+pgd-at:aux_warmup_share=1",
            "fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1",
            "adv-gsct",
            *ADV_GSCT_TRIED,
            "j-sigr@silu",
            *J_SIGR_TRIED,
        ),
        seeds=3,
        audited=0,
        held_out=0.2,
        **_DIGITS,
    ),
    "mnist-0.2": Grid(
        title="MNIST (8,000 training images), Linf 0.2, small CNN of width 16, stride 2",
        eps=0.2,
        arms=(*METHODS, *_CONTROL_OF_EACH, *_FSR_WEAKER, "j-sigr:lambda_j=2@silu"),
        headline_seeds=5,
        **_MNIST,
    ),
    "mnist-0.3": Grid(
        title="MNIST (8,000 training images), Linf 0.3, small CNN of width 16, stride 2",
        eps=0.3,
        arms=(*METHODS, *_CONTROL_OF_EACH, _FSR_WEAKER[0]),
        headline_seeds=5,
        **_MNIST,
    ),
    "cifar10-jpeg-10k": Grid(
        title="JPEG-75 CIFAR-10, 10,000 training images, Linf 8/255, ResNet-18 of width 16, 5 epochs",
        data="",
        of_file=(10_000, 1_000),
        data_sha256="41fbdd84131c578e793d35a81a009e4a1df7ff6252cada497d36b412778c27c5",
        network={"name": "resnet18", "activation": "relu", "width": 16},
        eps=8 / 255,
        epochs=5,
        batch_size=128,
        lr=0.01,
        images=100,
        arms=(*METHODS, *_CONTROL_OF_EACH, _FSR_WEAKER[0]),
        seeds=1,
        audited=100,
        hidden=16,
        train_images=10_000,
        augment="crop-flip",
        parameters={"eps_warmup_share": 0.2, "max_iter": 5},
        options={"precision": "bf16-mixed", "channels_last": True},
    ),
    "cifar10-jpeg": Grid(  # for a GPU: days of a CPU
        title="JPEG-75 CIFAR-10, Linf 8/255, ResNet-18, 15 epochs",
        data="",
        of_file=(50_000, 10_000),
        data_sha256="508418fcfee0f15d3d4a910e85f50d8ed6c06393312e60c553da8865a24bb776",
        network={"name": "resnet18", "activation": "relu", "width": 64},
        eps=8 / 255,
        epochs=15,
        batch_size=128,
        lr=0.01,
        images=1000,
        arms=(
            *METHODS,
            *_CONTROL_OF_EACH,
            _FSR_WEAKER[0],
            *(f"{arm}:ema=0.999:awp=0.005" for arm in ("pgd-at", "aalp", "adv-gsct")),
        ),
        seeds=1,
        headline_seeds=3,
        audited=200,
        hidden=64,
        augment="crop-flip",
        options={"precision": "bf16-mixed", "channels_last": True},
    ),
}
"""By name. A grid without data of its own is given a file: ``--data mnist.npz``."""
