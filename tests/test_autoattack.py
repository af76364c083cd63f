"""AutoAttack: equal to the backend bit for bit, exact on linear networks, resumed exactly, and nothing left behind."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyautoattack import checks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_base import FABAttack
from pyautoattack.square import SquareAttack
from sklearn.datasets import load_digits
from torch import Tensor, nn

from art_saliency.errors import ArtSaliencyError, InputError, MissingDependencyError, UnsupportedModelError
from art_saliency.evaluation._autoattack_backend import distribution_version, find_backend
from art_saliency.evaluation._autoattack_memory import weights_sha256
from art_saliency.evaluation._autoattack_plan import VERSIONS, in_words, plan_attacks, square_needs
from art_saliency.evaluation.autoattack import AutoAttackResult, autoattack
from art_saliency.threat import ThreatModel

EPS = {"Linf": 0.12, "L2": 0.6}
QUERIES = 15
INNER = ("apgd", "apgd_targeted", "fab", "square")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Bits depend on the thread count, and a child forked from a process with busy threads can hang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def brief() -> Iterator[None]:
    """Fewer iterations, for whoever constructs an AutoAttack: the direct call and ours alike."""
    construct = pyautoattack.AutoAttack.__init__

    def shortened(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        self.fab.n_iter = 2
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyautoattack.AutoAttack, "__init__", shortened)
        yield


def network(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small convolutional network, trained on noisy digits; in eval mode. 40 images that it has not seen."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(6):
            for rows in torch.randperm(1400).split(100):
                noisy = (x[rows] + 0.15 * torch.randn_like(x[rows]).sign()).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(noisy), y[rows]).backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), x[1400:1440].clone(), y[1400:1440].clone()


def ours(model: nn.Module, x: Any, y: Any, **options: Any) -> AutoAttackResult:
    settings = {
        "eps": EPS.get(options.get("norm", "Linf"), 1),
        "square_queries": QUERIES,
        "batch_size": 16,
        "progress": False,
    }
    return autoattack(model, x, y, **{**settings, **options})


@pytest.fixture(scope="module")
def standard(trained: Any) -> AutoAttackResult:
    """The standard version on the trained network, uninterrupted."""
    return ours(*trained)


def direct(model: nn.Module, x: Tensor, y: Tensor, norm: str = "Linf", **options: Any) -> Tensor:
    """The backend as anybody would call it, parameters not frozen."""
    engine = pyautoattack.AutoAttack(copy.deepcopy(model).eval(), eps=EPS[norm], norm=norm, seed=0, **options)
    engine.square.n_queries = QUERIES
    x_adv, _ = engine.run_standard_evaluation(x, y, batch_size=16)
    return x_adv


# ---------------------------------------------------------------------------------------------- the attack is AutoAttack


@pytest.mark.parametrize(
    ("norm", "version", "attacks"),
    [
        ("Linf", "standard", None),
        ("L2", "standard", None),
        ("Linf", "custom", ["square", "fab"]),
    ],
)
def test_equals_the_backend_bit_for_bit(trained: Any, norm: str, version: str, attacks: list[str] | None) -> None:
    model, x, y = trained
    expected = direct(model, x, y, norm, version=version, attacks=attacks)
    result = ours(model, x, y, norm=norm, version=version, attacks=attacks)
    assert torch.equal(result.x_adv, expected)
    with torch.no_grad():
        assert torch.equal(result.correct, model(expected).argmax(1) == y)
        assert result.clean_accuracy == float((model(x).argmax(1) == y).double().mean())
    assert 0.1 < result.robust_accuracy < result.clean_accuracy - 0.1  # neither attack nor network is trivial here
    assert result.robust_accuracy == pytest.approx(float(result.correct.float().mean()))
    assert result.warnings == []


@pytest.mark.parametrize(("version", "standard"), [("standard", True), ("plus", False), ("rand", False)])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_parameter_is_the_backends_own(
    trained: Any, monkeypatch: pytest.MonkeyPatch, norm: str, version: str, standard: bool
) -> None:
    """With the test above: what runs is the standard version, iterations and queries included (shortened for both)."""
    model, x, y = trained
    engines = []

    def watched(self: Any, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        engines.append(self)
        return x.clone(), y.clone()

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", watched)
    result = autoattack(model, x, y, eps=EPS[norm], norm=norm, version=version, seed=3, progress=False)
    theirs = pyautoattack.AutoAttack(model, eps=EPS[norm], norm=norm, version=version, seed=3)

    def plain(thing: Any) -> dict[str, Any]:
        kept = {k: v for k, v in vars(thing).items() if v is None or isinstance(v, (bool, int, float, str, list))}
        return {k: v for k, v in kept.items() if k != "device"}  # a name there, an object here

    for name in INNER:
        assert plain(getattr(engines[0], name)) == plain(getattr(theirs, name))
        assert len(plain(getattr(theirs, name))) > 5
    assert engines[0].attacks_to_run == theirs.attacks_to_run == result.attacks
    assert result.standard is standard
    assert (result.deviations == []) is standard
    assert engines[0].square.n_queries == 5000
    assert engines[0].model is model


def test_counts_after_each_attack_are_those_of_the_attacks_alone(trained: Any) -> None:
    """The first k attacks of the list, run as a list of their own, leave what the result says after the k-th."""
    model, x, y = trained
    attacks = ["square", "apgd-ce", "fab-t"]
    whole = ours(model, x, y, version="custom", attacks=attacks)
    assert list(whole.robust_accuracy_after) == attacks
    assert whole.robust_accuracy_after[attacks[-1]] == whole.robust_accuracy
    for k, attack in enumerate(attacks[:-1], start=1):
        part = ours(model, x, y, version="custom", attacks=attacks[:k])
        assert whole.robust_accuracy_after[attack] == part.robust_accuracy
    assert len(set(whole.robust_accuracy_after.values())) > 1


# ------------------------------------------------------------------------------------------------------ few classes


def linear_radii(layer: nn.Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """The distance of each image to a linear network's decision boundary, in closed form: margin / dual norm."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    radii = []
    for image, label in zip(x.double().flatten(1), y.tolist(), strict=True):
        logits = weight @ image + bias
        distances = []
        for other in range(len(bias)):
            if other != label:
                normal = weight[label] - weight[other]
                dual = normal.abs().sum() if norm == "Linf" else normal.pow(2).sum().sqrt()
                distances.append(float((logits[label] - logits[other]) / dual))
        radii.append(min(distances))
    return torch.tensor(radii)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_exact_on_linear_networks_of_few_classes(classes: int, norm: str, scale: float) -> None:
    """Logits of 1e4 leave the cross-entropy without gradient: the other attacks must make up for it."""
    generator = torch.Generator().manual_seed(classes)
    layer = nn.Linear(36, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 36, generator=generator))
        layer.bias.zero_()
    x = 0.4 + 0.2 * torch.rand(24, 1, 6, 6, generator=generator)
    y = layer(x.flatten(1)).argmax(1)
    radii = linear_radii(layer, x, y, norm)
    ordered = radii.sort().values[6:18]  # between the two neighbours that lie farthest apart, about the median
    gap = int(ordered.diff().argmax())
    eps = float(ordered[gap : gap + 2].mean())
    with torch.no_grad():
        layer.weight.mul_(scale)
    result = ours(nn.Sequential(nn.Flatten(), layer), x, y, norm=norm, eps=eps, square_queries=5)
    assert torch.equal(result.correct, radii > eps)
    assert not result.standard
    assert f"{classes} classes" in result.deviations[0]
    if scale == 1e4:  # the oracle bites: APGD on the cross-entropy alone is far from exact
        alone = ours(
            nn.Sequential(nn.Flatten(), layer), x, y, norm=norm, eps=eps, version="custom", attacks=["apgd-ce"]
        )
        assert alone.robust_accuracy > result.robust_accuracy


