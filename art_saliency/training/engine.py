"""Where and how precisely a run computes: Lightning Fabric under a plain loop."""

from __future__ import annotations

import atexit
import gc
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency import _checks
from art_saliency.randomness import global_generators_kept

__all__ = ["PRECISIONS", "Engine", "launched", "reproducible"]

PRECISIONS = ("32-true", "bf16-mixed")
"""float32 throughout, or bfloat16 where autocast allows it; Lightning's names."""


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_APART = 1_000_003  # between the seeds of two processes, whose dropout is not to be the same


def launched() -> tuple[int, int]:
    """:return: This process's rank and how many processes a launcher (``--devices N``, ``torchrun``) started; (0, 1) without one."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _slow_in_bfloat16() -> bool:
    """:return: Whether torch's kernels for this processor know no bfloat16: what stands in for them took ten times as long as float32."""
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, unused-ignore]
    return bool(known and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Engine:
    """
    Device, precision and strategy of a run.

    One process needs nothing of Fabric, whose wrapping costs a hook a forward pass, and does not import it. Several, which a launcher
    started, share every batch: each computes its rows, and DDP averages the gradients. It never starts processes itself.

    :param device: Where the network lies.
    :param precision: ``"32-true"``, or ``"bf16-mixed"`` for first-order passes.
    """

    def __init__(self, device: torch.device | str, *, precision: str = "32-true") -> None:
        self.device = torch.device(device)
        self.precision = _checks.one_of("precision", precision, PRECISIONS)
        if self.precision != "32-true" and self.device.type == "cpu" and _slow_in_bfloat16():
            kind = torch.backends.cpu.get_cpu_capability()
            warnings.warn(
                f"precision: got {precision!r} on a processor without bfloat16 ({kind}), where a step takes several times as long "
                "as in float32; say '32-true'",
                stacklevel=2,
            )
        self.rank, self.world_size = launched()
        self.plain = self.world_size == 1
        if self.plain:
            return
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        here = int(os.environ["LOCAL_WORLD_SIZE"])
        # Sending buffers before every forward pass would change BatchNorm's under a step's earlier passes.
        known = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else every rank announces itself
        buffers: dict[str, Any] = {name: False}
        strategy = DDPStrategy(**buffers)
        self.fabric = Fabric(
            accelerator={"cuda": "gpu", "cpu": "cpu", "mps": "mps"}.get(self.device.type, "auto"),
            devices=here,
            num_nodes=self.world_size // here,
            strategy=strategy,
            precision="32-true",
        )
        self.fabric.launch()
        atexit.unregister(_part)
        atexit.register(_part)  # gloo's threads would end a process that leaves them running by SIGABRT

    def setup(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """:return: The network and optimizer that the loop is to call."""
        if self.plain:
            return model, optimizer
        wrapped: tuple[nn.Module, Any] = self.fabric.setup(model, optimizer, move_to_device=False)
        if self.device.type == "cpu" and self.world_size > 2:
            for module in wrapped[0].modules():
                if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                    module.register_comm_hook(None, lambda _, bucket: _mean_in_order(bucket.buffer(), self.world_size))
        return wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """
        The precision of the passes inside. It is torch's own context, entered around the objective: Fabric's wrapper of the network
        refuses the input gradients that every attack takes.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32-true")

    def backward(self, loss: Tensor) -> None:
        """The step's one ordinary backward pass."""
        if self.plain:
            torch.autograd.backward(loss)
        else:
            self.fabric.backward(loss)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Average a tensor over the processes, in place; alone, it is the average. :return: It."""
        if not self.plain:
            torch.distributed.all_reduce(values)
            values /= self.world_size
        return values

    def figures_of_all(self, figures: dict[str, float]) -> dict[str, float]:
        """:return: The means of an epoch's figures over the processes, which had equally many images each."""
        if self.plain:
            return figures
        values = self.mean_over_ranks(torch.tensor(list(figures.values()), dtype=torch.float64, device=self.device))
        return dict(zip(figures, values.tolist(), strict=True))

    def share_buffers(self, *networks: nn.Module) -> None:
        """Average what is not trained (BatchNorm's statistics) over the processes, so that all hold one network."""
        if not self.plain:
            for buffer in {id(b): b for network in networks for b in network.buffers()}.values():
                if buffer.is_floating_point():
                    self.mean_over_ranks(buffer)

    def greatest_of_all(self, numbers: Sequence[int]) -> list[int]:
        """
        Let the processes agree between two steps, on the host: the device's queue of work is not waited for.

        :return: Of each number, the greatest that any process brings.
        """
        if self.plain:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._host_group)
        return [int(value) for value in values]

    def of_first(self, value: Any) -> Any:
        """:return: Rank 0's value, tensors (on the CPU) and plain values, in every process."""
        if self.plain:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def gathered(self, value: Any) -> list[Any] | None:
        """:return: On rank 0 every process's value by rank, elsewhere ``None``."""
        if self.plain:
            return [value]
        found = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, found, dst=0, group=self._host_group)
        return found

    @cached_property
    def _host_group(self) -> Any:
        """The processes, connected through their hosts: what they tell each other must not wait for a GPU."""
        if torch.distributed.get_backend() == "gloo":
            return None
        return torch.distributed.new_group(backend="gloo")

    def any_of_all(self, flag: bool) -> bool:
        """:return: Whether any process says yes: all must end a run together."""
        return flag if self.plain else float(self.mean_over_ranks(torch.tensor([float(flag)], device=self.device))) > 0


def _mean_in_order(values: Tensor, world_size: int) -> torch.futures.Future[Tensor]:
    """
    The mean over the processes, summed in the order of their ranks.

    The order in which a ring sums depends on a value's place among the others, which DDP changes after its first step: of more than
    two processes a run that goes on would differ in the last bit. (Two numbers have one sum.)
    """
    parts = [torch.empty_like(values) for _ in range(world_size)]
    torch.distributed.all_gather(parts, values)
    total = parts[0]
    for part in parts[1:]:
        total += part
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(total / world_size)
    return mean


def _part() -> None:
    gc.collect()  # of a run that an error ended
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def reproducible(seed: int, *, rank: int = 0, deterministic: bool) -> Iterator[None]:
    """
    Seed every global generator for the duration: torch's (dropout draws from them), NumPy's and Python's (ART's attacks and data
    generators do). The user's own sequences are untouched. As they are the whole process's, other threads wait.

    :param rank: Of several processes: each has dropout of its own, while data generators shuffle alike in all.
    :param deterministic: Whether torch refuses kernels whose result varies from run to run.
    """
    with global_generators_kept(seed + _APART * rank, host_seed=seed), _kernels(deterministic):
        yield


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    try:
        if deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS reads this when it starts
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
