"""Several processes that are kept, interrupted, killed and resumed; on one machine and on two nodes; and sets that stay in their files."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from art_saliency import load
from art_saliency.cli import main
from art_saliency.errors import CheckpointError, InputError, TrainingInterrupted
from art_saliency.files import read_tensors
from art_saliency.randomness import RandomSource
from art_saliency.trainers._timing import growth_of
from art_saliency.trainers.identity import digest_of_pair
from art_saliency.training import Extension
from art_saliency.training.batches import ImageView, ResidentBatches
from art_saliency.training.checkpoint import Checkpoints
from art_saliency.training.extensions import Validation
from art_saliency.training.state import changed, digests, own_leaves
from tests.helpers import become_rank, free_port, in_fresh_process
from tests.kill_training import digits_classifier, same
from tests.method_settings import ROWS, classifier

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

STEPS, EPOCHS = 3, 2


def ranks(task, place, *, nodes=1, world=2):
    """
    Fork processes as a launcher would start them.

    :return: Of each its exit status (minus a signal's number) and what `task(rank)` gave, or the error as words.
    """
    port, children = free_port(), []
    for rank in range(world):
        if (child := os.fork()) == 0:
            become_rank(rank, world=world, port=port, nodes=nodes)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                answer = task(rank)
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            (place / f"answer{rank}").write_bytes(pickle.dumps(answer))
            os._exit(0)
        children.append(child)
    found = []
    for rank, child in enumerate(children):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = place / f"answer{rank}"
        found.append((status, pickle.loads(answer.read_bytes()) if answer.exists() else None))
        answer.unlink(missing_ok=True)
    return found


class At(Extension):
    """Something that happens to one rank after a step."""

    def __init__(self, step, rank, action):
        self.step, self.rank, self.action = step, rank, action

    def after_step(self, run):
        if run.step == self.step and run.engine.rank == self.rank:
            self.action()


class Own(Extension):
    """What differs from rank to rank, and must come back as it was."""

    def __init__(self):
        self.seen = []

    def after_step(self, run):
        self.seen.append([run.engine.rank, float(torch.rand(())), random.random(), float(np.random.rand())])  # noqa: NPY002

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def train(digits, rank, folder, *, method="fgsm-rs", extensions=(), loader=False, **options):
    """One rank's part of a run with BatchNorm and dropout. :return: Everything it leaves, as arrays."""
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(rank)  # of its own: what the ranks draw from global generators differs
    art_classifier, own = digits_classifier("sgd"), Own()
    random.seed(rank)
    trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
    given = {
        "nb_epochs": EPOCHS,
        "seed": 5,
        "scheduler": "onecycle",
        "verbose": False,
        "extensions": [own, *extensions],
        "validation_data": (digits[2][:20], digits[3][:20]),
        **({} if folder is None else {"checkpoint_dir": folder, "checkpoint_every": "1 steps"}),
        **options,
    }
    x, y = digits[0][:96], digits[1][:96]
    if loader:
        made = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(3))
        trainer.fit_generator(made, **given)
    else:
        trainer.fit(x, y, **{"batch_size": 32, **given})
    records = [{key: value for key, value in record.items() if key != "seconds"} for record in trainer.history]
    left = {
        "weights": art_classifier.model.state_dict(),
        "optimizer": art_classifier.optimizer.state_dict(),
        "history": records,
        "own": own.seen,
        "next": [random.random(), float(np.random.rand())],  # noqa: NPY002
    }
    return pickle.loads(pickle.dumps(left))


def kept(folder):
    return sorted(folder.glob("checkpoint-*.pt"))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def imported(digits):
    """What every child would import, and the parent has once."""
    train(digits, 0, None, nb_epochs=1)
    import torch.nn.parallel.distributed  # noqa: F401


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """What two ranks leave without any checkpoint."""
    found = ranks(lambda rank: train(digits, rank, None), tmp_path_factory.mktemp("whole"))
    assert [status for status, _ in found] == [0, 0]
    assert same(found[0][1]["weights"], found[1][1]["weights"])
    assert not same(found[0][1]["own"], found[1][1]["own"]), "nothing would show whose random states come back"
    return found