@pytest.mark.parametrize(
    ("version", "classes", "attacks", "targets"),
    [
        ("standard", 2, "apgd-ce fab-t square", 1),
        ("standard", 3, "apgd-ce apgd-dlr fab-t square", 2),
        ("standard", 4, "apgd-ce apgd-t fab-t square", 3),
        ("standard", 9, "apgd-ce apgd-t fab-t square", 8),
        ("standard", 10, "apgd-ce apgd-t fab-t square", 9),
        ("standard", 100, "apgd-ce apgd-t fab-t square", 9),
        ("plus", 2, "apgd-ce fab square fab-t", 1),
        ("plus", 3, "apgd-ce apgd-dlr fab square fab-t", 2),
        ("rand", 2, "apgd-ce", 1),
        ("rand", 3, "apgd-ce apgd-dlr", 2),
    ],
)
def test_what_runs_for_how_many_classes(version: str, classes: int, attacks: str, targets: int) -> None:
    plan = plan_attacks(version, None, classes, 5000)
    assert (" ".join(plan.attacks), plan.target_classes) == (attacks, targets)
    assert (plan.deviations == []) is (version == "standard" and classes >= 10)
    whole = attacks == " ".join(VERSIONS[version]) and (targets == 9 or "-t" not in attacks)
    assert in_words(version, plan.deviations) == (version if whole else f"{version}, changed: {classes} classes")


@pytest.mark.parametrize("version", ["plus", "rand"])
@pytest.mark.parametrize("classes", [2, 3])
def test_other_versions_run_with_few_classes(trained: Any, version: str, classes: int) -> None:
    _, x, y = trained
    x, y = x[y < classes], y[y < classes]
    torch.manual_seed(classes)
    model = network(classes).eval()
    y = model(x).argmax(1)
    result = ours(model, x, y, version=version, eps=1.0)
    assert result.clean_accuracy == 1
    assert result.robust_accuracy == 0  # any image may become any other


