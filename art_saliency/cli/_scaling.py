"""``art-saliency bench --scaling``: what methods would cost on ImageNet, on paper."""

from __future__ import annotations

import copy
from collections.abc import Mapping

__all__ = ["METHODS", "counts", "table"]

METHODS = "standard,fgsm-rs,pgd-at:max_iter=3,pgd-at,trades,mart,alp,adv-gsct,j-sigr,aalp,fsr+pgd-at"
"""What is counted where ``--methods`` says nothing."""

_GPUS, _EPOCHS = (1, 8, 64), (100, 30)


def counts(methods: str, *, network: str, side: int, eps: float, max_iter: int) -> dict[str, tuple[float, bool]]:
    """
    Count, on this CPU, what a step of each method takes.

    :param methods: As for ``bench``. :param network: Its name. :param side: Of the images.
    :return: By method, forward-backward passes, and whether it differentiates input gradients.
    """
    import torch

    from art_saliency import _checks
    from art_saliency.methods.base import Batch
    from art_saliency.networks import build_network
    from art_saliency.trainers.arms import parse_arms
    from art_saliency.trainers.methods import TRAINERS
    from art_saliency.trainers.runs import make_classifier
    from art_saliency.training.cost import forward_backward_passes

    arms = parse_arms("--methods", methods, options=(), common=())
    for arm in arms:
        if arm.network:
            remedy = f"leave @{arm.network['activation']} out: it hardly changes what is counted"
            raise _checks.refuse("--methods", repr(arm.name), f"methods alone: {network} is counted as it is", remedy)
    shape = (3, side, side)
    torch.manual_seed(0)
    plain = build_network(network, num_classes=1000, input_shape=shape)
    batch = Batch(torch.rand(2, *shape), torch.arange(2))
    found = {}
    for arm in arms:
        model = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        classifier = make_classifier(model, input_shape=shape, num_classes=1000, optimizer=optimizer)
        kind, parameters = TRAINERS[arm.trainer], {"eps": eps, **arm.parameters}
        if "max_iter" in kind.all_parameter_names(arm.parameters):
            parameters.setdefault("max_iter", max_iter)
        objective = kind(classifier, **parameters).objective
        passes = forward_backward_passes(classifier.model, objective, batch, plain=plain)
        found[arm.name] = (passes, objective.double_backward)
    return found


def table(found: Mapping[str, tuple[float, bool]]) -> str:
    """:param found: What :func:`counts` gives. :return: One line a method, Markdown."""
    from art_saliency.evaluation.table import markdown_table
    from art_saliency.training.scaling import Job, gpu_hours

    header = ["method", "arithmetic", "passes"]
    header += [f"{epochs} epochs, {gpus} GPU{'s' * (gpus > 1)}" for epochs in _EPOCHS for gpus in _GPUS]
    header += ["in steps, 64 GPUs", "cores a GPU"]
    rows = []
    for name, (passes, double_backward) in found.items():
        passes = round(passes, 2)  # as printed, so that a reader can compute the row from it
        costs = {
            (epochs, gpus): gpu_hours(passes, double_backward=double_backward, gpus=gpus, job=Job(epochs))
            for epochs in _EPOCHS
            for gpus in _GPUS
        }
        hours = [f"{cost.gpu_hours:.0f}" for cost in costs.values()]
        last = costs[_EPOCHS[0], _GPUS[-1]]
        arithmetic = "TF32" if double_backward else "bf16"
        rows.append((name, arithmetic, f"{passes:.2f}", *hours, f"{last.computing:.0%}", f"{last.cores:.1f}"))
    return markdown_table(header, rows, left=2)
