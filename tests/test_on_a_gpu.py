"""What runs on the CPU in every other test, on a GPU: the command line, precisions, bits that repeat, runs that go on."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

from art_saliency import load
from art_saliency.cli import main
from art_saliency.methods.adv_gsct import AdvGSCT
from art_saliency.methods.base import Batch
from art_saliency.modes import full_float32
from art_saliency.networks import art_device_type
from art_saliency.randomness import RandomSource
from art_saliency.trainers.runs import make_classifier
from art_saliency.training import Extension
from tests.helpers import spell
from tests.method_settings import ROWS, small_network

SMALL = {"network": "small-cnn", "width": 4, "eps": 0.2, "quiet": True}


def test_a_gpu_without_a_number_is_the_current_one_and_one_with_a_number_becomes_it(monkeypatch):
    """Torch's set_device refuses one without a number; needs no GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert [art_device_type(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "gpu", "gpu"]
    assert asked == [torch.device("cuda:1")]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_the_command_line_trains_evaluates_and_loads(device, tmp_path, capsys):
    run = tmp_path / "run"
    words = spell("train", "fsr", data="digits", epochs=2, out=run, device=device, set=["max_iter=2"], **SMALL)
    assert main(words) == 0
    assert json.loads((run / "run.json").read_text())["history"]["meta"]["device"].startswith("cuda")
    assert main(spell("evaluate", run, images=20, device=device, quiet=True)) == 0
    classifier = load(run, device="cuda")
    assert next(classifier.model.parameters()).is_cuda
    capsys.readouterr()


def fit(digits, *, name="pgd-at", epochs=2, **options):
    torch.manual_seed(0)
    model = small_network(norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    classifier = make_classifier(model, input_shape=(1, 8, 8), num_classes=10, optimizer=optimizer, device="cuda")
    trained = ROWS[name].trainer(classifier, **{**ROWS[name].settings, "eps": 0.1})
    trained.fit(digits[0][:512], digits[1][:512], batch_size=64, nb_epochs=epochs, seed=0, verbose=False, **options)
    return trained, {name: value.cpu().clone() for name, value in model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_of_computing_learns(digits, precision, channels_last):
    trained, _ = fit(digits, epochs=8, precision=precision, channels_last=channels_last)
    assert trained.history[-1]["loss"] < 0.8 * trained.history[0]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_a_deterministic_run_repeats_and_an_interrupted_one_goes_on_bit_for_bit(
    digits, tmp_path, monkeypatch, name, resident
):
    class CrashAt(Extension):
        def after_step(self, run):
            if run.step == 13:
                raise KeyError

    monkeypatch.setattr("art_saliency.training.batches._fits", lambda x, device: resident)
    run = partial(fit, digits, name=name, deterministic=True)
    _, expected = run()
    _, again = run()
    with pytest.raises(KeyError):
        run(checkpoint_dir=tmp_path, checkpoint_every="3 steps", extensions=[CrashAt()])
    _, resumed = run(checkpoint_dir=tmp_path, checkpoint_every="3 steps", resume="must")
    for found in (again, resumed):
        assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.mark.gpu
def test_differences_of_passes_are_not_drowned_by_the_gpus_rounding(digits):
    """The consensus by finite differences, beside itself on the CPU: TF32 would be some 15 % off."""
    objective = AdvGSCT(eps=0.1, form="finite-difference", prediction_consensus=0.0, warmup_share=0.0)
    assert objective.full_float32
    torch.manual_seed(0)
    here = small_network()
    there = copy.deepcopy(here).cuda()
    x, y = digits[0][:64], digits[1][:64]

    def gradients(model: nn.Module, device: str) -> torch.Tensor:
        class Same(RandomSource):
            """The CPU's numbers, wherever they are needed."""

            def uniform(self, like):
                return super().uniform(like.cpu()).to(like.device)

        batch = Batch(x.to(device), y.to(device), random=Same(0, "cpu"), progress=1.0)
        with full_float32(objective.full_float32):
            loss = objective(model.train(), batch).loss
            return torch.cat([g.flatten().cpu() for g in torch.autograd.grad(loss, list(model.parameters()))])

    a, b = gradients(here, "cpu"), gradients(there, "cuda")
    assert float((a - b).norm() / a.norm()) < 0.01
