"""
ART's own Madry trainer trains FSR: the loss that the classifier holds brings the auxiliary terms, in train mode only.

    python examples/art_native_trainer_with_fsr.py
    python examples/art_native_trainer_with_fsr.py --data mnist.npz --eps 0.3 --device cuda
"""

import argparse

import torch
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier

from art_saliency import FSRLoss, autoattack, build_network, insert_fsr, load_data
from art_saliency.data import to_unit
from art_saliency.networks import default_network
from art_saliency.words import fraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, cifar10, FILE.npz, ... (default: %(default)s)")
    parser.add_argument("--eps", type=fraction, default=0.2, help="Linf radius, such as 8/255 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=100, help="test images for AutoAttack (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()

    data = load_data(args.data)
    x_train = to_unit(data.x_train)  # ART's trainer would take bytes for pixels from 0 to 255
    torch.manual_seed(0)
    network = default_network(data.input_shape)
    model = build_network(network, num_classes=data.num_classes, input_shape=data.input_shape)
    insert_fsr(model, "layer3", data.num_classes, x_train[:2])
    classifier = PyTorchClassifier(
        model,
        loss=FSRLoss(model),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        input_shape=data.input_shape,
        nb_classes=data.num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if args.device == "cuda" else "cpu",
    )

    trainer = AdversarialTrainerMadryPGD(
        classifier, nb_epochs=args.epochs, eps=args.eps, eps_step=args.eps / 4, max_iter=7, batch_size=128
    )
    labels = torch.nn.functional.one_hot(data.y_train, data.num_classes)
    trainer.fit(x_train.numpy(), labels.numpy())

    result = autoattack(model, data.x_test[: args.images], data.y_test[: args.images], eps=args.eps)
    print(f"clean {result.clean_accuracy:.1%}, AutoAttack {result.robust_accuracy:.1%}")


if __name__ == "__main__":
    main()
