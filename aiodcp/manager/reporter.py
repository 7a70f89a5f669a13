"""What one rank reports: events, counters, spans and bars."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from .._telemetry.otel import SpanExporter
from .._telemetry.progress import ProgressLog
from .._telemetry.progress_bar import Bar, bar
from .._telemetry.timeline import Timeline
from ..checkpointer.checkpoint import SaveState
from ..storage.retry import Attempt
from .event_feed import EventFeed
from .events import (
    Event,
    FellBack,
    LeftoverRemoved,
    Preempted,
    RemovalFailed,
    Restored,
    Retried,
    SaveBegan,
    SaveFailed,
    SaveFinished,
    SaveSkipped,
    Stats,
    StepRemoved,
)
from .history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRecord:
    """A save that is reported on.

    Attributes:
        step: which.
        began_s: when it was asked for, in seconds of `time.perf_counter()`.
        here: within which span of the caller's.
    """

    step: int
    began_s: float
    here: Any


class Reporter:
    """What one rank reports."""

    def __init__(
        self,
        on_event: Callable[[Event], None] | None,
        path_of: Callable[[int], str],
        step_of: Callable[[str], int | None],
        history: History | None,
    ) -> None:
        """Begin; `path_of` returns the path of a step, and `step_of` the step of a directory's name."""
        self._history = history
        self._is_kept = False  # where nothing is saved nothing is written
        self._feed = EventFeed(on_event)
        self._rank = 0
        self._shows = False
        self._path_of = path_of
        self._step_of = step_of
        self._exporter = SpanExporter()
        self._saved = self._failed = self._skipped = self._removed = self._retried = 0
        self._waited_s = 0.0
        self._last_commit: float | None = None

    def begin(self, *, rank: int, shows: bool) -> None:
        """Report from now on, of this rank; `shows` is whether bars are shown here."""
        self._rank, self._shows = rank, shows
        if self._history is not None:
            self._history.begin()
        self._feed.begin()

    async def end(self) -> None:
        """Let the callback see all events, and those who follow come to an end."""
        await self._feed.flush()
        self._feed.end()

    async def write_history(self) -> None:
        """Write what has happened, if it is to be kept, and it is time. On the coordinator, on the engine's loop."""
        if self._history is not None and self._is_kept:
            await self._history.write()

    @asynccontextmanager
    async def keeping_history(self) -> AsyncIterator[None]:
        """Write what has happened while the block runs, if it is to be kept, and all of it at its end."""
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = False
            if self._history is not None:
                await self._history.write(at_once=True)

    def follow(self) -> AsyncIterator[Event]:
        """Return the events from now on, until the end."""
        return self._feed.follow()

    @property
    def stats(self) -> Stats:
        return Stats(
            saved=self._saved,
            failed=self._failed,
            skipped=self._skipped,
            removed=self._removed,
            retried=self._retried,
            waited_s=self._waited_s,
            age_s=None if self._last_commit is None else time.monotonic() - self._last_commit,
        )

    def _of(self, step: int) -> dict[str, Any]:
        return {"step": step, "rank": self._rank, "checkpoint_id": self._path_of(step)}

    def _publish(self, event: Event, began_s: float = 0.0, timelines: Sequence[Timeline] = ()) -> None:
        if self._history is not None:
            self._history.note(event, began_s, timelines)
        self._feed.publish(event)

    def save(self, step: int) -> SaveRecord:
        """Begin to report on a save, which is asked for now."""
        return SaveRecord(step=step, began_s=time.perf_counter(), here=self._exporter.here())

    def skipped(self, step: int) -> None:
        self._skipped += 1
        self._publish(SaveSkipped(**self._of(step)))

    def began(self, record: SaveRecord, timeline: Timeline) -> None:
        """Report that a state is captured."""
        captured = timeline.between("capture")
        assert captured is not None
        waited_s = captured[0] - record.began_s
        self._waited_s += waited_s
        self._publish(SaveBegan(**self._of(record.step), waited_s=waited_s, held_s=captured[1] - captured[0]))

    def ended(self, record: SaveRecord, states: Sequence[SaveState], error: Exception | None) -> None:
        """Report how a save has ended, of one state or several."""
        facts = self._of(record.step)
        nbytes = sum(state.log.latest.bytes_written for state in states)
        timelines = [state.timeline for state in states]
        if error is not None:
            self._failed += 1
            self._publish(SaveFailed(**facts, error=error), record.began_s, timelines)
        else:
            self._saved += 1
            self._last_commit = time.monotonic()
            self._publish(SaveFinished(**facts, nbytes=nbytes, **_times_of(timelines)), record.began_s, timelines)
        attributes = {f"aiodcp.{name}": value for name, value in facts.items()} | {"aiodcp.nbytes": nbytes}
        self._exporter.export("aiodcp.save", record.here, record.began_s, attributes, timelines, error)

    async def show(self, step: int, log: ProgressLog) -> None:
        """Show how far a save has come, until it has ended."""
        if self._shows:
            with bar(f"saving step {step}") as shown:
                written = 0
                async for progress in log.follow():
                    shown.total(progress.bytes_total)
                    shown.advance(progress.bytes_written - written)
                    written = progress.bytes_written

    def retried(self, checkpoint_id: str, path: str, attempt: Attempt) -> None:
        self._retried += 1
        step = self._step_of(checkpoint_id.rpartition("/")[2])
        step = -1 if step is None else step
        retried = Retried(step=step, rank=self._rank, checkpoint_id=checkpoint_id, path=path, attempt=attempt)
        self._publish(retried)

    def removed(self, step: int, error: OSError | None) -> None:
        """Report that a step is removed, or why it cannot be."""
        if error is None:
            self._removed += 1
            self._publish(StepRemoved(**self._of(step)))
        else:
            self._publish(RemovalFailed(**self._of(step), error=error))

    def cleared(self, step: int) -> None:
        self._publish(LeftoverRemoved(**self._of(step)))

    def preempted(self, step: int, reason: str, left_s: float) -> None:
        self._publish(Preempted(**self._of(step), reason=reason, left_s=left_s))

    @contextmanager
    def restoring(self, step: int) -> Iterator[Bar]:
        """Report on a load, which is the block; it is given a bar for how far it has come."""
        began_s, here = time.perf_counter(), self._exporter.here()
        facts, failure = self._of(step), None
        try:
            with bar(f"loading step {step}", wanted=self._shows) as shown:
                yield shown
            self._publish(Restored(**facts, seconds=time.perf_counter() - began_s))
        except Exception as error:
            failure = error
            raise
        finally:
            attributes = {f"aiodcp.{name}": value for name, value in facts.items()}
            self._exporter.export("aiodcp.restore", here, began_s, attributes, (), failure)

    def fell_back(self, step: int, error: Exception) -> None:
        self._publish(FellBack(**self._of(step), error=error))


def _times_of(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Return the times of a `SaveFinished`, of the states that were saved together, now that all of them are."""
    captured = [span for each in timelines if (span := each.between("capture")) is not None]
    staged = [span for each in timelines if (span := each.between("stage")) is not None]
    began = min(start for start, _ in captured)
    phases: dict[str, float] = {}
    for each in timelines:
        for name in {span.name: None for span in each.spans}:
            phases[name] = phases.get(name, 0.0) + each.seconds(name)
    return {
        "held_s": sum(each.held_s for each in timelines),
        "staged_s": max((stop for _, stop in (*staged, *captured))) - began,
        "seconds": time.perf_counter() - began,
        "phases": phases,
    }
