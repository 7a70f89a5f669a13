"""When each phase of a save began and ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Name = Literal["capture", "fence", "plan", "stage", "checksum", "write", "vote", "commit"]

# Rows of a trace from top to bottom. Those of the caller's thread first; "stage" and what follows overlap.
ROWS = ("step", "capture", "fence", "plan", "stage", "checksum", "write", "vote", "commit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something took from `began_s` to `ended_s`, in seconds of `time.perf_counter()`."""

    name: str
    began_s: float
    ended_s: float


class Timeline:
    """What one save did and when; grows until the save is done.

    The phases, by name: "capture" of the state in the caller's thread; "plan", which includes the ranks' agreement
    that nothing has changed; "stage", "checksum" and "write", a span for each part of the file; "vote", from when this
    rank has written all until it hears that every rank has; "commit". "fence" is the caller waiting for staging, in
    `fence()` or a guarded optimizer.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def __repr__(self) -> str:
        rows = [f"{name} {1000 * self.seconds(name):.1f} ms" for name in ROWS if self.between(name)]
        return f"<Timeline {', '.join(rows) or 'empty'}>"

    @property
    def spans(self) -> tuple[Span, ...]:
        """All that is over, in the order in which it began."""
        return tuple(sorted(self._spans, key=lambda span: span.began_s))

    @property
    def held_s(self) -> float:
        """Seconds for which the caller's thread was held: capturing, and waiting in fences."""
        return sum(span.ended_s - span.began_s for span in self._spans if span.name in ("capture", "fence"))

    def between(self, name: str) -> tuple[float, float] | None:
        """Return when a phase first began and last ended, or None if it has not been seen."""
        spans = [span for span in self._spans if span.name == name]
        return (min(span.began_s for span in spans), max(span.ended_s for span in spans)) if spans else None

    def seconds(self, name: str) -> float:
        """Return for how long a phase was at work; what overlaps is counted once."""
        return _length(union((span.began_s, span.ended_s) for span in self._spans if span.name == name))

    def under(self, name: str, compute: Iterable[tuple[float, float]]) -> float:
        """Return which part of a phase's time lay within `compute`: 0 to 1, and 1 if it took none.

        Args:
            name: the phase.
            compute: when the caller computed, each a begin and an end in seconds of `time.perf_counter()`.
        """
        work = union((span.began_s, span.ended_s) for span in self._spans if span.name == name)
        steps = union(compute)
        both = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in work for begin, end in steps)
        return both / _length(work) if _length(work) else 1.0

    @contextmanager
    def record(self, name: Name) -> Iterator[None]:
        """Add a span that lasts as long as the block. From any thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, began)

    def add(self, name: Name, began_s: float) -> None:
        """Add a span that ends now."""
        self._spans.append(Span(name=name, began_s=began_s, ended_s=time.perf_counter()))


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that overlap."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in spans)
