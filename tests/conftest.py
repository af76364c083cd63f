"""What every test may use: real digits, a tiny network, one seed, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

settings.register_profile("art_saliency", deadline=None)  # a busy machine is no failure
settings.load_profile("art_saliency")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already use every core


def pytest_configure(config: pytest.Config) -> None:
    """On a machine where ART was never imported, let one process write its configuration before the workers start."""
    if not hasattr(config, "workerinput"):
        import art_saliency.trainers  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def rng() -> None:
    """Every test starts from one state of torch's global generator, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: (1437, 1, 8, 8) float32 in [0, 1], (1437,) int64, and the last 360 to test on."""
    from sklearn.datasets import load_digits

    source = load_digits()
    x, y = torch.tensor(source.images / 16, dtype=torch.float32)[:, None], torch.tensor(source.target)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def _tiny_network(*, classes: int = 10, channels: int = 1, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )


@pytest.fixture(scope="session")
def tiny_network() -> Callable[..., nn.Sequential]:
    """Make an untrained network of 5 kinds of layer; the same weights for the same seed."""
    return _tiny_network