def test_checkpoints_of_two_ranks_change_nothing_and_rank_0_alone_writes(digits, whole, tmp_path):
    writers = []

    def task(rank):
        from art_saliency import files

        real = files.os.replace
        files.os.replace = lambda *paths: writers.append(paths) or real(*paths)
        left = train(digits, rank, tmp_path / "kept")
        return left, len(writers)

    found = ranks(task, tmp_path)
    assert same([left for _, (left, _) in found], [left for _, left in whole])
    assert found[0][1][1] > 0
    assert found[1][1][1] == 0
    content = read_tensors(kept(tmp_path / "kept")[-1])
    places = {place[0] for place in content["others"][0]}
    assert len(content["others"]) == 1
    assert {"random", "extensions"} <= places
    assert not places & {"optimizer", "step", "epoch"}, "what is the same everywhere is kept twice"


@pytest.mark.parametrize("at", [2, 4])
def test_two_killed_ranks_go_on_bit_for_bit(digits, whole, tmp_path, at):
    def die(rank):
        train(digits, rank, tmp_path / "kept", extensions=[At(at, rank, kill)])

    assert [status for status, _ in ranks(die, tmp_path)] == [-9, -9]
    step = read_tensors(kept(tmp_path / "kept")[-1])["state"]["step"]
    assert step in (at - 1, at - 2), "the last one may have been on its way"
    found = ranks(lambda rank: train(digits, rank, tmp_path / "kept", resume="must"), tmp_path)
    assert same(found, whole)


def test_three_ranks_go_on_bit_for_bit_too(digits, tmp_path):
    """A sum of three numbers depends on their order, which DDP's buckets must not decide."""
    expected = ranks(lambda rank: train(digits, rank, None, batch_size=36), tmp_path, world=3)
    folder = tmp_path / "kept"

    def die(rank):
        train(digits, rank, folder, batch_size=36, extensions=[At(4, rank, kill)])

    assert [status for status, _ in ranks(die, tmp_path, world=3)] == [-9, -9, -9]
    assert same(ranks(lambda rank: train(digits, rank, folder, batch_size=36), tmp_path, world=3), expected)


def test_methods_loaders_and_averages_of_two_ranks_go_on_too(digits, tmp_path):
    for number, options in enumerate(({"method": "j-sigr", "ema": 0.9, "selection": "best"}, {"loader": True})):
        place = tmp_path / str(number)
        place.mkdir()
        expected = ranks(lambda rank, options=options: train(digits, rank, None, **options), place)

        def task(rank, options=options, place=place, **more):
            return train(digits, rank, place / "kept", **options, **more)

        ranks(lambda rank, task=task: task(rank, extensions=[At(4, rank, kill)]), place)
        assert same(ranks(task, place), expected), options


