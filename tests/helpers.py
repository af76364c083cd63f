"""What tests of several parts do alike: say a command's words, keep a few digits in a file, train a network plainly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from art_saliency.data import DataSet, load_data, to_unit
from art_saliency.networks import build_network


def spell(*words: object, **options: Any) -> list[str]:
    """
    The words of a command line: ``spell("train", "fsr", eps=0.1, set=["base=alp"], quiet=True)``.

    An option is named as it is given, with dashes; ``True`` stands alone, and a list is said once for each value.
    """
    said = [str(word) for word in words]
    for name, given in options.items():
        option = "--" + name.replace("_", "-")
        for value in given if isinstance(given, list) else [given]:
            said += [option] if value is True else [option, str(value)]
    return said


def write_few_digits(path: Path, train: int, test: int) -> Path:
    """An .npz, the route that a user's own data takes, of the first digits of either part."""
    data = load_data("digits")
    np.savez(
        path,
        x_train=data.x_train[:train].numpy(),
        y_train=data.y_train[:train].numpy(),
        x_test=data.x_test[:test].numpy(),
        y_test=data.y_test[:test].numpy(),
    )
    return path


def plainly_trained(
    *, width: int, epochs: int, lr: float, change: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[nn.Module, DataSet]:
    """A network without any defence, and the digits it learnt from, as `change` made them."""
    data = load_data("digits")
    x, y = to_unit(data.x_train).float(), data.y_train
    torch.manual_seed(0)
    model = build_network("small-cnn", num_classes=10, input_shape=data.input_shape, width=width)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(change(x[rows])), y[rows]).backward()
            optimizer.step()
    return model, data


def in_fresh_process(module: str, call: str) -> Any:
    """
    What a function of a test module gives in a process of its own: for measurements of memory, as this one's holds, and gives out
    again, whatever other tests have left. There glibc maps every large block by itself, so that what is freed is gone at once.

    :param module: Of tests: ``"test_ranks"``. :param call: An expression over its names, of a JSON-able value.
    """
    code = f"import json; from tests import {module} as m; print(json.dumps(eval({call!r}, vars(m))))"
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **exact}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    """:return: A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def become_rank(rank: int, *, world: int, port: int, nodes: int = 1) -> None:
    """Make this process, a fork of the test's, what a launcher starts: one rank of several on one machine, or as if on several."""
    torch.set_num_threads(1)
    here = world // nodes
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % here),
        GROUP_RANK=str(rank // here),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(here),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        GLOO_SOCKET_IFNAME="lo",
    )