# ------------------------------------------------------------------------------------------------------ resumption


class KilledError(Exception):
    """Stands for the end of the process."""


def count_calls(monkeypatch: pytest.MonkeyPatch, fatal: int | None = None) -> list[str]:
    """Note every inner attack that really runs; the `fatal`-th dies when it has almost finished."""
    calls: list[str] = []
    for kind in (APGDAttack, APGDAttack_targeted, FABAttack, SquareAttack):

        def noted(self: Any, *args: Any, _perturb: Callable[..., Tensor] = kind.perturb, **options: Any) -> Tensor:
            calls.append(type(self).__name__)
            x_adv = _perturb(self, *args, **options)
            if len(calls) == fatal:
                raise KilledError
            return x_adv

        monkeypatch.setattr(kind, "perturb", noted)
    return calls


def same(a: AutoAttackResult, b: AutoAttackResult) -> bool:
    """Bit for bit, and everything else but the time."""
    plain_a, plain_b = ({**r.to_json(), "seconds": 0} for r in (a, b))
    return torch.equal(a.x_adv, b.x_adv) and torch.equal(a.correct, b.correct) and plain_a == plain_b


class Dead(nn.Module):
    """A network without gradient on some images, of which AutoAttack warns inside an attack."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.where(x[:, :1, 2, 3] > 0.5, logits.detach(), logits)


@pytest.fixture(scope="module")
def dead(trained: Any) -> tuple[AutoAttackResult, int]:
    """An uninterrupted evaluation that warns within attacks, and how many calls of inner attacks it took."""
    model, x, y = trained
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        return ours(Dead(model).eval(), x, y), len(calls)


@pytest.mark.parametrize("fatal", [1, 4, 6, 9])
def test_resumes_bit_for_bit_after_an_error(
    trained: Any, dead: tuple[AutoAttackResult, int], tmp_path: Path, fatal: int
) -> None:
    _, x, y = trained
    model = Dead(trained[0]).eval()
    uninterrupted, total = dead
    assert total == 9  # batches of four attacks
    assert any("zero gradient" in warning for warning in uninterrupted.warnings)
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, fatal)
        with pytest.raises(KilledError):
            ours(model, x, y, state_dir=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        resumed = ours(model, x, y, state_dir=tmp_path)
        assert len(calls) == total - (fatal - 1)  # what had finished was not computed again
    assert same(resumed, uninterrupted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("written", ["before", "half", "after"])
def test_resumes_bit_for_bit_after_a_kill(
    trained: Any, standard: AutoAttackResult, tmp_path: Path, written: str
) -> None:
    """The process vanishes while the fifth file is being written: before the write, within it, and right after."""
    model, x, y = trained
    child = os.fork()
    if child == 0:  # no pytest, no clean-up: whatever happens, this process ends here
        try:
            replace, files = os.replace, []

            def fatal(source: Any, target: Any) -> None:
                files.append(target)
                if len(files) == 5:
                    if written == "half":
                        os.truncate(source, os.path.getsize(source) // 2)
                    if written != "before":
                        replace(source, target)
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = fatal
            ours(model, x, y, state_dir=tmp_path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    kept = sorted(file.name for file in tmp_path.glob("*.pt"))
    assert len(kept) == (3 if written == "before" else 4)  # the first file is the fingerprint
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        assert same(ours(model, x, y, state_dir=tmp_path), standard)
    assert len(calls) == 9 - (4 if written == "after" else 3)


class Noisy(nn.Module):
    """A randomised network that draws from every global generator, in eval mode too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + torch.randn_like(logits) * 0.5 + random.gauss(0, 0.2) + torch.tensor(np.random.rand(10)).float()  # noqa: NPY002


def test_randomised_networks(trained: Any, tmp_path: Path) -> None:
    """Version "rand": the backend's own images, the same whatever was drawn before, and resumed exactly."""
    model, x, y = trained
    model, x, y = Noisy(model).eval(), x[:20], y[:20]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = direct(model, x, y, version="rand")
    torch.manual_seed(99)
    whole = ours(model, x, y, version="rand")
    assert torch.equal(whole.x_adv, expected)
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, 3)
        with pytest.raises(KilledError):
            ours(model, x, y, version="rand", state_dir=tmp_path)
    torch.manual_seed(100)
    assert same(ours(model, x, y, version="rand", state_dir=tmp_path), whole)
    told = ours(model, x, y, version="custom", attacks=["apgd-ce"])
    assert any("randomized defense" in warning for warning in told.warnings)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "fingerprint"])
