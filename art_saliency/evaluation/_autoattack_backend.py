"""AutoAttack's two distributions behind one face: its author's (module ``autoattack``) and ``pyautoattack``."""

from __future__ import annotations

import json
import logging
import sys
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.errors import MissingDependencyError
from art_saliency.evaluation._autoattack_plan import Plan
from art_saliency.threat import ThreatModel

LOG = logging.getLogger("art_saliency.autoattack")
_THEIRS = "autoattack"


def distribution_version(name: str) -> str:
    """:return: The installed version, and the commit where pip wrote one down: the author's is always "0.1"."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return "unknown"  # a checkout on the path
    commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"{found.version}+git.{commit[:12]}" if commit else found.version


class Messages:
    """
    Takes the place of AutoAttack's logger: warnings are kept as data and logged, the rest goes to the log at DEBUG.

    :ivar warnings: What AutoAttack warned of, in its own words and order.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        """How pyautoattack warns."""
        self.warnings.append(text)
        LOG.warning("AutoAttack: %s", text)

    def log(self, text: str) -> None:
        """The author's only way to say anything: warnings are marked by their first word."""
        if text.startswith("Warning: "):
            self.warning(text.removeprefix("Warning: "))
        else:
            LOG.debug("AutoAttack: %s", text)

    info = debug = log


class Backend:
    """
    One installed distribution. Everything in which the two differ stands in this class.

    :param name: ``"autoattack"`` or ``"pyautoattack"``.
    :param attack_class: Its ``AutoAttack``.
    :ivar counter: Its process-wide count of calls that look like a dynamic defence; it is never reset by itself.
    """

    def __init__(self, name: str, attack_class: Any) -> None:
        self.name, self.version = name, distribution_version(name)
        self._class = attack_class
        self.counter: dict[str, int] = sys.modules[attack_class.__module__].checks.funcs

    def engine(
        self,
        model: nn.Module,
        threat: ThreatModel,
        version: str,
        plan: Plan,
        square_queries: int,
        seed: int,
        device: torch.device,
        messages: Messages,
    ) -> Any:
        """
        An ``AutoAttack`` object set up for one evaluation.

        :param version: Its parameters are set first; then the plan's attacks replace the list that it stands for.
        :param plan: Also gives the number of targets, which is 9 in AutoAttack whatever the network has.
        """
        chosen = list(plan.attacks) if version == "custom" else None
        if self.name == _THEIRS:
            engine = self._class(
                model, norm=threat.norm, eps=threat.eps, seed=seed, version=version, device=device,
                attacks_to_run=chosen or [], verbose=False,
            )  # fmt: skip
        else:
            engine = self._class(
                model, norm=threat.norm, eps=threat.eps, seed=seed, version=version, device=device, attacks=chosen
            )
        engine.attacks_to_run = list(plan.attacks)
        engine.apgd_targeted.n_target_classes = engine.fab.n_target_classes = plan.target_classes
        engine.square.n_queries = square_queries
        engine.logger = engine.apgd.logger = engine.apgd_targeted.logger = messages
        return engine

    def run(self, engine: Any, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """:return: Adversarial images (N, C, H, W) and the labels (N,) that AutoAttack saw the network give them."""
        batch = {"bs": batch_size, "return_labels": True} if self.name == _THEIRS else {"batch_size": batch_size}
        x_adv, y_adv = engine.run_standard_evaluation(x, y, **batch)
        return x_adv, y_adv


def find_backend() -> Backend:
    """
    The author's distribution when it is installed, else pyautoattack: the same attack, bit for bit.

    A stand-in that only calls itself ``autoattack``, as robustbench needs beside pyautoattack, is passed over.

    :raises MissingDependencyError: When neither is there.
    """
    try:
        attack_class = getattr(_checks.optional(_THEIRS, "eval", "AutoAttack"), "AutoAttack", None)
    except MissingDependencyError:
        attack_class = None
    if attack_class is not None and attack_class.__module__.split(".")[0] == _THEIRS:
        return Backend(_THEIRS, attack_class)
    return Backend("pyautoattack", _checks.optional("pyautoattack", "eval", "AutoAttack").AutoAttack)
