"""
What a training step of this package costs beside what it could cost: ``art-saliency bench``. Ratios, never seconds alone.

How it is measured, what counts as ideal, and what was tried: ``art_saliency/bench.md``.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from art_saliency import _checks
from art_saliency.randomness import global_generators_kept
from art_saliency.trainers._contestants import Contestants, Setting
from art_saliency.trainers._timing import Spread, exact_memory, interleaved, matrix_turn, per_round
from art_saliency.trainers.arms import Arm
from art_saliency.training.records import versions

__all__ = ["RATIOS", "Benchmark", "Figures", "Setting", "Spread", "benchmark"]

RATIOS = {
    "loop/ideal": "a step of our trainer over its ideal: the objective's own passes on a resident batch, and the optimizer's step",
    "loop/bare": "a step of our trainer over the same passes written by hand, with nothing around them",
    "plain/loop": "a plain float32 torch loop over ours",
    "art/loop": "ART's own trainer, as it comes, over ours",
    "art-full/loop": "ART's own trainer, its attack's batch size set to ours, over ours",
    "loop/pgd-at": "a step of our trainer over that of PGD-AT",
    "fsr/base": "a step with FSR over that of the same method without it",
    "end/step": "the end of an epoch (finite weights copied, figures read, a single-step method watched) in steps",
    "rate": "share of the rate of one large matrix product, in the arithmetic of its convolutions, that a step reaches",
}
"""What the ratios are, by name; each is taken within a round."""


@dataclass(frozen=True)
class Figures:
    """
    What was measured of one method.

    :ivar precision: In which it was. :ivar ratios: By the names of :data:`RATIOS`; one that does not apply is not there.
    :ivar images_per_second: Of our trainer. :ivar extra_bytes: Peak memory of our trainer beyond that of the ideal.
    :ivar operations: Floating-point operations of a step. :ivar seconds: A step, every round, by contestant.
    """

    precision: str
    ratios: dict[str, Spread]
    images_per_second: Spread
    extra_bytes: int | None
    operations: int
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class Benchmark:
    """
    What :func:`benchmark` found.

    :ivar setting: What all had in common. :ivar methods: By the arms' names. :ivar matrix_seconds: A matrix product, every round, by the arithmetic of the methods beside it.
    :ivar meta: Versions, processor or GPU, threads.
    """

    setting: Setting
    methods: dict[str, Figures]
    matrix_seconds: dict[str, list[float]]
    meta: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """:return: Everything, as plain values."""
        methods = {name: asdict(figures) for name, figures in self.methods.items()}
        setting = {**asdict(self.setting), "network": dict(self.setting.network)}
        return {**self.meta, "setting": setting, "matrix_seconds": self.matrix_seconds, "methods": methods}


def benchmark(
    arms: Sequence[Arm], setting: Setting, *, progress: Callable[[int, int], object] | None = None
) -> Benchmark:
    """
    Measure the training step of methods beside its ideal, loops by hand, ART's own trainers, and each other.

    All contestants take turns in this process, in an order that changes every round; each ratio is taken within a round. The random
    states of torch and NumPy come back as they were; nothing is written.

    :param arms: The methods, each under a name of its own. :param setting: What they have in common.
    :param progress: Called after every turn with how many are over, and how many there are.
    :return: Ratios with their spread, memory, and every time that was taken.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise _checks.refuse("methods", ", ".join(names) or "none", "at least one, each once")
    device = torch.device(setting.device)
    with tempfile.TemporaryDirectory() as folder, global_generators_kept(setting.seed):
        x, y = _images(setting)
        with exact_memory():
            methods = {arm.name: Contestants(arm, setting, x, y, Path(folder)) for arm in arms}
            extra = {name: method.extra_memory() for name, method in methods.items()}
        # A method that differentiates input gradients keeps to float32 beside others in half precision.
        used = {
            method.arithmetic: matrix_turn(device, method.precision, full=method.trainer.objective.full_float32)
            for method in methods.values()
        }
        groups = {name: method.turns() for name, method in methods.items()}
        total, done = (setting.rounds + 1) * (len(used) + sum(map(len, groups.values()))), 0

        def one_more() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        seconds = interleaved(
            {**groups, _MATRIX: {arithmetic: turn for arithmetic, (turn, _) in used.items()}},
            rounds=setting.rounds,
            seed=setting.seed,
            progress=one_more,
        )
        matrix_seconds = seconds.pop(_MATRIX)
        rates = {
            arithmetic: [operations / took for took in matrix_seconds[arithmetic]]
            for arithmetic, (_, operations) in used.items()
        }
        figures = {
            name: _figures(method, seconds, methods, rates[method.arithmetic], extra[name])
            for name, method in methods.items()
        }
    return Benchmark(setting, figures, matrix_seconds, _meta(device))


_MATRIX = "matrix product"


def _images(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and labels at random: what a step costs does not depend on what is learned. Whole batches, as bytes."""
    random = torch.Generator().manual_seed(setting.seed)
    count, shape = setting.steps * setting.batch_size, tuple(setting.network["input_shape"])
    x = torch.randint(256, (count, *shape), generator=random, dtype=torch.uint8)
    return x, torch.randint(setting.network["num_classes"], (count,), generator=random)


def _figures(
    method: Contestants,
    seconds: dict[str, dict[str, list[float]]],
    methods: dict[str, Contestants],
    rate: list[float],
    extra: int | None,
) -> Figures:
    own = seconds[method.arm.name]
    loop, operations = own["loop"], method.operations()
    pairs = {f"{name}/loop": (own[name], loop) for name in ("plain", "art", "art-full") if name in own}
    pairs |= {f"loop/{name}": (loop, own[name]) for name in ("ideal", "bare") if name in own}
    for other in methods.values():
        if other.base is None and other.name == "pgd-at" and other is not method:
            pairs["loop/pgd-at"] = (loop, seconds[other.arm.name]["loop"])
        if other.base is None and other.name == method.base:
            pairs["fsr/base"] = (loop, seconds[other.arm.name]["loop"])
    ratios = {name: per_round(*pair) for name, pair in pairs.items()}
    ratios["end/step"] = Spread.of(method.ends[-len(loop) :])
    ratios["rate"] = per_round([operations / took for took in loop], rate)
    return Figures(
        precision=method.precision,
        ratios={name: ratios[name] for name in RATIOS if name in ratios},
        images_per_second=Spread.of([method.setting.batch_size / took for took in loop]),
        extra_bytes=extra,
        operations=operations,
        seconds=own,
    )


def _meta(device: torch.device) -> dict[str, Any]:
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"chip": chip, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions()}


def _processor() -> str:
    """:return: The processor's name; Python's own call knows it on few systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
