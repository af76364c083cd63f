"""From a trained classifier to a bundle that RobustBench's own code loads."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency._version import __version__
from art_saliency.errors import UnsupportedModelError
from art_saliency.evaluation.autoattack import AutoAttackResult
from art_saliency.files import write_tensors
from art_saliency.modes import full_float32
from art_saliency.networks import own_logits
from art_saliency.robustbench.architecture import architectures_of
from art_saliency.robustbench.bundle import SCHEMA, Layout, check_place, sealed, write_json, write_text
from art_saliency.robustbench.deployable import Deployable, foreign_steps, taken_out
from art_saliency.robustbench.evidence import Evidence, autoattack_log, gather, partial_note, spread
from art_saliency.robustbench.model_info import (
    Board,
    board,
    eps_text,
    is_address,
    known_fields,
    percent_text,
    prepared_board,
    problems,
)
from art_saliency.robustbench.proof import TOLERANCE, check_installed, load_problems, make_job, prove
from art_saliency.robustbench.rules import Violation, key_violations, network_violations, probe_images, refusal
from art_saliency.robustbench.statement import statement
from art_saliency.robustbench.submission import entry, submission
from art_saliency.robustbench.user_source import UserSource
from art_saliency.robustbench.writing import Architecture
from art_saliency.threat import ThreatModel

__all__ = ["export_robustbench", "name_problem", "threat_of"]

Evaluations: TypeAlias = AutoAttackResult | str | Path | Sequence[AutoAttackResult | str | Path]


def export_robustbench(
    model: PyTorchClassifier | nn.Module,
    name: str,
    *,
    out: str | Path,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    eps: float | None = None,
    evaluation: Evaluations | None = None,
    source: str | None = None,
    architecture: str | None = None,
    preprocessing: str | None = None,
    paper_title: str | None = None,
    paper_url: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    reported: float | None = None,
    additional_data: bool | None = None,
    number_forward_passes: int = 1,
    footnote: str | None = None,
    license: str | None = None,
    code_url: str | None = None,
    checkpoint_url: str | None = None,
    gdrive_id: str | None = None,
    corruptions: Mapping[str, float] | None = None,
    force: bool = False,
) -> Path:
    """
    Write a bundle for a submission to RobustBench, and prove that RobustBench loads it.

    Everything that is wrong with the network is said at once, before anything is written. The proof: in a fresh process,
    RobustBench's own ``load_model`` loads the bundle, and its logits are the classifier's to 1e-6 of the largest. The bundle
    then appears as a whole. What only a human knows stays null and is listed in ``SUBMISSION.md`` where it is not given.

    :param model: A trained classifier, whose standardisation and ``clip_values`` are baked in; or a network that maps images
        in [0, 1] to logits. It is left as it is.
    :param name: ``AuthorYEARFirstwordoftitle``, ``"Doe2026Saliency"``, and a variant perhaps, ``"Doe2026Saliency_WRN-34-10"``.
    :param out: The folder of the bundle, which must not hold anything yet.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param threat_model: ``"Linf"``, ``"L2"`` (CIFAR-10 only) or ``"corruptions"``.
    :param eps: In units of [0, 1]; ``None`` takes the leaderboard's.
    :param evaluation: Of these weights: see :func:`~art_saliency.robustbench.evidence.gather`. ``None`` leaves accuracies null.
        RobustBench's ``benchmark`` returns its number exactly when it was made with ``batch_size=32``.
    :param source: ``"network.py:factory"``, for a network that is not this package's; the factory is called as by
        :func:`art_saliency.build_network`.
    :param architecture: What the leaderboard shows, ``"WideResNet-34-10"``; ``None`` takes what is known.
    :param preprocessing: For ImageNet, what RobustBench does to the pictures: one of its names, ``"Res256Crop224"``.
    :param paper_title: Of the paper that presents it. :param paper_url: Where all can read it: mandatory for RobustBench.
    :param authors: With commas, ``"Jane Doe, John Roe"``. :param venue: ``"ICML 2026"`` or ``"arXiv, Jan 2026"``.
    :param reported: The robust accuracy that the paper reports, 0 to 1.
    :param additional_data: Whether it was trained on other data than the set's.
    :param number_forward_passes: Of one classification. :param footnote: For the leaderboard.
    :param license: Of the weights. :param code_url: Of the training code. :param checkpoint_url: Where they can be fetched.
    :param gdrive_id: Of the weights on Google Drive, from where RobustBench fetches them.
    :param corruptions: For the threat model corruptions: ``{"clean_acc": 0.93, "corruptions_acc": 0.85}``, and for ImageNet the
        other fields of its ``model_info`` that begin with ``corruptions_``; 0 to 1, errors (``mce``) also above 1.
    :param force: Whether a bundle that is there may be replaced.
    :return: The folder.
    :raises InputError: When an argument, or the evaluation, does not fit; nothing is written.
    :raises UnsupportedModelError: When RobustBench would not accept the network, with all reasons.
    :raises CheckpointError: When it cannot be written.
    """
    target, place = Path(out), _place(name, dataset, threat_model, preprocessing)
    threat = threat_of(threat_model, eps, place)
    info = {
        "link": paper_url,
        "name": paper_title,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": None if threat is None else eps_text(threat.eps),
        "reported": None if reported is None else percent_text(_checks.real("reported", reported, least=0, most=1)),
        **({} if footnote is None else {"footnote": footnote}),
        **_corruptions(corruptions, dataset, threat_model),
    }
    for argument, address in (("paper_url", paper_url), ("code_url", code_url), ("checkpoint_url", checkpoint_url)):
        if address is not None and not is_address(address):
            raise _checks.refuse(argument, repr(address), "a web address, with nothing left out")
    if gdrive_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", gdrive_id):
        expected = "letters, digits, - and _: what stands between /d/ and /view in its address"
        raise _checks.refuse("gdrive_id", repr(gdrive_id), expected)
    _check_info(_completed(info, None, threat_model, place))
    user = None if source is None else _source(source, place)
    check_place(target, force=force)
    check_installed()
    plain = taken_out(model)
    _lint(foreign_steps(model), plain, place)
    reference = _reference(model, plain, place)
    evidence = _evidence(evaluation, plain, threat)
    human = {"code_url": code_url, "license": license, "checkpoint_url": checkpoint_url, "gdrive_id": gdrive_id}
    page = {
        "schema": SCHEMA,
        "name": name,
        "dataset": dataset,
        "threat_model": threat_model,
        "input_shape": list(place.input_shape),
        "num_classes": place.num_classes,
        "preprocessing": preprocessing,
        "weights_sha256": plain.sha256,
        "also_known_as": sorted(plain.also_known_as),
        "standardisation_baked_in": list(plain.normalised),
        "publication": human,
        "versions": {"art_saliency": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    choices = architectures_of(plain.network, name, imagenet=dataset == "imagenet", source=user, label=architecture)
    with sealed(target, force=force) as folder:
        layout = Layout(folder, name, dataset, threat_model)
        write_tensors(_made(layout.weights), plain.weights)
        write_tensors(layout.reference, reference)
        _write_evidence(layout, plain, evidence)
        for choice in choices:
            page["architecture"] = choice.kind
            filled = _completed({**info, "architecture": choice.label}, evidence, threat_model, place)
            _write_pages(layout, page, filled, choice, evidence, human)
            (answer,) = prove([make_job(folder, page)])
            if answer.get("taken"):
                raise _checks.refuse(
                    "name", f"{name!r}, which RobustBench has already", "a new one", "add a suffix: _v2"
                )
            if not (refused := load_problems(answer)):
                break
        else:
            raise UnsupportedModelError(f"the bundle: {'; '.join(refused)}; nothing was written")
    return target


def name_problem(name: object, dataset: str) -> str | None:
    """:return: What RobustBench has against a name; ``None`` when it has nothing."""
    if not isinstance(name, str) or not re.fullmatch(
        r"[A-Z][A-Za-z-]*[0-9]{4}[A-Z0-9][A-Za-z0-9-]*(_[A-Za-z0-9.-]+)*", name
    ):
        return "an author, a year and the first word of the title: 'Doe2026Saliency', 'Doe2026Saliency_WRN-34-10'"
    if "Kireev2021Effectiveness" in name or (dataset == "imagenet" and "Standard" in name):
        return "a name that RobustBench's loader does not treat in a way of its own"
    return None


def _place(name: str, dataset: str, threat_model: str, preprocessing: str | None) -> Board:
    """:return: The board, once name and preprocessing are known to suit it."""
    board(dataset, threat_model)
    if expected := name_problem(name, dataset):
        raise _checks.refuse("name", repr(name), expected)
    return prepared_board(dataset, threat_model, preprocessing)


def threat_of(threat_model: str, eps: float | None, place: Board) -> ThreatModel | None:
    """:param eps: ``None`` is the leaderboard's. :return: The threat model with its radius; ``None`` for corruptions."""
    standard = place.eps[threat_model]
    if standard is None:
        if eps is not None:
            raise _checks.refuse("eps", repr(eps), "None for corruptions")
        return None
    return ThreatModel(threat_model, standard if eps is None else _checks.real("eps", eps, above=0))


