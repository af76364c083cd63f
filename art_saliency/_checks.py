"""Validation of arguments with one wording: ``eps: got -1, expected 0 < eps <= 1``."""

from __future__ import annotations

import difflib
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from art_saliency.errors import InputError, MissingDependencyError, UnknownOptionError

_T = TypeVar("_T")
_GREATEST_SEED = 2**63 - 1
GREATEST = 1e9
"""Of weights and lengths: Adam squares gradients in float32, which overflows beyond 1e19; then nothing is learned, and nothing says so."""

_CHUNK = 1 << 22  # elements looked at in one go, so that checking a large array takes little memory


def refuse(name: str, got: object, expected: str, remedy: str = "") -> InputError:
    """The error every check raises. :return: An :class:`InputError`, to be raised by the caller."""
    return InputError(f"{name}: got {got}, expected {expected}" + (f"; {remedy}" if remedy else ""))


def _shown(number: float) -> str:
    """A number in eight digits: six would make ``got 1, expected eps <= 1`` of 1.000001, more would show float32's rounding."""
    return f"{number:.8g}"


def _bounds(name: str, least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    left = f"{_shown(least)} <= " if least is not None else f"{_shown(above)} < " if above is not None else ""
    right = f" <= {_shown(most)}" if most is not None else f" < {_shown(below)}" if below is not None else ""
    return f"{left}{name}{right}"


def _is_finite_real(value: Any) -> bool:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the greatest float
        return False


def real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    remedy: str = "",
) -> float:
    """Check a finite real number. :return: It, as a float."""
    expected = _bounds(name, least, above, most, below)
    if not _is_finite_real(value):
        raise refuse(name, repr(value), f"a number, {expected}" if expected != name else "a finite number", remedy)
    if (
        (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        raise refuse(name, _shown(float(value)), expected, remedy)
    return float(value)


def weight(name: str, value: Any) -> float:
    """Check the weight of a term of a loss. :return: It, as a float."""
    return real(name, value, least=0, most=GREATEST)


def whole(name: str, value: Any, *, least: int = 0, most: int | None = None, remedy: str = "") -> int:
    """Check a whole number. :return: It, as an int."""
    integral = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integral or value < least or (most is not None and value > most):
        raise refuse(name, repr(value), f"a whole number, {_bounds(name, least, None, most, None)}", remedy)
    return int(value)


def seed(value: Any, name: str = "seed") -> int:
    """Check where random numbers start: 0 to 2**63 - 1, which every generator in use takes. :return: It, as an int."""
    return whole(name, value, most=_GREATEST_SEED)


def flag(name: str, value: Any) -> bool:
    """Check True or False. :return: It, as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise refuse(name, repr(value), "True or False")
    return bool(value)


def suggestion(word: object, known: Iterable[str], *, most: int = 1) -> str:
    """:return: ``"; did you mean 'x'?"``, or up to so many names, when known ones are close to the word, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Check a name against those that exist. :return: It."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        expected = ", ".join(repr(n) for n in names)
        raise InputError(f"{name}: got {value!r}, expected one of {expected}{suggestion(value, names)}")
    return value


def function(name: str, value: Any, known: Mapping[str, Callable[..., _T]]) -> Callable[..., _T]:
    """:return: The function of that name, or `value` itself when it is callable."""
    return value if callable(value) else known[one_of(name, value, known)]


def no_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise when a keyword is given that does not exist."""
    names = list(known)
    for word in given:
        if word not in names:
            raise UnknownOptionError(
                f"{where}: got an unknown keyword {word!r}, expected any of {', '.join(names)}{suggestion(word, names)}"
            )


def optional(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package. :return: The module; a clear error names the extra when it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # the package is there, but something that it needs is not: its own message is the better one
        raise MissingDependencyError(package.split(".")[0], extra, purpose) from error


def _wide(tensor: Tensor) -> Tensor:
    """Torch can store unsigned types above uint8 (16-bit PNGs, NumPy labels) but neither compare nor reduce them."""
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def is_mapped(array: Any) -> bool:
    """:return: Whether an array, or what it is a view of, is mapped from a file."""
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def a_tensor(name: str, value: Any) -> Tensor:
    """Refuse what is no tensor, where arrays are not taken. :return: It."""
    if not isinstance(value, Tensor):
        raise refuse(name, f"a {type(value).__name__}", "a tensor", "convert it with torch.as_tensor()")
    return value


def as_tensor(name: str, value: Any) -> Tensor:
    """:return: The array as a tensor that shares its memory where it can; anything but real numbers is refused."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise refuse(name, f"dtype {value.dtype}", "real numbers")
        if value.is_inference():  # no graph takes such a tensor, nor a slice of it
            with torch.inference_mode(False):
                value = value.clone()
        return _wide(value.detach())
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "buif":
            raise TypeError(f"dtype {array.dtype}")
        writeable = array.flags.writeable or is_mapped(
            array
        )  # a mapped one may be larger than memory; nothing here writes to it
        if not writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return _wide(torch.from_numpy(array))
    except (TypeError, ValueError) as error:
        raise refuse(name, f"{type(value).__name__} ({error})", "an array or tensor of numbers") from error


def images(
    x: Any,
    *,
    name: str = "x",
    low: float = 0.0,
    high: float = 1.0,
    shape: tuple[int, ...] | None = None,
    allow_uint8: bool = False,
) -> Tensor:
    """
    Check a batch or set of images: (N, C, H, W), N > 0, finite, within the pixel range.

    :param shape: (C, H, W) that the network takes; ``None`` accepts any.
    :param low: The least pixel value.
    :param high: The greatest pixel value.
    :param allow_uint8: Whether uint8 is accepted as it is, standing for 0 to 255.
    :return: The images as a tensor: float32 (float64 stays float64), or uint8 where that is allowed.
    """
    tensor = as_tensor(name, x)
    expected = "(N, C, H, W)" if shape is None else f"(N, {', '.join(map(str, shape))})"
    if tensor.ndim != 4:
        hint = "add the channel axis: x[:, None]" if tensor.ndim == 3 else "reshape it to images"
        raise refuse(name, f"shape {tuple(tensor.shape)}", f"4 axes, {expected}", hint)
    if len(tensor) == 0:
        raise refuse(name, "an empty set", "at least one image")
    if tensor.numel() == 0:
        raise refuse(name, f"shape {tuple(tensor.shape)}", "images that have pixels")
    if shape is not None and tuple(tensor.shape[1:]) != tuple(shape):
        channels_last = tuple(tensor.shape[1:]) == (*shape[1:], shape[0])
        hint = "channels come first: x.transpose(0, 3, 1, 2)" if channels_last else ""
        raise refuse(name, f"shape {tuple(tensor.shape)}", expected, hint)
    if tensor.dtype == torch.bool:
        raise refuse(name, f"dtype {tensor.dtype}", "real numbers")
    if allow_uint8 and tensor.dtype == torch.uint8:
        return tensor
    brightest = 0.0
    for start in range(0, len(tensor), step := max(1, _CHUNK // max(1, tensor[0].numel()))):
        chunk = tensor[start : start + step]
        if chunk.is_floating_point() and not bool(torch.isfinite(chunk).all()):
            bad = int((~torch.isfinite(chunk)).flatten(1).any(1).nonzero()[0]) + start
            raise refuse(name, f"NaN or Inf in image {bad}", "finite pixels", "remove or repair it")
        least, most = float(chunk.min()), float(chunk.max())
        if least < low - 1e-6 * (high - low) or most > high + 1e-6 * (high - low):
            hint = "put the mean and standard deviation into the network, not into the data" if least < low else ""
            if (low, high) == (0.0, 1.0) and 1 < most <= 255 and least >= 0:
                hint = "divide by 255"
            got, expected = (
                f"values from {_shown(least)} to {_shown(most)}",
                f"values in [{_shown(low)}, {_shown(high)}]",
            )
            raise refuse(name, got, expected, hint)
        brightest = max(brightest, most)
    if (low, high) == (0.0, 255.0) and 0 < brightest <= 1:
        got, remedy = (
            f"values up to {_shown(brightest)}",
            "multiply them by 255, or make the classifier with clip_values=(0, 1)",
        )
        raise refuse(name, got, "values up to 255", remedy)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def bytes_of_pixels(name: str, images: _T, *, remedy: str = "convert it to float") -> _T:
    """
    Refuse uint8 images that hold 0 and 1 alone: divided by 255, as bytes are, they would be black. Those that are black pass.

    :param images: (N, C, H, W), of any type: a tensor, or what is indexed like one. :param remedy: What to do. :return: It.
    """
    some: Any = images
    if some.dtype != torch.uint8:
        return images
    lit = False
    for start in range(0, len(some), 256):
        brightest = int(some[start : start + 256].max())
        if brightest > 1:
            return images
        lit = lit or brightest == 1
    if lit:
        expected = "uint8 from 0 to 255"
        raise refuse(name, "uint8 of 0 and 1 alone", expected, f"it would be divided by 255: {remedy}")
    return images


def labels(y: Any, count: int, num_classes: int, *, name: str = "y", soft: bool = True) -> Tensor:
    """
    Check labels: indices (N,), one-hot or soft rows (N, K).

    :param count: The number of images they belong to.
    :param soft: Whether rows that are not one-hot are accepted.
    :return: (N,) int64 for indices and one-hot rows; (N, K) float32 for soft labels.
    """
    tensor = as_tensor(name, y)
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim not in (1, 2):
        raise refuse(name, f"shape {tuple(tensor.shape)}", f"({count},) indices or ({count}, {num_classes}) rows")
    if len(tensor) != count:
        raise refuse(name, f"{len(tensor)} labels", f"{count}, one for each image")
    if tensor.numel() == 0:
        raise refuse(name, "an empty set", "at least one label")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise refuse(name, "NaN or Inf", "finite labels")
    if tensor.ndim == 1:
        if not bool((tensor == tensor.long()).all()):
            raise refuse(name, "fractions", f"class indices, 0 to {num_classes - 1}")
        indices = tensor.long()
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= num_classes:
            raise refuse(name, f"labels from {least} to {most}", f"labels from 0 to {num_classes - 1}")
        return indices
    if tensor.shape[1] != num_classes:
        raise refuse(name, f"shape {tuple(tensor.shape)}", f"({count}, {num_classes})")
    rows = tensor.float()
    if float(rows.min()) < 0 or float((rows.sum(1) - 1).abs().max()) > 1e-3:
        raise refuse(name, "rows that are not probabilities", "rows of at least 0 that sum to 1")
    if bool((rows.max(1).values == 1).all()):
        return rows.argmax(1)
    if not soft:
        raise refuse(name, "soft labels", "indices or one-hot rows", "this method needs one true class an image")
    return rows
