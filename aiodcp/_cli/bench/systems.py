"""What is measured: aiodcp, and DCP in two ways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any, Protocol

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from ...checkpointer.checkpoint import Checkpoint
from ...checkpointer.checkpointer import Checkpointer
from .workload import State

Waiter = Callable[[], Awaitable[None]]


class Saving(Protocol):
    """Something that saves: `save` returns what waits for staging and what waits for the end."""

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]: ...


class System(Saving, Protocol):
    """Something that saves and loads."""

    async def load(self, state: State, path: str) -> None: ...
    async def close(self) -> None: ...

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        """Return which parts of the last save's staging and writing lay within `compute`."""


class Aiodcp:
    """This library, as it comes.

    Attributes:
        last: the last save.
        opened: its `Checkpointer`, once it is entered.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self.opened: Checkpointer | None = None
        self.last: Checkpoint | None = None

    async def open(self) -> Checkpointer:
        """Return its `Checkpointer`, entered."""
        if self.opened is None:
            self.opened = await self._stack.enter_async_context(Checkpointer())
        return self.opened

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        self.last = checkpoint = await (await self.open()).save(state, path)

        async def staged() -> None:
            await checkpoint.staged

        async def uploaded() -> None:
            await checkpoint.uploaded

        return staged, uploaded

    async def load(self, state: State, path: str) -> None:
        await (await self.open()).load(state, path)

    async def close(self) -> None:
        await self._stack.aclose()

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        assert self.last is not None
        return self.last.timeline.under("stage", compute), self.last.timeline.under("write", compute)


class Dcp:
    """`dcp.async_save` as it comes: staging is done when it returns."""

    def begin(self, state: State, path: str) -> Future[Any] | AsyncSaveResponse:
        return dcp_async_save(state, checkpoint_id=path)

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        response = self.begin(state, path)
        assert not isinstance(response, AsyncSaveResponse)

        async def staged() -> None:
            return

        async def uploaded() -> None:
            await asyncio.wrap_future(response)

        return staged, uploaded

    async def load(self, state: State, path: str) -> None:
        dcp_load(dict(state), checkpoint_id=path)

    async def close(self) -> None:
        return

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        return 0.0, 0.0


class DcpStager(Dcp):
    """`dcp.async_save` with a `DefaultStager` that is kept: staging in a thread, buffers reused.

    Its default options need an accelerator (pinned memory, copies that do not block); this is what is left on a CPU.
    """

    def __init__(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, True, False))

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        response = dcp_async_save(state, checkpoint_id=path, async_stager=self._stager)
        assert isinstance(response, AsyncSaveResponse)

        async def staged() -> None:
            await asyncio.wrap_future(response.staging_completion)

        async def uploaded() -> None:
            await asyncio.wrap_future(response.upload_completion)

        return staged, uploaded

    async def close(self) -> None:
        self._stager.close()


SYSTEMS: Mapping[str, Callable[[], System]] = {
    "aiodcp": Aiodcp,
    "dcp.async_save": Dcp,
    "dcp + DefaultStager": DcpStager,
}
