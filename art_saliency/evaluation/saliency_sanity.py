"""
The sanity check of saliency maps: does a map still look the same when its network has forgotten what it learned?

Quantus 0.6.0 has this test (``MPRT``) and was tried. It is not used: it leaves the network in train mode (with dropout the
unchanged network scored 0.04 to 0.6 instead of 1), leaves torch's global generator reseeded, seeds every layer alike, so that
layers of one shape get the very same weights, goes by the order in which layers were registered, and leaves out parameters whose
module has no ``reset_parameters``. Where none of this matters the two agree, which a test shows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.evaluation.saliency_maps import SaliencyMap
from art_saliency.evaluation.saliency_metrics import rank_correlation
from art_saliency.randomness import global_generators_kept

__all__ = ["Randomisation", "model_randomisation"]

_APART = 1_000_003  # a network built from the same seed would get its first weights back, which training may have barely left


@dataclass(frozen=True, eq=False)
class Randomisation:
    """
    How a map changes while its network forgets what it learned.

    :ivar layers: The layer each row was taken after, from the logits down; the first row's is ``""``: nothing was randomised.
    :ivar similarity: (rows, N) rank correlation with the map of the trained network.
    """

    layers: tuple[str, ...]
    similarity: Tensor


def _layers_from_the_logits_down(model: nn.Module, x: Tensor) -> list[str]:
    """:return: Names of the modules that hold parameters, the last one to run first; those that are not called come last."""
    own = {
        name: child for name, child in model.named_modules() if next(child.parameters(recurse=False), None) is not None
    }
    called: list[str] = []
    hooks = [child.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, child in own.items()]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    order = list(dict.fromkeys(called))
    return [*reversed(order), *(name for name in own if name not in order)]


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Draw a module's own parameters anew, on the CPU, so that every device gets the same ones."""
    device = next(module.parameters(recurse=False)).device
    module.cpu()
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    else:  # no rule of its own: normal numbers as large as the trained ones
        for parameter in module.parameters(recurse=False):
            parameter.copy_(parameter.square().mean().sqrt() * torch.randn_like(parameter))
    module.to(device)


def model_randomisation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    saliency_map: SaliencyMap,
    *,
    stages: int | None = None,
    seed: int = 0,
) -> Randomisation:
    """
    The sanity check of Adebayo et al. (2018): cascading randomisation of the layers of a copy, from the logits down.

    A map that stays like that of the trained network explains the image, not the network: near 0 is good, near 1 is not.

    :param stages: How many points of the cascade are measured, evenly spread, the last one with every layer randomised;
        ``None`` is one a layer.
    :param seed: Of the new parameters.
    :return: The similarities. The other parameters are those of :func:`max_sensitivity`.
    """
    seed = _checks.seed(seed)
    original = saliency_map(model, x, y)
    with global_generators_kept():
        forgetful = copy.deepcopy(model).eval()
        layers = _layers_from_the_logits_down(forgetful, x)
        if not layers:
            raise _checks.refuse("model", "a network without parameters", "layers that can be randomised")
        wanted = len(layers) if stages is None else min(len(layers), _checks.whole("stages", stages, least=1))
        measured = {round(k * len(layers) / wanted) for k in range(1, wanted + 1)}
        names, rows = [""], [rank_correlation(original, saliency_map(forgetful, x, y))]
        torch.manual_seed(seed + _APART)
        for number, name in enumerate(layers, start=1):
            _randomise(forgetful.get_submodule(name))
            if number in measured:
                names.append(name)
                rows.append(rank_correlation(original, saliency_map(forgetful, x, y)))
    return Randomisation(tuple(names), torch.stack(rows))
