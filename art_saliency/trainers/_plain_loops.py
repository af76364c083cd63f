"""
Training loops written by hand, in plain torch, to measure this package's own against. Nothing here uses the package.

A *plain* loop is what people write: a ``DataLoader``, ``loss.backward()`` in the attack too (which forms weight gradients that
nobody reads), ``.item()`` every step. A *bare* loop is the least that the method can cost: the passes on one resident batch,
attacks without weight gradients, nothing recorded, nothing checked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["BARE", "PLAIN", "HandLoss", "plain_epoch"]

HandLoss = Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]
"""(network, x, y, eps, max_iter) -> the loss of a batch."""


# --- the attack, twice -----------------------------------------------------------------------------------------------


def _plain_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    step = 2.5 * eps / max_iter
    model.eval()
    x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), 0, 1)
    for _ in range(max_iter):
        x_adv.requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()  # type: ignore[no-untyped-call]
        gradient = x_adv.grad
        assert gradient is not None
        x_adv = x_adv.detach() + step * torch.sign(gradient)
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    model.train()
    return x_adv.detach()


def _bare_ascent(
    model: nn.Module, x: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], eps: float, max_iter: int
) -> Tensor:
    step, x_adv = 2.5 * eps / max_iter, start
    for _ in range(max_iter):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(model(x_adv)), x_adv)[0]
        x_adv = torch.clamp(torch.min(torch.max(x_adv.detach() + step * gradient.sign(), x - eps), x + eps), 0, 1)
    return x_adv.detach()


# --- losses ----------------------------------------------------------------------------------------------------------


def _standard(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    return F.cross_entropy(model(x), y)


def _plain_pgd_at(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    return F.cross_entropy(model(_plain_pgd(model, x, y, eps, max_iter)), y)


def _bare_pgd_at(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    start = torch.clamp(x + eps * (2 * torch.rand_like(x) - 1), 0, 1)
    x_adv = _bare_ascent(model, x, start, lambda z: F.cross_entropy(z, y, reduction="sum"), eps, max_iter)
    _thaw(parameters)
    model.train()
    return F.cross_entropy(model(x_adv), y)


def _trades(clean: Tensor, adversarial: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    return F.cross_entropy(clean, y) + beta * divergence


def _plain_trades(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    """As the authors' code does it: ``autograd.grad`` for the images, and the clean logits anew in every step."""
    step = 2.5 * eps / max_iter
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(max_iter):
        x_adv.requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
        gradient = torch.autograd.grad(divergence, [x_adv])[0]
        x_adv = x_adv.detach() + step * torch.sign(gradient.detach())
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    model.train()
    return _trades(model(x), model(x_adv.detach()), y)


def _bare_trades(model: nn.Module, x: Tensor, y: Tensor, eps: float, max_iter: int) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    with torch.no_grad():
        clean = F.softmax(model(x), 1)
    start = x + 0.001 * torch.randn_like(x)
    x_adv = _bare_ascent(
        model, x, start, lambda z: F.kl_div(F.log_softmax(z, 1), clean, reduction="sum"), eps, max_iter
    )
    _thaw(parameters)
    model.train()
    return _trades(model(x), model(x_adv), y)


def _thaw(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


PLAIN: dict[str, HandLoss] = {"standard": _standard, "pgd-at": _plain_pgd_at, "trades": _plain_trades}
"""As people write them, by the method's name."""

BARE: dict[str, HandLoss] = {"standard": _standard, "pgd-at": _bare_pgd_at, "trades": _bare_trades}
"""The least that the method costs, by its name."""


# --- the loop --------------------------------------------------------------------------------------------------------


def plain_epoch(
    loss: HandLoss,
    model: nn.Module,
    optimizer: Optimizer,
    loader: torch.utils.data.DataLoader[tuple[Tensor, ...]],
    device: torch.device,
    eps: float,
    max_iter: int,
) -> float:
    """:return: The epoch's mean loss, after one pass through a loader."""
    model.train()
    total = 0.0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        value = loss(model, x, y, eps, max_iter)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += value.item()
    return total / len(loader)
