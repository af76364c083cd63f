"""The loop and what stands around it: equalities with a hand-written loop, figures, schedules, and the stop at a NaN."""

from __future__ import annotations

import copy
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from art_saliency.errors import NonFiniteLossError
from art_saliency.methods.base import Batch, LossTerms, Objective
from art_saliency.methods.baselines import FGSMRS, PGDAT, Standard
from art_saliency.networks import build_network
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.training import Extension, History, train
from art_saliency.training.batches import ResidentBatches
from art_saliency.training.cost import forward_backward_passes
from art_saliency.training.engine import Engine
from art_saliency.training.extensions import OverfittingWatch, PlateauWatch
from art_saliency.training.records import Progress
from tests.method_settings import small_network


@pytest.fixture(scope="module")
def engine():
    return Engine("cpu")


@pytest.mark.parametrize(("known", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_processor_without_bfloat16_says_so_and_no_other(known, precision, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: known)
    Engine("cpu", precision=precision)
    assert not recwarn.list
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="precision: got 'bf16-mixed' on a processor without bfloat16 .*say '32-true'"):
        Engine("cpu", precision="bf16-mixed")


def run(engine, digits, *, model=None, objective=None, epochs=2, count=200, batch_size=64, lr=0.05, seed=0, **options):
    torch.manual_seed(0)
    model = small_network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    batches = ResidentBatches(digits[0][:count], digits[1][:count], batch_size=batch_size, device=torch.device("cpu"))
    objective = Standard() if objective is None else objective
    history = train(model, objective, optimizer, batches, epochs=epochs, engine=engine, seed=seed, **options)
    return model, history, optimizer


def test_the_loop_is_a_hand_written_loop(engine, digits):
    """Weights bit for bit, figures to rounding, of 15 lines of plain torch."""
    x, y = digits[0][:200], digits[1][:200]
    model, history, _ = run(engine, digits, objective=PGDAT(eps=0.1, max_iter=3), grad_clip=0.5)

    torch.manual_seed(0)
    plain = small_network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    random, objective = RandomSource(0), PGDAT(eps=0.1, max_iter=3)
    for epoch in range(2):
        order, total, right = random.permutation(200), 0.0, 0
        for start in range(0, 200, 64):
            index = order[start : start + 64]
            result = objective(plain, Batch(x[index], y[index], random=random))
            optimizer.zero_grad()
            result.loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            total += result.loss.item() * len(index)
            right += int((result.logits.argmax(1) == y[index]).sum())
        assert history[epoch]["loss"] == pytest.approx(total / 200, rel=1e-6)
        assert history[epoch]["train_accuracy"] == pytest.approx(right / 200)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_uint8_images_train_like_the_floats_they_stand_for(engine, digits):
    x = torch.round(digits[0][:200] * 255)
    found = []
    for images in (x.to(torch.uint8), x / 255):
        model, _, _ = run(engine, (images, digits[1]))
        found.append(model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_epoch_shows_every_image_once_and_leaves_out_a_last_one_alone(digits):
    x, y = digits[0][:129], torch.arange(129)
    for batch_size, steps, shown in ((64, 2, 128), (43, 3, 129), (500, 1, 129), (50, 3, 129)):
        batches = ResidentBatches(x, y, batch_size=batch_size, device=torch.device("cpu"))
        assert batches.steps_per_epoch == steps
        random = RandomSource(0)
        epochs = [[batch.y for batch in batches.epoch(random)] for _ in range(2)]
        for seen in epochs:
            assert len(torch.cat(seen).unique()) == len(torch.cat(seen)) == shown
        assert not torch.equal(epochs[0][0], epochs[1][0]), "the order is the same in every epoch"


def test_maps_and_index_travel_with_their_image(digits):
    x = digits[0][:50]
    maps = x.mean((2, 3), keepdim=True)
    batches = ResidentBatches(
        x,
        digits[1][:50],
        batch_size=16,
        device=torch.device("cpu"),
        maps=maps,
        expand=lambda m: m.expand(-1, 1, 8, 8),
        augment=lambda images, random, moved: (images.flip(-1), moved),
    )
    for batch in batches.epoch(RandomSource(0)):
        assert torch.equal(batch.x, x[batch.index].flip(-1))
        assert batch.maps.shape == (len(batch.x), 1, 8, 8)
        torch.testing.assert_close(batch.maps[:, :, 0, 0], batch.x.mean((2, 3)))


class Breaking(Objective):
    """Cross-entropy until a step at which one term, or one gradient, is no longer finite."""

    name = "breaking"

    def __init__(self, *, at: int, how: str) -> None:
        super().__init__()
        self.at, self.how, self.calls = at, how, 0

    def forward(self, model: nn.Module, batch: Batch) -> LossTerms:
        logits = model(batch.x)
        ce = nn.functional.cross_entropy(logits, batch.y)
        penalty = logits.square().mean() * 1e-3
        if self.calls == self.at and self.how == "term":
            penalty = penalty * float("inf")
        if self.calls == self.at and self.how == "gradient":
            # The square root's derivative at 0 is infinite, times 0: the loss is finite, its gradient is not.
            penalty = penalty + (logits - logits).abs().sqrt().sum() * 0
        self.calls += 1
        return LossTerms(ce + penalty, logits, {"ce": ce.detach(), "penalty": penalty.detach()})


@pytest.mark.parametrize("how", ["term", "gradient"])
def test_a_loss_that_turns_nan_stops_names_term_and_step_and_leaves_good_weights(engine, digits, how):
    model, untouched = small_network(), small_network()
    untouched.load_state_dict(model.state_dict())
    objective, history = Breaking(at=9, how=how), History()
    with pytest.raises(NonFiniteLossError, match="Lower the learning rate") as caught:
        run(engine, digits, model=model, objective=objective, epochs=4, history=history)  # 4 steps an epoch
    if how == "term":
        assert caught.value.term == "penalty"
        assert caught.value.step == 9
    assert caught.value.epoch == 2
    assert len(history) == 2, "the epochs before it stay in the history"
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    expected, _, _ = run(engine, digits, epochs=2, model=untouched, objective=Breaking(at=-1, how=how))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), "not the weights of the last good reading"


def test_modes_and_learning_rate_come_back_after_an_error(engine, digits):
    model = small_network(norm=True)
    model.eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    optimizers = []

    class Look(Extension):
        finished = False

        def on_start(self, run):
            optimizers.append(run.optimizer)

        def on_finish(self, run):
            Look.finished = True

    with pytest.raises(NonFiniteLossError):
        run(
            engine,
            digits,
            model=model,
            objective=Breaking(at=2, how="term"),
            scheduler="onecycle",
            extensions=[Look()],
        )
    assert [module.training for module in model.modules()] == modes
    assert optimizers[0].param_groups[0]["lr"] == 0.05
    assert Look.finished


def test_every_term_is_logged_as_its_mean_over_the_images(engine, digits):
    seen = []

    class Terms(Standard):
        def forward(self, model, batch):
            result = super().forward(model, batch)
            value = torch.tensor(float(len(seen)))
            seen.append((float(value), len(batch.x)))
            return LossTerms(result.loss, result.logits, {"counter": value})

    _, history, _ = run(engine, digits, objective=Terms(), epochs=1)
    assert history[0]["counter"] == pytest.approx(sum(v * n for v, n in seen) / sum(n for _, n in seen))


class Worries(Standard):
    def epoch_warnings(self, record):
        assert record["ce_clean"] == pytest.approx(record["loss"])
        return ["something is off"]


def test_what_an_objective_worries_about_is_said_once(engine, digits):
    with pytest.warns(UserWarning, match="epoch 0: something is off") as caught:
        run(engine, digits, objective=Worries(), epochs=3)
    assert len([w for w in caught if "something is off" in str(w.message)]) == 1


class AddsALoss(nn.Module):
    """A network that adds a loss of its own, as FSR layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.extra = small_network(), nn.Parameter(torch.tensor(2.0))
        self.steps: list[object] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def start_step(self, random: RandomSource | None, progress: float = 1.0) -> None:
        self.steps.append(random)

    def auxiliary_loss(self, logits: torch.Tensor, y: torch.Tensor) -> LossTerms:
        assert len(logits) == len(y)
        return LossTerms(self.extra**2, logits, {"extra": self.extra.detach() ** 2})


def test_the_loop_adds_what_the_network_itself_brings(engine, digits):
    model = AddsALoss()
    _, history, _ = run(engine, digits, model=model, epochs=1)
    assert len(model.steps) == 5
    assert all(isinstance(source, RandomSource) for source in model.steps[:-1])
    assert model.steps[-1] is None, "the last step was not forgotten"
    assert model.extra.item() < 2
    record = history[0]
    assert record["loss"] == pytest.approx(record["ce_clean"] + record["extra"], rel=1e-5)


def test_deterministic_mode_is_on_inside_and_as_before_outside(engine, digits):
    inside = []

    class Look(Extension):
        def after_step(self, run):
            inside.append(torch.are_deterministic_algorithms_enabled())

    before = dict(os.environ)
    run(engine, digits, epochs=1, deterministic=True, extensions=[Look()])
    assert all(inside)
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before


def test_dropout_repeats_with_the_seed(engine, digits):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
        run(engine, digits, model=model, epochs=1, seed=seed)
        found.append(model[1].weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_catastrophic_overfitting_is_seen_and_said():
    """A network that is right on the method's own examples and wrong one PGD step aside."""

    class Run:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        objective = Standard()
        epoch = 3

    x = torch.full((8, 1, 2, 2), 0.5)
    y = torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        Run.model[1].weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
        Run.model[1].bias.copy_(torch.tensor([-1.0, 1.0]))
    Run.batch, Run.logits = Batch(x, y), torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    record: dict[str, float] = {}
    watch, logits = OverfittingWatch(ThreatModel("Linf", 0.4)), []
    hook = Run.model.register_forward_hook(lambda model, images, output: logits.append(output))
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        watch.after_epoch(Run, record)
    hook.remove()
    assert record["train_pgd_accuracy"] == 0
    assert not logits[-1].requires_grad, "only the attack needs a graph"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.after_epoch(Run, record)
        Run.logits = torch.tensor([[0.0, 1.0]]).repeat(8, 1)
        OverfittingWatch(ThreatModel("Linf", 0.4)).after_epoch(Run, record)


def watched(rest=0, **changes):
    """What a plateau watch says of an epoch's end: 16 images of 4 classes, all taken for class 2, late in a run, unless changed."""
    values = {"step": 100, "progress": 0.5, "y": torch.arange(16) % 4, "logits": torch.eye(4)[[2] * 16], "epoch": 3}
    values |= {"objective": PGDAT(eps=0.1, eps_warmup_share=0.2)} | changes
    batch = Batch(torch.zeros(len(values["y"]), 1, 2, 2), values["y"], progress=values["progress"])
    run = SimpleNamespace(**{k: values[k] for k in ("step", "epoch", "objective", "logits")}, batch=batch)
    watch = PlateauWatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = PlateauWatch()
        for each in (watch, watch, again):
            if each is again:
                again.load_state_dict(watch.state_dict())
            each.after_step(run)
            if rest:  # an epoch's last batch, of what is left over
                each.after_step(SimpleNamespace(batch=Batch(batch.x[:rest], batch.y[:rest]), logits=run.logits[:rest]))
            each.after_epoch(run, {})
    return [str(warning.message) for warning in caught]


def test_a_network_that_takes_all_for_one_class_is_said_once_with_what_cures_it():
    (sentence,) = watched()
    assert "all 16 images" in sentence
    assert "class 2" in sentence
    assert "eps_warmup_share, now 0.2" in sentence
    (sentence,) = watched(objective=Standard())
    assert "eps_warmup_share" not in sentence
    assert "learning rate" in sentence
    assert watched(rest=3) == watched()
    (sentence,) = watched(y=torch.eye(4)[torch.arange(16) % 4])
    assert "class 2" in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 99},
        {"progress": 0.3},
        {"objective": PGDAT(eps=0.1, eps_warmup_share=0.6)},
        {"logits": torch.eye(4)[[2] * 15 + [1]]},
        {"y": torch.full((16,), 3)},
        {"y": torch.arange(15) % 4, "logits": torch.eye(4)[[2] * 15]},
    ],
    ids=["few steps", "early", "the radius still rises", "two classes", "a batch of one class", "a small batch"],
)
def test_nothing_is_said_of_a_plateau_too_early_or_without_one(changes):
    assert watched(**changes) == []


