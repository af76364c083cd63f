"""A run that was interrupted and goes on ends bit for bit like one that was not; and whatever is wrong is said before anything is done."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import threading
import time
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from art_saliency import files, load
from art_saliency.augmentation import Augmentation
from art_saliency.cli import main
from art_saliency.errors import CheckpointError, InputError, NoEffectWarning, NonFiniteLossError, TrainingInterrupted
from art_saliency.files import read_tensors
from art_saliency.methods.baselines import Standard
from art_saliency.trainers import identity
from art_saliency.trainers.network import ClassifierNetwork
from art_saliency.training import Extension, checkpoint
from art_saliency.training.checkpoint import cadence, differences
from tests.kill_training import Count, digits_classifier, finished, in_child, plan, same, torment
from tests.method_settings import ROWS, small_network

STEPS, EPOCHS = 3, 3  # of every run here


class Crash(Exception):  # noqa: N818
    pass


class CrashAt(Extension):
    """Stops a run as an error of the user's would, or by a signal, after a step: before what would follow it is kept."""

    def __init__(self, step: int | None, number: int | None = None) -> None:
        self.step, self.number = step, number

    def after_step(self, run):
        if run.step == self.step:
            if self.number is None:
                raise Crash
            os.kill(os.getpid(), self.number)


def train(digits, folder=None, *, method="fgsm-rs", at=None, number=None, prepare=None, **options):
    """One run: 96 digits, 3 steps an epoch, BatchNorm and dropout, augmentation. :return: Everything it leaves."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    optimizer = options.pop("optimizer", "sgd")
    classifier = options.pop("classifier", None) or digits_classifier(optimizer)
    trainer = ROWS[method].trainer(classifier, **{**ROWS[method].settings, **options.pop("settings", {})})
    if prepare is not None:
        options.update(prepare(classifier))
    x, y = options.pop("x", digits[0][:96]), options.pop("y", digits[1][:96])
    given = {
        "batch_size": 32,
        "nb_epochs": EPOCHS,
        "seed": 5,
        "scheduler": "onecycle",
        "augment": Augmentation(pad=1),
        "validation_data": (digits[2][:20], digits[3][:20]),
        "verbose": False,
        "extensions": [CrashAt(at, number)],
        **({} if folder is None else {"checkpoint_dir": folder}),
        **options,
    }
    loader = given.pop("loader", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*catastrophic overfitting.*")
        if loader is None:
            trainer.fit(x, y, **given)
        else:
            del given["batch_size"]
            trainer.fit_generator(loader(), **given)
    records = [{key: value for key, value in record.items() if key != "seconds"} for record in trainer.history]
    return {
        "weights": classifier.model.state_dict(),
        "optimizer": classifier.optimizer.state_dict(),
        "history": records,
        "meta": {key: value for key, value in trainer.history.meta.items() if key != "resumed_at"},
        "kept": trainer.kept_weights,
        "random": [random.random(), float(np.random.rand())],  # noqa: NPY002
    }


@pytest.fixture(scope="module")
def whole(digits):
    """What the run leaves without any checkpoint."""
    return train(digits)


def kept(folder):
    return sorted(folder.glob("checkpoint-*.pt"))


def weights(classifier):
    return {name: value.clone() for name, value in classifier.model.state_dict().items()}


def test_checkpoints_change_nothing_and_the_last_two_are_kept_plain_and_named_by_their_hash(digits, whole, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-mine.pt").write_text("mine too")
    assert same(train(digits, tmp_path, checkpoint_every="1 steps"), whole)
    (tmp_path / "checkpoint-mine.pt").unlink()
    assert [path.name[:17] for path in kept(tmp_path)] == [
        "checkpoint-000009",
        "checkpoint-000010",
    ]  # and one at step 0
    assert len(list(tmp_path.iterdir())) == 3, "something was left, or a file of the user's taken"
    for path in kept(tmp_path):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.name
        assert torch.load(path, weights_only=True)["state"]["step"] in (8, 9)


@pytest.mark.parametrize("at", range(1, STEPS * EPOCHS + 1))
def test_a_run_that_breaks_after_any_step_ends_like_one_that_did_not(digits, whole, tmp_path, at):
    with pytest.raises(Crash):
        train(digits, tmp_path, at=at, checkpoint_every="1 steps")
    assert read_tensors(kept(tmp_path)[-1])["state"]["step"] == at - 1
    assert same(train(digits, tmp_path), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "j-sigr", "optimizer": "adam"},
        {"method": "fsr", "checkpoint_every": "2 steps"},
        {"method": "adv-gsct", "ema": 0.9, "selection": "best"},
        {"method": "trades", "swa_from": 0.3, "awp": 0.01},
        {"method": "pgd-at", "ema": 0.9, "channels_last": True},
        {"method": "standard", "label_smoothing": 0.1, "patience": 1, "settings": {}},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_methods_and_averages_go_on_too(digits, tmp_path, options):
    expected = train(digits, **{key: value for key, value in options.items() if key != "checkpoint_every"})
    for at in (2, 5, 7):
        with pytest.raises(Crash):
            train(digits, tmp_path, at=at, **{"checkpoint_every": "1 steps", **options})
    assert same(train(digits, tmp_path, **options), expected)


SCHEDULERS = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    "milestones": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.1),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
    "restarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_objects_go_on_and_other_settings_of_theirs_are_refused(digits, tmp_path, name):
    def prepare(classifier):
        return {"scheduler": SCHEDULERS[name](classifier.optimizer)}

    expected = train(digits, prepare=prepare)
    with pytest.raises(Crash):
        train(digits, tmp_path, at=5, prepare=prepare)
    if name == "step":
        with pytest.raises(InputError, match=r"scheduler.gamma: 0.5 then, 0.9 now"):
            train(
                digits,
                tmp_path,
                prepare=lambda c: {"scheduler": torch.optim.lr_scheduler.StepLR(c.optimizer, 1, gamma=0.9)},
            )
    assert same(train(digits, tmp_path, prepare=prepare), expected)


class Jitter(TensorDataset):
    """Images that the loader itself moves, by torch's global generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.01 * torch.rand(())).clamp(0, 1), y


