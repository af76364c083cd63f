"""
Saliency measured: one report of maps and metrics.

The maps live in :mod:`art_saliency.evaluation.saliency_maps`, the metrics in :mod:`art_saliency.evaluation.saliency_metrics`, the
model randomisation in :mod:`art_saliency.evaluation.saliency_sanity`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.evaluation._inputs import pixels, placed
from art_saliency.evaluation.saliency_maps import SaliencyMap, named_maps
from art_saliency.evaluation.saliency_metrics import (
    consensus,
    deletion_auc,
    edge_alignment,
    etmann_alignment,
    gini,
    insertion_auc,
    max_sensitivity,
    rank_correlation,
    top_mass,
    top_overlap,
)
from art_saliency.evaluation.saliency_sanity import Randomisation, model_randomisation
from art_saliency.modes import evaluating

__all__ = ["METRICS", "SaliencyReport", "map_metrics", "mean_and_error", "saliency_report"]

METRICS = {
    "consensus": "cosine of the signed maps of the clean and the adversarial image; 1 is the same map",
    "rank_consensus": "rank correlation of their importance",
    "top_overlap": "intersection over union of their most important pixels; for a tenth of them 0.05 by chance",
    "gini": "sparseness; 0 is an even map, near 1 one of few pixels",
    "top_mass": "the part of all importance that the most important pixels hold; for a tenth of them 0.1 is an even map",
    "edge_alignment": "rank correlation of importance and the image's Sobel edges",
    "confidence": "the class's probability on the whole image, which insertion and deletion scale with",
    "insertion": "area under the class's probability as important pixels are made sharp; high is good",
    "deletion": "area under the class's probability as important pixels are deleted; low is good",
    "etmann_alignment": "|<x, g>| / ||g|| of the margin of the two highest logits, in pixel units",
    "sensitivity": "furthest relative change of the map under tiny noise; low is good",
    "randomised": "rank correlation with the map of a network with random weights; near 0 is good",
}
"""The metrics of a report, in plain words. All but the first three are of the clean images."""


def mean_and_error(values: Tensor) -> dict[str, Any]:
    """
    Mean, standard error and count of the numbers that are defined.

    :param values: (N,), NaN where there is no answer.
    :return: ``mean`` (``None`` without any), ``standard_error`` (``None`` below two), ``count`` and ``undefined``, JSON-able.
    """
    defined = values[values.isfinite()].double()
    count = len(defined)
    return {
        "mean": float(defined.mean()) if count else None,
        "standard_error": float(defined.std()) / math.sqrt(count) if count > 1 else None,
        "count": count,
        "undefined": len(values) - count,
    }


@dataclass(frozen=True, eq=False)
class SaliencyReport:
    """
    One kind of map of one network, measured.

    :ivar map: Its name. :ivar values: For each name of :data:`METRICS`, (N,) on the CPU, NaN where there is no answer: a map
        that is zero everywhere has none. :ivar randomisation: The whole cascade, on the CPU.
    :ivar settings: All that the numbers depend on besides network and images.
    """

    map: str
    values: dict[str, Tensor] = field(repr=False)
    randomisation: Randomisation = field(repr=False)
    settings: dict[str, Any]

    @property
    def count(self) -> int:
        """:return: How many images."""
        return len(self.values["gini"])

    def to_json(self) -> dict[str, Any]:
        """:return: Mean, standard error and count of every metric, its meaning, the cascade's means, and the settings."""
        rows = zip(self.randomisation.layers, self.randomisation.similarity, strict=True)
        return {
            "map": self.map,
            "images": self.count,
            "metrics": {name: {**mean_and_error(v), "meaning": METRICS[name]} for name, v in self.values.items()},
            "randomisation": [{"layer": layer, **mean_and_error(row)} for layer, row in rows],
            "settings": self.settings,
        }


