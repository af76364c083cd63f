"""Several processes: two ranks (gloo, on the CPU) train as one process with the whole batch does."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler

from art_saliency.attacks import pgd
from art_saliency.cli import _launch, main, train
from art_saliency.errors import ArtSaliencyError, InputError
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.trainers.methods import StandardTrainer
from art_saliency.training import Extension
from art_saliency.training.batches import ResidentBatches
from tests.helpers import become_rank, free_port, spell
from tests.method_settings import ROWS, classifier, small_network

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def on_ranks(task, world_size=2):
    """What `task(rank)` gives in each of several forked processes, as a launcher would start them."""
    port, pipes = free_port(), []
    for rank in range(world_size):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            become_rank(rank, world=world_size, port=port)
            try:
                answer = task(rank)
            except BaseException:
                answer = traceback.format_exc()
            with os.fdopen(writer, "wb") as file:
                pickle.dump(answer, file)
            os._exit(0)
        os.close(writer)
        pipes.append((child, reader))
    answers = []
    for child, reader in pipes:
        with os.fdopen(reader, "rb") as file:
            answers.append(pickle.load(file))
        os.waitpid(child, 0)
    for answer in answers:
        assert not isinstance(answer, str), answer
    return answers


class Grads(Extension):
    """The gradients of every step, as the optimizer sees them."""

    def __init__(self):
        self.steps = []

    def after_step(self, run):
        assert len(run.batch.x) * run.engine.world_size == 48
        self.steps.append([parameter.grad.clone().numpy() for parameter in run.model.parameters()])


class FrozenBatchNorm(nn.BatchNorm2d):
    """Normalises by its running statistics in train mode too: a batch's own would differ between one process and two."""

    def train(self, mode=True):
        return super().train(False)


def network():
    torch.manual_seed(0)
    model = small_network(norm=True)
    norm = FrozenBatchNorm(8).eval()
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    model.features[1] = norm
    return model


