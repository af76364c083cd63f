"""Tables: read back as Markdown they hold what was put in, aligned."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_saliency.evaluation.table import markdown_table, percent


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [(0.123, 1, "12.3"), (1, 1, "100.0"), (0, 1, "0.0"), (None, 1, "-"), (0.12345, 2, "12.35"), (0.5, 0, "50")],
)
def test_percent(share, digits, text):
    assert percent(share, digits=digits) == text


def test_a_table_to_the_letter():
    assert markdown_table(("method", "clean %"), [("adv-gsct", 97.5), ("x", None)]) == "\n".join(
        (
            "| method   | clean % |",
            "|----------|--------:|",
            "| adv-gsct |    97.5 |",
            "| x        |    None |",
        )
    )


def parse(text):
    """Cells of a Markdown table: split at bars that no backslash precedes."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.split("\n")]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in (rows[0], *rows[2:])], rows[1]


CELL = st.text(
    st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs"), exclude_characters="\\"), max_size=8
).map(str.strip)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_read_back_it_holds_what_was_put_in_and_every_line_is_as_long(rows):
    text = markdown_table(rows[0], rows[1:])
    cells, rule = parse(text)
    assert cells == rows
    assert len({len(line) for line in text.split("\n")}) == 1
    assert all(re.fullmatch("-+" if column == 0 else "-+:", mark) for column, mark in enumerate(rule))
    assert all(len(mark) >= 3 for mark in rule)


def test_a_bar_or_a_new_line_stays_in_its_cell():
    assert parse(markdown_table(("a|b", "c"), [("two\nlines", "x | y")]))[0] == [["a|b", "c"], ["two lines", "x | y"]]


@pytest.mark.parametrize("row", [("a",), ("a", "b", "c")])
def test_a_row_with_another_number_of_cells_is_an_error(row):
    with pytest.raises((ValueError, IndexError)):
        markdown_table(("x", "y"), [row])
