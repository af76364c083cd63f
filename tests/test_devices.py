"""
What a GPU would be asked to do, without one.

On torch's meta device tensors have shapes and no values: whatever waits for a value, copies one to the host, makes a shape
of one or mixes devices is an error there. What it cannot show is a kernel that itself waits.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from art_saliency.augmentation import Augmentation
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.base import LossTerms, Objective
from art_saliency.methods.fsr import insert_fsr
from art_saliency.networks import NETWORKS, build_network
from art_saliency.randomness import RandomSource
from art_saliency.training.averaging import ExponentialAverage
from art_saliency.training.awp import WeightPerturbation
from art_saliency.training.batches import ResidentBatches, StreamedBatches
from art_saliency.training.engine import Engine
from art_saliency.training.extensions import Extension
from art_saliency.training.loop import train
from art_saliency.training.selection import LabelSmoothing
from tests.method_settings import ROWS, small_network

META = torch.device("meta")
STEPS = 3


class EnoughStepsError(Exception):
    """Raised after the steps that are looked at: the end of an epoch reads its figures."""


class Counted(Extension):
    steps = 0

    def after_step(self, run):
        self.steps = run.step
        if run.step == STEPS:
            raise EnoughStepsError


@pytest.fixture(autouse=True)
def _meta_device(monkeypatch):
    """Give the meta device what it lacks: a generator (nothing is drawn from it) and autocast."""
    start = RandomSource.__init__

    def on_host(self, seed, device="cpu", **options):
        start(self, seed, "cpu", **options)
        self.device = torch.device(device)

    monkeypatch.setattr(RandomSource, "__init__", on_host)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class Operations(TorchDispatchMode):
    """The names of all operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


UNREPEATABLE = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "max_unpool2d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "grid_sampler_2d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "nll_loss2d_forward",
    "median",
    "nanmedian",
    "histc",
    "bincount",
    "put",
    "put_",
}
"""What torch.use_deterministic_algorithms says that it refuses on a GPU, as far as a network of images may come to it."""