def test_damaged_files_are_computed_again(trained: Any, tmp_path: Path, damage: str) -> None:
    model, x, y = trained
    whole = ours(model, x, y, version="custom", attacks=["apgd-ce", "square"], state_dir=tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 5
    content = files[0].read_bytes()
    if damage == "flip":  # one bit of one pixel: torch.load alone would not notice
        place = content.index(torch.load(files[0], weights_only=True)["x_adv"].numpy().tobytes()[:64]) + 2
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    elif damage == "foreign":
        content = files[1].read_bytes()
    else:
        (tmp_path / "fingerprint.json").write_text('{"eps": 0.1')
    files[0].write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        assert same(ours(model, x, y, version="custom", attacks=["apgd-ce", "square"], state_dir=tmp_path), whole)
    assert len(calls) == (0 if damage == "fingerprint" else 1)
    with pytest.MonkeyPatch.context() as patch:  # and the file is mended
        calls = count_calls(patch)
        ours(model, x, y, version="custom", attacks=["apgd-ce", "square"], state_dir=tmp_path)
    assert calls == []


def test_files_without_their_fingerprint_serve_no_other_evaluation(trained: Any, tmp_path: Path) -> None:
    """Images, labels, seed and generators agree here; only the network differs."""
    model, x, y = trained
    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    ours(model, x, y, state_dir=tmp_path, **settings)
    (tmp_path / "fingerprint.json").unlink()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].weight.mul_(0.5)  # predicts the same classes, so every batch is the same
    fresh = ours(other, x, y, **settings)
    assert not torch.equal(fresh.x_adv, ours(model, x, y, **settings).x_adv)
    assert same(ours(other, x, y, state_dir=tmp_path, **settings), fresh)


class Relit(nn.Module):
    """The same state_dict as `inner`, another function."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = nn.functional.silu(x) if isinstance(child, nn.ReLU) else child(x)
        return x


def test_a_folder_of_another_evaluation_is_refused(trained: Any, tmp_path: Path) -> None:
    model, x, y = trained
    settings = {"version": "custom", "attacks": ["apgd-ce"], "state_dir": tmp_path}
    ours(model, x, y, **settings)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].bias[0] += 1e-7
    assert weights_sha256(Relit(model)) == weights_sha256(model)
    cases: list[tuple[str, nn.Module, Tensor, Tensor, dict[str, Any]]] = [
        (r"eps \(0.12 there, 0.2 here\)", model, x, y, {"eps": 0.2}),
        ("norm", model, x, y, {"norm": "L2"}),
        ("seed", model, x, y, {"seed": 1}),
        ("batch_size", model, x, y, {"batch_size": 17}),
        ("square_queries", model, x, y, {"square_queries": 16}),
        ("attacks", model, x, y, {"attacks": ["apgd-dlr"]}),
        ("version.*attacks", model, x, y, {"version": "rand", "attacks": None}),
        ("weights_sha256", other, x, y, {}),
        ("data_sha256", model, x.flip(0), y.flip(0), {}),
        ("data_sha256", model, x, y.roll(1), {}),
        ("logits", Relit(model).eval(), x, y, {}),
    ]
    for named, network_, images, labels, change in cases:
        with pytest.raises(InputError, match=rf"state_dir: .* differs in .*{named}"):
            ours(network_, images, labels, **{**settings, **change})
    torch.set_num_threads(2)
    with pytest.raises(InputError, match=r"threads \(1 there, 2 here\)"):
        ours(model, x, y, **settings)
    torch.set_num_threads(1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"state_dir: .* a file"):
        ours(model, x, y, **{**settings, "state_dir": tmp_path / "file"})


# ------------------------------------------------------------------------------------------------- nothing left behind


def trace_nothing(*_: Any) -> None:
    """A tracer: what a debugger or a coverage tool installs."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("where", ["forward", "attack"])
def test_process_and_network_are_left_as_they_were(
    trained: Any, monkeypatch: pytest.MonkeyPatch, fails: bool, where: str
) -> None:
    _, x, y = trained
    model = copy.deepcopy(trained[0]).train()
    model[1].eval()  # a frozen BatchNorm
    model[0].weight.requires_grad_(False)
    model[-1].weight.grad = torch.full_like(model[-1].weight, 7.0)
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    images, labels = x.clone(), y.clone()
    tracers = []
    perturb = FABAttack.perturb

    def meddle(network_: Any, *_: Any) -> None:
        """A network that calls a `grad` of its own and writes into its gradients."""
        grad(x)
        for parameter in network_.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad.add_(1)

    model.register_forward_pre_hook(meddle)

    def attack(self: Any, *args: Any) -> Tensor:
        tracers.append(sys.gettrace())
        assert not any(p.requires_grad for p in model.parameters())  # FAB's backward would compute them all
        if fails and where == "attack":
            raise KilledError
        return perturb(self, *args)

    monkeypatch.setattr(FABAttack, "perturb", attack)
    if fails and where == "forward":

        def dies_when_traced(*_: Any) -> None:
            if sys.gettrace() is checks.tracefunc:  # in the middle of AutoAttack's own check
                raise KilledError

        model.register_forward_pre_hook(dies_when_traced)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    old = sys.gettrace()
    sys.settrace(trace_nothing)
    try:
        if fails:
            with pytest.raises(KilledError):
                ours(model, x, y)
        else:
            ours(model, x, y)
        after = sys.gettrace()
    finally:
        sys.settrace(old)
    assert after is trace_nothing
    assert set(tracers) <= {trace_nothing}  # breakpoints work within the attacks too
    assert bool(tracers) is not (fails and where == "forward")
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()) == expected  # noqa: NPY002
    for name, parameter in model.named_parameters():
        gradient, values = gradients[name]
        assert parameter.grad is gradient
        assert values is None or torch.equal(gradient, values)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert set(checks.funcs.values()) == {0}


