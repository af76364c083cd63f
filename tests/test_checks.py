"""Every bound refuses what is outside and nothing that is inside, and says what was got, what was expected, what to do."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from art_saliency import _checks
from art_saliency.errors import InputError, MissingDependencyError, UnknownOptionError


def refused(message, call, *args, error=InputError, **options):
    """The whole message, not a part of it."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert str(caught.value) == message


# ---- numbers, flags and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {"above": 0, "most": 1}, "eps: got -1, expected 0 < eps <= 1"),
        (0, {"above": 0, "most": 1}, "eps: got 0, expected 0 < eps <= 1"),
        (8, {"least": 0, "most": 1, "remedy": "write 8 / 255"}, "eps: got 8, expected 0 <= eps <= 1; write 8 / 255"),
        (1.0000001, {"most": 1}, "eps: got 1.0000001, expected eps <= 1"),
        (1, {"below": 1}, "eps: got 1, expected eps < 1"),
        (-0.5, {"least": 0}, "eps: got -0.5, expected 0 <= eps"),
        (np.float32(2), {"least": 0, "below": 0.25}, "eps: got 2, expected 0 <= eps < 0.25"),
        ("0.1", {"least": 0}, "eps: got '0.1', expected a number, 0 <= eps"),
        (None, {}, "eps: got None, expected a finite number"),
        (True, {"least": 0}, "eps: got True, expected a number, 0 <= eps"),
        (float("nan"), {"above": 0}, "eps: got nan, expected a number, 0 < eps"),
        (float("inf"), {"least": 0}, "eps: got inf, expected a number, 0 <= eps"),
        (1 + 2j, {}, "eps: got (1+2j), expected a finite number"),
    ],
)
def test_real_says_what_it_got_and_what_it_expected(value, bounds, message):
    refused(message, _checks.real, "eps", value, **bounds)


def test_real_refuses_a_number_beyond_every_float_and_a_tensor():
    with pytest.raises(InputError, match=r"^eps: got 1000.*, expected a finite number$"):
        _checks.real("eps", 10**400)
    with pytest.raises(InputError, match=r"^eps: got tensor\(0.1000\), expected a finite number$"):
        _checks.real("eps", torch.tensor(0.1))


@given(
    value=st.floats(-4, 4) | st.integers(-4, 4),
    low=st.none() | st.integers(-3, 3),
    high=st.none() | st.integers(-3, 3),
    open_low=st.booleans(),
    open_high=st.booleans(),
)
def test_real_accepts_exactly_the_interval(value, low, high, open_low, open_high):
    bounds = {("above" if open_low else "least"): low, ("below" if open_high else "most"): high}
    inside = (low is None or (value > low if open_low else value >= low)) and (
        high is None or (value < high if open_high else value <= high)
    )
    if inside:
        result = _checks.real("a", value, **bounds)
        assert type(result) is float
        assert result == value
    else:
        with pytest.raises(InputError):
            _checks.real("a", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {}, "n: got -1, expected a whole number, 0 <= n"),
        (0, {"least": 1, "remedy": "leave it out"}, "n: got 0, expected a whole number, 1 <= n; leave it out"),
        (1234568, {"most": 1234567}, "n: got 1234568, expected a whole number, 0 <= n <= 1234567"),
        (2.0, {}, "n: got 2.0, expected a whole number, 0 <= n"),
        ("2", {}, "n: got '2', expected a whole number, 0 <= n"),
        (False, {}, "n: got False, expected a whole number, 0 <= n"),
        (None, {}, "n: got None, expected a whole number, 0 <= n"),
    ],
)
def test_whole_says_what_it_got_and_what_it_expected(value, bounds, message):
    refused(message, _checks.whole, "n", value, **bounds)


def test_whole_and_flag_take_numpys_own_types_and_give_pythons():
    assert type(_checks.whole("n", np.int32(3), most=3)) is int
    assert _checks.whole("n", 0) == 0
    assert _checks.flag("f", np.bool_(True)) is True
    assert _checks.flag("f", False) is False


@pytest.mark.parametrize("value", [-1, 2**63, 2**64, 1.0, "0", None, True])
def test_seed_refuses_what_some_generator_would(value):
    with pytest.raises(InputError, match=rf"^--seed: got {value!r}, expected a whole number, 0 <= --seed <= 9"):
        _checks.seed(value, "--seed")


