"""A trained run as a folder: plain weights, and a page that says how they came to be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.files import read_tensors, sha256_of_tensors, write_file, write_tensors
from art_saliency.methods.fsr import FSRLayer, LayerOptions, fsr_layers, insert_fsr
from art_saliency.modes import evaluating
from art_saliency.networks import art_device_type, build_network, pixel_range
from art_saliency.randomness import global_generators_kept
from art_saliency.trainers.network import ClassifierNetwork
from art_saliency.training.records import History, versions

__all__ = ["MEASURED", "SCHEMA", "load", "make_classifier", "read_run", "save"]

SCHEMA = 1
"""Of ``run.json``; raised when a reader of an older one would misread it."""


_LAYER = (*get_type_hints(LayerOptions), "randomised")

MEASURED = ("evaluation.json", "x_adv.pt", "explain.png", "saliency.png", "report", "autoattack-state")
"""What the command line writes into a run's folder of its weights; :func:`save` takes it away with them."""


def make_classifier(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | str = "cpu",
) -> PyTorchClassifier:
    """
    Put a network into an ART classifier of images in [0, 1], on a device.

    :param model: Maps (N, C, H, W) in [0, 1] to logits.
    :return: The classifier, with cross-entropy as its loss.
    """
    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(input_shape),
        nb_classes=num_classes,
        optimizer=optimizer,
        clip_values=(0.0, 1.0),
        device_type=art_device_type(device),
    )


def save(
    folder: str | Path,
    classifier: PyTorchClassifier,
    *,
    network: dict[str, Any],
    method: str,
    settings: dict[str, Any],
    data: dict[str, Any],
    history: History,
    recipe: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """
    Write a run: ``weights.pt`` (the bare network's state dict) and ``run.json``.

    :param folder: Made when missing. :param network: The arguments of :func:`art_saliency.networks.build_network`.
    :param method: The objective's name. :param settings: Its :meth:`~art_saliency.methods.base.Objective.config`.
    :param data: What it was trained on: name, fingerprint, and how it was split.
    :param history: Of the training. :param recipe: How it was trained, so that it can be repeated from another seed: a
        :class:`~art_saliency.trainers.surrogates.Recipe` as JSON. :param force: Whether a run that is there may be replaced, and
        what was measured of it (:data:`MEASURED`) taken away.
    :return: The folder.
    :raises InputError: When a run is there already and `force` is false, when :func:`load` would not give back what the classifier is (of
        other ``clip_values``, with preprocessing, or of another `network`), or when JSON cannot hold it: nothing is written.
    :raises UnsupportedModelError: When the classifier has defences around the network that are not PyTorch preprocessing.
    """
    path = vacant_folder(folder, force=force)
    has_fsr = any(isinstance(child, FSRLayer) for child in classifier.model.modules())
    found = fsr_layers(classifier.model) if has_fsr else {}
    layers = {target: {name: getattr(layer, name) for name in _LAYER} for target, layer in found.items()}
    weights = {name: value.detach().cpu() for name, value in classifier.model.state_dict().items()}
    page: dict[str, Any] = {
        "schema": SCHEMA,
        "method": method,
        "settings": settings,
        "network": {**network, "fsr": layers},
        "data": data,
        "recipe": recipe,
        "weights_sha256": sha256_of_tensors(weights),
        "versions": versions(),
        "history": {"meta": history.meta, "epochs": history.records},
    }
    text = _as_json(page)
    _check_comes_back(classifier, page["network"], weights)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / "weights.pt", weights)
    if (path / "run.json").is_file():  # else what has such a name is somebody's own
        for name in MEASURED:
            _remove(path / name)
    write_file(path / "run.json", lambda file: file.write(text.encode()))
    return path


def _as_json(page: dict[str, Any]) -> str:
    for name, value in page.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            expected, remedy = "numbers, words, lists and objects of them", "NumPy's and torch's numbers have .item()"
            raise _checks.refuse(name, f"what JSON cannot hold ({error})", expected, remedy) from error
    return json.dumps(page, indent=1)


