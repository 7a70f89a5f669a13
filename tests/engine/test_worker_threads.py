"""Threads that can be given up, and that no failure breaks; callbacks and log lines that stop nobody."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
import torch

from aiodcp import Checkpointer, CheckpointManager, MemoryStorage
from aiodcp._engine.callbacks import CallbackThread
from aiodcp._engine.worker_threads import WorkerThreads


def test_work_is_done_by_as_many_threads_as_there_may_be() -> None:
    pool = WorkerThreads(3, "test")
    barrier = threading.Barrier(3)
    assert [future.result(30) >= 0 for future in [pool.submit(barrier.wait, 30) for _ in range(6)]] == [True] * 6
    pool.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test")]
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(print)


def test_an_idle_thread_is_used_before_another_is_started() -> None:
    pool = WorkerThreads(3, "test")
    names = set()
    for _ in range(10):
        names.add(pool.submit(lambda: threading.current_thread().name).result(30))
        while pool._idle == 0:
            time.sleep(0.001)
    assert len(names) == 1
    pool.shutdown()


def test_a_thread_that_cannot_begin_fails_its_work_and_nothing_after_it() -> None:
    fail = [MemoryError("no memory for a thread")]

    def begin() -> None:
        if fail:
            raise fail.pop()

    pool = WorkerThreads(1, "test", begin)
    with pytest.raises(MemoryError, match="no memory"):
        pool.submit(print).result(30)
    while pool._running:
        time.sleep(0.001)
    assert pool.submit(lambda: 3).result(30) == 3
    pool.shutdown()


def test_a_thread_that_cannot_be_started_fails_its_work_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerThreads(2, "test")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(print)
    go_on = threading.Event()
    first = pool.submit(go_on.wait, 30)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        second = pool.submit(lambda: 2)  # waits for the thread that there is
    go_on.set()
    assert first.result(30)
    assert second.result(30) == 2
    pool.shutdown()


def test_a_stuck_thread_is_given_up_and_its_error_reaches_nobody() -> None:
    pool = WorkerThreads(1, "test")
    stuck = threading.Event()
    running, waiting = pool.submit(stuck.wait, 30), pool.submit(print)
    began = time.monotonic()
    pool.shutdown(timeout_s=0.05, cancel_futures=True)
    assert time.monotonic() - began < 10
    assert waiting.cancelled()
    assert all(thread.daemon for thread in pool._running)
    stuck.set()
    assert running.result(30)


def test_callbacks_are_called_in_order_in_one_thread_that_ends(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, str]] = []
    callbacks, done = CallbackThread(), threading.Event()

    def call(number: int) -> None:
        calls.append((number, threading.current_thread().name))
        if number == 1:
            raise SystemExit(3)

    for number in range(3):
        callbacks.call(call, number)
    callbacks.call(done.set)
    assert done.wait(30)
    assert calls == [(number, "aiodcp-callbacks") for number in range(3)]
    assert "SystemExit: 3" in caplog.text
    while any(thread.name == "aiodcp-callbacks" for thread in threading.enumerate()):
        time.sleep(0.001)


request: ContextVar[str] = ContextVar("request")


class FromContext(logging.Filter):
    """Reads a context variable, as many applications' filters do; threads do not have it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request = request.get()
        return True


@pytest.fixture
def raising_filter() -> Iterator[None]:
    logger, handler = logging.getLogger("aiodcp"), logging.NullHandler()
    handler.handle = handler.filter  # type: ignore[method-assign] # a NullHandler asks no filter
    handler.addFilter(FromContext())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.usefixtures("raising_filter")
async def test_a_filter_that_raises_in_the_callers_thread_stops_nobody_either() -> None:
    async with CheckpointManager("root", checkpointer=Checkpointer(storage=MemoryStorage())) as manager:
        await (await manager.save(1, {"w": torch.ones(3)}))
    assert manager.steps() == [1]


@pytest.mark.usefixtures("raising_filter")
async def test_a_signal_is_heard_although_the_log_raises() -> None:
    async with CheckpointManager(
        "root", checkpointer=Checkpointer(storage=MemoryStorage()), signals=[signal.SIGTERM]
    ) as manager:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(manager.preempted, 30)


@pytest.mark.usefixtures("raising_filter")
async def test_a_filter_that_raises_in_a_thread_of_ours_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    token = request.set("here, and in no thread")
    reported: list[str] = []
    storage = MemoryStorage()
    async with CheckpointManager(
        "root", checkpointer=Checkpointer(storage=storage), on_event=lambda event: reported.append(type(event).__name__)
    ) as manager:
        ckpt = await manager.save(1, {"w": torch.ones(3)})
        await ckpt.uploaded
        manager.preempt("a test")
        await manager.preempted  # its thread logs, too
        assert await manager.restore({"w": torch.zeros(3)}) == 1
    request.reset(token)
    assert reported == ["SaveBegan", "SaveFinished", "Restored"]
    assert "a handler of the logger 'aiodcp' failed" in capsys.readouterr().err
