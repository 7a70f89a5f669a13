"""All saves of a rank as a Chrome trace."""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .timeline import ROWS, Span, Timeline

KEPT_SAVES = 1000

KEPT_STEPS = 10_000


class Trace:
    """The timelines of the last `KEPT_SAVES` saves and the caller's last `KEPT_STEPS` steps."""

    def __init__(self) -> None:
        self._saves: deque[tuple[str, Timeline]] = deque(maxlen=KEPT_SAVES)
        self._steps: deque[tuple[int, Span]] = deque(maxlen=KEPT_STEPS)
        self._running: list[tuple[int, float]] = []  # steps that are not over
        self._wall_s = time.time() - time.perf_counter()  # one clock for the traces of all ranks

    def add(self, checkpoint_id: str, timeline: Timeline) -> None:
        self._saves.append((checkpoint_id, timeline))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        began = time.perf_counter()
        self._running.append((number, began))
        try:
            yield
        finally:
            self._running.remove((number, began))
            self._steps.append((number, Span(name="step", began_s=began, ended_s=time.perf_counter())))

    def steps_between(self, began_s: float, ended_s: float) -> list[Span]:
        """Return the caller's steps that lay between two times, at least in part, each with its number as its name."""
        steps = [(number, step.began_s, step.ended_s) for number, step in list(self._steps)]
        steps += [(number, began, ended_s) for number, began in list(self._running)]
        return [
            Span(name=f"step {number}", began_s=began, ended_s=ended)
            for number, began, ended in steps
            if began < ended_s and ended > began_s
        ]

    def render(self, rank: int) -> str:
        """Return the Chrome trace, as JSON.

        Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        rows: Mapping[str, list[tuple[Span, str, dict[str, Any]]]] = defaultdict(list)
        for number, step in list(self._steps):
            rows["step"].append((step, f"step {number}", {"step": number}))
        for checkpoint_id, timeline in list(self._saves):
            for span in timeline.spans:
                rows[span.name].append((span, span.name, {"checkpoint_id": checkpoint_id}))
        events: list[dict[str, Any]] = [_named("process_name", f"rank {rank}", pid=rank)]
        lane = 0
        for row in ROWS:
            for number, spans in enumerate(_lanes(rows[row])):
                events.append(_named("thread_name", row if number == 0 else f"{row} {number + 1}", pid=rank, tid=lane))
                events.append(
                    {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": lane, "args": {"sort_index": lane}}
                )
                for span, name, arguments in spans:
                    events.append(
                        {
                            "ph": "X",
                            "name": name,
                            "cat": "caller" if row in ("step", "capture", "fence") else "engine",
                            "pid": rank,
                            "tid": lane,
                            "ts": 1e6 * (self._wall_s + span.began_s),
                            "dur": 1e6 * (span.ended_s - span.began_s),
                            "args": arguments,
                        }
                    )
                lane += 1
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _named(kind: str, name: str, **where: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, **where, "args": {"name": name}}


def _lanes(spans: list[tuple[Span, str, dict[str, Any]]]) -> list[list[tuple[Span, str, dict[str, Any]]]]:
    """Spread spans that overlap over as many lanes as it takes: a viewer shows those of one lane as nested."""
    lanes: list[list[tuple[Span, str, dict[str, Any]]]] = []
    for each in sorted(spans, key=lambda each: each[0].began_s):
        for lane in lanes:
            if lane[-1][0].ended_s <= each[0].began_s:
                lane.append(each)
                break
        else:
            lanes.append([each])
    return lanes