@pytest.mark.parametrize("generator_of", ["nobody", "loader", "sampler", "batch sampler"])
def test_a_data_loader_goes_on_in_the_midst_of_an_epoch(digits, tmp_path, generator_of):
    def loader():
        images = Jitter(digits[0][:96], digits[1][:96])
        generator = None if generator_of == "nobody" else torch.Generator().manual_seed(3)
        if generator_of in ("nobody", "loader"):
            return DataLoader(images, batch_size=32, shuffle=True, generator=generator)
        sampler = RandomSampler(images, generator=generator)
        if generator_of == "sampler":
            return DataLoader(images, batch_size=32, sampler=sampler)
        return DataLoader(images, batch_sampler=BatchSampler(sampler, 32, drop_last=False))

    expected = train(digits, loader=loader)
    for at in (2, 6):
        with pytest.raises(Crash):
            train(digits, tmp_path, at=at, loader=loader, checkpoint_every="1 steps")
    assert same(train(digits, tmp_path, loader=loader), expected)
    if (
        generator_of != "loader"
    ):  # ART's wrapper begins an epoch when it is made, which moves the loader's own generator
        assert same(train(digits, loader=lambda: PyTorchDataGenerator(loader(), size=96, batch_size=32)), expected)
    generator = NumpyDataGenerator(digits[0][:96].numpy(), digits[1][:96].numpy(), batch_size=32)
    with pytest.raises(InputError, match="a torch DataLoader for a run with a checkpoint_dir"):
        train(digits, tmp_path, loader=lambda: generator)


