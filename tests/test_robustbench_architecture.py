"""What is published is the classifier's own function, bit for bit: cleaned, baked, written down as code that needs torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import requires

import numpy as np
import pytest
import torch
from art.defences.postprocessor import HighConfidence, ReverseSigmoid
from art.defences.preprocessor import JpegCompression, SpatialSmoothing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_saliency import autoattack, build_network, insert_fsr
from art_saliency.errors import ArtSaliencyError, InputError, UnsupportedModelError
from art_saliency.files import sha256_of_tensors
from art_saliency.methods.adapter import insert_adapter
from art_saliency.networks import own_logits
from art_saliency.robustbench.architecture import architectures_of
from art_saliency.robustbench.deployable import clean_key, deployable
from art_saliency.robustbench.rules import probe_images
from art_saliency.robustbench.user_source import UserSource, import_problems
from art_saliency.robustbench.writing import identifier

SHAPE = (3, 32, 32)
X = probe_images(SHAPE)


def trained(model):
    """Statistics and affine parameters as after training: none of them at its default."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def make(name="resnet18", **options):
    torch.manual_seed(0)
    return trained(build_network(name, num_classes=10, input_shape=SHAPE, **{"width": 4, **options}))


def with_fsr(model, *targets):
    for target in targets:
        insert_fsr(model, target, 10, torch.rand(2, *SHAPE), hidden=4, tau=0.2)
    return trained(model)


def classifier(model, **options):
    settings = {"clip_values": (0.0, 1.0), "device_type": "cpu", **options}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, 10, **settings)


def rebuilt(code, name="Doe2026Saliency"):
    """Run the code by itself. :return: Its network."""
    names = {"__name__": "architecture"}
    exec(compile(code, "architecture.py", "exec"), names)
    return names[identifier(name)]()


def same_logits(found, model, x=X):
    network = rebuilt(architectures_of(found.network, "Doe2026Saliency")[-1].code)
    network.load_state_dict(found.weights, strict=True)
    expected = own_logits(model, x)
    with torch.no_grad():
        return torch.equal(network.eval()(x), expected) and torch.equal(found.network(x), expected)


MODELS = {
    "resnet18": partial(make),
    "resnet18 in full width": partial(make, width=64),
    "resnet18, SiLU, normalised": partial(make, activation="silu", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3)),
    "preactresnet18": partial(make, "preactresnet18", activation="leaky-relu"),
    "wrn-28": partial(make, "wrn-28-10", width=1, mean=(0.4, 0.5, 0.6)),
    "wrn-34": partial(make, "wrn-34-10", width=1, activation="softplus"),
    "small-cnn": partial(make, "small-cnn", activation="elu"),
    "mnist-cnn": partial(make, "mnist-cnn", activation=lambda: nn.Softplus(beta=10)),
}


@pytest.mark.parametrize("name", MODELS)
def test_code_of_this_packages_networks_gives_the_same_logits_bit_for_bit(name):
    model = MODELS[name]()
    assert same_logits(deployable(model), model)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("resnet18", ["layer4"]),
        ("resnet18, SiLU, normalised", ["layer2.1", "layer4.0.conv2", "bn1"]),
        ("wrn-28", ["block2", "relu"]),
        ("mnist-cnn", ["layer1", "layer3.0"]),
    ],
)
def test_fsr_is_kept_and_its_auxiliary_head_is_not(name, targets):
    model = with_fsr(MODELS[name](), *targets)
    before = sha256_of_tensors(model.state_dict())
    found = deployable(model)
    assert same_logits(found, model)
    assert {f"{target}.fsr.separation.0.weight" for target in targets} <= set(found.weights)
    assert not any("auxiliary" in key for key in found.weights)
    assert sum("auxiliary" in key for key in model.state_dict()) == 2 * len(targets)  # the user's own keeps it
    assert sha256_of_tensors(model.state_dict()) == before


