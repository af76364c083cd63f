"""FSR against its slow oracle, its algebra, the page's table, and networks it has never seen."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from art_saliency.attacks import cross_entropy, pgd
from art_saliency.errors import CheckpointError, InputError, NoEffectWarning, UnsupportedModelError
from art_saliency.methods.adapter import AdapterLayer, insert_adapter
from art_saliency.methods.base import AuxiliaryLoss, Batch, auxiliary_modules, auxiliary_terms, step_terms
from art_saliency.methods.baselines import Standard
from art_saliency.methods.fsr import (
    AuxiliaryLogits,
    FSRLayer,
    LayerOptions,
    best_wrong_class,
    capture,
    deterministic,
    drop_auxiliary_heads,
    fsr_layers,
    fsr_loss,
    insert_fsr,
    logistic_noise,
    mask_share_inside,
    randomised,
    remove_fsr,
)
from art_saliency.methods.fsr_loss import FSRLoss
from art_saliency.methods.fsr_released import load_released
from art_saliency.methods.surgery import Inserted, TokenGrid, inserted, remove_inserted
from art_saliency.modes import evaluating
from art_saliency.networks import build_network
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.trainers.fsr import FSRTrainer
from tests.references import fsr_reference as reference

CLASSES = 5


def block(channels):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


class Small(nn.Module):
    """A network with attribute parents: stem -> body (a Sequential of two blocks) -> pool -> head."""

    def __init__(self, classes, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(block(channels), block(channels))
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def small_network(classes=CLASSES, channels=6):
    torch.manual_seed(0)
    return Small(classes, channels)


def chain(classes=CLASSES):
    """A root nn.Sequential, whose children ART calls one by one."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, classes))


def images(count=4, channels=3, side=8, seed=0):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def with_fsr(**settings_):
    return insert_fsr(small_network(), "body", CLASSES, images(1), hidden=4, **settings_)


