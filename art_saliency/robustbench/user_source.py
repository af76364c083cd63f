"""The code of an arbitrary network: a file that the user names. It is read here, and run by the proof alone."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from art_saliency import _checks
from art_saliency.robustbench.writing import Architecture, factory, imported, sources, surgery

__all__ = ["UserSource", "import_problems", "parsed", "user_architecture"]

_ALLOWED_IMPORTS = {"torch", "torchvision", "timm", "numpy", "robustbench"}
"""What RobustBench itself depends on, beside Python's own library."""


@dataclass(frozen=True)
class UserSource:
    """
    Where the code of an arbitrary network is.

    :ivar path: A Python file that needs no other file of the user's. :ivar factory: A function or class in it, called without
        arguments, that makes the network as it was before FSR layers or a standardisation were added.
    """

    path: Path
    factory: str


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
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if source.factory not in defined:
        problems.append(f"defines no function or class {source.factory!r}{_checks.suggestion(source.factory, defined)}")
    ours = {part.__name__ for part in parts} | ({function} if function != source.factory or lines else set())
    problems += [f"defines {name!r}, a name that the bundle adds; rename yours" for name in sorted(defined & ours)]
    if problems:
        raise _checks.refuse("source", f"{source.path}, which {'; '.join(problems)}", "a file that stands by itself")
    code = text.rstrip("\n") + "\n"
    if parts:
        code += "\n\nfrom typing import Any  # noqa: E402\n\nimport torch  # noqa: E402\nfrom torch import Tensor, nn  # noqa: E402\n"
        code += f"\n\n{sources(parts)}"
    if function != source.factory or lines:
        code += f"\n\n{factory(function, f'{source.factory}()', lines)}"
    return Architecture("user", label, code, imported(function))


def parsed(text: str) -> ast.Module:
    """:return: The syntax of Python code. :raises SyntaxError: When it is none, or nested deeper than Python reads it."""
    try:
        return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error) or "nested too deeply") from error


def import_problems(text: str) -> list[str]:
    """
    What a file imports that a machine with RobustBench alone does not have. The file is read, not run.

    :param text: Python code; what is no Python code has no imports.
    """
    try:
        nodes = list(ast.walk(parsed(text)))
    except SyntaxError:
        return ["is not Python code"]
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    roots |= {(node.module or "").split(".")[0] for node in froms if not node.level}
    problems = ["imports from a file beside it" for node in froms if node.level][:1]
    foreign = sorted(roots - _ALLOWED_IMPORTS - set(sys.stdlib_module_names) - {""})
    return problems + [f"imports {root!r}, which RobustBench does not depend on" for root in foreign]
