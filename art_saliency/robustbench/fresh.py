"""
What happens in the fresh process: RobustBench's own code loads a bundle and evaluates it.

Nothing here imports the network's training code, and no file of RobustBench is changed: the entry joins its table of models
in memory, as the pull request would put it there, and images may come from arrays instead of a download.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency.data import load_data, to_unit
from art_saliency.errors import CheckpointError
from art_saliency.files import read_tensors, sha256_of_tensors
from art_saliency.robustbench.bundle import Layout
from art_saliency.robustbench.compat import import_robustbench, seeded
from art_saliency.robustbench.rules import network_violations
from art_saliency.robustbench.writing import identifier

__all__ = ["answer", "main", "open_images"]


def main(folder: str) -> None:
    """Read ``job.json`` from a folder, do it, write ``result.json`` there. :param folder: Of the two."""
    job = json.loads(Path(folder, "job.json").read_text(encoding="utf-8"))
    Path(folder, "result.json").write_text(json.dumps([answer(part) for part in job["parts"]]), encoding="utf-8")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """
    Load one bundle as RobustBench would, and say what was seen.

    :param job: ``bundle, name, dataset, threat_model, num_classes, input_shape, threads``, and ``benchmark``, which may be None.
    :return: ``taken`` (whether RobustBench has the name), ``difference`` of the logits and their ``scale``, ``violations``,
        ``benchmark`` (or ``benchmark_error`` where it failed); or ``error``, where the bundle could not be loaded.
    """
    torch.set_num_threads(job["threads"])
    layout = Layout(Path(job["bundle"]), job["name"], job["dataset"], job["threat_model"])
    try:
        model, taken = _load(layout, job)
        reference = read_tensors(layout.reference)
        with torch.no_grad():
            logits = model(reference["x"])
        difference = (logits.double() - reference["logits"].double()).abs().max()
        violations = network_violations(model, job["input_shape"], job["num_classes"])
        found = {
            "taken": taken,
            "training": model.training,
            "difference": float(difference),
            "scale": max(1.0, float(reference["logits"].abs().max())),
            "violations": [str(violation) for violation in violations],
            "benchmark": None,
        }
    except Exception as error:  # whatever a stranger's code may raise is an answer
        return {"error": _brief(error)}
    if job["benchmark"] is None:
        return found
    try:
        return {**found, "benchmark": _benchmark(model, layout, job, job["benchmark"])}
    except Exception as error:
        return {**found, "benchmark_error": _brief(error)}


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()[:4]]
    return f"{type(error).__name__}: {' '.join(lines)}".strip()[:600]


def _load(layout: Layout, job: dict[str, Any]) -> tuple[nn.Module, bool]:
    """:return: What RobustBench's ``load_model`` returns, and whether it had an entry of that name before."""
    robustbench = import_robustbench()
    enums = robustbench.model_zoo.enums
    if layout.architecture.is_file():
        _execute(layout.architecture, f"robustbench.model_zoo.architectures.{identifier(layout.name)}")
    name, row = _execute(layout.entry, "model_zoo_entry").ENTRY
    if name != layout.name:
        raise CheckpointError(f"model_zoo_entry.py: got an entry called {name!r}, expected {layout.name!r}")
    zoo = robustbench.model_zoo.model_dicts[enums.BenchmarkDataset(job["dataset"])][
        enums.ThreatModel(job["threat_model"])
    ]
    before = zoo.get(name)
    zoo[name] = {
        **row,
        "gdrive_id": row["gdrive_id"] or "not uploaded yet",
    }  # it refuses None, though the file is there
    try:
        model: nn.Module = robustbench.utils.load_model(
            name, model_dir=layout.folder / "models", dataset=job["dataset"], threat_model=job["threat_model"]
        )
    finally:
        if before is None:
            del zoo[name]
        else:
            zoo[name] = before
    return model, before is not None


def _execute(path: Path, name: str) -> ModuleType:
    """Run a file of the bundle as the module that it will be: the file's own text, never bytecode that lies beside it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def open_images(source: str | Path, count: int, num_classes: int, input_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """
    The test images that stand for those of RobustBench's own data set.

    :param source: See :func:`art_saliency.load_data`. :param input_shape: (C, H, W).
    :return: The first `count`, float32 in [0, 1], and their labels.
    :raises CheckpointError: When they are too few, or of another shape.
    """
    # Folders of pictures are the classes; the labels of arrays may lack some.
    data = load_data(source, num_classes=None if Path(source, "train").is_dir() else num_classes)
    if len(data.x_test) < count:
        raise CheckpointError(f"{source}: holds {len(data.x_test)} test images, expected {count}")
    if list(data.x_test.shape[1:]) != list(input_shape):
        raise CheckpointError(
            f"{source}: holds images of the shape {tuple(data.x_test.shape[1:])}, expected {tuple(input_shape)}"
        )
    return to_unit(data.x_test[:count]).float().contiguous(), data.y_test[:count]


def _benchmark(model: nn.Module, layout: Layout, job: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """
    Run RobustBench's own ``benchmark``.

    :param wanted: ``count, eps, seed, batch_size, device, data_dir``, ``preprocessing`` (of ImageNet), and ``images``: arrays
        from which the first `count` test images are taken; None leaves RobustBench to find its own.
    """
    robustbench, count = import_robustbench(), wanted["count"]
    enums, loaders = robustbench.model_zoo.enums, robustbench.data._clean_dataset_loaders
    dataset, used = enums.BenchmarkDataset(job["dataset"]), {}
    original = loaders[dataset]

    def load(n_examples: int, *arguments: Any) -> tuple[Tensor, Tensor]:
        if wanted["images"] is None:
            used["x"], used["y"] = original(n_examples, *arguments)
        else:
            used["x"], used["y"] = open_images(wanted["images"], n_examples, job["num_classes"], job["input_shape"])
        return used["x"], used["y"]

    loaders[dataset] = load
    try:
        with seeded(wanted["seed"]):
            clean, robust = robustbench.benchmark(
                model,
                n_examples=count,
                dataset=job["dataset"],
                threat_model=job["threat_model"],
                data_dir=wanted["data_dir"],
                device=torch.device(wanted["device"]),
                batch_size=wanted["batch_size"],
                eps=wanted["eps"],
                preprocessing=wanted["preprocessing"],
            )
    finally:
        loaders[dataset] = original
    x, y = used["x"], used["y"]
    found = {"clean": round(clean * count), "robust": round(robust * count), "count": count}
    found["data_sha256"] = sha256_of_tensors({"x": x, "y": y})
    if layout.x_adv.is_file():
        found.update(_rescored(model, x, y, read_tensors(layout.x_adv)["x_adv"], job["threat_model"], wanted))
    return found


def _rescored(
    model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str, wanted: dict[str, Any]
) -> dict[str, float]:
    """:return: How far the bundle's adversarial images are from the clean ones, and how many of them are classified correctly."""
    delta = (x_adv.double() - x.double()).flatten(1)
    distance = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    correct, device = 0, torch.device(wanted["device"])
    with torch.no_grad():
        for start in range(0, len(x), wanted["batch_size"]):
            part = slice(start, start + wanted["batch_size"])
            correct += int((model(x_adv[part].to(device)).argmax(1).cpu() == y[part]).sum())
    return {"distance": float(distance.max()), "rescored": correct}
