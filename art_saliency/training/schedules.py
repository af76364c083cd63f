"""Learning-rate schedules: three by name, or any scheduler object, duck-typed (ART's own check refuses torch's)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from art_saliency import _checks
from art_saliency.errors import NoEffectWarning

__all__ = ["SCHEDULES", "Schedule"]


def _cosine(optimizer: Optimizer, steps: int) -> Any:
    return CosineAnnealingLR(optimizer, T_max=steps)


def _step(optimizer: Optimizer, steps: int) -> Any:
    return MultiStepLR(
        optimizer, milestones=sorted({max(1, round(0.75 * steps)), max(1, round(0.9 * steps))}), gamma=0.1
    )


def _onecycle(optimizer: Optimizer, steps: int) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    # Momentum stays the user's: cycling it would rewrite the optimizer's betas.
    return OneCycleLR(optimizer, max_lr=rates, total_steps=steps, cycle_momentum=False)


SCHEDULES: dict[str, Callable[[Optimizer, int], Any]] = {"cosine": _cosine, "step": _step, "onecycle": _onecycle}
"""By name, over the whole run, stepped after every optimizer step: "cosine" falls to 0; "step" divides by 10 at 75 % and 90 %;
"onecycle" rises to the optimizer's rate over the first 30 % and falls to almost 0."""


def _takes_metric(scheduler: Any) -> bool:
    return scheduler is not None and "metrics" in inspect.signature(scheduler.step).parameters


class Schedule:
    """
    What the loop calls. A named schedule steps with the optimizer; a scheduler object steps once an epoch, as in ART.

    :param scheduler: ``None``, a name of :data:`SCHEDULES`, or an object with ``step()`` (``step(metrics)``: the epoch's loss).
    :param optimizer: Its learning rates are given back by :meth:`restore` when the schedule was made here by name.
    :param steps: Optimizer steps of the whole run.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer, steps: int) -> None:
        self.per_step = isinstance(scheduler, str)
        self._optimizer = optimizer
        self._before: list[dict[str, Any]] = [
            {key: deepcopy(group[key]) for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in group}
            for group in optimizer.param_groups
        ]
        self.scheduler = self.checked(scheduler)
        if isinstance(scheduler, str):
            for group in optimizer.param_groups:
                group.pop("initial_lr", None)  # an earlier run's, which torch would take for this one's
            self.scheduler = SCHEDULES[scheduler](optimizer, steps)
        self._takes_metric = _takes_metric(self.scheduler)

    @staticmethod
    def checked(scheduler: Any, epochs: int | None = None) -> Any:
        """
        Refuse what is neither a name nor a scheduler, or one that goes by another metric than a loss or ends before the run; warn of
        one that outlasts it.

        :param epochs: Of the run, where they are known. :return: It.
        """
        if isinstance(scheduler, str):
            _checks.one_of("scheduler", scheduler, SCHEDULES)
        elif scheduler is not None and not callable(getattr(scheduler, "step", None)):
            raise _checks.refuse(
                "scheduler",
                type(scheduler).__name__,
                f"one of {', '.join(map(repr, SCHEDULES))} or an object with step()",
            )
        elif scheduler is not None and epochs is not None:
            name, once = type(scheduler).__name__, "a scheduler object is stepped once an epoch"
            if _takes_metric(scheduler) and getattr(scheduler, "mode", "min") == "max":
                raise _checks.refuse("scheduler", f"{name} of mode 'max'", "mode 'min'", "it is given the epoch's loss")
            steps = getattr(scheduler, "total_steps", None)
            # One that has moved may be that of a run which is gone on with, and is put back to where that was.
            if isinstance(steps, int) and steps != epochs and scheduler.last_epoch == 0:
                said = f"{name} of {steps} steps", f"{epochs}, as many as epochs"
                remedy = f"{once}: make it with total_steps={epochs}, or say 'onecycle'"
                if steps < epochs:
                    raise _checks.refuse("scheduler", *said, remedy)
                text = f"scheduler: got {said[0]}, expected {said[1]}; {remedy}"
                warnings.warn(text, NoEffectWarning, stacklevel=4)
        return scheduler

    def after_step(self) -> None:
        """Called after each optimizer step."""
        if self.per_step:
            self.scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Called after each epoch, with its mean loss."""
        if self.scheduler is not None and not self.per_step:
            self.scheduler.step(loss) if self._takes_metric else self.scheduler.step()

    def restore(self) -> None:
        """Give the optimizer its own learning rates back, so that a second ``fit`` starts where the first did."""
        if self.per_step:
            for group, before in zip(self._optimizer.param_groups, self._before, strict=True):
                for key in ("initial_lr", "max_lr", "min_lr"):
                    group.pop(key, None)
                group.update(before)

    def state_dict(self) -> dict[str, Any]:
        """:return: The scheduler's state, empty without one."""
        return (
            {}
            if self.scheduler is None or not hasattr(self.scheduler, "state_dict")
            else dict(self.scheduler.state_dict())
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        if state and self.scheduler is not None:
            self.scheduler.load_state_dict(state)