def grad(x: Tensor) -> Tensor:
    """An innocent helper with the name that AutoAttack looks for."""
    return x


class Helped(nn.Module):
    """Calls the innocent helper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(grad(x))  # type: ignore[no-any-return]


def test_one_network_does_not_flag_the_next(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = trained[0], trained[1][:8], trained[2][:8]
    options = {"version": "custom", "attacks": ["apgd-ce"]}
    checks.funcs["backward"] = 3  # what an evaluation without this package left
    assert ours(model, x, y, **options).warnings == []
    with caplog.at_level(logging.WARNING, logger="art_saliency"):
        flagged = ours(Helped(model).eval(), x, y, **options).warnings
    assert len(flagged) == 1
    assert "dynamic defense" in flagged[0]
    assert flagged[0] in caplog.text  # data, and not lost to who watches
    assert ours(model, x, y, **options).warnings == []


def test_a_network_in_train_mode_is_evaluated_in_eval_mode(trained: Any, standard: AutoAttackResult) -> None:
    model, x, y = trained
    train = copy.deepcopy(model).train()
    assert same(ours(train, x, y), standard)
    assert all(module.training for module in train.modules())


def test_forms_of_input(trained: Any) -> None:
    """Layout, container, label form and grad mode of the caller do not matter."""
    model, x, y = trained[0], trained[1][:6], trained[2][:6]
    options = {"version": "custom", "attacks": ["apgd-dlr", "fab-t", "square"], "square_queries": 200}
    expected = ours(model, x, y, **options)
    strided = torch.zeros(6, 8, 8, 2)[..., 0].copy_(x[:, 0]).unsqueeze(1)
    assert not strided.is_contiguous()
    forms: list[tuple[Any, Any]] = [
        (strided, y),
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
        (x.contiguous(memory_format=torch.channels_last), y),
        (x.transpose(0, 1).contiguous().transpose(0, 1), y.int()),
        (x.numpy(), y.numpy()),
        (x.double(), nn.functional.one_hot(y, 10)),
    ]
    for images, labels in forms:
        assert same(ours(model, images, labels, **options), expected)
    for caller in (torch.no_grad, torch.inference_mode):
        with caller():
            assert same(ours(model, x.clone(), y.clone(), **options), expected)


# -------------------------------------------------------------------------------------------------- what is refused


class Odd(nn.Module):
    """A network whose output is spoilt."""

    def __init__(self, inner: nn.Module, spoil: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.spoil = inner, spoil

    def forward(self, x: Tensor) -> Any:
        return self.spoil(self.inner(x))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: (z, z), "got tuple"),
        (lambda z: z[:, :, None], "shape \\(16, 10, 1\\)"),
        (lambda z: z[:, :1], "shape \\(16, 1\\)"),
        (lambda z: z[:5], "shape \\(5, 10\\)"),
        (lambda z: z.bfloat16(), "bfloat16"),
        (lambda z: z / 0, "NaN or infinite"),
    ],
)
def test_networks_without_logits_are_refused(trained: Any, spoil: Callable[[Tensor], Any], message: str) -> None:
    model, x, y = trained
    with pytest.raises(UnsupportedModelError, match=message):
        ours(Odd(model, spoil).eval(), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x * 255}, "x: got values from 0 to 255, expected values in \\[0, 1\\]; divide by 255"),
        ({"x": lambda x: (x - 0.5) / 0.5}, "x: got values from -1 to 1, .* put the mean"),
        ({"x": lambda x: x / 0}, "NaN or Inf"),
        ({"x": lambda x: x[:, 0]}, "4 axes"),
        ({"x": lambda x: x.flatten(1)}, "4 axes"),
        ({"x": lambda x: x[:0]}, "empty"),
        ({"y": lambda y: y[:-1]}, "y: got 39 labels, expected 40"),
        ({"y": lambda y: y + 1}, "labels from 1 to 10, expected labels from 0 to 9"),
        ({"y": lambda y: torch.full((40, 10), 0.1)}, "soft labels"),
        ({"eps": 0}, "eps: got 0, expected 0 < eps"),
        ({"eps": 8}, "eps: got 8, expected 0 <= eps <= 1; for images of 0 to 255 write eps=8 / 255"),
        ({"norm": "L1"}, "norm: got 'L1'"),
        ({"version": "standart"}, "did you mean 'standard'"),
        ({"attacks": ["apgd-ce"]}, "attacks: .* version='custom' takes a list"),
        ({"version": "custom"}, "attacks: got None, expected a list"),
        ({"version": "custom", "attacks": "fab"}, "attacks: got 'fab', expected a list"),
        ({"version": "custom", "attacks": []}, "attacks: got \\[\\]"),
        ({"version": "custom", "attacks": ["fab", "fab"]}, "each once"),
        ({"version": "custom", "attacks": ["pgd"]}, "attacks: got 'pgd'"),
        ({"seed": None}, "seed: got None"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"square_queries": 0}, "square_queries: got 0"),
        ({"device": "meta"}, "device: got 'meta', expected 'cpu', where the network is; move it"),
    ],
)
def test_arguments_outside_what_is_accepted(trained: Any, change: dict[str, Any], message: str) -> None:
    model, x, y = trained
    x, y = (change.pop(name, lambda same: same)(value) for name, value in (("x", x), ("y", y)))
    with pytest.raises(InputError, match=message):
        ours(model, x, y, **change)


def test_what_two_and_three_classes_cannot_run_is_refused_when_named(trained: Any) -> None:
    _, x, y = trained
    for classes, attack, least in ((2, "apgd-dlr", 3), (3, "apgd-t", 4)):
        with pytest.raises(InputError, match=f"'{attack}' for {classes} classes, expected at least {least} classes"):
            ours(network(classes), x, y % classes, version="custom", attacks=["apgd-ce", attack])


def test_images_too_low_for_square_under_l2_are_refused(trained: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 10))
    x, y = torch.rand(4, 1, 4, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match="x: got images of 4 x 8 pixels, expected at least 5 rows"):
        ours(model, x, y, norm="L2")
    ours(model, x, y, norm="L2", version="custom", attacks=["apgd-ce"])


class Same(nn.Module):
    """Gives every image class 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)


