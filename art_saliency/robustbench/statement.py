"""``evaluation.json``: what a bundle states of the network's accuracy, written and read in one place. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from art_saliency.files import sha256_of_tensors
from art_saliency.robustbench.bundle import SCHEMA
from art_saliency.robustbench.evidence import (
    Evidence,
    autoattack_log,
    differences,
    fractions,
    is_standard,
    partial_note,
    record_problems,
    spread,
)
from art_saliency.robustbench.model_info import board, eps_text, percent_text

__all__ = ["stated_records", "statement", "statement_problems"]


def statement(evidence: Sequence[Evidence], weights_sha256: str) -> dict[str, Any]:
    """
    Write down what is stated.

    :param evidence: At least one evaluation; the first is stated. :param weights_sha256: Of the weights that are published.
    :return: JSON.
    """
    stated = evidence[0]
    return {
        "schema": SCHEMA,
        "exported_weights_sha256": weights_sha256,
        "data": stated.data,
        "stated": stated.record,
        "over_seeds": spread(evidence),
        "others": [other.record for other in evidence[1:]],
        "x_adv_sha256": None if stated.x_adv is None else sha256_of_tensors({"x_adv": stated.x_adv}),
    }


def stated_records(report: Mapping[str, Any]) -> list[Evidence]:
    """:return: The evaluations of a statement without problems, the stated one first."""
    return [Evidence(record) for record in (report["stated"], *report["others"])]


def statement_problems(
    report: Any,
    page: Mapping[str, Any],
    info: Mapping[str, Any],
    images: Mapping[str, Tensor] | None,
    log: str | None,
) -> list[str]:
    """
    What is wrong with a statement, everything at once.

    :param report: The JSON, read. :param page: ``bundle.json``. :param info: The ``model_info`` page.
    :param images: What ``x_adv.pt`` holds; ``None`` when there is none that can be read.
    :param log: What ``autoattack.log`` holds; ``None`` when there is none.
    """
    records = _records(report)
    for record in records:
        if not isinstance(record, dict) or (wrong := record_problems(record)):
            names = f" ({', '.join(wrong)})" if isinstance(record, dict) else ""
            return [f"evaluation.json holds no evaluation that can be read{names}"]
    found = [problem for record in records for problem in _off_the_board(record, page, info)]
    found += _disagreements(report, page, info)
    if log is not None and log != autoattack_log(stated_records(report)):
        found.append("autoattack.log says something else than the evaluations of evaluation.json do; export again")
    return list(dict.fromkeys(found)) + _image_problems(report, images)


def _records(report: Any) -> list[Any]:
    """:return: Whatever stands where the evaluations should."""
    if not isinstance(report, dict):
        return [None]
    others = report.get("others")
    return [report.get("stated"), *(others if isinstance(others, list) else [None])]


def _off_the_board(record: Mapping[str, Any], page: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    """What keeps an evaluation from being one of these weights for this leaderboard."""
    if record["weights_sha256"] not in page["also_known_as"]:
        yield f"evaluation.json has an evaluation of the weights {record['weights_sha256'][:12]}..., which are not the bundle's"
    if record["norm"] != page["threat_model"]:
        yield f"evaluation.json is for {record['norm']}, expected {page['threat_model']}"
    if not is_standard(record):
        yield "evaluation.json is not of AutoAttack's standard version, the only one that a leaderboard takes"
    if info.get("eps") != eps_text(record["eps"]):
        yield f"model_info has 'eps': {info.get('eps')!r}, expected {eps_text(record['eps'])!r}, which evaluation.json says"
    if record["robust_accuracy"] > record["clean_accuracy"]:
        yield "evaluation.json has a robust accuracy above the clean one"
    if broken := fractions(record):
        yield f"evaluation.json has a {broken} of {record['count']} images that is of no whole number of them"


def _disagreements(report: Mapping[str, Any], page: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    """Where the statement is at odds with itself, with the weights or with ``model_info``."""
    if report.get("exported_weights_sha256") != page["weights_sha256"]:
        yield "evaluation.json is of other weights than the bundle's"
    for name, value in (("clean_acc", "clean_accuracy"), ("autoattack_acc", "robust_accuracy")):
        expected = percent_text(report["stated"][value])
        if info.get(name) != expected:
            yield f"model_info has {name!r}: {info.get(name)!r}, expected {expected!r}, which evaluation.json says"
    images = board(page["dataset"], page["threat_model"]).images
    if report["stated"]["count"] > images:
        yield f"evaluation.json counts {report['stated']['count']} images, expected {images} at most"
    if not str(info.get("footnote") or "").endswith(note := partial_note(report["stated"], images)):
        yield f"model_info has 'footnote': {info.get('footnote')!r}, expected one that ends with {note!r}"
    evidence = stated_records(report)
    if got := differences([one.record for one in evidence]):
        yield f"evaluation.json holds {got}, expected evaluations that differ in their seed alone"
    if report.get("over_seeds") != spread(evidence):
        yield f"evaluation.json states another spread over seeds than its evaluations have, which is {spread(evidence)}"


def _image_problems(report: Mapping[str, Any], images: Mapping[str, Tensor] | None) -> list[str]:
    sha256, count = report.get("x_adv_sha256"), report["stated"]["count"]
    if images is None:
        return (
            []
            if sha256 is None
            else ["x_adv.pt: no adversarial images that can be read, though evaluation.json has them"]
        )
    if len(images["x_adv"]) != count:
        return [f"x_adv.pt holds {len(images['x_adv'])} images, expected the {count} that were evaluated"]
    same = sha256 == sha256_of_tensors(images)
    return (
        [] if same else ["x_adv.pt holds other images than those of evaluation.json (their hash differs); export again"]
    )
