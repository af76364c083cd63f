"""
Perturbation saliency: how much the output moves when a spot of the image is blurred away; and which pixels that makes salient.

After Greydanus et al. (2018), "Visualizing and Understanding Atari Agents", carried from game frames to images.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import CheckpointError
from art_saliency.files import read_tensors, sha256_of_tensors, write_tensors
from art_saliency.gradients import top_share_mask
from art_saliency.modes import evaluating
from art_saliency.randomness import RandomSource

__all__ = [
    "SCORES",
    "blurred",
    "gaussian_kernel",
    "load_or_compute",
    "maps_fingerprint",
    "perturbation_saliency",
    "salient_mask",
]

SCORES = ("logits", "log-probability")
"""What a perturbation is scored by: the movement of all logits, or the drop of one class's log-probability."""

_CHUNK = 256  # images hashed at once
_GRID = 8  # points along the shorter side when no stride is given: a stride of 4 at 32 x 32


def gaussian_kernel(sigma: float, like: Tensor) -> Tensor:
    """
    A Gaussian cut off at three standard deviations.

    :param sigma: The standard deviation in pixels, above 0.
    :param like: A tensor whose dtype and device the kernel takes.
    :return: (2 * ceil(3 * sigma) + 1,), at least 0, sums to 1.
    """
    reach = math.ceil(3 * _checks.real("sigma", sigma, above=0))
    offsets = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def blurred(x: Tensor, sigma: float) -> Tensor:
    """
    Gaussian blur; the edge pixels are repeated outside, so a constant image stays what it is.

    :param x: (N, C, H, W), floating point.
    :param sigma: In pixels, above 0.
    :return: (N, C, H, W).
    """
    kernel = gaussian_kernel(sigma, x)
    reach, channels = len(kernel) // 2, x.shape[1]
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _centres(length: int, stride: float, like: Tensor) -> Tensor:
    """:return: Centres of equal cells of about `stride` pixels: where bilinear upsampling expects the samples to lie."""
    count = max(1, round(length / stride))
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) * (length / count) - 0.5


def _spots(x: Tensor, stride: float, radius: float) -> tuple[Tensor, tuple[int, int]]:
    """:return: One soft disc a grid point, (points, 1, H, W) with its peak of 1 at the point, and the grid's size."""
    height, width = x.shape[-2:]
    rows, columns = _centres(height, stride, x), _centres(width, stride, x)
    pixels_y = torch.arange(height, dtype=x.dtype, device=x.device)
    pixels_x = torch.arange(width, dtype=x.dtype, device=x.device)
    # exp(-d^2 / 2r^2) is separable: the product of its profile down and its profile across.
    down = torch.exp(-0.5 * ((pixels_y - rows[:, None]) / radius) ** 2)
    across = torch.exp(-0.5 * ((pixels_x - columns[:, None]) / radius) ** 2)
    discs = down[:, None, :, None] * across[None, :, None, :]
    return discs.reshape(-1, 1, height, width), (len(rows), len(columns))


def _class_log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """:return: (...,) log-probability of the class `y` (N,), or the mean over soft labels (N, K); logits (..., N, K)."""
    log_probability = logits.log_softmax(-1)
    weights = F.one_hot(y, logits.shape[-1]).to(logits.dtype) if y.ndim == 1 else y.to(logits.dtype)
    return (log_probability * weights).sum(-1)


