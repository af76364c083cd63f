"""What every file of the package must keep to, read off its syntax tree: imports point down, names exist and explain themselves."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import art_saliency

PACKAGE = Path(art_saliency.__file__).parent
FILES = {
    ".".join(("art_saliency", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

LEVELS = (
    ("errors", "_checks", "_version", "files", "words"),
    (
        "_batch_sizes",
        "randomness",
        "modes",
        "threat",
        "gradients",
        "perturbation_saliency",
        "augmentation",
        "data",
        "image_folders",
        "streaming",
        "networks",
        "architectures",
        "residual_blocks",
    ),
    ("attacks",),
    ("methods", "evaluation"),
    ("training",),
    ("trainers", "robustbench"),
    ("cli",),
    ("__main__",),
)
"""Bottom up. A part imports parts of lower levels; parts of one level import each other only on the two lowest."""

LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}

MAY_SEE = {
    "training": {"methods": ("base", "baselines"), "evaluation": ("accuracy",)},
    "methods": {"methods": ("base", "baselines", "layers", "points", "surgery")},
}
"""Parts of which only these modules may be imported from there: the loop knows no method, and no method another one."""

NEVER_AT_MODULE_LEVEL = (
    "autoattack",
    "captum",
    "lightning_fabric",
    "matplotlib",
    "pyautoattack",
    "quantus",
    "robustbench",
    "sklearn",
    "timm",
    "torchvision",
)

every_file = pytest.mark.parametrize("name", FILES)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_nodes(tree, *, at_module_level):
    """Import statements; those for type checkers alone do not run. At module level: those that importing the file runs."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif is_type_checking(node):
            pending += node.orelse
        elif not (at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            pending += ast.iter_child_nodes(node)


def imported(name, *, at_module_level=False):
    """Dotted names that a file imports; ``from a import b`` is a.b where that is a module, else a."""
    found = set()
    for node in import_nodes(TREES[name], at_module_level=at_module_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if node.level:  # relative: from the package that holds the file
                package = name.split(".") if FILES[name].stem == "__init__" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            found |= {full if (full := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return found


def part(name):
    """The part of the package, as :data:`LEVELS` calls it, that a module belongs to; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def own(names):
    return {name for name in names if name.split(".")[0] == "art_saliency"}


def fault(importer, target):
    """What is wrong with one import, or nothing."""
    above, below = part(importer), part(target)
    if below == "":
        return "the package itself, whose names come from above"
    allowed = MAY_SEE.get(above, {}).get(below)
    if above == below:
        is_package_init = importer.count(".") == 1
        module = (target.split(".")[2:3] or [""])[0]
        if allowed is None or is_package_init or not module or module in allowed:
            return None
        if importer.split(".")[2].startswith(f"{module}_"):  # fsr_loss belongs to fsr
            return None
        return f"another of {above}, of which {', '.join(allowed)} are shared"
    if LEVEL[below] > LEVEL[above] or (LEVEL[below] == LEVEL[above] and LEVEL[above] > 1):
        return "a part that is not below it"
    if allowed is not None and (target.split(".")[2:3] or [""])[0] not in allowed:
        return f"a part of which it may know {', '.join(allowed)} alone"
    return None


# ---- the rules themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importer", "target", "wrong"),
    [
        ("art_saliency.threat", "art_saliency.attacks", True),
        ("art_saliency.attacks", "art_saliency.threat", False),
        ("art_saliency.methods.aalp", "art_saliency.evaluation.accuracy", True),
        ("art_saliency.methods.fsr_loss", "art_saliency.methods.fsr", False),
        ("art_saliency.methods.fsr_loss", "art_saliency.methods.aalp", True),
        ("art_saliency.methods.fsr", "art_saliency.methods.fsr_loss", True),
        ("art_saliency.evaluation.accuracy", "art_saliency.methods.base", True),
        ("art_saliency.methods.aalp", "art_saliency.methods.fsr", True),
        ("art_saliency.methods.aalp", "art_saliency.methods.baselines", False),
        ("art_saliency.methods", "art_saliency.methods.fsr", False),
        ("art_saliency.training.loop", "art_saliency.methods.fsr", True),
        ("art_saliency.training.loop", "art_saliency.methods", True),
        ("art_saliency.training.loop", "art_saliency.methods.base", False),
        ("art_saliency.training.loop", "art_saliency.evaluation.autoattack", True),
        ("art_saliency.training.loop", "art_saliency.training.engine", False),
        ("art_saliency.trainers.methods", "art_saliency.methods.fsr", False),
        ("art_saliency.trainers.base", "art_saliency.cli.train", True),
        ("art_saliency.trainers.base", "art_saliency.robustbench", True),
        ("art_saliency.errors", "art_saliency.modes", True),
        ("art_saliency.threat", "art_saliency", True),
    ],
)
def test_the_rule_tells_right_from_wrong(importer, target, wrong):
    assert (fault(importer, target) is not None) == wrong


def test_imports_are_found_in_functions_and_relative_ones_but_not_those_of_type_checkers(monkeypatch):
    source = """
import a.b
from typing import TYPE_CHECKING
from . import threat
from .threat import NORMS
from art_saliency import modes, accuracy
if TYPE_CHECKING:
    import hidden
else:
    import shown
try:
    import c
except ImportError:
    import d
class K:
    import e
    def f(self):
        from inside import g
"""
    monkeypatch.setitem(TREES, "art_saliency.attacks", ast.parse(source))
    threat = "art_saliency.threat"
    at_once = {"a.b", "typing", threat, "art_saliency.modes", "art_saliency", "shown", "c", "d", "e"}
    assert imported("art_saliency.attacks", at_module_level=True) == at_once
    assert imported("art_saliency.attacks") == at_once | {"inside"}


# ---- imports -------------------------------------------------------------------------------------------------------


def test_every_file_has_a_level():
    assert {part(name) for name in FILES} - {""} <= LEVEL.keys(), "put the new part into LEVELS and into the design"


@every_file
def test_imports_point_down_also_inside_functions(name):
    if name == "art_saliency":
        assert own(imported(name)) == {"art_saliency._version"}
        return
    wrong = {target: fault(name, target) for target in own(imported(name)) if fault(name, target)}
    assert not wrong


def test_no_two_modules_import_each_other_however_far_round():
    """Depth-first search for a circle among the imports that run when a module is imported."""
    graph = {name: own(imported(name, at_module_level=True)) & FILES.keys() for name in FILES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


@every_file
def test_art_is_imported_by_trainers_and_robustbench_alone(name):
    imports_art = any(target.split(".")[0] == "art" for target in imported(name))
    assert not imports_art or part(name) in ("trainers", "robustbench")


@every_file
def test_optional_and_slow_packages_are_imported_where_they_are_needed(name):
    assert not {target.split(".")[0] for target in imported(name, at_module_level=True)} & set(NEVER_AT_MODULE_LEVEL)


# ---- public names --------------------------------------------------------------------------------------------------


def public_names(name):
    """``__all__`` as it is written, or None."""
    for node in TREES[name].body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


def assigned(tree):
    """Names that a module gives a value to, constants and aliases of types: whether a string below explains them."""
    found = {}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        explained = (
            isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        )
        found |= {target.id: explained for target in targets if isinstance(target, ast.Name)}
    return found


@every_file
def test_every_public_name_exists_once_and_explains_itself(name):
    module, names = importlib.import_module(name), public_names(name)
    assert ast.get_docstring(TREES[name]) or not TREES[name].body, "a file says what it is for"
    defines = any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in TREES[name].body)
    private = name.split(".")[-1].startswith("_") or part(name) == "__main__" or name.startswith("art_saliency.cli.")
    assert names is not None or private or not defines, "__all__ says what is for others"
    assert len(names or ()) == len(set(names or ()))
    for public in names or ():
        value = getattr(module, public)
        if public in assigned(TREES[name]):
            assert assigned(TREES[name])[public], f"{public}: a string below it says what it holds"
        elif isinstance(value, types.GenericAlias):
            continue  # an alias that another module explains, and that Python 3.10 takes for a class
        elif inspect.isclass(value) or inspect.isroutine(value):
            assert (value.__doc__ or "").strip(), public
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    assert inspect.getdoc(getattr(value, attribute)), f"{public}.{attribute}"


def test_the_packages_names_and_their_homes_are_the_same_and_resolve():
    names = art_saliency.__all__
    assert sorted(names) == sorted({*art_saliency._HOME, "__version__"})
    assert len(set(names)) == len(names)
    for name, home in art_saliency._HOME.items():
        module = importlib.import_module(f"art_saliency.{home}")
        assert getattr(art_saliency, name) is getattr(module, name)
        assert name in module.__all__
    assert set(names) <= set(dir(art_saliency))
    with pytest.raises(AttributeError, match="module 'art_saliency' has no attribute 'nothing'"):
        art_saliency.nothing  # noqa: B018


def test_type_checkers_are_told_the_same_names_as_python():
    (block,) = (node for node in TREES["art_saliency"].body if is_type_checking(node))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == {name: f"art_saliency.{home}" for name, home in art_saliency._HOME.items()}


# ---- text ----------------------------------------------------------------------------------------------------------


@every_file
def test_files_are_utf8_with_unix_lines_and_no_tabs(name):
    content = FILES[name].read_bytes()
    content.decode("utf-8")
    assert not content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content
    assert b"\t" not in content
    assert content == b"" or content.endswith(b"\n")


def calls(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@every_file
def test_only_the_command_line_prints(name):
    printed = [
        node.lineno for node in calls(TREES[name]) if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printed or part(name) == "cli"


def is_text_access_in_the_locales_encoding(node):
    """``open(path)``, ``path.open("w")``, ``path.read_text()``, ``path.write_text(text)`` without an encoding."""
    if any(keyword.arg == "encoding" for keyword in node.keywords):
        return False
    method = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if method in ("read_text", "write_text"):  # positional: the encoding comes after the text
        return len(node.args) < (2 if method == "write_text" else 1)
    modes = [word.value for word in (*node.args, *(k.value for k in node.keywords)) if isinstance(word, ast.Constant)]
    modes = [mode for mode in modes if isinstance(mode, str) and set(mode) <= set("rwxabt+") and mode]
    if (
        method == "open"
    ):  # other objects have an `open` too (images, archives): a mode, or nothing at all, gives it away
        return bool(modes or not node.args) and not any("b" in mode for mode in modes)
    return isinstance(node.func, ast.Name) and node.func.id == "open" and not any("b" in mode for mode in modes)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, 'rb')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('a')", True),
        ("p.open('xb')", False),
        ("image.open(p)", False),
        ("p.read_text()", True),
        ("p.read_text(encoding='utf-8')", False),
        ("p.write_text(t)", True),
        ("p.write_text(t, 'utf-8')", False),
        ("package.read_text('file.json')", False),
        ("p.write_bytes(b)", False),
    ],
)
def test_the_encoding_rule_tells_right_from_wrong(code, wrong):
    assert is_text_access_in_the_locales_encoding(ast.parse(code).body[0].value) == wrong


@every_file
def test_text_is_read_and_written_in_a_named_encoding(name):
    """Without one, a file written on Linux is misread on Windows."""
    wrong = [node for node in calls(TREES[name]) if is_text_access_in_the_locales_encoding(node)]
    assert not wrong, [f"line {node.lineno}: {ast.unparse(node)}" for node in wrong]


# ---- fresh interpreters --------------------------------------------------------------------------------------------


def fresh(code):
    """Standard output of a new interpreter that can import this package and nothing of this process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_and_its_command_line_costs_nothing():
    """No torch, no ART: ``art-saliency --help`` answers at once."""
    loaded = fresh("import sys, art_saliency, art_saliency.cli; print(*{name.split('.')[0] for name in sys.modules})")
    assert "art_saliency" in loaded
    assert not set(loaded) & {"torch", "numpy", "art", "scipy", *NEVER_AT_MODULE_LEVEL}


TIMED = f"""
import os, sys, time
import torch
from art.estimators.classification import PyTorchClassifier  # `import art` runs all of this already, scikit-learn included
before = {{name.split('.')[0] for name in sys.modules}}
for _ in range(8):  # a child each, forked after torch and ART, so that every import of ours is a first one
    reader, writer = os.pipe()
    if os.fork() == 0:
        start = time.process_time()
        from art_saliency import AdvGSCTTrainer
        seconds = time.process_time() - start
        new = {{name.split('.')[0] for name in sys.modules}} - before
        os.write(writer, ' '.join([str(seconds), *sorted(new & set({NEVER_AT_MODULE_LEVEL!r}))]).encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 4096).decode())
    os.wait()
    time.sleep(0.1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_trainer_is_imported_in_little_more_time_than_torch_and_art():
    """
    The processor's time, and the least of several first imports, so that a busy machine does not decide; and none of the optional
    packages comes along.

    ART itself imports scikit-learn and SciPy, and takes about as long as torch.
    """
    words = fresh(TIMED)
    seconds = [float(word) for word in words if word[0].isdigit()]
    assert len(seconds) == len(words) == 8, words  # other words would be packages that were imported
    assert min(seconds) < 0.3


RACE = """
import os
real, asked = os.path.exists, []

def exists(path):
    if not str(path).endswith(os.path.join(".art", "config.json")):
        return real(path)
    asked.append(path)
    if len(asked) == 2:  # between ART's two looks another process writes the file
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write("{}")
    return real(path)

os.path.exists = exists
try:
    import MODULE
    print("imported")
except NameError:
    print("NameError")
"""


@pytest.mark.parametrize(("module", "answer"), [("art.config", ["NameError"]), ("art_saliency.trainers", ["imported"])])
def test_the_first_import_of_art_on_a_machine_may_happen_in_two_processes_at_once(
    tmp_path, monkeypatch, module, answer
):
    """ART's own import fails when another process writes its configuration in the same moment; ours does not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert fresh(RACE.replace("MODULE", module)) == answer