def _check_comes_back(classifier: PyTorchClassifier, network: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Refuse what :func:`load` would give back as another function of images in [0, 1]."""
    made_by = "the arguments of build_network that made the classifier's model"
    with global_generators_kept(0):
        try:
            model = _blank(network).to(classifier.device)
            model.load_state_dict(_plain_keys(weights))
        except (KeyError, TypeError, RuntimeError) as error:
            got = f"those of another ({str(error).strip().splitlines()[-1].strip()})"
            raise _checks.refuse("network", got, made_by) from error
    own, bare = ClassifierNetwork(classifier), classifier.model
    x = torch.linspace(0, 1, 2 * math.prod(classifier.input_shape), device=classifier.device)

    def logits(network: nn.Module) -> Tensor:
        like = next(network.parameters(), x)
        with global_generators_kept(0):  # of a network that answers at random
            answer: Tensor = network(x.view(2, *classifier.input_shape).to(like.dtype))
        return answer.float()

    with evaluating(own, model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = logits(model)
        close = {
            name: torch.allclose(found, said, rtol=1e-3, atol=1e-3 * float(said.abs().max()), equal_nan=True)
            for name, said in (("bare", logits(bare)), ("own", logits(own)))
        }
    if not close["bare"]:
        raise _checks.refuse("network", "those of another: with the same weights its logits differ", made_by)
    if not close["own"]:
        low, high = pixel_range(classifier)
        got = f"clip_values ({low:g}, {high:g}) or preprocessing before its model"
        remedy = "put the standardisation into the network: build_network(..., mean=, std=); export_robustbench takes it along"
        raise _checks.refuse("classifier", got, "a model that takes images in [0, 1] as they are", remedy)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def vacant_folder(folder: str | Path, *, force: bool) -> Path:
    """
    Check, before any work starts, that a run may be written to a folder. It is not made yet.

    :return: Its path.
    :raises InputError: When it holds files and `force` is false, or is no folder.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise _checks.refuse("out", f"{path}, which is a file", "a folder")
    if not force and path.is_dir() and any(path.iterdir()):
        raise _checks.refuse(
            "out", f"{path}, which is not empty", "a new or empty folder", "choose another or add --force"
        )
    return path


def read_run(folder: str | Path) -> dict[str, Any]:
    """
    Read ``run.json``.

    :raises CheckpointError: When the folder holds no run, or one that this version cannot read.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no run.json, expected the folder of a trained run; make one with: art-saliency train"
        )
    try:
        page: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = page["schema"]
        missing = {"method", "settings", "network", "data", "weights_sha256", "history"} - set(page)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}), expected the JSON that training wrote; train again"
        ) from error
    if schema != SCHEMA or missing:
        raise CheckpointError(
            f"{path}: got schema {schema} without {sorted(missing)}, expected schema {SCHEMA}; use the version that wrote it"
        )
    for part, needed in {"settings": (), "data": (), "network": ("name", "num_classes", "input_shape")}.items():
        if not isinstance(page[part], dict) or not set(needed) <= set(page[part]):
            expected = f"an object with {', '.join(needed)}" if needed else "an object"
            raise CheckpointError(
                f"{path}: got {json.dumps(page[part])[:60]} as {part}, expected {expected}; copy it again, or train again"
            )
    return page


def readable(path: Path) -> Path:
    """:return: The path as it is. :raises OSError: When its file may not be read, which is not to be taken for damage."""
    if path.is_file():
        with path.open("rb"):
            pass
    return path


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> PyTorchClassifier:
    """
    Give a trained run back as an ART classifier in eval mode, ready for attacks, and with an optimizer for a trainer.

    :param folder: What ``art-saliency train --out`` or :func:`save` wrote.
    :param device: Where the network is to lie.
    :param optimizer: Makes one of the parameters; ``None`` makes none, and the classifier cannot be trained.
    :return: The classifier.
    :raises CheckpointError: When a file is missing, damaged, or not the one that ``run.json`` names.
    """
    page = read_run(folder)
    weights = read_tensors(readable(Path(folder) / "weights.pt"))
    if sha256_of_tensors(weights) != page["weights_sha256"]:
        raise CheckpointError(
            f"{folder}: weights.pt is not the file that run.json names (its hash differs); copy both again"
        )
    network = page["network"]
    model = _blank(network)
    try:
        model.load_state_dict(_plain_keys(weights))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit {network['name']!r}: {str(error).splitlines()[1].strip()}"
        ) from error
    own, shape = None if optimizer is None else optimizer(model.parameters()), tuple(network["input_shape"])
    classifier = make_classifier(
        model, input_shape=shape, num_classes=network["num_classes"], optimizer=own, device=device
    )
    classifier.model.eval()
    return classifier


def _blank(network: dict[str, Any]) -> nn.Module:
    """:return: The network that ``run.json`` describes, with fresh weights and its FSR layers in their places."""
    given = dict(network)
    shape, layers = tuple(given.pop("input_shape")), given.pop("fsr", {})
    model = build_network(given.pop("name"), input_shape=shape, **given)
    for target, settings in layers.items():
        insert_fsr(model, target, given["num_classes"], torch.rand(2, *shape), **settings)
    return model


def _plain_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """:return: The weights under the names of the network that torch.compile was given."""
    return {key.replace("_orig_mod.", ""): value for key, value in weights.items()}