def spread(module, seed=0):
    """Give BatchNorm parameters and statistics that are not 1 and 0, and weights that make masks of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.weight.uniform_(0.5, 1.5, generator=generator)
                child.bias.uniform_(-0.5, 0.5, generator=generator)
                child.running_mean.uniform_(-0.2, 0.2, generator=generator)
                child.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


# --- the layer and the losses against the oracle --------------------------------------------------------------------------


def tensors_of(bottleneck):
    array = lambda tensor: tensor.detach().numpy()  # noqa: E731
    norm = lambda m: tuple(map(array, (m.weight, m.bias, m.running_mean, m.running_var)))  # noqa: E731
    c1, n1, _, c2, n2, _, c3 = bottleneck
    return array(c1.weight), norm(n1), array(c2.weight), norm(n2), array(c3.weight)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_layer_and_losses_equal_the_slow_oracle(training, tau):
    torch.manual_seed(0)
    layer = spread(FSRLayer(3, CLASSES, hidden=4, tau=tau, lambda_sep=0.7, lambda_rec=1.3).double()).train(training)
    layer.separation[-1].weight.data.normal_(std=2.0)
    f = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    logits, y = torch.randn(2, CLASSES, dtype=torch.float64), torch.tensor([1, 4])
    noise = None
    if training:
        noise = reference.noise_of(RandomSource(7).uniform(torch.empty(f.shape)).double().numpy())
    separation, recalibration = tensors_of(layer.separation), tensors_of(layer.recalibration)
    m_plus, *parts, expected = reference.layer(f.numpy(), separation, recalibration, tau, noise, training)
    assert m_plus.min() < 0.2 < 0.8 < m_plus.max(), "a case of masks that are all alike proves nothing"

    layer.start_step(RandomSource(7))
    with capture(layer) as captured:
        output = layer(f)
        auxiliary = captured[""]
    torch.testing.assert_close(output, torch.from_numpy(expected), atol=1e-6 if training else 1e-12, rtol=1e-5)
    weight, bias = layer.auxiliary.weight.detach().numpy(), layer.auxiliary.bias.detach().numpy()
    heads = [reference.head(part, weight, bias) for part in parts]
    for ours, slow in zip(auxiliary, heads, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(slow), atol=1e-6, rtol=1e-5)

    l_sep, l_rec = reference.losses(logits.numpy(), *heads, y.tolist())
    result = layer.auxiliary_loss(logits, y) if training else fsr_loss(logits, auxiliary, y, 0.7, 1.3)
    assert float(result.terms["fsr_separation"]) == pytest.approx(l_sep, rel=1e-5)
    assert float(result.terms["fsr_recalibration"]) == pytest.approx(l_rec, rel=1e-5)
    assert result.loss.item() == pytest.approx(0.7 * l_sep + 1.3 * l_rec, rel=1e-5)


def test_gradients_of_the_layer_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = spread(FSRLayer(2, CLASSES, hidden=3).double()).eval()
    f = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (f,))
    assert torch.autograd.gradcheck(lambda _: layer(f), (layer.separation[0].weight,))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.booleans())
@settings(max_examples=20, deadline=None)
def test_parts_add_up_to_the_features_and_to_the_output_at_any_size(count, channels, height, width, negative):
    layer = spread(FSRLayer(channels, 2, hidden=3)).eval()
    f = torch.randn(count, channels, height, width)
    f = f if negative else f.relu()
    parts = []
    layer._listeners.append(parts.append)
    output = layer(f)
    (part,) = parts
    torch.testing.assert_close(part.robust + part.non_robust, f)  # f+ + f- = f
    torch.testing.assert_close(part.robust + part.recalibrated, output)  # f+ + f~- = f + m- R(m- f)
    assert output.shape == f.shape
    alone = torch.cat([layer(image[None]) for image in f])  # rows do not see one another
    torch.testing.assert_close(alone, output, atol=1e-5, rtol=1e-5)


def test_the_layer_of_identical_recalibration_zero_is_the_identity_bit_by_bit():
    network, x = small_network().eval(), images()
    plain = network(x)
    insert_fsr(network, "body", CLASSES, x, zero_init=True)
    assert torch.equal(network(x), plain)
    insert_fsr(other := small_network().eval(), "body", CLASSES, x)
    assert not torch.allclose(other(x), plain)


def test_labels_may_be_soft_and_the_choice_of_the_wrong_class_has_no_gradient():
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 5.0]], requires_grad=True)
    y = torch.tensor([0, 2])
    assert best_wrong_class(logits, y).tolist() == [1, 1]
    auxiliary = AuxiliaryLogits(*torch.randn(3, 2, 3).requires_grad_())
    hard = fsr_loss(logits, auxiliary, y)
    soft = fsr_loss(logits, auxiliary, torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]]))
    assert torch.equal(hard.loss, soft.loss)
    assert torch.autograd.grad(hard.loss, logits, allow_unused=True) == (None,)
    assert not any(term.requires_grad for term in hard.terms.values())
    low = AuxiliaryLogits(*(part.bfloat16() for part in auxiliary))
    exact = fsr_loss(logits, AuxiliaryLogits(*(part.float() for part in low)), y).loss
    assert torch.equal(fsr_loss(logits, low, y).loss, exact)  # in float32
    for column, message in ((torch.randn(2, 1), "at least 2 classes"), (torch.randn(3, 3), "equal shapes")):
        with pytest.raises(InputError, match=message):
            fsr_loss(column, AuxiliaryLogits(*torch.randn(3, 2, column.shape[1])), y)


# --- noise ----------------------------------------------------------------------------------------------------------------


def test_noise_is_logistic_finite_and_in_float32():
    noise = logistic_noise(torch.empty(200_000, dtype=torch.bfloat16), RandomSource(0))
    assert noise.dtype == torch.float32
    for point in (-3.0, -1.0, 0.0, 0.5, 2.0):  # P(n <= t) = sigmoid(t), as of a difference of two Gumbel variables
        assert float((noise <= point).double().mean()) == pytest.approx(1 / (1 + np.exp(-point)), abs=0.004)

    class Ends(RandomSource):
        def uniform(self, like):
            return torch.tensor([0.0, 1 - 2.0**-24])

    ends = logistic_noise(torch.empty(2), Ends(0))
    assert ends.isfinite().all()
    assert ends[0] < 0 < ends[1]


def test_noise_if_and_only_if_in_train_mode():
    network, x = with_fsr(), images()
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = 0.0  # so that a forward pass changes nothing but the noise
    layer = network.body.fsr
    assert layer.training
    assert layer.noisy
    assert not torch.equal(network(x), network(x))
    with deterministic(network):
        assert layer.training
        assert torch.equal(network(x), network(x))
    with pytest.raises(ZeroDivisionError), deterministic(network):
        raise ZeroDivisionError
    assert layer.noisy
    network.eval()
    still = network(x)
    assert not layer.noisy
    assert torch.equal(still, network(x))
    assert not layer.randomised
    with randomised(network):
        assert layer.randomised
        assert not torch.equal(network(x), network(x))
        with deterministic(network):
            assert torch.equal(network(x), still)
    assert torch.equal(network(x), still)
    assert not layer.randomised


def test_a_layer_that_was_made_noiseless_is_so_in_train_mode_and_in_copies():
    network = with_fsr()
    network.body.fsr.noiseless = True
    with deterministic(network):
        pass
    for each in (network, copy.deepcopy(network)):
        assert each.body.fsr.training
        assert not each.body.fsr.noisy


def test_noise_is_shared_within_a_step_and_fresh_outside():
    layer = FSRLayer(3, CLASSES, hidden=4)
    layer.separation[-1].weight.data.zero_()  # r = 0: the mask is the noise
    small, large = torch.rand(2, 3, 4, 4), torch.rand(4, 3, 4, 4)
    mask = lambda f: layer.mask(f)[0]  # noqa: E731
    assert not torch.equal(mask(small), mask(small))
    layer.start_step(RandomSource(3))
    first, joint = mask(small), mask(large)
    assert torch.equal(mask(small), first)
    assert torch.equal(mask(large), joint)
    assert not torch.equal(joint[:2], first)  # a function of the step and the shape
    layer.start_step(source := RandomSource(3))
    assert torch.equal(mask(small), first)
    layer.start_step(source)  # the next step of the same run
    assert not torch.equal(mask(small), first)
    layer.start_step(None)
    assert not torch.equal(mask(small), mask(small))


def test_two_ranks_use_the_noise_of_one():
    layer, f = FSRLayer(3, CLASSES, hidden=4), torch.rand(4, 3, 4, 4)
    layer.separation[-1].weight.data.zero_()
    layer.start_step(RandomSource(5))
    whole = layer.mask(f)[0]
    halves = []
    for rank in (0, 1):
        layer.start_step(RandomSource(5, rank=rank, world_size=2))
        halves.append(layer.mask(f[2 * rank : 2 * rank + 2])[0])
    assert torch.equal(torch.cat(halves), whole)


# --- the auxiliary loss of a step -----------------------------------------------------------------------------------------


def test_auxiliary_loss_belongs_to_the_last_rows_of_the_last_train_mode_forward():
    network, x, y = with_fsr(), images(4), torch.tensor([0, 1])
    layer = network.body.fsr
    assert isinstance(layer, AuxiliaryLoss)
    assert auxiliary_modules(network) == [layer]
    layer.start_step(RandomSource(0))
    network(images(4, seed=1))
    with capture(network) as captured:
        logits = network(x)
        expected = AuxiliaryLogits(*(part[2:] for part in captured["body"]))
        plain = fsr_loss(logits[2:], expected, y)
    with capture(network):
        pgd(network, x, torch.zeros(4, dtype=torch.long), threat=ThreatModel("Linf", 0.1), max_iter=1)  # in eval mode
    result = layer.auxiliary_loss(logits[2:], y)
    assert torch.equal(result.loss, plain.loss)
    result.loss.backward()
    for name, parameter in network.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (not name.startswith("head")), name  # nothing is detached: the backbone learns from it too
    with pytest.raises(InputError, match="no train-mode forward pass"):
        layer.auxiliary_loss(logits[2:], y)
    network(x)
    with pytest.raises(InputError, match="4 rows, expected one of at least 5"):
        layer.auxiliary_loss(torch.zeros(5, CLASSES), torch.zeros(5, dtype=torch.long))


def test_several_layers_contribute_their_mean_and_the_weights_count():
    network, x, y = small_network(), images(), torch.tensor([0, 1, 2, 3])
    insert_fsr(network, "stem", CLASSES, x, hidden=4, lambda_sep=0.5)
    insert_fsr(network, "body", CLASSES, x, hidden=4, lambda_rec=2.0)
    modules = auxiliary_modules(network)
    for module in modules:
        module.start_step(RandomSource(0))
    with capture(network) as captured:
        logits = network(x)
        assert list(captured) == ["stem", "body"]
        first, second = (fsr_loss(logits, part, y) for part in captured.values())
    terms = [(part.terms["fsr_separation"], part.terms["fsr_recalibration"]) for part in (first, second)]
    expected = (0.5 * terms[0][0] + terms[0][1] + terms[1][0] + 2.0 * terms[1][1]) / 2
    torch.testing.assert_close(auxiliary_terms(modules, logits, y).loss, expected)


def test_auxiliary_weights_rise_over_their_share_of_the_run_and_stand_outside_one():
    network, x, y = with_fsr(aux_warmup_share=0.5), images(), torch.tensor([0, 1, 2, 3])
    layer = network.body.fsr

    def loss_and_terms(**when):
        layer.start_step(RandomSource(0), **when)
        found = layer.auxiliary_loss(network(x), y)
        return float(found.loss.detach()), found.terms

    full, terms = loss_and_terms()
    assert full == pytest.approx(float(terms["fsr_separation"] + terms["fsr_recalibration"]))
    for progress, share in ((0.0, 0.0), (0.125, 0.25), (0.5, 1.0), (0.9, 1.0)):
        part, _ = loss_and_terms(progress=progress)
        assert part == pytest.approx(share * full)
    for progress, extra in ((0.0, 0.0), (0.25, 0.5 * full)):
        step = step_terms(Standard(), network, Batch(x, y, progress=progress, random=RandomSource(0)))
        assert float(step.loss.detach()) == pytest.approx(float(step.terms["ce_clean"]) + extra)


def test_capture_shows_auxiliary_logits_inside_only_and_the_network_returns_logits():
    network, x = with_fsr().eval(), images()
    with capture(network) as outer, capture(network) as inner:
        output = network(x)
        assert isinstance(output, torch.Tensor)
        assert output.shape == (4, CLASSES)
        assert all(torch.equal(a, b) for a, b in zip(outer["body"], inner["body"], strict=True))
        assert [part.shape for part in outer["body"]] == [(4, CLASSES)] * 3
    assert outer == inner == {}
    assert network.body.fsr._listeners == []
    with pytest.raises(ZeroDivisionError), capture(network):
        raise ZeroDivisionError
    assert network.body.fsr._listeners == []
    with pytest.raises(InputError, match="insert_fsr"), capture(small_network()):
        pass


def test_without_its_head_a_network_has_the_same_logits():
    network, x = with_fsr().eval(), images()
    plain = network(x)
    assert torch.equal(drop_auxiliary_heads(network)(x), plain)
    assert not [key for key in network.state_dict() if "auxiliary" in key]
    assert "auxiliary logits" not in network.body.fsr.attack_contexts()
    with pytest.raises(InputError, match="head was dropped"), capture(network):
        network(x)


# --- attacks that know the layer ------------------------------------------------------------------------------------------


def input_gradient_of(network, x, y, loss=cross_entropy):
    x = x.clone().requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(loss(logits, y).sum(), x)
    return logits.detach(), gradient


def test_variants_change_the_gradient_and_never_the_forward_pass():
    network, x, y = spread(with_fsr()).eval(), images(), torch.tensor([0, 1, 2, 3])
    plain, exact = input_gradient_of(network, x, y)
    seen = {}
    for name, variant in network.body.fsr.attack_contexts().items():
        with variant() as loss:
            logits, seen[name] = input_gradient_of(network, x, y, loss or cross_entropy)
        assert torch.equal(logits, plain), name
        assert not torch.allclose(seen[name], exact), name
        torch.testing.assert_close(input_gradient_of(network, x, y)[1], exact)  # gone on exit
    assert list(seen) == ["gate softened", "gate frozen", "auxiliary logits"]


def test_gates_have_the_derivatives_that_they_say():
    layer, r = FSRLayer(3, CLASSES).eval(), torch.randn(2, 3, 2, 2)
    layer.separation = nn.Identity()
    weights = torch.randn(2, *r.shape)

    def derivative():
        leaf = r.clone().requires_grad_()
        masks = layer.mask(leaf)
        if not masks[0].requires_grad:
            return torch.zeros_like(r)
        return torch.autograd.grad((weights[0] * masks[0] + weights[1] * masks[1]).sum(), leaf)[0]

    def slope(tau):
        m = 1 / (1 + torch.exp(-r.double() / tau))
        return ((weights[0] - weights[1]) * m * (1 - m) / tau).float()

    variants = layer.attack_contexts()
    torch.testing.assert_close(derivative(), slope(0.1), atol=1e-5, rtol=1e-4)
    with variants["gate softened"]():
        torch.testing.assert_close(derivative(), slope(1.0))
    with variants["gate frozen"]():
        assert not derivative().any()


def test_attack_on_the_auxiliary_logits_is_the_sum_of_four_cross_entropies():
    network, x, y = with_fsr().eval(), images(), torch.tensor([0, 1, 2, 3])
    with capture(network) as captured:
        logits = network(x)
        expected = sum(F.cross_entropy(part, y, reduction="none") for part in (logits, *captured["body"]))
    with network.body.fsr.attack_contexts()["auxiliary logits"]() as loss:
        torch.testing.assert_close(loss(network(x), y), expected)
        x_adv = pgd(network, x, y, threat=ThreatModel("Linf", 0.1), loss=loss, max_iter=3)
        assert loss(network(x_adv), y).mean().item() > expected.mean().item()


def test_share_of_masks_inside_counts_and_does_not_depend_on_the_batch_size():
    network, x = spread(with_fsr()), images(5)
    layer = network.body.fsr
    layer.separation[-1].weight.data.normal_(std=2.0)
    share = mask_share_inside(network, x)
    assert share == mask_share_inside(network, x, batch_size=2)
    assert network.training
    network.eval()
    m_plus = layer.mask(network.body.inner(network.stem(x)))[0].flatten().tolist()
    counted = sum(0.01 < value < 0.99 for value in m_plus) / len(m_plus)
    assert 0 < counted < 1
    assert share == {"body": pytest.approx(counted)}


# --- numerics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e3, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_stay_finite_where_the_robustness_map_is_extreme(scale, dtype):
    layer, f = FSRLayer(3, CLASSES, hidden=4).to(dtype), torch.rand(2, 3, 4, 4).to(dtype)

    class Extreme(nn.Module):
        def forward(self, f):
            return (f - 0.5) * min(scale, torch.finfo(f.dtype).max)

    layer.separation = Extreme()
    f.requires_grad_()
    output = layer.train()(f)
    assert output.dtype == dtype
    assert output.isfinite().all()
    (gradient,) = torch.autograd.grad(output.float().sum(), f)
    assert gradient.isfinite().all()


def test_masks_are_float32_under_autocast_and_the_output_keeps_the_dtype_of_the_features():
    layer, f = FSRLayer(3, CLASSES, hidden=4), torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.separation(f).dtype == torch.bfloat16
        assert {mask.dtype for mask in layer.mask(f)} == {torch.float32}
        assert layer(f).dtype == torch.float32
        assert layer(f.bfloat16()).dtype == torch.bfloat16
        layer.start_step(None)
        layer(f.bfloat16())
        assert layer.auxiliary_loss(torch.rand(2, CLASSES), torch.tensor([0, 1])).loss.dtype == torch.float32


def test_saturated_masks_keep_a_gradient_that_one_minus_the_sigmoid_would_lose():
    layer, r = FSRLayer(1, CLASSES).eval(), torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    layer.separation = nn.Identity()
    m_plus, m_minus = layer.mask(r)
    assert (1 - m_plus).item() == 0
    assert m_minus.item() == pytest.approx(np.exp(-30), rel=1e-4, abs=0)
    assert torch.autograd.grad(m_minus, r)[0].item() == pytest.approx(-10 * np.exp(-30), rel=1e-4, abs=0)


def test_a_training_step_reads_nothing_back_from_the_device():
    with torch.device("meta"):  # where .item(), bool() and .cpu() raise
        network, x, y = small_network(), torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.long)
    insert_fsr(network, "body", CLASSES, x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        network(x).sum().item()
    network.body.fsr.start_step(None)
    logits = network(x)
    loss = network.body.fsr.auxiliary_loss(logits, y).loss
    (loss + F.cross_entropy(logits, y)).backward()
    loss = FSRLoss(network)(network(x), y)
    loss.backward()
    assert loss.is_meta
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- sizes: the page's table ----------------------------------------------------------------------------------------------


def vgg16_bn_cifar():
    torchvision = pytest.importorskip("torchvision")
    layers = [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(torchvision.models.vgg16_bn().features, *layers)


def cifar_network(name):
    return build_network(name, num_classes=10, input_shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("build", "target", "channels", "before", "after", "parameters", "macs"),
    [
        (lambda: cifar_network("resnet18"), "layer4", 512, 11.174, 12.433, 11.27, 3.6),
        (vgg16_bn_cifar, "0.32", 512, 15.254, 16.513, 8.25, 6.4),
        (lambda: cifar_network("wrn-34-10"), "relu", 640, 46.160, 47.716, 3.37, 1.5),
    ],
    ids=["resnet18", "vgg16-bn", "wrn-34-10"],
)
def test_sizes_are_those_of_the_table(build, target, channels, before, after, parameters, macs):
    from torch.utils.flop_counter import FlopCounterMode

    def measure(network):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(torch.empty(1, 3, 32, 32, device="meta"))
        return sum(p.numel() for p in network.parameters()), counter.get_total_flops()

    with torch.device("meta"):
        network = build()
    plain, plain_flops = measure(network)
    insert_fsr(network, target, 10, torch.empty(1, 3, 32, 32, device="meta"))
    (layer,) = fsr_layers(network).values()
    assert layer.channels == channels
    count, flops = measure(network)
    added = {name: sum(p.numel() for p in child.parameters()) for name, child in layer.named_children()}
    assert added["separation"] == added["recalibration"] == 1152 * channels + 37_120
    assert added["auxiliary"] == 10 * (channels + 1)
    assert count - plain == sum(added.values())
    assert plain / 1e6 == pytest.approx(before, abs=5e-4)
    assert count / 1e6 == pytest.approx(after, abs=5e-4)
    assert 100 * (count / plain - 1) == pytest.approx(parameters, abs=5e-3)
    assert 100 * (flops / plain_flops - 1) == pytest.approx(macs, abs=5e-2)


@given(st.integers(1, 2048), st.integers(8, 128))
@settings(max_examples=30, deadline=None)
def test_the_adapter_control_has_as_many_parameters(channels, hidden):
    with torch.device("meta"):
        adapter, layer = AdapterLayer(channels, fsr_hidden=hidden), FSRLayer(channels, 2, hidden=hidden)
    ours = sum(p.numel() for p in adapter.parameters())
    target = sum(p.numel() for part in (layer.separation, layer.recalibration) for p in part.parameters())
    step = 9 * channels + 9 * (
        adapter.recalibration[0].out_channels + 1
    )  # half of one unit of width, the finest there is
    assert abs(ours - target) <= step + 2
    if hidden == 64 and channels in range(256, 1025):
        assert abs(ours / target - 1) < 0.005


def test_the_adapter_is_f_plus_r_of_f_and_is_inserted_by_the_same_surgery():
    network, x = small_network().eval(), images()
    plain, keys = network(x), list(network.state_dict())
    insert_adapter(network, "body", x, fsr_hidden=4)
    adapter, f = network.body.adapter, torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(adapter.eval()(f), f + adapter.recalibration(f))
    assert {key for key in network.state_dict() if key not in keys} == {
        f"body.adapter.{key}" for key in adapter.state_dict()
    }
    assert torch.equal(remove_inserted(network, None, "adapter")(x), plain)


# --- surgery --------------------------------------------------------------------------------------------------------------


def torchvision_network(name, **options):
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, num_classes=CLASSES, **options)


def timm_network(name, **options):
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


def torchvision_vgg16_bn():
    with torch.device("meta"):  # a head of 120 million weights is of no use here
        network = pytest.importorskip("torchvision").models.vgg16_bn(weights=None, init_weights=False)
    network.classifier = nn.Sequential(nn.AdaptiveAvgPool1d(512), nn.Linear(512, CLASSES))
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def torchvision_vit():
    vit = pytest.importorskip("torchvision").models.VisionTransformer
    network = vit(32, 8, 3, 2, 24, 48, num_classes=CLASSES)
    nn.init.normal_(network.heads.head.weight)  # torchvision starts it at zero: no layer would have an effect
    return network


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}

UNSEEN = {
    "resnet50 layer4": (lambda: torchvision_network("resnet50"), "layer4", 2048),
    "vgg16_bn features.23": (torchvision_vgg16_bn, "features.23", 256),
    "convnext_tiny features.7": (lambda: torchvision_network("convnext_tiny"), "features.7", 768),
    "convnext_tiny features.7.0.block.0": (lambda: torchvision_network("convnext_tiny"), "features.7.0.block.0", 768),
    "timm resnet10t layer4": (lambda: timm_network("resnet10t"), "layer4", 512),
    "timm resnet10t bn1": (lambda: timm_network("resnet10t"), "bn1", 64),
    "timm vit blocks.1": (lambda: timm_network("vit_tiny_patch16_224", **TINY_VIT), "blocks.1", 24),
    "timm vit norm, pooled by mean": (
        lambda: timm_network("vit_tiny_patch16_224", global_pool="avg", fc_norm=False, **TINY_VIT),
        "norm",
        24,
    ),
    "torchvision vit": (torchvision_vit, "encoder.layers.encoder_layer_0", 24),
    "attribute": (small_network, "body", 6),
    "attribute without parameters": (small_network, "body.0.2", 6),
    "attribute with parameters": (small_network, "body.0.1", 6),
}


def unseen(name):
    build, target, channels = UNSEEN[name]
    torch.manual_seed(0)
    return build().eval(), target, channels


def names_of(network):
    return {name for name, _ in network.named_parameters()} | {name for name, _ in network.named_buffers()}


@pytest.mark.parametrize("name", UNSEEN)
def test_surgery_on_networks_never_seen_keeps_their_names_and_is_undone_by_removal(name):
    network, target, channels = unseen(name)
    x = images(2, side=32)
    plain, state, structure = network(x), network.state_dict(), repr(network)
    modules = dict(network.named_modules())

    assert insert_fsr(network, target, CLASSES, x[:1], hidden=4, zero_init=True) is network
    (layer,) = fsr_layers(network).values()
    assert list(fsr_layers(network)) == [target]
    assert layer.channels == channels
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(x), plain, atol=0, rtol=0)  # zero_init: nothing has changed yet
    assert type(network.get_submodule(target)) is Inserted
    assert not isinstance(network.get_submodule(target), nn.Sequential)

    added = {f"{target}.fsr.{key}" for key in layer.state_dict()}
    now = network.state_dict()
    assert set(now) == set(state) | added
    assert len(added) == 28
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert names_of(network) == set(now)  # named_parameters and the state dict agree
    assert not any(word in key for key in added for word in ("model.", "module."))
    assert all(network.get_submodule(place) is module for place, module in modules.items() if place != target)

    nn.init.normal_(layer.recalibration[-1].weight)
    assert not torch.equal(network(x), plain)
    assert remove_fsr(network) is network
    assert repr(network) == structure
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == list(state)
    assert torch.equal(network(x), plain)


@pytest.mark.parametrize("name", [name for name in UNSEEN if "vi" in name or "attribute" in name])
def test_copies_pickles_averages_and_files_carry_the_layer(name):
    network, target, _ = unseen(name)
    x = images(2, side=32)
    insert_fsr(network, target, CLASSES, x[:1], hidden=4)
    (layer,) = fsr_layers(network).values()
    layer.start_step(RandomSource(0))
    layer.train()
    network(x)  # a recorded graph must not break a copy
    assert layer._latest is not None
    assert layer._drawn
    layer.eval()
    plain = network(x)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = insert_fsr(copy.deepcopy(remove_fsr(copy.deepcopy(network))), target, CLASSES, x[:1], hidden=4).eval()
    assert not torch.allclose(other(x), plain)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copies = {
        "deepcopy": copy.deepcopy(network),
        "pickle": pickle.loads(pickle.dumps(network)),
        "average": AveragedModel(network, use_buffers=True),
        "file": other,
    }
    state = network.state_dict()
    for name, twin in copies.items():
        assert torch.equal(twin.eval()(x), plain), name
        (fresh,) = fsr_layers(twin).values()
        assert fresh is not layer
        assert fresh._latest is None
        assert not fresh._drawn
        with torch.no_grad():
            fresh.recalibration[-1].weight.add_(1)
    assert all(
        torch.equal(value, state[key]) for key, value in network.state_dict().items()
    )  # the copies share nothing
    assert torch.equal(network(x), plain)
    network.load_state_dict(copies["pickle"].state_dict())  # and back
    assert torch.equal(network(x), copies["pickle"](x))
    assert not torch.equal(network(x), plain)


def test_a_strict_load_names_what_is_missing_unexpected_or_of_the_wrong_shape():
    network = with_fsr()
    state = network.state_dict()
    del state["body.0.0.bias"], state["body.fsr.auxiliary.bias"]
    state["body.9.weight"] = torch.zeros(1)
    state["body.1.0.bias"] = torch.zeros(7)
    with pytest.raises(RuntimeError) as caught:
        network.load_state_dict(state)
    message = str(caught.value)
    for words in (
        "Missing",
        '"body.0.0.bias"',
        '"body.fsr.auxiliary.bias"',
        'Unexpected key(s) in state_dict: "body.9.weight"',
    ):
        assert words in message
    assert "size mismatch for body.1.0.bias" in message
    assert "inner" not in message
    outcome = network.load_state_dict({}, strict=False)
    counters = {key for key in network.state_dict() if key.endswith("num_batches_tracked")}  # torch does without them
    assert set(outcome.missing_keys) == set(network.state_dict()) - counters


@pytest.mark.parametrize("target", ["0", "1", "2"])
def test_every_kind_of_target_of_a_chain_can_be_swapped_moved_converted_and_exported(target):
    network, x = chain().eval(), images(2, channels=1)
    insert_fsr(network, target, CLASSES, x, hidden=4)
    plain = network(x)
    state = {key: value * 1.5 if value.is_floating_point() else value for key, value in network.state_dict().items()}
    loaded = copy.deepcopy(network)
    loaded.load_state_dict(state)
    torch.testing.assert_close(torch.func.functional_call(network, state, (x,)), loaded(x))
    torch.testing.assert_close(
        torch.func.functional_call(network, dict(loaded.named_parameters()) | dict(loaded.named_buffers()), (x,)),
        loaded(x),
    )
    torch.testing.assert_close(copy.deepcopy(network).double()(x.double()).float(), plain)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), plain)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), plain)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).double()
    assert names_of(converted) == set(converted.state_dict())
    assert all(value.dtype == torch.float64 for value in converted.state_dict().values() if value.is_floating_point())


def test_layers_may_be_nested_and_come_out_one_by_one():
    network, x = small_network().eval(), images()
    plain, structure = network(x), repr(network)
    for target in ("body.1", "body", "body.0", "stem"):
        insert_fsr(network, target, CLASSES, x, hidden=4, zero_init=True)
    assert list(fsr_layers(network)) == ["stem", "body.0", "body.1", "body"]  # in the order of the forward pass
    assert torch.equal(network(x), plain)
    assert names_of(network) == set(network.state_dict())
    with capture(network) as captured:
        network(x)
        assert len(captured) == 4
    twin = copy.deepcopy(network)
    twin.load_state_dict(network.state_dict())
    remove_fsr(network, "body")
    assert list(fsr_layers(network)) == ["stem", "body.0", "body.1"]
    assert repr(remove_fsr(network)) == structure
    assert torch.equal(network(x), plain)
    assert repr(remove_fsr(twin)) == structure


def test_parents_may_be_lists_and_dictionaries():
    class Parents(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
            self.named = nn.ModuleDict({"late": nn.Conv2d(4, 6, 3)})
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return self.head(self.named["late"](x).mean((2, 3)))

    network, x = Parents().eval(), images()
    plain = network(x)
    for target in ("steps.1", "named.late"):
        insert_fsr(network, target, CLASSES, x, hidden=4)
    assert list(inserted(network)) == ["steps.1", "named.late"]
    assert not torch.allclose(network(x), plain)
    assert torch.equal(remove_fsr(network)(x), plain)


def test_attributes_are_read_from_and_written_to_the_submodule():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), 1.0

        def forward(self, x, factor=1.0):
            return self.conv(x) * self.scale * factor

        def __deepcopy__(self, memo):
            twin = Stage()
            twin.load_state_dict(self.state_dict())
            return twin

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage, self.head = Stage(), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.stage(x, factor=self.stage.scale + self.stage.conv.out_channels).mean((2, 3)))

    network, x = Uses().eval(), images()
    insert_fsr(network, "stage", CLASSES, x, hidden=4)
    plain = network(x)
    network.stage.scale = 2.0
    assert network.stage.inner.scale == 2.0
    assert not torch.allclose(network(x), plain)
    network.stage.scale = 1.0
    assert torch.equal(copy.deepcopy(network)(x), plain)  # a submodule's own __deepcopy__ does not copy the layer away
    network.stage.conv = nn.Conv2d(3, 4, 3)
    assert network.stage.inner.conv is network.stage.conv
    assert not torch.allclose(network(x), plain)
    with pytest.raises(AttributeError, match="nothing"):
        _ = network.stage.nothing


def test_dry_runs_leave_modes_statistics_gradients_and_random_numbers_alone():
    network, x = small_network(), images()
    network.body[0][1].eval()  # frozen on purpose
    modes = {name: module.training for name, module in network.named_modules()}
    state = copy.deepcopy(network.state_dict())
    insert_fsr(network, "body", CLASSES, x)
    assert {name: network.get_submodule(name).training for name in modes} == modes
    assert network.body.fsr.training
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.manual_seed(0)
    FSRLayer(6, CLASSES)
    after_the_layer_alone = torch.rand(1)
    remove_fsr(network)
    torch.manual_seed(0)
    insert_fsr(network, "body", CLASSES, x)
    assert torch.equal(torch.rand(1), after_the_layer_alone)


def test_the_layer_takes_the_dtype_of_the_features():
    network = small_network().double()
    insert_fsr(network, "body", CLASSES, images().double())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


# --- tokens ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_tokens_become_a_grid_row_by_row_and_back(prefix, height, width, factor):
    grid = TokenGrid(prefix, height, width)
    rows, columns = height * factor, width * factor
    tokens = torch.randn(2, prefix + rows * columns, 3)
    leading, features = grid.split(tokens)
    assert torch.equal(leading, tokens[:, :prefix])
    assert features.shape == (2, 3, rows, columns)
    for i, j in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
        assert torch.equal(features[:, :, i, j], tokens[:, prefix + i * columns + j])
    assert torch.equal(grid.join(leading, features), tokens)


def test_class_token_passes_untouched_and_patches_as_a_feature_map():
    layer = spread(FSRLayer(6, CLASSES, hidden=4, tokens=TokenGrid(1, 4, 4))).eval()
    plain = copy.deepcopy(layer)
    plain.tokens = None
    tokens = torch.randn(2, 17, 6)
    output = layer(tokens)
    assert torch.equal(output[:, 0], tokens[:, 0])
    as_map = plain(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(output[:, 1:], as_map.flatten(2).transpose(1, 2))
    with pytest.raises(InputError, match="15 patches"):
        layer(tokens[:, :16])


@pytest.mark.parametrize(
    ("tokens", "image", "declared", "expected"),
    [
        (16, (32, 32), None, TokenGrid(0, 4, 4)),
        (17, (32, 32), 1, TokenGrid(1, 4, 4)),
        (16, (32, 32), 1, TokenGrid(0, 4, 4)),  # before the class token is put in
        (21, (32, 32), 5, TokenGrid(5, 4, 4)),
        (33, (64, 32), 1, TokenGrid(1, 8, 4)),
        (9, (64, 32), None, TokenGrid(1, 4, 2)),
        (9, (32, 32), 5, None),  # 3 x 3, or 2 x 2 behind five
        (15, (32, 32), None, None),
    ],
)
def test_grids_are_found_where_there_is_just_one(tokens, image, declared, expected):
    if expected is not None:
        assert TokenGrid.of(torch.empty(1, tokens, 3), (1, 3, *image), declared) == expected
        return
    with pytest.raises(UnsupportedModelError, match=f"{tokens} tokens"):
        TokenGrid.of(torch.empty(1, tokens, 3), (1, 3, *image), declared)


def test_a_layer_without_effect_on_the_logits_warns():
    network, x = timm_network("vit_tiny_patch16_224", **TINY_VIT), images(1, side=32)
    with pytest.warns(
        NoEffectWarning, match="class token passes"
    ):  # behind the last attention only the class token counts
        insert_fsr(network, "norm", CLASSES, x)
    with pytest.warns(NoEffectWarning, match="nothing was removed"):
        remove_fsr(small_network())


# --- refusals -------------------------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Everything that surgery cannot do, in one network."""

    def __init__(self):
        super().__init__()
        conv = lambda: nn.Conv2d(3, 3, 3, padding=1)  # noqa: E731
        self.twice, self.unused, self.alone, self.sliced = conv(), conv(), conv(), nn.Sequential(conv(), nn.ReLU())
        self.iterated, self.attention = nn.ModuleList([conv()]), nn.MultiheadAttention(3, 1, batch_first=True)
        self.last, self.claims, self.head = conv(), nn.Sequential(), nn.Linear(3, CLASSES)
        self.claims.fsr = conv()
        self.by_list = [self.alone]

    def forward(self, x):
        x = self.twice(self.twice(x))
        x = self.sliced(x) + self.sliced[0](x)
        x = self.claims(self.by_list[0](self.iterated[0](x)))
        x = x + self.attention(*[x.flatten(2).transpose(1, 2)] * 3)[0].mean()
        x = self.last(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("lasst", InputError, "'lasst', expected the name of a submodule of Awkward; did you mean 'last'"),
        ("zzz", InputError, "its children are twice, unused"),
        ("", InputError, "root"),
        ("twice", UnsupportedModelError, "called 2 times"),
        ("unused", UnsupportedModelError, "'unused', which is never called"),
        ("iterated", UnsupportedModelError, "never called.*'iterated.0' say"),
        ("attention", UnsupportedModelError, "returns a tuple"),
        ("alone", UnsupportedModelError, "past that name"),
        ("sliced", UnsupportedModelError, "more with than call it"),
        ("head", UnsupportedModelError, r"tensor of shape \(1, 5\); expected features"),
        ("claims", InputError, "attribute 'fsr' of its own"),
    ],
)
def test_targets_that_cannot_be_served_are_refused_by_name_and_nothing_is_changed(target, error, message):
    network = Awkward().eval()
    structure, plain = repr(network), network(images(1))
    with pytest.raises(error, match=message):
        insert_fsr(network, target, CLASSES, images(1))
    assert repr(network) == structure
    assert torch.equal(network(images(1)), plain)
    assert all(not module._forward_hooks for module in network.modules())


