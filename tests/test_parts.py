"""
What the parts of a step cost on their own, with pytest-benchmark; whole steps are `art-saliency bench`'s, by turns in one process.

    python -m pytest tests/test_parts.py --benchmark-sort=name                     one after another, not under xdist
    python -m pytest tests/test_parts.py --benchmark-autosave, --benchmark-compare  between two commits

In the suite every part runs once, and what it returns is checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_saliency.attacks import pgd
from art_saliency.augmentation import Augmentation
from art_saliency.gradients import input_gradient, top_share_mask
from art_saliency.methods import JSIGR
from art_saliency.methods.aalp import channel_contributions, guided_mask
from art_saliency.methods.adv_gsct import consensus_loss
from art_saliency.methods.base import Batch
from art_saliency.methods.fsr import FSRLayer
from art_saliency.methods.j_sigr import dual_norm, margin_cross_entropy, margin_directions
from art_saliency.networks import build_network
from art_saliency.perturbation_saliency import perturbation_saliency, salient_mask
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.training.batches import ResidentBatches

pytest.importorskip("pytest_benchmark")
COUNT, SHAPE, CLASSES = 128, (3, 32, 32), 10
LINF = ThreatModel("Linf", 8 / 255)


def images(*shape):
    return torch.rand(*(shape or (COUNT, *SHAPE)), generator=torch.Generator().manual_seed(0))


def labels():
    return torch.arange(COUNT) % CLASSES


def small_network():
    torch.manual_seed(0)
    return build_network("small-cnn", num_classes=CLASSES, input_shape=SHAPE, width=8)


def a_batch():
    x = (255 * images(1000, *SHAPE)).to(torch.uint8)
    batches = ResidentBatches(x, torch.arange(1000) % CLASSES, batch_size=COUNT, device=torch.device("cpu"))
    return lambda: next(batches.epoch(RandomSource(0))).x


def an_augmentation():
    x = images()
    return lambda: Augmentation()(x, RandomSource(0))[0]


def a_random_start():
    x = images()
    return lambda: LINF.random_start(x, RandomSource(0))


def an_importance_mask():
    saliency = images(COUNT, 1, 32, 32)
    return lambda: top_share_mask(saliency, 0.7, RandomSource(0))


def a_salient_mask():
    scores = images(COUNT, 1, 8, 8)
    return lambda: salient_mask(scores, (32, 32), 0.3)


def saliency_maps():
    model, x = small_network().eval(), images()[:8]
    return lambda: perturbation_saliency(model, x)


def saliency_consensus():
    g, target = images() - 0.5, images().flip(0) - 0.5
    return lambda: consensus_loss(g, target)[None]


def jacobian_in_the_margin():
    logits, rows = images(COUNT, CLASSES), images() - 0.5

    def act():
        ((w, share),) = margin_directions(logits, labels(), 1, RandomSource(0))
        return margin_cross_entropy(logits, labels(), [(w, share, dual_norm(rows, LINF))], 1.0)

    return act


def guided_dropout():
    features, gradients = images(COUNT, 64, 8, 8), images(COUNT, 64, 8, 8).flip(0) - 0.5
    return lambda: guided_mask(channel_contributions(features, gradients), 0.3, random=RandomSource(0))


def an_fsr_layer():
    layer, features = FSRLayer(64, CLASSES, hidden=16).train(), images(COUNT, 64, 8, 8)

    def act():
        layer.start_step(RandomSource(0), 1.0)
        return layer(features)

    return act


def an_input_gradient():
    model, x = small_network(), images()

    def act():
        at = x.clone().requires_grad_(True)
        return input_gradient(nn.functional.cross_entropy(model(at), labels(), reduction="sum"), at)

    return act


def an_inner_attack():
    model, x = small_network(), images()
    return lambda: pgd(model, x, labels(), threat=LINF, max_iter=2, random=RandomSource(0))


def a_j_sigr_step():
    model, x, objective = small_network(), images(), JSIGR(eps=8 / 255)
    maps = salient_mask(images(COUNT, 1, 8, 8), (32, 32), 0.3)
    return lambda: objective(model, Batch(x, labels(), progress=1.0, random=RandomSource(0), maps=maps)).loss[None]


PARTS = {
    a_batch: (COUNT, *SHAPE),
    an_augmentation: (COUNT, *SHAPE),
    a_random_start: (COUNT, *SHAPE),
    an_importance_mask: (COUNT, 1, 32, 32),
    a_salient_mask: (COUNT, 1, 32, 32),
    saliency_maps: (8, 1, 8, 8),
    saliency_consensus: (1,),
    jacobian_in_the_margin: (COUNT,),
    guided_dropout: (COUNT, 64),
    an_fsr_layer: (COUNT, 64, 8, 8),
    an_input_gradient: (COUNT, *SHAPE),
    an_inner_attack: (COUNT, *SHAPE),
    a_j_sigr_step: (1,),
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__.replace("_", " "))
def test_part(part, benchmark):
    act = part()
    result = benchmark(act)
    assert tuple(result.shape) == PARTS[part]
    assert bool(torch.isfinite(result).all())
    assert float(result.detach().abs().sum()) > 0
    torch.testing.assert_close(act(), result)  # an equal seed gives an equal result, however often it was measured
