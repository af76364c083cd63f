"""Files that are whole or not there, readers that execute nothing, and hashes that mean the weights and only them."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import stat
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from art_saliency import files
from art_saliency.errors import CheckpointError, InputError
from art_saliency.files import (
    appearing,
    is_dense,
    read_tensors,
    sha256_of_file,
    sha256_of_tensors,
    write_file,
    write_tensors,
)

TENSORS = {
    "layer.weight": torch.arange(600.0).reshape(20, 30),
    "layer.bias": torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "count": torch.tensor(7),
    "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 3),
}


def same(content, expected=TENSORS):
    return content.keys() == expected.keys() and all(
        content[name].dtype == expected[name].dtype and torch.equal(content[name], expected[name]) for name in expected
    )


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ---- writing -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "weights.pt"
    write_tensors(path, TENSORS)
    assert same(read_tensors(path))
    write_tensors(path, {"a": torch.zeros(1), "epoch": 3, "name": "x", "list": [1, 2.5, None]})
    content = read_tensors(path)
    assert torch.equal(content.pop("a"), torch.zeros(1))
    assert content == {"epoch": 3, "name": "x", "list": [1, 2.5, None]}
    assert listing(tmp_path) == ["weights.pt"]


def test_a_state_dict_of_a_network_loads_strictly(tmp_path):
    model, other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    write_tensors(tmp_path / "w.pt", model.state_dict())
    other.load_state_dict(read_tensors(tmp_path / "w.pt"), strict=True)
    assert sha256_of_tensors(other.state_dict()) == sha256_of_tensors(model.state_dict())


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_file_has_the_permissions_that_any_new_file_gets(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


class _Interrupted(BaseException):
    """Such as KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [_Interrupted, KeyError, OSError])