def _corruptions(results: Mapping[str, float] | None, dataset: str, threat_model: str) -> dict[str, str]:
    """:return: What was measured under corruptions, as ``model_info`` has it; none of it can be checked here."""
    if results is None:
        return {}
    if threat_model != "corruptions":
        raise _checks.refuse("corruptions", "results", f"None for {threat_model}", "threat_model='corruptions'")
    fields = [name for name in known_fields(dataset, threat_model)[0] if name.startswith(("clean_acc", "corruptions_"))]
    return {
        _checks.one_of("corruptions", name, fields): percent_text(
            _checks.real(name, share, least=0, most=None if "_mce" in name else 1)
        )
        for name, share in results.items()
    }


def _check_info(info: dict[str, Any]) -> None:
    """Refuse what a human said when RobustBench's fields do not take it."""
    threat_model = "corruptions" if "corruptions_acc" in info else "Linf"
    if wrong := problems(info, info["dataset"], threat_model):
        raise _checks.refuse("model_info", f"a page that {'; '.join(wrong)}", "what RobustBench's fields take")


def _source(text: str, place: Board) -> UserSource:
    path, colon, factory = str(text).rpartition(":")
    if not colon or not factory.isidentifier():
        raise _checks.refuse("source", repr(text), "a file and a function in it: 'network.py:factory'")
    options = {"num_classes": place.num_classes, "in_channels": place.input_shape[0]}
    return UserSource(Path(path), factory, options)