def freeze_inserted(model):
    """The layers that FSR brings have BatchNorm of their own."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = FrozenBatchNorm(child.num_features).eval()
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)


def fit(method, digits, settings=None, *, seed=0, **options):
    """Gradients of 4 steps, final weights and history of a run by one process, or by this one's share of several."""
    model = network()
    art_classifier = classifier(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    torch.manual_seed(1)
    row = ROWS[method]
    trainer = row.trainer(art_classifier, **(row.settings if settings is None else settings))
    parameters = [id(parameter) for parameter in art_classifier.model.parameters()]
    freeze_inserted(art_classifier.model)
    if parameters != [id(parameter) for parameter in art_classifier.model.parameters()]:
        trainer._classifier._optimizer = torch.optim.SGD(art_classifier.model.parameters(), lr=0.05, momentum=0.9)
    grads = Grads()
    trainer.fit(
        digits[0][:96],
        digits[1][:96],
        batch_size=48,
        nb_epochs=2,
        seed=seed,
        verbose=False,
        extensions=[grads],
        **options,
    )
    weights = {name: value.numpy() for name, value in art_classifier.model.state_dict().items()}
    # A ratio of two counts of a batch is not the mean of its parts' ratios: nothing is trained on it.
    figures = [{k: v for k, v in record.items() if k not in ("seconds", "dropped_alive")} for record in trainer.history]
    return grads.steps, weights, figures


def disagreements(one, other, *, figures=True):
    """What two runs do not have in common, up to rounding."""
    (grads, weights, records), (other_grads, other_weights, other_records) = one, other
    found = [] if len(grads) == len(other_grads) == 4 else [f"{len(grads)} and {len(other_grads)} steps of 4"]
    for step, (a, b) in enumerate(zip(grads, other_grads, strict=True)):
        scale = max(float(abs(value).max()) for value in a)
        for number, (mine, yours) in enumerate(zip(a, b, strict=True)):
            difference = float(abs(mine - yours).max())
            if not difference < 2e-5 * scale:
                found.append(f"step {step}, parameter {number}: {difference} of {scale}")
    if weights.keys() != other_weights.keys():
        found.append(f"weights of other names: {sorted(weights.keys() ^ other_weights.keys())}")
    for name in weights.keys() & other_weights.keys():
        mine, yours = torch.as_tensor(weights[name]), torch.as_tensor(other_weights[name])
        if (mine.shape, mine.dtype) != (yours.shape, yours.dtype) or not torch.allclose(
            mine, yours, atol=1e-5, rtol=1e-4
        ):
            found.append(f"{name}: {mine} and {yours}")
    for epoch, (mine, yours) in enumerate(zip(records, other_records, strict=True) if figures else ()):
        if mine != pytest.approx(yours, rel=1e-4, abs=1e-5):
            found.append(f"epoch {epoch}: {mine} and {yours}")
    return found


def compare(digits, method, settings=None, **options):
    """
    What one process and each of two, of the same whole batch, do not agree on with either of two seeds: rounding may turn over a sign
    of an attack's, and with it all that follows, but hardly in both runs.
    """
    return _compared(0, digits, method, settings, **options) and _compared(1, digits, method, settings, **options)


def _compared(seed, digits, method, settings, **options):
    whole = fit(method, digits, settings, seed=seed, **options)
    first, second = on_ranks(lambda rank: fit(method, digits, settings, seed=seed, **options))
    # The watch over overfitting attacks each rank's own part of the last batch.
    found = disagreements(whole, first, figures="train_pgd_accuracy" not in whole[2][0])
    return found + [f"the ranks differ in {name}" for name in first[1] if not (first[1][name] == second[1][name]).all()]


def test_a_disagreement_of_two_runs_is_found_wherever_it_lies():
    """The premise of the tests below."""

    def run(gradient=1.0, weight=1.0, figure=1.0, name="w", shape=(2,)):
        grads = [[torch.tensor([gradient, 2.0]).numpy()]] + 3 * [[torch.ones(2).numpy()]]
        return grads, {name: torch.full(shape, weight).numpy()}, [{"loss": 1.0}, {"loss": figure}]

    assert disagreements(run(), run()) == disagreements(run(), run(1 + 1e-6, 1 + 1e-6, 1 + 1e-6)) == []
    for other in (run(gradient=1.0001), run(weight=1.001), run(figure=1.001), run(name="v"), run(shape=(1,))):
        assert len(disagreements(run(), other)) == 1
        assert len(disagreements(other, run())) == 1
    assert disagreements(run(), run(figure=1.001), figures=False) == []
    assert disagreements(run(weight=float("nan")), run(weight=float("nan"))) != []


@pytest.mark.parametrize("method", ROWS)
def test_two_ranks_train_as_one_process_with_the_whole_batch(method, digits):
    assert compare(digits, method, STEADY.get(method)) == []


def without_a_start_of_noise(model, x, y):
    """In place of TRADES' own attack, whose first gradients, a thousandth from the image, are hardly more than rounding."""
    return pgd(model, x, y, threat=ThreatModel("Linf", 0.15), max_iter=3, random_start=False)


STEADY = {"trades": {"eps": 0.15, "attack": without_a_start_of_noise}}


VARIANTS = {
    "one joint pass of noisy features": ("fsr", {"base": "alp", "max_iter": 2, "target": "features", "hidden": 8}),
    "double backward under noisy features": ("fsr", {"base": "adv-gsct", "target": "features", "hidden": 8}),
    "random masks of either branch": (
        "aalp",
        {"max_iter": 2, "guide": "random", "branches": "separate", "probability": 0.5, "layer": "network.features"},
    ),
    "both branches of the consensus live": ("adv-gsct", {"l2_consensus": 1.0, "linearity": 0.5, "label_on": "both"}),
    "finite differences": ("j-sigr", {"form": "finite-difference", "projections": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_whose_random_numbers_and_passes_are_harder_to_share_agree_too(variant, digits):
    method, settings = VARIANTS[variant]
    assert compare(digits, method, {"eps": 0.15, **settings}) == []


def test_perturbed_weights_averages_smoothing_and_selection_agree_too(digits):
    held_out = (digits[2][:40], digits[3][:40])
    options = {"awp": 0.01, "label_smoothing": 0.1, "validation_data": held_out, "selection": "best", "grad_clip": 1.0}
    assert compare(digits, "trades", STEADY["trades"], ema=0.9, **options) == []
    assert compare(digits, "standard", swa_from=0.0) == []
    assert compare(digits, "adv-gsct", {"eps": 0.15, "target_network": "ema"}, ema=0.5, awp=0.01) == []


def test_a_rank_keeps_its_rows_of_what_one_process_draws():
    """Of [a; b] the rows of a and of b; of a batch, a contiguous part; the sequence goes on at the same place."""
    whole, ranks = RandomSource(3), [RandomSource(3, rank=rank, world_size=2) for rank in range(2)]
    for source in ranks:
        source.rows = 4
    batch, joint, order = whole.uniform(torch.empty(8, 2)), whole.uniform(torch.empty(16, 3)), whole.permutation(9)
    parts = [source.uniform(torch.empty(4, 2)) for source in ranks]
    assert torch.equal(torch.cat(parts), batch)
    for rank, source in enumerate(ranks):
        a, b = source.uniform(torch.empty(8, 3)).chunk(2)
        assert torch.equal(a, joint[:8][4 * rank : 4 * rank + 4])
        assert torch.equal(b, joint[8:][4 * rank : 4 * rank + 4])
        assert torch.equal(source.permutation(9), order)


@pytest.mark.parametrize(("count", "steps", "shown"), [(24, 2, 24), (27, 2, 24), (28, 3, 28), (29, 3, 28), (11, 1, 10)])
def test_a_last_batch_is_shared_equally_or_left_out(count, steps, shown):
    x, y, seen = torch.rand(count, 1, 2, 2), torch.arange(count), []
    for rank in range(2):
        batches = ResidentBatches(x, y, batch_size=12, device=torch.device("cpu"), world_size=2)
        seen.append([batch.y for batch in batches.epoch(RandomSource(0, rank=rank, world_size=2))])
    assert batches.steps_per_epoch == steps
    assert [len(part) for part in seen[0]] == [len(part) for part in seen[1]]
    assert len(torch.cat([*seen[0], *seen[1]]).unique()) == sum(len(part) for part in [*seen[0], *seen[1]]) == shown


def test_what_several_processes_cannot_do_is_refused_by_each_and_nothing_changes(digits, tmp_path):
    bad = {
        "batch_size: got 49, expected a multiple of 2": {"batch_size": 49, "seed": 0},
        "seed: got None, expected a number for 2 processes": {
            "batch_size": 48,
            "checkpoint_dir": str(tmp_path / "kept"),
        },
        "x: got a batch of one image": {"batch_size": 2, "seed": 0},
    }

    def task(rank):
        model = small_network(norm=True)
        before, said = pickle.dumps([value.numpy() for value in model.state_dict().values()]), []
        for words, options in bad.items():
            with pytest.raises(InputError, match=words):
                ROWS["standard"].trainer(classifier(model)).fit(
                    digits[0][:96], digits[1][:96], verbose=False, **options
                )
            said.append(words)
        assert pickle.dumps([value.numpy() for value in model.state_dict().values()]) == before
        return said

    assert on_ranks(task) == [list(bad)] * 2
    assert not (tmp_path / "kept").exists()


# ---- command line ------------------------------------------------------------------------------------------------------

WORDS = spell("train", "pgd-at", data="digits", eps=0.1, set="max_iter=1", width=4, device="cpu")


def spoken(words, place):
    """What a command says and returns, in this process."""
    with open(place, "w", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        code = main(words)
    return code, Path(place).read_text(encoding="utf-8")


def test_of_two_processes_one_speaks_and_writes(tmp_path):
    words = [*WORDS, "--epochs", "1", "--devices", "2", "--out", str(tmp_path / "run")]
    (code, said), (second, nothing) = on_ranks(lambda rank: spoken(words, tmp_path / str(rank)))
    assert (code, second) == (0, 0), said + nothing
    assert said.count("Next: art-saliency evaluate") == 1
    assert "art-saliency" not in nothing
    assert "pgd-at" not in nothing
    page = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert page["history"]["meta"]["steps_per_epoch"] == 11
    assert page["history"]["meta"]["processes"] == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "weights.pt", "best.pt"}
    answers = on_ranks(lambda rank: spoken([*words, "--resume"], tmp_path / str(rank)))
    assert [code for code, _ in answers] == [0, 0]
    assert "this run is over, nothing was left to do" in answers[0][1]
    assert answers[1][1] == ""


def test_devices_starts_the_same_words_once_for_each(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "on_ranks", lambda words, count: asked.append((words, count)) or 0)
    words = [*WORDS, "--devices", "3", "--out", "run"]
    assert main(words) == 0
    assert asked == [(words, 3)]


def launch(code, count=2):
    return _launch.on_ranks(
        [], count, (sys.executable, "-S", "-c", "import os, sys, time\nrank = os.environ['RANK']\n" + code)
    )


class Numbered(torch.utils.data.Dataset):
    """Images whose first pixel is their number."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.full((1, 8, 8), index / 32), index % 10


class Rows(Extension):
    """Which images a process trained on, epoch by epoch, and what dropout does in each step."""

    def __init__(self):
        self.seen, self.masks = {}, []

    def after_step(self, run):
        numbers = (run.batch.x[:, 0, 0, 0] * 32).round().int().tolist()
        self.seen.setdefault(run.epoch, []).extend(numbers)
        with torch.random.fork_rng(devices=[]):
            self.masks.append(nn.functional.dropout(torch.ones(64)).numpy())


SHUFFLED = {
    "torch's global generator": lambda: DataLoader(Numbered(), batch_size=8, shuffle=True),
    "a sampler's": lambda: DataLoader(Numbered(), batch_size=8, sampler=SubsetRandomSampler(range(32))),
    "its own": lambda: DataLoader(Numbered(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1)),
}


def of_stream(loader, **options):
    rows, model = Rows(), nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 10))
    StandardTrainer(classifier(model)).fit_generator(
        loader, nb_epochs=2, seed=0, verbose=False, extensions=[rows], **options
    )
    return rows


@pytest.mark.parametrize("order", SHUFFLED)
def test_ranks_share_every_image_of_a_shuffled_loader_and_no_dropout(order):
    first, second = on_ranks(lambda rank: vars(of_stream(SHUFFLED[order]())))
    for epoch in range(2):
        assert sorted(first["seen"][epoch] + second["seen"][epoch]) == list(range(32))
    assert first["seen"][0] != first["seen"][1]
    assert not any((mine == yours).all() for mine, yours in zip(first["masks"], second["masks"], strict=True))


def test_ranks_resume_a_shuffled_loader_bit_for_bit(tmp_path):
    class Crash(Extension):
        def after_step(self, run):
            if run.step == 6:
                raise InterruptedError

    def task(rank):
        loader = SHUFFLED["torch's global generator"]
        whole = of_stream(loader())
        options = {"checkpoint_dir": tmp_path, "checkpoint_every": "1 steps"}
        rows, model = Rows(), nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 10))
        with pytest.raises(InterruptedError):
            StandardTrainer(classifier(model)).fit_generator(
                loader(), nb_epochs=2, seed=0, verbose=False, extensions=[rows, Crash()], **options
            )
        rest = of_stream(loader(), **options)
        return whole.seen, rest.seen, rows.seen

    for whole, rest, before in on_ranks(task):
        assert before[0] == whole[0]
        assert rest[1] == whole[1][-len(rest[1]) :]
        assert len(rest[1]) in (8, 12)


def test_arts_generators_shuffle_alike_in_all_processes(digits):
    def task(rank):
        np.random.seed(rank)  # noqa: NPY002, ART draws from it
        generator = NumpyDataGenerator(digits[0][:64].numpy(), digits[1][:64].numpy(), batch_size=16, shuffle=True)
        trainer = StandardTrainer(classifier())
        trainer.fit_generator(generator, nb_epochs=2, seed=0, verbose=False)
        return [value.tolist() for value in trainer.get_classifier().model.state_dict().values()]

    first, second = on_ranks(task)
    assert first == second


def test_ranks_that_load_other_batches_are_told(digits):
    def task(rank):
        x, y = (part[:64].roll(rank, 0).numpy() for part in digits[:2])
        generator = NumpyDataGenerator(x, y, batch_size=16, shuffle=True)
        with pytest.raises(InputError, match="other batches in one of 2 processes than in another") as caught:
            StandardTrainer(classifier()).fit_generator(generator, nb_epochs=2, seed=0, verbose=False)
        return str(caught.value).count("\n")

    assert on_ranks(task) == [0, 0]


def test_every_process_knows_its_rank_and_where_the_others_are(tmp_path, capfd):
    names = [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ]
    code = f"print('said')\nopen({str(tmp_path)!r} + '/' + rank, 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert launch(code, 3) == 0
    told = [(tmp_path / str(rank)).read_text(encoding="utf-8").split() for rank in range(3)]
    assert [words[:6] for words in told] == [[str(k), str(k), "3", "3", "0", "127.0.0.1"] for k in range(3)]
    assert len({tuple(words[6:]) for words in told}) == 1
    assert capfd.readouterr().out == "said\n", "only the first speaks"


ENDS = {
    "killed": (
        "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)",
        "rank 1 of 2 was killed by SIGKILL; the other",
    ),
    "first killed": (
        "os.kill(os.getpid(), 15) if rank == '0' else time.sleep(60)",
        "rank 0 of 2 was killed by SIGTERM",
    ),
    "failed": ("sys.exit('no memory' if rank == '1' else time.sleep(60))", "rank 1 of 2 ended with exit code 1"),
    "no room": ("sys.exit(3 if rank == '0' else time.sleep(60))", "rank 0 of 2 ended with exit code 3"),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_rank_that_dies_ends_the_job_with_its_name(kind, capfd, monkeypatch):
    monkeypatch.setattr(_launch, "_PATIENCE", 0.5)
    code, words = ENDS[kind]
    start = time.monotonic()
    with pytest.raises(ArtSaliencyError, match=words):
        launch(code)
    assert time.monotonic() - start < 30
    assert ("no memory" in capfd.readouterr().err) == (kind == "failed"), "what the rank said last is shown"


def test_bad_words_are_explained_by_the_first_process_alone(capfd):
    assert launch("sys.stderr.write('refused\\n'); sys.exit(2)") == 2
    assert capfd.readouterr().err == "refused\n"
