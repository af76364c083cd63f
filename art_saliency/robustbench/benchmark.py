"""RobustBench's ``benchmark``: what it is asked to run, and its numbers beside those that a bundle states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.robustbench.statement import stated_records

__all__ = ["BATCH_SIZE", "compared", "wanted_benchmark"]

BATCH_SIZE = 32
"""RobustBench's own: what its maintainers run. AutoAttack's result depends on it, and on the seed."""

_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; for more, the last is a little too much."""

_FEW = 3
"""Images that fall to either side by another rounding, of which seeds that happen to agree say nothing."""


def wanted_benchmark(
    record: dict[str, Any], preprocessing: str | None, images: str | Path | None, data_dir: str | Path, device: str
) -> dict[str, Any]:
    """
    What the fresh process is asked for.

    :param record: Of the evaluation that is stated: its count, radius and seed are asked for, and RobustBench's batch size.
    :param preprocessing: Of ImageNet pictures. :param images: Arrays to take them from; ``None`` leaves it to RobustBench.
    :param data_dir: Where RobustBench keeps its data sets. :param device: On which to run.
    """
    return {
        "count": record["count"],
        "eps": record["eps"],
        "seed": record["seed"],
        "batch_size": BATCH_SIZE,
        "device": device,
        "data_dir": str(Path(data_dir).resolve()),
        "images": None if images is None else str(Path(images).resolve()),
        "preprocessing": preprocessing,
    }


def compared(seen: dict[str, Any], report: dict[str, Any], device: str) -> tuple[dict[str, Any], list[str]]:
    """
    RobustBench's numbers against the stated ones.

    Exactly, when the evaluation was made with RobustBench's batch size and both on a CPU; else within what :func:`_allowed` says: a
    GPU draws other random numbers, and rounds otherwise, which may turn a few images at the boundary also where nothing is drawn.
    (Bits depend on the processor too: on another one an image at the boundary may fall to the other side, and the evaluation has to
    be repeated there.)

    :param seen: What :func:`art_saliency.robustbench.fresh.answer` found. :param report: The bundle's ``evaluation.json``, without problems.
    :param device: On which RobustBench ran.
    :return: Both, side by side, and what does not agree.
    """
    record, count = report["stated"], seen["count"]
    clean, robust = (round(record[name] * count) for name in ("clean_accuracy", "robust_accuracy"))
    on_cpus = record["device"].startswith("cpu") and device.startswith("cpu")
    exact, few = on_cpus and record["batch_size"] == BATCH_SIZE, 0 if on_cpus else _FEW
    low, high = _allowed(report, robust, count)
    share, wrong = seen["robust"] / count, []
    if seen["data_sha256"] != record["data_sha256"]:
        wrong.append("benchmark: these are not the images and labels of the evaluation")
    if abs(seen["clean"] - clean) > few:
        wrong.append(
            f"benchmark: RobustBench counts {seen['clean']} of {count} clean images as correct, expected {clean}"
        )
    if exact and seen["robust"] != robust:
        wrong.append(
            f"benchmark: RobustBench finds {seen['robust']} of {count} images robust, expected {robust} exactly"
        )
    if not exact and not low - 1e-9 <= share <= high + 1e-9:
        wrong.append(f"benchmark: RobustBench finds {share:.2%} robust, expected {low:.2%} to {high:.2%}")
    if abs(seen.get("rescored", robust) - robust) > few:
        wrong.append(f"x_adv.pt: {seen['rescored']} of its images are classified correctly, expected {robust}")
    if seen.get("distance", 0) > record["eps"] + 1e-6:
        wrong.append(f"x_adv.pt: images are up to {seen['distance']:g} from the clean ones (eps {record['eps']:g})")
    found = {
        "clean_accuracy": seen["clean"] / count,
        "robust_accuracy": share,
        "stated_clean_accuracy": record["clean_accuracy"],
        "stated_robust_accuracy": record["robust_accuracy"],
        "count": count,
        "seed": record["seed"],
        "exact": exact,
        "allowed": [robust / count] * 2 if exact else [low, high],
        "same_images": seen["data_sha256"] == record["data_sha256"],
    }
    return found, wrong


def _allowed(report: Mapping[str, Any], robust: int, count: int) -> tuple[float, float]:
    """
    Where an honest evaluation's number may lie when it is made again with other random draws.

    Within the 95 % interval of the count, though that is too wide: the images are the same ones. Where there are several seeds,
    also within their 95 % prediction interval for one draw more, mean +- t s sqrt(1 + 1/k), and a few images: the least and
    the greatest of k seeds are no bounds, for a new one lies outside of them in 2 of k + 1 cases.

    :return: The ends, 0 to 1.
    """
    low, high = binomial_interval(robust, count)
    values = [evidence.record["robust_accuracy"] for evidence in stated_records(report)]
    seeds = len(values)
    if seeds > 1:  # of its evaluations: what it says of their spread proves nothing
        mean = sum(values) / seeds
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (seeds - 1))
        half = _STUDENT[min(seeds - 1, len(_STUDENT)) - 1] * deviation * math.sqrt(1 + 1 / seeds) + _FEW / count
        low, high = max(low, mean - half), min(high, mean + half)
    return low, high
