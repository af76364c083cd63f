"""What can go wrong, as types. Every message says what was got, what was expected and what to do."""

from __future__ import annotations

import os
import signal

__all__ = [
    "ArtSaliencyError",
    "CheckpointError",
    "InputError",
    "MissingDependencyError",
    "NoEffectWarning",
    "NonFiniteLossError",
    "TrainingInterrupted",
    "UnknownOptionError",
    "UnsupportedModelError",
]


class ArtSaliencyError(Exception):
    """The base of every error this package raises on purpose."""


class InputError(ArtSaliencyError, ValueError):
    """An argument, an array or a label outside what is accepted. Nothing was changed."""


class UnknownOptionError(ArtSaliencyError, TypeError):
    """A keyword or a name that does not exist."""


class UnsupportedModelError(ArtSaliencyError, TypeError):
    """A network, classifier or preprocessing chain that cannot be used as asked: it has no gradients, say."""


class CheckpointError(ArtSaliencyError, OSError):
    """A file or folder that is missing, damaged, or not what it claims to be."""


class MissingDependencyError(ArtSaliencyError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; run: pip install 'art-saliency[{extra}]'"
        )


class NonFiniteLossError(ArtSaliencyError, ArithmeticError):
    """
    Training met a loss or a weight that is NaN or infinite and stopped.

    :ivar term: The name of the first loss term that was not finite (``"weights"`` when the loss was still finite).
    :ivar step: The optimizer step, counted from 0 over the whole run, at which it was first seen.
    """

    def __init__(self, term: str, step: int, epoch: int, restored_step: int) -> None:
        self.term, self.step, self.epoch = term, step, epoch
        super().__init__(
            f"{term!r} became NaN or infinite at step {step} (epoch {epoch}); training stopped and the weights of "
            f"step {restored_step}, the last ones known to be finite, are in the classifier. Lower the learning rate or "
            f"the weight of the term, or set grad_clip"
        )


class TrainingInterrupted(ArtSaliencyError):  # noqa: N818, nothing is wrong
    """
    SIGINT or SIGTERM stopped a training that keeps checkpoints; it was kept first, and can go on.

    :ivar signal: The signal's number. :ivar step: Steps that are done. :ivar exit_code: 128 and the signal's number, as shells have it.
    """

    def __init__(self, number: int, step: int, folder: str | os.PathLike[str]) -> None:
        self.signal, self.step, self.exit_code = number, step, 128 + number
        super().__init__(
            f"training was interrupted by {signal.Signals(number).name} after step {step} and is kept in {folder}; to go on, "
            f"repeat the same call with resume='auto' (at the command line: the same words and --resume)"
        )


class NoEffectWarning(UserWarning):
    """Something was asked for that changed nothing."""
