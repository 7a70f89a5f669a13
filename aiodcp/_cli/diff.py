"""The table of `aiodcp diff`."""

from __future__ import annotations

from collections.abc import Sequence

from ..reader.diff import Difference
from .text_tables import number, plural, table


def format_diff(differences: Sequence[Difference]) -> str:
    """Return the table of `aiodcp diff`."""
    if not differences:
        return "the same, bit for bit"
    rows = [
        [
            each.fqn,
            each.change,
            "" if each.count is None else str(each.count),
            "" if each.largest is None else number(each.largest),
            "" if each.mean is None else number(each.mean),
        ]
        for each in differences
    ]
    verb = "differs" if len(differences) == 1 else "differ"
    titles = ["name", "change", ">elements", ">largest", ">mean"]
    return f"{table(titles, rows)}\n{plural(len(differences), 'value')} {verb}"