def test_seed_gives_pythons_own_whole_number_and_its_greatest_starts_every_generator():
    assert type(_checks.seed(np.int64(3))) is int
    greatest = _checks.seed(2**63 - 1)
    torch.Generator().manual_seed(greatest)
    np.random.default_rng([greatest])


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.array([True])])
def test_flag_refuses_what_merely_looks_true(value):
    refused(f"f: got {value!r}, expected True or False", _checks.flag, "f", value)


def test_names_are_checked_and_a_close_one_is_suggested():
    assert _checks.one_of("norm", "L2", ("Linf", "L2")) == "L2"
    refused(
        "norm: got 'linf', expected one of 'Linf', 'L2'; did you mean 'Linf'?",
        _checks.one_of,
        "norm",
        "linf",
        ["Linf", "L2"],
    )
    refused("norm: got 'xyz', expected one of 'Linf', 'L2'", _checks.one_of, "norm", "xyz", ("Linf", "L2"))
    refused("norm: got 2, expected one of 'Linf', 'L2'; did you mean 'L2'?", _checks.one_of, "norm", 2, ("Linf", "L2"))
    refused("norm: got [], expected one of 'Linf', 'L2'", _checks.one_of, "norm", [], ("Linf", "L2"))  # no hash


def test_a_generator_of_names_is_read_once():
    refused("a: got 'c', expected one of 'x', 'y'", _checks.one_of, "a", "c", (name for name in "xy"))


def test_function_by_name_or_itself():
    known = {"half": abs}
    assert _checks.function("f", "half", known) is abs
    assert _checks.function("f", max, known) is max
    refused("f: got 'halb', expected one of 'half'; did you mean 'half'?", _checks.function, "f", "halb", known)
    refused("f: got 3, expected one of 'half'", _checks.function, "f", 3, known)


def test_unknown_keywords_are_named_and_known_ones_pass():
    _checks.no_unknown("fit", {"seed": 1, "lr": 2}, ("lr", "seed", "other"))
    _checks.no_unknown("fit", (), ())
    message = "fit: got an unknown keyword 'sed', expected any of lr, seed; did you mean 'seed'?"
    refused(message, _checks.no_unknown, "fit", ["lr", "sed"], ("lr", "seed"), error=UnknownOptionError)


def test_an_optional_package_is_imported_or_its_extra_is_named(tmp_path, monkeypatch):
    assert _checks.optional("json", "eval", "x") is sys.modules["json"]
    message = (
        "Drawing needs the package 'no_such_package', which is not installed; run: pip install 'art-saliency[eval]'"
    )
    refused(message, _checks.optional, "no_such_package.part", "eval", "Drawing", error=MissingDependencyError)

    # A package that is there but lacks something of its own: its message says what, ours would send the user astray.
    (tmp_path / "half_installed.py").write_text("import something_else_missing", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'something_else_missing'") as caught:
        _checks.optional("half_installed", "eval", "Drawing")
    assert not isinstance(caught.value, MissingDependencyError)


# ---- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        {"a": 1},
        object(),
        [[1, 2], [3]],
        np.array(["1"]),
        np.array([1 + 2j]),
        np.array([None]),
        torch.zeros(2) * 1j,
    ],
    ids=["none", "text", "dict", "object", "ragged", "strings", "complex", "objects", "complex-tensor"],
)
def test_what_is_no_array_of_real_numbers_is_refused(value):
    with pytest.raises(InputError, match=r"^x: got .+, expected (an array or tensor of|real) numbers$"):
        _checks.as_tensor("x", value)


