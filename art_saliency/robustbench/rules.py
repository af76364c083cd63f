"""
RobustBench's rules as a lint: everything that is wrong with a network, at once, with the place and the cure.

"(1) in general non-zero gradients with respect to the inputs, (2) a fully deterministic forward pass, (3) no optimization
loop" (RobustBench's README); images in [0, 1] in, logits out; and a state dict that RobustBench's loader leaves whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from art_saliency.errors import UnsupportedModelError
from art_saliency.evaluation._autoattack_guard import process_kept
from art_saliency.files import is_dense
from art_saliency.robustbench.traces import Call, LoopWatch, gradient_stops, same, trace

__all__ = ["Violation", "key_violations", "network_violations", "probe_images", "refusal"]


class Violation(NamedTuple):
    """
    One rule broken.

    :ivar place: The submodule's dotted path, a key of the state dict, or the name of a step; ``""`` is the network as a whole.
    :ivar problem: What is wrong, as the end of a sentence that begins with the place.
    :ivar cure: What to do.
    """

    place: str
    problem: str
    cure: str

    def __str__(self) -> str:
        return f"{self.place or 'the network'} {self.problem}; {self.cure}"


def refusal(what: str, violations: Sequence[Violation]) -> UnsupportedModelError:
    """:return: The error that lists them all."""
    lines = "".join(f"\n  - {violation}" for violation in violations)
    return UnsupportedModelError(f"{what}: RobustBench would not accept it, for {len(violations)} reason(s):{lines}")


def probe_images(input_shape: Sequence[int], count: int = 6) -> Tensor:
    """
    Images on which networks are tried and compared, the same everywhere.

    :param input_shape: (C, H, W).
    :return: (N, C, H, W) float32 in [0, 1]: black, white, then noise that gets coarser, in multiples of 1/255.
    """
    noise = torch.Generator().manual_seed(20_09_10_670)
    images = [torch.zeros(*input_shape), torch.ones(*input_shape)]
    for number in range(count - 2):
        cells = [max(1, side // 2**number) for side in input_shape[1:]]
        coarse = torch.rand(1, input_shape[0], *cells, generator=noise)
        images.append(nn.functional.interpolate(coarse, size=tuple(input_shape[1:]), mode="nearest")[0])
    return (torch.stack(images[:count]) * 255).round() / 255


# --- the state dict -------------------------------------------------------------------------------------------------------


def key_violations(state: Mapping[str, Any]) -> list[Violation]:
    """
    What RobustBench's loader, or ``torch.load(weights_only=True)``, would do to a state dict.

    Its loader cuts the first characters of every key that *contains* ``module.`` or ``model.``, wherever it does.

    :param state: Tensors by key.
    :return: One violation a key.
    """
    found = []
    for key, value in state.items():
        cut = next((part for part in ("module.", "model.") if part in key), None)
        if not isinstance(value, Tensor):
            problem = f"holds a {type(value).__name__}, which torch.load(weights_only=True) may refuse"
            found.append(Violation(key, problem, "keep it out of the state dict, or register it as a buffer"))
        elif cut is not None:
            problem = f"contains {cut!r}: RobustBench's loader would read it as {key[len(cut) :]!r}"
            found.append(Violation(key, problem, f"rename the attribute {_attribute(key, cut)!r} of the network"))
        elif "_orig_mod." in key:
            cure = "save the state dict of the network that torch.compile was given"
            found.append(Violation(key, "has a name that torch.compile gave", cure))
        elif key in ("state_dict", "last"):
            problem = "is a name that RobustBench's loader takes for a whole state dict"
            found.append(Violation(key, problem, "rename the attribute"))
        elif ".fsr.auxiliary." in f".{key}":
            found.append(Violation(key, "belongs to an auxiliary head, which serves training only", "drop the head"))
        elif not is_dense(value):
            found.append(Violation(key, f"is not a plain tensor ({value.layout}, {value.dtype})", "make it dense"))
        elif value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            problem = f"is {value.dtype}, whose rounding masks gradients"
            found.append(Violation(key, problem, "call .float() on the network and evaluate it so"))
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            found.append(Violation(key, "holds NaN or infinite numbers", "train again"))
    return found


def _attribute(key: str, cut: str) -> str:
    """:return: The name, among those joined by dots, that ends in what is cut."""
    return key[: key.index(cut) + len(cut) - 1].rpartition(".")[2]


# --- the network ----------------------------------------------------------------------------------------------------------


def network_violations(model: nn.Module, input_shape: Sequence[int], num_classes: int) -> list[Violation]:
    """
    Try a network on six images and find what RobustBench's rules forbid. It and the global random states stay as they are.

    What cannot be seen from outside: that images are expected in [0, 1] rather than standardised, a gradient that a custom
    backward makes up, a search without gradients, and derivatives in forward mode.

    :param model: On any device; tried in eval mode.
    :param input_shape: (C, H, W). :param num_classes: K.
    :return: What is wrong; empty when nothing was found.
    """
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    x = probe_images(input_shape).to(like.device)  # float32, as RobustBench's own images are, whatever the network is
    before = {k: v.clone() for k, v in _state(model).items()}
    try:
        with process_kept(model, {}), torch.enable_grad():
            return _violations(model, x, num_classes, before)
    finally:
        with torch.no_grad():
            for key, value in _state(model).items():
                if key in before and not same(value, before[key]):
                    value.copy_(before[key])


def _violations(model: nn.Module, x: Tensor, num_classes: int, before: Mapping[str, Tensor]) -> list[Violation]:
    found = []
    with LoopWatch(model) as loops:
        try:
            first = trace(model, x)
        except Exception as error:
            found = _loop(loops)
            lines = str(error).strip().splitlines() or [""]
            problem = f"fails on images of shape {tuple(x.shape)} in [0, 1] ({type(error).__name__}: {lines[0][:200]})"
            other = next((t.dtype for t in before.values() if t.is_floating_point() and t.dtype != x.dtype), None)
            cure = f"it holds {other}, and RobustBench feeds float32: call .float() on it and evaluate it so"
            return [
                *found,
                Violation("", problem, cure if other else "look at the channels and the size that it takes"),
            ]
    found += _loop(loops)
    logits = first[-1].outputs[0] if first[-1].plain else None
    if logits is None or logits.shape != (len(x), num_classes):
        got = "more than one tensor" if logits is None else f"shape {tuple(logits.shape)}"
        problem = f"returns {got} for {len(x)} images, expected logits of shape ({len(x)}, {num_classes})"
        found.append(Violation("", problem, "return the logits alone, one for each class of the data set"))
    if logits is None or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        return found  # no logits; those of other classes are, and the rules can be tried on them
    found += _values(first, logits)
    if not bool(logits.isfinite().all()):
        return found
    with LoopWatch(model):  # as the first time: torch takes other attention kernels when it is watched
        noise = _random(first, trace(model, x))
    found += noise or _coupled(first, trace(model, x[:1]))
    found += [violation for violation in _attacked(model, x, first) if violation not in found]
    changed = [key for key, value in _state(model).items() if key not in before or not same(value, before[key])]
    cure = "let nothing but training change buffers and weights: if self.training: ..."
    found += [Violation(key, "changes when images are classified in eval mode", cure) for key in changed]
    return found + _gradients(model, x)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _loop(loops: LoopWatch) -> list[Violation]:
    cure = "publish the network without it; a loop of its own makes gradients useless to an attack"
    return [Violation(place, f"computes {what} in its forward pass", cure) for place, what in loops.seen]


def _values(calls: Sequence[Call], logits: Tensor) -> list[Violation]:
    """Whether what comes out is finite, float32 and not yet probabilities."""
    found, x = [], calls[-1]
    if logits.dtype not in (torch.float32, torch.float64):
        found.append(Violation("", f"returns {logits.dtype}", "call .float() on it: rounding masks gradients"))
    if not bool(logits.isfinite().all()):
        place = next((call.place for call in calls if not _finite(call.outputs) and _finite(call.inputs)), x.place)
        found.append(Violation(place, "puts out NaN or infinite numbers for images in [0, 1]", "look at its weights"))
        return found
    sums = {"softmax": logits.double().sum(1), "log-softmax": logits.double().exp().sum(1)}
    for name, total in sums.items():
        if torch.allclose(total, torch.ones_like(total), atol=1e-4) and (
            name != "softmax" or bool((logits >= 0).all())
        ):
            place = next((call.place for call in calls if call.outputs and same(call.outputs[0], logits)), "")
            problem = f"puts out probabilities ({name}), expected logits"
            found.append(Violation(place, problem, "take the softmax out; classes and loss stay the same"))
    return found


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def _attacked(model: nn.Module, x: Tensor, plain: Sequence[Call]) -> list[Violation]:
    """
    What the network does only when gradients to the images are asked for, as an attack does and a user does not.

    :param plain: The calls of a pass without gradients.
    """
    with LoopWatch(model) as loops:
        try:
            first, second = (trace(model, x, gradients=True) for _ in range(2))
        except Exception:  # why it cannot be differentiated is said where that is tried
            return _loop(loops)
    found = _loop(loops)
    if noise := _random(first, second):
        return found + noise
    if first[-1].plain and first[-1].outputs[0].shape == plain[-1].outputs[0].shape and _alike(first[-1], plain[-1]):
        return found
    # Kernels may differ between the two, and so may the submodules that are called: as far as they are the same, in order.
    pairs = takewhile(lambda pair: pair[0].place == pair[1].place, zip(first, plain, strict=False))
    place = next((call.place for call, other in pairs if not _alike(call, other)), "")
    cure = "let no result depend on whether gradients are enabled: an attack would meet another network than the user"
    return [*found, Violation(place, "classifies images differently while gradients are computed", cure)]


def _alike(ours: Call, theirs: Call) -> bool:
    """Whether two calls put out the same but for rounding."""
    pairs = zip(ours.outputs, theirs.outputs, strict=False)
    return len(ours.outputs) == len(theirs.outputs) and all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _random(first: Sequence[Call], second: Sequence[Call]) -> list[Violation]:
    """The innermost calls that say different things of the same input; the network itself when only its end differs."""
    cure = "switch the noise off in eval mode: if self.training: ... (RobustBench takes no randomised network)"
    places = [
        a.place
        for a, b in zip(first, second, strict=False)
        if a.place == b.place and same(a.inputs, b.inputs) and not same(a.outputs, b.outputs)
    ]
    if not places and not same(first[-1].outputs, second[-1].outputs):  # it called other submodules, perhaps
        places = [first[-1].place]
    # A parent of a random module differs too: only what is innermost is named.
    inner = [p for p in dict.fromkeys(places) if not any(o != p and (p == "" or o.startswith(f"{p}.")) for o in places)]
    return [Violation(place, "gives different results in two passes over the same images", cure) for place in inner]


def _coupled(batch: Sequence[Call], single: Sequence[Call]) -> list[Violation]:
    """The innermost call in which an image's result depends on the other images of its batch."""
    cure = "normalise by running statistics in eval mode (track_running_stats=True)"
    for whole, alone in zip(batch, single, strict=False):
        if whole.place != alone.place or len(whole.outputs) != len(alone.outputs):
            break
        if not all(_agrees(many, one) for many, one in zip(whole.outputs, alone.outputs, strict=True)):
            return [Violation(whole.place, "classifies an image differently by the batch that it comes in", cure)]
    return []


