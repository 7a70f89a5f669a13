"""What happened to the checkpoints of a root, kept below it for `aiodcp report`. No torch here."""

from __future__ import annotations

import json
import platform
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio

from .._log import SafeLogger
from .._telemetry.timeline import Span, Timeline, union
from ..storage.base import INTERNAL_DIRECTORY, Storage
from .events import Event, SaveBegan

log: SafeLogger = SafeLogger(__name__)

KEPT_EVENTS = 2000  # of one file, the last ones

KEPT_FILES = 200  # of one root, the last ones

KEPT_SPANS = 50  # of one phase of a save; the others are joined

WRITE_INTERVAL_S = 10.0

WRITE_TIMEOUT_S = 5.0

_PREFIX, _SUFFIX = "history-", ".jsonl"


class History:
    """What one manager's rank has seen since it was entered: a line of JSON an event, in a file of its own.

    The file is written after a save, at most every `WRITE_INTERVAL_S`, and at the end. What cannot be written is logged
    and costs no save anything.
    """

    def __init__(
        self, storage: Storage, root: Callable[[], str], steps_between: Callable[[float, float], Iterable[Span]]
    ) -> None:
        """Begin.

        Args:
            storage: where the root is.
            root: returns it.
            steps_between: returns the caller's steps between two times.
        """
        self._storage = storage
        self._root = root
        self._steps_between = steps_between
        self._lock = threading.Lock()
        self._name = ""
        self._first: dict[str, Any] = {}
        self._lines: deque[str] = deque(maxlen=KEPT_EVENTS)
        self._is_new = False
        self._written_at = -WRITE_INTERVAL_S
        self._wall_s = time.time() - time.perf_counter()

    def begin(self) -> None:
        """Begin a file."""
        now = time.time()
        self._name = f"{_PREFIX}{int(1000 * now)}-{uuid.uuid4().hex[:8]}{_SUFFIX}"  # in order by name
        self._first = {"event": "Opened", "at": now, "host": platform.node()}
        self._lines.clear()
        self._written_at = -WRITE_INTERVAL_S

    def note(self, event: Event, began_s: float = 0.0, timelines: Sequence[Timeline] = ()) -> None:
        """Note an event; of a save that has ended also when it was asked for, and its phases. From any thread."""
        if isinstance(event, SaveBegan):  # how it ends says it all
            return
        line = {"event": type(event).__name__, "at": time.time(), "level": event.level, "text": str(event)}
        line |= {name: value for name in _FACTS if (value := getattr(event, name, None)) is not None}
        if timelines:
            line["began"] = self._wall_s + began_s
            line["spans"] = self._spans(began_s, timelines)
        with self._lock:
            self._lines.append(json.dumps(line))
            self._is_new = True

    def _spans(self, began_s: float, timelines: Sequence[Timeline]) -> list[list[Any]]:
        """Return what was done when: a name, and seconds from when the save was asked for."""
        by_name: dict[str, list[tuple[float, float]]] = {}
        for span in (span for each in timelines for span in each.spans):
            by_name.setdefault(span.name, []).append((span.began_s, span.ended_s))
        found = [(name, *each) for name, spans in by_name.items() for each in _few(union(spans))]
        captured = min((start for name, start, _ in found if name == "capture"), default=began_s)
        ended = max((stop for *_, stop in found), default=began_s)
        steps = [(span.name, span.began_s, span.ended_s) for span in self._steps_between(began_s, ended)]
        waited = [("wait", began_s, captured)] if captured > began_s else []
        return [
            [name, round(start - began_s, 6), round(stop - began_s, 6)]
            for name, start, stop in (*steps[-KEPT_SPANS:], *waited, *found)
        ]

    async def write(self, *, at_once: bool = False) -> None:
        """Write what is new, if it is time."""
        if not self._is_new or not (at_once or time.monotonic() - self._written_at >= WRITE_INTERVAL_S):
            return
        with self._lock:
            self._is_new = False
            data = "\n".join([json.dumps(self._first), *self._lines, ""]).encode()
        place, is_first = _place(self._root()), self._written_at < 0
        self._written_at = time.monotonic()
        try:
            with anyio.fail_after(WRITE_TIMEOUT_S):
                if is_first:
                    await self._remove_old(place)
                await self._storage.put(place, self._name, data)
        except OSError as error:  # a TimeoutError is one
            path, why = (
                self._storage.describe(place, self._name),
                str(error) or f"not written within {WRITE_TIMEOUT_S:g} s",
            )
            log.warning("%s: the history of saves cannot be kept: %s", path, why)

    async def _remove_old(self, place: str) -> None:
        for name in _names(await self._storage.list_files(place))[: 1 - KEPT_FILES]:
            await self._storage.remove(place, name)


_FACTS = ("step", "rank", "nbytes", "held_s", "staged_s", "seconds", "reason", "path")


def _few(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join neighbours, those with the smallest gaps, until few are left."""
    if len(spans) <= KEPT_SPANS:
        return spans
    gaps = sorted(range(1, len(spans)), key=lambda n: spans[n][0] - spans[n - 1][1], reverse=True)
    starts = [0, *sorted(gaps[: KEPT_SPANS - 1])]
    return [(spans[a][0], spans[b - 1][1]) for a, b in zip(starts, [*starts[1:], len(spans)], strict=True)]


def _place(root: str) -> str:
    return f"{root}/{INTERNAL_DIRECTORY}"


def _names(files: Iterable[str]) -> list[str]:
    return sorted(name for name in files if name.startswith(_PREFIX) and name.endswith(_SUFFIX))


async def read_history(storage: Storage, root: str) -> list[dict[str, Any]]:
    """Return the events of all managers of a root, in order, each with "run": how many of them came before it.

    Raises:
        OSError: storage failed.
    """
    place = _place(root)
    events: list[dict[str, Any]] = []
    for run, name in enumerate(_names(await storage.list_files(place))):
        try:
            data = await storage.get(place, name)
        except FileNotFoundError:  # removed meanwhile
            continue
        for line in data.decode(errors="replace").splitlines():
            try:
                event = json.loads(line)
                events.append({**event, "run": run, "at": float(event["at"]), "event": str(event["event"])})
            except (ValueError, TypeError, KeyError):
                log.warning("%s: a line is no event: %.80r", storage.describe(place, name), line)
    return sorted(events, key=lambda event: event["at"])