@pytest.mark.parametrize(("number", "of"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
@pytest.mark.parametrize("at", [2, STEPS])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(digits, whole, tmp_path, number, of, at):
    def interrupted(rank):
        action = At(at, of, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingInterrupted, match=f"{number.name} after step {at} and is kept.*--resume") as caught:
            train(digits, rank, tmp_path / "kept", extensions=[action])
        return caught.value.step, caught.value.exit_code

    assert ranks(interrupted, tmp_path) == [(0, (at, 128 + number))] * 2
    assert read_tensors(kept(tmp_path / "kept")[-1])["state"]["step"] == at
    assert same(ranks(lambda rank: train(digits, rank, tmp_path / "kept"), tmp_path), whole)


def test_another_number_of_ranks_is_refused_and_names_both(digits, tmp_path):
    folder = tmp_path / "kept"
    ranks(lambda rank: train(digits, rank, folder, extensions=[At(3, rank, kill)]), tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"processes: 2 then, 1 now.*resume='never'"):
        train(digits, 0, folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    alone = tmp_path / "alone"
    train(digits, 0, alone, nb_epochs=1)
    for _, said in ranks(lambda rank: train(digits, rank, alone, nb_epochs=1), tmp_path):
        assert said.startswith("InputError: resume: got a run that differs")
        assert "processes: 1 then, 2 now" in said


def test_a_full_disk_under_rank_0_is_told_to_all(digits, whole, tmp_path):
    def task(rank):
        from art_saliency import files

        real, calls = files.os.fsync, []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            real(descriptor)

        files.os.fsync = full
        with pytest.raises(CheckpointError) as caught:
            train(digits, rank, tmp_path / "kept")
        return str(caught.value)

    (_, first), (_, second) = ranks(task, tmp_path)
    assert "No space left on device" in first
    assert "rank 0 could not write there" in second
    assert same(ranks(lambda rank: train(digits, rank, tmp_path / "kept"), tmp_path), whole)


def test_a_rank_without_the_folder_goes_on_from_what_rank_0_has_read(digits, whole, tmp_path):
    """Nodes need not share a disk."""
    folders = [tmp_path / "kept", tmp_path / "elsewhere"]
    ranks(lambda rank: train(digits, rank, folders[rank], extensions=[At(4, rank, kill)]), tmp_path)
    assert not folders[1].exists()
    assert same(ranks(lambda rank: train(digits, rank, folders[rank], resume="must"), tmp_path), whole)
    assert not folders[1].exists()


def test_the_others_states_are_kept_as_what_differs():
    one = {"a": {"x": torch.zeros(3), "y": [1, 2.5, (None, "s")]}, "b": {}, "c": [torch.ones(())], "d": float("nan")}
    other = {
        "a": {"x": torch.tensor([0.0, 0.0, -0.0]), "y": [1, 2.5, (None, "t")]},
        "b": {"new": 1},
        "c": [torch.ones(())],
    }
    other["d"] = float("nan")
    own = own_leaves(other, digests(one))
    assert own.keys() == {("a", "x"), ("a", "y", 2, 1), ("b",)}
    assert same(changed(one, own), other)
    assert own_leaves(one, digests(one)) == {}


# --- command line and nodes -----------------------------------------------------------------------------------------------

WORDS = "train pgd-at --data digits --eps 0.1 --set max_iter=1 --width 4 --device cpu --batch-size 128 --quiet --epochs 2".split()  # noqa: SIM905


def test_two_nodes_train_as_two_devices_of_one_that_were_killed_and_went_on(tmp_path):
    """The nodes are torchrun's, on one machine; without a resume a folder with an interrupted run is refused by both ranks."""
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*WORDS, "--checkpoint-every", "2 steps", "--out"]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(rank), "-m", "art_saliency", *words, str(tmp_path / "nodes")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    job = [*words, str(tmp_path / "job"), "--devices", "2"]

    def killed(rank):
        real = Checkpoints.after_step
        Checkpoints.after_step = lambda self, run: kill() if run.step == 9 else real(self, run)
        main(job)

    assert [status for status, _ in ranks(killed, tmp_path)] == [-9, -9]
    assert ranks(lambda rank: main(job), tmp_path) == [(0, 2), (0, 2)]
    assert ranks(lambda rank: main([*job, "--resume"]), tmp_path) == [(0, 0), (0, 0)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "Next: art-saliency evaluate" in said[0]
    assert "art-saliency" not in said[1]
    assert same(load(tmp_path / "job").model.state_dict(), load(tmp_path / "nodes").model.state_dict())
    names = {path.name for path in (tmp_path / "job").iterdir()}
    assert {path.name for path in (tmp_path / "nodes").iterdir()} == names == {"weights.pt", "best.pt", "run.json"}


# --- sets that stay in their files ----------------------------------------------------------------------------------------


def peaks_of_training(images, place):
    """
    Megabytes that an epoch over a mapped file takes at most, beyond those of one over a few images: whole, and with a tenth held
    out and checkpoints kept.
    """
    file = Path(place) / f"{images}.npy"
    x = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(images, 3, 32, 32))
    x[0] = 255  # the rest takes no room on the disk
    del x
    mapped, labels = np.lib.format.open_memmap(file, mode="r"), np.arange(images) % 10
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    trainer = ROWS["standard"].trainer(classifier(model, input_shape=(3, 32, 32)))
    common = {"batch_size": 256, "nb_epochs": 1, "seed": 0, "verbose": False}
    trainer.fit(np.array(mapped[:8192]), labels[:8192], validation_split=0.1, **common)
    options = ({}, {"validation_split": 0.1, "checkpoint_dir": Path(place) / f"{images}"})
    turns = [lambda kept=kept: trainer.fit(mapped, labels, **common, **kept) or 0.0 for kept in options]
    found = [growth_of(turn, torch.device("cpu")) / 2**20 for turn in turns]
    file.unlink()
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="anonymous memory is Linux's word")
def test_memory_does_not_grow_with_a_set_in_a_file(tmp_path):
    """What may grow is a permutation and the labels; the held-out tenth is looked at 4 MB at a time, which it exceeds in both."""
    small, large = (
        in_fresh_process("test_ranks", f"peaks_of_training({images}, {str(tmp_path)!r})")
        for images in (120_000, 360_000)
    )
    assert [after - before < 15 for before, after in zip(small, large, strict=True)] == [True, True], (small, large)
    assert max(large) < 50


def test_a_view_gives_the_images_of_its_places_in_the_range_asked_for():
    source = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).double()
    places = torch.tensor([3, 17, 4, 4, 11])
    view = ImageView(source, places, lambda images: images.float() / 255)
    expected = source[places].float() / 255
    assert (len(view), view.shape, view.dtype) == (5, expected.shape, torch.float32)
    assert torch.equal(view[torch.tensor([4, 0])], expected[[4, 0]])
    assert torch.equal(view[1:3], expected[1:3])
    assert torch.equal(view.among(torch.tensor([2, 1]))[:], expected[[2, 1]])
    assert torch.equal(view.to(torch.device("cpu")), expected)
    labels = torch.arange(5)
    assert digest_of_pair(view, labels) == digest_of_pair(expected, labels)


