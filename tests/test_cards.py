"""The method cards: complete, shown by the command line, and their code runs."""

from __future__ import annotations

import re

import pytest

from art_saliency.cli import main
from art_saliency.cli.methods import card
from art_saliency.trainers.methods import TRAINERS

CARDS = {name: text for name in TRAINERS if (text := card(name)) is not None}


def test_the_four_methods_have_cards():
    assert set(CARDS) == {"adv-gsct", "j-sigr", "aalp", "fsr"}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_every_section_and_keeps_source_choice_and_measured_apart(name):
    text = CARDS[name]
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    for words in ("how to use", "hyper-?parameters", "technical details", "weakness", "cost", "attribution"):
        assert any(re.search(words, heading, re.IGNORECASE) for heading in headings), (words, headings)
    for word in ("Source", "Choice", "Measured"):
        assert re.search(rf"\b{word}", text), word
    assert "@article{" in text or "@inproceedings{" in text
    if name != "fsr":
        assert "reconstruction" in text
    assert "reproduces the paper" not in text


@pytest.mark.parametrize("name", CARDS)
def test_a_cards_code_runs(name, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", CARDS[name], re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), names)
    assert any(type(value).__name__.endswith("Trainer") for value in names.values())


@pytest.mark.parametrize("name", CARDS)
def test_every_parameter_that_a_card_names_exists(name):
    """Words in backticks followed by an equals sign are keywords of the trainer, of its base, or of fit."""
    known = TRAINERS[name].all_parameter_names({})
    known |= {
        "nb_epochs",
        "batch_size",
        "scheduler",
        "seed",
        "grad_clip",
        "augment",
        "beta",
        "randomised",
        "activation",
    }
    for word in re.findall(r"`(\w+)=", CARDS[name]):
        assert word in known, word


def test_the_command_line_lists_and_shows_them(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f"| {name} " in listed for name in TRAINERS)
    assert main(["methods", "aalp", "--all"]) == 0
    assert capsys.readouterr().out.strip() == CARDS["aalp"].strip()
    assert main(["methods", "--all"]) == 2
    assert "--all: got it, expected no such option without a METHOD" in capsys.readouterr().err
    assert main(["methods", "pgd-at"]) == 0
    assert "baseline" in capsys.readouterr().out
    assert main(["methods", "alp2"]) == 2
    assert "METHOD: got 'alp2', expected one of" in capsys.readouterr().err


@pytest.mark.parametrize("name", CARDS)
def test_without_all_a_card_is_shown_as_far_as_a_choice_is_made_by_it(name, capsys):
    """Its own lines in its own words, all parameters among them, and of the stored runs those of the method as it comes."""
    assert main(["methods", name]) == 0
    shown = capsys.readouterr().out
    *body, last = shown.strip().splitlines()
    assert last == f"The whole card: art-saliency methods {name} --all"
    assert len(shown) < 9000 < len(CARDS[name])
    headings = [line for line in body if line.startswith("#")]
    words = ["# ", "## What it does", "## Hyper-parameters", "## Known weaknesses", "## Cost", "## Measured, in short"]
    assert all(heading.startswith(start) for heading, start in zip(headings, words, strict=True))
    assert set(body) - set(CARDS[name].splitlines()) == {"## Measured, in short"}
    table = CARDS[name].split("## Hyper-parameters")[1].split("\n## ")[0]
    assert table.strip() in shown
    arms = [line.split("|")[1].strip() for line in shown.split("in short")[1].splitlines() if line.startswith("| ")]
    assert {"pgd-at", "fsr+pgd-at" if name == "fsr" else name} < set(arms)
    assert not any(":" in arm for arm in arms)
