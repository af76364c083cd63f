"""The benchmark: its arithmetic by known answers, its loops by hand against the objectives, its command on a tiny network."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from art_saliency.cli import main
from art_saliency.errors import InputError
from art_saliency.methods.base import Batch, auxiliary_modules
from art_saliency.methods.baselines import PGDAT, TRADES, Standard
from art_saliency.methods.fsr import FSRLayer
from art_saliency.trainers import _timing, benchmark
from art_saliency.trainers._contestants import Contestants
from art_saliency.trainers._plain_loops import BARE, PLAIN, plain_epoch
from art_saliency.trainers._timing import Spread, exact_memory, growth_of, interleaved, matrix_turn, per_round
from art_saliency.trainers.arms import Arm, parse_arm
from art_saliency.training.cost import forward_backward_passes, step_operations
from tests.helpers import in_fresh_process

CPU = torch.device("cpu")
NETWORK = {"name": "small-cnn", "num_classes": 10, "input_shape": [1, 8, 8], "width": 4}


def setting(**changes):
    return benchmark.Setting(
        **{
            "network": NETWORK,
            "max_iter": 2,
            "batch_size": 8,
            "rounds": 2,
            "steps": 2,
            "memory_turns": 0,
            "eps": 0.1,
            **changes,
        }
    )


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_a_spread_is_the_median_and_what_two_thirds_of_the_rounds_lie_between():
    spread = Spread.of(list(range(101)))
    assert (spread.median, spread.low, spread.high) == (50, 16, 84)
    assert str(Spread(1.0456, 1.0, 1.1)) == "1.046 (1.000-1.100)"
    assert str(Spread(12.34, 11.0, 13.0)) == "12.3 (11.0-13.0)"
    assert str(Spread(1234.5, 1000, 1300)) == "1234 (1000-1300)"


def test_a_ratio_is_taken_round_by_round_so_that_a_slow_round_cancels():
    slow = [1.0, 50.0, 2.0, 9.0, 1.5]
    spread = per_round([1.04 * seconds for seconds in slow], slow)
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.04, 1.04, 1.04))
    with pytest.raises(ValueError):
        per_round([1.0], [1.0, 2.0])


def test_all_take_turns_in_every_round_a_group_at_a_time_in_changing_order_and_the_first_round_is_not_counted():
    order, clock = [], itertools.count()

    def turn(name):
        order.append(name)
        return float(next(clock))

    names = {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"]}
    groups = {group: {name: lambda name=name: turn(name) for name in members} for group, members in names.items()}
    calls = []
    found = interleaved(groups, rounds=12, seed=0, progress=lambda: calls.append(1))
    rounds = [order[start : start + 5] for start in range(0, len(order), 5)]
    assert len(order) == len(calls) == 5 * 13
    assert all(sorted(names) == ["a1", "a2", "a3", "b1", "b2"] for names in rounds)
    assert all(names[2][0] == names[0][0] or names[2][0] == names[4][0] for names in rounds), "groups stay together"
    assert len({tuple(names) for names in rounds}) > 5
    for number, names_of_round in enumerate(rounds[1:]):
        for place, name in enumerate(names_of_round):
            assert found[name[0]][name][number] == 5 * (number + 1) + place
    first = list(order)
    order.clear()
    interleaved(groups, rounds=12, seed=0)
    assert order == first
    order.clear()
    interleaved(groups, rounds=12, seed=1)
    assert order != first


def test_a_matrix_product_has_two_operations_an_entry_and_inner_place():
    turn, operations = matrix_turn(CPU, "32-true", repeats=1)
    assert operations == 2 * 1024**3
    assert turn() > 0


# ---- memory ---------------------------------------------------------------------------------------------------------

has_proc = pytest.mark.skipif(_timing._anonymous() is None, reason="the system does not tell its anonymous memory")


def growths(sizes):
    """What is measured of turns that hold so many megabytes, and have freed them at the end."""

    def turn(megabytes):
        for _ in range(2):  # one after the other: together they would be twice as much
            held = torch.ones(megabytes, 1 << 18)
            time.sleep(0.3)  # long enough for a busy machine to look
            del held
        return 0.0

    with exact_memory():
        return [growth_of(lambda size=size: turn(size), CPU) for size in sizes]


@has_proc
def test_memory_is_what_a_turn_held_at_most_also_when_it_has_freed_it():
    sizes = [0, 8, 32]
    found = in_fresh_process("test_bench", f"growths({sizes})")
    assert [growth / 2**20 for growth in found] == pytest.approx(sizes, abs=1.5)


@has_proc
def test_the_watch_on_memory_ends_with_a_turn_that_fails():
    import threading

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"):
        growth_of(lambda: (_ for _ in ()).throw(RuntimeError("no")), CPU)
    assert threading.active_count() == before


def test_a_system_that_does_not_tell_its_memory_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(_timing, "_STATUS", tmp_path / "nothing")
    assert growth_of(lambda: 0.0, CPU) is None
    result = benchmark.benchmark([parse_arm("standard")], setting(rounds=1, memory_turns=1))
    assert result.methods["standard"].extra_bytes is None


# ---- loops by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [PLAIN, BARE], ids=["plain", "bare"])
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("standard", Standard()),
        ("pgd-at", PGDAT(eps=0.1, max_iter=3)),
        ("trades", TRADES(eps=0.1, max_iter=3)),
    ],
)
def test_a_loop_by_hand_minimises_what_the_objective_does(digits, tiny_network, loops, name, objective, monkeypatch):
    """From one starting point; the starts of the attacks differ in their random numbers, so these are taken away."""
    x, y = digits[0][:16], digits[1][:16]
    ours, theirs = tiny_network(), tiny_network()
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.5))
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.zeros_like(like))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_((low + high) / 2))
    # An attack on TRADES's divergence starts at its minimum, where its gradient is rounding: a start apart from x decides it.
    if name == "trades":
        monkeypatch.setattr(torch, "randn_like", lambda like: torch.linspace(-1, 1, like.numel()).view_as(like))
        monkeypatch.setattr(
            "art_saliency.methods.baselines.normal",
            lambda like, random=None: torch.linspace(-1, 1, like.numel()).view_as(like),
        )
    loss = objective(ours.train(), Batch(x, y)).loss
    other = loops[name](theirs.train(), x, y, 0.1, 3)
    assert other.item() == pytest.approx(loss.item(), rel=2e-3)
    assert all(module.training for module in theirs.modules())
    assert all(parameter.requires_grad for parameter in theirs.parameters())
    loss.backward()
    theirs.zero_grad()
    other.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 0.02 * float(a.grad.norm())


def test_a_plain_epoch_is_one_step_a_batch(digits, tiny_network):
    x, y = digits[0][:24], digits[1][:24]
    model, twin = tiny_network(), tiny_network()
    sgd, own = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (model, twin))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    mean = plain_epoch(PLAIN["standard"], model, sgd, loader, CPU, 0.1, 1)
    losses = []
    for start in (0, 8, 16):
        own.zero_grad()
        loss = torch.nn.functional.cross_entropy(twin(x[start : start + 8]), y[start : start + 8])
        loss.backward()
        own.step()
        losses.append(loss.item())
    assert mean == pytest.approx(sum(losses) / 3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ---- contestants ----------------------------------------------------------------------------------------------------


def contestants(tmp_path, name, *, parameters=None, **changes):
    chosen = setting(**changes)
    x, y = benchmark._images(chosen)
    with torch.random.fork_rng(devices=[]):
        return Contestants(Arm(name, name, name, parameters or {}, {}), chosen, x, y, tmp_path)


@pytest.mark.parametrize("name", ["standard", "pgd-at", "adv-gsct", "aalp", "j-sigr", "fsr"])
def test_the_ideal_takes_the_very_steps_of_the_loop(tmp_path, name):
    """Two contestants from one seed: one is trained by the loop, one by the ideal on the loop's batches, to the same weights."""
    loop, ideal = contestants(tmp_path, name), contestants(tmp_path, name)
    for module in auxiliary_modules(ideal.classifier.model):
        twin = dict(loop.classifier.model.named_modules())
        own = dict(ideal.classifier.model.named_modules())
        path = next(path for path, child in own.items() if child is module)
        module.load_state_dict(twin[path].state_dict())
    random_states = []

    class Keep(type(loop.trainer.objective)):
        """Notes where the random numbers stood before each step."""

        def forward(self, model, batch):
            random_states.append(batch.random.generator.get_state())
            return super().forward(model, batch)

    loop.trainer.objective.__class__ = Keep
    start = copy.deepcopy(loop.classifier.model.state_dict())
    with torch.random.fork_rng(devices=[]):
        assert loop.loop() > 0
    loop.trainer.objective.__class__ = Keep.__base__
    assert len(loop.batches) == 2
    ideal.batches = loop.batches
    random = loop.batches[0].random
    layered = bool(auxiliary_modules(ideal.classifier.model))
    random.generator.set_state(random_states[0])
    assert ideal.ideal() > 0
    found = ideal.classifier.model.state_dict()
    moved = 0.0
    for key, value in loop.classifier.model.state_dict().items():
        # Between steps the loop draws nothing but what the objective and the layers draw.
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 if not layered else 1e-4, msg=key)
        moved += float((value - start[key]).abs().sum())
    assert moved > 0


