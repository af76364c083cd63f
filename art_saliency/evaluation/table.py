"""Tables that read well on a terminal and are Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "percent"]


def percent(share: float | None, *, digits: int = 1) -> str:
    """:return: 0.123 as ``"12.3"``; ``"-"`` for a figure that was not measured."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _cell(value: object) -> str:
    """Text that stays in its cell: a bar or the end of a line would start another."""
    return " ".join(str(value).replace("|", "\\|").splitlines())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """
    A Markdown table, columns aligned: the first `left` ones to the left, the others to the right.

    :param header: The columns' names. :param rows: As many cells each.
    :param left: How many columns are text.
    :return: Its lines, joined.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
