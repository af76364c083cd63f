"""Data sets from every source, what is refused and how; augmentation against a loop over every pixel."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import art_saliency.data as data_module
from art_saliency.augmentation import AUGMENTATIONS
from art_saliency.data import (
    Augmentation,
    DataSet,
    augmentation_by_name,
    held_out_count,
    image_folder_loader,
    load_data,
    stratified_split,
    to_unit,
)
from art_saliency.errors import CheckpointError, InputError, MissingDependencyError
from art_saliency.randomness import RandomSource

NAMES = ("x_train", "y_train", "x_test", "y_test")


def arrays(
    n_train: int = 12, n_test: int = 6, shape: tuple[int, ...] = (3, 8, 6), seed: int = 0
) -> dict[str, np.ndarray]:
    """Random uint8 images in NCHW with three classes."""
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (n_train, *shape), dtype=np.uint8),
        "y_train": np.arange(n_train) % 3,
        "x_test": rng.integers(0, 256, (n_test, *shape), dtype=np.uint8),
        "y_test": np.arange(n_test) % 3,
    }


def npz(folder: Path, name: str = "set.npz", **changes: object) -> Path:
    """Write `arrays()` with changes; a change to None leaves the array out."""
    content = {**arrays(), **changes}
    np.savez(folder / name, **{key: value for key, value in content.items() if value is not None})
    return folder / name


def npy(folder: Path, content: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in content.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def check_one_sentence(error: BaseException) -> None:
    """One line that says what was got and what was expected, and no second sentence."""
    text = str(error)
    assert re.fullmatch(r".*got .*expected .*", text), text  # no line break
    assert ". " not in text, text


# ---- digits, splits, statistics -----------------------------------------------------------------------------------


def test_digits_are_scikit_learns_scaled_exactly_and_split_by_class():
    from sklearn.datasets import load_digits

    digits = load_data("digits")
    source = load_digits()
    assert digits.x_train.shape == (1437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == torch.float32
    assert digits.input_shape == (1, 8, 8)
    assert digits.num_classes == 10
    # Every image with its label is there exactly once, and 16 is exactly 1.
    images = torch.cat([digits.x_train, digits.x_test]).double().mul(16).flatten(1).numpy()
    found = Counter(
        (row.tobytes(), int(y)) for row, y in zip(images, torch.cat([digits.y_train, digits.y_test]), strict=True)
    )
    assert found == Counter((row.tobytes(), int(y)) for row, y in zip(source.data, source.target, strict=True))
    for label in range(10):
        share = int((source.target == label).sum()) * 360 / 1797
        assert abs(int((digits.y_test == label).sum()) - share) < 1


def test_the_digits_split_is_the_same_everywhere():
    # Figures are compared over years: a split that moved silently would make them incomparable.
    expected = "d6ba04f0e6087678e1865a32e66574b0384b8973b1bf1ba3cdc9c7792726e957"
    assert load_data("digits").fingerprint() == expected == load_data("digits").fingerprint()


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=2, max_size=60), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_stratified_split_takes_of_every_class_its_share_within_one(labels, share, seed):
    y = torch.tensor(labels)
    count = held_out_count(share, len(y))
    assert 1 <= count < len(y)
    assert count in (1, len(y) - 1) or abs(count - share * len(y)) <= 0.5
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    kept, aside = stratified_split(y, count, seed)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert len(aside) == count
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(len(y)))
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(aside, aside.sort().values)
    for label, size in Counter(labels).items():
        assert abs(int((y[aside] == label).sum()) - size * count / len(y)) < 1
    again = stratified_split(y, count, seed)
    assert torch.equal(again[0], kept)
    assert torch.equal(again[1], aside)


def test_stratified_split_is_random_within_classes():
    y = torch.tensor([0] * 50 + [1] * 50)
    drawn = torch.zeros(100)
    for seed in range(300):
        drawn[stratified_split(y, 10, seed)[1]] += 1
    # Each image is held out one time in ten: 30 of 300, standard deviation 5.2.
    assert drawn.min() > 30 - 5 * 5.2
    assert drawn.max() < 30 + 5 * 5.2
    with pytest.raises(InputError, match="count: got 100"):
        stratified_split(y, 100, 0)


def test_split_divides_the_training_set_only(tmp_path):
    digits = load_data("digits")
    before = digits.fingerprint()
    (x, y), (x_val, y_val) = digits.split(0.35, seed=3)
    assert len(y_val) == 503  # 502.95
    assert len(y) + len(y_val) == 1437

    def rows(images: torch.Tensor, labels: torch.Tensor) -> Counter:
        return Counter((image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    assert rows(x, y) + rows(x_val, y_val) == rows(digits.x_train, digits.y_train)
    assert (y_val.bincount() - 0.35 * digits.y_train.bincount()).abs().max() <= 1
    assert rows(*digits.split(0.35, seed=3)[1]) == rows(x_val, y_val) != rows(*digits.split(0.35, seed=4)[1])
    assert rows(*digits.split(0.35, seed=2**32 + 3)[1]) == rows(x_val, y_val)  # any seed of a run, as ``fit`` takes it
    x_val.zero_()  # a copy: the set itself must not notice
    assert digits.fingerprint() == before
    for share in (0, 1, -0.1, "half"):
        with pytest.raises(InputError, match="validation_split") as caught:
            digits.split(share, seed=0)
        check_one_sentence(caught.value)
    single = load_data(npz(tmp_path, x_train=arrays()["x_train"][:1], y_train=np.array([0])), num_classes=3)
    with pytest.raises(InputError, match="at least 2 images"):
        single.split(0.5, seed=0)


def test_fingerprint_is_the_documented_hash_and_moves_with_every_entry(tmp_path, monkeypatch):
    content = arrays()
    data = load_data(npz(tmp_path))
    digest = hashlib.sha256()
    for name in NAMES:
        array = content[name].astype(np.int64) if name[0] == "y" else content[name]
        digest.update(f"{name} torch.{array.dtype} {array.shape}\n".encode() + array.tobytes())
    assert data.fingerprint() == digest.hexdigest()
    monkeypatch.setattr(data_module, "_CHUNK", 100)  # read in many pieces
    assert data.fingerprint() == digest.hexdigest()
    seen = {data.fingerprint()}
    for name in NAMES:
        changed = content[name].copy()
        changed.flat[-1] = (changed.flat[-1] + 1) % 3
        seen.add(load_data(npz(tmp_path, **{name: changed})).fingerprint())
    flat = {name: content[name].reshape(len(content[name]), 3, 6, 8) for name in ("x_train", "x_test")}
    seen.add(load_data(npz(tmp_path, **flat)).fingerprint())  # the same bytes in another shape
    assert len(seen) == 6


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_mean_and_std_are_those_of_all_training_pixels(tmp_path, monkeypatch, kind):
    content = arrays(n_train=40)
    x = content["x_train"]
    if kind != "uint8":
        content = {**content, "x_train": (x / 255).astype(kind), "x_test": (content["x_test"] / 255).astype(kind)}
    data = load_data(npz(tmp_path, **content))
    unit = x.astype(np.float64) / 255
    for chunk in (1 << 24, 1000):
        monkeypatch.setattr(data_module, "_CHUNK", chunk)
        assert data.mean() == pytest.approx(unit.mean((0, 2, 3)), abs=1e-7)
        assert data.std() == pytest.approx(unit.std((0, 2, 3)), abs=1e-7)
    assert all(type(value) is float for value in (*data.mean(), *data.std()))


def test_to_unit():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_unit(every).dtype == torch.float32
    assert torch.equal(to_unit(every), torch.arange(256).float() / 255)
    assert torch.equal(every, torch.arange(256, dtype=torch.uint8))  # its input is left alone
    x = torch.rand(3)
    assert to_unit(x) is x


# ---- arrays -------------------------------------------------------------------------------------------------------


def _same(a: DataSet, b: DataSet) -> bool:
    return all(
        getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name))
        for name in NAMES
    )


def test_arrays_mean_the_same_in_every_layout_label_form_and_container(tmp_path):
    content = arrays()
    reference = load_data(npz(tmp_path))
    assert reference.name == "set.npz"
    assert str(tmp_path) not in repr(reference)
    assert np.array_equal(reference.x_train.numpy(), content["x_train"])
    assert reference.x_train.dtype == torch.uint8
    assert reference.y_train.dtype == torch.int64
    assert np.array_equal(reference.y_test.numpy(), content["y_test"])
    assert reference.num_classes == 3
    last = {name: content[name].transpose(0, 2, 3, 1) for name in ("x_train", "x_test")}
    one_hot = {name: np.eye(3)[content[name]] for name in ("y_train", "y_test")}
    column = {name: content[name].astype(np.uint16)[:, None] for name in ("y_train", "y_test")}
    foreign = {name: content[name].astype(">i4") for name in ("y_train", "y_test")}
    for changes in (last, one_hot, column, foreign, {**last, **one_hot}):
        other = load_data(npz(tmp_path, **changes))
        assert _same(other, reference)
        assert other.num_classes == 3
        assert other.x_train.is_contiguous()
        assert other.fingerprint() == reference.fingerprint()
        mapped = load_data(npy(tmp_path / "folder", {**content, **changes}))
        assert _same(mapped, reference)
        assert mapped.fingerprint() == reference.fingerprint()
    np.savez_compressed(tmp_path / "small.npz", **content)
    assert _same(load_data(str(tmp_path / "small.npz")), reference)


def test_the_order_of_bytes_does_not_matter(tmp_path):
    content = {name: array.astype(np.float32) / 255 if name[0] == "x" else array for name, array in arrays().items()}
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in content.items()}
    assert _same(load_data(npz(tmp_path, "swapped.npz", **swapped)), load_data(npz(tmp_path, **content)))


def test_images_without_a_channel_axis_get_one(tmp_path):
    content = arrays(shape=(8, 6))
    data = load_data(npz(tmp_path, **content))
    assert data.input_shape == (1, 8, 6)
    assert np.array_equal(data.x_train[:, 0].numpy(), content["x_train"])


def test_a_shape_that_can_be_read_in_two_ways_is_refused_until_it_is_said(tmp_path):
    content = arrays(shape=(3, 8, 3))
    file = npz(tmp_path, **content)
    with pytest.raises(InputError, match=r"x_train: got shape \(12, 3, 8, 3\).*layout='NCHW' or 'NHWC'") as caught:
        load_data(file)
    check_one_sentence(caught.value)
    assert load_data(file, layout="NCHW").input_shape == (3, 3 + 5, 3)
    last = load_data(file, layout="NHWC")
    assert last.input_shape == (3, 3, 8)
    assert np.array_equal(last.x_train.numpy(), content["x_train"].transpose(0, 3, 1, 2))
    with pytest.raises(InputError, match="layout: got 'HWC'"):
        load_data(file, layout="HWC")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images_become_float32(tmp_path, dtype):
    x = {name: (arrays()[name] / 255).astype(dtype) for name in ("x_train", "x_test")}
    data = load_data(npz(tmp_path, **x))
    assert data.x_train.dtype == torch.float32
    assert np.array_equal(data.x_train.numpy(), x["x_train"].astype(np.float32))


@pytest.mark.parametrize("last", [False, True])
def test_npy_files_are_mapped_not_read(tmp_path, last):
    content = arrays()
    if last:
        content = {name: x.transpose(0, 2, 3, 1).copy() if x.ndim == 4 else x for name, x in content.items()}
    folder = npy(tmp_path / "folder", content)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # or the warning would be given once a process, to whichever test comes first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = load_data(folder)
    finally:
        torch.set_warn_always(always)
    before = data.x_train[-1, -1, -1, -1].item()
    with (folder / "x_train.npy").open("r+b") as file:  # what is mapped shows what happens to the file
        file.seek(-1, 2)
        file.write(bytes([before ^ 255]))
    assert data.x_train[-1, -1, -1, -1].item() == before ^ 255
    with pytest.raises(InputError, match=r"float64.*mapped") as caught:
        load_data(npy(folder, {name: arrays()[name] / 255 for name in ("x_train", "x_test")}))
    check_one_sentence(caught.value)


def test_classes_without_an_image_need_num_classes(tmp_path):
    file = npz(tmp_path, y_train=np.full(12, 1), y_test=np.full(6, 1))
    with pytest.raises(InputError, match=r"y_train: got labels from 1 to 1.*num_classes=2"):
        load_data(file)
    assert load_data(file, num_classes=4).num_classes == 4
    with pytest.raises(InputError, match="y_train: got one class"):
        load_data(npz(tmp_path, y_train=np.zeros(12), y_test=np.zeros(6)))


def test_labels_that_are_no_class_indices_make_no_network_of_a_billion_classes(tmp_path):
    identifiers = npz(tmp_path, y_train=np.array([0, 10**9] * 6), y_test=np.zeros(6))
    with pytest.raises(
        InputError, match="y_train: got a label of 1000000000 among 12 images, expected no more classes"
    ) as caught:
        load_data(identifiers)
    check_one_sentence(caught.value)
    assert load_data(npz(tmp_path, y_train=np.array([0, 11] * 6)), num_classes=None).num_classes == 12
    assert load_data(npz(tmp_path, y_train=np.array([0, 12] * 6)), num_classes=13).num_classes == 13


X, Y = arrays()["x_train"], arrays()["y_train"]
BAD_ARRAYS = {
    "missing": ({"y_test": None}, "got arrays x_train, y_train, x_test, expected"),
    "empty": ({"x_train": X[:0], "y_train": Y[:0]}, "x_train: got an empty set"),
    "rank 2": ({"x_train": X.reshape(12, -1)}, r"x_train: got shape \(12, 144\)"),
    "rank 5": ({"x_test": X[None]}, r"x_test: got shape \(1, 12, 3, 8, 6\)"),
    "channels": ({"x_train": X.repeat(2, 1)}, r"x_train: got shape \(12, 6, 8, 6\)"),
    "no pixels": ({"x_train": X[:, :, :0]}, r"x_train: got shape \(12, 3, 0, 6\)"),
    "integers": ({"x_train": X.astype(np.int64)}, "x_train: got dtype int64"),
    "complex": ({"x_train": X.astype(complex)}, "x_train: got dtype complex128"),
    "bool": ({"x_train": X > 0}, "x_train: got dtype bool"),
    "text": ({"x_train": X.astype(str)}, "x_train: got dtype <U3"),
    "two dtypes": ({"x_test": (X / 255)}, "x_test: got torch.float32.*torch.uint8"),
    "two sizes": ({"x_test": X[:, :, :7], "y_test": Y}, r"x_test: got torch.uint8 images of shape \(3, 7, 6\)"),
    "0 to 255": ({"x_train": X.astype(np.float32)}, "x_train: got values from .* divide by 255"),
    "normalised": ({"x_train": X / 255 - 0.5}, "x_train: got values from -0.5"),
    "nan": ({"x_train": np.where(X[3, 0, 0, 0] == X, np.nan, X / 255)}, "x_train: got NaN or Inf in image"),
    "inf": ({"x_test": np.full((6, 3, 8, 6), np.inf)}, "x_test: got NaN or Inf in image 0"),
    "fewer labels": ({"y_train": Y[:11]}, "y_train: got 11 labels, expected 12"),
    "more labels": ({"y_test": Y[:7]}, "y_test: got 7 labels, expected 6"),
    "negative": ({"y_train": Y - 1}, "y_train: got labels from -1 to 1, expected labels from 0 to 1"),
    "from 1": ({"y_train": Y + 1}, "y_train: got labels from 1 to 3.*subtract 1"),
    "unknown class": ({"y_test": np.full(6, 3)}, "y_test: got labels from 3 to 3, expected labels from 0 to 2"),
    "fractions": ({"y_train": Y + 0.5}, "y_train: got fractions"),
    "nan label": ({"y_train": np.where(Y == 1, np.nan, Y)}, "y_train: got NaN or Inf"),
    "text labels": ({"y_train": Y.astype(str)}, "y_train: got ndarray"),
    "soft": ({"y_train": np.full((12, 3), 1 / 3)}, "y_train: got soft labels"),
    "two widths": ({"y_train": np.eye(3)[Y], "y_test": np.eye(4)[Y[:6]]}, r"y_test: got shape \(6, 4\)"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_no_data_set_are_refused_by_name(tmp_path, case):
    changes, message = BAD_ARRAYS[case]
    with pytest.raises(InputError, match=message) as caught:
        load_data(npz(tmp_path, **changes))
    check_one_sentence(caught.value)


def test_paths_that_are_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", **{**arrays(), "x_train": np.array([{}], dtype=object)})
    np.save(tmp_path / "one.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "words.npz", "w") as archive:
        for name in arrays():
            archive.writestr(name, "no array")
    cases = [
        ("cifar", InputError, "data: got 'cifar'.*did you mean 'cifar10'"),
        (Path("digit"), InputError, "did you mean 'digits'"),
        (3, InputError, "data: got 3"),
        (tmp_path / "missing.npz", CheckpointError, "does not exist"),
        (tmp_path / "empty", InputError, "got nothing, expected x_train.npy"),
        (tmp_path / "text.npz", CheckpointError, "text.npz: got nothing readable"),
        (tmp_path / "objects.npz", CheckpointError, "allow_pickle"),
        (tmp_path / "one.npy", CheckpointError, "no .npz archive"),
        (tmp_path / "words.npz", CheckpointError, "x_train is no array"),
        (npy(tmp_path / "some", {"x_train": X, "labels": Y}), InputError, "got arrays labels, x_train, expected"),
    ]
    for spec, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            load_data(spec)
        check_one_sentence(caught.value)
    for keyword, value in (("size", 32), ("layout", "NCHW"), ("num_classes", 10)):
        with pytest.raises(InputError, match=f"{keyword}: got .* expected no {keyword} for 'digits'") as caught:
            load_data("digits", **{keyword: value})
        check_one_sentence(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_npz_is_damaged_wherever_it_ends(tmp_path, save):
    save(tmp_path / "whole.npz", **arrays())
    content = (tmp_path / "whole.npz").read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        (tmp_path / "cut.npz").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.npz: got nothing readable") as caught:
            load_data(tmp_path / "cut.npz")
        check_one_sentence(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_noticed_or_harmless(tmp_path, save):
    save(tmp_path / "whole.npz", **arrays())
    reference = load_data(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.choice(len(content), 150, replace=False):
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped.npz").write_bytes(broken)
        try:
            assert _same(load_data(tmp_path / "flipped.npz"), reference)  # zip dates, say, do not matter
        except (CheckpointError, InputError):
            noticed += 1
    assert noticed > 75


def test_a_truncated_npy_is_damaged(tmp_path):
    folder = npy(tmp_path / "folder", arrays())
    content = (folder / "x_test.npy").read_bytes()
    for length in (0, 5, 60, 128, len(content) - 1):
        (folder / "x_test.npy").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x_test\.npy: got nothing readable") as caught:
            load_data(folder)
        check_one_sentence(caught.value)


# ---- torchvision, on files in its own formats -----------------------------------------------------------------------


def _write_mnist(raw: Path, content: dict[str, np.ndarray]) -> None:
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, y = content[f"x_{part}"], content[f"y_{part}"]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *x.shape) + x.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, len(y)) + y.astype(np.uint8).tobytes()
        )


def test_mnist(tmp_path):
    content = arrays(shape=(28, 28))
    _write_mnist(tmp_path / "MNIST" / "raw", content)
    data = load_data("mnist", root=tmp_path)
    assert data.input_shape == (1, 28, 28)
    assert data.x_train.dtype == torch.uint8
    assert data.num_classes == 10
    for name in ("x_train", "x_test"):
        assert np.array_equal(getattr(data, name)[:, 0].numpy(), content[name])
    assert np.array_equal(data.y_train.numpy(), content["y_train"])
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="got nothing readable") as caught:
        load_data("mnist", root=tmp_path)
    check_one_sentence(caught.value)


def _write_cifar(folder: Path, content: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, fine: bool) -> type:
    """Pickles as the authors made them, with their own checksums put in the place of the real ones."""
    from torchvision.datasets import CIFAR10, CIFAR100

    folder.mkdir(parents=True)
    sums = {}
    parts = {"train": "train", "test": "test"} if fine else {"train": "data_batch_1", "test": "test_batch"}
    for part, file in parts.items():
        flat = content[f"x_{part}"].reshape(len(content[f"x_{part}"]), -1)  # channels first, one row an image
        labels = {"fine_labels" if fine else "labels": content[f"y_{part}"].tolist()}
        (folder / file).write_bytes(pickle.dumps({"data": flat, **labels}))
        sums[part] = [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()]]
    kind = CIFAR100 if fine else CIFAR10
    names = [f"class {i}" for i in range(100 if fine else 10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    md5 = hashlib.md5((folder / kind.meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    monkeypatch.setattr(kind, "train_list", sums["train"])
    monkeypatch.setattr(kind, "test_list", sums["test"])
    return kind


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    content = arrays(shape=(3, 32, 32))
    kind = _write_cifar(
        tmp_path / f"cifar-{name[5:]}{'-batches-py' if name == 'cifar10' else '-python'}",
        content,
        monkeypatch,
        name == "cifar100",
    )
    data = load_data(name, root=str(tmp_path))
    for array in NAMES:
        assert np.array_equal(getattr(data, array).numpy(), content[array])
    assert data.num_classes == int(name[5:]) == len(data.class_names)
    assert data.class_names[1] == "class 1"
    (tmp_path / kind.base_folder / kind.test_list[0][0]).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="download=True") as caught:
        load_data(name, root=tmp_path)
    check_one_sentence(caught.value)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server of this process's own, for as long as it is needed."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_cifar_is_fetched_when_asked_and_only_then(tmp_path, monkeypatch):
    content = arrays(shape=(3, 32, 32))
    kind = _write_cifar(tmp_path / "source" / "cifar-10-batches-py", content, monkeypatch, fine=False)
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        archive.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / kind.filename).read_bytes()).hexdigest())
    root = tmp_path / "root"
    with pytest.raises(CheckpointError, match=r"download=True \(--download\) to fetch cifar10"):
        load_data("cifar10", root=root)
    assert not root.exists()  # no file is written unasked
    with served(tmp_path) as address:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(kind, "url", f"{address}/{kind.filename}")
        data = load_data("cifar10", root=root, download=True)
    assert np.array_equal(data.x_test.numpy(), content["x_test"])
    assert load_data("cifar10", root=root).fingerprint() == data.fingerprint()  # from now on without
    with pytest.raises(CheckpointError, match="connection") as caught:
        load_data("cifar10", root=tmp_path / "other", download=True)
    check_one_sentence(caught.value)


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    content = arrays(shape=(3, 32, 32))
    sums = {}
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        ten_for_zero = np.where(content[f"y_{part}"] == 0, 10, content[f"y_{part}"])
        savemat(file, {"X": content[f"x_{part}"].transpose(2, 3, 1, 0), "y": ten_for_zero[:, None]})
        sums[part] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", sums)
    data = load_data("svhn", root=tmp_path)
    assert data.num_classes == 10
    for array in NAMES:
        assert np.array_equal(getattr(data, array).numpy(), content[array])


def test_without_torchvision_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"art-saliency\[vision\]"):
        load_data("cifar10")


# ---- folders of images ----------------------------------------------------------------------------------------------


def image_folder(
    folder: Path, other: str = "test", classes: tuple[str, ...] = ("cat", "ant", "bee"), per_class: int = 3
) -> Path:
    """Images of 8x10 pixels of one colour each, which every crop keeps: red tells the image, green the class."""
    number = 0
    for part in ("train", other):
        for label, name in enumerate(sorted(classes)):
            (folder / part / name).mkdir(parents=True)
            for copy in range(per_class):
                pixels = np.zeros((8, 10, 3), np.uint8)
                pixels[..., 0], pixels[..., 1], pixels[..., 2] = number, label, part != "train"
                Image.fromarray(pixels).save(folder / part / name / f"{copy}.png")
                number += 1
    return folder


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_folder_of_images_in_memory(tmp_path, other):
    data = load_data(image_folder(tmp_path, other))
    assert data.class_names == ("ant", "bee", "cat")
    assert data.num_classes == 3
    assert data.input_shape == (3, 8, 10)
    assert data.x_train.dtype == torch.uint8
    assert len(data.y_train) == len(data.y_test) == 9
    for x, y, part in ((data.x_train, data.y_train, 0), (data.x_test, data.y_test, 1)):
        assert torch.equal(x[:, 0, 0, 0], torch.arange(9, dtype=torch.uint8) + 9 * part)
        assert torch.equal(x[:, 1, 3, 3].long(), y)
        assert torch.equal(y, torch.arange(3).repeat_interleave(3))
        assert bool((x[:, 2] == part).all())


def test_images_are_resized_and_cropped_at_the_centre(tmp_path):
    image_folder(tmp_path)
    stripes = np.zeros((16, 48, 3), np.uint8)  # three squares side by side; the middle one is the crop
    for place, colour in enumerate(((255, 0, 0), (9, 200, 77), (0, 0, 255))):
        stripes[:, 16 * place : 16 * place + 16] = colour
    Image.fromarray(stripes).save(tmp_path / "train" / "ant" / "0.png")
    image = load_data(tmp_path, size=8).x_train[0]
    # The outermost columns blend with the neighbours that the resize averages over.
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[:, :, 2:-2], torch.tensor([9, 200, 77], dtype=torch.uint8)[:, None, None].expand(3, 8, 4))
    with pytest.raises(InputError, match=r"got 8x10 pixels, expected 16x48 pixels.*size") as caught:
        load_data(tmp_path)
    check_one_sentence(caught.value)


def test_images_too_many_for_memory_are_refused_with_the_way_out(tmp_path, monkeypatch):
    image_folder(tmp_path)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 9 * 3 * 8 * 8)
    assert len(load_data(tmp_path, size=8).x_train) == 9
    with pytest.raises(InputError, match=r"9 images of 9x9 pixels.*image_folder_loader"):
        load_data(tmp_path, size=9)


def _flat(loader: object) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_the_loader_streams_what_load_data_reads(tmp_path):
    data = load_data(image_folder(tmp_path), size=8)
    loader = image_folder_loader(tmp_path, size=8, batch_size=4, train=False)
    x, y = _flat(loader)
    assert torch.equal(x, data.x_test)
    assert torch.equal(y, data.y_test)
    assert x.dtype == torch.uint8
    assert loader.dataset.classes == data.class_names
    assert len(loader) == 3
    assert loader.batch_size == 4
    (tmp_path / "train").rename(tmp_path / "elsewhere")  # one part is enough to evaluate
    assert torch.equal(_flat(image_folder_loader(tmp_path, size=8, batch_size=9, train=False))[0], x)


def test_the_training_loader_shows_every_image_once_an_epoch_in_a_new_order(tmp_path):
    image_folder(tmp_path)
    loader = image_folder_loader(tmp_path, size=5, batch_size=5, train=True)
    orders = []
    for _ in range(4):
        x, y = _flat(loader)
        assert x.shape == (9, 3, 5, 5)
        assert bool((x == x[:, :, :1, :1]).all())
        assert sorted(x[:, 0, 0, 0].tolist()) == list(range(9))
        assert torch.equal(x[:, 1, 0, 0].long(), y)
        orders.append(tuple(x[:, 0, 0, 0].tolist()))
    assert len(set(orders)) == 4
    # 9 = 4 + 4 + 1: the last batch of one image is left out of training, and only there.
    assert [len(y) for _, y in image_folder_loader(tmp_path, size=5, batch_size=4, train=True)] == [4, 4]
    assert [len(y) for _, y in image_folder_loader(tmp_path, size=5, batch_size=4, train=False)] == [4, 4, 1]


def test_crops_follow_the_seed_alone(tmp_path):
    image_folder(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (9, 30, 40, 3), dtype=np.uint8)
    for file, pixels in zip(sorted((tmp_path / "train").rglob("*.png")), noise, strict=True):
        Image.fromarray(pixels).save(file)

    def epochs(seed: int, workers: int) -> list[torch.Tensor]:
        loader = image_folder_loader(tmp_path, size=8, batch_size=4, train=True, seed=seed, num_workers=workers)
        return [_flat(loader)[0] for _ in range(2)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = epochs(0, workers=0)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers move
    torch.manual_seed(2)
    again = epochs(0, workers=2)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)

    def content(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    assert not content(first) & content(second)
    assert not content(first) & content(epochs(1, workers=0)[0])


def test_the_centre_crop_of_a_larger_resize(tmp_path):
    image_folder(tmp_path)
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[4:12, 4:12] = (9, 200, 77)
    Image.fromarray(stripes).save(tmp_path / "test" / "ant" / "0.png")
    inner = next(iter(image_folder_loader(tmp_path, size=8, resize=16, batch_size=1, train=False)))[0]
    assert torch.equal(inner[0], torch.tensor([9, 200, 77], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    with pytest.raises(InputError, match="resize: got 7"):
        image_folder_loader(tmp_path, size=8, resize=7, batch_size=1, train=False)


def test_folders_of_images_that_are_no_data_set(tmp_path):
    def refused(change, kind, message):
        folder = image_folder(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        for read in (load_data, lambda path: list(image_folder_loader(path, size=8, batch_size=2, train=False))):
            with pytest.raises(kind, match=message) as caught:
                read(folder)
            check_one_sentence(caught.value)

    def without_test(folder):
        (folder / "test").rename(folder / "exam")

    def cut(folder):
        file = folder / "test" / "ant" / "0.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:150])

    def sixteen_bits(folder):
        Image.fromarray(np.full((8, 10), 40_000, np.uint16)).save(folder / "test" / "ant" / "0.png")

    def nobody(folder):
        for file in (folder / "test" / "bee").iterdir():
            file.unlink()

    refused(without_test, CheckpointError, "no such folder, expected .*test or .*val")
    refused(lambda f: (f / "test" / "cat").rename(f / "test" / "dog"), InputError, "lack cat and add dog")
    refused(lambda f: (f / "train" / "dog").mkdir(), InputError, "lack dog and add nothing")
    refused(nobody, InputError, "got no image in bee")
    refused(cut, CheckpointError, r"0\.png: got nothing readable")
    refused(sixteen_bits, InputError, "pixels of mode 'I;16'")


# ---- augmentation ---------------------------------------------------------------------------------------------------


class Scripted(RandomSource):
    """Hands out numbers that a test knows."""

    def __init__(self, numbers: torch.Tensor) -> None:
        super().__init__(0)
        self.numbers = numbers

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        assert like.shape == self.numbers.shape
        assert like.dtype == torch.float32
        return self.numbers


def oracle(x: np.ndarray, pad: int, flip: bool, fill: float, numbers: np.ndarray) -> np.ndarray:
    """Pixel by pixel: where does each pixel of the output come from?"""
    out = np.empty_like(x)
    height, width = x.shape[2:]
    for n, (top, left, mirror) in enumerate(numbers):
        down, right = int(top * (2 * pad + 1)) - pad, int(left * (2 * pad + 1)) - pad
        for c in range(x.shape[1]):
            for i in range(height):
                for j in range(width):
                    column = width - 1 - j if flip and mirror < 0.5 else j
                    row, column = i + down, column + right
                    inside = 0 <= row < height and 0 <= column < width
                    out[n, c, i, j] = x[n, c, row, column] if inside else fill
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(("pad", "flip"), [(0, True), (1, False), (2, True), (4, True)])
def test_augmentation_against_a_loop_over_every_pixel(dtype, pad, flip):
    generator = torch.Generator().manual_seed(pad)
    numbers = torch.rand(9, 3, generator=generator)
    x = torch.randint(1, 256, (9, 2, 5, 7), generator=generator).to(dtype)
    maps = torch.rand(9, 4, 5, 7, generator=generator)
    moved, moved_maps = Augmentation(pad=pad, flip=flip, map_fill=0.5)(x, Scripted(numbers), maps)
    assert moved.dtype == dtype
    assert np.array_equal(moved.numpy(), oracle(x.numpy(), pad, flip, 0, numbers.numpy()))
    assert np.array_equal(moved_maps.numpy(), oracle(maps.numpy(), pad, flip, 0.5, numbers.numpy()))
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels last in memory
    assert torch.equal(Augmentation(pad=pad, flip=flip)(strided, Scripted(numbers))[0], moved)


def test_map_and_image_move_identically():
    # Every pixel says where it comes from, so that two things that moved alike say the same everywhere.
    rows, columns = torch.meshgrid(torch.arange(1.0, 9), torch.arange(1.0, 9), indexing="ij")
    x = torch.stack([rows, columns])[None].repeat(64, 1, 1, 1)
    moved, maps = Augmentation(pad=3, map_fill=-1)(x, RandomSource(0), x)
    inside = moved[:, :1] > 0
    assert torch.equal(torch.where(inside, maps, 0.0), moved)
    assert bool((maps[~inside.expand_as(maps)] == -1).all())
    assert 0.2 < (~inside).float().mean() < 0.8
    binary = (x[:, :1] > 4).float()
    assert set(Augmentation(pad=3)(x, RandomSource(0), binary)[1].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(Augmentation(pad=3)(x, RandomSource(0), x > 4)[1], (moved > 4))


def test_places_and_flips_are_uniform_independent_and_windows_of_the_padded_image():
    count, pad = 9000, 1
    x = torch.arange(1.0, 17).view(1, 1, 4, 4).repeat(count, 1, 1, 1)
    moved = Augmentation(pad=pad)(x, RandomSource(0))[0]
    padded = torch.zeros(6, 6)
    padded[1:5, 1:5] = x[0, 0]
    windows = []
    for top in range(3):
        for left in range(3):
            window = padded[top : top + 4, left : left + 4]
            windows += [window, window.flip(1)]
    hits = torch.stack([(moved[:, 0] == window).all(2).all(1) for window in windows])
    assert bool((hits.sum(0) == 1).all())  # each image is one of the 18 and no other
    # Chi-square with 17 degrees of freedom over all 18: 40.8 is exceeded once in a thousand seeds.
    counts, expected = hits.sum(1).double(), count / 18
    assert float(((counts - expected) ** 2 / expected).sum()) < 40.8
    # Neighbours in the batch do not share their draw: 18 x 18 pairs, 324 cells, standard deviation of chi-square 25.4.
    which = hits.int().argmax(0)
    pairs = torch.bincount(which[:-1] * 18 + which[1:], minlength=324).double()
    expected = (count - 1) / 324
    assert abs(float(((pairs - expected) ** 2 / expected).sum()) - 323) < 4 * 25.4


def test_augmentation_repeats_with_its_seed_and_moves_no_global_generator():
    x = torch.rand(32, 3, 8, 8)
    before = torch.get_rng_state()
    first = Augmentation()(x, RandomSource(5))[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Augmentation()(x, RandomSource(5))[0], first)
    assert not torch.equal(Augmentation()(x, RandomSource(6))[0], first)
    torch.manual_seed(5)
    of_global = Augmentation()(x, None)[0]
    torch.manual_seed(5)
    assert torch.equal(Augmentation()(x, None)[0], of_global)


def test_two_ranks_augment_like_one_process():
    x = torch.rand(16, 3, 8, 8)
    alone = Augmentation()(x, RandomSource(7))[0]
    ranks = [Augmentation()(x[8 * r : 8 * r + 8], RandomSource(7, rank=r, world_size=2))[0] for r in range(2)]
    assert torch.equal(torch.cat(ranks), alone)


def test_a_batch_as_bytes_is_the_batch_as_floats():
    x = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    as_bytes = Augmentation(pad=2)(x, RandomSource(0))[0]
    assert as_bytes.dtype == torch.uint8
    assert torch.equal(to_unit(as_bytes), Augmentation(pad=2)(to_unit(x), RandomSource(0))[0])


def test_names():
    x = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    assert set(AUGMENTATIONS) == {"none", "flip", "crop", "crop-flip"}
    moved = {name: augmentation_by_name(name, pad=2)(x, RandomSource(0), x)[0] for name in AUGMENTATIONS}
    source = RandomSource(0)
    untouched = source.state_dict()["generator"]
    same, maps = augmentation_by_name("none")(x, source, x)
    assert same is x
    assert maps is x
    assert torch.equal(source.state_dict()["generator"], untouched)
    flipped = (moved["flip"] == x.flip(3)).flatten(1).all(1)
    assert torch.equal(moved["flip"], torch.where(flipped[:, None, None, None], x.flip(3), x))
    assert 16 < flipped.sum() < 48
    # One seed crops alike whether images are mirrored or not, and mirrors alike whether they are cropped or not.
    assert torch.equal(
        moved["crop-flip"], torch.where(flipped[:, None, None, None], moved["crop"].flip(3), moved["crop"])
    )
    assert augmentation_by_name("crop-flip") == Augmentation()
    assert augmentation_by_name("crop", pad=1).pad == 1
    with pytest.raises(InputError, match=r"augmentation: got 'cropflip'.*did you mean 'crop-flip'"):
        augmentation_by_name("cropflip")


def test_the_greatest_number_below_one_stays_inside_the_padding():
    # An index past the end would be a memory error on a GPU. The numbers are multiples of 2**-24 below 1.
    numbers = torch.full((1, 3), 1 - 2**-24)
    x = torch.ones(1, 1, 140, 140)
    for pad in range(1, 130):
        moved = Augmentation(pad=pad)(x, Scripted(numbers))[0]
        assert int(moved.sum()) == (140 - pad) ** 2
        assert bool((moved[..., -pad:, :] == 0).all())


class Operations(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_and_nothing_loops_over_images():
    def operations(count: int) -> list[str]:
        x = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        with Operations() as seen:
            to_unit(Augmentation(pad=2)(x, RandomSource(0), torch.zeros(count, 1, 8, 8))[0])
        return seen.names

    assert operations(2) == operations(100)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
    assert len(operations(2)) > 5
    assert not [name for name in operations(2) if any(word in name for word in waiting)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(pad=-1), "pad: got -1"),
        (lambda: Augmentation(pad=1.5), "pad: got 1.5"),
        (lambda: Augmentation(flip="yes"), "flip: got 'yes'"),
        (lambda: Augmentation(map_fill=float("nan")), "map_fill: got nan"),
        (lambda: augmentation_by_name("crop", pad=0), "pad: got 0"),
        (
            lambda: Augmentation(pad=6)(torch.zeros(2, 1, 8, 6), None),
            "pad: got 6, expected less than a side of the 8x6",
        ),
        (
            lambda: Augmentation()(torch.zeros(2, 1, 8, 8), None, torch.zeros(2, 1, 4, 4)),
            r"maps: got shape \(2, 1, 4, 4\)",
        ),
        (lambda: Augmentation()(torch.zeros(2, 1, 8, 8), None, torch.zeros(3, 1, 8, 8)), r"expected \(2, M, 8, 8\)"),
    ],
)
def test_augmentation_refuses(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    check_one_sentence(caught.value)