def test_a_run_that_is_over_is_given_back_and_the_same_trainer_can_go_on(digits, whole, tmp_path):
    train(digits, tmp_path)
    before = [path.name for path in kept(tmp_path)]
    assert same(train(digits, tmp_path, at=1, resume="must"), whole), "it was trained again"
    assert [path.name for path in kept(tmp_path)] == before
    classifier = digits_classifier("sgd")
    with pytest.raises(Crash):
        train(digits, tmp_path / "new", at=5, classifier=classifier)
    assert same(train(digits, tmp_path / "new", classifier=classifier), whole)


def test_the_notes_say_where_a_run_was_taken_up(digits, tmp_path):
    for at in (4, 8):
        with pytest.raises(Crash):
            train(digits, tmp_path, at=at)
    train(digits, tmp_path)
    meta = read_tensors(kept(tmp_path)[-1])["state"]["history"]["meta"]
    assert meta["resumed_at"] == [3, 6]


def test_never_starts_anew_and_replaces_what_is_there(digits, whole, tmp_path):
    with pytest.raises(Crash):
        train(digits, tmp_path, at=8, nb_epochs=7, checkpoint_every="1 steps")
    with pytest.raises(Crash):
        train(digits, tmp_path, at=2, resume="never")
    assert [read_tensors(path)["state"]["step"] for path in kept(tmp_path)] == [0]
    assert same(train(digits, tmp_path), whole)


def test_anew_means_anew_also_where_the_run_ends_before_its_own_first_checkpoint(digits, tmp_path):
    """A method with a teacher trains that first: interrupted there, the run goes on with its teacher, not with the old run."""
    train(digits, tmp_path, method="j-sigr", seed=1)

    class Stopped(Exception):  # noqa: N818
        pass

    with pytest.MonkeyPatch.context() as patched:

        def stop(*_, **__):
            raise Stopped

        patched.setattr("art_saliency.trainers.base.teacher_maps", stop)
        with pytest.raises(Stopped):
            train(digits, tmp_path, method="j-sigr", seed=1, resume="never", nb_epochs=2)
    assert kept(tmp_path) == []
    train(digits, tmp_path, method="j-sigr", seed=1, nb_epochs=2)


@pytest.mark.parametrize("name", ["onecycle", "cyclic", "plateau"])
def test_the_same_objects_go_on_though_the_schedule_has_moved_them(digits, tmp_path, name):
    """As in a notebook, after Ctrl-C: rate and momentum stand where the run left them."""
    make = {
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=EPOCHS),
        "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e9),
    }[name]

    def fresh():
        classifier = digits_classifier("sgd")
        return {"classifier": classifier, "scheduler": make(classifier.optimizer)}

    expected, kept_objects = train(digits, **fresh()), fresh()
    with pytest.raises(Crash):
        train(digits, tmp_path, at=8, **kept_objects)
    assert same(train(digits, tmp_path, **kept_objects), expected)


def test_a_seed_that_was_drawn_is_taken_up(digits, tmp_path):
    with pytest.raises(Crash):
        train(digits, tmp_path, at=5, seed=None)
    drawn = read_tensors(kept(tmp_path)[-1])["state"]["history"]["meta"]["seed"]
    expected = train(digits, seed=drawn)
    torch.manual_seed(99)
    resumed = train(digits, tmp_path, seed=None)
    assert resumed["meta"]["seed"] == drawn
    assert same(resumed, expected)


def test_the_thread_count_is_the_interrupted_runs_and_comes_back(digits, tmp_path):
    seen = []

    class Look(Extension):
        def after_step(self, run):
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(Crash):
            train(digits, tmp_path, at=4)
        torch.set_num_threads(2)
        train(digits, tmp_path, extensions=[Look()])
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- damage ---------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garble(path):
    """A file whose hash is right and whose content is none."""
    path.write_bytes(b"nothing")
    path.rename(path.with_name(path.name[:18] + hashlib.sha256(b"nothing").hexdigest() + ".pt"))