def test_the_code_needs_torch_alone_also_in_a_process_that_has_nothing_else(tmp_path):
    model = with_fsr(make(), "layer3")
    found = deployable(classifier(model, clip_values=(0, 255)))
    code = architectures_of(found.network, "Doe2026Saliency")[-1].code
    assert import_problems(code) == []
    roots = {
        (node.module or "").split(".")[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)
    }
    assert roots == {"__future__", "collections", "typing", "torch"}
    (tmp_path / "architecture.py").write_text(code)
    torch.save(found.weights, tmp_path / "weights.pt")
    torch.save({"x": X}, tmp_path / "x.pt")
    lines = """
import sys, torch
class Nothing:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("art", "art_saliency", "robustbench"): raise ImportError(name)
sys.meta_path.insert(0, Nothing())
from architecture import doe2026saliency
model = doe2026saliency()
model.load_state_dict(torch.load("weights.pt", weights_only=True), strict=True)
with torch.no_grad(): torch.save({"logits": model.eval()(torch.load("x.pt")["x"])}, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    expected = own_logits(classifier(model, clip_values=(0, 255)), X)
    assert torch.allclose(
        torch.load(tmp_path / "logits.pt")["logits"], expected, atol=1e-6 * float(expected.abs().max())
    )


# ---- what an ART classifier does around its network ------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocessing",
    [((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), (0.5, 0.25), (np.full(SHAPE, 0.3), np.linspace(0.1, 1, 3072).reshape(SHAPE))],
    ids=["by channel", "one number", "by pixel"],
)
@pytest.mark.parametrize("own", [False, True], ids=["plain network", "normalised network"])
def test_arts_mean_and_std_are_baked_in_as_buffers(preprocessing, own):
    model = make(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)) if own else make()
    wrapped = classifier(model, preprocessing=preprocessing)
    found = deployable(wrapped)
    assert found.normalised == (("input_mu", "input_sigma") if own else ("mu", "sigma"))
    assert set(found.normalised) <= set(found.weights)
    assert same_logits(found, wrapped)
    assert torch.equal(torch.from_numpy(wrapped.predict(X.numpy())), own_logits(wrapped, X))
    plain = own_logits(make(), X)  # what a network without it would say
    assert not torch.allclose(own_logits(wrapped, X), plain, atol=1e-2)


@pytest.mark.parametrize("clip_values", [(0, 255), (-1, 1), (-0.5, 3.0)])
@pytest.mark.parametrize("preprocessing", [None, ((20.0, 0.5, 0.1), (3.0, 2.0, 5.0))])
def test_the_scale_of_the_pixels_is_baked_in(clip_values, preprocessing):
    wrapped = classifier(make(), clip_values=clip_values, preprocessing=preprocessing or (0.0, 1.0))
    found = deployable(wrapped)
    low, high = clip_values
    expected = torch.from_numpy(wrapped.predict(X.numpy() * (high - low) + low))
    with torch.no_grad():
        assert torch.allclose(found.network(X), expected, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_the_identity_adds_nothing():
    assert deployable(classifier(make())).normalised == ()
    assert "mu" not in deployable(make()).weights


def test_other_defences_are_refused_by_name_all_of_them_at_once():
    wrapped = classifier(
        make(),
        preprocessing_defences=[SpatialSmoothing(channels_first=True), JpegCompression((0, 1), channels_first=True)],
        postprocessing_defences=[ReverseSigmoid(), HighConfidence()],
    )
    with pytest.raises(UnsupportedModelError) as caught:
        deployable(wrapped)
    for name in ("SpatialSmoothing", "JpegCompression", "ReverseSigmoid", "HighConfidence"):
        assert name in str(caught.value)


def test_a_defence_of_training_alone_is_no_part_of_the_network():
    wrapped = classifier(
        make(), preprocessing_defences=SpatialSmoothing(channels_first=True, apply_fit=True, apply_predict=False)
    )
    assert same_logits(deployable(wrapped), wrapped)


def test_clip_values_are_needed():
    with pytest.raises(InputError, match="clip_values"):
        deployable(classifier(make(), clip_values=None))


# ---- wrappers --------------------------------------------------------------------------------------------------------


def test_what_torch_compile_and_data_parallel_put_around_a_network_is_taken_off():
    model = make()
    expected = own_logits(model, X)
    keys, sha = list(model.state_dict()), sha256_of_tensors(model.state_dict())
    compiled = torch.compile(model)
    assert "_orig_mod.conv1.weight" in compiled.state_dict()
    inner = make()
    inner.layer3 = torch.compile(inner.layer3)
    assert "layer3._orig_mod.0.conv1.weight" in inner.state_dict()
    for wrapped in (compiled, classifier(compiled), nn.DataParallel(model), inner, nn.DataParallel(compiled)):
        found = deployable(wrapped)
        assert list(found.weights) == keys
        assert found.sha256 == sha
        assert same_logits(found, model)
        with torch.no_grad():
            assert torch.equal(found.network(X), expected)
        network = wrapped.model if isinstance(wrapped, PyTorchClassifier) else wrapped
        assert sha256_of_tensors(network.state_dict()) in found.also_known_as  # an evaluation of the wrapped one counts
        assert sha in found.also_known_as
    assert [clean_key(key) for key in compiled.state_dict()] == keys
    assert "_orig_mod.conv1.weight" in compiled.state_dict()  # the user's own is as it was


def test_an_evaluation_before_heads_are_dropped_counts_one_before_baking_does_not():
    model = with_fsr(make(), "layer4")
    assert sha256_of_tensors(model.state_dict()) in deployable(model).also_known_as
    wrapped = classifier(model, clip_values=(0, 255))
    assert sha256_of_tensors(model.state_dict()) not in deployable(wrapped).also_known_as
    copy = deployable(wrapped)
    result = autoattack(
        copy.network, X[:2], torch.tensor([0, 1]), eps=0.1, version="custom", attacks=["apgd-ce"], progress=False
    )
    assert result.weights_sha256 in copy.also_known_as


def test_modes_gradients_and_flags_of_the_users_network_stay():
    model = make().train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    wrapped = classifier(model)
    modes = [module.training for module in model.modules()]
    own_logits(wrapped, X)
    deployable(wrapped)
    assert [module.training for module in model.modules()] == modes
    assert not model.conv1.weight.requires_grad
    assert model.linear.weight.requires_grad


# ---- RobustBench's own classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width": 64}, "lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)"),
        ({"name": "preactresnet18", "width": 64}, "lambda: PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes=10)"),
        (
            {"name": "wrn-34-10", "width": 2},
            "lambda: WideResNet(depth=34, num_classes=10, widen_factor=2, sub_block1=False)",
        ),
        ({"width": 64, "mean": (0.4, 0.5, 0.6)}, "Doe2026SaliencyNet"),
        ({"width": 32}, None),
        ({"width": 64, "activation": "silu"}, None),
        ({"name": "small-cnn"}, None),
    ],
)
def test_robustbenchs_class_is_thought_of_where_it_may_fit_and_only_there(options, expected):
    found = architectures_of(deployable(make(**options)).network, "Doe2026Saliency")
    assert [one.kind for one in found] == (["robustbench", "own"] if expected else ["own"])
    if expected:
        assert found[0].definition[1] == expected
        assert found[0].code is None


def test_with_fsr_it_is_never_robustbenchs():
    model = with_fsr(make(width=64), "layer4")
    (found,) = architectures_of(deployable(model).network, "Doe2026Saliency")
    assert (found.kind, found.label) == ("own", "ResNet-18 + FSR")


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"width": 64}, "ResNet-18"),
        ({"name": "preactresnet18", "width": 8, "activation": "silu"}, "PreActResNet-18 (width 8, SiLU)"),
        ({"name": "wrn-28-10", "width": 2}, "WideResNet-28-2"),
        ({"name": "wrn-34-10", "width": 1, "activation": "gelu"}, "WideResNet-34-1 (GELU)"),
    ],
)
def test_labels_are_the_leaderboards(options, label):
    assert architectures_of(deployable(make(**options)).network, "Doe2026Saliency")[-1].label == label


# ---- the user's code ---------------------------------------------------------------------------------------------------

USERS = """
import torch
import torch.nn as nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.Tanh())
        self.head = nn.Linear(6, classes)
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

