"""Turns at the GIL for the engine's threads, while the caller's thread computes in Python.

A thread that wants the GIL asks for it after waiting 5 ms, and the wait begins anew each time the holder lets go for
a moment. An event loop that is busy with steps shorter than that lets go for a microsecond between them, takes the
GIL back before the other thread has woken up, and so starves it: measured on two cores, steps of 3 ms left a
background thread one turn in 400, steps of 0.4 ms none in 2,500, and a save never ended. Hence, while a flow runs:

- the switch interval is 0.5 ms, so that a thread is heard between two steps of a millisecond, and
- the caller's loop pauses every 5 ms for as long as a thread takes to wake up, so that it is heard in any case.

Source: CPython's Python/ceval_gil.h, `take_gil`; https://github.com/python/cpython/issues/52194 (the convoy effect).
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

K = TypeVar("K")
V = TypeVar("V")

SWITCH_INTERVAL_S = 0.0005

AT_ONCE = 1000
"""Tensors that one call of C code looks at: for as long, up to a millisecond, no other thread has the GIL."""

PAUSE_PERIOD_S = 0.005

PAUSE_S = 0.00005  # with the timer's slack twice that: 2 % of the loop's time

_lock = threading.Lock()

_flows = 0

_before = 0.0


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Shorten the interpreter's switch interval while the block runs; blocks may overlap in many threads."""
    global _flows, _before
    with _lock:
        _flows += 1
        if _flows == 1:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        with _lock:
            _flows -= 1
            if _flows == 0:
                sys.setswitchinterval(_before)


def let_go(items: list[Any]) -> None:
    """Empty a list, some of it at a time: to free 100,000 objects at once holds the GIL for tens of milliseconds."""
    while items:
        del items[-AT_ONCE:]


class LongList(list[V]):
    """A list that is freed in that way, wherever the last reference goes."""

    __slots__ = ()

    def __del__(self, at_once: int = AT_ONCE) -> None:  # when the interpreter ends, this module may be empty
        while self:
            del self[-at_once:]


def to_dict(keys: Sequence[K], values: Sequence[V]) -> dict[K, V]:
    """Return a dict of as many keys as values, made some of it at a time: likewise."""
    made: dict[K, V] = {}
    for start in range(0, len(keys), AT_ONCE):
        made.update(zip(keys[start : start + AT_ONCE], values[start : start + AT_ONCE], strict=True))
    return made


class Awaited(Protocol):
    """Something that will be done."""

    def done(self) -> bool: ...


_awaited: WeakKeyDictionary[asyncio.AbstractEventLoop, list[ref[Awaited]]] = WeakKeyDictionary()


def yield_to_engine(loop: asyncio.AbstractEventLoop, awaited: Awaited) -> None:
    """Let `loop`, which is the running one, pause regularly until that is done; once for all who ask for it."""
    here = _awaited.setdefault(loop, [])
    here.append(ref(awaited))  # weakly: a failure holds the frames it came through, and they hold the loop
    if len(here) == 1:
        _pause_later(loop, here)


def _pause_later(loop: asyncio.AbstractEventLoop, here: list[ref[Awaited]]) -> None:
    def pause() -> None:
        here[:] = [each for each in here if (awaited := each()) is not None and not awaited.done()]
        if here:
            time.sleep(PAUSE_S)
            loop.call_later(PAUSE_PERIOD_S, pause)

    loop.call_later(PAUSE_PERIOD_S, pause)