def test_who_takes_part(tmp_path):
    assert set(contestants(tmp_path, "standard").turns()) == {"loop", "ideal", "plain", "bare"}
    assert set(contestants(tmp_path, "mart").turns()) == {"loop", "ideal"}
    assert set(contestants(tmp_path, "fsr").turns()) == {"loop", "ideal"}
    for name in ("pgd-at", "trades"):
        turns = contestants(tmp_path, name).turns()
        assert set(turns) == {"loop", "ideal", "plain", "bare", "art", "art-full"}
        assert all(turn() > 0 for turn in turns.values())


def test_arts_trainers_attack_in_the_batch_size_that_was_asked_for_and_train_the_same_network(tmp_path, monkeypatch):
    from art.attacks.evasion.projected_gradient_descent import projected_gradient_descent_pytorch as module

    sizes = []
    original = module.ProjectedGradientDescentPyTorch._generate_batch
    monkeypatch.setattr(
        module.ProjectedGradientDescentPyTorch,
        "_generate_batch",
        lambda self, x, *rest, **named: sizes.append(len(x)) or original(self, x, *rest, **named),
    )
    for name in ("pgd-at", "trades"):
        method = contestants(tmp_path, name, batch_size=48, steps=1)
        before = copy.deepcopy(method.classifier.model.state_dict())
        method.art(None)
        assert sizes == [32, 16]
        sizes.clear()
        method.art(48)
        assert sizes == [48]
        sizes.clear()
        after = method.classifier.model.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_every_term_has_its_full_weight_from_the_first_step(tmp_path):
    method = contestants(tmp_path, "aalp")
    assert method.trainer.objective.ramp == 0
    assert contestants(tmp_path, "adv-gsct").trainer.objective.warmup_share == 0
    layered = contestants(tmp_path, "fsr", parameters={"base": "aalp"})
    assert layered.base == "aalp"
    assert (layered.trainer.objective.ramp, layered.trainer.objective.max_iter) == (0, 2)
    assert layered.trainer.target == "layer3"
    assert contestants(tmp_path, "pgd-at").trainer.objective.max_iter == 2


