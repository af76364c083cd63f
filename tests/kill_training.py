"""
Kill trainings at random moments, resume them until they are over, and compare with one that was never interrupted.

    python -m tests.kill_training --kills 200

Every method is trained by a forked child, which SIGKILL ends at a random moment: while it trains, writes a checkpoint, reads one, or
validates. The next child resumes; the run's settings (Adam or SGD, schedule, average, cadence) change from run to run. When one comes to
its end, everything it left is compared bit for bit with what the uninterrupted run left: a loss is any difference, and any child that
could not go on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from art_saliency.augmentation import Augmentation
from art_saliency.files import read_tensors
from art_saliency.trainers.options import RunOptions
from art_saliency.training import engine
from tests.method_settings import ROWS, classifier, small_network

CADENCES = ("1 steps", "3 steps", "1 epochs")
AVERAGES = ({}, {"ema": 0.9}, {"swa_from": 0.5}, {"ema": 0.9, "selection": "best"})


@dataclass(frozen=True)
class Plan:
    """One training: what is fixed over its interruptions."""

    method: str
    options: dict[str, Any]
    optimizer: str
    epochs: int = 4
    images: int = 256

    def train(self, folder: Path | None, *, every: str = "1 epochs", result: Path | None = None) -> None:
        """Train, or go on, and write what came of it to `result`."""
        torch.set_num_threads(1)
        np.random.seed(0)  # noqa: NPY002, part of what is restored
        random.seed(0)
        x, y = digits_arrays()
        art_classifier = digits_classifier(self.optimizer)
        trainer = ROWS[self.method].trainer(art_classifier, **ROWS[self.method].settings)
        kept = {} if folder is None else {"checkpoint_dir": folder, "checkpoint_every": every}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collapse and the like: three epochs of nothing
            trainer.fit(
                x[: self.images],
                y[: self.images],
                validation_data=(x[-40:], y[-40:]),
                batch_size=32,
                nb_epochs=self.epochs,
                seed=3,
                verbose=False,
                **self.options,
                **kept,
            )
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history]
        meta = {k: v for k, v in trainer.history.meta.items() if k != "resumed_at"}
        left = {
            "weights": art_classifier.model.state_dict(),
            "kept": trainer.kept_weights,
            "optimizer": art_classifier.optimizer.state_dict(),
            "records": records,
            "meta": repr(meta),
            "random": [random.random(), float(np.random.rand())],  # noqa: NPY002
            "threads": torch.get_num_threads(),
        }
        if result is not None:
            aside = result.with_suffix(".aside")
            torch.save(left, aside)
            os.replace(aside, result)


@cache
def digits_arrays() -> tuple[torch.Tensor, torch.Tensor]:
    source = load_digits()
    return torch.tensor(source.images / 16, dtype=torch.float32)[:, None], torch.tensor(source.target)


def digits_classifier(optimizer: str) -> Any:
    torch.manual_seed(0)
    layers = OrderedDict(small_network(norm=True).named_children())
    head = layers.pop("linear")
    model = nn.Sequential(OrderedDict({**layers, "dropout": nn.Dropout(0.2), "linear": head}))
    made = {
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.01),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
    }
    return classifier(model, optimizer=made[optimizer]())


def plan(method: str, chance: random.Random) -> Plan:
    """:return: A training of that method under settings drawn at random."""
    known = {field.name for field in fields(RunOptions)}
    average = {name: value for name, value in chance.choice(AVERAGES).items() if name in known}
    schedule = chance.choice(["onecycle", "step", "cosine", None])
    options = {
        **average,
        "scheduler": schedule,
        "augment": chance.choice([None, Augmentation(pad=1)]),
        "grad_clip": 1.0,
    }
    return Plan(method, options, chance.choice(["adam", "sgd"]))


def in_child(work: Callable[[], None]) -> int:
    """Fork a child that works and ends. :return: Its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def finished(child: int, seconds: float) -> int | None:
    """Wait for a child. :return: Its exit status, or ``None`` when it still runs."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def same(a: Any, b: Any) -> bool:
    """:return: Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and repr(a) == repr(b)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def last_state(folder: Path) -> dict[str, Any]:
    """:return: The last checkpoint of a run, without timings and without the note of its interruptions."""
    state = read_tensors(max(folder.glob("checkpoint-*.pt")))["state"]
    state["history"]["meta"].pop("resumed_at", None)
    for record in state["history"]["records"]:
        record.pop("seconds")
    return {key: value for key, value in state.items() if key != "seconds"}


