"""Modes, gradient flags and BatchNorm statistics come back as they were: per submodule, and after an exception."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn

from art_saliency.modes import (
    channels_last,
    evaluating,
    frozen,
    full_float32,
    modes_kept,
    side_pass,
    tensor_float32,
    training,
)


class StopHereError(Exception):
    pass


def mixed_network(seed=0):
    """In train mode but for one BatchNorm and a container, which their owner put into eval mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4, momentum=None), nn.Dropout(0.5)),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 36),
    )
    model[1].eval()
    model[2].training = False  # the container alone: its children keep train mode
    return model


def flags(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("context", [modes_kept, evaluating, training])
@pytest.mark.parametrize("raises", [False, True])
def test_every_submodule_gets_its_own_mode_back(context, raises):
    model, other = mixed_network(), mixed_network().eval()
    before, other_before = flags(model), flags(other)
    assert True in before
    assert False in before
    try:
        with context(model, other):
            for module in (*model.modules(), *other.modules()):
                module.training = not module.training
            if raises:
                raise StopHereError
    except StopHereError:
        assert raises
    assert flags(model) == before
    assert flags(other) == other_before


@pytest.mark.parametrize(("context", "mode"), [(evaluating, False), (training, True)])
def test_inside_every_submodule_has_the_mode(context, mode):
    model, other = mixed_network(), mixed_network().eval()
    with context(model, other):
        assert set(flags(model)) == set(flags(other)) == {mode}


def test_modes_kept_changes_nothing_itself_and_nothing_else_is_restored():
    model = mixed_network()
    before = flags(model)
    with modes_kept(model):
        assert flags(model) == before
        model[0].weight.data.zero_()
    assert not model[0].weight.any()


def test_nested_contexts_unwind_in_order():
    model = mixed_network()
    before = flags(model)
    with evaluating(model):
        with training(model):
            assert all(flags(model))
        assert not any(flags(model))
    assert flags(model) == before


def test_a_module_used_twice_is_restored_once():
    shared = nn.Dropout()
    model = nn.Sequential(shared, shared)
    with evaluating(model, shared):
        assert not shared.training
    assert shared.training


@pytest.mark.parametrize("raises", [False, True])
def test_frozen_gives_each_parameter_its_own_flag_back_and_touches_no_gradient(raises):
    model = mixed_network()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = [parameter.requires_grad for parameter in parameters]
    try:
        with frozen(model):
            assert not any(parameter.requires_grad for parameter in parameters)
            x = torch.rand(4, 1, 8, 8, requires_grad=True)
            model(x).sum().backward()  # the images still get theirs
            assert x.grad is not None
            if raises:
                raise StopHereError
    except StopHereError:
        assert raises
    assert [parameter.requires_grad for parameter in parameters] == before
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(parameter.grad is None for parameter in parameters[2:])


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("raises", [False, True])
def test_statistics_stand_still_inside_and_move_again_afterwards(raises):
    model = mixed_network().train()
    x = torch.rand(4, 1, 8, 8)
    model(x)
    before = buffers(model)
    assert len(before) == 3 * 3
    try:
        with side_pass(model):
            model(x + 1)
            model(2 * x)
            if raises:
                raise StopHereError
    except StopHereError:
        assert raises
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
    model(x + 1)
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name]), name
    assert int(model[1].num_batches_tracked) == 2


def test_outputs_and_weight_gradients_inside_are_those_of_plain_train_mode():
    """Normalised by the batch, not by the running statistics: bit for bit."""
    model = mixed_network().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, x = copy.deepcopy(model), torch.rand(4, 1, 8, 8)
    with side_pass(model):
        inside = model(x)
    outside = plain(x)
    assert torch.equal(inside, outside)
    assert not torch.allclose(inside, plain.eval()(x))  # so the equality says something
    for a, b in zip(
        torch.autograd.grad(inside.square().sum() + inside.sin().sum(), list(model.parameters())),
        torch.autograd.grad(outside.square().sum() + outside.sin().sum(), list(plain.parameters())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_batch_norm_in_eval_mode_still_normalises_by_its_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1)).train()
    model[0].eval()
    model[0].running_mean.fill_(5)
    x = torch.rand(3, 1, 4, 4)
    with side_pass(model):
        first = model[0](x)
    assert torch.allclose(first, (x - 5) / (1 + 1e-5) ** 0.5)


def test_nested_and_several_networks():
    model, other = mixed_network().train(), mixed_network(1).train()
    tracking = [m.track_running_stats for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert tracking == [True, True, False, True]
    before = buffers(model), buffers(other)
    with side_pass(model, other):
        with side_pass(model):
            model(torch.rand(4, 1, 8, 8))
        model(torch.rand(4, 1, 8, 8))  # the inner one's exit does not set them free
        other(torch.rand(4, 1, 8, 8))
    after = buffers(model), buffers(other)
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert [
        m.track_running_stats for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ] == tracking


def test_a_side_pass_is_not_recorded_and_flags_come_back_on_error():
    class Recorder(nn.Module):
        recording = True

    model = nn.Sequential(Recorder(), Recorder())
    model[1].recording = False
    during = []

    def fail():
        with side_pass(model):
            during.extend(child.recording for child in model)
            raise StopHereError

    with pytest.raises(StopHereError):
        fail()
    assert during == [False, False]
    assert [child.recording for child in model] == [True, False]


def test_channels_last_is_a_layout_for_the_duration_and_changes_no_value():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    model[2].to(memory_format=torch.channels_last)  # by its owner
    before, parameters, x = copy.deepcopy(model.state_dict()), list(model.parameters()), torch.rand(2, 3, 8, 8).double()
    plain = model(x)
    inside = []

    def fail():
        with channels_last(model):
            inside.append(model[0].weight.is_contiguous(memory_format=torch.channels_last))
            inside.append(model[0](x).is_contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(model(x), plain)
            raise StopHereError

    with pytest.raises(StopHereError):
        fail()
    assert inside == [True, True]
    assert [a is b for a, b in zip(model.parameters(), parameters, strict=True)] == [True] * len(parameters)
    assert model[0].weight.is_contiguous()
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("by", ["nobody", "the older setting", "the newer one", "all of torch", "all of cuDNN"])
@pytest.mark.parametrize("raises", [False, True])
def test_full_float32_is_for_the_duration_and_for_those_who_need_it(raises, by, request):
    def put(owner, name, value):
        request.addfinalizer(functools.partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    if by == "the older setting":
        put(torch.backends.cudnn, "allow_tf32", False)
    elif by == "the newer one":
        put(torch.backends.cudnn.conv, "fp32_precision", "tf32")
        put(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    elif by != "nobody":
        put(torch.backends if by == "all of torch" else torch.backends.cudnn, "fp32_precision", "tf32")
    settings = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [setting.fp32_precision for setting in settings]
    with contextlib.suppress(KeyError), full_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not tensor_float32()
        if by != "the newer one":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as some networks do
                assert not tensor_float32()
        if raises:
            raise KeyError
    assert [setting.fp32_precision for setting in settings] == before
    with full_float32(False):
        assert [setting.fp32_precision for setting in settings] == before