def test_other_refusals():
    x = images(1)
    network = with_fsr()
    for target in ("body", "body.fsr", "body.fsr.separation.0"):
        with pytest.raises(InputError, match=r"'body\.fsr' is there already"):
            insert_fsr(network, target, CLASSES, x)
    with pytest.raises(InputError, match="1, expected a whole number, 2 <= num_classes; L_sep needs a wrong class"):
        insert_fsr(small_network(), "body", 1, x)
    with pytest.raises(InputError, match="num_classes: got 4, expected 5, the columns of the logits"):
        insert_fsr(untouched := small_network(), "body", 4, x)
    assert not inserted(untouched)
    with pytest.raises(InputError, match=r"example: got shape \(1, 1, 8, 8\)"):
        insert_fsr(small_network(), "body", CLASSES, images(1, channels=1))
    with pytest.raises(InputError, match="tau: got 0, expected 0 < tau"):
        insert_fsr(small_network(), "body", CLASSES, x, tau=0)
    with pytest.raises(InputError, match="target: got 'stem', expected one of 'body'"):
        remove_fsr(network, "stem")

    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage, self.head = nn.Linear(3, 7), nn.Linear(7, CLASSES)

        def forward(self, x):
            return self.head(self.stage(x.permute(0, 2, 3, 1)).mean((1, 2)))

    with pytest.raises(UnsupportedModelError, match="channels last"):
        insert_fsr(ChannelsLast(), "stage", CLASSES, x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = small_network()

        def forward(self, x):
            return self.inside(x), x

    with pytest.raises(UnsupportedModelError, match="model: got a tuple as its output"):
        insert_fsr(Pair(), "inside.body", CLASSES, x)


# --- checkpoints of the released code -------------------------------------------------------------------------------------


def released(network):
    """The state of a network with an FSR layer, under the keys of the released code."""
    names = {
        "body.fsr.separation.": "separation.sep_net.",
        "body.fsr.recalibration.": "recalibration.rec_net.",
        "body.fsr.auxiliary.": "aux.0.",
    }
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in names.items():
            key = theirs + key[len(ours) :] if key.startswith(ours) else key
        state[key] = value.clone()
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("unused", [False, True])
def test_a_released_checkpoint_is_loaded(tmp_path, prefix, unused):
    source, x = spread(with_fsr()).eval(), images()
    state = released(source)
    assert {key.split(".")[2] for key in state if "sep_net" in key} == {"0", "1", "3", "4", "6"}
    if unused:
        state["sub_block1.layer.0.conv1.weight"] = torch.zeros(3, 3)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "released.pt")
    torch.manual_seed(9)
    network = insert_fsr(small_network(), "body", CLASSES, x, hidden=4).eval()
    assert not torch.allclose(network(x), source(x))
    assert load_released(network, tmp_path / "released.pt") is network
    assert torch.equal(network(x), source(x))
    with capture(network) as ours, capture(source) as theirs:
        network(x), source(x)
        assert torch.equal(ours["body"].recalibrated, theirs["body"].recalibrated)


