"""
The repair of robustbench 1.1.1, which cannot be imported as the registry ships it.

Two things are missing. ``robustbench/eval.py`` says ``from autoattack import AutoAttack``, while the package depends on
``pyautoattack``: the same attack, bit for bit, under another name and another signature. ``robustbench/loaders.py`` says
``import pkg_resources``, which setuptools 81 removed. :func:`import_robustbench` offers both *while RobustBench is being
imported*, as the last place where Python looks:

- what is installed wins (the author's own ``autoattack``, an older setuptools);
- what a fixed release does not ask for is never made;
- afterwards ``sys.modules`` and ``sys.meta_path`` are as they were: no other code ever sees a false ``autoattack``.

No file of RobustBench is changed, and nothing happens when this module is imported.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from art_saliency import _checks

__all__ = ["import_robustbench", "seeded"]


def import_robustbench() -> ModuleType:
    """
    Import RobustBench, repaired where that is necessary.

    :return: The package ``robustbench``, its module ``eval`` imported.
    :raises MissingDependencyError: When it, or AutoAttack, is not installed.
    """
    if "robustbench" not in sys.modules:  # what an import that failed has left would be without its parent
        for name in [name for name in sys.modules if name.startswith("robustbench.")]:
            del sys.modules[name]
    with _offered(_StandIns()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm and pkg_resources, about themselves
        return _checks.optional("robustbench", "robustbench", "loading models as RobustBench does")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """
    Give ``robustbench.eval.benchmark`` a seed, for which it has no parameter: AutoAttack would take the time of day.

    :param seed: Of every inner attack of every AutoAttack that ``benchmark`` makes inside the context.
    """
    seed = _checks.seed(seed)
    import_robustbench()
    evaluation = sys.modules["robustbench.eval"]
    attack = evaluation.AutoAttack
    evaluation.AutoAttack = partial(attack, seed=seed)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        evaluation.AutoAttack = attack  # type: ignore[attr-defined]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that robustbench 1.1.1 asks for and that nobody else has found."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self._fill: dict[str, Callable[[ModuleType], None]] = {
            "autoattack": _fill_autoattack,
            "autoattack.state": _fill_state,
            "pkg_resources": _fill_pkg_resources,
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """:return: A specification when the module is one of ours."""
        # The author's package, were it there, would bring its own `autoattack.state`.
        if fullname not in self._fill or ("." in fullname and fullname.split(".")[0] not in self.made):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == "autoattack")

    def exec_module(self, module: ModuleType) -> None:
        """Put into the module what RobustBench takes from it."""
        self._fill[module.__name__](module)
        self.made.append(module.__name__)


@contextlib.contextmanager
def _offered(stand_ins: _StandIns) -> Iterator[None]:
    sys.meta_path.append(stand_ins)
    try:
        yield
    finally:
        sys.meta_path.remove(stand_ins)
        for name in stand_ins.made:
            sys.modules.pop(name, None)


def _fill_autoattack(module: ModuleType) -> None:
    attack = _checks.optional("pyautoattack", "robustbench", "RobustBench").AutoAttack

    class AutoAttack(attack):  # type: ignore[misc, valid-type]
        """pyautoattack behind the signature of fra31's ``autoattack``, of which RobustBench uses a part."""

        def __init__(
            self,
            model: Any,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: Sequence[str] = (),
            version: str = "standard",
            is_tf_model: bool = False,
            device: Any = "cuda",
            log_path: str | None = None,
        ) -> None:
            if is_tf_model:
                raise _checks.refuse("is_tf_model", "True", "a network of PyTorch")
            chosen = list(attacks_to_run) or None
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, attacks=chosen, device=device)
            self.log_path = log_path

        def run_standard_evaluation(  # type: ignore[no-untyped-def]
            self, x_orig, y_orig, bs=250, return_labels=False, state_path=None
        ):
            """:return: Adversarial images (N, C, H, W), and the labels they are given when asked for."""
            with _logged(self.log_path):
                x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return (x_adv, y_adv) if return_labels else x_adv

    module.AutoAttack = AutoAttack  # type: ignore[attr-defined]


@contextlib.contextmanager
def _logged(path: str | None) -> Iterator[None]:
    """Write what pyautoattack says into a file, where fra31's would have written it."""
    if path is None:
        yield
        return
    logger, handler = logging.getLogger("auto-attack"), logging.FileHandler(path, encoding="utf-8")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def _fill_state(module: ModuleType) -> None:
    module.EvaluationState = _checks.optional("pyautoattack.state", "robustbench", "RobustBench").EvaluationState  # type: ignore[attr-defined]


def _fill_pkg_resources(module: ModuleType) -> None:
    def resource_filename(package: str, name: str) -> str:
        """:return: The path of a file that lies beside a module, or inside a package."""
        file = sys.modules[package].__file__
        assert file is not None
        return str(Path(file).parent / name)

    module.resource_filename = resource_filename  # type: ignore[attr-defined]