@settings(max_examples=60)
@given(height=st.integers(5, 40), width=st.integers(5, 40), square=st.booleans())
@example(height=14, width=14, square=True)
@example(height=32, width=36, square=False)
@example(height=24, width=4, square=False)
@example(height=24, width=3, square=False)
def test_squares_tiles_under_l2_fit_exactly_where_its_own_code_runs(height: int, width: int, square: bool) -> None:
    x = torch.full((1, 1, height, height if square else width), 0.5)
    attack = SquareAttack(Same(), norm="L2", eps=1e-3, n_queries=1, seed=0, device="cpu")
    try:
        attack.perturb(x, torch.zeros(1, dtype=torch.long))
        runs = True
    except RuntimeError:
        runs = False
    assert (square_needs(ThreatModel("L2", 1e-3), x) is None) == runs
    assert square_needs(ThreatModel("Linf", 1e-3), x) is None


def test_images_that_squares_tiles_overrun_are_refused_before_any_attack(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 10))
    x, y = torch.rand(4, 1, 14, 14), torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match="x: got images of 14 x 14 pixels, expected sides that Square's tiles"):
        ours(model, x, y, norm="L2", state_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    ours(model, x, y, norm="L2", version="custom", attacks=["apgd-ce"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_network_without_gradients_is_named_as_the_cause(trained: Any, version: str) -> None:
    model, x, y = trained
    cut = nn.Sequential(Cut(), model)
    with pytest.raises(UnsupportedModelError, match="model: got logits without a gradient to the images"):
        ours(cut, x[:4], y[:4], version=version)
    found = ours(cut, x[:4], y[:4], version="custom", attacks=["square"])
    assert torch.equal(found.correct, ours(model, x[:4], y[:4], version="custom", attacks=["square"]).correct), (
        "an attack by queries needs none"
    )


class Cut(nn.Module):
    """Hands its images on, without a way back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Fails(nn.Module):
    """Has gradients, and breaks at the third pass."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes > 2:
            raise RuntimeError("the network's own trouble")
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_of_another_type_are_refused_with_the_cure(trained: Any, dtype: torch.dtype) -> None:
    model, x, y = trained
    with pytest.raises(UnsupportedModelError, match=rf"model: got a network of {dtype}, .*convert it with .float\(\)"):
        ours(copy.deepcopy(model).to(dtype), x.to(dtype), y)


def test_another_failure_keeps_its_own_words(trained: Any) -> None:
    with pytest.raises(RuntimeError, match="the network's own trouble"):
        ours(Fails(), *trained[1:])


# ------------------------------------------------------------------------------------------------------- the result


def test_the_record(trained: Any) -> None:
    model, x, y = trained
    result = ours(model, x, y, norm="L2", seed=4)
    record = json.loads(json.dumps(result.to_json()))
    assert record["count"] == 40
    assert record["interval"][0] < record["robust_accuracy"] < record["interval"][1]
    assert not {"x_adv", "correct"} & set(record)
    assert (record["norm"], record["eps"], record["seed"], record["batch_size"]) == ("L2", 0.6, 4, 16)
    assert record["backend"] == "pyautoattack"
    assert record["backend_version"] == distribution_version("pyautoattack") == pyautoattack.__version__
    assert record["threads"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].startswith("cpu (")
    assert record["deviations"] == [f"square with {QUERIES} instead of 5000 queries"]
    assert record["seconds"] > 0
    assert len(repr(result)) < 2000
    other = ours(model, x[:39], y[:39], norm="L2", version="custom", attacks=["apgd-ce"])
    assert record["weights_sha256"] == other.weights_sha256
    assert record["data_sha256"] != other.data_sha256
    delta = (result.x_adv - x).double().flatten(1).norm(dim=1)
    assert float(delta.max()) <= 0.6 + 1e-6
    assert float(delta.max()) > 0.5
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1


def test_the_sum_of_the_weights() -> None:
    torch.manual_seed(0)
    model = network()
    known = weights_sha256(model)
    assert weights_sha256(copy.deepcopy(model)) == known
    with torch.no_grad():
        model[1].num_batches_tracked.add_(1)  # no axes, whole numbers
    assert weights_sha256(model) != known
    one, two = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        two.weight.copy_(one.weight.view(4, 2))
    sums = {weights_sha256(m) for m in (one, two, nn.Sequential(one), copy.deepcopy(one).double())}
    assert len(sums) == 4  # shape, name and type count
    with torch.no_grad():
        one.weight.copy_(one.weight.t().contiguous().t().view(2, 4))
    assert weights_sha256(one) in sums


def test_images_outside_the_threat_model_are_reported(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = trained
    cases: list[tuple[Callable[[Tensor], Tensor], float, str]] = [
        (lambda x: (x + 0.5).clamp(max=1), 0.12, "distances up to 0.5 (eps 0.12)"),
        (lambda x: 0.5 - x, 1.0, "pixels from -0.5"),
    ]
    for bad, eps, words in cases:
        monkeypatch.setattr(SquareAttack, "perturb", lambda self, x, y, bad=bad: bad(x))
        warnings = ours(model, x, y, eps=eps, version="custom", attacks=["square"]).warnings
        assert any("outside the threat model" in w and words in w for w in warnings)


def test_a_count_that_a_clean_pass_does_not_confirm_is_reported(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack claims every image; the images it returns fool nobody: the clean pass is what counts."""
    model, x, y = trained
    monkeypatch.setattr(
        pyautoattack.AutoAttack, "run_standard_evaluation", lambda self, x, y, **_: (x.clone(), (y + 1) % 10)
    )
    result = ours(model, x, y)
    assert result.robust_accuracy == result.clean_accuracy > 0.8
    assert any(f"counted 0 of 40 images as robust, a clean forward pass over its result {result.correct.sum()};" in w
               for w in result.warnings)  # fmt: skip


@pytest.mark.parametrize("place", [0, -1], ids=["in the first batch", "in a later one"])
def test_logits_that_are_no_numbers_are_not_correct(trained: Any, tmp_path: Path, place: int) -> None:
    """argmax calls a row of NaN class 0."""
    model, x, y = trained
    row = int((y == 0).nonzero()[place])
    assert (row < 16) == (place == 0)
    spoilt = Odd(model, lambda z: z)
    spoilt.register_forward_hook(
        lambda m, args, z: torch.where((args[0] == x[row]).flatten(1).all(1)[:, None], z / 0 * 0, z)
    )
    result, again = (
        ours(spoilt.eval(), x, y, version="custom", attacks=["square"], state_dir=tmp_path) for _ in range(2)
    )
    assert torch.equal(result.x_adv, again.x_adv)
    assert not result.correct[row]
    assert "NaN or infinite logits on 1 of 40 clean images, which count as errors" in result.warnings
    assert result.clean_accuracy == pytest.approx(
        ours(model, x, y, version="custom", attacks=["square"]).clean_accuracy - 1 / 40
    )


def test_a_network_that_changes_itself_is_reported(trained: Any) -> None:
    model, x, y = trained
    model = copy.deepcopy(model)
    model.register_forward_hook(lambda m, args, out: m[1].num_batches_tracked.add_(1) and None)
    warnings = ours(model, x, y, version="custom", attacks=["square"]).warnings
    assert any("state_dict changed" in warning for warning in warnings)


def test_the_bar_goes_to_stderr_and_can_be_silenced(
    trained: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow bar is cut off
    model, x, y = trained[0], trained[1][:10], trained[2][:10]
    options = {"version": "custom", "attacks": ["apgd-ce", "square", "apgd-dlr", "fab"]}
    result = ours(model, x, y, progress=True, **options)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert f"robust={result.robust_accuracy:.2%}" in shown.err
    assert "40/40" in shown.err  # 10 images, four attacks
    ours(model, x, y, progress=False, **options)
    silent = capfd.readouterr()
    assert (silent.out, silent.err) == ("", "")


# ------------------------------------------------------------------------------------------------------- the backend


def author_package(home: str) -> types.ModuleType:
    """The interface of the author's distribution, over the installed attack: positional, ``bs=``, prints what it says."""

    class Logger:
        def __init__(self, log_path: str | None) -> None:
            self.log_path = log_path

        def log(self, text: str) -> None:
            print(text)

    class Talking:
        """What pyautoattack's code says, said as the author's says it: all through ``log``."""

        def __init__(self, attack: Any) -> None:
            self.attack = attack

        def warning(self, text: str) -> None:
            self.attack.logger_.log(f"Warning: {text}")

        def debug(self, text: str) -> None:
            if self.attack.verbose_:
                self.attack.logger_.log(text)

        info = debug

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(
            self,
            model: nn.Module,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: Any = (),
            version: str = "standard",
            is_tf_model: bool = False,
            device: Any = "cuda",
            log_path: str | None = None,
        ) -> None:
            self.__dict__["logger_"], self.__dict__["verbose_"] = Logger(log_path), verbose
            super().__init__(
                model,
                norm=norm,
                eps=eps,
                seed=seed,
                version=version,
                device=device,
                attacks=list(attacks_to_run) or None,
            )
            self.apgd.logger = self.apgd_targeted.logger = Talking(self)

        @property
        def logger(self) -> Any:
            return Talking(self)

        @logger.setter
        def logger(self, value: Any) -> None:
            if not isinstance(value, logging.Logger):
                self.logger_ = value

        def run_standard_evaluation(  # type: ignore[override]
            self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False, state_path: Any = None
        ) -> Any:
            if self.verbose_:
                print("using", self.version)
            found = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return found if return_labels else found[0]

    module, inner = types.ModuleType("autoattack"), types.ModuleType("autoattack.autoattack")
    AutoAttack.__module__ = home
    inner.AutoAttack, inner.checks = AutoAttack, checks  # type: ignore[attr-defined]
    module.AutoAttack, module.autoattack = AutoAttack, inner  # type: ignore[attr-defined]
    return module


def test_the_authors_distribution_is_preferred_and_equal(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = trained[1][:16], trained[2][:16]
    model = Helped(Dead(trained[0])).eval()
    expected = ours(model, x, y)
    package = author_package("autoattack.autoattack")
    monkeypatch.setitem(sys.modules, "autoattack", package)
    monkeypatch.setitem(sys.modules, "autoattack.autoattack", package.autoattack)
    result = ours(model, x, y)
    assert (result.backend, result.backend_version) == ("autoattack", "unknown")
    assert torch.equal(result.x_adv, expected.x_adv)
    assert result.warnings == expected.warnings
    assert len(result.warnings) >= 2
    assert result.robust_accuracy_after == expected.robust_accuracy_after
    assert capsys.readouterr().out == ""  # the author's prints
    custom = {"version": "custom", "attacks": ["apgd-dlr"]}
    chosen = ours(model, x, y, **custom)
    monkeypatch.delitem(sys.modules, "autoattack")
    assert torch.equal(chosen.x_adv, ours(model, x, y, **custom).x_adv)


def test_a_stand_in_is_not_taken_for_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autoattack", author_package("somewhere.repair"))
    assert find_backend().name == "pyautoattack"
    monkeypatch.setitem(sys.modules, "autoattack", types.ModuleType("autoattack"))  # a folder of that name
    assert find_backend().name == "pyautoattack"


def test_neither_distribution(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = trained
    for name in ("autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="art-saliency\\[eval\\]") as caught:
        ours(model, x, y)
    assert isinstance(caught.value, (ImportError, ArtSaliencyError))


def test_a_git_commit_is_part_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = json.dumps({"url": "https://example.org", "vcs_info": {"vcs": "git", "commit_id": "a3922004" + "0" * 32}})
    found = types.SimpleNamespace(version="0.1", read_text=lambda name: origin if name == "direct_url.json" else None)
    monkeypatch.setattr("art_saliency.evaluation._autoattack_backend.metadata.distribution", lambda name: found)
    assert distribution_version("autoattack") == "0.1+git.a39220040000"