def make():
    return Net()
"""


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(USERS)
    names = {"__name__": "network"}
    exec(USERS, names)
    torch.manual_seed(0)
    return UserSource(path, "make"), names["make"]()


@pytest.mark.parametrize("fsr", [False, True])
@pytest.mark.parametrize("baked", [False, True])
def test_an_arbitrary_network_goes_with_its_source(users, fsr, baked):
    source, model = users
    if fsr:
        with_fsr(model, "body")
    wrapped = classifier(model, preprocessing=(0.5, 0.25)) if baked else model
    found = deployable(wrapped)
    (one,) = architectures_of(found.network, "Doe2026Saliency", source=source, label="mine")
    assert (one.kind, one.label) == ("user", "mine")
    assert one.code.startswith(USERS.rstrip("\n"))
    network = rebuilt(one.code)
    network.load_state_dict(found.weights, strict=True)
    with torch.no_grad():
        assert torch.equal(network.eval()(X), own_logits(wrapped, X))


OTHERS = {
    "tokens with a class token": """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6), nn.Linear(6, 10)
        self.cls = nn.Parameter(torch.ones(1, 1, 6))
    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(torch.cat([self.cls.expand(len(x), 1, 6), tokens], 1)).tanh().mean(1))
""",
    "a standardisation of its own": """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 10)
        self.register_buffer("mu", torch.tensor(0.3))
        self.register_buffer("sigma", torch.tensor(0.2))
    def forward(self, x):
        return self.head(self.mix((x - self.mu) / self.sigma).tanh().mean((2, 3)))
