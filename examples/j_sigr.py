"""J-SIGR: the Jacobian's norm and selective input-gradient regularisation.

python examples/j_sigr.py
python examples/j_sigr.py --data mnist.npz --eps 0.2 --epochs 10 --device cuda
"""

import argparse

import torch
from art.estimators.classification import PyTorchClassifier

from art_saliency import JSIGRTrainer, autoattack, build_network, load_data
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
    torch.manual_seed(0)
    network = default_network(data.input_shape)
    model = build_network(network, num_classes=data.num_classes, input_shape=data.input_shape, activation="silu")
    classifier = PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        input_shape=data.input_shape,
        nb_classes=data.num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if args.device == "cuda" else "cpu",
    )

    trainer = JSIGRTrainer(classifier, eps=args.eps)
    trainer.fit(data.x_train, data.y_train, nb_epochs=args.epochs, scheduler="onecycle", seed=0)

    result = autoattack(model, data.x_test[: args.images], data.y_test[: args.images], eps=args.eps)
    print(f"clean {result.clean_accuracy:.1%}, AutoAttack {result.robust_accuracy:.1%}")


if __name__ == "__main__":
    main()
