"""Saves and loads as OpenTelemetry spans, if its API is installed: they cost nothing where none are collected.

A span is exported when it is over, from the timeline: nothing is done for it while a save runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from .._log import SafeLogger
from .timeline import Timeline

log = SafeLogger(__name__)


class SpanExporter:
    """Gives the process's tracer provider spans of what a manager does."""

    def __init__(self) -> None:
        self._trace: Any = None
        try:
            from opentelemetry import context, trace
        except ImportError:
            return
        self._trace, self._context = trace, context
        self._tracer = trace.get_tracer("aiodcp")

    def here(self) -> Any:
        """Return what a span of the caller's that is open now is the parent of."""
        return None if self._trace is None else self._context.get_current()

    def export(
        self,
        name: str,
        here: Any,
        began_s: float,
        attributes: Mapping[str, str | int | float],
        timelines: Iterable[Timeline] = (),
        error: BaseException | None = None,
    ) -> None:
        """Export a span that is over now.

        Args:
            name: of the span.
            here: the parent, from when it began.
            began_s: when that was, in seconds of `time.perf_counter()`.
            attributes: of the span.
            timelines: whose phases become spans within it.
            error: why it failed.
        """
        if self._trace is None:
            return
        try:
            self._export(name, here, began_s, attributes, timelines, error)
        except Exception:  # of the application's exporter: it is not to fail a save
            log.exception("the span %s could not be exported", name)

    def _export(
        self,
        name: str,
        here: Any,
        began_s: float,
        attributes: Mapping[str, str | int | float],
        timelines: Iterable[Timeline],
        error: BaseException | None,
    ) -> None:
        zero_ns = time.time_ns() - time.perf_counter_ns()

        def clock(seconds: float) -> int:
            return zero_ns + int(seconds * 1e9)

        span = self._tracer.start_span(name, context=here, start_time=clock(began_s), attributes=dict(attributes))
        within = self._trace.set_span_in_context(span, here)
        for timeline in timelines:
            for phase in {each.name: None for each in timeline.spans}:
                between = timeline.between(phase)
                assert between is not None
                child = self._tracer.start_span(f"{name}.{phase}", context=within, start_time=clock(between[0]))
                child.end(clock(between[1]))
        if error is not None:
            span.record_exception(error)
            span.set_status(self._trace.StatusCode.ERROR, str(error))
        span.end(clock(time.perf_counter()))
