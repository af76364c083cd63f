"""The README's code runs, and its lines are the ones that the continuous integration calls."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_one_after_the_other_and_print_what_they_say(capsys, monkeypatch):
    from art_saliency.evaluation.audit import AuditBudget

    quick = AuditBudget(max_iter=2, restarts=1, long=1, noise_draws=2, square_queries=5)
    monkeypatch.setattr("art_saliency.evaluation.audit.AuditBudget", lambda: quick)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    code = code.replace("nb_epochs=10", "nb_epochs=2, verbose=False").replace("[:100]", "[:16]")
    code = re.sub(
        r"(eps=0\.2(?:, autoattack_result=found)?)\)(\n(?:print|low)|\.to_markdown)", r"\1, progress=False)\2", code
    )
    exec(compile(code, "README.md", "exec"), {})
    out, err = capsys.readouterr()
    assert re.search(r"^\d+\.\d% under AutoAttack standard, 95 % interval \d+\.\d% to \d+\.\d%", out)
    assert re.search(r"^\*\*Verdict: (too few images to tell; )?(consistent|suspicious|masked)", out, re.MULTILINE)
    assert "AutoAttack:" not in err, "a bar that was to be silenced"


def test_continuous_integration_calls_exactly_the_readmes_test_line():
    line = re.search(r"## Tests\n\n```\n(.*?)\n```", README, re.DOTALL).group(1)
    commands = [text for text in (ROOT / ".ci" / "run").read_text().splitlines() if text and not text.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', line]


def test_every_command_in_the_readme_parses():
    from art_saliency.cli import make_parser

    lines = [line for line in README.splitlines() if line.startswith("art-saliency ")]
    assert len(lines) >= 4
    for line in lines:
        make_parser().parse_args(shlex.split(line)[1:])


def test_every_trainer_and_network_named_in_the_readme_exists():
    import art_saliency
    from art_saliency.networks import NETWORKS

    for name in re.findall(r"`(\w+Trainer)`", README):
        assert name in art_saliency.__all__
    for name in re.findall(r"--network ([\w-]+)(?=\s)", README):
        assert name in NETWORKS


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CITATION.cff", "tox.ini", "pyproject.toml"])
def test_what_every_project_has_is_there(name):
    assert (ROOT / name).read_text().strip()
