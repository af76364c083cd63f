"""
Accuracy under common corruptions: made on the spot, or read from arrays in the manner of CIFAR-10-C.

The corruptions are those of Hendrycks and Dietterich (2019) that scikit-image, NumPy and Pillow make by themselves, with the
parameters of CIFAR-10-C and mostly by the calls of the script that made it. *Choice*, where this package differs: they
are applied to images of any size and to grey ones, pixels are not rounded to 8 bits afterwards (JPEG and pixelation work in
8 bits), and an image's noise depends on the seed and its place alone, so severities differ in strength and in nothing else.
The severities were meant for 32x32 pixels: on smaller images the spatial ones are harsher.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from art_saliency import _checks
from art_saliency.data import to_unit
from art_saliency.evaluation.accuracy import accuracy, binomial_interval, with_interval

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Corruption",
    "CorruptionResult",
    "check_corruptible",
    "corrupt",
    "corruption_accuracy",
    "names_among",
    "severities_among",
]

SEVERITIES = (1, 2, 3, 4, 5)
"""As in CIFAR-10-C; :func:`corrupt` also takes 0, the image itself."""

Image = NDArray[np.float64]


@dataclass(frozen=True)
class Corruption:
    """
    One kind of corruption.

    :ivar apply: (image (H, W, C) in [0, 1], level, generator) -> image, of any values: they are clipped afterwards.
    :ivar levels: What severities 1 to 5 mean.
    :ivar needs_colour: Whether it would do nothing sensible to a grey image.
    """

    apply: Callable[[Image, Any, np.random.Generator], Image]
    levels: tuple[Any, ...]
    needs_colour: bool = False


def _skimage(module: str) -> Any:
    return _checks.optional(f"skimage.{module}", "corruptions", "making corrupted images")


def _gaussian_noise(x: Image, level: float, random: np.random.Generator) -> Image:
    return np.asarray(x + level * random.standard_normal(x.shape))


def _shot_noise(x: Image, level: float, random: np.random.Generator) -> Image:
    return np.asarray(random.poisson(x * level) / level)


def _impulse_noise(x: Image, level: float, random: np.random.Generator) -> Image:
    return np.asarray(_skimage("util").random_noise(x, mode="s&p", rng=random, amount=level))


def _speckle_noise(x: Image, level: float, random: np.random.Generator) -> Image:
    return np.asarray(x + x * level * random.standard_normal(x.shape))


def _gaussian_blur(x: Image, level: float, _: np.random.Generator) -> Image:
    return np.asarray(_skimage("filters").gaussian(x, sigma=level, channel_axis=-1))


def _in_hsv(x: Image, change: Callable[[Image], None]) -> Image:
    color = _skimage("color")
    hsv = color.rgb2hsv(x)
    change(hsv)
    return np.asarray(color.hsv2rgb(hsv))


def _brightness(x: Image, level: float, _: np.random.Generator) -> Image:
    if x.shape[2] == 1:  # a grey pixel is its own value
        return x + level

    def change(hsv: Image) -> None:
        hsv[..., 2] = np.clip(hsv[..., 2] + level, 0, 1)

    return _in_hsv(x, change)


def _saturate(x: Image, level: tuple[float, float], _: np.random.Generator) -> Image:
    def change(hsv: Image) -> None:
        hsv[..., 1] = np.clip(hsv[..., 1] * level[0] + level[1], 0, 1)

    return _in_hsv(x, change)


def _contrast(x: Image, level: float, _: np.random.Generator) -> Image:
    mean = x.mean((0, 1), keepdims=True)
    return np.asarray((x - mean) * level + mean)


def _through_pillow(x: Image, change: Callable[[Any, Any], Any]) -> Image:
    """Apply a function of (Pillow's module, Pillow's image) to an image of 8 bits."""
    pillow = _checks.optional("PIL.Image", "corruptions", "making corrupted images")
    pixels = np.rint(x * 255).astype(np.uint8)
    image = change(pillow, pillow.fromarray(pixels[..., 0] if x.shape[2] == 1 else pixels))
    return np.asarray(image, dtype=np.float64).reshape(x.shape) / 255


def _jpeg(x: Image, level: int, _: np.random.Generator) -> Image:
    def change(pillow: Any, image: Any) -> Any:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=level)
        return pillow.open(file)

    return _through_pillow(x, change)


def _pixelate(x: Image, level: float, _: np.random.Generator) -> Image:
    def change(pillow: Any, image: Any) -> Any:
        small = tuple(max(1, int(side * level)) for side in image.size)
        return image.resize(small, pillow.Resampling.BOX).resize(image.size, pillow.Resampling.BOX)

    return _through_pillow(x, change)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": Corruption(_speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": Corruption(_brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": Corruption(_contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    "saturate": Corruption(_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), needs_colour=True),
    "jpeg_compression": Corruption(_jpeg, (80, 65, 58, 50, 40)),
    "pixelate": Corruption(_pixelate, (0.95, 0.90, 0.85, 0.75, 0.65)),
}
"""By the names of CIFAR-10-C's files, with its parameters."""


