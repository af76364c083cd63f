"""The code of an arbitrary network: a file that the user names. It is read here, and run by the proof alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from torch import nn

from art_saliency import _checks
from art_saliency.robustbench.writing import Architecture, factory, imported, sources, surgery

__all__ = ["UserSource", "import_problems", "parsed", "user_architecture"]

_ALLOWED_IMPORTS = {"gdown", "geotorch", "jinja2", "numpy", "pandas", "pyautoattack", "requests", "robustbench", "timm"}
_ALLOWED_IMPORTS |= {"torch", "torchdiffeq", "torchvision", "tqdm", "yaml"}
"""What RobustBench itself depends on, beside Python's own library."""

_CATCH_IMPORTS = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


@dataclass(frozen=True)
class UserSource:
    """
    Where the code of an arbitrary network is.

    :ivar path: A Python file that needs no other file of the user's. :ivar factory: A function or class in it that makes the
        network as it was before FSR layers or a standardisation were added.
    :ivar options: With which of these keywords it is called: those that it has parameters for, as
        :func:`art_saliency.build_network` does it.
    """

    path: Path
    factory: str
    options: Mapping[str, int] = field(default_factory=dict)


def user_architecture(
    network: nn.Module,
    function: str,
    source: UserSource,
    label: str | None,
    imagenet: bool,
    names: list[tuple[str, str]],
) -> Architecture:
    """
    Write down an arbitrary network: the user's file, word for word, and what was added to the network behind it.

    :param function: The factory that the bundle is to have. :param label: As the leaderboard shows it.
    :param names: Of the buffers by which it was made to standardise its input.
    :raises InputError: When the file does not stand by itself; everything that it lacks is listed.
    """
    if not source.path.is_file():
        raise _checks.refuse("source", f"{source.path}, which is no file", "a Python file: network.py:factory")
    try:
        text = source.path.read_text(encoding="utf-8")
        tree = parsed(text)
    except UnicodeDecodeError as error:
        remedy = "save it in UTF-8, as RobustBench's files are"
        raise _checks.refuse("source", f"{source.path}, which is not UTF-8", "Python code in UTF-8", remedy) from error
    except SyntaxError as error:
        raise _checks.refuse("source", f"{source.path}, line {error.lineno}: {error.msg}", "Python code") from error
    problems = import_problems(text)
    parts, lines = surgery(network, names, imagenet)
    defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    taken = _accepted(defined.get(source.factory), source.options)
    call = f"{source.factory}({', '.join(f'{name}={value}' for name, value in taken.items())})"
    wrapped = bool(function != source.factory or lines or taken)
    if source.factory not in defined:
        problems.append(f"defines no function or class {source.factory!r}{_checks.suggestion(source.factory, defined)}")
    ours = {part.__name__ for part in parts} | ({function} if wrapped else set())
    problems += [f"defines {name!r}, a name that the bundle adds; rename yours" for name in sorted(ours & set(defined))]
    if problems:
        raise _checks.refuse("source", f"{source.path}, which {'; '.join(problems)}", "a file that stands by itself")
    code = text.rstrip("\n") + "\n"
    if parts:
        code += "\n\nfrom typing import Any  # noqa: E402\n\nimport torch  # noqa: E402\nfrom torch import Tensor, nn  # noqa: E402\n"
        code += f"\n\n{sources(parts)}"
    if wrapped:
        code += f"\n\n{factory(function, call, lines)}"
    return Architecture("user", label, code, imported(function))


def _accepted(made_by: ast.stmt | None, options: Mapping[str, int]) -> dict[str, int]:
    """:param made_by: The definition of a function or class. :return: The options that it has parameters for."""
    if isinstance(made_by, ast.ClassDef):
        own = [node for node in made_by.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        made_by = own[-1] if own else None
    if not isinstance(made_by, ast.FunctionDef):
        return {}
    names = {argument.arg for argument in (*made_by.args.args, *made_by.args.kwonlyargs)}
    return {name: value for name, value in options.items() if name in names or made_by.args.kwarg is not None}


def parsed(text: str) -> ast.Module:
    """:return: The syntax of Python code. :raises SyntaxError: When it is none, or nested deeper than Python reads it."""
    try:
        return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error) or "nested too deeply") from error


def import_problems(text: str) -> list[str]:
    """
    What a file imports that a machine with RobustBench alone does not have. The file is read, not run; what it does without
    where it is missing, ``try: import apex`` and ``except ImportError``, is its own affair.

    :param text: Python code; what is no Python code has no imports.
    """
    try:
        nodes = list(ast.walk(parsed(text)))
    except SyntaxError:
        return ["is not Python code"]
    guarded = {id(inner) for node in nodes if _catches_imports(node) for part in node.body for inner in ast.walk(part)}
    nodes = [node for node in nodes if id(node) not in guarded]
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    roots |= {(node.module or "").split(".")[0] for node in froms if not node.level}
    problems = ["imports from a file beside it" for node in froms if node.level][:1]
    foreign = sorted(roots - _ALLOWED_IMPORTS - set(sys.stdlib_module_names) - {""})
    return problems + [f"imports {root!r}, which RobustBench does not depend on" for root in foreign]


def _catches_imports(node: ast.AST) -> TypeGuard[ast.Try]:
    """:return: Whether it is a ``try`` that goes on when an import in it fails."""
    if not isinstance(node, ast.Try):
        return False
    kinds = [handler.type for handler in node.handlers]
    names = [name for kind in kinds for name in (kind.elts if isinstance(kind, ast.Tuple) else [kind])]
    return any(name is None or (isinstance(name, ast.Name) and name.id in _CATCH_IMPORTS) for name in names)