def _grid_scores(
    model: nn.Module, x: Tensor, y: Tensor | None, spots: Tensor, sigma: float, score: str, rows: int
) -> Tensor:
    """:return: (N, points), the score of every spot of one chunk of images; `rows` images a forward pass."""
    clean = model(x)
    target = clean.argmax(1) if y is None else y
    difference = blurred(x, sigma) - x
    scores = []
    for some in torch.split(spots, max(1, rows // len(x))):
        perturbed = x + some[:, None] * difference  # (points, N, C, H, W): the image inside 1 - M, its blur inside M
        logits = model(perturbed.flatten(0, 1)).view(len(some), len(x), -1)
        if score == "logits":
            scores.append(0.5 * (clean - logits).square().sum(-1))  # 1/2 ||z(x) - z(x')||^2
        else:
            drop = _class_log_probability(clean, target) - _class_log_probability(logits, target)
            scores.append(drop.clamp_min(0))
    return torch.cat(scores).T


@torch.no_grad()
def perturbation_saliency(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    stride: float | None = None,
    sigma: float | None = None,
    radius: float | None = None,
    score: str = "logits",
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """
    Score every point of a grid by what blurring the image there does to the output.

    The network runs in eval mode in full precision, once for the image and once for every point.

    :param model: Maps (N, C, H, W) in [0, 1] to logits (N, K).
    :param x: (N, C, H, W) in [0, 1], or uint8; on any device: chunks are moved to the network's.
    :param y: (N,) int64 or (N, K) soft labels, the class that ``"log-probability"`` watches; ``None`` is the predicted one.
    :param stride: Distance of grid points in pixels; ``None`` is an eighth of the shorter side (4 at 32 x 32), at least 1.
    :param sigma: The blur's standard deviation in pixels; ``None`` is half the stride, at least 1.
    :param radius: The soft disc's radius in pixels (a Gaussian's standard deviation); ``None`` is half the stride, at least 1.
    :param score: ``"logits"``: half the squared distance of the logits. ``"log-probability"``: the class's drop, at least 0.
    :param batch_size: Images a forward pass.
    :param progress: Called with the number of images that were finished, after each chunk: ``tqdm(total=N).update`` fits.
    :return: (N, 1, h, w) scores of at least 0 at grid size, on the device of `x`.
    """
    _checks.one_of("score", score, SCORES)
    _checks.whole("batch_size", batch_size, least=1)
    step = max(1.0, min(x.shape[-2:]) / _GRID) if stride is None else _checks.real("stride", stride, above=0)
    blur = max(1.0, step / 2) if sigma is None else _checks.real("sigma", sigma, above=0)
    disc = max(1.0, step / 2) if radius is None else _checks.real("radius", radius, above=0)
    device = next((p.device for p in model.parameters()), x.device)
    parts = []
    # Half precision would drown small differences of logits in rounding.
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for start in range(0, len(x), batch_size):
            images = x[start : start + batch_size].to(device)
            images = images.float() / 255 if images.dtype == torch.uint8 else images
            labels = None if y is None else y[start : start + batch_size].to(device)
            spots, grid = _spots(images, step, disc)
            scores = _grid_scores(model, images, labels, spots, blur, score, batch_size)
            parts.append(scores.view(-1, 1, *grid).to(x.device))
            if progress is not None:
                progress(len(images))
    return torch.cat(parts)


class _OneOrder(RandomSource):
    """The same order of pixels for every image: ties then fall alike whatever the batch, the epoch or the rank."""

    def uniform(self, like: Tensor) -> Tensor:
        return super().uniform(like[:1]).expand_as(like)


def salient_mask(scores: Tensor, size: tuple[int, int], share: float = 0.3) -> Tensor:
    """
    The salient pixels S: scores interpolated to full size, the highest-ranked share of each image marked.

    An image's mask depends on that image alone.

    :param scores: (N, 1, h, w), of any size.
    :param size: (H, W) of the images.
    :param share: The share to mark, 0 to 1; ``round(share * H * W)`` pixels an image.
    :return: (N, 1, H, W) of 0 and 1 (1 = salient), detached.
    """
    full = F.interpolate(scores.detach(), size=tuple(size), mode="bilinear", align_corners=False)
    return top_share_mask(full, share, _OneOrder(0, full.device))


def maps_fingerprint(teacher: nn.Module, x: Tensor, params: Mapping[str, Any], y: Tensor | None = None) -> str:
    """
    What cached maps depend on, as one number: the teacher's modules and weights, the data and the parameters.

    A teacher whose ``forward`` changed while its modules (as ``repr`` shows them) and weights did not goes unnoticed.

    :param teacher: The network that explains.
    :param x: (N, C, H, W), the images in the order of their indices.
    :param params: JSON-able parameters of the maps.
    :param y: The labels, when the maps depend on them.
    :return: A SHA-256 sum, 64 hexadecimal digits.
    """
    weights = {name: value for name, value in teacher.state_dict().items() if isinstance(value, Tensor)}
    parts = [json.dumps(dict(params), sort_keys=True), repr(teacher), sha256_of_tensors(weights), str(tuple(x.shape))]
    # In chunks, so that a memory-mapped set is never in memory as a whole.
    parts += [sha256_of_tensors({"x": x[start : start + _CHUNK]}) for start in range(0, len(x), _CHUNK)]
    if y is not None:
        parts.append(sha256_of_tensors({"y": y}))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_or_compute(cache: str | os.PathLike[str] | None, fingerprint: str, compute: Callable[[], Tensor]) -> Tensor:
    """
    Saliency scores from a file when it holds these very ones, else computed and written there.

    :param cache: The file; ``None`` computes and writes nothing.
    :param fingerprint: What :func:`maps_fingerprint` gave; a file with another one is computed anew and replaced.
    :param compute: Makes the scores.
    :return: (N, 1, h, w) scores.
    :raises CheckpointError: When the file exists and is no such cache; it is not overwritten.
    """
    path = None if cache is None else Path(cache)
    if path is not None and path.exists():
        stored = read_tensors(path)
        if set(stored) != {"scores", "fingerprint"}:
            raise CheckpointError(f"{path}: got other tensors, expected a cache of saliency maps; give another path")
        if bytes(stored["fingerprint"].tolist()).hex() == fingerprint:
            scores: Tensor = stored["scores"]
            return scores
    scores = compute()
    if path is not None:
        digest = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
        write_tensors(path, {"scores": scores.detach().cpu().contiguous(), "fingerprint": digest})
    return scores