def corrupt(x: Tensor, name: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """
    Corrupt images.

    :param x: (N, C, H, W) in [0, 1], or uint8; 1 or 3 channels.
    :param name: One of :data:`CORRUPTIONS`.
    :param severity: 0 (the images themselves) to 5.
    :param seed: Of the noise. :param first: The place of the first image in the set: an image's noise depends on its place
        and the seed, so that batches make no difference.
    :return: (N, C, H, W) in [0, 1], float, on the device of `x`.
    """
    kind = CORRUPTIONS[_checks.one_of("corruption", name, CORRUPTIONS)]
    severity = _checks.whole("severity", severity, most=len(SEVERITIES))
    seed, first = _checks.seed(seed), _checks.whole("first", first)
    images = to_unit(_checks.images(x, allow_uint8=True))
    _check_channels(images.shape[1], [name])
    if severity == 0:
        return images.clone()
    key = zlib.crc32(name.encode())  # hash() of a word differs between processes
    corrupted = []
    for place, image in enumerate(images.permute(0, 2, 3, 1).double().cpu().numpy().clip(0, 1), start=first):
        random = np.random.default_rng([seed, key, place])
        corrupted.append(np.clip(kind.apply(image, kind.levels[severity - 1], random), 0, 1))
    return torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2).to(images).contiguous()


def check_corruptible(channels: int, names: Iterable[str] = (), *, remedy: str = "") -> dict[str, str]:
    """
    Refuse images that cannot be corrupted, and to begin without the packages that do it.

    :param names: Of the corruptions. :param remedy: What to do with images of so many channels.
    :return: The versions of what does it, NumPy's among them.
    """
    _check_channels(channels, names, remedy)
    purpose = "making corrupted images"
    versions = {name: _checks.optional(name, "corruptions", purpose).__version__ for name in ("skimage", "PIL")}
    return {"numpy": np.__version__, **versions}


def _check_channels(channels: int, names: Iterable[str], remedy: str = "") -> None:
    if channels not in (1, 3):
        raise _checks.refuse("x", f"images of {channels} channels", "1 or 3", remedy)
    for name in names:
        if channels == 1 and CORRUPTIONS[name].needs_colour:
            raise _checks.refuse("corruption", f"{name!r} for grey images", "images of 3 channels", "leave it out")


