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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyio import CancelScope
from anyio.lowlevel import RunVar

from .._log import SafeLogger
from .base import INTERNAL_DIRECTORY, Storage, remove_all

log: SafeLogger = SafeLogger(__name__)

_SHARED, _EXCLUSIVE = "lease-shared-", "lease-exclusive-"

LEASE_S = 60.0  # by default

RENEWALS = 3  # in the time that a lease is held without one

LOOK_AGAIN_S = 0.5

REMOVALS = 3  # attempts

_own: set[str] = set()  # leases that this process holds: what it could not remove is none


class DatedFiles(Protocol):
    """What leases need of their storage."""

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None: ...
    async def get(self, checkpoint_id: str, name: str) -> bytes: ...
    async def dates(self, checkpoint_id: str) -> dict[str, float]: ...
    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None: ...


class AnyDatedFiles:
    """The same of any storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self._storage.put(checkpoint_id, name, data)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        return await self._storage.get(checkpoint_id, name)

    async def dates(self, checkpoint_id: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in await self._storage.list_files(checkpoint_id):
            try:
                async with self._storage.open(checkpoint_id, name) as reader:
                    found[name] = reader.modified_at if reader.modified_at is not None else time.time()
            except FileNotFoundError:  # removed meanwhile
                continue
        return found

    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None:
        await remove_all(self._storage, checkpoint_id, names)
        await self._storage.remove_if_empty(checkpoint_id, made_by_anyone=True)


@dataclass(slots=True)
class _Held:
    """A lease of this process, on one loop."""

    name: str
    renewing: asyncio.Task[None] | None = None
    holders: int = 0
    is_ready: bool = False
    begun: asyncio.Lock = field(default_factory=asyncio.Lock)


class Leases:
    """The leases of one storage."""

    def __init__(self, files: DatedFiles, *, lease_s: float = LEASE_S) -> None:
        self._files = files
        self._lease_s = lease_s
        self._shared: RunVar[dict[str, _Held]] = RunVar("leases")  # by root, for each event loop

    @asynccontextmanager
    async def hold(self, root: str, *, exclusive: bool) -> AsyncIterator[bool]:
        """Hold a lease on `root` while the block runs; see `Storage.lock`. It may be left by another task."""
        if exclusive:
            async with self._hold_exclusive(root) as is_held:
                yield is_held
            return
        known = self._known()
        held = known.setdefault(root, _Held(f"{_SHARED}{uuid.uuid4().hex}"))
        held.holders += 1
        try:
            async with held.begun:
                if held.renewing is None:
                    held.renewing = await self._begin(root, held.name)
                if not held.is_ready:
                    await self._wait_for_exclusive(root, held.name)
                    held.is_ready = True
            yield True
        finally:
            held.holders -= 1
            if not held.holders:
                known.pop(root, None)
                await self._end(root, held)

    def _known(self) -> dict[str, _Held]:
        known = self._shared.get(None)
        if known is None:
            known = {}
            self._shared.set(known)
        return known

    @asynccontextmanager
    async def _hold_exclusive(self, root: str) -> AsyncIterator[bool]:
        held = _Held(f"{_EXCLUSIVE}{uuid.uuid4().hex}")
        try:
            held.renewing = await self._begin(root, held.name)
            live, dead = await self._others(root, held.name)
            if not live and dead:
                await self._files.remove_all(_place(root), dead)
            yield not live
        finally:
            await self._end(root, held)

    async def _begin(self, root: str, name: str) -> asyncio.Task[None]:
        _own.add(name)
        await self._files.put(_place(root), name, _who())
        return asyncio.create_task(self._renew(root, name), name=f"aiodcp lease {name}")

    async def _end(self, root: str, held: _Held) -> None:
        with CancelScope(shield=True):
            if held.renewing is not None:
                held.renewing.cancel()
                await asyncio.wait([held.renewing])
            _own.discard(held.name)
            for attempt in range(REMOVALS):
                try:
                    await self._files.remove_all(_place(root), [held.name])
                    return
                except OSError as error:  # it ends by itself, in time
                    log.debug("%s/%s could not be removed: %s", _place(root), held.name, error)
                await asyncio.sleep(attempt * LOOK_AGAIN_S / REMOVALS)

    async def _renew(self, root: str, name: str) -> None:
        renewed = time.monotonic()
        wait_s = self._lease_s / RENEWALS
        while True:
            await asyncio.sleep(wait_s)
            try:
                await self._files.put(_place(root), name, _who())
            except OSError as error:
                lost_s = time.monotonic() - renewed
                say = log.error if lost_s > self._lease_s else log.warning
                say("%s: the lease could not be renewed for %.0f s: %s", root, lost_s, error)
                wait_s = self._lease_s / RENEWALS / 4
            else:
                renewed, wait_s = time.monotonic(), self._lease_s / RENEWALS

    async def _wait_for_exclusive(self, root: str, own: str) -> None:
        waited = False
        while any(name.startswith(_EXCLUSIVE) for name in (await self._others(root, own))[0]):
            if not waited:
                log.debug("%s: waiting for another process that clears up there", root)
            waited = True
            await asyncio.sleep(min(LOOK_AGAIN_S, self._lease_s / RENEWALS))

    async def _others(self, root: str, own: str) -> tuple[list[str], list[str]]:
        """Return the names of the leases of others that are held, and of those that are not any more."""
        times = await self._files.dates(_place(root))
        leases = {name: at for name, at in times.items() if name.startswith((_SHARED, _EXCLUSIVE)) and name != own}
        now = times.get(own) or max(times.values(), default=None)
        live: list[str] = []
        dead: list[str] = []
        for name, at in leases.items():
            is_old = now is not None and now - at > self._lease_s
            (dead if is_old or await self._is_of_dead(root, name) else live).append(name)
        return sorted(live), sorted(dead)

    async def _is_of_dead(self, root: str, name: str) -> bool:
        """Whether the holder was a process of this machine that is gone: of a run, say, that is begun anew at once."""
        try:
            return _is_dead(name, await self._files.get(_place(root), name))
        except FileNotFoundError:  # released meanwhile
            return True
        except OSError:
            return False


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


def _who() -> bytes:
    """Return who holds a lease, for people and for `_is_dead`; never twice the same: a PUT is known by its content."""
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine()}
    return json.dumps({**holder, "renewal": uuid.uuid4().hex}).encode()


def _is_dead(name: str, content: bytes) -> bool:
    try:
        holder = json.loads(content)
        pid, started, machine = int(holder["pid"]), str(holder["started"]), str(holder["machine"])
    except (ValueError, KeyError, TypeError):
        return False
    if not machine.strip() or not started or machine != _machine():
        return False
    return name not in _own if pid == os.getpid() and started == _started(pid) else started != _started(pid)