def difference(a: Path, b: Path) -> str | None:
    """:return: What differs in two runs' last checkpoints and results; ``None`` when nothing does."""
    pages = [{**last_state(x / "kept"), **torch.load(x / "result.pt", weights_only=True)} for x in (a, b)]
    found = [key for key in dict.fromkeys([*pages[0], *pages[1]]) if not same(pages[0].get(key), pages[1].get(key))]
    return ", ".join(found) or None


@dataclass
class Count:
    """What the killing came to."""

    kills: int = 0
    resumed: int = 0  # in the midst of a training, so that something could be lost
    runs: int = 0
    lives: int = 0
    losses: int = 0


def torment(planned: Plan, place: Path, chance: random.Random, kills: int, count: Count) -> None:
    """Kill one planned training `kills` times, over as many runs as that takes, and count what is lost."""
    whole = place / "whole"
    whole.mkdir(parents=True)
    started = time.monotonic()
    child = in_child(lambda: planned.train(whole / "kept", result=whole / "result.pt"))
    if finished(child, 300) != 0:
        raise RuntimeError(f"{planned}: the uninterrupted training failed")
    took = time.monotonic() - started
    wanted = count.kills + kills
    while count.kills < wanted:
        run = place / f"run{count.runs}"
        run.mkdir()
        count.runs += 1
        status: int | None = None
        while status is None:
            count.lives += 1
            work = partial(planned.train, run / "kept", every=chance.choice(CADENCES), result=run / "result.pt")
            child = in_child(work)
            # Most moments lie within the training; when there were kills enough, the run may come to its end.
            last = count.kills >= wanted
            status = finished(child, 300 if last else chance.uniform(0, took))
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                count.kills += 1
            if last:
                break
        lost = f"a child ended with {status}" if status != 0 else difference(whole, run)
        if lost:
            count.losses += 1
            print(f"LOST: {planned}: {lost} ({run})", flush=True)
        else:
            state = read_tensors(max((run / "kept").glob("checkpoint-*.pt")))["state"]
            count.resumed += sum(step > 0 for step in state["history"]["meta"].get("resumed_at", []))
            shutil.rmtree(run)


def main(argv: list[str] | None = None) -> int:
    """:return: 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many, shared by the methods (default: 200)")
    parser.add_argument("--methods", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        "--seed", type=int, default=0, help="of settings and moments (the latter also depend on the machine)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    engine.Engine("cpu")  # imports what a child would import
    digits_arrays()
    chance, count, started = random.Random(args.seed), Count(), time.monotonic()
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill-training-")))
        for number, method in enumerate(args.methods):
            share = args.kills * (number + 1) // len(args.methods) - args.kills * number // len(args.methods)
            for part in (share // 2, share - share // 2):  # two plans a method
                if part:
                    torment(plan(method, chance), place / f"{method}-{part}-{count.runs}", chance, part, count)
            print(f"{method}: {share} kills; in all {count.kills} kills, {count.losses} losses", flush=True)
    print(
        f"{count.kills} kills over {len(args.methods)} methods, {count.lives} processes, of which at least {count.resumed} went on in the "
        f"midst of a training, {count.runs} runs that came to their end "
        f"in {time.monotonic() - started:.0f} s: {count.losses} losses"
    )
    return 1 if count.losses else 0


if __name__ == "__main__":
    sys.exit(main())
