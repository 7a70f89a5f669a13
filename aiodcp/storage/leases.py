"""Locks where the system has none: small files that whoever holds one writes again and again.

    root/.aiodcp/lease-shared-<id>       a process saves below root
    root/.aiodcp/lease-exclusive-<id>    a process removes what is left there
    root/step-10/.aiodcp/lease-...       likewise, a process reads that step, or removes it

A file's time is the storage's, so ages need no clock of ours: a lease is held while its file is younger than a
bound, compared with the lease that the asker has just written. Who wants to remove writes an exclusive lease, looks,
and gives way to any other one; who wants to save writes a shared one, looks, and waits for exclusive ones to end. Each
writes before it looks, and stores list what has been written before: of two, one sees the other.

A process that is suspended for longer than the bound is taken for dead. What it was writing may be removed then; its
commit looks whether all is there, so it fails, and is not torn.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import CancelScope
from anyio.lowlevel import RunVar

from .._log import SafeLogger
from .base import INTERNAL_DIRECTORY, Storage, file_dates, remove_all

log: SafeLogger = SafeLogger(__name__)

_SHARED, _EXCLUSIVE = "lease-shared-", "lease-exclusive-"

LEASE_S = 60.0  # by default

RENEWALS = 3  # in the time that a lease is held without one

LOOK_AGAIN_S = 0.5

REMOVALS = 3  # attempts

PROBE = "probe-"  # what a store was tried with, and what may be left of that

_own: set[str] = set()  # leases that this process holds: what it could not remove is none


class _Lease:
    """One file, written again and again until it is released."""

    def __init__(self, storage: Storage, root: str, kind: str, lease_s: float) -> None:
        self.name = f"{kind}{uuid.uuid4().hex}"
        self._storage = storage
        self._root = root
        self._lease_s = lease_s
        self._released = asyncio.Event()
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> None:
        _own.add(self.name)
        await _to_its_end(self._write())
        self._renewing = asyncio.create_task(self._renew(), name=f"aiodcp lease {self.name}")

    async def release(self) -> None:
        await _to_its_end(self._release())

    async def _write(self) -> None:
        await self._storage.put(_place(self._root), self.name, _who(self._lease_s))

    async def _release(self) -> None:
        self._released.set()
        if self._renewing is not None:
            await self._renewing  # one that is under way, if any: it would bring the file back
        _own.discard(self.name)
        place = _place(self._root)
        for attempt in range(REMOVALS):
            try:
                await remove_all(self._storage, place, [self.name])
                await self._storage.remove_if_empty(place, made_by_anyone=True)
                return
            except OSError as error:  # it ends by itself, in time
                log.debug("%s/%s could not be removed: %s", place, self.name, error)
            await asyncio.sleep(attempt * LOOK_AGAIN_S / REMOVALS)

    async def _renew(self) -> None:
        renewed, is_lost = time.monotonic(), False
        wait_s = self._lease_s / RENEWALS
        while not await self._is_released_within(wait_s):
            try:
                await self._write()
            except OSError as error:
                lost_s = time.monotonic() - renewed
                if wait_s == self._lease_s / RENEWALS:
                    log.warning("%s: the lease could not be renewed, trying again: %s", self._root, error)
                elif not is_lost and lost_s > self._lease_s:
                    is_lost = True
                    log.error("%s: the lease is lost, after %.0f s without a renewal: %s", self._root, lost_s, error)
                wait_s = self._lease_s / RENEWALS / 4
            else:
                renewed, is_lost, wait_s = time.monotonic(), False, self._lease_s / RENEWALS

    async def _is_released_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._released.wait()
        except TimeoutError:
            return False
        return True


class _Shared:
    """A lease that several holders of this process share, on one loop."""

    def __init__(self, lease: _Lease) -> None:
        self.lease = lease
        self.holders = 0
        self.is_ready = False
        self.beginning = asyncio.Lock()


class Leases:
    """The leases of one storage."""

    def __init__(self, storage: Storage, *, lease_s: float = LEASE_S) -> None:
        self._storage = storage
        self._lease_s = lease_s
        self._shared: RunVar[dict[str, _Shared]] = RunVar("leases")  # by root, for each event loop

    @asynccontextmanager
    async def hold(self, root: str, *, exclusive: bool) -> AsyncIterator[bool]:
        """Hold a lease on `root` while the block runs; see `Storage.lock`. It may be left by another task."""
        if exclusive:
            async with self._hold_exclusive(root) as is_held:
                yield is_held
            return
        known = self._known()
        if root not in known:
            known[root] = _Shared(_Lease(self._storage, root, _SHARED, self._lease_s))
        shared = known[root]
        shared.holders += 1
        try:
            async with shared.beginning:
                if not shared.is_ready:
                    await shared.lease.take()
                    await self._wait_for_exclusive(root, shared.lease.name)
                    shared.is_ready = True
            yield True
        finally:
            shared.holders -= 1
            if not shared.holders:
                known.pop(root, None)
                await shared.lease.release()

    def is_held(self, root: str) -> bool:
        """Whether this process holds a shared lease on `root`, on this loop."""
        return root in self._known() and self._known()[root].is_ready

    def _known(self) -> dict[str, _Shared]:
        known = self._shared.get(None)
        if known is None:
            known = {}
            self._shared.set(known)
        return known

    @asynccontextmanager
    async def _hold_exclusive(self, root: str) -> AsyncIterator[bool]:
        lease = _Lease(self._storage, root, _EXCLUSIVE, self._lease_s)
        try:
            await lease.take()
            live, dead = await self._others(root, lease.name)
            if not live and dead:
                await remove_all(self._storage, _place(root), dead)
            yield not live
        finally:
            await lease.release()

    async def _wait_for_exclusive(self, root: str, own: str) -> None:
        waited = False
        while any(name.startswith(_EXCLUSIVE) for name in (await self._others(root, own))[0]):
            if not waited:
                log.debug("%s: waiting for another process that clears up there", root)
            waited = True
            await asyncio.sleep(min(LOOK_AGAIN_S, self._lease_s / RENEWALS))

    async def _others(self, root: str, own: str) -> tuple[list[str], list[str]]:
        """Return the names of the leases of others that are held, and of those that are not any more."""
        dates = await file_dates(self._storage, _place(root))
        now = max(dates.values(), default=0.0)  # of `own`, most likely: it has just been written
        live: list[str] = []
        dead: list[str] = []
        for name, at in dates.items():
            if name.startswith((_SHARED, _EXCLUSIVE)) and name != own:
                (live if await self._is_live(root, name, now - at) else dead).append(name)
            elif name.startswith(PROBE) and now - at > self._lease_s:
                dead.append(name)
        return sorted(live), sorted(dead)

    async def _is_live(self, root: str, name: str, age_s: float) -> bool:
        """Whether a lease of that age is held: for as long as its holder has said, and while that one may be alive."""
        try:
            holder = _holder(await self._storage.get(_place(root), name))
        except FileNotFoundError:  # released meanwhile
            return False
        except OSError:
            holder = {}
        bound_s = holder.get("lease_s")
        if age_s > (bound_s if isinstance(bound_s, int | float) else self._lease_s):
            return False
        return not _is_dead(name, holder)


@asynccontextmanager
async def unless_leased(storage: Storage, checkpoint_id: str) -> AsyncIterator[bool]:
    """Hold off new leases of a checkpoint while the block removes it; its value is False if it is leased."""
    async with Leases(storage).hold(checkpoint_id, exclusive=True) as is_free:
        yield is_free


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait until `work` is done, also if the caller is cancelled: a request that is given up may take effect later."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with CancelScope(shield=True):
            await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("after the caller was cancelled: %s", error)
        raise


def _place(root: str) -> str:
    return f"{root}/{INTERNAL_DIRECTORY}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _started(pid: int | str) -> str:
    """Return when a process of this machine began, in the system's ticks; nothing if there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _machine() -> str:
    """Return what two processes share that can see each other."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{_read('/proc/sys/kernel/random/boot_id').strip()} {pids}"


def _who(lease_s: float) -> bytes:
    """Return who holds a lease, and for how long; never twice the same: a PUT is known by its content."""
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine()}
    return json.dumps({**holder, "lease_s": lease_s, "renewal": uuid.uuid4().hex}).encode()


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(name: str, holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone: of a run, say, that is begun anew at once."""
    pid, started, machine = holder.get("pid"), holder.get("started"), holder.get("machine")
    if type(pid) is not int or not started or machine != _machine() or not str(machine).strip():
        return False
    if pid == os.getpid() and started == _started(pid):
        return name not in _own
    return bool(started != _started(pid))