def test_half_precision_is_for_those_that_bear_it(tmp_path):
    assert contestants(tmp_path, "pgd-at", precision="bf16-mixed").precision == "bf16-mixed"
    assert contestants(tmp_path, "j-sigr", precision="bf16-mixed").precision == "32-true"


def test_a_method_that_subtracts_passes_is_held_against_products_in_full_float32(tmp_path):
    different = {"form": "finite-difference"}
    assert contestants(tmp_path, "adv-gsct", parameters=different).arithmetic == "32-true, full"
    assert contestants(tmp_path, "adv-gsct").arithmetic == "32-true"


class Attentive(nn.Module):
    """Attention, whose fast kernels have no second derivative."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.inward, self.outward = nn.Conv2d(in_channels, 8, 2, 2), nn.Linear(8, num_classes)

    def forward(self, x):
        tokens = self.inward(x).flatten(2).transpose(1, 2)[:, None]
        return self.outward(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1))


def test_the_ideal_of_a_double_backward_takes_the_attention_that_has_one(tmp_path):
    network = {"name": "tests.test_bench:Attentive", "num_classes": 10, "input_shape": [1, 8, 8]}
    assert contestants(tmp_path, "adv-gsct", network=network).ideal() > 0


def test_operations_are_those_that_the_passes_are_made_of(tmp_path):
    method = contestants(tmp_path, "standard")
    method.loop()
    x = method.batches[0].x
    # Three convolutions and a linear layer, forward and both gradients, but no gradient to the images.
    maps = [1 * 4 * 9 * 64, 4 * 8 * 9 * 16, 8 * 8 * 9 * 16, 8 * 10]
    assert method.operations() == 2 * len(x) * (3 * sum(maps) - maps[0])
    pgd = contestants(tmp_path, "pgd-at")
    model, objective = pgd.classifier.model, pgd.trainer.objective
    ratio = step_operations(model, objective, method.batches[0]) / method.operations()
    assert forward_backward_passes(model, objective, method.batches[0]) == ratio


def test_a_fraction_in_a_methods_name_is_no_folder(tmp_path):
    chosen = setting(memory_turns=0)
    Contestants(parse_arm("j-sigr:lambda_j=1/2@silu"), chosen, *benchmark._images(chosen), tmp_path).loop()
    assert len(list(tmp_path.glob("*.pt"))) == 1


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_every_ratio_is_what_its_seconds_say_and_random_states_come_back():
    arms = [parse_arm(text) for text in ("pgd-at", "standard@silu", "fsr+pgd-at", "fsr+mart")]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    calls = []
    result = benchmark.benchmark(arms, setting(rounds=3), progress=lambda done, total: calls.append((done, total)))
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()  # noqa: NPY002
    assert calls == [(done, 4 * 15) for done in range(1, 4 * 15 + 1)]
    page = json.loads(json.dumps(result.to_json()))
    assert set(page) == {"setting", "methods", "matrix_seconds", "chip", "cores", "threads", "versions"}
    seconds = {name: figures.seconds for name, figures in result.methods.items()}
    reference = np.array(seconds["pgd-at"]["loop"])
    figures = result.methods["pgd-at"]
    assert set(figures.ratios) == set(benchmark.RATIOS) - {"loop/pgd-at", "fsr/base"}
    for name, above, below in [
        ("loop/ideal", "loop", "ideal"),
        ("plain/loop", "plain", "loop"),
        ("art-full/loop", "art-full", "loop"),
        ("loop/bare", "loop", "bare"),
    ]:
        ratios = np.array(seconds["pgd-at"][above]) / np.array(seconds["pgd-at"][below])
        assert figures.ratios[name].median == pytest.approx(np.median(ratios))
    own = np.array(seconds["fsr+pgd-at"]["loop"])
    assert result.methods["fsr+pgd-at"].ratios["fsr/base"].median == pytest.approx(np.median(own / reference))
    assert "fsr/base" not in result.methods["fsr+mart"].ratios
    assert "fsr/base" not in result.methods["standard@silu"].ratios
    plain = np.array(seconds["standard@silu"]["loop"])
    assert result.methods["standard@silu"].ratios["loop/pgd-at"].median == pytest.approx(np.median(plain / reference))
    rate = figures.operations / reference * np.array(result.matrix_seconds[figures.precision]) / (2 * 1024**3)
    assert figures.ratios["rate"].median == pytest.approx(np.median(rate))
    assert figures.images_per_second.median == pytest.approx(np.median(8 / reference))


def test_the_command_prints_one_table_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["bench", "--methods", "pgd-at,j-sigr@silu", "--network", "small-cnn", "--width", "4", "--input-shape"]
    words += ["1,8,8", "--batch-size", "8", "--steps", "1", "--rounds", "2", "--max-iter", "2", "--device", "cpu"]
    assert main([*words, "--quiet", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    header = [cell.strip() for cell in text.splitlines()[0].split("|")[1:-1]]
    assert header[0] == "method"
    assert header[-1] == "extra MB"
    assert {"loop/ideal", "art/loop", "loop/pgd-at", "images/s"} <= set(header)
    assert "fsr/base" not in header
    page = json.loads(out.read_text())
    assert page["setting"]["network"]["width"] == 4
    assert page["methods"]["j-sigr@silu"]["seconds"]["loop"]
    ratio = page["methods"]["pgd-at"]["ratios"]["loop/ideal"]
    assert str(Spread(**ratio)) in text
    assert main([*words, "--quiet", "--out", str(out)]) == 2  # never over a file that is there


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "pdg-at"], "arm: got 'pdg-at'"),
        (["--methods", "pgd-at,pgd-at"], "--methods: got 'pgd-at' twice, expected every arm once"),
        (["--methods", "pgd-at:eps=0.1"], "--methods: got 'eps=0.1', expected no eps here; use --eps"),
        (["--input-shape", "32"], "--input-shape: got '32', expected C,H,W"),
        (["--rounds", "0"], "rounds: got 0"),
        (["--steps", "0"], "steps: got 0"),
        (["--batch-size", "1"], "batch_size: got 1"),
        (["--max-iter", "0"], "--max-iter: got 0"),
        (["--eps", "2"], "eps: got 2"),
        (["--precision", "16"], "precision: got '16'"),
        (["--network", "resnet"], "network: got 'resnet'"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--out", "nowhere/bench.json"], "in a folder that is not there"),
        (["--out", "."], "which is a folder, expected a file"),
        (["--scaling", "--out", "table.json"], "--out: got 'table.json', expected no such option with --scaling"),
        (["--scaling", "--input-shape", "1,8,8"], "--input-shape: got '1,8,8', expected no such option with --scaling"),
        (["--scaling"], "--device: got 'cpu', expected no such option with --scaling"),
        (["--scaling", "--device", "auto", "--seed", "3"], "--seed: got 3, expected no such option with --scaling"),
        (["--scaling", "--device", "auto", "--max-iter", "0"], "--max-iter: got 0"),
        (
            ["--scaling", "--device", "auto", "--methods", "j-sigr@silu"],
            "--methods: got 'j-sigr@silu', expected methods",
        ),
    ],
)
def test_a_wrong_word_is_explained(words, said, capsys):
    assert main(["bench", "--device", "cpu", "--quiet", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_is_wrong_in_a_setting_is_said_at_once():
    with pytest.raises(InputError, match="memory_turns"):
        setting(memory_turns=-1)
    with pytest.raises(InputError, match="seed"):
        setting(seed=-1)
    with pytest.raises(InputError, match="methods: got none"):
        benchmark.benchmark([], setting())
    with pytest.raises(InputError, match=r"methods: got 'pgd-at:ema=0\.9'"):
        benchmark.benchmark([parse_arm("pgd-at:ema=0.9")], setting())


def test_modules_that_add_a_loss_are_found_by_their_class(tiny_network):
    """A step asks for them: it must not take as long as a comparison of every module with a protocol."""
    layer = FSRLayer(8, 10)
    model = torch.nn.Sequential(tiny_network(), torch.nn.ModuleList([layer]))
    assert auxiliary_modules(model) == [layer]
    assert auxiliary_modules(tiny_network()) == []
    with contextlib.suppress(StopIteration):
        assert next(iter(auxiliary_modules(layer))) is layer
