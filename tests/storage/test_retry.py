"""What storage refuses for the moment is tried again; what it refuses for good is not."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointManager,
    Event,
    LocalStorage,
    ReadError,
    Retried,
    Retry,
    SaveCancelled,
    WriteError,
)
from aiodcp._save.bounded_staging import MIN_NBYTES
from aiodcp.checkpointer.checkpointer import session_of
from aiodcp.testing import FaultyStorage

from ..support.states import assert_equal, blank, make_state

SOON = Retry(wait_s=0.001)


def failing(call: str, times: int, code: int = errno.ETIMEDOUT) -> tuple[Callable[[str], None], Counter[str]]:
    """A gate that refuses the first `times` calls of a kind, and counts all calls."""
    seen: Counter[str] = Counter()

    def gate(name: str) -> None:
        seen[name] += 1
        if name == call and seen[name] <= times:
            raise OSError(code, "not now")

    return gate, seen


@pytest.mark.parametrize("max_host_bytes", [None, MIN_NBYTES])
@pytest.mark.parametrize("call", ["create", "write", "sync", "put", "get", "open", "read", "remove"])
async def test_what_fails_twice_succeeds_the_third_time(
    call: str, max_host_bytes: int | None, faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(1) | {"large": torch.randn(1 << 19)}
    async with Checkpointer(storage=faulty, retry=SOON, max_host_bytes=max_host_bytes) as checkpointer:
        await (await checkpointer.save(make_state(0), "a")).uploaded
    faulty.gate, seen = failing(call, 2)
    with caplog.at_level(logging.WARNING, "aiodcp"):
        async with Checkpointer(storage=faulty, retry=SOON, max_host_bytes=max_host_bytes) as checkpointer:
            ckpt = await checkpointer.save(state, "a")
            if max_host_bytes is not None and call in ("create", "sync"):  # what was staged is gone by then
                with pytest.raises(WriteError, match="not now"):
                    await ckpt
                return
            await ckpt
            assert ckpt.progress.bytes_written == ckpt.progress.bytes_total
            target = blank(state)
            await checkpointer.load(target, "a")
            assert_equal(state, target)
    assert seen[call] >= 3
    assert len([record for record in caplog.records if "retrying in" in record.getMessage()]) == 2
    assert len(faulty.files["a"]) == 2


async def test_a_third_failure_is_final_and_reported(faulty: FaultyStorage) -> None:
    faulty.gate, seen = failing("sync", 3)
    async with Checkpointer(storage=faulty, retry=SOON) as checkpointer:
        with pytest.raises(WriteError, match="not now") as caught:
            await (await checkpointer.save(make_state(1), "a")).uploaded
        assert isinstance(caught.value.__cause__, OSError)
        assert seen["create"] == 3
        assert not faulty.files.get("a")
        await (await checkpointer.save(make_state(1), "a")).uploaded
        faulty.gate, seen = failing("read", 3)
        with pytest.raises(ReadError, match="not now"):
            await checkpointer.load(blank(make_state(1)), "a")


@pytest.mark.parametrize(
    ("retry", "code"),
    [
        (SOON, errno.ENOSPC),
        (SOON, errno.EACCES),
        (Retry(attempts=1), errno.ETIMEDOUT),
        (Retry(is_transient=lambda error: False), errno.ETIMEDOUT),
    ],
)
async def test_what_is_not_worth_another_attempt_fails_at_once(retry: Retry, code: int, faulty: FaultyStorage) -> None:
    faulty.gate, seen = failing("write", 1, code)
    async with Checkpointer(storage=faulty, retry=retry) as checkpointer:
        with pytest.raises(WriteError, match="not now"):
            await (await checkpointer.save(make_state(1), "a")).uploaded
    assert seen["create"] == 1


async def test_a_save_that_waits_to_try_again_can_be_cancelled(faulty: FaultyStorage) -> None:
    faulty.gate, _ = failing("write", 99)
    async with Checkpointer(storage=faulty, retry=Retry(wait_s=600.0, max_wait_s=600.0)) as checkpointer:
        waiting = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(*_: object) -> None:
            loop.call_soon_threadsafe(waiting.set)

        session_of(checkpointer).on_retry(tell)
        ckpt = await checkpointer.save(make_state(1), "a")
        await waiting.wait()
        ckpt.cancel()
        with pytest.raises(SaveCancelled):
            await ckpt
    assert not faulty.files.get("a")


async def test_a_manager_counts_and_tells(faulty: FaultyStorage) -> None:
    reported: list[Event] = []
    faulty.gate, _ = failing("put", 1, errno.ESTALE)
    checkpointer = Checkpointer(storage=faulty, retry=SOON)
    async with CheckpointManager("root", checkpointer=checkpointer, on_event=reported.append) as manager:
        ckpt = await manager.save(7, make_state(1))
        assert ckpt is not None
        await ckpt
        assert manager.stats.retried == 1
    [retried] = [each for each in reported if isinstance(each, Retried)]
    assert (retried.step, retried.attempt.number, retried.attempt.error.errno) == (7, 1, errno.ESTALE)
    assert retried.path == "memory:root/step-7/.metadata"
    assert retried.attempt.wait_s <= 0.001


async def test_waits_grow_and_are_never_longer_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)

    async def fails() -> None:
        raise TimeoutError

    waits: list[float] = []
    with pytest.raises(TimeoutError):
        await Retry(attempts=50, wait_s=1.0, max_wait_s=5.0).call(fails, lambda each: waits.append(each.wait_s))
    assert len(waits) == 49
    assert waits == slept
    assert waits[0] <= 1.0
    assert 2.0 < max(waits) <= 5.0


@pytest.mark.parametrize("given", [{"attempts": 0}, {"attempts": 1.5}, {"wait_s": -1}, {"max_wait_s": float("inf")}])
def test_what_cannot_be_meant_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{next(iter(given))}: "):
        Retry(**given)


def test_a_checkpointer_takes_no_other_retry() -> None:
    with pytest.raises(ArgumentError, match=r"^retry: "):
        Checkpointer(retry=3)  # type: ignore[arg-type]


async def test_a_file_system_is_tried_again_too(tmp_path: Path) -> None:
    class Flaky(LocalStorage):
        failures = 2

        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "Input/output error")
            await super().put(checkpoint_id, name, data)

    async with Checkpointer(storage=Flaky(), retry=SOON) as checkpointer:
        await (await checkpointer.save(make_state(1), tmp_path)).uploaded
        target = blank(make_state(1))
        await checkpointer.load(target, tmp_path)
        assert_equal(make_state(1), target)