@pytest.mark.parametrize("old", [b"old content", None])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def write(file):
        file.write(b"half of the new con")
        file.flush()
        assert len(listing(tmp_path)) == (1 if old is None else 2)  # it is being written aside
        assert path.exists() == (old is not None)
        raise error("stop")

    with pytest.raises(CheckpointError if error is OSError else error):
        write_file(path, write)
    assert listing(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_a_reader_never_sees_half_a_file(tmp_path):
    """At every moment of the second write the path holds the first content; afterwards all of the second."""
    path = tmp_path / "file"
    write_file(path, lambda file: file.write(b"first"))

    def write(file):
        for _ in range(5):
            file.write(b"second")
            file.flush()
            assert path.read_bytes() == b"first"

    write_file(path, write)
    assert path.read_bytes() == 5 * b"second"


def test_bytes_are_on_the_disk_before_the_file_appears(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(("fsync", os.fstat(handle).st_size)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_file(tmp_path / "file", lambda file: file.write(b"12345"))
    assert order == [("fsync", 5), "replace"]


def test_two_writers_at_once_do_not_share_a_file(tmp_path):
    path = tmp_path / "file"

    def outer(file):
        write_file(path, lambda inner: inner.write(b"inner"))
        file.write(b"outer")

    write_file(path, outer)
    assert path.read_bytes() == b"outer"
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [0, 64, 700, 2000, 4800, 6500])
def test_a_full_disk_is_a_checkpoint_error_wherever_it_strikes(tmp_path, size):
    """A limit on file size stands for it: torch.save meets the limit at the start, in a record or while it closes."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "weights.pt"
    write_tensors(path, {"old": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_tensors(path, {**TENSORS, "large": torch.zeros(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = os.strerror(errno.EFBIG)
    assert str(caught.value) == f"{path}: could not be written ({reason}); free some space or choose another folder"
    assert listing(tmp_path) == ["weights.pt"]
    assert torch.equal(read_tensors(path)["old"], torch.ones(2))


def test_a_disk_that_fills_up_while_torch_closes_its_archive_is_a_checkpoint_error_too(tmp_path):
    """torch.save then raises a RuntimeError about positions, and the OSError is only its context."""

    class Full:
        left = 1000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(data)

        def flush(self):
            pass

    with pytest.raises(RuntimeError):  # the premise
        torch.save({"a": torch.zeros(1000)}, Full())
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        write_file(tmp_path / "a", lambda _: torch.save({"a": torch.zeros(1000)}, Full()))
    with pytest.raises(RuntimeError, match=r"^not about the disk$"):
        write_file(tmp_path / "a", lambda _: (_ for _ in ()).throw(RuntimeError("not about the disk")))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("place", ["missing/folder/w.pt", "a-file/w.pt", "a-folder"])
def test_a_place_where_no_file_can_be_is_a_checkpoint_error(tmp_path, place):
    (tmp_path / "a-file").write_bytes(b"x")
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(CheckpointError, match=f"{place}: could not be written .*choose another folder$"):
        write_tensors(tmp_path / place, TENSORS)
    assert listing(tmp_path) == ["a-file", "a-folder"]


# ---- folders -------------------------------------------------------------------------------------------------------


def put(folder, text, *, force=False):
    """Let a folder appear that holds one text, two folders deep."""
    with appearing(folder, force=force) as made:
        (made / "deep").mkdir()
        (made / "deep" / "file").write_text(text)


def half(folder, error):
    """Begin a folder and fail."""
    with appearing(folder, force=True) as made:
        (made / "half").write_text("new")
        raise error("stop")


def held(place):
    """Every file below a place with its text, and every folder."""
    return {
        path.relative_to(place).as_posix(): path.read_text() if path.is_file() else None for path in place.rglob("*")
    }


def one(text):
    return {"f": None, "f/deep": None, "f/deep/file": text}


def test_a_folder_appears_when_it_is_whole_and_nothing_else_is_left(tmp_path):
    with appearing(tmp_path / "a" / "b" / "f", force=False) as made:
        (made / "file").write_text("x")
        assert not (tmp_path / "a" / "b" / "f").exists()
        assert made.parent == tmp_path / "a" / "b"  # on the same disk: a move copies nothing
    assert held(tmp_path / "a" / "b") == {"f": None, "f/file": "x"}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [_Interrupted, KeyError, OSError])
def test_an_interrupted_folder_leaves_what_was_there_and_the_error_as_it_is(tmp_path, error, there):
    if there:
        put(tmp_path / "f", "old")
    with pytest.raises(error, match="stop"):
        half(tmp_path / "f", error)
    assert held(tmp_path) == (one("old") if there else {})


@pytest.mark.parametrize("error", [_Interrupted, OSError])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("move", [0, 1])
def test_an_old_folder_stands_until_the_new_one_does_wherever_the_replacement_stops(
    tmp_path, monkeypatch, error, after, move
):
    """A move that fails, or an interruption right after one: the old folder is there, or the new one, and alone."""
    put(tmp_path / "f", "old")
    rename, moves = os.rename, []

    def failing(source, target):
        assert held(tmp_path).items() >= one("old").items() or moves, "the old one stands until the moves begin"
        moves.append(target)
        if len(moves) - 1 != move:
            return rename(source, target)
        if after:
            rename(source, target)
        raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(CheckpointError if error is OSError else error, match=os.strerror(errno.ENOSPC)):
        put(tmp_path / "f", "new", force=True)
    assert held(tmp_path) == one("new" if (move, after) == (1, True) else "old")


def test_an_old_folder_that_cannot_come_back_is_not_lost(tmp_path, monkeypatch):
    put(tmp_path / "f", "old")
    rename, moves = os.rename, []

    def failing(source, target):
        moves.append(target)
        if len(moves) > 1:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EROFS)):
        put(tmp_path / "f", "new", force=True)
    (left,) = tmp_path.iterdir()
    assert (left / "deep" / "file").read_text() == "old"


def test_a_folder_is_replaced_with_force_alone_and_what_is_no_folder_never(tmp_path):
    put(tmp_path / "f", "old")
    with pytest.raises(InputError, match=r"f, which is there already, expected a new folder; add --force$"):
        put(tmp_path / "f", "new")
    put(tmp_path / "f", "new", force=True)
    assert held(tmp_path) == one("new")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    before = held(tmp_path)
    for name in ("file", "link", "nowhere"):
        with pytest.raises(InputError, match=f"{name}, which is no folder"):
            put(tmp_path / name, "new", force=True)
    with pytest.raises(CheckpointError, match=r"could not be written .*choose another place$"):
        put(tmp_path / "file" / "f", "new")
    assert held(tmp_path) == before


def test_what_an_interrupted_folder_left_stands_in_nobodys_way(tmp_path, monkeypatch):
    """Killed, it leaves its half and perhaps the old folder beside the place, under names of its own."""
    put(tmp_path / "f", "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(_Interrupted):
            half(tmp_path / "f", _Interrupted)
        put(tmp_path / "f", "second", force=True)
    left = {path.name for path in tmp_path.iterdir()} - {"f"}
    assert len(left) == 2
    assert all(name.startswith(".f.") for name in left)
    put(tmp_path / "f", "third", force=True)
    assert (tmp_path / "f" / "deep" / "file").read_text() == "third"
    assert {path.name for path in tmp_path.iterdir()} == {"f", *left}


def test_two_folders_for_one_place_do_not_share_their_half(tmp_path):
    with appearing(tmp_path / "f", force=True) as outer:
        (outer / "outer").write_text("x")
        put(tmp_path / "f", "inner")
        assert held(tmp_path / "f") == {"deep": None, "deep/file": "inner"}
    assert held(tmp_path) == {"f": None, "f/outer": "x"}


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_folder_has_the_permissions_that_any_new_one_gets(tmp_path, umask):
    before = os.umask(umask)
    try:
        put(tmp_path / "f", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o777 & ~umask


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated)")
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.eye(3).to_sparse(), "call .to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "call .to_dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "call .dequantize"),
        (lambda: torch.ones(2, device="meta"), "put it on a device"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "pad it"),
    ],
    ids=["sparse", "sparse rows", "quantized", "without data", "nested"],
)
def test_tensors_that_are_not_dense_are_refused_by_name(make, remedy):
    value = make()
    assert not is_dense(value)
    with pytest.raises(InputError, match=r"got 'odd', a tensor of torch\..*expected dense tensors; " + remedy):
        sha256_of_tensors({"a": torch.ones(2), "odd": value})


def test_whatever_is_strided_is_dense_and_what_is_no_tensor_is_not():
    assert all(is_dense(value) for value in (*TENSORS.values(), torch.eye(4)[::2].T, torch.nn.Parameter(torch.ones(2))))
    assert not is_dense([1.0])


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert str(caught.value) == f"{path}: no such file, expected weights; check the path, or train again"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "weights.pt"
    write_tensors(path, TENSORS)
    return path.read_bytes()


DAMAGED = r"weights\.pt: got a file that is damaged or holds more than tensors \(\w+\), expected a state dict .*; copy it again"


def test_a_truncated_file_is_refused_at_every_length(tmp_path, whole):
    path = tmp_path / "weights.pt"
    for length in [0, 1, 2, 4, *range(10, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=DAMAGED):
            read_tensors(path)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, whole):
    """torch.load reads a damaged tensor without a word; what lies outside every record (padding, dates) may differ."""
    path, chance = tmp_path / "weights.pt", random.Random(0)
    refused = silent = 0
    for place in chance.sample(range(len(whole)), 150):
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            content = read_tensors(path)
        except CheckpointError:
            refused += 1
        else:
            silent += 1
            assert same(content)
    assert refused > silent

    start = whole.index(TENSORS["layer.weight"].numpy().tobytes())
    changed = bytearray(whole)
    changed[start + 100] ^= 1
    path.write_bytes(bytes(changed))
    assert not torch.equal(torch.load(path, weights_only=True)["layer.weight"], TENSORS["layer.weight"])  # the premise
    with pytest.raises(CheckpointError, match=DAMAGED):
        read_tensors(path)


class _Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))  # creates a file when it is unpickled


@pytest.mark.parametrize("form", ["zip", "legacy", "bare-pickle"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, form):
    path, exploded = tmp_path / "weights.pt", tmp_path / "exploded"
    content = {"weight": torch.zeros(2), "extra": _Bomb(exploded)}
    if form == "bare-pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert not exploded.exists()
    with pytest.raises(CheckpointError, match=DAMAGED):
        read_tensors(path)
    assert not exploded.exists()
    torch.load(path, weights_only=False) if form != "bare-pickle" else pickle.loads(path.read_bytes())
    assert exploded.exists()  # the bomb was live


@pytest.mark.parametrize(
    "content", [nn.Linear(2, 2), {"model": nn.Linear(2, 2)}, {"f": print}], ids=["module", "nested", "function"]
)
def test_whole_modules_and_functions_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=DAMAGED):
        read_tensors(tmp_path / "weights.pt")


def test_what_is_no_dict_is_refused_and_older_files_of_tensors_are_read(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match=r"weights\.pt: got list, expected a dict of tensors by name$"):
        read_tensors(path)
    torch.save(OrderedDict(TENSORS), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same(read_tensors(path))


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    for content in (b"", b"not a checkpoint", b"\x89PNG\r\n\x1a\n" + bytes(500)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=DAMAGED):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip, but none of torch's")
    with pytest.raises(CheckpointError, match=DAMAGED):
        read_tensors(path)


# ---- hashes --------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_file_is_sha256_of_its_bytes(tmp_path, monkeypatch):
    content = bytes(range(256)) * 10_000  # more than two blocks of the reader for Python 3.10
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_of_file(tmp_path / "file") == expected
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert sha256_of_file(tmp_path / "file") == expected


def test_the_hash_depends_on_values_and_not_on_where_or_how_they_lie():
    expected = sha256_of_tensors(TENSORS)
    assert len(expected) == 64
    assert sha256_of_tensors(dict(reversed(TENSORS.items()))) == expected
    assert sha256_of_tensors({name: value.clone() for name, value in TENSORS.items()}) == expected
    wide = torch.arange(1200.0).reshape(20, 60)
    strided = {**TENSORS, "layer.weight": (wide[:, :30] - wide[:, :30] + TENSORS["layer.weight"]).T.contiguous().T}
    assert not strided["layer.weight"].is_contiguous()
    assert sha256_of_tensors(strided) == expected
    assert sha256_of_tensors({**TENSORS, "layer.weight": nn.Parameter(TENSORS["layer.weight"].clone())}) == expected
    image = torch.rand(2, 3, 4, 4)
    assert sha256_of_tensors({"x": image.to(memory_format=torch.channels_last)}) == sha256_of_tensors({"x": image})


@pytest.mark.gpu
def test_the_hash_on_a_gpu_is_that_on_the_cpu():
    assert sha256_of_tensors({name: value.cuda() for name, value in TENSORS.items()}) == sha256_of_tensors(TENSORS)


def changed(name, value):
    return {**{key: tensor for key, tensor in TENSORS.items() if key != name}, **value}


WEIGHT = TENSORS["layer.weight"]
NUDGED = WEIGHT.clone()
NUDGED[3, 4] = torch.nextafter(NUDGED[3, 4], torch.tensor(1e9))


@pytest.mark.parametrize(
    "other",
    [
        changed("layer.weight", {"layer.weight2": WEIGHT}),
        changed("layer.weight", {"layer.weight": NUDGED}),
        changed("layer.weight", {"layer.weight": -WEIGHT}),  # the first entry: 0.0 and -0.0 are different bytes
        changed("layer.weight", {"layer.weight": WEIGHT.reshape(30, 20)}),
        changed("layer.weight", {"layer.weight": WEIGHT.reshape(1, 20, 30)}),
        changed("layer.weight", {"layer.weight": WEIGHT.double()}),
        changed("layer.weight", {"layer.weight": WEIGHT.view(torch.int32)}),  # the same bytes under another type
        changed("layer.weight", {}),
        changed("nothing", {"nothing": torch.zeros(3, 0)}),
        changed("nothing", {"nothing": torch.zeros(0, 3, dtype=torch.float64)}),
        changed("count", {"count": torch.tensor([7])}),
    ],
)
def test_the_hash_sees_names_values_shapes_and_types(other):
    assert sha256_of_tensors(other) != sha256_of_tensors(TENSORS)


def test_no_name_can_pass_for_the_end_of_another_tensor():
    two = {"x": torch.tensor([65], dtype=torch.uint8), "y": torch.tensor([66], dtype=torch.uint8)}
    one = {"x|(1,)|torch.uint8|Ay": torch.tensor([66], dtype=torch.uint8)}
    numbered = {"x|(1,)|torch.uint8|A1|y": torch.tensor([66], dtype=torch.uint8)}
    assert len({sha256_of_tensors(tensors) for tensors in (two, one, numbered)}) == 3


SMALL = st.dictionaries(st.text("ab|1(),", max_size=4), st.lists(st.integers(0, 255), max_size=3), max_size=3)


@given(first=SMALL, second=SMALL)
def test_equal_hashes_mean_equal_tensors(first, second):
    hashes = [
        sha256_of_tensors({name: torch.tensor(values, dtype=torch.uint8) for name, values in tensors.items()})
        for tensors in (first, second)
    ]
    assert (hashes[0] == hashes[1]) == (first == second)