@dataclass(frozen=True)
class CorruptionResult:
    """
    Accuracy by corruption and severity.

    :ivar correct: ``correct[name][severity]``, images classified correctly, of `count`.
    :ivar count: Images, the same ones everywhere.
    :ivar clean_correct: Of the clean images, where they were at hand.
    :ivar source: ``"made on the spot"``, or the folder's name.
    :ivar seed: Of corruptions made on the spot.
    :ivar versions: Of what made them.
    """

    correct: dict[str, dict[int, int]]
    count: int
    clean_correct: int | None
    source: str
    seed: int | None
    versions: dict[str, str]

    def accuracy(self, name: str, severity: int) -> float:
        """:return: 0 to 1."""
        return self.correct[name][severity] / self.count

    @property
    def mean_accuracy(self) -> float:
        """:return: The unweighted mean over corruptions and severities, 0 to 1: RobustBench's score for corruptions."""
        cells = [right for by_severity in self.correct.values() for right in by_severity.values()]
        return sum(cells) / (len(cells) * self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """
        The 95 % interval of the mean.

        As wide as if there were one corruption. Every cell is of the same images, so a hundred cells are not a hundred times
        the evidence; an image's own mean spreads less than a yes or no, so this is on the safe side.
        """
        return binomial_interval(round(self.mean_accuracy * self.count), self.count)

    def to_json(self) -> dict[str, Any]:
        """:return: Every accuracy with its 95 % interval, severities as words, which JSON's keys are."""

        def measured(right: int) -> dict[str, Any]:
            return with_interval(right / self.count, self.count, correct=right)

        return {
            "mean_accuracy": self.mean_accuracy,
            "interval_95": list(self.interval),
            "count": self.count,
            "clean": None if self.clean_correct is None else measured(self.clean_correct),
            "corruptions": {
                name: {str(severity): measured(right) for severity, right in by_severity.items()}
                for name, by_severity in self.correct.items()
            },
            "source": self.source,
            "seed": self.seed,
            "versions": self.versions,
        }


def corruption_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> CorruptionResult:
    """
    Accuracy on images that are corrupted here and now. Not the fifteen of CIFAR-10-C: weather, motion and glass are missing.

    :param model: Maps (N, C, H, W) in [0, 1] to logits; evaluated in eval mode, its modes restored.
    :param x: (N, C, H, W) in [0, 1], or uint8; 1 or 3 channels.
    :param y: (N,) int64, or one-hot rows (N, K).
    :param corruptions: Names from :data:`CORRUPTIONS`; ``None`` is all that suit the channels.
    :param severities: Of 1 to 5. :param batch_size: Images at once; it makes no difference to the result.
    :param seed: Of the noise. :param progress: Whether a bar is shown on stderr.
    :return: The result.
    """
    images = _checks.images(x, allow_uint8=True)
    channels, count = images.shape[1], len(images)
    suited = [name for name, kind in CORRUPTIONS.items() if channels == 3 or not kind.needs_colour]
    names = suited if corruptions is None else names_among("corruptions", corruptions, CORRUPTIONS)
    versions = check_corruptible(channels, names)
    chosen = severities_among(severities)
    batch_size = _checks.whole("batch_size", batch_size, least=1)
    seed = _checks.seed(seed)
    clean = round(accuracy(model, images, y, batch_size=batch_size) * count)
    correct = {name: dict.fromkeys(chosen, 0) for name in names}
    with tqdm(
        total=len(names) * len(chosen) * count, desc="corruptions", unit="image", disable=not progress, leave=None
    ) as bar:
        for name, by_severity in correct.items():
            for severity in chosen:
                for start in range(0, count, batch_size):
                    rows = slice(start, start + batch_size)
                    batch = corrupt(images[rows], name, severity, seed=seed, first=start)
                    by_severity[severity] += round(accuracy(model, batch, y[rows], batch_size=batch_size) * len(batch))
                    bar.update(len(batch))
    return CorruptionResult(correct, count, clean, "made on the spot", seed, versions)


def names_among(what: str, given: Sequence[str], known: Iterable[str] | None = None) -> list[str]:
    """:return: Names, each once, refused unless there is one at least and all are among those known, where they are said."""
    if isinstance(given, str):
        raise _checks.refuse(what, repr(given), "a sequence of names", f"write [{given!r}]")
    names = list(dict.fromkeys(given))
    if not names:
        raise _checks.refuse(what, "no name", "at least one")
    return names if known is None else [_checks.one_of(what, name, known) for name in names]


def severities_among(given: Sequence[int]) -> list[int]:
    """:return: Severities, each once, in order, refused unless all are 1 to 5 and there is one at least."""
    chosen = sorted({_checks.whole("severities", severity, least=1, most=len(SEVERITIES)) for severity in given})
    if not chosen:
        raise _checks.refuse("severities", "none", "at least one of 1 to 5")
    return chosen
