"""The ART trainers: one class a method, which declares its objective and nothing else."""

from __future__ import annotations

from art_saliency.methods.aalp import AALP
from art_saliency.methods.adv_gsct import AdvGSCT
from art_saliency.methods.baselines import ALP, FGSMRS, MART, PGDAT, TRADES, Standard
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.fsr import FSRTrainer
from art_saliency.trainers.j_sigr import JSIGRTrainer

__all__ = [
    "TRAINERS",
    "AALPTrainer",
    "ALPTrainer",
    "AdvGSCTTrainer",
    "FGSMTrainer",
    "FSRTrainer",
    "JSIGRTrainer",
    "MARTTrainer",
    "PGDATTrainer",
    "StandardTrainer",
    "TRADESTrainer",
]


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


class TRADESTrainer(ObjectiveTrainer):
    """
    TRADES with its own inner maximisation, of the KL divergence (Zhang et al. 2019).

    The keywords are those of :class:`~art_saliency.methods.baselines.TRADES`; ``eps`` is required.
    """

    objective_class = TRADES


class MARTTrainer(ObjectiveTrainer):
    """
    Misclassification-aware adversarial training (Wang et al. 2020).

    The keywords are those of :class:`~art_saliency.methods.baselines.MART`; ``eps`` is required.
    """

    objective_class = MART


class ALPTrainer(ObjectiveTrainer):
    """
    Adversarial logit pairing (Kannan et al. 2018).

    The keywords are those of :class:`~art_saliency.methods.baselines.ALP`; ``eps`` is required.
    """

    objective_class = ALP


class AALPTrainer(ObjectiveTrainer):
    """
    Adaptive adversarial logits pairing, a reconstruction (Wu et al., ACM TOMM 2024).

    The keywords are those of :class:`~art_saliency.methods.aalp.AALP`; ``eps`` is required.
    """

    objective_class = AALP


TRAINERS: dict[str, type[ObjectiveTrainer]] = {
    cls.method_name(): cls
    for cls in (
        StandardTrainer,
        FGSMTrainer,
        PGDATTrainer,
        TRADESTrainer,
        MARTTrainer,
        ALPTrainer,
        AdvGSCTTrainer,
        JSIGRTrainer,
        AALPTrainer,
        FSRTrainer,
    )
}
"""By the method's name, as the command line calls it."""
