"""Folders of images that are never in memory: the pixels of load_data, places, shares of ranks, and what a process holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import art_saliency.data as data_module
import art_saliency.image_folders as folders_module
import art_saliency.streaming as streaming
from art_saliency import load
from art_saliency.cli import main
from art_saliency.data import DataSet, load_data
from art_saliency.errors import ArtSaliencyError, CheckpointError, InputError
from art_saliency.streaming import StreamedSet, open_data, split_augmentation
from art_saliency.trainers._timing import growth_of
from art_saliency.trainers.methods import StandardTrainer
from art_saliency.trainers.runs import make_classifier
from art_saliency.training.extensions import Extension
from tests.helpers import in_fresh_process


def pictures(folder: Path, *, train: int = 20, test: int = 6, side: int = 12) -> Path:
    """Noise of different sizes in three classes; the first pixel of each quadrant of an image is its own."""
    rng = np.random.default_rng(train)
    for part, count in (("train", train), ("val", test)):
        for number in range(count):
            place = folder / part / f"class {number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (side, side + number % 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"é {number}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures")


def test_what_is_taken_is_what_load_data_reads(folder):
    here, streamed = load_data(folder, size=8), StreamedSet(folder, size=8)
    for name in ("name", "input_shape", "num_classes", "class_names"):
        assert getattr(streamed, name) == getattr(here, name)
    assert torch.equal(streamed.y_train, here.y_train)
    assert torch.equal(streamed.y_test, here.y_test)
    assert streamed.x_test.shape == here.x_test.shape
    assert streamed.x_test.dtype == here.x_test.dtype
    for key in (slice(None), slice(1, 5, 2), [4, 0, 4], torch.tensor([2]), 3, -1, slice(3, 3)):
        assert torch.equal(streamed.x_test[key], here.x_test[key])
    x, y = shown(streamed.training_loader(batch_size=7, seed=0))
    assert sorted_images(x, y) == sorted_images(here.x_train, here.y_train)
    for moment in ("mean", "std"):
        assert getattr(streamed, moment)() == pytest.approx(getattr(here, moment)(), abs=1e-7)


def shown(loader: object) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def sorted_images(x: Tensor, y: Tensor) -> list[tuple[bytes, int]]:
    return sorted((image.numpy().tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def test_moments_of_a_large_set_are_those_of_images_at_even_distances(folder, monkeypatch):
    monkeypatch.setattr(streaming, "_SAMPLE", 3)
    here, streamed = load_data(folder, size=8), StreamedSet(folder, size=8)
    pixels = here.x_train[[0, 10, 19]].double() / 255  # 9.5 is rounded to even
    assert streamed.mean() == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert streamed.std() == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1, correction=0).tolist())


def test_what_is_held_out_is_decoded_stratified_bounded_and_never_trained_on(folder, monkeypatch):
    here, streamed = load_data(folder, size=8), StreamedSet(folder, size=8)
    places, (x, y) = streamed.hold_out(0.3, seed=1)
    (kept, labels), (held, held_labels) = here.split(0.3, seed=1)
    assert torch.equal(x, held)
    assert torch.equal(y, held_labels)
    assert sorted_images(*shown(streamed.training_loader(places, batch_size=5, seed=2))) == sorted_images(kept, labels)
    monkeypatch.setattr(streaming, "HELD_OUT_LIMIT", 3)
    places, (x, y) = streamed.hold_out(0.9, seed=1)
    assert (len(places), len(x)) == (17, 3)
    assert sorted(y.tolist()) == [0, 1, 2]
    for share in (0, 1, "half"):
        with pytest.raises(InputError, match="validation_split"):
            streamed.hold_out(share, seed=0)


def test_the_order_and_the_crops_follow_the_seed_and_the_epoch(folder):
    streamed = StreamedSet(folder, size=8)

    def epochs(seed: int, **options: bool) -> list[Tensor]:
        loader = streamed.training_loader(batch_size=6, seed=seed, **options)
        return [shown(loader)[0] for _ in range(2)]

    first, second = epochs(0)
    assert all(torch.equal(a, b) for a, b in zip(epochs(0), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(1)[0])
    cropped, again = epochs(0, random_crop=True), epochs(0, random_crop=True)
    assert torch.equal(cropped[0], again[0])
    assert not {image.numpy().tobytes() for image in cropped[0]} & {image.numpy().tobytes() for image in first}


@pytest.mark.parametrize(("batch_size", "sizes"), [(6, [6, 6, 6]), (8, [8, 8, 4]), (20, [20]), (16, [16, 4])])
def test_ranks_decode_their_own_rows_of_the_same_batches(folder, batch_size, sizes, monkeypatch):
    streamed = StreamedSet(folder, size=8)
    options = {"batch_size": batch_size, "seed": 3, "random_crop": True}
    whole = [shown([batch]) for batch in streamed.training_loader(**options)][: len(sizes)]
    decoded: list[str] = []
    real = folders_module._decoded
    monkeypatch.setattr(folders_module, "_decoded", lambda file: decoded.append(file) or real(file))
    ranks = [list(streamed.training_loader(**options, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(y) for _, y in ranks[0]] == sizes  # 20 = 3 * 6 + 2 leaves each of two processes one image: left out
    assert len(decoded) == len(set(decoded)) == sum(sizes)  # each by one process, once
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *ranks, strict=True):
        half = len(y) // 2
        assert torch.equal(torch.cat([x0[:half], x1[half:]]), x)
        assert not x0[half:].any()
        assert not x1[:half].any()
        assert torch.equal(y0, y)
        assert torch.equal(y1, y)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named_in_one_line_whoever_decodes_it(folder, workers):
    bad = folder / "train" / "class 1" / "é 4.png"
    bad.write_bytes(bad.read_bytes()[:60])
    loader = StreamedSet(folder, size=8).training_loader(batch_size=4, seed=0, num_workers=workers)
    with pytest.raises(CheckpointError) as caught:
        list(loader)
    assert re.fullmatch(rf"{re.escape(str(bad))}: got nothing readable \(.*\), expected [^\n]*", str(caught.value))


def test_the_fingerprint_moves_with_names_lengths_and_the_size_alone(folder):
    known = StreamedSet(folder, size=8).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", known)
    assert StreamedSet(folder, size=9).fingerprint() != known
    file = next((folder / "train" / "class 1").iterdir())
    os.utime(file, (0, 0))
    assert StreamedSet(folder, size=8).fingerprint() == known
    file.write_bytes(content := file.read_bytes() + b"\0")
    longer = StreamedSet(folder, size=8).fingerprint()
    file.write_bytes(content[:-1])
    assert longer != known == StreamedSet(folder, size=8).fingerprint()
    file.rename(file.with_name("other.png"))
    assert StreamedSet(folder, size=8).fingerprint() not in (known, longer)


def test_a_large_folder_is_streamed_and_what_wants_it_at_once_is_refused(folder, monkeypatch):
    assert isinstance(open_data(folder, size=8), DataSet)
    assert isinstance(open_data(folder, size=8, stream=True), StreamedSet)
    assert isinstance(open_data("digits"), DataSet)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 20 * 3 * 8 * 8 - 1)
    streamed = open_data(folder, size=8)
    assert isinstance(streamed, StreamedSet)
    assert isinstance(open_data(folder, size=7), DataSet)
    for name in ("x_train", "split"):
        with pytest.raises(InputError, match=r"x_train: got all 20 images .*--no-surrogates"):
            getattr(streamed, name) if name == "x_train" else streamed.split(0.1, 0)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 5 * 3 * 8 * 8)
    assert len(streamed.x_test[:5]) == 5
    with pytest.raises(InputError, match=r"images: got 6 at once, expected at most 5.*--images"):
        streamed.x_test[:]


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [("digits", None, "stream: got 'digits', expected a folder of images"), ("here", None, "size: got None"), ("here", 0, "size: got 0")],
)  # fmt: skip
def test_what_cannot_be_streamed_is_refused(folder, spec, size, message):
    with pytest.raises(InputError, match=message):
        open_data(folder if spec == "here" else spec, size=size, stream=True)


def test_random_crops_are_for_streams():
    assert split_augmentation("resized-crop", streamed=True) == (True, "none")
    assert split_augmentation("resized-crop-flip", streamed=True) == (True, "flip")
    assert split_augmentation("crop-flip", streamed=True) == split_augmentation("crop-flip", streamed=False)
    with pytest.raises(InputError, match=r"augment: got 'resized-crop', expected none, .*--stream"):
        split_augmentation("resized-crop", streamed=False)


# ---- training -------------------------------------------------------------------------------------------------------


def tiny(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=max(1, size // 8)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def trainer_of(size: int) -> StandardTrainer:
    model = tiny(size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return StandardTrainer(make_classifier(model, input_shape=(3, size, size), num_classes=3, optimizer=optimizer))


class Watch(Extension):
    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def after_step(self, run: object) -> None:
        self.look()


def test_an_interrupted_stream_goes_on_bit_for_bit(folder, tmp_path):
    def fit(steps: int | None, **options: object) -> dict[str, Tensor]:
        trainer, left = trainer_of(8), iter(range(10**6 if steps is None else steps))

        def count() -> None:
            if next(left, None) is None:
                raise InterruptedError

        loader = StreamedSet(folder, size=8).training_loader(batch_size=6, seed=4, random_crop=True)
        trainer.fit_generator(loader, nb_epochs=3, seed=0, verbose=False, extensions=[Watch(count)], **options)
        return trainer.get_classifier().model.state_dict()

    kept = {"checkpoint_dir": tmp_path / "kept", "checkpoint_every": "1 steps"}
    expected = fit(None)
    with pytest.raises(InterruptedError):
        fit(5, **kept)  # in the second epoch of three batches each (the last two images go together)
    for name, value in fit(None, **kept, resume="must").items():
        assert torch.equal(value, expected[name])
    with pytest.raises(InterruptedError):
        fit(5, checkpoint_dir=tmp_path / "other", checkpoint_every="1 steps")
    next((folder / "train" / "class 0").iterdir()).write_bytes((folder / "train" / "class 1" / "é 1.png").read_bytes())
    with pytest.raises(ArtSaliencyError, match="content"):
        fit(None, checkpoint_dir=tmp_path / "other", checkpoint_every="1 steps", resume="must")


def test_the_command_streams_trains_and_evaluates(folder, tmp_path, capsys):
    run, common = str(tmp_path / "run"), ["--device", "cpu", "--quiet"]
    words = ["train", "pgd-at", "--data", str(folder), "--size", "8", "--stream", "--workers", "0", "--eps", "0.05"]
    words += ["--set", "max_iter=1", "--network", "small-cnn", "--width", "4", "--epochs", "1", "--batch-size", "8"]
    assert main([*words, "--augment", "resized-crop-flip", "--normalise", "--out", run, *common]) == 0
    page = json.loads((tmp_path / "run" / "run.json").read_text())
    assert page["data"]["streamed"] is True
    assert page["data"]["fingerprint"] == StreamedSet(folder, size=8).fingerprint()
    assert page["recipe"]["augment"] == "resized-crop-flip"
    assert "validation_robust_accuracy" in page["history"]["epochs"][0]
    assert load(run).nb_classes == 3
    assert main(["explain", run, "--index", "5", "--maps", "loss-gradient", *common]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--full", *common]) == 2
    assert "--no-surrogates" in capsys.readouterr().err
    next((folder / "train" / "class 0").iterdir()).unlink()
    assert main(["evaluate", run, *common]) == 2
    assert "with other content than in training" in capsys.readouterr().err


def peak(folder: str, count: int, streamed: bool) -> float:
    """Of anonymous memory in training, beyond the start: four times the pictures would take 29 MB more if they were kept."""
    path = pictures(Path(folder) / f"{count}-{streamed}", train=count, test=3, side=8)
    common = {"nb_epochs": 1, "seed": 0, "verbose": False}
    if streamed:
        loader = StreamedSet(path, size=128).training_loader(batch_size=8, seed=0)
        return growth_of(lambda: trainer_of(128).fit_generator(loader, **common) or 0.0, torch.device("cpu")) / 1e6

    def in_memory() -> float:
        data = load_data(path, size=128)
        trainer_of(128).fit(data.x_train, data.y_train, batch_size=8, **common)
        return 0.0

    return growth_of(in_memory, torch.device("cpu")) / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    few, many, kept = (
        in_fresh_process("test_streaming", f"peak({str(tmp_path)!r}, {count}, {streamed})")
        for count, streamed in ((200, True), (800, True), (800, False))
    )
    assert many - few < 8
    assert kept - many > 20
