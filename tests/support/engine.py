"""Waiting for the engine's event loop."""

from __future__ import annotations

import asyncio

from aiodcp import Checkpointer
from aiodcp.checkpointer.checkpointer import session_of


def wait_for_engine(checkpointer: Checkpointer) -> None:
    """Return when the engine's loop has come to all that it was asked for before."""

    async def nothing() -> None:
        await asyncio.sleep(0)

    for _ in range(3):
        session_of(checkpointer).flows.engine.call_soon(nothing).result(30)