def _lint(steps: list[Violation], plain: Deployable, place: Board) -> None:
    """Refuse a network, with everything that is wrong with it and around it."""
    found = [*steps, *key_violations(plain.network.state_dict())]
    found += network_violations(plain.network, place.input_shape, place.num_classes)
    if found:
        raise refusal("model", found)


def _reference(model: PyTorchClassifier | nn.Module, plain: Deployable, place: Board) -> dict[str, Tensor]:
    """
    Images, and what the user's own classifier says of them.

    :raises UnsupportedModelError: When the copy that is to be published says something else.
    """
    x = probe_images(place.input_shape)
    with full_float32():  # TF32, a GPU's own, rounds as coarsely as a copy may differ
        logits = own_logits(model, x).float()
    with torch.no_grad():
        copied = plain.network(x).float()
    network = model.model if isinstance(model, PyTorchClassifier) else model
    at_home = all(parameter.device.type == "cpu" for parameter in network.parameters())
    limit = (TOLERANCE if at_home else 1e-3) * max(1.0, float(logits.abs().max()))
    if logits.shape != copied.shape or not float((logits - copied).abs().max()) <= limit:
        raise UnsupportedModelError(
            f"model: got logits from its copy that are not its own (expected {limit:.3g} apart at most); its copy loses what is "
            f"not in its modules and tensors"
        )
    # A GPU rounds otherwise: there, the copy on the CPU is what another CPU can be compared with.
    return {"x": x, "logits": (logits if at_home else copied).contiguous()}


def _evidence(evaluation: Evaluations | None, plain: Deployable, threat: ThreatModel | None) -> list[Evidence]:
    if evaluation is None:
        return []
    if threat is None:
        raise _checks.refuse("evaluation", "one", "None for corruptions", "AutoAttack does not measure them")
    return gather(evaluation, plain, threat)


def _completed(
    info: dict[str, Any], evidence: list[Evidence] | None, threat_model: str, place: Board
) -> dict[str, Any]:
    """:return: The ``model_info`` page, in RobustBench's order, accuracies from the evaluation or null."""
    needed, optional = known_fields(info["dataset"], threat_model)
    page = dict.fromkeys(needed) | info
    if evidence:
        record = evidence[0].record
        page["clean_acc"] = percent_text(record["clean_accuracy"])
        page["autoattack_acc"] = percent_text(record["robust_accuracy"])
        if note := partial_note(record, place.images):
            page["footnote"] = f"{page.get('footnote') or ''} {note}".strip()
    return {field: page[field] for field in (*needed, *optional) if field in page}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path


def _write_evidence(layout: Layout, plain: Deployable, evidence: list[Evidence]) -> None:
    """Write ``evaluation.json``, the log and the adversarial images, where there are any."""
    if not evidence:
        return
    write_json(layout.evaluation, statement(evidence, plain.sha256))
    write_text(layout.log, autoattack_log(evidence))
    if (x_adv := evidence[0].x_adv) is not None:
        write_tensors(layout.x_adv, {"x_adv": x_adv.contiguous()})


def _write_pages(
    layout: Layout,
    page: dict[str, Any],
    info: dict[str, Any],
    choice: Architecture,
    evidence: list[Evidence],
    human: dict[str, Any],
) -> None:
    """Write what depends on how the network is written down."""
    name, threat_model = layout.name, page["threat_model"]
    write_json(layout.bundle, page)
    write_json(layout.model_info, info)
    write_text(
        layout.entry, entry(name, page["dataset"], threat_model, choice, page["preprocessing"], human["gdrive_id"])
    )
    if choice.code is not None:
        write_text(layout.architecture, choice.code)
    stated, seeds = (evidence[0].record if evidence else None), spread(evidence)
    text = submission(
        info, name=name, threat_model=threat_model, architecture=choice, human=human, stated=stated, seeds=seeds
    )
    write_text(layout.submission, text)
