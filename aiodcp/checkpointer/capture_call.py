"""What is taken from the caller's state here and now, and handed to the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def captured_here(function: Callable[[], T], *, is_alone: bool) -> Callable[[], Awaitable[T]]:
    """Call `function` now; what it returns or raises is for the engine, so that all ranks hear of it.

    Raises:
        Exception: what `function` raised, if there are no other ranks (`is_alone`).
    """
    captured: Future[T] = Future()
    try:
        captured.set_result(function())
    except Exception as error:
        if is_alone:
            raise
        captured.set_exception(error)

    async def take() -> T:
        return captured.result()

    return take
