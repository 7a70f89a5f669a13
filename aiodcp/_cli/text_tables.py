"""What the command line prints: tables that are readable, sizes in units. No torch here."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under titles, each column as wide as it must be; a title that begins with ">" is flush right."""
    cells = [[title.lstrip(">").upper() for title in titles], *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Return bytes as people read them: "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024 or unit == "TiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Return seconds as people say them: "3 h"."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600), (float("inf"), "d", 86_400)):
        if seconds < limit:
            return f"{max(seconds, 0) / length:.0f} {unit}"
    raise AssertionError


def printable(text: str, *, keep: str = "\n") -> str:
    """Return text with what a terminal would act upon written out; names in a checkpoint may hold anything."""
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float) -> str:
    """Return a number in few digits."""
    return f"{value:.4g}"
