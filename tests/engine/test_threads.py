"""What is asked of threads, and what is not."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodcp import Checkpointer, ClosedError
from aiodcp._engine.loop import Engine
from aiodcp._engine.threads import in_thread_if_long
from aiodcp._engine.worker_threads import WorkerThreads
from aiodcp._load import loader
from aiodcp._load.small_reads import SmallSpan

from ..support.states import assert_equal, blank

ASKED = 13  # a save of a few values, of which 10 are for files, two to stage

ASKED_TO_LOAD = 3  # two of them open files


async def test_what_is_short_is_done_here() -> None:
    threads = WorkerThreads(1, "test")
    try:
        for is_short in (True, False):
            where = await in_thread_if_long(is_short, threads, threading.current_thread)
            assert (where is threading.current_thread()) is is_short
    finally:
        threads.shutdown()


async def test_a_small_save_and_load_ask_threads_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    submit = WorkerThreads.submit

    def count(threads: WorkerThreads, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        asked.append(fn)
        return submit(threads, fn, *args, **kwargs)

    monkeypatch.setattr(WorkerThreads, "submit", count)
    state = {f"w{number}": torch.full((16,), float(number)) for number in range(8)} | {"step": 3}
    target = blank(state)
    async with Checkpointer() as checkpointer:
        for number in range(2):
            asked.clear()
            await (await checkpointer.save(state, tmp_path / str(number))).uploaded
            assert 0 < len(asked) <= ASKED
        asked.clear()
        await checkpointer.load(target, tmp_path / "0")
        assert 0 < len(asked) <= ASKED_TO_LOAD
    assert_equal(state, target)


async def test_what_takes_bytes_in_any_number_is_not_done_in_the_engines_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            where.setdefault(name, set()).add(threading.current_thread().name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(SmallSpan, "fill")
    watch(loader, "fill_whole")
    few = {"w": torch.ones(16)}
    many = {f"w{number}": torch.ones(50_000) for number in range(8)} | {"sparse": torch.eye(3).to_sparse()}
    async with Checkpointer() as checkpointer:
        for state, is_engine in ((few, True), (many, False)):
            where.clear()
            path = tmp_path / str(is_engine)
            await (await checkpointer.save(state, path)).uploaded
            await checkpointer.load({name: torch.zeros_like(value) for name, value in state.items()}, path)
            assert where.keys() == {"fill", "fill_whole"}
            assert all((names == {"aiodcp-engine"}) is is_engine for names in where.values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio's own, of a loop half made
def test_without_a_descriptor_entering_is_refused_and_possible_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", no_descriptor)  # of every event loop
        with pytest.raises(ClosedError, match=r"an event loop cannot be opened: .*Too many open files"):
            Checkpointer().__enter__()
        with pytest.raises(ClosedError, match=r"the engine's event loop cannot be opened: .*Too many open files"):
            Engine(copy_threads=1, io_threads=1).start()
    with Checkpointer():
        pass
