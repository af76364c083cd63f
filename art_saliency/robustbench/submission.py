"""The two pages that a human sends: the pull request's entry, and the filled 'New Model' issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from art_saliency._version import __version__
from art_saliency.robustbench.evidence import interval_of
from art_saliency.robustbench.model_info import as_options, board, eps_text, unfilled
from art_saliency.robustbench.writing import Architecture, identifier

__all__ = ["TO_FILL_IN", "entry", "submission"]

TO_FILL_IN = "**(to be filled in)**"
"""Stands where a human has said nothing yet."""

_UPLOAD = (
    "Once it is on Google Drive, export again with --gdrive-id and --force: an edit would break the bundle's sums."
)


def entry(
    name: str,
    dataset: str,
    threat_model: str,
    architecture: Architecture,
    preprocessing: str | None,
    gdrive_id: str | None = None,
) -> str:
    """
    ``model_zoo_entry.py``: what the pull request adds to ``robustbench/model_zoo/<dataset>.py``.

    :param preprocessing: Of ImageNet pictures, one of :data:`~art_saliency.robustbench.model_info.PREPROCESSINGS`.
    :param gdrive_id: Of the weights on Google Drive; ``None`` when they are not there yet.
    :return: Python code that defines ``ENTRY``.
    """
    lines, factory = architecture.definition
    home = f"robustbench/model_zoo/architectures/{identifier(name)}.py"
    copied = f"\n\narchitecture.py, beside this file, goes to {home}." if architecture.code else ""
    extra = f', "preprocessing": "{preprocessing}"' if preprocessing else ""
    later = f"\n\ngdrive_id is that of {name}.pt. {_UPLOAD}" if gdrive_id is None else ""
    known = "None" if gdrive_id is None else f'"{gdrive_id}"'
    return (
        f'"""\nThe entry of {name}, for the OrderedDict of ThreatModel.{threat_model} in robustbench/model_zoo/{dataset}.py.{copied}{later}'
        f'\n"""\n\n{lines}\n'
        f'ENTRY = ("{name}", {{"model": {factory}, "gdrive_id": {known}{extra}}})\n'
    )


def submission(
    info: Mapping[str, Any],
    *,
    name: str,
    threat_model: str,
    architecture: Architecture,
    human: Mapping[str, Any],
    stated: Mapping[str, Any] | None,
    seeds: Mapping[str, Any] | None,
) -> str:
    """
    ``SUBMISSION.md``: RobustBench's issue form, filled with what is known.

    :param info: The ``model_info`` page. :param human: ``license``, ``code_url``, ``checkpoint_url``, ``gdrive_id``; what is unknown is missing or ``None``.
    :param stated: The record of the evaluation; ``None`` when there was none. :param seeds: Its spread over seeds.
    """

    def shown(value: Any) -> str:
        return TO_FILL_IN if value in (None, "") else str(value)

    place = board(str(info["dataset"]), threat_model)
    full = stated is not None and stated["count"] >= place.images
    mine = "a class of RobustBench's own" if architecture.code is None else "in `architecture.py`"
    data = {True: "yes", False: "no", None: TO_FILL_IN}[info["additional_data"]]
    rows = [
        ("Paper title", info["name"]),
        ("Paper URL (a public paper, arXiv say, is mandatory)", info["link"]),
        ("Paper authors", info["authors"]),
        ("Venue", info["venue"]),
        ("Data set", info["dataset"]),
        ("Architecture", f"{shown(info['architecture'])} ({mine})"),
        ("Threat model", threat_model),
        ("eps", info["eps"] or "none: common corruptions"),
        ("Clean accuracy, %", info["clean_acc"]),
        ("Robust accuracy, %", info.get("autoattack_acc", info.get("corruptions_acc"))),
        ("Robust accuracy that the paper reports, %", info["reported"]),
        ("Additional data", data),
        ("Evaluation method", _evaluation(stated, seeds)),
        ("Checkpoint", human.get("checkpoint_url")),
        ("Code", human.get("code_url")),
        ("License", human.get("license")),
    ]
    table = "\n".join(f"- **{label}**: {shown(value)}" for label, value in rows)
    missing = as_options(unfilled(info, human))
    warnings = [f"- still to be filled in, by exporting again with --force: {missing}"] if missing else []
    if not human.get("gdrive_id"):
        warnings.append(f"- {name}.pt is not uploaded yet. {_UPLOAD}")
    radius = place.eps[threat_model]
    if radius is not None and info["eps"] != eps_text(radius):
        warnings.append(f"- for eps {info['eps']}: the leaderboard is for {eps_text(radius)} alone")
    if stated is not None and not full:
        warnings.append(
            f"- evaluated on {stated['count']} of {place.images} images: the leaderboard takes the whole set only"
        )
    if stated is not None:
        warnings += [f"- AutoAttack warned: {warning}" for warning in stated["warnings"]]
    before = "\n".join(["\n## Before it is sent\n", *warnings]) + "\n" if warnings else ""
    return (
        f"# [New Model] {name}\n\nOpen an issue with this title and the label `new-model` at "
        f"https://github.com/RobustBench/robustbench/issues (form 'New Model'); the pull request adds what "
        f"`model_zoo_entry.py` says, and `model_info/`.\n{before}\n## The form\n\n{table}\n\n"
        f"- [{'x' if human.get('checkpoint_url') else ' '}] add it to the Model Zoo\n"
        f"- [{' ' if architecture.code else 'x'}] the architecture is in RobustBench already\n"
        f"- [{'x' if human.get('license') == 'MIT' else ' '}] the weights may be shared under the MIT license\n\n"
        f"Weights: `models/{info['dataset']}/{threat_model}/{name}.pt`, tensors only. Made with art_saliency {__version__}.\n"
    )


def _evaluation(stated: Mapping[str, Any] | None, seeds: Mapping[str, Any] | None) -> str | None:
    """:return: What was run, with its count, interval, seed and spread, in one line."""
    if stated is None:
        return None
    low, high = interval_of(stated)
    over = (
        f"; over the seeds {', '.join(map(str, seeds['seeds']))} it was {seeds['low']:.2%} to {seeds['high']:.2%}"
        if seeds
        else "; spread over seeds not measured"
    )
    return (
        f"AutoAttack, version {stated['version']} ({stated['backend']} {stated['backend_version']}), on {stated['count']} test "
        f"images: 95 % interval {low:.2%} to {high:.2%}; seed {stated['seed']}, batch size {stated['batch_size']}{over}"
    )
