"""
The experiments behind the README's and the cards' tables: one JSON a run in ``examples/results/``, tables and figures made from them.

    python examples/benchmark.py run digits                                  every arm and seed that has no file yet
    python examples/benchmark.py run mnist-0.2 --data mnist.npz --seeds 0,1
    python examples/benchmark.py list                                        what there is and what is missing
    python examples/benchmark.py recount digits                              the passes of every arm's step, counted anew
    python examples/benchmark.py pages                                       tables and figures anew, from the files

A run that stands is left alone unless the grid's settings changed, or the grid asks for an audit of it that it lacks: it is then made
again, on a CPU the same to the bit, with the audit. One that is interrupted is run again from its beginning, or, with ``--checkpoints FOLDER``,
its training from where it was; and what is judged anew is not trained anew. ``--jobs N`` makes N runs at a time, side by side on the processors or on the one GPU, with the
same figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.grids import GRIDS, Grid

from art_saliency import _checks
from art_saliency.errors import ArtSaliencyError, TrainingInterrupted

if TYPE_CHECKING:
    from art_saliency.data import DataSet

RESULTS = Path(__file__).parent / "results"


def standing(out: Path, grid: str, name: str, seed: int) -> dict[str, Any] | None:
    """The run, if it is there and was made with the grid's and the method's present settings."""
    from benchmarking.running import file_of, stands

    path = file_of(out, grid, name, seed)
    if not path.is_file():
        return None
    try:
        page: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return page if stands(page) else None
    except (ValueError, KeyError, TypeError):
        got = f"{path}, which is damaged"
        raise _checks.refuse("--out", got, "files as `run` writes them", "take it away: it is made anew") from None


def lacks(page: dict[str, Any] | None, grid: Grid, seed: int) -> bool:
    """:return: Whether there is anything left to do for this run: itself, or the audit that is made of the first seed."""
    return page is None or (seed == 0 and grid.audited > 0 and "audit" not in page)


def _refuse_a_mixture(folder: Path, kind: str) -> None:
    """Runs of one grid are compared with each other: seed by seed, and in their tables."""
    for path in sorted(folder.glob("*.json")):
        made_on = kind
        with contextlib.suppress(ValueError, KeyError, TypeError):  # what is damaged is named where it is read
            made_on = json.loads(path.read_text(encoding="utf-8"))["hardware"]["device"].partition(":")[0]
        if made_on != kind:
            remedy = f"say --device {made_on}, or choose another --out"
            raise _checks.refuse("--device", kind, f"{made_on}, on which {path} was made", remedy)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, seed by seed."""
    from benchmarking.running import read_data

    from art_saliency.cli._common import pick_device

    grid = GRIDS[args.grid]
    arms = grid.arms if args.arms is None else tuple(args.arms.split(","))
    for name in arms:
        if name not in grid.arms:
            raise _checks.refuse("--arms", repr(name), f"some of {', '.join(grid.arms)}")
    _checks.whole("--threads", args.threads, least=1)
    jobs = _checks.whole("--jobs", args.jobs, least=1)
    device = pick_device(args.device)
    _refuse_a_mixture(args.out / args.grid, device.type)
    data = read_data(grid, args.data)  # what is wrong with it is said once, before there are processes
    args.out.mkdir(parents=True, exist_ok=True)
    asked = grid.runs if args.seeds is None else [(name, seed) for seed in args.seeds for name in grid.arms]
    asked = [
        (name, seed)
        for name, seed in asked
        if name in arms and lacks(standing(args.out, args.grid, name, seed), grid, seed)
    ]
    if jobs == 1 or len(asked) < 2:
        return _run_all(args, asked, data)
    with contextlib.ExitStack() as kept:
        if args.checkpoints is None:  # the processes hand each other the surrogates there
            args.checkpoints = Path(kept.enter_context(tempfile.TemporaryDirectory()))
        return _side_by_side(args, asked, min(jobs, len(asked)))


