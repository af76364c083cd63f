"""Random crops and flips of a whole batch at once, on its own device; per-image maps move with their images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from art_saliency import _checks
from art_saliency.randomness import RandomSource, uniform

__all__ = ["AUGMENTATIONS", "Augmentation", "augmentation_by_name"]


@dataclass(frozen=True)
class Augmentation:
    """
    Pad with black, crop a window of the image's own size at a random place, mirror it left to right half of the time.

    Every image has its own place and its own mirroring. Nothing waits for the device.

    :param pad: Pixels added on each side: the window has ``(2 * pad + 1) ** 2`` equally likely places. 0 does not crop.
    :param flip: Whether half of the images are mirrored.
    :param map_fill: What maps are padded with; images are padded with 0.
    """

    pad: int = 4
    flip: bool = True
    map_fill: float = 0.0

    def __post_init__(self) -> None:
        _checks.whole("pad", self.pad)
        _checks.flag("flip", self.flip)
        _checks.real("map_fill", self.map_fill)

    def __call__(
        self, x: Tensor, random: RandomSource | None, maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Move images, and their maps by the very same crop and flip.

        :param x: (N, C, H, W), uint8 or float.
        :param random: Where the three numbers an image come from; ``None`` is torch's global generator.
        :param maps: (N, M, H, W), of any dtype: one or more maps an image, at the resolution of the images.
        :return: The moved images and maps, of the shape and dtype that they came in.
        """
        if maps is not None and (len(maps), *maps.shape[2:]) != (len(x), *x.shape[2:]):
            n, _, h, w = x.shape
            remedy = "bring the maps to the resolution of the images before they are moved"
            raise _checks.refuse("maps", f"shape {tuple(maps.shape)}", f"({n}, M, {h}, {w})", remedy)
        if self.pad >= min(x.shape[2:]):
            shown = "x".join(map(str, x.shape[2:]))
            raise _checks.refuse(
                "pad", self.pad, f"less than a side of the {shown} images", "a larger one loses the image"
            )
        if self.pad == 0 and not self.flip:
            return x, maps
        # All three are drawn whatever is used, so that "crop" and "crop-flip" of one seed crop alike.
        top, left, mirror = uniform(x.new_empty((len(x), 3), dtype=torch.float32), random).unbind(1)
        places = 2 * self.pad + 1
        # The greatest float32 below 1 is 1 - 2**-24, whose product with a small odd number rounds to less than that
        # number: the floor is 2 * pad at most.
        corner = (top * places).long(), (left * places).long()
        mirrored = mirror < 0.5
        moved = self._move(x, 0.0, corner, mirrored)
        return moved, None if maps is None else self._move(maps, self.map_fill, corner, mirrored)

    def _move(self, x: Tensor, fill: float, corner: tuple[Tensor, Tensor], mirrored: Tensor) -> Tensor:
        if self.pad:
            height, width = x.shape[2:]
            # Every window as a view, (N, C, 2 * pad + 1, 2 * pad + 1, H, W); indexing copies one for each image.
            windows = F.pad(x, (self.pad,) * 4, value=fill).unfold(2, height, 1).unfold(3, width, 1)
            x = windows[torch.arange(len(x), device=x.device), :, corner[0], corner[1]]
        return torch.where(mirrored[:, None, None, None], x.flip(3), x) if self.flip else x


AUGMENTATIONS: dict[str, tuple[bool, bool]] = {
    "none": (False, False),
    "flip": (False, True),
    "crop": (True, False),
    "crop-flip": (True, True),
}
"""By name: whether images are cropped, and whether they are mirrored."""


def augmentation_by_name(name: str, *, pad: int = 4, map_fill: float = 0.0) -> Augmentation:
    """
    The augmentation of a name of :data:`AUGMENTATIONS`; ``"none"`` gives images back untouched and draws no number.

    :param pad: Where the name crops: 4 is usual for 32x32 pixels; smaller images want less.
    :param map_fill: What maps are padded with.
    """
    crop, flip = AUGMENTATIONS[_checks.one_of("augmentation", name, AUGMENTATIONS)]
    return Augmentation(pad=_checks.whole("pad", pad, least=1) if crop else 0, flip=flip, map_fill=map_fill)
