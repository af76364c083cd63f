"""The one training loop and what stands around it. It knows no method and no ART."""

from art_saliency.training.checkpoint import Checkpoints
from art_saliency.training.extensions import Extension
from art_saliency.training.loop import Run, train
from art_saliency.training.records import History

__all__ = ["Checkpoints", "Extension", "History", "Run", "train"]