def map_metrics(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    adversarial: Tensor,
    *,
    share: float = 0.1,
    steps: int = 20,
) -> dict[str, Tensor]:
    """
    The metrics that take no further maps: all of :data:`METRICS` but the sensitivity and the randomisation.

    :param model: Maps (N, C, H, W) in [0, 1] to logits. :param x: (N, C, H, W), clean. :param y: (N,) the class explained.
    :param clean: Maps of `x`. :param adversarial: Maps of their adversarial versions.
    :param share: Of the pixels that are the most important ones. :param steps: Of the insertion and deletion curves.
    :return: (N,) by name.
    """
    with evaluating(model), torch.no_grad():
        confidence = model(x).softmax(1).gather(1, y[:, None])[:, 0]
    return {
        "consensus": consensus(clean, adversarial),
        "rank_consensus": rank_correlation(clean, adversarial),
        "top_overlap": top_overlap(clean, adversarial, share),
        "gini": gini(clean),
        "top_mass": top_mass(clean, share),
        "edge_alignment": edge_alignment(clean, x),
        "confidence": confidence,
        "insertion": insertion_auc(model, x, y, clean, steps=steps),
        "deletion": deletion_auc(model, x, y, clean, steps=steps),
        "etmann_alignment": etmann_alignment(model, x),
    }


def _measure(
    model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, saliency_map: SaliencyMap, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], Randomisation]:
    """:return: Every metric of one chunk of images, and the cascade."""
    clean, adversarial = saliency_map(model, x, y), saliency_map(model, x_adv, y)
    values = map_metrics(model, x, y, clean, adversarial, share=settings["share"], steps=settings["steps"])
    moves = {name: settings[name] for name in ("radius", "samples", "seed", "batch_size")}
    values["sensitivity"] = max_sensitivity(model, x, y, saliency_map, **moves)
    cascade = model_randomisation(model, x, y, saliency_map, stages=settings["stages"], seed=settings["seed"])
    values["randomised"] = cascade.similarity[-1]
    return values, cascade


def _prepared(model: nn.Module, x: Any, y: Any, x_adv: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Check images and labels, and bring them to the network's device and type."""
    x, y = placed(model, x, y)
    x_adv = _checks.images(x_adv, name="x_adv", shape=tuple(x.shape[1:]), allow_uint8=True)
    if len(x_adv) != len(x):
        raise _checks.refuse("x_adv", f"{len(x_adv)} images", f"{len(x)}, one for each of x")
    return x, y, pixels(_checks.bytes_of_pixels("x_adv", x_adv), x)


def saliency_report(
    model: nn.Module,
    x: Any,
    y: Any,
    x_adv: Any,
    *,
    saliency_map: str | SaliencyMap = "loss-gradient",
    share: float = 0.1,
    steps: int = 20,
    radius: float = 0.02,
    samples: int = 10,
    stages: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> SaliencyReport:
    """
    Measure one kind of map on clean images and their adversarial versions. The network is left as it was.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K); explained in eval mode.
    :param x: (N, C, H, W) in [0, 1] or uint8, array or tensor on any device. :param x_adv: Likewise.
    :param y: (N,) class indices or one-hot rows: the class explained, in both images. Usually the true one.
    :param saliency_map: A name of :func:`named_maps`, or a function.
    :param share: Of the pixels that are the most important ones, above 0 and at most 1.
    :param steps: Of the insertion and deletion curves.
    :param radius: Of the moves of the sensitivity, in pixel units of [0, 1]. :param samples: How many of them.
    :param stages: Of the cascading randomisation; ``None`` is one a layer.
    :param seed: Of everything random: the moves, the random weights, SmoothGrad's noise.
    :param batch_size: Images at once. No number depends on it beyond rounding.
    :return: The report.
    """
    settings: dict[str, Any] = {
        "share": _checks.real("share", share, above=0, most=1),
        "steps": _checks.whole("steps", steps, least=1),
        "radius": _checks.real("radius", radius, above=0, most=1),
        "samples": _checks.whole("samples", samples, least=1),
        "stages": stages if stages is None else _checks.whole("stages", stages, least=1),
        "seed": _checks.seed(seed),
        "batch_size": _checks.whole("batch_size", batch_size, least=1),
    }
    known = named_maps(settings["seed"])
    explain = saliency_map if callable(saliency_map) else known[_checks.one_of("saliency_map", saliency_map, known)]
    name = saliency_map if isinstance(saliency_map, str) else getattr(explain, "__name__", type(explain).__name__)
    x, y, x_adv = _prepared(model, x, y, x_adv)
    rows: int = settings["batch_size"]
    parts = [
        _measure(model, *chunk, explain, settings)
        for chunk in zip(x.split(rows), y.split(rows), x_adv.split(rows), strict=True)
    ]
    values = {metric: torch.cat([part[0][metric] for part in parts]).cpu() for metric in METRICS}
    similarity = torch.cat([part[1].similarity for part in parts], dim=1).cpu()
    return SaliencyReport(name, values, Randomisation(parts[0][1].layers, similarity), settings)
