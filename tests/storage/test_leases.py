"""Locks of stores that have none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from aiodcp import Checkpointer, CheckpointManager, LeftoverRemoved, ObjectStorage
from aiodcp.manager import step_saves
from aiodcp.storage import leases
from aiodcp.storage.base import INTERNAL_DIRECTORY
from tests.support.object_servers import FaultProxy, S3Server, always

HOLDER = """
import asyncio, sys
sys.path.insert(0, {path!r})
from tests.support.object_servers import S3Server

async def main() -> None:
    async with S3Server({endpoint!r}).storage(lease_s={lease_s}).lock({url!r}, exclusive=False):
        print("held", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def another_process(s3: S3Server, url: str, *, lease_s: float = 60.0) -> AsyncIterator[subprocess.Popen[str]]:
    """Have another process hold a shared lock."""
    program = HOLDER.format(path=os.getcwd(), endpoint=s3.endpoint, url=url, lease_s=lease_s)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "held\n"
        try:
            yield process
        finally:
            process.kill()


async def _is_exclusive(storage: ObjectStorage, url: str) -> bool:
    async with storage.lock(url, exclusive=True) as held:
        return held


async def test_a_lock_holds_against_other_processes_and_ends_with_them(s3: S3Server) -> None:
    url, storage = s3.url(), s3.storage()
    async with another_process(s3, url) as process:
        assert not await _is_exclusive(storage, url)
        async with storage.lock(url, exclusive=False) as together:
            assert together
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        assert await _is_exclusive(storage, url)  # a process of this machine that is gone: known at once
    assert s3.keys(url) == []


async def test_a_holder_elsewhere_is_dead_when_it_has_not_renewed_by_the_stores_clock(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, storage = s3.url(), s3.storage(lease_s=2.5)
    async with another_process(s3, url, lease_s=2.5) as process:
        monkeypatch.setattr(leases, "_machine", lambda: "another one")
        for _ in range(2):
            await asyncio.sleep(1.5)  # longer than it would be held without being renewed
            assert not await _is_exclusive(storage, url)
        process.send_signal(signal.SIGSTOP)
        while not await _is_exclusive(storage, url):
            await asyncio.sleep(0.3)
        process.send_signal(signal.SIGCONT)


async def test_a_shared_lock_waits_for_an_exclusive_one_of_another_storage(s3: S3Server) -> None:
    url = s3.url()
    one, other = s3.storage(), s3.storage()
    async with one.lock(url, exclusive=True) as held:
        assert held
        waiting = asyncio.ensure_future(_shared(other, url))
        while not any("shared" in key for key in s3.keys(url)):
            await asyncio.sleep(0.01)
        assert not await _is_exclusive(other, url)
        assert not waiting.done()
    assert await waiting
    assert s3.keys(url) == []


async def _shared(storage: ObjectStorage, url: str) -> bool:
    async with storage.lock(url, exclusive=False) as held:
        return held


async def test_locks_of_one_storage_share_a_lease(proxy: FaultProxy) -> None:
    url, storage = proxy.server.url(), proxy.server.storage()
    async with storage.lock(url, exclusive=False):
        asked = len(proxy.requests)
        async with storage.lock(url, exclusive=False):
            assert len(proxy.requests) == asked
        assert len(proxy.upstream.keys(url)) == 1
    assert proxy.upstream.keys(url) == []


@pytest.mark.parametrize("moment_s", [0.0, 0.08, 0.16, 0.25])
async def test_a_renewal_that_is_under_way_when_the_block_is_left_brings_no_lease_back(
    proxy: FaultProxy, moment_s: float
) -> None:
    proxy.fault = always("slow", verb="PUT")
    url, storage = proxy.server.url(), proxy.server.storage(lease_s=0.3)

    async def hold() -> None:
        async with storage.lock(url, exclusive=False):
            await asyncio.sleep(60)

    holding = asyncio.ensure_future(hold())
    await asyncio.sleep(0.1 + moment_s)
    holding.cancel()
    await asyncio.wait([holding])
    await asyncio.sleep(0.3)  # longer than a PUT takes
    assert proxy.upstream.keys(url) == []


async def test_a_lease_is_held_for_as_long_as_its_holder_has_said(s3: S3Server) -> None:
    url, patient, hasty = s3.url(), s3.storage(lease_s=60.0), s3.storage(lease_s=0.5)
    async with patient.lock(url, exclusive=False):
        await asyncio.sleep(1.7)  # the store's clock has seconds
        assert not await _is_exclusive(hasty, url)


async def test_a_lease_that_cannot_be_removed_or_renewed_is_reported_and_ends_by_itself(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    url, storage = proxy.server.url(), proxy.server.storage(lease_s=0.3)
    async with storage.lock(url, exclusive=False):
        proxy.fault = always("forbid", verb="PUT", name="lease")
        while "could not be renewed" not in caplog.text:
            await asyncio.sleep(0.05)
        proxy.fault = always("forbid", verb="DELETE")
    assert len(proxy.upstream.keys(url)) == 1
    proxy.fault = lambda request: None
    assert await _is_exclusive(storage, url)
    assert proxy.upstream.keys(url) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"pid": "x"}', b"\xff", json.dumps({"pid": 1}).encode()])
async def test_a_lease_that_says_nothing_is_held(s3: S3Server, content: bytes) -> None:
    url, storage = s3.url(), s3.storage()
    await storage.put(f"{url}/{INTERNAL_DIRECTORY}", "lease-shared-of-another-version", content)
    assert not await _is_exclusive(storage, url)


async def test_a_manager_leaves_no_lease_and_hides_its_own(s3: S3Server) -> None:
    url = s3.url()

    async with CheckpointManager(url, checkpointer=Checkpointer(storage=s3.storage())) as manager:
        await (await manager.save(1, {"w": torch.ones(1)})).uploaded
        assert any(INTERNAL_DIRECTORY in key for key in s3.keys(url))
        assert await s3.storage().list_children(url) == ["step-1"]
    assert not any("lease" in key for key in s3.keys(url))


async def test_leftovers_of_a_process_elsewhere_are_removed_once_its_lease_is_old(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed just before the next one began, on another machine: the first save cannot know that."""
    monkeypatch.setattr(step_saves, "CLEAR_AGAIN_S", 0.5)
    url, storage = s3.url(), s3.storage(lease_s=1.0)
    lease = json.dumps({"pid": 1, "started": "1", "machine": "another one"}).encode()
    await storage.put(f"{url}/{INTERNAL_DIRECTORY}", "lease-shared-of-the-dead", lease)
    leftover = f"__0_0_{'0' * 32}.distcp"
    await storage.put(f"{url}/step-7", leftover, b"half of it")
    events: list[object] = []
    manager = CheckpointManager(url, checkpointer=Checkpointer(storage=storage), on_event=events.append)
    async with manager:
        await (await manager.save(1, {"w": torch.ones(1)})).uploaded
        assert f"step-7/{leftover}" in s3.keys(url)
        while f"step-7/{leftover}" in s3.keys(url):
            await asyncio.sleep(0.3)
            await (await manager.save(1, {"w": torch.ones(1)})).uploaded
        assert not await _is_exclusive(s3.storage(), url)  # the manager holds the root again
    assert [event.step for event in events if isinstance(event, LeftoverRemoved)] == [7]
    assert not any("lease" in key for key in s3.keys(url))
