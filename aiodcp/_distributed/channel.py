"""The private channel between ranks: gloo groups of the library's own, whose collectives can be awaited.

A gloo group connects each rank with each other one. Where there are many, ranks meet in blocks, and the blocks' first
ones among themselves: that is two messages where it was one, and tens of connections in place of thousands.

Only the engine's loop uses it, one collective at a time. It is made from a prefix of the process group's store and is
not registered with torch.distributed, so the training's groups, and other channels, never meet it.

A channel that breaks (a rank died, left, or did not answer in time) breaks for all: every rank that notices checks in
at the store, whoever has not checked in a little later is missing, and the first rank to record that decides it for
all. The next operation connects anew, under the next generation's names.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import anyio
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo

from .._engine.broadcast import Signal
from .._engine.interpreter_exit import finish_at_exit
from .._engine.threads import in_own_thread, start_thread
from .._log import SafeLogger
from ..errors import ClosedError
from .address import own_address_towards
from .group_store import GroupStore, Rendezvous
from .place import Place
from .store_pace import pace

log = SafeLogger(__name__)

T = TypeVar("T")

ALARM_PERIOD_S = 1.0  # how often a rank that waits looks whether another one has found the channel broken

ROLL_CALL_S = 3.0  # for which the others may be silent before they count as missing: looked for, and noticed, in 1 s

ROLL_CALL_LIMIT_S = 20.0  # in all

STORE_TIMEOUT_S = 10.0  # after which the store counts as out of reach

_POLL_S = 0.02

DESCRIPTORS_A_PEER = 2  # of gloo's connections: one, and one of a broken group that is not closed yet

DESCRIPTORS_BESIDES = 64  # for the store, data files, and what else is opened meanwhile


def _ensure_descriptors(count: int) -> None:
    """Raise this process's soft limit of open files if `count` more would not fit: 1,024 is usual, 4,096 ranks many.

    Raises:
        ClosedError: the hard limit does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ClosedError(
            f"Too many open files: to connect to all ranks takes {needed} descriptors, and RLIMIT_NOFILE allows {hard} "
            "(ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    log.debug("raised RLIMIT_NOFILE from %d to %d", soft, needed)


KNOWN_ROUND_TRIPS = 16


class ChannelBrokenError(Exception):
    """The channel broke.

    Attributes:
        missing: positions in the group of the ranks that did not check in afterwards.
    """

    def __init__(self, missing: tuple[int, ...]) -> None:
        super().__init__(missing)
        self.missing = missing


class Channel:
    """One rank's end.

    Attributes:
        rank: position in the group.
        size: how many ranks it has.
        root: position of the coordinator.
        members: their ranks in the world, by position.
        timeout_s: seconds after which a rank that has not come, or does not answer, counts as missing.
        silence_s: seconds after which one counts as missing that has come, and is silent since.
        nbytes: bytes that went through this end since it was made.
        messages: that this end has sent or received: gathers, broadcasts, scatters.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, root: int, timeout_s: float, silence_s: float = float("inf")
    ) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.root = root
        self.members: list[int] = dist.get_process_group_ranks(group)
        self.timeout_s = timeout_s
        self.silence_s: float = min(silence_s, timeout_s)
        self.nbytes: int = 0
        self.messages: int = 0
        self._round_trips: deque[float] = deque(maxlen=KNOWN_ROUND_TRIPS)
        self._world: dist.ProcessGroup = group
        self._store: Any = None  # a PrefixStore, of which torch types the constructor only
        self._group_store: GroupStore
        self._generation = 0
        self._place = Place.of(self.rank, self.size, self.root)
        self._groups: list[Any] = []  # when connected: a ProcessGroupGloo of the block, and of the firsts or None

    @property
    def store(self) -> Any:
        """The store that the ranks share, once they are connected; under names that no other channel has."""
        self._group_store.take_own_connection()
        return self._store

    @property
    def round_trip_s(self) -> float:
        """How long a round trip takes when nobody has to be waited for: the shortest of the last ones."""
        return min(self._round_trips, default=0.0)

    def note_round_trip(self, seconds: float) -> None:
        """Note how long a gather and a broadcast took."""
        self._round_trips.append(seconds)

    async def connect(self) -> tuple[Any, Any]:
        """Connect with the others, if that is not done yet.

        Returns:
            The group of the ranks of this block; and that of the blocks' first ones, where this rank is one of them,
            and there are several blocks.

        Raises:
            ChannelBrokenError: not all of them came in time.

        Cancellation: leaves a thread behind, for `timeout_s` at most.
        """
        if not self._groups:
            try:
                self._groups = await in_own_thread("ranks", self._make_groups, self.timeout_s + STORE_TIMEOUT_S)
            except ClosedError:
                raise
            except RuntimeError as error:
                if self._store is None:
                    raise ChannelBrokenError(self._missing_host()) from error
                raise await self._break() from error
        block, firsts = self._groups
        return block, firsts

    def _make_groups(self) -> list[Any]:
        place = self._place
        _ensure_descriptors(DESCRIPTORS_A_PEER * (len(place.block) + len(place.firsts)) + DESCRIPTORS_BESIDES)
        if self._store is None:
            self._group_store = store = GroupStore(self._world.get_group_store(), self.size)
            name = f"aiodcp/{self._world.group_name}"
            # Ranks open their channels in the same order, so each may count for itself; but for those that came to
            # nothing, which not all ranks need have tried to open.
            number = store.add(f"{name}/{self.rank}", 1)
            while store.check([f"{name}/{number}/failed"]):
                number = store.add(f"{name}/{self.rank}", 1)
            self._store = store.under(f"{name}/{number}")
        block = self._make_group_of(place.block, f"block/{place.block[0]}", self.timeout_s)
        if not place.is_first or len(place.firsts) == 1:
            return [block, None]
        return [block, self._make_group_of(place.firsts, "firsts", self.timeout_s)]

    async def group_of(self, members: Sequence[int], name: str) -> Any:
        """Return a group of some of the ranks, which the caller drops; once this channel is connected.

        Args:
            members: their positions, this one among them; the same on all of them.
            name: of the group, under which they make no other.

        Raises:
            RuntimeError: the store that the ranks share does not answer.
        """

        def make() -> Any:
            _ensure_descriptors(DESCRIPTORS_A_PEER * len(members) + DESCRIPTORS_BESIDES)
            return self._make_group_of(members, name, self.silence_s)

        return await in_own_thread("ranks", make, self.silence_s + STORE_TIMEOUT_S)

    def _make_group_of(self, members: Sequence[int], name: str, limit_s: float) -> Any:
        rank, size = members.index(self.rank), len(members)
        rendezvous = Rendezvous(PrefixStore(f"{self._generation}/{name}", self._store), rank, size)
        gloo: Any = ProcessGroupGloo  # whose options torch does not type
        options = gloo._Options()
        options._devices = _make_devices(self._group_store.underlying_store)
        options._timeout = timedelta(seconds=limit_s)
        return gloo(rendezvous, rank, size, options)

    async def give_up_opening(self) -> None:
        """Record that this channel was never opened, so that no rank waits under its number."""
        if self._store is None:  # it has none
            return
        with suppress(RuntimeError):
            await in_own_thread("ranks", lambda: self._store.set("failed", ""), STORE_TIMEOUT_S)

    def close(self) -> None:
        """Drop the connections: whoever waits for this rank sees them close. Returns before they are closed."""
        groups, self._groups = self._groups, []
        drop(groups)

    async def gather(self, row: torch.Tensor, *, limit_s: float | None = None) -> torch.Tensor | None:
        """Collect each rank's `row` (of one shape and dtype): [size, *shape] at the root, None elsewhere.

        Args:
            row: this rank's.
            limit_s: seconds after which the others count as missing; by default `timeout_s`.

        Raises:
            ChannelBrokenError: a rank is gone or did not answer in time.
        """
        block, top = await self.connect()
        place, options = self._place, dist.GatherOptions()
        options.timeout = self._patience(limit_s)
        table = torch.zeros(place.block_size, *row.shape, dtype=row.dtype) if place.is_first else None
        rows = [list(table[: len(place.block)].unbind())] if table is not None else []
        await self._finish(block.gather, (rows, [row], options), row.nbytes)
        if top is None or table is None:
            return place.by_rank(table) if self.rank == self.root and table is not None else None
        tables = torch.zeros(len(place.firsts), *table.shape, dtype=row.dtype) if self.rank == self.root else None
        blocks = [list(tables.unbind())] if tables is not None else []
        await self._finish(top.gather, (blocks, [table], options), table.nbytes)
        return place.by_rank(tables.flatten(0, 1)) if tables is not None else None

    async def broadcast(self, tensor: torch.Tensor, *, limit_s: float | None = None) -> None:
        """Fill `tensor` with the root's.

        Args:
            tensor: of one shape and dtype on all ranks.
            limit_s: as in `gather`.

        Raises:
            ChannelBrokenError: a rank is gone or did not answer in time.
        """
        block, top = await self.connect()
        options = dist.BroadcastOptions()
        options.timeout = self._patience(limit_s)
        if top is not None:
            await self._finish(top.broadcast, ([tensor], options), tensor.nbytes)
        await self._finish(block.broadcast, ([tensor], options), tensor.nbytes)

    async def scatter(self, table: torch.Tensor | None, row: torch.Tensor) -> None:
        """Fill `row` with this rank's row of the root's `table` [size, *shape].

        Raises:
            ChannelBrokenError: a rank is gone or did not answer in time.
        """
        block, top = await self.connect()
        place, options = self._place, dist.ScatterOptions()
        options.timeout = self._patience()
        ours = place.by_position(table) if table is not None else None
        if top is not None:
            blocks = [list(torch.split(ours, place.block_size))] if ours is not None else []
            ours = torch.zeros(place.block_size, *row.shape, dtype=row.dtype)
            await self._finish(top.scatter, ([ours], blocks, options), ours.nbytes)
        rows = [list(ours[: len(place.block)].unbind())] if ours is not None else []
        await self._finish(block.scatter, ([row], rows, options), row.nbytes)

    def _patience(self, limit_s: float | None = None) -> timedelta:
        """Return for how long to wait so that a missing rank is reported in time: who it is must be found out, too."""
        limit_s = self.timeout_s if limit_s is None else min(limit_s, self.timeout_s)
        return timedelta(seconds=limit_s - min(pace(ROLL_CALL_S, self.size), 0.2 * limit_s))

    async def _finish(self, collective: Any, arguments: tuple[Any, ...], nbytes: int) -> None:
        self.messages += 1
        self.nbytes += nbytes
        finished = Signal()
        try:
            work = collective(*arguments)
            try:
                future = work.get_future()
                future.add_done_callback(lambda _: finished.set())  # in a thread of gloo's
                with anyio.move_on_after(ALARM_PERIOD_S):
                    await finished.wait()
                if not finished.is_set() and await self._is_alarmed_before(finished):
                    raise await self._break()
                future.value()
            finally:
                if not finished.is_set():
                    keep_until_done(work, collective, arguments)
        except RuntimeError as error:
            raise await self._break() from error

    async def _is_alarmed_before(self, finished: Signal) -> bool:
        """Wait for a collective, or until another rank has found the channel broken; return whether that came first."""
        alarmed = False

        async def watch() -> None:
            nonlocal alarmed
            while not alarmed:
                with suppress(RuntimeError):  # the store may be out of reach: gloo's own limit holds in any case
                    alarmed = await in_own_thread(
                        "ranks", lambda: self.store.check([f"{self._generation}/alarm"]), STORE_TIMEOUT_S
                    )
                await anyio.sleep(pace(ALARM_PERIOD_S, self.size))
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await finished.wait()
            group.cancel_scope.cancel()
        return alarmed and not finished.is_set()

    async def _break(self) -> ChannelBrokenError:
        self.close()
        try:
            await in_own_thread("ranks", self._raise_alarm, ROLL_CALL_S)
            missing = await in_own_thread("ranks", self._call_roll, ROLL_CALL_LIMIT_S)
        except RuntimeError:
            missing = self._missing_host()
        self._generation += 1
        return ChannelBrokenError(missing)

    def _raise_alarm(self) -> None:
        self.store.add(f"{self._generation}/alarm", 1)  # unlike a `set`, it is answered

    def _missing_host(self) -> tuple[int, ...]:
        """Who is missing when the store is: the process that holds it, which is the first rank's."""
        return (0,) if self.members[0] == 0 and self.rank != 0 else ()

    def _call_roll(self) -> tuple[int, ...]:
        """Check in, wait for the others to do so, and agree on who did not."""
        roll = PrefixStore(str(self._generation), self._store)
        roll.set(f"here/{self.rank}", "")
        present = roll.add("present", 1)
        until = time.monotonic() + pace(ROLL_CALL_S, self.size)
        while present < self.size and time.monotonic() < until and not roll.check(["missing"]):
            time.sleep(pace(_POLL_S, self.size))
            before, present = present, roll.add("present", 0)
            if present > before:
                until = time.monotonic() + pace(ROLL_CALL_S, self.size)
        missing = [rank for rank in range(self.size) if present < self.size and not roll.check([f"here/{rank}"])]
        agreed: Sequence[int] = json.loads(roll.compare_set("missing", "", json.dumps(missing)))
        return tuple(agreed)


def _make_devices(store: Any) -> list[Any]:
    """Make gloo's devices, on the interfaces that are asked for.

    None that connects when there is need to (`lazy_init`): a group of such is not freed while a message is unread.
    """
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [ProcessGroupGloo.create_device(interface=each, lazy_init=False) for each in interfaces.split(",")]
    if address := own_address_towards(store):
        return [ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
    return [ProcessGroupGloo.create_default_device(lazy_init=False)]  # by the host's name


def drop(groups: list[Any]) -> None:
    """Drop the groups in this list, to which nothing else may refer, in a thread, and empty the list.

    A group closes its connections one after the other, and waits for its loop each time, which looks every 10 ms.
    """
    if not any(groups):
        return
    try:
        finish_at_exit(start_thread("ranks", groups.clear))
    except RuntimeError:  # no memory for a thread
        groups.clear()


def keep_until_done(work: Any, *used: object) -> None:
    """Hold on to a collective that was given up: its memory is gloo's until it ends, at its own time limit.

    Its group too: a group's destructor waits for its last collective, in whatever thread frees it. Seen: the cycle
    collector, on the engine's loop, waiting for `timeout`.
    """

    def keep(work: Any, used: tuple[object, ...]) -> None:
        with suppress(RuntimeError):  # how it ended is of no interest any more
            work.wait()

    start_thread("ranks", keep, work, used)
