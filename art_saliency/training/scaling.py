"""
What a run on ImageNet would cost, on paper: counted operations, a processor's peak, and shares of it that are assumed.

Nothing here was timed on a GPU. ``art-saliency bench --scaling`` counts anew and prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DECODED_PER_SECOND",
    "Cost",
    "Job",
    "Machine",
    "gpu_hours",
]

DECODED_PER_SECOND = 400
"""
Pictures of 500 x 375 pixels (89 kB of JPEG) that one core of an AMD EPYC server decodes, crops at random and resizes to
224 x 224: 441 were measured, 362 with the central crop.
"""


@dataclass(frozen=True)
class Machine:
    """
    GPUs and what connects them. The defaults are the vendor's figures for an H100 SXM, without sparsity, in nodes of eight.

    :ivar first_order: Peak operations a second in bfloat16, in which methods without second derivatives may run.
    :ivar second_order: Peak in TF32, in which methods that differentiate input gradients run from end to end.
    :ivar share: Of the peak that convolutions reach. *Assumed.*
    :ivar within: Bytes a second and direction between the GPUs of a node (NVLink). :ivar between: Between nodes, a GPU (400 Gb/s).
    :ivar link_share: Of these that an all-reduce reaches. *Assumed.*
    :ivar node: GPUs a node.
    """

    first_order: float = 989e12
    second_order: float = 494.5e12
    share: float = 0.1
    within: float = 450e9
    between: float = 50e9
    link_share: float = 0.5
    node: int = 8


@dataclass(frozen=True)
class Job:
    """
    A run. The defaults are a ResNet-50's on ImageNet-1k.

    :ivar epochs: Passes over the images. :ivar images: Of the training set.
    :ivar operations: Of one forward-backward pass of one image: 4.09 G multiply-adds forward, times 2 operations, times 3 for backward, less
        the first layer's input gradient; counted by :func:`~art_saliency.training.cost.step_operations`.
    :ivar parameters: Whose float32 gradients are averaged over the GPUs every step: 102 MB. :ivar batch: Images a step and GPU.
    :ivar held_out: Images validated after every epoch, on every GPU, in TF32. :ivar validation: What PGD-10 and a clean pass cost
        an image, in forward-backward passes: ten attack passes of 0.673 and two forward ones of 1/3.
    """

    epochs: int
    images: int = 1_281_167
    operations: float = 24.3e9
    parameters: int = 25_557_032
    batch: int = 128
    held_out: int = 5000
    validation: float = 7.4


@dataclass(frozen=True)
class Cost:
    """
    What a run costs.

    :ivar gpu_hours: Of all GPUs together. :ivar hours: Until it is over.
    :ivar computing: Share of the steps' own passes in it. :ivar reducing: Of averaging gradients. :ivar validating: Of validation.
    :ivar cores: That decode pictures for one GPU, so that it does not wait.
    """

    gpu_hours: float
    hours: float
    computing: float
    reducing: float
    validating: float
    cores: float


def gpu_hours(
    passes: float,
    *,
    double_backward: bool,
    gpus: int,
    job: Job,
    machine: Machine | None = None,
    decoded: float = DECODED_PER_SECOND,
) -> Cost:
    """
    GPU-hours = G (S (b p f / r + 2 (G - 1) / G 4 P / w) + E V v f / r2) / 3600, with S = E I / (b G) steps.

    G GPUs, E epochs of I images, b images a step and GPU, p passes of f operations, r operations a second, P parameters of 4 bytes over a
    ring of w bytes a second, hidden behind nothing; V images validated at v passes each, on every GPU at r2, TF32's rate.

    :param passes: p, of one step of the method, as :func:`~art_saliency.training.cost.forward_backward_passes` counts. :param double_backward: Whether r is TF32's.
    :param gpus: G. :param job: E, I, f, P, b, V, v. :param machine: r, w; ``None`` is :class:`Machine`'s.
    :param decoded: Pictures that a core decodes a second.
    """
    machine = Machine() if machine is None else machine
    slow = machine.share * machine.second_order
    rate = slow if double_backward else machine.share * machine.first_order
    link = machine.link_share * (machine.within if gpus <= machine.node else machine.between)
    steps = job.epochs * job.images / (job.batch * gpus)
    computing = steps * job.batch * passes * job.operations / rate
    reducing = steps * 2 * (gpus - 1) / gpus * 4 * job.parameters / link
    validating = job.epochs * job.held_out * job.validation * job.operations / slow
    seconds = computing + reducing + validating
    return Cost(
        gpu_hours=gpus * seconds / 3600,
        hours=seconds / 3600,
        computing=computing / seconds,
        reducing=reducing / seconds,
        validating=validating / seconds,
        cores=rate / (passes * job.operations) / decoded,
    )
