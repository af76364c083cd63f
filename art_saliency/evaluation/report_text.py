"""A report in words: Markdown that reads on its own, in an editor, on a page or on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from art_saliency.evaluation._audit_gradients import curve_steps
from art_saliency.evaluation._autoattack_plan import in_words
from art_saliency.evaluation.table import markdown_table, percent

__all__ = ["interval", "markdown"]

_CAPTIONS = {
    "waterfall": "What is left after each of AutoAttack's attacks in turn, with 95 % intervals.",
    "accuracy_against_eps": "Of the first {audited} images: the worst of PGD-{steps} on cross-entropy and on margin; the dashed line is the radius of this report.",
    "accuracy_against_steps": "PGD on the cross-entropy. A line that still falls at its end has not converged.",
    "saliency": "Input, adversarial input, and the gradient of the loss at both.",
    "loss_surface": "Around one image a panel: the direction of the gradient against a random one.",
}


def interval(row: Mapping[str, Any]) -> str:
    """:return: A row's 95 % interval, in percent."""
    low, high = row["interval_95"]
    return f"{100 * low:.1f}-{100 * high:.1f}"


def _accuracies(page: Mapping[str, Any]) -> str:
    rows = [("clean", page["clean"]), ("PGD-20", page["pgd20"])]
    details = page["autoattack"]["details"]
    rows.append((f"AutoAttack ({in_words(details['version'], details['deviations'])})", page["autoattack"]))
    if page["transfer"]:
        rows.append(("transferred attacks, worst of all", page["transfer"]))
    for key, words in (("corruptions", "corruptions"), ("corruption_arrays", "corruption arrays")):
        if page[key]:
            rows.append(
                (
                    f"{words}, mean of {len(page[key]['corruptions'])}",
                    {**page[key], "accuracy": page[key]["mean_accuracy"]},
                )
            )
    return markdown_table(
        ("what", "accuracy %", "95 % interval", "images"),
        [(name, percent(row["accuracy"]), interval(row), row["count"]) for name, row in rows],
    )


def _audit(page: Mapping[str, Any]) -> list[str]:
    audit = page["audit"]
    reasons = f" Because of: {'; '.join(audit['reasons'])}." if audit["reasons"] else ""
    missing = f" Missing: {'; '.join(audit['missing'])}." if audit["missing"] else ""
    doubtful = [c for c in audit["checks"] if c["status"] in ("suspicious", "masked")]
    return [
        "## Are the gradients masked?",
        f"**{audit['verdict']}**, on the first {audit['count']} images.{reasons}{missing} 'Consistent' means that no sign of masking was found, "
        f"which no set of attacks turns into a proof. With so many images a difference below {percent(audit['smallest'])} points cannot "
        "convict.",
        markdown_table(
            ("check", "status", "found", "threshold"),
            [(c["name"], c["status"], c["figure"], c["threshold"]) for c in audit["checks"]],
            left=4,
        ),
        *(f"*{c['name']}*: {c['meaning']}" for c in doubtful),
        "Accuracy under each of the audit's attacks:",
        markdown_table(
            ("attack", "accuracy %", "95 % interval"),
            [(name, percent(row["accuracy"]), interval(row)) for name, row in audit["accuracies"].items()],
        ),
    ]


def _transfer(page: Mapping[str, Any]) -> list[str]:
    if not page["transfer"]:
        return ["## Transferred attacks", "Not measured: no surrogate network was given."]
    rows = [
        (r["surrogate"], r["attack"], percent(r["accuracy"]), interval(r), percent(r["on_surrogate"]["accuracy"]))
        for r in page["transfer"]["rows"]
    ]
    header = ("made on", "attack", "accuracy %", "95 % interval", "surrogate's own %")
    return [
        "## Transferred attacks",
        "Images made to fool other networks. Where a surrogate's own accuracy is high the attack was weak and says little.",
        markdown_table(header, rows, left=2),
    ]


def _corruptions(page: Mapping[str, Any]) -> list[str]:
    found = []
    for key, heading in (
        ("corruptions", "## Corruptions made on the spot"),
        ("corruption_arrays", "## Corruption arrays"),
    ):
        if not page[key]:
            continue
        table = page[key]["corruptions"]
        severities = list(next(iter(table.values())))
        rows = [
            (name, *(f"{percent(cells[s]['accuracy'])} ({interval(cells[s])})" for s in severities))
            for name, cells in table.items()
        ]
        header = ("corruption", *(f"severity {s}" for s in severities))
        found += [heading, "Accuracy in percent, with 95 % intervals.", markdown_table(header, rows)]
    return found


def _saliency(page: Mapping[str, Any]) -> list[str]:
    part = page["saliency"]

    def shown(metric: Mapping[str, Any]) -> tuple[str, str]:
        mean, error = metric["mean"], metric["standard_error"]
        return ("-" if mean is None else f"{mean:.3f}"), ("-" if error is None else f"{error:.3f}")

    rows = [(name, *shown(metric), metric["count"], metric["meaning"]) for name, metric in part["metrics"].items()]
    return [
        "## What the network looks at",
        f"Maps of kind {part['map']} on the first {part['images']} images, clean and under PGD-20. An undefended network's maps can be "
        "as consistent as a defended one's: these numbers describe, they do not prove robustness.",
        markdown_table(("metric", "mean", "s.e.", "images", "meaning"), rows),
    ]


def markdown(page: Mapping[str, Any], figures: Sequence[Path]) -> str:
    """
    A report as Markdown.

    :param page: What ``report.json`` holds. :param figures: Pictures, relative to the text. :return: The text.
    """
    threat, details = page["threat_model"], page["autoattack"]["details"]
    steps = curve_steps(page["audit"]["budget"]["max_iter"])
    pictures = [
        f"![{path.stem}]({path.as_posix()})\n\n{_CAPTIONS.get(path.stem, '').format(steps=steps, audited=page['audit']['count'])}"
        for path in figures
    ]
    attack = in_words(details["version"], details["deviations"])
    warnings = [f"- AutoAttack: {line}" for line in [*details["deviations"], *details["warnings"]]]
    parts = [
        f"# {page['network']} on {page['data']}: {threat['norm']} eps {threat['eps']:g}",
        f"{percent(page['autoattack']['accuracy'])} % of {page['images']} images stand against AutoAttack ({attack}). Audit: "
        f"**{page['audit']['verdict']}**.",
        _accuracies(page),
        *warnings,
        *pictures[:3],
        *_audit(page),
        *_transfer(page),
        *_corruptions(page),
        *_saliency(page),
        *pictures[3:],
        "## How this was made",
        f"art_saliency {page['art_saliency']}, seed {page['seed']}; {details['backend']} {details['backend_version']}, batches of "
        f"{details['batch_size']}, {details['device']}, {details['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in details["versions"].items())
        + f". Weights sha256 {page['weights_sha256']}, data sha256 {details['data_sha256']}. All numbers: report.json.",
    ]
    return "\n\n".join(parts) + "\n"
