"""Saving to memory, and loading from it, in a line each."""

from __future__ import annotations

from typing import Any

from aiodcp import Checkpointer, MemoryStorage


async def saved(state: dict[str, Any], storage: MemoryStorage | None = None) -> MemoryStorage:
    storage = storage or MemoryStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save(state, "ckpt")).uploaded
    return storage


async def load(storage: MemoryStorage, target: dict[str, Any], **options: Any) -> None:
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.load(target, "ckpt", **options)
