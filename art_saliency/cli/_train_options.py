"""What ``art-saliency train`` can be told, group by group."""

from __future__ import annotations

import argparse

from art_saliency.cli._stream import add_stream_options
from art_saliency.words import fraction

RECIPES = {"sgd": 0.1, "adam": 0.01}
"""The optimizers and their highest learning rates."""

GREATEST = 1000.0
"""Of learning rate and weight decay: far beyond it float32 overflows in the first step, and far below nothing is learned any more."""


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What it trains on."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="digits",
        help="digits, mnist, cifar10, cifar100, svhn, FILE.npz, or a folder (default: %(default)s)",
    )
    group.add_argument("--data-root", help="where torchvision's sets lie or are downloaded to")
    group.add_argument("--download", action="store_true", help="let torchvision download the set")
    group.add_argument("--size", type=int, help="side of the images that a folder of pictures is brought to")
    group.add_argument(
        "--validation-split",
        type=float,
        default=0.1,
        help="share of the training images held out (default: %(default)s)",
    )
    group.add_argument(
        "--augment",
        default="none",
        help="none, flip, crop or crop-flip, on the device; for streamed pictures also resized-crop and resized-crop-flip, as is "
        "usual for ImageNet (default: %(default)s)",
    )
    add_stream_options(group)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What is trained."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--network",
        help="a name, timm:NAME, torchvision:NAME or package.module:factory, a function or class of your own that is called with those of "
        "the keywords num_classes= and in_channels= that it takes (default: by the image size)",
    )
    group.add_argument(
        "--activation", default="relu", help="relu, leaky-relu, elu, silu, gelu or softplus (default: %(default)s)"
    )
    group.add_argument("--width", type=int, help="channels of the first stage")
    group.add_argument(
        "--normalise", action="store_true", help="put the training images' mean and deviation into the network"
    )
    group.add_argument("--weights", help="a state dict to start from")


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--eps",
        type=fraction,
        required=True,
        help="radius of the threat model, such as 8/255, of the pixel range [0, 1]",
    )
    group.add_argument("--norm", default="Linf", help="Linf or L2 (default: %(default)s)")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; may be repeated"
    )


def add_run_group(parser: argparse.ArgumentParser) -> None:
    """The budget, what is kept of the run, and where it goes on."""
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", type=int, default=20, help="passes over the data (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    group.add_argument(
        "--optimizer", choices=sorted(RECIPES), help="default: adam for small-cnn and mnist-cnn, else sgd"
    )
    group.add_argument("--lr", type=float, help="highest learning rate (default: 0.01 for adam, 0.1 for sgd)")
    group.add_argument("--weight-decay", type=float, help="default: 0 for adam, 5e-4 for sgd")
    group.add_argument("--scheduler", default="onecycle", help="onecycle, cosine, step or none (default: %(default)s)")
    group.add_argument(
        "--devices", type=int, default=1, help="processes that share every batch, on one GPU each where there are any"
    )
    group.add_argument("--grad-clip", type=float, help="the greatest norm of the gradient")
    group.add_argument(
        "--selection",
        default="last",
        help="last, or best: the epoch most robust on the images held out (default: last)",
    )
    group.add_argument("--patience", type=int, help="end after so many measurements without a better one")
    group.add_argument(
        "--validate-every", type=int, default=1, help="epochs between two measurements (default: %(default)s)"
    )
    group.add_argument("--ema", type=float, help="keep an exponential average of the weights, of decay 0.999, say")
    group.add_argument("--swa-from", type=float, help="average the weights equally after this share of the run")
    group.add_argument("--awp", type=float, metavar="GAMMA", help="adversarial weight perturbation: 0.005, say")
    group.add_argument(
        "--label-smoothing", type=float, default=0.0, help="for methods that take soft labels (default: 0)"
    )
    group.add_argument("--precision", default="32-true", help="32-true or bf16-mixed (default: %(default)s)")
    group.add_argument(
        "--channels-last", action="store_true", help="convolutions on channels-last memory: often faster"
    )
    group.add_argument("--deterministic", action="store_true", help="only kernels whose results repeat bit for bit")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out where one was interrupted, leave it as it is where it is over; else start it",
    )
    group.add_argument(
        "--checkpoint-every",
        default="1 epoch",
        metavar="WORDS",
        help="'2 epochs', '500 steps' or '600 seconds' (default: %(default)s)",
    )
