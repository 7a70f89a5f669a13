"""How often ranks look at the store that they share: it is one process, for however many of them."""

from __future__ import annotations

ASKING = 1024  # ranks that may do so as often as they like


def pace(seconds: float, ranks: int) -> float:
    """Return how many seconds a rank waits between two looks, where few ranks would wait so many."""
    return seconds * max(1.0, ranks / ASKING)
