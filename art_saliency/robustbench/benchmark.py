"""RobustBench's ``benchmark``: what it is asked to run, and its numbers beside those that a bundle states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from art_saliency.evaluation.accuracy import binomial_interval
from art_saliency.robustbench.evidence import spread
from art_saliency.robustbench.statement import stated_records

__all__ = ["BATCH_SIZE", "compared", "wanted_benchmark"]

BATCH_SIZE = 32
"""RobustBench's own: what its maintainers run. AutoAttack's result depends on it, and on the seed."""


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


def compared(seen: dict[str, Any], report: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    RobustBench's numbers against the stated ones.

    Exactly, when the evaluation was made with RobustBench's batch size; else within the 95 % interval of the count, and within
    the spread over seeds where there are several. (Bits depend on the machine too: on another one an image at the boundary may
    fall to the other side, and the evaluation has to be repeated there.)

    :param seen: What :func:`art_saliency.robustbench.fresh.answer` found. :param report: The bundle's ``evaluation.json``, without problems.
    :return: Both, side by side, and what does not agree.
    """
    record, count = report["stated"], seen["count"]
    clean, robust = (round(record[name] * count) for name in ("clean_accuracy", "robust_accuracy"))
    exact = record["batch_size"] == BATCH_SIZE
    low, high = binomial_interval(robust, count)
    if (
        over := spread(stated_records(report))
    ) is not None:  # of its evaluations: what it says of itself proves nothing
        low, high = max(low, over["low"]), min(high, over["high"])
    share, wrong = seen["robust"] / count, []
    if seen["data_sha256"] != record["data_sha256"]:
        wrong.append("benchmark: these are not the images and labels of the evaluation")
    if seen["clean"] != clean:
        wrong.append(
            f"benchmark: RobustBench counts {seen['clean']} of {count} clean images as correct, expected {clean}"
        )
    if exact and seen["robust"] != robust:
        wrong.append(
            f"benchmark: RobustBench finds {seen['robust']} of {count} images robust, expected {robust} exactly"
        )
    if not exact and not low - 1e-9 <= share <= high + 1e-9:
        wrong.append(f"benchmark: RobustBench finds {share:.2%} robust, expected {low:.2%} to {high:.2%}")
    if seen.get("rescored", robust) != robust:
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
