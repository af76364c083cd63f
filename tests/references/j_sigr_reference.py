"""J-SIGR and perturbation saliency, one image, one class and one pixel at a time, in float64, written from the method's page."""

from __future__ import annotations

import math

import torch


def _cross_entropy(logits, label):
    """-log softmax(z)_y of one row of logits."""
    return torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[label]


def jacobian(model, image, mask=None):
    """(K, C, H, W) in the graph: dz_k/dx of one image (C, H, W), class by class; with a mask, where that is 0 alone."""
    image = image.detach().requires_grad_(True)
    logits = model(image[None])[0]
    rows = [torch.autograd.grad(z, image, create_graph=True, retain_graph=True)[0] for z in logits]
    return torch.stack(rows if mask is None else [_not_salient(row, mask) for row in rows])


def frobenius(model, image, mask=None):
    """||J||_F^2, entry by entry."""
    return sum(entry * entry for entry in jacobian(model, image, mask).flatten())


def size(gradient, penalty, eps):
    """Of one gradient: half its squared length, or eps times its L1 norm."""
    entries = list(gradient.flatten())
    if penalty == "squared":
        return sum(entry * entry for entry in entries) / 2
    return eps * sum(abs(entry) for entry in entries)


def expected_jacobian_size(model, image, label, penalty, directions, eps, mask=None):
    """What the Jacobian term is on average over its directions; with a mask, where that is 0 alone."""
    if directions == "sphere":
        assert penalty == "squared"
        return frobenius(model, image, mask) / 2
    return sum(share * long for _, share, long in margins(model, image, label, penalty, eps, mask))


def margins(model, image, label, penalty, eps, mask=None):
    """[(k, q_k, |J^T (e_y - e_k)|)] for every wrong class k, q_k its share of the wrong classes' softmax."""
    rows = jacobian(model, image, mask)
    with torch.no_grad():
        logits = model(image[None])[0]
    wrong = [k for k in range(len(logits)) if k != label]
    total = sum(math.exp(float(logits[k])) for k in wrong)
    return [(k, math.exp(float(logits[k])) / total, size(rows[label] - rows[k], penalty, eps)) for k in wrong]


def reduced_margin_loss(model, image, label, penalty, eps, lambda_j):
    """sum_k q_k CE(z + lambda_j |J^T (e_y - e_k)| e_k, y)."""
    total = 0.0
    for k, share, long in margins(model, image, label, penalty, eps):
        logits = list(model(image[None])[0])
        logits[k] = logits[k] + lambda_j * long
        total = total + share * _cross_entropy(torch.stack(logits), label)
    return total


def loss(model, images, labels, salient, *, lambda_j, lambda_s, penalty, directions, jacobian, selective_on, eps):
    """mean_i [CE + lambda_j |J_i| + lambda_s |(1 - S_i) g_i|], or with |J_i| in the margin, with the exact Jacobian term."""
    total = 0.0
    for image, label, mask in zip(images, labels.tolist(), salient, strict=True):
        if lambda_j and jacobian == "in-margin":
            total = total + reduced_margin_loss(model, image, label, penalty, eps, lambda_j)
        else:
            total = total + _cross_entropy(model(image[None])[0], label)
            if lambda_j:
                total = total + lambda_j * expected_jacobian_size(model, image, label, penalty, directions, eps)
        if lambda_s and selective_on == "jacobian":
            total = total + lambda_s * expected_jacobian_size(model, image, label, penalty, directions, eps, mask)
        elif lambda_s:
            point = image.detach().requires_grad_(True)
            logits = model(point[None])[0]
            score = _cross_entropy(logits, label) if selective_on == "loss" else logits[label]
            (g,) = torch.autograd.grad(score, point, create_graph=True)
            total = total + lambda_s * size(_not_salient(g, mask), penalty, eps)
    return total / len(images)


def _not_salient(gradient, mask):
    """Of one gradient, pixel by pixel, what the mask leaves out."""
    kept = torch.zeros_like(gradient)
    for i in range(gradient.shape[1]):
        for j in range(gradient.shape[2]):
            if mask[0, i, j] == 0:
                kept = kept + gradient * _one_pixel(gradient, i, j)
    return kept


def _one_pixel(like, i, j):
    mask = torch.zeros_like(like)
    mask[:, i, j] = 1
    return mask


def _gaussian_blur(channel, sigma):
    """One (H, W) channel; pixels outside repeat the edge."""
    height, width = len(channel), len(channel[0])
    reach = math.ceil(3 * sigma)
    weights = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)}
    total = sum(weights.values())
    result = [[0.0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            for di, wi in weights.items():
                for dj, wj in weights.items():
                    row, column = min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1)
                    result[i][j] += wi * wj / total**2 * channel[row][column]
    return result


def perturbation_saliency(model, image, label, *, rows, columns, sigma, radius, score):
    """(rows, columns) scores of one image: at the centre of every cell, the image is blended into its blur under a soft disc."""
    channels, height, width = image.shape
    blurred = torch.tensor([_gaussian_blur(channel.tolist(), sigma) for channel in image], dtype=image.dtype)
    scores = torch.zeros(rows, columns, dtype=image.dtype)
    with torch.no_grad():
        clean = model(image[None])[0]
        for r in range(rows):
            for c in range(columns):
                centre = (r + 0.5) * height / rows - 0.5, (c + 0.5) * width / columns - 0.5
                changed = image.clone()
                for i in range(height):
                    for j in range(width):
                        squared = (i - centre[0]) ** 2 + (j - centre[1]) ** 2
                        disc = math.exp(-squared / (2 * radius**2))
                        for k in range(channels):
                            changed[k, i, j] = (1 - disc) * image[k, i, j] + disc * blurred[k, i, j]
                logits = model(changed[None])[0]
                if score == "logits":
                    scores[r, c] = 0.5 * sum((a - b) ** 2 for a, b in zip(clean, logits, strict=True))
                else:
                    scores[r, c] = max(0.0, float(_cross_entropy(logits, label) - _cross_entropy(clean, label)))
    return scores
