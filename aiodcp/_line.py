"""The private line between ranks: a gloo group of the library's own, whose collectives can be awaited.

Only the engine's loop uses it, one collective at a time. It is made from a prefix of the process group's store and is
not registered with torch.distributed, so the training's groups, and other lines, never meet it.

A line that breaks (a rank died, left, or did not answer in time) is *cut* for all: every rank that notices checks in
at the store, whoever has not checked in a little later is missing, and the first rank to say so says it for all. The
next operation connects anew, under the next generation's names.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo

from ._engine import in_thread

ALARM_PERIOD_S = 1.0  # how often a rank that waits looks whether another one has found the line broken
ROLL_CALL_S = 3.0  # for which the others may be silent before they count as missing: looked for, and noticed, in 1 s
_POLL_S = 0.02


class LineCutError(Exception):
    """The line broke.

    Attributes:
        missing: positions in the group of the ranks that did not check in afterwards.
    """

    def __init__(self, missing: tuple[int, ...]) -> None:
        super().__init__(missing)
        self.missing = missing


class Line:
    """One rank's end.

    Attributes:
        rank: position in the group.
        size: how many ranks it has.
        root: position of the coordinator.
        members: their ranks in the world, by position.
        timeout_s: seconds after which a rank that does not answer breaks the line.
        nbytes: bytes that went through this end since it was made.
    """

    def __init__(self, group: dist.ProcessGroup, executor: Executor, *, root: int, timeout_s: float) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.root = root
        self.members = dist.get_process_group_ranks(group)
        self.timeout_s = timeout_s
        self.nbytes = 0
        self._executor = executor
        # A connection of our own: a wait on the training's would hold everybody else's use of it.
        store = group.get_group_store().clone()  # type: ignore[attr-defined]
        opened = store.add(f"aiodcp/{group.group_name}/{self.rank}", 1)  # ranks open their lines in the same order
        self._store = PrefixStore(f"aiodcp/{group.group_name}/{opened}", store)
        self._generation = 0
        self._group: Any = None  # a ProcessGroupGloo, of which torch types the constructor only
        self._abandoned: list[tuple[Any, ...]] = []  # collectives that did not end: their memory is gloo's until then

    async def connect(self) -> Any:
        """Connect with all others, if that is not done yet, and return the group.

        Raises:
            LineCutError: not all of them came in time.

        Cancellation: takes effect when all have connected, or after `timeout_s`.
        """
        if self._group is None:
            try:
                self._group = await in_thread(self._executor, self._make_group)
            except RuntimeError as error:
                raise await self._cut() from error
        return self._group

    def _make_group(self) -> ProcessGroupGloo:
        prefix = PrefixStore(f"{self._generation}/gloo", self._store)
        return ProcessGroupGloo(prefix, self.rank, self.size, timedelta(seconds=self.timeout_s))

    def close(self) -> None:
        """Let go of the group: whoever waits for this rank is told that it is gone."""
        self._group = None

    async def gather(self, row: torch.Tensor) -> torch.Tensor | None:
        """Collect each rank's `row` (of one shape and dtype): [size, *shape] at the root, None elsewhere.

        Raises:
            LineCutError: a rank is gone or did not answer in time.
        """
        group = await self.connect()
        table = torch.zeros(self.size, *row.shape, dtype=row.dtype) if self.rank == self.root else None
        options = dist.GatherOptions()
        options.rootRank = self.root
        rows = [list(table.unbind())] if table is not None else []
        self.nbytes += row.nbytes
        await self._finish(group.gather, (rows, [row], options))
        return table

    async def broadcast(self, tensor: torch.Tensor) -> None:
        """Fill `tensor` with the root's.

        Raises:
            LineCutError: a rank is gone or did not answer in time.
        """
        group = await self.connect()
        options = dist.BroadcastOptions()
        options.rootRank = self.root
        self.nbytes += tensor.nbytes
        await self._finish(group.broadcast, ([tensor], options))

    async def scatter(self, table: torch.Tensor | None, row: torch.Tensor) -> None:
        """Fill `row` with this rank's row of the root's `table` [size, *shape].

        Raises:
            LineCutError: a rank is gone or did not answer in time.
        """
        group = await self.connect()
        options = dist.ScatterOptions()
        options.rootRank = self.root
        rows = [list(table.unbind())] if table is not None else []
        self.nbytes += row.nbytes
        await self._finish(group.scatter, ([row], rows, options))

    async def _finish(self, collective: Any, arguments: tuple[Any, ...]) -> None:
        loop = asyncio.get_running_loop()
        finished = anyio.Event()

        def wake(_: object) -> None:  # in a thread of gloo's
            with suppress(RuntimeError):  # the engine has stopped meanwhile
                loop.call_soon_threadsafe(finished.set)

        try:
            work = collective(*arguments)
            future = work.get_future()
            future.add_done_callback(wake)
            while not finished.is_set():
                with anyio.move_on_after(ALARM_PERIOD_S):
                    await finished.wait()
                if not finished.is_set() and await in_thread(self._executor, self._alarm):
                    self._abandoned.append((self._group, work, arguments))
                    raise await self._cut()
            future.value()
        except RuntimeError as error:
            raise await self._cut() from error

    def _alarm(self) -> bool:
        return bool(self._store.check([f"{self._generation}/alarm"]))

    async def _cut(self) -> LineCutError:
        self._group = None  # closes the connections: whoever waits for this rank notices
        try:
            missing = await in_thread(self._executor, self._call_roll)
        except RuntimeError:  # the store is out of reach too, and with it the process that holds it: the first rank's
            missing = () if self.members[self.rank] == 0 else (0,)
        self._generation += 1
        return LineCutError(missing)

    def _call_roll(self) -> tuple[int, ...]:
        """Check in, wait for the others to do so, and agree on who did not."""
        roll = PrefixStore(str(self._generation), self._store)
        roll.set("alarm", "")
        roll.set(f"here/{self.rank}", "")
        present = roll.add("present", 1)
        until = time.monotonic() + ROLL_CALL_S
        while present < self.size and time.monotonic() < until and not roll.check(["missing"]):
            time.sleep(_POLL_S)
            before, present = present, roll.add("present", 0)
            if present > before:
                until = time.monotonic() + ROLL_CALL_S
        missing = [rank for rank in range(self.size) if present < self.size and not roll.check([f"here/{rank}"])]
        agreed: Sequence[int] = json.loads(roll.compare_set("missing", "", json.dumps(missing)))
        return tuple(agreed)
