"""Adv-GSCT, one image at a time, in float64, written from the method's page and not from the package's code."""

from __future__ import annotations

import math

import torch


def _loss(model, image, label):
    """-log softmax(z)_y of one image (C, H, W)."""
    logits = model(image[None])[0]
    return torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[label]


def _gradient(model, image, label, live):
    image = image if image.requires_grad else image.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_loss(model, image, label), image, create_graph=live, retain_graph=True)
    return gradient


def important_pixels(gradient, rho):
    """The (1 - rho) share of the pixels with the greatest sum_c |g|; no ties are expected here."""
    height, width = gradient.shape[1:]
    scores = {
        (i, j): sum(abs(float(gradient[c, i, j])) for c in range(gradient.shape[0]))
        for i in range(height)
        for j in range(width)
    }
    kept = sorted(scores, key=scores.get, reverse=True)[: round((1 - rho) * height * width)]
    mask = torch.zeros(1, height, width, dtype=gradient.dtype)
    for i, j in kept:
        mask[0, i, j] = 1
    return mask


def pseudo_input(image, start, gradient, mask, eps, alpha):
    """x~, pixel by pixel: essential ones go to the worst case, the others to the baseline."""
    baseline = torch.zeros_like(image)
    if image.shape[0] > 1:
        for c in range(image.shape[0]):
            baseline[c] = image[c].sum() / image[c].numel()
    result = torch.empty_like(image)
    for c in range(image.shape[0]):
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                x, x0 = float(image[c, i, j]), float(start[c, i, j])
                if mask[0, i, j] == 1:
                    d = x0 - x + alpha * _sign(float(gradient[c, i, j]))
                else:
                    d = eps * _sign(float(baseline[c, i, j]) - x)
                result[c, i, j] = min(1.0, max(0.0, x + min(eps, max(-eps, d))))
    return result


def _sign(number):
    return (number > 0) - (number < 0)


def loss(model, images, labels, starts, *, eps, alpha, rho, consensus, l2_consensus, prediction_consensus, linearity):
    """
    L = mean_i [ CE(f(x~_i), y_i) + consensus (1 - cos(g_i, t_i)) + l2 ||g_i - t_i||^2 + kl KL(p(x0_i) || p(x~_i)) + lin |error_i| ].

    `starts` are the random points x0, so that no random number is drawn here.
    """
    total = 0.0
    for image, label, start in zip(images, labels.tolist(), starts, strict=True):
        x0 = start.detach().requires_grad_(True)
        g = _gradient(model, x0, label, live=True)
        mask = important_pixels(g.detach(), rho)
        x_pseudo = pseudo_input(image, start, g.detach(), mask, eps, alpha).requires_grad_(True)
        t = mask * _gradient(model, x_pseudo, label, live=True)
        a, b = g.flatten(), t.detach().flatten()
        norm_a, norm_b = (a * a).sum().sqrt(), (b * b).sum().sqrt()
        dissent = 1 - (a * b).sum() / (norm_a * norm_b) if norm_a.item() and norm_b.item() else 0.0
        distance = ((g - t) ** 2).sum()
        z0, z = model(x0[None])[0], model(x_pseudo[None])[0]
        p0 = torch.exp(z0) / torch.exp(z0).sum()
        p = torch.exp(z) / torch.exp(z).sum()
        divergence = sum(p0[k] * (torch.log(p0[k]) - torch.log(p[k])) for k in range(len(p)))
        l0, l1 = _loss(model, x0, label), _loss(model, x_pseudo, label)
        error = (l1 - l0 - (g * (x_pseudo.detach() - start)).sum()).abs()
        total = total + l1 + consensus * dissent + l2_consensus * distance
        total = total + prediction_consensus * divergence + linearity * error
        assert math.isfinite(total.item())
    return total / len(images)