def steps(objective: Objective, *, fsr: bool = False, maps: bool = False, **options) -> int:
    """:return: How many were done. A deterministic run on a GPU would refuse none of their operations."""
    model, x = small_network(norm=True), torch.rand(4, 1, 8, 8)
    if fsr:
        insert_fsr(model, "features", 10, x, hidden=8)
    if hasattr(objective, "guided_layers"):
        objective.guided_layers(model, x)  # once in a run: a look at a forward pass
    model = model.to(META)
    batches = ResidentBatches(
        torch.empty(8 * STEPS, 1, 8, 8, dtype=torch.uint8, device=META),
        torch.empty(8 * STEPS, dtype=torch.long, device=META),
        batch_size=4,
        device=META,
        augment=Augmentation(),
        maps=torch.empty(8 * STEPS, 1, 8, 8, device=META) if maps else None,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    counted = Counted()
    extensions = [*options.pop("extensions", ()), counted]
    with Operations() as seen, pytest.raises(EnoughStepsError):
        train(
            model,
            objective,
            optimizer,
            batches,
            epochs=1,
            engine=Engine(META),
            seed=0,
            grad_clip=1.0,
            extensions=extensions,
        )
    assert not seen.names & UNREPEATABLE
    return counted.steps


def objective_of(name: str, **changes) -> Objective:
    kind = OBJECTIVES[name]
    return kind(**{k: v for k, v in {**ROWS[name].settings, **changes}.items() if k in kind.parameter_names()})


@pytest.mark.parametrize("fsr", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_for_no_value_and_mixes_no_devices(name, fsr):
    objective = objective_of(name)
    assert steps(objective, fsr=fsr) == STEPS
    if getattr(objective, "needs_maps", False):
        assert steps(objective, fsr=fsr, maps=True) == STEPS


VARIANTS = [
    *((name, {"norm": "L2"}) for name, kind in OBJECTIVES.items() if "norm" in kind.parameter_names()),
    ("adv-gsct", {"form": "finite-difference", "rho": 0.2}),
    ("j-sigr", {"form": "finite-difference"}),
    ("j-sigr", {"projections": None, "jacobian": "added", "directions": "sphere", "penalty": "squared"}),
    ("aalp", {"guide": "random", "branches": "both", "probability": 0.5}),
    ("aalp", {"branches": "separate", "weighting": "constant"}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_nor_does_a_method_set_otherwise(name, changes):
    objective = objective_of(name, **changes)
    assert steps(objective, maps=getattr(objective, "needs_maps", False)) == STEPS


EXTENSIONS = {
    "ema": lambda: ExponentialAverage(0.9),
    "awp": lambda: WeightPerturbation(0.005),
    "label smoothing": lambda: LabelSmoothing(0.1, 10),
}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("fsr", [False, True])
def test_nor_does_what_surrounds_a_step(extension, fsr):
    assert steps(objective_of("pgd-at"), fsr=fsr, extensions=[EXTENSIONS[extension]()]) == STEPS


class Waiting(Objective):
    name = "waiting"

    def __init__(self, wait):
        super().__init__()
        self.wait = wait

    def forward(self, model, batch):
        logits = model(batch.x)
        loss = nn.functional.cross_entropy(logits, batch.y)
        return LossTerms(loss * self.wait(loss.detach()), logits)


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        pytest.param(lambda loss: loss.item(), "cannot be called on meta tensors", id="item"),
        pytest.param(lambda loss: 1 if loss > 0 else 2, "cannot be called on meta tensors", id="branch"),
        pytest.param(lambda loss: loss.cpu(), "Cannot copy out of meta tensor", id="copy"),
        pytest.param(lambda loss: loss.repeat(3) * torch.ones(3), "expected device meta", id="other device"),
        pytest.param(lambda loss: loss.repeat(3)[loss.repeat(3) > 0].sum(), "nonzero", id="shape"),
    ],
)
def test_that_would_be_seen(wait, said):
    with pytest.raises(RuntimeError, match=said):
        steps(Waiting(wait))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_deterministic_run_on_a_gpu_would_refuse_no_operation_of_our_networks(name):
    model = build_network(name, num_classes=10, input_shape=(3, 32, 32), width=1).to(META)
    with Operations() as seen:
        model(torch.empty(2, 3, 32, 32, device=META)).sum().backward()
    assert not seen.names & UNREPEATABLE


@pytest.mark.parametrize(
    ("refused", "layer"),
    [
        ("_adaptive_avg_pool2d_backward", nn.AdaptiveAvgPool2d(3)),
        ("upsample_bilinear2d_backward", nn.Upsample(scale_factor=2, mode="bilinear")),
    ],
)
def test_it_would_be_seen(refused, layer):
    with Operations() as seen:
        layer(torch.empty(2, 3, 8, 8, device=META, requires_grad=True)).sum().backward()
    assert seen.names & UNREPEATABLE == {refused}


class FromDevice(TorchDispatchMode):
    """Copies to the host, which of the meta device there are none: whether each is waited for."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._to_copy.default or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        self.waited.append(not kwargs.get("non_blocking", False))
        return torch.zeros_like(args[0], device=kwargs["device"])


def test_what_a_loader_has_on_a_device_is_waited_for_by_a_network_on_the_host():
    """A copy from a GPU that nobody waits for is read before it is there."""
    pair = torch.empty(4, 1, 8, 8, device=META), torch.empty(4, dtype=torch.long, device=META)
    batches = StreamedBatches(lambda: iter([pair]), lambda x, y: (x, y), steps_per_epoch=1, device=torch.device("cpu"))
    with FromDevice() as copies:
        (batch,) = batches.epoch(RandomSource(0))
    assert batch.x.device == batch.y.device == torch.device("cpu")
    assert copies.waited == [True, True]
