"""Numbers for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from statistics import median
from typing import Any, TypeVar

R = TypeVar("R")


def median_row(rows: Sequence[R]) -> R:
    """Return a row of the medians of all fields of these, a dataclass's."""
    first: Any = rows[0]
    row: R = type(first)(**{each.name: median(getattr(row, each.name) for row in rows) for each in fields(first)})
    return row


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
