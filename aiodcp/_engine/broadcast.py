"""From any thread to an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

FORKED = "this process was forked from the one in which that is done: it will not hear of it"


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> bool:
    """Have `function` called on a loop of any thread; return False if that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True
