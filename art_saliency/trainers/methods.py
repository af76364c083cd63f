"""The ART trainers: one class a method, which declares its objective and nothing else."""

from __future__ import annotations

from art_saliency.methods.adv_gsct import AdvGSCT
from art_saliency.methods.baselines import FGSMRS, PGDAT, Standard
from art_saliency.trainers.base import ObjectiveTrainer

__all__ = ["AdvGSCTTrainer", "FGSMTrainer", "PGDATTrainer", "TRAINERS", "StandardTrainer"]


class AdvGSCTTrainer(ObjectiveTrainer):
    """
    Adversarially gradient-based saliency consensus training, a reconstruction (Li et al., IEEE TDSC 2024).

    The keywords are those of :class:`~art_saliency.methods.adv_gsct.AdvGSCT`; ``eps`` is required.
    """

    objective_class = AdvGSCT


class PGDATTrainer(ObjectiveTrainer):
    """
    Adversarial training on PGD examples (Madry et al. 2018).

    The keywords are those of :class:`~art_saliency.methods.baselines.PGDAT`; ``eps`` is required.
    """

    objective_class = PGDAT


class FGSMTrainer(ObjectiveTrainer):
    """
    Adversarial training on single steps from a random start, FGSM-RS (Wong et al. 2020).

    The keywords are those of :class:`~art_saliency.methods.baselines.FGSMRS`; ``eps`` is required.
    """

    objective_class = FGSMRS


class StandardTrainer(ObjectiveTrainer):
    """
    Training on clean images by cross-entropy.

    The keywords are those of :class:`~art_saliency.methods.baselines.Standard`; ``eps`` is used for validation only.
    """

    objective_class = Standard


TRAINERS: dict[str, type[ObjectiveTrainer]] = {
    cls.objective_class.name: cls for cls in (StandardTrainer, FGSMTrainer, PGDATTrainer, AdvGSCTTrainer)
}
"""By the method's name, as the command line calls it."""