@pytest.mark.parametrize("damage", [truncate, flip, garble])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(digits, whole, tmp_path, damage):
    with pytest.raises(Crash):
        train(digits, tmp_path, at=8, checkpoint_every="1 steps")
    older, newest = kept(tmp_path)
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name[:17]}.*resuming from the one before it, {older.name}"):
        resumed = train(digits, tmp_path)
    assert same(resumed, whole)
    assert len(kept(tmp_path)) == 2, "the damaged one is still there"
    for path in kept(tmp_path):
        damage(path)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints can be read.*resume='never'"):
        train(digits, tmp_path)


def test_a_full_disk_is_one_clear_error_and_the_older_checkpoint_is_whole(digits, whole, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    classifier = digits_classifier("sgd")
    rate = classifier.optimizer.param_groups[0]["lr"]
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
        train(digits, tmp_path, classifier=classifier)
    assert classifier.optimizer.param_groups[0]["lr"] == rate
    assert [read_tensors(path)["state"]["step"] for path in kept(tmp_path)] == [0, 3]
    assert len(list(tmp_path.iterdir())) == 2, "a part of a file was left"
    monkeypatch.setattr(files.os, "fsync", real)
    assert same(train(digits, tmp_path), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_folder_is_one_processes_at_a_time_and_free_again_when_that_one_is_killed(digits, whole, tmp_path):
    train(digits, tmp_path, nb_epochs=1, seed=9)
    theirs = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with checkpoint._alone(tmp_path):
            os.write(say, b"!")
            time.sleep(600)
    assert os.read(ready, 1) == b"!"
    try:
        with pytest.raises(CheckpointError, match="another run is kept there now; wait for its end or choose"):
            train(digits, tmp_path, resume="never")
        lock = tmp_path / "checkpoint.lock"
        assert theirs == {path: path.read_bytes() for path in tmp_path.iterdir() if path != lock}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(say)
    assert same(train(digits, tmp_path, resume="never"), whole)
    assert not lock.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_folder_is_one_runs_at_a_time_within_a_process_too_and_a_refused_one_frees_nothing(tmp_path):
    with checkpoint._alone(tmp_path):
        with pytest.raises(CheckpointError, match="another run is kept there now"), checkpoint._alone(tmp_path / "."):
            pass
        if not (child := os.fork()):
            try:
                with checkpoint._alone(tmp_path):
                    os._exit(0)
            except CheckpointError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with checkpoint._alone(tmp_path):
        pass


def test_a_run_that_has_gone_on_since_its_folder_was_read_is_not_taken_back(digits, whole, tmp_path):
    with pytest.raises(Crash):
        train(digits, tmp_path, at=4)
    late = checkpoint.Checkpoints(tmp_path)
    assert same(train(digits, tmp_path), whole)
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"got checkpoint \d+ of a run that has gone on meanwhile"), late:
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_what_a_killed_writer_left_is_cleared_away(digits, tmp_path):
    tmp_path.joinpath(".checkpoint.writing.0123456789abcdef").write_bytes(b"half")
    tmp_path.joinpath("checkpoint.writing").write_bytes(b"whole, but unnamed")
    train(digits, tmp_path, nb_epochs=1)
    assert len(list(tmp_path.iterdir())) == len(kept(tmp_path)) == 2


def test_weights_that_are_not_finite_are_never_kept(digits, tmp_path):
    class Explode(Extension):
        def after_step(self, run):
            if run.step == 5:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(torch.nan)

    with pytest.raises(NonFiniteLossError):
        train(digits, tmp_path, extensions=[Explode()], checkpoint_every="1 steps")
    for path in kept(tmp_path):
        state = read_tensors(path)["state"]
        assert state["step"] <= 4
        assert all(bool(value.isfinite().all()) for value in state["network"].values())


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals_act_as_at_a_terminal():
    """A suite that is started in the background may find SIGINT ignored, which a training respects."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 3, STEPS * EPOCHS])
def test_a_signal_waits_for_the_step_keeps_the_run_and_says_how_to_go_on(digits, whole, tmp_path, number, at):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted, match=f"{number.name} after step {at}.*resume='auto'.*--resume") as caught:
        train(digits, tmp_path, at=at, number=number)
    assert caught.value.exit_code == 128 + number
    assert caught.value.step == at
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_tensors(kept(tmp_path)[-1])["state"]["step"] == at
    assert same(train(digits, tmp_path, resume="must"), whole)


def test_a_second_signal_acts_as_always_and_a_run_without_checkpoints_knows_none(digits, tmp_path):
    class Twice(Extension):
        def after_step(self, run):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # until the interpreter has met it

    for options in ({"folder": tmp_path, "extensions": [Twice()]}, {"at": 2, "number": signal.SIGINT}):
        with pytest.raises(KeyboardInterrupt):
            train(digits, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_no_handler_is_set(digits, whole, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(digits, tmp_path)))
    thread.start()
    thread.join()
    assert same(found[0], whole)


# --- other data, other settings -----------------------------------------------------------------------------------------


def other_network(**changes):
    classifier = digits_classifier("sgd")
    if changes.get("frozen"):
        next(classifier.model.parameters()).requires_grad_(False)
    if changes.get("activation"):
        classifier.model.features[2] = nn.SiLU()
    if wrapped := {name: changes[name] for name in ("preprocessing", "clip_values") if name in changes}:
        return PyTorchClassifier(
            classifier.model,
            nn.CrossEntropyLoss(),
            classifier.input_shape,
            10,
            classifier.optimizer,
            **{"clip_values": (0.0, 1.0), **wrapped},
        )
    return classifier


OTHERS = {
    "batch size": ({"batch_size": 48}, "batch_size: 32 then, 48 now"),
    "epochs": ({"nb_epochs": 4}, "nb_epochs: 3 then, 4 now"),
    "seed": ({"seed": 6}, "seed: 5 then, 6 now"),
    "schedule": ({"scheduler": "cosine"}, "scheduler: onecycle then, cosine now"),
    "no schedule": ({"scheduler": None}, "scheduler: onecycle then, none now"),
    "augmentation": ({"augment": Augmentation(pad=2)}, r"augment: Augmentation\(pad=1.*pad=2"),
    "clipping": ({"grad_clip": 1.0}, "grad_clip: none then, 1.0 now"),
    "average": ({"ema": 0.9}, "ema: none then, 0.9 now"),
    "parameter": ({"settings": {"eps": 0.1}}, "settings.eps: 0.15 then, 0.1 now"),
    "method": ({"method": "pgd-at"}, "method: fgsm-rs then, pgd-at now"),
    "optimizer": ({"optimizer": "adam"}, "optimizer.name: SGD then, Adam now"),
    "rate": (
        {"prepare": lambda c: c.optimizer.param_groups[0].update(lr=0.3) or {}},
        "groups.0.lr: 0.05 then, 0.3 now",
    ),
    "decay": ({"prepare": lambda c: c.optimizer.param_groups[0].update(weight_decay=0) or {}}, "groups.0.weight_decay"),
    "validation": ({"validation_data": None}, "data.validation: 20 images.* then, none now"),
    "frozen": ({"classifier": {"frozen": True}}, "network.frozen.0"),
    "activation": ({"classifier": {"activation": True}}, "network.modules.*SiLU"),
    "preprocessing": ({"classifier": {"preprocessing": (0.5, 0.25)}}, "input: none then, .*preprocessing"),
    "pixel range": ({"classifier": {"clip_values": (0.0, 2.0)}}, r"input: none then, .*2\.0"),
}


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Crash):
        train(digits, folder, at=5)
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_other_settings_are_refused_by_name_and_nothing_changes(digits, interrupted, kind):
    options, words = OTHERS[kind]
    made = other_network(**options["classifier"]) if "classifier" in options else None
    classifier = made or digits_classifier(options.get("optimizer", "sgd"))
    before, found = weights(classifier), {path: path.read_bytes() for path in interrupted.iterdir()}
    with pytest.raises(InputError, match=words) as caught:
        train(digits, interrupted, **{**options, "classifier": classifier})
    assert "resume='never'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(before, weights(classifier))
    assert found == {path: path.read_bytes() for path in interrupted.iterdir()}


def test_another_attack_of_arts_is_another_setting(digits, tmp_path):
    def run(**options):
        classifier = digits_classifier("sgd")
        attack = FastGradientMethod(classifier, **{"eps": 0.1, "batch_size": 32, **options})
        train(digits, tmp_path, method="pgd-at", classifier=classifier, settings={"attack": attack}, nb_epochs=1)

    run()
    with pytest.raises(InputError, match=r"settings\.attack\.eps: 0\.1 then, 0\.2 now"):
        run(eps=0.2)


def test_other_data_is_refused_and_another_cadence_is_not(digits, interrupted, whole):
    x, y = digits[0][:96].clone(), digits[1][:96].clone()
    x[5, 0, 0, 0] += 0.5
    y[3] = (y[3] + 1) % 10
    for changed in ({"x": x}, {"y": y}, {"x": digits[0][:97], "y": digits[1][:97]}):
        with pytest.raises(InputError, match=r"data.training: 96 images, .* then, 9. images.* now"):
            train(digits, interrupted, **changed)
    assert same(train(digits, interrupted, checkpoint_every="2 epochs"), whole)


class Prepared(PreprocessorPyTorch):
    """Pixels that somebody's function and means change."""

    params: ClassVar[list[str]] = ["function", "mean", "verbose"]

    def __init__(self, function, mean, verbose=False):
        super().__init__()
        self.function, self.mean, self.verbose = function, mean, verbose

    def forward(self, x, y=None):
        return self.function(x - self.mean), y


class Smoothed(PreprocessorPyTorch):
    """A step that names no parameter, as ART's spatial smoothing does not."""

    params: ClassVar[list[str]] = []

    def __init__(self, window_size):
        super().__init__()
        self.window_size = window_size

    def forward(self, x, y=None):
        return nn.functional.avg_pool2d(x, self.window_size, 1, self.window_size // 2), y


def described(*steps):
    classifier = PyTorchClassifier(
        small_network(),
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        clip_values=(0.0, 1.0),
        preprocessing_defences=list(steps),
    )
    return identity._input(ClassifierNetwork(classifier))


def test_preprocessing_is_told_apart_by_what_it_does_and_not_by_where_it_lies():
    mean = torch.rand(3, 32, 32)
    for at in (0, 15, 31):
        other = mean.clone()
        other[1, at, at] += 1e-3
        assert described(Prepared(torch.sin, mean)) != described(Prepared(torch.sin, other))
        assert described(Prepared(torch.sin, mean.numpy())) != described(Prepared(torch.sin, other.numpy()))
    first, second = (described(Prepared(lambda x: x, mean.clone(), verbose)) for verbose in (True, False))
    assert first == second, "the place of a function in memory, or what is printed, is no difference"
    assert described(Prepared(torch.sin, mean)) != described(Prepared(torch.cos, mean))
    smooth = [Smoothed(size) for size in (3, 3, 5)]
    assert described(smooth[0]) == described(smooth[1]) != described(smooth[2])


def test_a_changed_rate_is_told_beside_a_scheduler_that_keeps_no_first_one():
    def made(rate, later):
        optimizer = torch.optim.SGD(small_network().parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        optimizer.param_groups[0]["lr"] = later
        return identity._optimizer(optimizer, scheduler)

    assert made(0.1, later=0.1) == made(0.1, later=0.01), "what the scheduler moves is no difference"
    assert made(0.1, later=0.1) != made(0.5, later=0.1)


def test_another_teacher_is_refused(digits, tmp_path):
    def teacher(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return {"teacher": model}

    with pytest.raises(Crash):
        train(digits, tmp_path, at=4, method="j-sigr", settings=teacher(1))
    with pytest.raises(InputError, match="teacher: "):
        train(digits, tmp_path, method="j-sigr", settings=teacher(2))
    train(digits, tmp_path, method="j-sigr", settings=teacher(1), resume="must")


BAD = {
    "resume": ({"resume": "maybe"}, "resume: got 'maybe', expected one of 'auto', 'never', 'must'"),
    "must without a folder": ({"resume": "must"}, "checkpoint_dir: got None"),
    "cadence without a folder": ({"checkpoint_every": 2}, "checkpoint_dir: got None"),
    "no cadence": ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
    "unit": (
        {"checkpoint_every": "2 hours"},
        "checkpoint_every: got '2 hours', expected a number of epochs, '500 steps'",
    ),
    "flag": ({"checkpoint_every": True}, "checkpoint_every: got True"),
    "number for a folder": ({"checkpoint_dir": 3}, "checkpoint_dir: got 3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_words_are_refused_before_any_work(digits, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, words = BAD[kind]
    classifier = digits_classifier("sgd")
    before = weights(classifier)
    with pytest.raises(InputError, match=words):
        train(digits, classifier=classifier, **options)
    assert same(before, weights(classifier))
    assert not list(tmp_path.iterdir())


def test_bad_places_and_states_are_refused_before_any_work(digits, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"checkpoint_dir: got .*file, which is a file"):
        train(digits, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        train(digits, tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(digits, tmp_path / "none", resume="must")
    assert not (tmp_path / "none").exists()

    class Odd(Extension):
        def state_dict(self):
            return {"what": object()}

    with pytest.raises(InputError, match=r"extensions.Odd 0.what of type object"):
        train(digits, tmp_path / "odd", extensions=[Odd()])

    class Stepper:
        def step(self):
            pass

    with pytest.raises(InputError, match=r"Stepper without state_dict\(\)"):
        train(digits, tmp_path / "stepper", scheduler=Stepper())
    train(digits, scheduler=Stepper(), nb_epochs=1)


def test_an_extension_that_kept_something_must_come_back(digits, tmp_path):
    class Counts(Extension):
        count = 0

        def after_step(self, run):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    with pytest.raises(Crash):
        train(digits, tmp_path, extensions=[Counts(), CrashAt(5)])
    with pytest.raises(InputError, match="extensions: got no Counts 0"):
        train(digits, tmp_path)
    counts = Counts()
    train(digits, tmp_path, extensions=[counts])
    assert counts.count == STEPS * EPOCHS


def test_cadences(digits, tmp_path):
    assert cadence(2) == (2, "epochs")
    assert cadence("1 epoch") == (1, "epochs")
    assert cadence(" 600 seconds") == (600, "seconds")
    written = {}
    for every in ("2 epochs", "2 steps", "1000 seconds"):
        train(digits, tmp_path / every, checkpoint_every=every)
        written[every] = int(kept(tmp_path / every)[-1].name[11:17])
    assert written == {"2 epochs": 3, "2 steps": 6, "1000 seconds": 2}  # the first and the last are always written


def test_differences_are_named_to_the_leaf():
    before = {"a": 1, "b": {"c": [1, 2, 3], "d": None}, "e": "x" * 100}
    assert differences(before, before) == []
    now = {"a": 2, "b": {"c": [1, 5], "d": 0}, "e": "x" * 99, "f": True}
    assert differences(before, now) == [
        "a: 1 then, 2 now",
        "b.c.1: 2 then, 5 now",
        "b.c.2: 3 then, none now",
        "b.d: none then, 0 now",
        f"e: {'x' * 57}... then, {'x' * 57}... now",
        "f: none then, True now",
    ]


# --- real processes -----------------------------------------------------------------------------------------------------


def test_killed_processes_lose_nothing(tmp_path):
    """The short form of ``python -m tests.kill_training``."""
    threads, count, chance = torch.get_num_threads(), Count(), random.Random(0)
    for method, kills in (("j-sigr", 1), ("pgd-at", 2)):
        torment(plan(method, chance), tmp_path / method, chance, kills, count)
    assert count.kills == 3
    assert count.losses == 0
    assert torch.get_num_threads() == threads


def test_the_command_line_keeps_a_run_goes_on_and_clears_up(digits, tmp_path, capfd):
    np.savez(
        tmp_path / "few.npz",
        x_train=digits[0][:200].numpy(),
        y_train=digits[1][:200].numpy(),
        x_test=digits[2][:20].numpy(),
        y_test=digits[3][:20].numpy(),
    )
    words = [
        "train",
        "pgd-at",
        "--data",
        str(tmp_path / "few.npz"),
        "--eps",
        "0.1",
        "--epochs",
        "6",
        "--batch-size",
        "32",
    ]
    words += ["--width", "4", "--device", "cpu", "--quiet"]
    whole, broken = str(tmp_path / "whole"), tmp_path / "broken"
    assert main([*words, "--out", whole]) == 0
    assert not (tmp_path / "whole" / "checkpoints").exists()

    def work():
        torch.set_num_threads(1)
        os._exit(main([*words, "--out", str(broken), "--checkpoint-every", "1 step"]))

    child = in_child(work)
    while not kept(broken / "checkpoints"):
        assert finished(child, 0.01) is None
    os.kill(child, signal.SIGTERM)
    assert finished(child, 60) == 143
    assert "--resume" in capfd.readouterr().err
    assert main([*words, "--out", str(broken)]) == 2
    assert "add --resume to go on with it, or --force to start anew" in capfd.readouterr().err
    (broken / "notes.txt").write_text("mine")  # then it is no longer a run's folder alone
    assert main([*words, "--out", str(broken), "--resume"]) == 2
    assert "not empty" in capfd.readouterr().err
    (broken / "notes.txt").unlink()
    (broken / "weights.pt").write_bytes(b"as if killed while it wrote its last files")
    (broken / "checkpoints" / "notes.txt").write_text("mine")
    assert main([*words, "--out", str(broken), "--resume", "--lr", "0.5"]) == 2
    assert "optimizer.groups.0.lr: 0.01 then, 0.5 now" in capfd.readouterr().err
    assert main([*words, "--out", str(broken), "--resume", "--checkpoint-every", "2 years"]) == 2
    assert "checkpoint_every" in capfd.readouterr().err
    assert main([*words, "--out", str(broken), "--resume"]) == 0
    assert same(load(broken).model.state_dict(), load(whole).model.state_dict())
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["notes.txt"], "a file of the user's was taken"
    (broken / "checkpoints" / "notes.txt").unlink()
    (broken / "checkpoints").rmdir()
    assert {path.name for path in broken.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_an_objectives_worry_is_said_once_in_a_run_that_was_interrupted(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Standard, "epoch_warnings", lambda self, record: ["something is off"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Crash):
            train(digits, tmp_path, at=5, method="standard")
        train(digits, tmp_path, method="standard")
    assert len([each for each in caught if "something is off" in str(each.message)]) == 1


def test_a_run_that_ended_early_goes_on_and_is_given_back(digits, tmp_path):
    options = {"patience": 1, "nb_epochs": 8, "prepare": lambda c: c.optimizer.param_groups[0].update(lr=1e-9) or {}}
    expected = train(digits, scheduler=None, **options)
    assert expected["meta"]["weights"]["stopped_early"]
    assert len(expected["history"]) < 8
    with pytest.raises(Crash):
        train(digits, tmp_path, at=4, scheduler=None, **options)
    assert same(train(digits, tmp_path, scheduler=None, **options), expected)
    with pytest.warns(NoEffectWarning, match="is over: its weights were taken and nothing was trained"):
        assert same(train(digits, tmp_path, scheduler=None, **options), expected)
    assert same(train(digits, tmp_path, scheduler=None, resume="must", **options), expected)
