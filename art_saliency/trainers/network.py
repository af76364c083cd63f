"""An ART classifier seen as one differentiable network on [0, 1]: pixel range, preprocessing, logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.optim import Optimizer

from art_saliency import _checks
from art_saliency.errors import NoEffectWarning, UnsupportedModelError
from art_saliency.modes import side_pass, training
from art_saliency.networks import check_network, own_logits, pixel_range
from art_saliency.randomness import global_generators_kept

__all__ = [
    "ClassifierNetwork",
    "check_optimizer",
    "check_train_mode",
    "check_trainable",
    "network_of",
    "optimizer_settings",
]


class ClassifierNetwork(nn.Module):
    """
    Maps images in [0, 1] to logits through the classifier's own preprocessing and model.

    Preprocessing steps with ``apply_fit`` are applied in train mode, those with ``apply_predict`` in eval mode, once.

    :param classifier: Its model is shared, not copied.
    :raises UnsupportedModelError: When a preprocessing or postprocessing defence cannot be trained through; it is named.
    """

    def __init__(self, classifier: PyTorchClassifier) -> None:
        super().__init__()
        self.network: nn.Module = classifier.model
        self.low, self.high = pixel_range(classifier)
        self.steps: Sequence[Any] = ()
        self.read(classifier)

    def read(self, classifier: PyTorchClassifier) -> None:
        """
        Take the classifier's preprocessing as it is now: ``set_params`` may have changed it.

        :raises InputError: When its pixel range is no longer the one that distances were converted by.
        :raises UnsupportedModelError: As the constructor does.
        """
        if (now := pixel_range(classifier)) != (self.low, self.high):
            got = f"{now}, which were ({self.low:g}, {self.high:g})"
            raise _checks.refuse("clip_values", got, "those of before", "make a new trainer of the classifier")
        self.network = classifier.model  # a copy of a trainer has another
        steps = [step for step in classifier.preprocessing_operations if not _is_identity(step)]
        for step in steps:
            if not isinstance(step, PreprocessorPyTorch):
                raise UnsupportedModelError(
                    f"preprocessing: got {type(step).__name__}, which works on arrays and has no gradient; expected PyTorch "
                    f"preprocessing (a PreprocessorPyTorch); use its PyTorch version or train without it"
                )
        if classifier.postprocessing_defences:
            names = ", ".join(type(step).__name__ for step in classifier.postprocessing_defences)
            raise UnsupportedModelError(
                f"postprocessing: got {names}, expected none; it hides gradients from attacks; train without it"
            )
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, C, H, W) in [0, 1]. :return: (N, K) logits."""
        if (self.low, self.high) != (0.0, 1.0):
            x = x * (self.high - self.low) + self.low
        for step in self.steps:
            if step.apply_fit if self.training else step.apply_predict:
                x = step.forward(x, None)[0]
        logits: Tensor = self.network(x)
        return logits


def network_of(classifier: PyTorchClassifier) -> nn.Module:
    """
    The network that a classifier is: what AutoAttack, the audit and every other evaluation of this package take.

    :param classifier: With ``clip_values``. :return: Maps images (N, C, H, W) in [0, 1] to logits (N, K). It shares the classifier's
        weights: the very ``classifier.model`` where images reach it as they are, else a wrapper that brings them to the pixel range
        and through the preprocessing first.
    :raises UnsupportedModelError: When a preprocessing or postprocessing defence has no gradient; it is named.
    """
    network = ClassifierNetwork(classifier)
    if (network.low, network.high) == (0.0, 1.0) and not network.steps:
        return network.network
    network.training = network.network.training
    return network


def _is_identity(step: Any) -> bool:
    """ART puts a standardisation by mean 0 and deviation 1 into every classifier."""
    mean, std = getattr(step, "mean", None), getattr(step, "std", None)
    return mean is not None and std is not None and bool(np.all(np.asarray(mean) == 0) and np.all(np.asarray(std) == 1))


