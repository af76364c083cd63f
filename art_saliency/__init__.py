"""
Saliency- and feature-based adversarial defences for the Adversarial Robustness Toolbox, evaluated with the real AutoAttack.

    from art_saliency import AdvGSCTTrainer
    trainer = AdvGSCTTrainer(classifier, eps=8 / 255)   # an ART PyTorchClassifier
    trainer.fit(x_train, y_train, nb_epochs=20)

Names are imported when they are first used, so that ``import art_saliency`` and ``art-saliency --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from art_saliency._version import __version__

if TYPE_CHECKING:
    from art_saliency.augmentation import Augmentation
    from art_saliency.data import DataSet, load_data
    from art_saliency.evaluation.accuracy import accuracy, pgd_accuracy
    from art_saliency.evaluation.audit import AuditReport, audit
    from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
    from art_saliency.evaluation.corruptions import corruption_accuracy
    from art_saliency.evaluation.report import Report, full_report
    from art_saliency.evaluation.saliency import saliency_report
    from art_saliency.evaluation.transfer import transfer
    from art_saliency.methods.fsr import insert_fsr, remove_fsr
    from art_saliency.methods.fsr_loss import FSRLoss
    from art_saliency.networks import build_network
    from art_saliency.robustbench.export import export_robustbench
    from art_saliency.robustbench.verify import verify_bundle
    from art_saliency.robustbench.zoo import load_robustbench
    from art_saliency.threat import ThreatModel
    from art_saliency.trainers.methods import (
        AALPTrainer,
        AdvGSCTTrainer,
        ALPTrainer,
        FGSMTrainer,
        FSRTrainer,
        JSIGRTrainer,
        MARTTrainer,
        PGDATTrainer,
        StandardTrainer,
        TRADESTrainer,
    )
    from art_saliency.trainers.network import network_of
    from art_saliency.trainers.runs import load, save

_HOME = {
    "AALPTrainer": "trainers.methods",
    "ALPTrainer": "trainers.methods",
    "AdvGSCTTrainer": "trainers.methods",
    "AuditReport": "evaluation.audit",
    "Augmentation": "augmentation",
    "AutoAttackResult": "evaluation.autoattack",
    "DataSet": "data",
    "FGSMTrainer": "trainers.methods",
    "FSRLoss": "methods.fsr_loss",
    "FSRTrainer": "trainers.methods",
    "JSIGRTrainer": "trainers.methods",
    "MARTTrainer": "trainers.methods",
    "PGDATTrainer": "trainers.methods",
    "Report": "evaluation.report",
    "StandardTrainer": "trainers.methods",
    "TRADESTrainer": "trainers.methods",
    "ThreatModel": "threat",
    "accuracy": "evaluation.accuracy",
    "audit": "evaluation.audit",
    "autoattack": "evaluation.autoattack",
    "build_network": "networks",
    "corruption_accuracy": "evaluation.corruptions",
    "export_robustbench": "robustbench.export",
    "full_report": "evaluation.report",
    "insert_fsr": "methods.fsr",
    "load": "trainers.runs",
    "load_data": "data",
    "load_robustbench": "robustbench.zoo",
    "network_of": "trainers.network",
    "pgd_accuracy": "evaluation.accuracy",
    "remove_fsr": "methods.fsr",
    "saliency_report": "evaluation.saliency",
    "save": "trainers.runs",
    "transfer": "evaluation.transfer",
    "verify_bundle": "robustbench.verify",
}

__all__ = [
    "AALPTrainer",
    "ALPTrainer",
    "AdvGSCTTrainer",
    "AuditReport",
    "Augmentation",
    "AutoAttackResult",
    "DataSet",
    "FGSMTrainer",
    "FSRLoss",
    "FSRTrainer",
    "JSIGRTrainer",
    "MARTTrainer",
    "PGDATTrainer",
    "Report",
    "StandardTrainer",
    "TRADESTrainer",
    "ThreatModel",
    "__version__",
    "accuracy",
    "audit",
    "autoattack",
    "build_network",
    "corruption_accuracy",
    "export_robustbench",
    "full_report",
    "insert_fsr",
    "load",
    "load_data",
    "load_robustbench",
    "network_of",
    "pgd_accuracy",
    "remove_fsr",
    "saliency_report",
    "save",
    "transfer",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"art_saliency.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'art_saliency' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