""",
}


def written_logits(model, source):
    """What the one architecture that is written for a network answers, with the network's weights in it."""
    found = deployable(model)
    (one,) = architectures_of(found.network, "Doe2026Saliency", source=source)
    network = rebuilt(one.code)
    network.load_state_dict(found.weights, strict=True)
    with torch.no_grad():
        return network.eval()(X)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("preprocessing", [None, (0.5, 0.25)])
def test_networks_with_tokens_or_buffers_called_alike_are_written_down_too(tmp_path, name, preprocessing):
    (tmp_path / "net.py").write_text(OTHERS[name])
    names = {}
    exec(OTHERS[name], names)
    torch.manual_seed(0)
    model = with_fsr(names["Net"](), "mix")
    wrapped = classifier(model, preprocessing=preprocessing or (0.0, 1.0))
    assert torch.equal(written_logits(wrapped, UserSource(tmp_path / "net.py", "Net")), own_logits(wrapped, X))


def test_a_network_that_build_network_normalised_needs_no_code_for_it(tmp_path):
    pytest.importorskip("timm")
    source = "import timm\n\ndef make():\n    return timm.create_model('resnet10t', num_classes=10)\n"
    (tmp_path / "net.py").write_text(source)
    torch.manual_seed(0)
    model = build_network(
        "timm:resnet10t", num_classes=10, input_shape=SHAPE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    assert torch.equal(written_logits(model, UserSource(tmp_path / "net.py", "make")), own_logits(model, X))


def test_without_a_source_it_is_refused_with_the_cure(users):
    with pytest.raises(UnsupportedModelError, match=r"network.Net.*source='network.py:factory'"):
        architectures_of(users[1], "Doe2026Saliency")


WITH_OPTIONS = {
    "def make(num_classes, in_channels=1): return net(num_classes, in_channels)": "make(num_classes=10, in_channels=3)",
    "def make(*, num_classes): return net(num_classes, 3)": "make(num_classes=10)",
    "def make(**options): return net(options['num_classes'], 3)": "make(num_classes=10, in_channels=3)",
    "def make(width=8): return net(10, 3)": "make()",
    "class make(nn.Sequential):\n    def __init__(self, num_classes): super().__init__(net(num_classes, 3))": "make(num_classes=10)",
}
NET = """
from torch import nn

def net(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 6, 8, 8), nn.Flatten(), nn.Linear(96, num_classes))

"""


@pytest.mark.parametrize("text", WITH_OPTIONS)
def test_a_factory_is_called_as_build_network_calls_it(tmp_path, monkeypatch, text):
    (tmp_path / "options_of_users.py").write_text(NET + text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "options_of_users", raising=False)
    torch.manual_seed(0)
    model = build_network("options_of_users:make", num_classes=10, input_shape=SHAPE)
    source = UserSource(tmp_path / "options_of_users.py", "make", {"num_classes": 10, "in_channels": 3})
    assert torch.equal(written_logits(model, source), own_logits(model, X))
    (one,) = architectures_of(deployable(model).network, "Doe2026Saliency", source=source)
    assert f"model = {WITH_OPTIONS[text]}\n" in one.code


def test_what_robustbench_depends_on_may_be_imported():
    """As the installed robustbench declares it."""
    asked = {re.match(r"[\w-]+", line)[0].lower() for line in requires("robustbench")}
    modules = {{"pyyaml": "yaml"}.get(name, name) for name in asked}
    assert {"torchdiffeq", "geotorch", "pandas", "timm"} <= modules
    assert import_problems("".join(f"import {name}\n" for name in modules)) == []


@pytest.mark.parametrize("caught", ["ImportError", "ModuleNotFoundError", "(ValueError, ImportError)", "Exception", ""])
def test_an_import_that_a_file_does_without_is_its_own_affair(caught):
    text = f"try:\n    import apex\n    from xformers.ops import attention\nexcept {caught}:\n    apex = None\n"
    assert import_problems(text) == []
    assert import_problems(f"{text}import apex\n") == ["imports 'apex', which RobustBench does not depend on"]
    elsewhere = f"try:\n    apex = 1\nexcept {caught}:\n    import apex\n"
    assert import_problems(elsewhere) == ["imports 'apex', which RobustBench does not depend on"]
    assert len(import_problems("try:\n    import apex\nexcept ValueError:\n    pass\n")) == 1


@pytest.mark.parametrize(
    ("text", "factory", "says"),
    [
        (USERS, "maek", "defines no function or class 'maek'; did you mean 'make'"),
        (USERS + "import einops\nfrom art_saliency import build_network\n", "make", "imports 'art_saliency'"),
        (USERS + "from .blocks import Block\n", "make", "imports from a file beside it"),
        (USERS + "def normalise_input(): pass\n", "make", "defines 'normalise_input', a name that the bundle adds"),
        ("def make(:\n", "make", "line 1"),
    ],
)
def test_a_source_that_does_not_stand_by_itself_is_refused(users, text, factory, says):
    source, model = users
    source.path.write_text(text)
    network = deployable(classifier(model, preprocessing=(0.5, 0.25))).network
    with pytest.raises(ArtSaliencyError) as caught:
        architectures_of(network, "Doe2026Saliency", source=UserSource(source.path, factory))
    assert says in str(caught.value)


def test_a_source_in_another_encoding_is_refused(users):
    source, model = users
    source.path.write_bytes("# caf\xe9\n".encode("latin-1") + USERS.encode())
    with pytest.raises(InputError, match=r"network.py, which is not UTF-8, expected Python code in UTF-8; save it"):
        architectures_of(deployable(model).network, "Doe2026Saliency", source=source)


def test_a_source_that_is_not_there_and_parts_without_code_are_refused(users, tmp_path):
    with pytest.raises(InputError, match="which is no file"):
        architectures_of(users[1], "Doe2026Saliency", source=UserSource(tmp_path / "none.py", "make"))
    adapted = insert_adapter(make(), "layer4", torch.rand(2, *SHAPE), fsr_hidden=4)
    with pytest.raises(UnsupportedModelError, match="AdapterLayer"):
        architectures_of(deployable(adapted).network, "Doe2026Saliency")
    mixed = make()
    mixed.relu = nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="one activation"):
        architectures_of(deployable(mixed).network, "Doe2026Saliency")


def test_what_is_no_network_is_refused():
    with pytest.raises(InputError, match="got a str, expected an ART PyTorchClassifier"):
        deployable("resnet18")
