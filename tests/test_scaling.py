"""What a run on ImageNet would cost, on paper: the arithmetic step by step, the counts, and the README's table from both."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from art_saliency.cli import main
from art_saliency.cli._scaling import counts, table
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.base import Batch
from art_saliency.methods.baselines import Standard
from art_saliency.networks import build_network
from art_saliency.training.cost import forward_backward_passes, step_operations
from art_saliency.training.scaling import Job, Machine, gpu_hours

README = (Path(__file__).parent.parent / "README.md").read_text()
JOB = Job(epochs=10, images=4000, operations=1e9, parameters=1000, batch=20, held_out=50, validation=4.0)
MACHINE = Machine(first_order=1e12, second_order=2e11, share=0.5, within=1e6, between=1e5, link_share=0.25, node=2)


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_hours_are_those_of_a_run_followed_step_by_step(gpus, double_backward):
    rate = 1e11 if double_backward else 5e11
    bytes_a_second = 0.25e6 if gpus <= 2 else 0.25e5
    computing = reducing = validating = 0.0
    for _ in range(10):
        for _ in range(4000 // (20 * gpus)):
            computing += 20 * 3.5 * 1e9 / rate
            for _ in range(2 * (gpus - 1)):  # a ring: so many times a part is sent on
                reducing += 4 * 1000 / gpus / bytes_a_second
        validating += 50 * 4 * 1e9 / 1e11
    cost = gpu_hours(3.5, double_backward=double_backward, gpus=gpus, job=JOB, machine=MACHINE, decoded=10)
    seconds = computing + reducing + validating
    assert cost.hours == pytest.approx(seconds / 3600)
    assert cost.gpu_hours == pytest.approx(gpus * seconds / 3600)
    parts = (cost.computing, cost.reducing, cost.validating)
    assert parts == pytest.approx((computing / seconds, reducing / seconds, validating / seconds))
    assert cost.cores == pytest.approx(rate / 3.5e9 / 10)


def test_without_links_and_validation_to_wait_for_more_gpus_cost_nothing():
    alone = replace(JOB, held_out=0)
    costs = [
        gpu_hours(2, double_backward=False, gpus=n, job=alone, machine=replace(MACHINE, within=1e30)) for n in (1, 2)
    ]
    assert costs[0].gpu_hours == pytest.approx(costs[1].gpu_hours)
    assert costs[0].hours == pytest.approx(2 * costs[1].hours)


def test_the_job_is_a_resnet_50_on_imagenet():
    pytest.importorskip("torchvision")
    network = build_network("torchvision:resnet50", num_classes=1000, input_shape=(3, 64, 64))
    assert sum(p.numel() for p in network.parameters()) == Job(1).parameters
    counted = step_operations(network, Standard(), Batch(torch.rand(2, 3, 64, 64), torch.arange(2))) / 2
    head = 3 * 2 * 2048 * 1000  # the only layer that does not see more places in a larger image
    assert (counted - head) * (224 / 64) ** 2 + head == pytest.approx(Job(1).operations, rel=0.01)
    x = Batch(torch.rand(2, 3, 32, 32), torch.arange(2))
    ten = forward_backward_passes(network, OBJECTIVES["pgd-at"](eps=0.01, max_iter=10), x) - 1
    assert ten + 2 / 3 == pytest.approx(Job(1).validation, abs=0.02)


def test_passes_are_of_the_plain_network(tiny_network):
    plain, wider = tiny_network(channels=3), nn.Sequential(nn.Conv2d(3, 3, 1), tiny_network(channels=3))
    batch = Batch(torch.rand(2, 3, 12, 12), torch.arange(2))
    state = torch.get_rng_state()
    assert forward_backward_passes(plain, Standard(), batch, plain=plain) == 1
    found = forward_backward_passes(wider, Standard(), batch, plain=plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert found > 1
    expected = step_operations(wider, Standard(), batch) / step_operations(plain, Standard(), batch)
    assert found == pytest.approx(expected)


# ---- the README -----------------------------------------------------------------------------------------------------

SECTION = re.search(r"## Scaling\n(.*?)\n## ", README, re.DOTALL).group(1)
LINES = [line for line in SECTION.splitlines() if line.startswith("| ")]
ROWS = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in LINES[1:])}


def test_the_readmes_table_is_the_arithmetic_of_its_own_passes():
    found = {name: (float(cells[2]), cells[1] == "TF32") for name, cells in ROWS.items()}
    assert {name.split(":")[0].removeprefix("fsr+") for name in found} == set(OBJECTIVES)
    assert table(found) == "\n".join(line for line in SECTION.splitlines() if line.startswith("|"))


def test_the_readmes_passes_are_counted():
    pytest.importorskip("torchvision")
    names = ["pgd-at:max_iter=3", "adv-gsct", "j-sigr"]  # all of them: art-saliency bench --scaling
    found = counts(",".join(names), network="torchvision:resnet50", side=32, eps=4 / 255, max_iter=10)
    for name in names:
        passes, double_backward = found[name]
        assert passes == pytest.approx(float(ROWS[name][2]), rel=0.01)
        assert ("TF32" if double_backward else "bf16") == ROWS[name][1]


def test_a_base_that_is_not_named_is_given_the_same_attack():
    found = counts("fsr,fsr+pgd-at", network="resnet18", side=8, eps=4 / 255, max_iter=2)
    assert found["fsr"] == found["fsr+pgd-at"]


def test_the_readme_states_the_constants_that_the_table_rests_on():
    machine, job = Machine(), Job(100)
    for constant in (
        f"{machine.first_order / 1e12:.0f} ",
        f"{machine.second_order / 1e12:g} ",
        f"{machine.share:.0%}",
        f"{machine.within / 1e9:.0f} GB/s",
        f"{machine.between / 1e9:.0f} GB/s",
        f"{job.operations / 1e9:g} GFLOP",
        f"batch {job.batch} a GPU",
        f"{job.held_out:,} images",
        f"{4 * job.parameters / 1e6:.0f} MB",
    ):
        assert constant.replace("%", " %") in SECTION, constant


def test_the_command_counts_and_prints_the_readmes_line(capsys):
    pytest.importorskip("torchvision")
    assert main(["bench", "--scaling", "--methods", "fgsm-rs"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| fgsm-rs")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ROWS["fgsm-rs"]
