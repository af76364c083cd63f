"""
A training method of one's own in thirty lines: double backpropagation, as an ART trainer, on any network and data.

    python examples/own_objective.py
"""

import argparse

import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.nn.functional import cross_entropy

from art_saliency import autoattack, build_network, load_data
from art_saliency.gradients import input_gradient
from art_saliency.methods.base import Batch, LossTerms, Objective
from art_saliency.networks import default_network
from art_saliency.threat import ThreatModel
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.words import fraction


class DoubleBackpropagation(Objective):
    """Cross-entropy plus the squared norm of its input gradient (Drucker and Le Cun 1992)."""

    name = "double-backpropagation"
    double_backward = True  # so that nothing of it is computed in half precision

    def __init__(self, *, eps: float, weight: float = 0.1) -> None:
        super().__init__()
        self.eps, self.weight = eps, weight
        self.threat = ThreatModel("Linf", eps)  # for robust accuracy on held-out images

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        x = batch.x.detach().requires_grad_(True)
        logits = model(x)
        ce = cross_entropy(logits, batch.y)
        gradient = input_gradient(cross_entropy(logits, batch.y, reduction="sum"), x, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean()
        return LossTerms(ce + self.weight * penalty, logits, {"ce": ce.detach(), "penalty": penalty.detach()})


class DoubleBackpropagationTrainer(ObjectiveTrainer):
    """Everything else, units, preprocessing, schedules, progress, comes from the base class."""

    objective_class = DoubleBackpropagation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, cifar10, FILE.npz, ... (default: %(default)s)")
    parser.add_argument("--eps", type=fraction, default=0.1, help="Linf radius, such as 8/255 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=100, help="test images for AutoAttack (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()

    data = load_data(args.data)
    torch.manual_seed(0)
    network = default_network(data.input_shape)
    model = build_network(network, num_classes=data.num_classes, input_shape=data.input_shape, activation="silu")
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        input_shape=data.input_shape,
        nb_classes=data.num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if args.device == "cuda" else "cpu",
    )

    trainer = DoubleBackpropagationTrainer(classifier, eps=args.eps)
    trainer.fit(data.x_train, data.y_train, nb_epochs=args.epochs, scheduler="onecycle", seed=0)

    result = autoattack(model, data.x_test[: args.images], data.y_test[: args.images], eps=args.eps)
    print(f"clean {result.clean_accuracy:.1%}, AutoAttack {result.robust_accuracy:.1%}")


if __name__ == "__main__":
    main()