def test_an_array_mapped_from_a_file_is_never_copied(tmp_path):
    """It may be larger than memory."""
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.uint8))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for array in (mapped, mapped[2:]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = _checks.as_tensor("x", array)
        assert tensor.data_ptr() == array.ctypes.data
        assert tensor.tolist() == array.tolist()


def test_arrays_share_memory_where_they_can_and_are_copied_where_they_cannot():
    array = np.zeros((2, 3), np.float32)
    _checks.as_tensor("x", array)[0, 0] = 7
    assert array[0, 0] == 7

    reverse = np.arange(3.0)[::-1]
    assert _checks.as_tensor("x", reverse).tolist() == [2, 1, 0]
    constant = np.broadcast_to(np.float32(1), (2, 2))
    _checks.as_tensor("x", constant).fill_(5)  # a tensor on read-only memory would crash or write through
    assert (constant == 1).all()

    weight = torch.ones(2, requires_grad=True)
    assert not _checks.as_tensor("x", weight).requires_grad
    assert _checks.as_tensor("x", weight).data_ptr() == weight.data_ptr()
    assert _checks.as_tensor("x", [[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_wide_unsigned_types_which_torch_cannot_compare_become_int64(dtype):
    array = np.array([0, 9], dtype)
    assert torch.equal(_checks.as_tensor("y", array), torch.tensor([0, 9]))
    assert torch.equal(_checks.labels(torch.from_numpy(array), 2, 10), torch.tensor([0, 9]))
    with pytest.raises(InputError, match=r"^y: got labels from 0 to 9, expected labels from 0 to 8$"):
        _checks.labels(array, 2, 9)
    with pytest.raises(InputError, match=r"^x: got values from 0 to 9, expected values in \[0, 1\]; divide by 255$"):
        _checks.images(array.reshape(2, 1, 1, 1))


# ---- images --------------------------------------------------------------------------------------------------------

GOOD = np.linspace(0, 1, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)


def put(value, place=(1, 0, 2, 3), array=GOOD):
    changed = array.copy()
    changed[place] = value
    return changed


def test_good_images_pass_unchanged_in_value():
    for x in (GOOD, torch.from_numpy(GOOD), GOOD.astype(np.float64), GOOD.tolist()):
        result = _checks.images(x, shape=(3, 4, 5))
        assert torch.equal(result.float(), torch.from_numpy(GOOD))
    assert _checks.images(GOOD).data_ptr() == torch.from_numpy(GOOD).data_ptr()  # not copied
    assert _checks.images(GOOD.astype(np.float64)).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(GOOD).to(dtype)
        assert _checks.images(x).dtype == torch.float32
        assert torch.equal(_checks.images(x), x.float())
    zeros_and_ones = np.eye(4, dtype=np.int64)[None, None]
    assert torch.equal(_checks.images(zeros_and_ones), torch.eye(4)[None, None])


BAD_IMAGES = {
    "rank-2": (GOOD[0, 0], {}, r"shape \(4, 5\), expected 4 axes, \(N, C, H, W\); reshape it to images"),
    "rank-3": (
        GOOD[:, 0],
        {},
        r"shape \(2, 4, 5\), expected 4 axes, \(N, C, H, W\); add the channel axis: x\[:, None\]",
    ),
    "rank-5": (
        GOOD[None],
        {"shape": (3, 4, 5)},
        r"shape \(1, 2, 3, 4, 5\), expected 4 axes, \(N, 3, 4, 5\); reshape it .*",
    ),
    "scalar": (0.5, {}, r"shape \(\), expected 4 axes, .*"),
    "empty": (GOOD[:0], {}, "an empty set, expected at least one image"),
    "no-pixels": (GOOD[:, :, :0], {}, r"shape \(2, 3, 0, 5\), expected images that have pixels"),
    "channels": (GOOD[:, :1], {"shape": (3, 4, 5)}, r"shape \(2, 1, 4, 5\), expected \(N, 3, 4, 5\)"),
    "size": (GOOD[:, :, :3], {"shape": (3, 4, 5)}, r"shape \(2, 3, 3, 5\), expected \(N, 3, 4, 5\)"),
    "channels-last": (
        GOOD.transpose(0, 2, 3, 1),
        {"shape": (3, 4, 5)},
        r"shape \(2, 4, 5, 3\), expected \(N, 3, 4, 5\); channels come first: x.transpose\(0, 3, 1, 2\)",
    ),
    "nan": (put(np.nan), {}, "NaN or Inf in image 1, expected finite pixels; remove or repair it"),
    "inf": (put(-np.inf, (0, 0, 0, 0)), {}, "NaN or Inf in image 0, expected finite pixels; remove or repair it"),
    "bool": (GOOD > 0.5, {}, "dtype torch.bool, expected real numbers"),
    "too-high": (put(1.00001), {}, r"values from 0 to 1.00001, expected values in \[0, 1\]; divide by 255"),
    "too-low": (
        put(-0.001),
        {},
        r"values from -0.001 to 1, expected values in \[0, 1\]; put the mean .* into the network.*",
    ),
    "0-to-255": (GOOD * 255, {}, r"values from 0 to 255, expected values in \[0, 1\]; divide by 255"),
    "uint8": ((GOOD * 255).astype(np.uint8), {}, r"values from 0 to 255, expected values in \[0, 1\]; divide by 255"),
    "0-to-256": (GOOD * 256, {"high": 255.0}, r"values from 0 to 256, expected values in \[0, 255\]"),
    "standardised": (GOOD * 4 - 2, {}, r"values from -2 to 2, expected values in \[0, 1\]; put the mean .*"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_with_the_cure(case):
    x, options, message = BAD_IMAGES[case]
    for value in (x, torch.tensor(np.array(x))):
        with pytest.raises(InputError, match=f"^pictures: got {message}$"):
            _checks.images(value, name="pictures", **options)


def test_uint8_stays_uint8_where_it_is_allowed_and_other_types_are_still_checked():
    x = (GOOD * 255).astype(np.uint8)
    result = _checks.images(x, allow_uint8=True)
    assert result.dtype == torch.uint8
    assert np.array_equal(result.numpy(), x)
    with pytest.raises(InputError, match="divide by 255"):
        _checks.images(x.astype(np.float32), allow_uint8=True)
    with pytest.raises(InputError, match="4 axes"):
        _checks.images(x[0], allow_uint8=True)


def test_the_range_is_the_callers():
    assert float(_checks.images(GOOD * 255, high=255.0).max()) == 255
    assert float(_checks.images(GOOD * 2 - 1, low=-1.0).min()) == -1
    _checks.images(GOOD + np.float32(5e-7))  # rounding is no error


@pytest.mark.parametrize("bad", range(7))
def test_a_large_set_is_checked_to_its_last_image_in_chunks(bad, monkeypatch):
    monkeypatch.setattr(_checks, "_CHUNK", 2 * 16)  # two images at once
    x = torch.rand(7, 1, 4, 4)
    assert torch.equal(_checks.images(x), x)
    x[bad, 0, 3, 3] = float("nan")
    with pytest.raises(InputError, match=f"NaN or Inf in image {bad},"):
        _checks.images(x)
    x[bad, 0, 3, 3] = 3
    with pytest.raises(InputError, match=r"values from .* to 3, expected"):
        _checks.images(x)


def test_one_image_larger_than_a_chunk_is_checked_too(monkeypatch):
    monkeypatch.setattr(_checks, "_CHUNK", 4)
    with pytest.raises(InputError, match="in image 1,"):
        _checks.images(put(np.nan))


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y",
    [
        [2, 0, 1],
        np.array([2, 0, 1], np.uint8),
        np.array([2, 0, 1], np.int8),
        np.array([2.0, 0.0, 1.0]),
        np.array([[2], [0], [1]]),
        np.eye(3, dtype=np.float32)[[2, 0, 1]],
        np.eye(3, dtype=np.int64)[[2, 0, 1]],
        np.eye(3, dtype=bool)[[2, 0, 1]],
        torch.tensor([2, 0, 1], dtype=torch.int32),
    ],
    ids=["list", "uint8", "int8", "whole-floats", "column", "one-hot", "one-hot-int", "one-hot-bool", "tensor"],
)
def test_every_way_to_write_one_class_an_image_gives_int64_indices(y):
    for soft in (True, False):
        result = _checks.labels(y, 3, 3, soft=soft)
        assert result.dtype == torch.int64
        assert result.tolist() == [2, 0, 1]


def test_soft_rows_stay_rows_and_are_refused_where_one_class_is_needed():
    rows = np.array([[0.5, 0.25, 0.25], [0, 1, 0]])
    result = _checks.labels(rows, 2, 3)
    assert result.dtype == torch.float32
    assert np.array_equal(result.numpy(), rows)
    message = "y: got soft labels, expected indices or one-hot rows; this method needs one true class an image"
    refused(message, _checks.labels, rows, 2, 3, soft=False)


ONE_HOT = np.eye(4)[[0, 1, 2]]
BAD_LABELS = {
    "one-too-many": ([0, 1, 2, 3], "4 labels, expected 3, one for each image"),
    "one-too-few": (ONE_HOT[:2], "2 labels, expected 3, one for each image"),
    "none": ([], "0 labels, expected 3, one for each image"),
    "too-high": ([0, 1, 4], "labels from 0 to 4, expected labels from 0 to 3"),
    "negative": ([0, -1, 2], "labels from -1 to 2, expected labels from 0 to 3"),
    "counted-from-one": ([1, 2, 4], "labels from 1 to 4, expected labels from 0 to 3"),
    "fractions": ([0, 0.5, 2], "fractions, expected class indices, 0 to 3"),
    "nan": ([0, np.nan, 2], "NaN or Inf, expected finite labels"),
    "inf": ([0, np.inf, 2], "NaN or Inf, expected finite labels"),
    "nan-row": (np.where(ONE_HOT > 0, np.nan, 0), "NaN or Inf, expected finite labels"),
    "rank-3": (ONE_HOT[:, None], r"shape \(3, 1, 4\), expected \(3,\) indices or \(3, 4\) rows"),
    "scalar": (1, r"shape \(\), expected \(3,\) indices or \(3, 4\) rows"),
    "columns": (ONE_HOT[:, :3], r"shape \(3, 3\), expected \(3, 4\)"),
    "no-columns": (ONE_HOT[:, :0], "an empty set, expected at least one label"),
    "logits": (ONE_HOT * 5 - 1, "rows that are not probabilities, expected rows of at least 0 that sum to 1"),
    "two-hot": (ONE_HOT + ONE_HOT[::-1], "rows that are not probabilities, expected rows of at least 0 that sum to 1"),
    "empty-row": (
        ONE_HOT * [[1], [0], [1]],
        "rows that are not probabilities, expected rows of at least 0 that sum to 1",
    ),
    "negative-row": (
        [[1.5, -0.5, 0, 0]] * 3,
        "rows that are not probabilities, expected rows of at least 0 that sum to 1",
    ),
    "complex": (torch.zeros(3) * 1j, "dtype torch.complex64, expected real numbers"),
    "text": (["cat", "dog", "cat"], r"list \(dtype <U3\), expected an array or tensor of numbers"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused_with_what_was_expected(case):
    y, message = BAD_LABELS[case]
    with pytest.raises(InputError, match=f"^targets: got {message}$"):
        _checks.labels(y, 3, 4, name="targets")


@given(
    y=st.lists(st.integers(-2, 6), min_size=1, max_size=6),
    count=st.integers(1, 6),
    classes=st.integers(2, 5),
)
def test_indices_pass_exactly_when_there_is_one_of_a_known_class_for_each_image(y, count, classes):
    if len(y) == count and all(0 <= label < classes for label in y):
        assert _checks.labels(y, count, classes).tolist() == y
    else:
        with pytest.raises(InputError):
            _checks.labels(y, count, classes)


@pytest.mark.gpu
def test_labels_on_a_gpu_are_checked_and_stay_there():
    rows = torch.full((2, 4), 0.25, device="cuda")
    assert _checks.labels(rows, 2, 4).device.type == "cuda"
    assert _checks.labels(torch.eye(4, device="cuda"), 4, 4).tolist() == [0, 1, 2, 3]


def test_every_refusal_is_a_value_error_too():
    """Whoever wraps ART code already catches ValueError."""
    assert issubclass(InputError, ValueError)
    assert issubclass(UnknownOptionError, TypeError)
    assert re.fullmatch(r"a: got b, expected c; d", str(_checks.refuse("a", "b", "c", "d")))
    assert str(_checks.refuse("a", "b", "c")) == "a: got b, expected c"


@pytest.mark.parametrize(("pixel", "legit"), [(2, True), (1, False), (0, True)])
def test_one_pixel_above_1_anywhere_in_the_set_makes_bytes_of_pixels(pixel, legit):
    images = torch.zeros(300, 1, 2, 2, dtype=torch.uint8)
    images[299, 0, 1, 1] = pixel
    with contextlib.nullcontext() if legit else pytest.raises(InputError, match="x: got uint8 of 0 and 1 alone"):
        assert _checks.bytes_of_pixels("x", images) is images
    assert _checks.bytes_of_pixels("x", images.float()).dtype == torch.float32
