"""Ranks that want the same bytes: one of them reads, and passes on to the others what it has read.

The bytes go over gloo groups of the library's own, along a tree: each rank sends about as much as it receives, as the
ranks take turns at reading. One group is made for each set of ranks, for the time of one load.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any

import anyio
import torch
import torch.distributed as dist

from .._engine.broadcast import Signal
from ..errors import LoadError
from .channel import Channel, drop, keep_until_done


class Relay:
    """One rank's end of a group that reads together. Used on the engine's loop."""

    def __init__(self, channel: Channel, members: Sequence[int], name: str) -> None:
        """Begin without a connection.

        Args:
            channel: to all ranks.
            members: positions of those that belong to it, this one among them; the same everywhere.
            name: of the group, under which no other is made.
        """
        self._channel = channel
        self._members = list(members)
        self._name = name
        self._rank = self._members.index(channel.rank)
        self._group: Any = None  # a ProcessGroupGloo, of which torch types the constructor only
        self._next = 0
        self._turns: dict[int, anyio.Event] = {}

    async def connect(self) -> None:
        """Make the group.

        Raises:
            LoadError: the members did not come, or cannot reach each other.
        """
        try:
            self._group = await self._channel.group_of(self._members, self._name)
        except RuntimeError as error:
            ranks = ", ".join(str(self._channel.members[each]) for each in self._members)
            raise LoadError(f"ranks {ranks} cannot connect with each other to share what they read: {error}") from error

    async def compare(self, fetches: Sequence[tuple[str, int, int]]) -> None:
        """Make sure that all members are about to fetch the same bytes.

        Args:
            fetches: file, start and stop of each, in order.

        Raises:
            LoadError: this one is about to fetch others than the first member.
        """
        own = torch.frombuffer(bytearray(sha256(json.dumps(fetches).encode()).digest()), dtype=torch.uint8)
        first = own.clone()
        await self._broadcast(first, 0)
        if not torch.equal(own, first):
            raise LoadError("the ranks disagree on what they read together; load with share_reads=False")

    async def fetch(self, number: int, memory: torch.Tensor, read: Callable[[], Awaitable[object]]) -> None:
        """Fill memory with what one rank reads.

        Args:
            number: of the fetch, counted from 0: all members make the same ones. They may be under way at once.
            memory: bytes, on the host.
            read: fills it from storage; called on one of the members.

        Raises:
            LoadError: another member did not pass on what it has read.
            Exception: what `read` raised.
        """
        reader = number % len(self._members)
        if reader == self._rank:
            await read()
        if number != self._next:  # in one order on all ranks: gloo matches them by that
            turn = self._turns[number] = anyio.Event()
            await turn.wait()
        await self._broadcast(memory, reader, self._let_next_go)

    async def _broadcast(
        self, memory: torch.Tensor, reader: int, on_issued: Callable[[], object] = lambda: None
    ) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = reader
        options.timeout = timedelta(seconds=self._channel.timeout_s)
        finished, arguments = Signal(), ([memory], options)
        try:
            work = self._group.broadcast(*arguments)
            try:
                on_issued()
                work.get_future().add_done_callback(lambda _: finished.set())  # in a thread of gloo's
                await finished.wait()
                work.get_future().value()
            finally:
                if not finished.is_set():
                    keep_until_done(work, self._group, arguments)
        except RuntimeError as error:
            rank = self._channel.members[self._members[reader]]
            raise LoadError(f"rank {rank} did not pass on what it was to read: {error}") from error

    def _let_next_go(self) -> None:
        self._next += 1
        turn = self._turns.pop(self._next, None)
        if turn is not None:
            turn.set()

    def close(self) -> None:
        """Drop the connections: whoever waits for this rank notices."""
        groups, self._group = [self._group], None
        drop(groups)