def check_trainable(network: ClassifierNetwork, classifier: PyTorchClassifier) -> Tensor:
    """
    Try the network on one batch before any work starts, in eval mode, leaving weights, gradients and modes alone.

    :return: The batch: two images in [0, 1].
    :raises UnsupportedModelError: When it does not compute in float32, does not give differentiable (N, K) logits, preprocessing
        changes the batch, or the classifier predicts with another function.
    :raises InputError: When the classifier has no optimizer, or is not one of images with channels first.
    """
    if torch.is_inference_mode_enabled():
        raise _checks.refuse(
            "fit", "a call under torch.inference_mode()", "one outside it", "weights cannot change inside"
        )
    if classifier.optimizer is None:
        raise _checks.refuse(
            "classifier",
            "no optimizer",
            "one",
            "write PyTorchClassifier(..., optimizer=torch.optim.SGD(model.parameters(), lr=0.1))",
        )
    if not classifier.channels_first or len(classifier.input_shape) != 3:
        raise _checks.refuse(
            "classifier",
            f"input_shape {classifier.input_shape}, channels_first={classifier.channels_first}",
            "(C, H, W) with channels first",
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UnsupportedModelError("model: got no trainable parameter, expected at least one with requires_grad=True")
    for name, parameter in network.network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UnsupportedModelError(
                f"model: got {name} in {parameter.dtype}, expected torch.float32; convert the network with .float() before its "
                f"optimizer is made: precision='bf16-mixed' is what makes a step faster"
            )
    x = torch.linspace(0, 1, 2 * int(np.prod(classifier.input_shape)), device=classifier.device)
    x = x.view(2, *classifier.input_shape)
    y = torch.zeros(2, classifier.nb_classes, device=classifier.device)
    for step in network.steps:
        new_x, new_y = step.forward(x, y)
        if len(new_x) != 2 or (new_y is not None and not torch.equal(new_y, y)):
            raise UnsupportedModelError(
                f"preprocessing: {type(step).__name__} changes the number of images or the labels; expected one that "
                f"changes pixels only; train without it"
            )
    check_network(network, classifier.input_shape, classifier.nb_classes)
    _check_same_function(network, classifier, x)
    return x


def _check_same_function(network: ClassifierNetwork, classifier: PyTorchClassifier, x: Tensor) -> None:
    """Refuse a classifier that would be trained as another function than the one that it predicts with."""
    x = x.cpu()
    with global_generators_kept(0):
        own = own_logits(network, x)
    with global_generators_kept(1):
        if not torch.equal(own, own_logits(network, x)):
            return  # noise: no two answers are alike
        predicted = own_logits(classifier, x)
    if (apart := float((predicted - own).abs().max())) > 1e-3 * (1 + float(own.abs().max())):
        remedy = "look at what its predict does beside its preprocessing and its model"
        if isinstance(network.network, nn.Sequential):
            remedy = (
                "of an nn.Sequential ART calls the parts one by one, past its own forward and its hooks: put it into a module, "
                "self.body = ..."
            )
        raise UnsupportedModelError(
            f"classifier: got logits from predict that differ by {apart:.2g} from those of its model, which is what is trained, "
            f"expected the same; {remedy}"
        )


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """:return: The keywords that make another optimizer of the kind, beside its parameters; nothing of them is shared."""
    accepted = inspect.signature(type(optimizer).__init__).parameters  # AdamW's defaults hold more than it takes
    taken = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return deepcopy(taken)  # a rate may be a tensor


def check_optimizer(network: ClassifierNetwork, classifier: PyTorchClassifier) -> None:
    """
    Refuse an optimizer of another network's weights, and warn of trainable weights that it leaves out.

    :raises InputError: When it has none of the network's trainable parameters, or wants a closure (LBFGS).
    """
    closure = inspect.signature(classifier.optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        got = f"{type(classifier.optimizer).__name__}, which computes the loss several times a step"
        raise _checks.refuse("optimizer", got, "one that takes a gradient", "take SGD or AdamW")
    known = {id(parameter) for group in classifier.optimizer.param_groups for parameter in group["params"]}
    trainable = [(name, p) for name, p in network.network.named_parameters() if p.requires_grad]
    left_out = [name for name, parameter in trainable if id(parameter) not in known]
    if len(left_out) == len(trainable):
        got, expected = "none of the network's parameters", "those that are to be trained"
        raise _checks.refuse("optimizer", got, expected, "make it of model.parameters(), of this very model")
    if left_out:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        warnings.warn(
            f"optimizer: leaves out {len(left_out)} of {len(trainable)} trainable parameters ({some}), which stay as they are; make "
            f"it after the last change of the network, or freeze them by requires_grad_(False)",
            NoEffectWarning,
            stacklevel=4,
        )


def check_train_mode(network: ClassifierNetwork, x: Tensor, classes: int) -> None:
    """
    Try the network once more, in train mode, where some give auxiliary logits too; last, as the pass leaves no graph in any module, and
    the network can be copied. Weights, buffers, modes and random states stay as they are.

    :param x: Two images in [0, 1]. :param classes: K.
    :raises UnsupportedModelError: When it does not give logits (2, K) and nothing else.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with training(network), side_pass(network), global_generators_kept(), torch.no_grad():
        try:
            logits: Any = network(x)
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
    if not isinstance(logits, Tensor) or logits.shape != (len(x), classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UnsupportedModelError(
            f"model: got {got} in train mode, expected logits of shape ({len(x)}, {classes}) and nothing else, as in eval mode; "
            f"build it without auxiliary outputs"
        )
