"""``--devices N``: the same command in N processes of this machine, one of which speaks and writes."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from art_saliency.errors import ArtSaliencyError

__all__ = ["on_ranks"]

_PATIENCE = 5.0  # seconds that the others have to end by themselves once one has
_KEPT = (130, 143)  # exit codes of a run that a signal ended and that was kept


def on_ranks(words: Sequence[str], count: int, program: Sequence[str] = (sys.executable, "-m", "art_saliency")) -> int:
    """
    Run ``art-saliency WORDS`` in several processes, as ``torchrun --nproc-per-node`` does, until all have ended.

    SIGINT, SIGTERM and SIGHUP are for the first process, which lets the others know and keeps the run; a second one ends them all.

    :param words: The command's words. :param count: How many processes. :param program: What takes the words.
    :return: 0, or the first process's own exit code for an error that it has explained.
    :raises ArtSaliencyError: When a process died; it is named, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as place:
        environment = _environment(count)
        ranks: list[subprocess.Popen[bytes]] = []
        ended: queue.Queue[int] = queue.Queue()
        with _handing_on(ranks) as signals:
            try:
                for rank in range(count):
                    ranks.append(_start([*program, *words], rank, environment, place))
                    threading.Thread(target=_await, args=(rank, ranks[rank], ended), daemon=True).start()
                for _ in ranks:
                    rank = ended.get()
                    if signals:
                        return _interrupted(ranks[0], signals[0])
                    if ranks[rank].returncode:
                        return _failed(rank, ranks, place)
                return 0
            finally:
                for process in ranks:
                    if process.poll() is None:
                        process.terminate()
                for process in ranks:
                    _end(process)


@contextmanager
def _handing_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """:return: The signals that came meanwhile; the first is handed on to the first process, the next to all."""
    met: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        met.append(number)
        for process in ranks[: 1 if len(met) == 1 else None]:
            if process.poll() is None:
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, hand_on)
    try:
        yield met
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(first: subprocess.Popen[bytes], number: int) -> int:
    """Wait for the first process, which keeps the run. :return: Its exit code, as shells have it where a signal ended it."""
    code = first.wait()
    return 128 + number if code < 0 else int(code)


def _environment(count: int) -> dict[str, str]:
    """:return: What torch's and Lightning's distributed parts read, the same for every process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    own = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": f"art-saliency-{os.getpid()}",
    }
    threads = str(max(1, (os.cpu_count() or 1) // count))  # else every process takes all cores
    return {"OMP_NUM_THREADS": threads, **os.environ, **own}


def _start(command: list[str], rank: int, environment: dict[str, str], place: str) -> subprocess.Popen[bytes]:
    """Start one process, out of the terminal's reach: Ctrl-C is for the one that started it, which hands it on once."""
    environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with open(os.path.join(place, str(rank)), "wb") as quiet:
        return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def _await(rank: int, process: subprocess.Popen[bytes], ended: queue.Queue[int]) -> None:
    process.wait()
    ended.put(rank)  # in the order of their ends: the first that failed is the cause


def _failed(rank: int, ranks: list[subprocess.Popen[bytes]], place: str) -> int:
    """Say which process ended first, and what it said. :return: The exit code where the first process has explained it."""
    code = ranks[rank].returncode
    if code > 0 and rank:
        try:
            if ranks[0].wait(12 * _PATIENCE if code in _KEPT else _PATIENCE) == code:
                return int(code)  # bad words, or a signal: all of them ended so, and the first one said why
        except subprocess.TimeoutExpired:
            pass
    if code in (2, *_KEPT) and rank == 0:
        return int(code)
    if rank:
        with open(os.path.join(place, str(rank)), encoding="utf-8", errors="replace") as said:
            sys.stderr.write(said.read()[-4000:])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise ArtSaliencyError(
        f"rank {rank} of {len(ranks)} {how}; the other processes were ended and no run was written; to go on where it was last "
        f"kept, add --resume to the same words"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