@pytest.mark.parametrize(("eps", "collapses"), [(0.4, True), (0.2, False)])
def test_a_real_collapse_is_said_and_honest_single_step_training_is_not(digits, engine, eps, collapses):
    """FGSM without a random start on digits: at 0.4 it learns the single step alone, at 0.2 it learns to resist."""
    torch.manual_seed(0)
    model = build_network("small-cnn", num_classes=10, input_shape=(1, 8, 8), width=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(
            model,
            FGSMRS(eps=eps, random_start=False),
            torch.optim.Adam(model.parameters(), lr=0.01),
            ResidentBatches(digits[0], digits[1], batch_size=96, device=torch.device("cpu")),
            epochs=30,
            engine=engine,
            seed=0,
            scheduler="onecycle",
            extensions=[OverfittingWatch(ThreatModel("Linf", eps))],
        )
    said = [warning for warning in caught if "catastrophic overfitting" in str(warning.message)]
    assert len(said) == collapses, history.column("train_pgd_accuracy")
    resists = history[-1]["train_pgd_accuracy"] > history[-1]["train_accuracy"] / 2
    assert resists is not collapses, history.column("train_pgd_accuracy")


def test_passes_per_step_count_what_a_step_computes(digits):
    """Exact on a network of one kind of layer: a backward pass costs two forwards, one of them for the weights."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model, batch = Deep(), Batch(digits[0][:32], digits[1][:32])
    before = copy.deepcopy(model.state_dict())
    plain = 3 * 8 - 1  # forward, backward to the weights, backward to the inputs (none for the first layer)
    attack_step = 2 * 8
    assert forward_backward_passes(model, Standard(), batch) == 1
    found = forward_backward_passes(model, PGDAT(eps=0.1, max_iter=5), batch)
    assert found == pytest.approx((plain + 5 * attack_step) / plain)
    deeper = Deep()
    deeper.layers.extend(nn.Linear(64, 64) for _ in range(8))
    assert forward_backward_passes(deeper, Standard(), batch, plain=model) == pytest.approx((2 * plain + 1) / plain)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_history_reads_like_a_list_and_writes_json(engine, digits):
    _, history, _ = run(engine, digits, epochs=3)
    assert len(history) == 3
    assert history.column("epoch") == [0, 1, 2]
    assert history.column("absent") == [None] * 3
    page = json.loads(history.to_json())
    assert page["meta"]["versions"]["torch"] == torch.__version__
    assert len(page["epochs"]) == 3


def test_progress_is_shown_on_the_error_stream_alone(engine, digits, capsys):
    run(engine, digits, epochs=2, extensions=[Progress("standard")])
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err
    assert "epoch=2/2" in err


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_a_step_on_a_gpu_waits_for_nothing(digits, resident, monkeypatch):
    """No synchronisation between the first and the last step of an epoch, wherever the images lie."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = small_network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monkeypatch.setattr("art_saliency.training.batches._fits", lambda x, device: resident)
    batches = ResidentBatches(digits[0][:256], digits[1][:256], batch_size=64, device=device)
    assert batches.x.is_cuda == resident

    class Strict(Extension):
        def after_step(self, run):
            torch.cuda.set_sync_debug_mode("error" if run.step % 4 else "default")

    try:
        history = train(
            model,
            PGDAT(eps=0.1, max_iter=2),
            optimizer,
            batches,
            epochs=2,
            engine=Engine(device),
            seed=0,
            extensions=[Strict()],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(history) == 2
