"""Numbers for people."""

from __future__ import annotations

from dataclasses import fields
from statistics import median

from .measure import Row


def median_row(rows: list[Row]) -> Row:
    return Row(**{each.name: median(getattr(row, each.name) for row in rows) for each in fields(Row)})


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