def _agrees(many: Tensor, one: Tensor) -> bool:
    """Whether the first image's rows of a batch are those that it has by itself, but for rounding; else not to be told."""
    if one.ndim == 0 or len(one) != 1 or one.shape[1:] != many.shape[1:] or one.numel() == 0:
        return True
    return _close(many[:1], one)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether tensors of one shape are the same but for rounding; NaN are alike nowhere."""
    if ours.numel() == 0:
        return True
    a, b = ours.double(), theirs.double()
    return bool(((a - b).abs() <= 1e-3 * (b.abs() + b.abs().max()) + 1e-6).all())


def _gradients(model: nn.Module, x: Tensor) -> list[Violation]:
    """Where the gradient to the images ends, or becomes NaN."""
    images = x.clone().requires_grad_(True)
    try:
        total = model(images)
        weights = torch.linspace(-1, 1, total.shape[1], device=total.device, dtype=total.dtype)
        gradient = (
            torch.autograd.grad((total * weights).sum(), images, allow_unused=True)[0] if total.requires_grad else None
        )
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        return [
            Violation("", f"cannot be differentiated ({type(error).__name__}: {line})", "keep in-place changes out")
        ]
    if gradient is not None and not bool(gradient.isfinite().all()):
        return [Violation("", "has NaN or infinite input gradients", "look for a root or a division at zero")]
    if gradient is not None and int((gradient != 0).flatten(1).any(1).sum()) * 2 > len(x):
        return []
    cure = "AutoAttack cannot attack it, so its robustness would not be believed: look for .detach(), torch.no_grad(), rounding, argmax"
    places = gradient_stops(model, x, weights)
    return [Violation(place, "lets no gradient through to the images", cure) for place in places or [""]]