def _run_all(args: argparse.Namespace, asked: Iterable[tuple[str, int]], data: DataSet) -> int:
    import torch
    from benchmarking.running import run_one

    from art_saliency.cli._common import pick_device

    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    for name, seed in asked:
        began = time.perf_counter()
        page = run_one(args.grid, name, seed, data, args.out, device=device, checkpoints=args.checkpoints)
        figures = (page[key]["accuracy"] for key in ("clean", "pgd20", "autoattack", "transfer"))
        print(
            f"{args.grid} {name} seed {seed}: " + " ".join(f"{100 * value:.1f}" for value in figures),
            page.get("audit", {}).get("verdict", ""),
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return 0


def _side_by_side(args: argparse.Namespace, asked: list[tuple[str, int]], jobs: int) -> int:
    """Each of some processes takes the next run that none has. :return: The worst exit status."""
    apart = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    taken = apart.Value("q", 0)
    words = {**vars(args), "act": None}
    processes = [apart.Process(target=_work, args=(words, GRIDS[args.grid], asked, taken)) for _ in range(jobs)]

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if number == signal.SIGTERM and process.is_alive():  # Ctrl-C reaches all of a terminal's anyway
                process.terminate()

    for process in processes:
        process.start()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for process in processes:
            process.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = [process.exitcode or 0 for process in processes]
    return max(128 - code if code < 0 else code for code in ended)  # below 0: by that signal


def _work(words: dict[str, Any], grid: Grid, asked: list[tuple[str, int]], taken: Any) -> None:
    """What each of several processes does."""
    from benchmarking.running import read_data

    args = argparse.Namespace(**words)
    GRIDS[args.grid] = grid

    def next_ones() -> Iterator[tuple[str, int]]:
        while True:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(asked):
                return
            yield asked[number]

    raise SystemExit(_answered(lambda: _run_all(args, next_ones(), read_data(grid, args.data))))


def show(args: argparse.Namespace) -> int:
    """Say what stands and what is missing."""
    for key, grid in GRIDS.items():
        found = {(name, seed): standing(args.out, key, name, seed) for name, seed in grid.runs}
        missing = [f"{name} seed {seed}" for (name, seed), page in found.items() if lacks(page, grid, seed)]
        standing_now = [page for page in found.values() if page]
        audited = sum("audit" in page for page in standing_now)
        print(
            f"{key}: {len(standing_now)} of {len(found)} runs",
            *([f"{audited} of {len(grid.arms)} audits"] if grid.audited else []),
            *([f"next: {missing[0]}"] if missing else []),
            sep="; ",
        )
    return 0


def recount(args: argparse.Namespace) -> int:
    """Count the passes of every arm's step anew; a file that says otherwise is corrected. Nothing is trained."""
    from benchmarking.running import file_of, read_data, recounted

    from art_saliency.files import write_file

    grid = GRIDS[args.grid]
    data = read_data(grid, args.data)
    for name in grid.arms:
        counted = None
        for seed in grid.seeds_of(name):
            page = standing(args.out, args.grid, name, seed)
            if page is None:
                continue
            counted = recounted(args.grid, name, data) if counted is None else counted
            before, page["cost"]["passes_per_step"] = page["cost"]["passes_per_step"], counted
            if before != counted:
                text = json.dumps(page, indent=1).encode()
                write_file(file_of(args.out, args.grid, name, seed), lambda file, text=text: file.write(text))
                print(f"{args.grid} {name} seed {seed}: {before:.4f} -> {counted:.4f}", flush=True)
    return 0


def pages(args: argparse.Namespace) -> int:
    """Write tables and figures."""
    from benchmarking.pages import write_all

    for path in write_all(args.out, Path(__file__).parent.parent):
        print(path)
    return 0


def seeds(words: str) -> list[int]:
    """:return: Of "0,2": [0, 2]."""
    found = [int(word) for word in words.split(",")]
    if min(found) < 0:
        raise ValueError(words)
    return found


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="run what is missing")
    command.add_argument("grid", choices=GRIDS)
    command.add_argument("--data", help="the file of a grid that has no data of its own: an .npz or a folder of .npy")
    command.add_argument("--arms", help="some of the grid's, comma-separated (default: all)")
    command.add_argument("--seeds", type=seeds, help="comma-separated (default: the grid's)")
    command.add_argument(
        "--checkpoints",
        type=Path,
        help="a folder where trainings are kept: an interrupted one is gone on with, a finished one is not trained again",
    )
    command.add_argument(
        "--threads", type=int, default=1, help="of torch; figures depend on it a little (default: %(default)s)"
    )
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each (default: %(default)s)")
    command.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N, one for all runs of a grid (default: cpu)"
    )
    command.set_defaults(act=run)
    command = commands.add_parser(
        "recount", help="count the passes of a step anew, where how they are counted has changed"
    )
    command.add_argument("grid", choices=GRIDS)
    command.add_argument("--data", help="as for run")
    command.set_defaults(act=recount)
    commands.add_parser("list", help="what stands and what is missing").set_defaults(act=show)
    commands.add_parser("pages", help="write tables and figures from the files").set_defaults(act=pages)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=RESULTS, help="the folder of results (default: %(default)s)")
    args = parser.parse_args(argv)
    return _answered(lambda: args.act(args))


def _answered(act: Callable[[], int]) -> int:
    """:return: The exit status of what is done; an error is one line."""
    try:
        return act()
    except TrainingInterrupted as error:
        name = signal.Signals(error.signal).name
        print(f"interrupted by {name} after step {error.step}; the same words go on", file=sys.stderr)
        return error.exit_code
    except ArtSaliencyError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
