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
from collections.abc import Sequence

from art_saliency.errors import ArtSaliencyError

__all__ = ["on_ranks"]

_PATIENCE = 5.0  # seconds that the others have to end by themselves once one has


def on_ranks(words: Sequence[str], count: int, program: Sequence[str] = (sys.executable, "-m", "art_saliency")) -> int:
    """
    Run ``art-saliency WORDS`` in several processes, as ``torchrun --nproc-per-node`` does, until all have ended.

    :param words: The command's words. :param count: How many processes. :param program: What takes the words.
    :return: 0, or the first process's own exit code for an error that it has explained.
    :raises ArtSaliencyError: When a process died; it is named, and the others are ended.
    """
    with tempfile.TemporaryDirectory() as place:
        environment = _environment(count)
        ranks = [_start([*program, *words], rank, environment, place) for rank in range(count)]
        ended: queue.Queue[int] = queue.Queue()
        for rank, process in enumerate(ranks):
            threading.Thread(target=_await, args=(rank, process, ended), daemon=True).start()
        try:
            for _ in ranks:
                rank = ended.get()
                if ranks[rank].returncode:
                    return _failed(rank, ranks, place)
            return 0
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.terminate()
            for process in ranks:
                _end(process)


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
    environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with open(os.path.join(place, str(rank)), "wb") as quiet:
        return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)


def _await(rank: int, process: subprocess.Popen[bytes], ended: queue.Queue[int]) -> None:
    process.wait()
    ended.put(rank)  # in the order of their ends: the first that failed is the cause


def _failed(rank: int, ranks: list[subprocess.Popen[bytes]], place: str) -> int:
    """Say which process ended first, and what it said. :return: The exit code where the first process has explained it."""
    code = ranks[rank].returncode
    if code > 0 and rank:
        try:
            if ranks[0].wait(_PATIENCE) == code:
                return int(code)  # bad words: all of them refused, and the first one said why
        except subprocess.TimeoutExpired:
            pass
    if code in (2, 130, 143) and rank == 0:
        return int(code)
    if rank:
        with open(os.path.join(place, str(rank)), encoding="utf-8", errors="replace") as said:
            sys.stderr.write(said.read()[-4000:])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise ArtSaliencyError(f"rank {rank} of {len(ranks)} {how}; the other processes were ended and no run was written")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