def test_batches_of_a_view_are_those_of_a_copy_and_number_the_images_of_the_view():
    x = torch.rand(40, 1, 4, 4)
    places = torch.randperm(40)[:27]
    maps = torch.arange(27.0).view(27, 1, 1, 1)
    made = [
        ResidentBatches(images, torch.arange(27), batch_size=8, device=torch.device("cpu"), maps=maps)
        for images in (ImageView(x, places), x[places])
    ]
    for mine, yours in zip(*(batches.epoch(RandomSource(0)) for batches in made), strict=True):
        assert torch.equal(mine.x, yours.x)
        assert torch.equal(mine.y, mine.index), "the place in the view"
        assert torch.equal(mine.maps.flatten(), mine.index.float())


def test_a_mapped_set_trains_as_its_copy_does_in_any_range_and_with_maps(tmp_path, digits):
    for method, scale, dtype in (("standard", 255.0, np.float64), ("j-sigr", 1.0, np.float32)):
        np.save(tmp_path / "x.npy", (digits[0][:100].numpy() * scale).astype(dtype))
        weights = []
        for mode in (None, "r"):
            x = np.load(tmp_path / "x.npy", mmap_mode=mode)
            art_classifier = classifier(clip_values=(0.0, scale))
            trainer = ROWS[method].trainer(art_classifier, **({} if method == "standard" else {"eps": 0.15}))
            trainer.fit(
                x,
                digits[1][:100],
                validation_split=0.2,
                batch_size=20,
                nb_epochs=2,
                seed=1,
                verbose=False,
                selection="best",
            )
            weights.append((art_classifier.model.state_dict(), trainer.history.column("validation_accuracy")))
        assert same(*weights), method


def test_validation_in_pieces_counts_every_image_once(monkeypatch, digits):
    from art_saliency.training import extensions

    class Run:
        epoch, epochs, random = 0, 1, RandomSource(0)
        candidate = classifier().model

    records = []
    for piece in (1 << 26, 1):
        monkeypatch.setattr(extensions, "_PIECE", piece)
        record = {}
        Validation(digits[0][:333], digits[1][:333], threat=None, batch_size=50).after_epoch(Run(), record)
        records.append(record["validation_accuracy"])
    assert records[0] == records[1]
    with torch.no_grad():
        right = int((Run.candidate(digits[0][:333]).argmax(1) == digits[1][:333]).sum())
    assert records[0] == right / 333
