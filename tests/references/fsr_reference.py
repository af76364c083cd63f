"""FSR, one activation at a time, in float64 numpy, written from the method's page and not from the package's code."""

from __future__ import annotations

import math

import numpy as np

EPSILON = 1e-5
"""Of batch normalisation, torch's."""


def convolution(features, weight):
    """3x3, stride 1, padding 1, no bias: features (N, C, H, W), weight (D, C, 3, 3)."""
    count, channels, height, width = features.shape
    result = np.zeros((count, len(weight), height, width))
    for n, d, i, j in np.ndindex(result.shape):
        for c in range(channels):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < height and 0 <= j + b < width:
                        result[n, d, i, j] += features[n, c, i + a, j + b] * weight[d, c, a + 1, b + 1]
    return result


def normalisation(features, scale, shift, mean, variance, training):
    result = np.zeros_like(features)
    for c in range(features.shape[1]):
        values = features[:, c]
        centre, spread = (values.mean(), values.var()) if training else (mean[c], variance[c])
        result[:, c] = (values - centre) / math.sqrt(spread + EPSILON) * scale[c] + shift[c]
    return result


def network(features, tensors, training):
    """S, or R: Conv BN ReLU Conv BN ReLU Conv; `tensors` in that order, each BN as (scale, shift, mean, variance)."""
    first, first_norm, second, second_norm, third = tensors
    for weight, norm in ((first, first_norm), (second, second_norm)):
        features = np.maximum(normalisation(convolution(features, weight), *norm, training), 0)
    return convolution(features, third)


def two_way_softmax(first, second):
    top = max(first, second)
    a, b = math.exp(first - top), math.exp(second - top)
    return a / (a + b), b / (a + b)


def layer(features, separation, recalibration, tau, noise=None, training=False):
    """:return: m+, f+, f-, f~-, and the output f+ + f~-."""
    robustness = network(features, separation, training)
    m_plus, m_minus = np.zeros_like(features), np.zeros_like(features)
    for place in np.ndindex(features.shape):
        push = robustness[place] + (0.0 if noise is None else noise[place])
        m_plus[place], m_minus[place] = two_way_softmax(push / tau, 0.0)
    f_plus, f_minus = m_plus * features, m_minus * features
    recalibrated = f_minus + m_minus * network(f_minus, recalibration, training)
    return m_plus, f_plus, f_minus, recalibrated, f_plus + recalibrated


def noise_of(u):
    return np.vectorize(lambda value: math.log(value) - math.log(1 - value))(u)


def head(features, weight, bias):
    """A: global average pool, then a linear layer."""
    result = np.zeros((len(features), len(weight)))
    for n, k in np.ndindex(result.shape):
        result[n, k] = sum(features[n, c].mean() * weight[k, c] for c in range(features.shape[1])) + bias[k]
    return result


def cross_entropy(logits, labels):
    losses = []
    for row, label in zip(logits, labels, strict=True):
        top = max(row)
        losses.append(math.log(sum(math.exp(value - top) for value in row)) + top - row[label])
    return sum(losses) / len(losses)


def wrong_classes(logits, labels):
    """y': the highest-scoring class that is not the true one."""
    return [
        max((k for k in range(len(row)) if k != y), key=lambda k: row[k]) for row, y in zip(logits, labels, strict=True)
    ]


def losses(logits, robust, non_robust, recalibrated, labels):
    """:return: L_sep and L_rec."""
    separation = cross_entropy(robust, labels) + cross_entropy(non_robust, wrong_classes(logits, labels))
    return separation, cross_entropy(recalibrated, labels)