def test_a_released_checkpoint_that_does_not_fit_is_refused_whole(tmp_path):
    network = with_fsr()
    before = copy.deepcopy(network.state_dict())
    state = released(network)
    del state["separation.sep_net.0.weight"], state["head.bias"]
    state["aux.0.weight"] = torch.zeros(4, 6)
    state["other.weight"] = torch.zeros(1)
    state["stem.weight"] += 1
    with pytest.raises(CheckpointError) as caught:
        load_released(network, state)
    for words in (
        "missing head.bias",
        "missing body.fsr.separation.0.weight",
        "unexpected other.weight",
        "body.fsr.auxiliary.weight of shape (4, 6) where the network has (5, 6)",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    torch.save({"net": state, "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match="keys net, epoch"):
        load_released(network, tmp_path / "nested.pt")
    torch.save(small_network(), tmp_path / "pickled.pt")  # code is never run
    torch.save({"weight": torch.full((1000,), 7.0)}, tmp_path / "damaged.pt")
    sound = (tmp_path / "damaged.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(sound.replace(torch.tensor(7.0).numpy().tobytes(), b"????", 1))
    for name, words in {"pickled": "more than tensors", "absent": "no such file", "damaged": "BadZipFile"}.items():
        with pytest.raises(CheckpointError, match=words):
            load_released(network, tmp_path / f"{name}.pt")


# --- ART's own trainers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:64].reshape(-1, 1, 8, 8) / 16).astype(np.float32), np.eye(10, dtype=np.float32)[y[:64]]


class Wrapped(nn.Module):
    """A network that is no root Sequential."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


def art_classifier(sequential, loss=None, **weights):
    estimators = pytest.importorskip("art.estimators.classification")
    network = chain(10) if sequential else Wrapped(chain(10))
    insert_fsr(network, "2" if sequential else "inside.2", 10, images(1, channels=1), hidden=4)
    return estimators.PyTorchClassifier(
        network,
        FSRLoss(network, loss, **weights),
        (1, 8, 8),
        10,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def adversarially_trained(classifier, trainer, digits):
    from art.attacks.evasion import ProjectedGradientDescent
    from art.defences import trainer as trainers

    if trainer == "madry":
        trainers.AdversarialTrainerMadryPGD(
            classifier, nb_epochs=1, batch_size=32, eps=0.1, eps_step=0.05, max_iter=2
        ).fit(*digits)
    else:
        attack = ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.05, max_iter=2, verbose=False)
        trainers.AdversarialTrainerTRADESPyTorch(classifier, attack, beta=6.0).fit(*digits, batch_size=32, nb_epochs=1)
    return classifier


# ART's TRADES takes the output of a root Sequential's first child for the logits and fails without us.
@pytest.mark.parametrize(("trainer", "sequential"), [("madry", True), ("madry", False), ("trades", False)])
def test_arts_own_trainers_train_the_layer(trainer, sequential, digits):
    classifier = art_classifier(sequential)
    (layer,) = fsr_layers(classifier.model).values()
    before = copy.deepcopy(layer.state_dict())
    adversarially_trained(classifier, trainer, digits)
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, before[name]), name  # S, R and the auxiliary head, which only FSR's losses reach
    predicted = classifier.predict(digits[0])
    assert predicted.shape == (64, 10)
    assert np.array_equal(predicted, classifier.predict(digits[0]))
    unweighted = art_classifier(sequential, lambda_sep=0.0, lambda_rec=0.0)
    (still,) = fsr_layers(unweighted.model).values()
    before = still.auxiliary.weight.clone()
    adversarially_trained(unweighted, trainer, digits)
    assert torch.equal(still.auxiliary.weight, before)


@pytest.mark.parametrize("sequential", [True, False])
def test_attacks_of_art_see_the_plain_loss(sequential, digits):
    classifier = art_classifier(sequential)
    x, y = digits[0][:8], digits[1][:8]
    classifier.model.train()
    classifier.model(torch.from_numpy(x))  # a recorded pair must not leak into the attack
    gradient = classifier.loss_gradient(x, y)
    leaf = torch.from_numpy(x).requires_grad_()
    classifier.model.eval()
    F.cross_entropy(classifier.model(leaf), torch.from_numpy(y).argmax(1)).backward()
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-7)
    losses = classifier.compute_loss(x, y, reduction="none")
    expected = F.cross_entropy(classifier.model(leaf), torch.from_numpy(y).argmax(1), reduction="none")
    np.testing.assert_allclose(losses, expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("base", [None, nn.CrossEntropyLoss(label_smoothing=0.2), F.multi_margin_loss])
def test_loss_of_two_train_mode_passes_takes_the_base_from_its_logits_and_the_rest_from_the_last_pass(base):
    network, clean, adversarial = with_fsr(), images(4), images(4, seed=1)
    y = torch.tensor([0, 1, 2, 3])
    criterion = FSRLoss(network, base, lambda_sep=0.5, lambda_rec=2.0)
    assert not list(criterion.parameters())
    clean_logits = network(clean)
    with capture(network) as captured:
        logits = network(adversarial)
        part = fsr_loss(logits, captured["body"], y, 0.5, 2.0)
    with evaluating(network):
        network(clean)  # a pass in eval mode counts for nothing
    torch.testing.assert_close(criterion(clean_logits, y), (base or F.cross_entropy)(clean_logits, y) + part.loss)
    with pytest.raises(InputError, match="no train-mode forward pass"):  # the pair was used up
        criterion(clean_logits, y)
    network.eval()
    assert torch.equal(criterion(clean_logits, y), (base or F.cross_entropy)(clean_logits, y))
    criterion.reduction = "none"  # as ART's compute_loss sets it
    if base is not F.multi_margin_loss:
        expected = F.cross_entropy(
            clean_logits, y, reduction="none", label_smoothing=getattr(base, "label_smoothing", 0.0)
        )
        assert torch.equal(criterion(clean_logits, y), expected)
    criterion.close()
    assert not network._forward_hooks
    assert not network.body.fsr.recording


@pytest.mark.parametrize("sequential", [True, False])
def test_a_copied_or_pickled_network_and_loss_still_train_together(sequential):
    network = chain(10) if sequential else Wrapped(chain(10))
    insert_fsr(network, "2" if sequential else "inside.2", 10, images(1, channels=1), hidden=4)
    criterion, x, y = FSRLoss(network), images(4, channels=1), torch.tensor([0, 1, 2, 3])
    network(x)  # recorded tensors must not break a copy
    for twin, loss in (copy.deepcopy((network, criterion)), pickle.loads(pickle.dumps((network, criterion)))):
        with pytest.raises(InputError, match="no train-mode forward pass"):
            loss(torch.zeros(4, 10), y)
        loss(twin(x), y).backward()
        (layer,) = fsr_layers(twin).values()
        assert bool(layer.auxiliary.weight.grad.any())
    assert all(parameter.grad is None for parameter in network.parameters())


# --- composition ----------------------------------------------------------------------------------------------------------


def test_contexts_nest_and_the_layer_works_under_a_weighted_exit_stack():
    network, x, y = with_fsr().eval(), images(), torch.tensor([0, 1, 2, 3])
    with ExitStack() as stack:
        losses = [stack.enter_context(v()) for v in network.body.fsr.attack_contexts().values()]
        assert [loss is None for loss in losses] == [True, True, False]
        _, gradient = input_gradient_of(network, x, y, losses[-1])
    assert gradient.isfinite().all()
    assert network.body.fsr._gate == "exact"


def test_the_layers_defaults_are_the_same_wherever_they_are_written_out():
    def defaults(of):
        return {p.name: p.default for p in inspect.signature(of).parameters.values() if p.kind is p.KEYWORD_ONLY}

    layer, inserting, training = defaults(FSRLayer), defaults(insert_fsr), defaults(FSRTrainer)
    assert inserting == {name: value for name, value in layer.items() if name != "tokens"}
    assert {name: training[name] for name in LayerOptions.__annotations__} == {
        name: layer[name] for name in LayerOptions.__annotations__
    }
