"""The other way: a model of RobustBench's zoo as an ART classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.networks import art_device_type
from art_saliency.randomness import global_generators_kept
from art_saliency.robustbench.compat import import_robustbench
from art_saliency.robustbench.model_info import board

__all__ = ["load_robustbench"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def load_robustbench(
    name: str,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    *,
    model_dir: str | Path = "models",
    device: torch.device | str = "cpu",
    optimizer: OptimizerFactory | None = None,
) -> PyTorchClassifier:
    """
    Load a model of RobustBench's zoo, ready for attacks, the trainers (fine-tuning), ``insert_fsr``, evaluation and audit.

    RobustBench's own ``load_model`` does it: it takes ``<model_dir>/<dataset>/<threat_model>/<name>.pt`` where that is there,
    and downloads it otherwise.

    :param name: As in RobustBench's tables: ``"Rade2021Helper_R18_ddpm"``.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param threat_model: ``"Linf"``, ``"L2"`` or ``"corruptions"``: of the table that the name is in.
    :param model_dir: Where checkpoints lie.
    :param device: Where the network is to lie.
    :param optimizer: Makes one of the parameters; ``None`` makes SGD with a learning rate of 0.01, for fine-tuning.
    :return: The classifier, of images in [0, 1], in eval mode.
    :raises InputError: When RobustBench knows no such model.
    :raises CheckpointError: When the checkpoint could not be fetched, or is not this model's.
    """
    place = board(dataset, threat_model)
    robustbench = import_robustbench()
    enums = robustbench.model_zoo.enums
    table = robustbench.model_zoo.model_dicts[enums.BenchmarkDataset(dataset)][enums.ThreatModel(threat_model)]
    timm_name = f"{str(name).lower().replace('-', '_')}_{dataset}_{threat_model.lower()}"
    if name not in table and not robustbench.utils.timm.is_model(timm_name):  # it looks there first
        _checks.one_of("name", name, table)
    file = Path(model_dir) / dataset / threat_model / f"{name}.pt"
    try:
        with global_generators_kept():  # networks are made with random weights first
            model: nn.Module = robustbench.utils.load_model(
                name, model_dir=model_dir, dataset=dataset, threat_model=threat_model
            )
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:300]
        raise CheckpointError(
            f"{file}: RobustBench could not load {name!r} ({type(error).__name__}: {line}); where a download failed or was cut "
            f"short, delete the file, fetch it by hand and put it there"
        ) from error
    model.requires_grad_(True)
    network = (
        _Zoo(model)
        if isinstance(model, nn.Sequential) and (model._forward_hooks or model._forward_pre_hooks)
        else model
    )
    step = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4))
    device_type = art_device_type(device)
    network.to(device)
    classifier = PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        place.input_shape,
        place.num_classes,
        optimizer=step(network.parameters()),
        clip_values=(0.0, 1.0),
        device_type=device_type,
    )
    classifier.model.eval()
    return classifier


class _Zoo(nn.Module):
    """ART runs the children of a root ``nn.Sequential`` one by one, past its hooks: this is one that it calls as a whole."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits
