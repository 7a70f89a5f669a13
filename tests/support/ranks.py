"""Worlds of real processes for tests of several ranks: started once, used by many tests.

def check(rank: int, size: int, ...) -> Any:  # at the top level of the test file: runs in each process
    ...

world.run(3, check, ...)  # on ranks 0, 1 and 2 of a fresh process group; returns the results by rank

@rank_test(2)  # where there is nothing to do with the results
async def test_that_something_is_true(rank: int, size: int, tmp_path: Path) -> None:
    ...
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

# By the process that ranks are forked from: to import them takes each rank three seconds, and many are killed.
PRELOADED = ["torch.distributed.fsdp", "aiodcp.checkpointer.checkpointer"]

LIMIT_S = 60.0  # for one function on all ranks: beyond it the processes print their stacks and end


class Killed:
    """What a rank returned that ended itself."""


class World:
    """Processes that wait for functions to run."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def _start(self) -> tuple[BaseProcess, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def run(self, size: int, function: Callable[..., Any], *args: Any, killed: bool = False) -> list[Any]:
        """Run `function(rank, size, *args)` on `size` ranks. With `killed` a rank may end: its result is `Killed`."""
        while len(self._workers) < size:
            self._workers.append(self._start())
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here: it outlives any rank
        for rank in range(size):
            self._workers[rank][1].send((rank, size, store.port, function, args))
        results: dict[int, Any] = {}
        while len(results) < size:
            waiting = {self._workers[rank][1]: rank for rank in range(size) if rank not in results}
            ready = wait(list(waiting), LIMIT_S)
            if not ready:
                self.close()
                reported = "\n".join(each.args[0] for each in results.values() if isinstance(each, _FailedError))
                raise TimeoutError(f"{function}: no answer from ranks {sorted(waiting.values())}\n{reported}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    results[rank] = connection.recv()
                except EOFError:
                    results[rank] = Killed()
                    self._workers[rank] = self._start()
        failed = [
            f"--- rank {rank}\n{result.args[0]}" for rank, result in results.items() if isinstance(result, _FailedError)
        ]
        dead = [rank for rank, result in results.items() if isinstance(result, Killed)]
        if failed or (dead and not killed):
            raise AssertionError("\n".join([*failed, *(f"--- rank {rank} died" for rank in dead)]))
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()  # prints the stacks
            process.join(5)
            process.kill()
        self._workers.clear()


RankBody = Callable[[int, int, Path], Any]

_bodies: dict[tuple[str, str], RankBody] = {}  # of rank tests, by module and name: each rank imports them itself


@dataclass(frozen=True, slots=True)
class _Body:
    """The body of a rank test, by its name: what can be sent to the ranks."""

    module: str
    name: str

    def __call__(self, rank: int, size: int, tmp_path: Path) -> None:
        import_module(self.module)
        result = _bodies[self.module, self.name](rank, size, tmp_path)
        if inspect.iscoroutine(result):
            asyncio.run(result)


@contextmanager
def as_under_torchrun(rank: int, size: int) -> Iterator[None]:
    """Tell frameworks, for the time of the block, what torchrun would."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "run"}.items():
            patch.setenv(name, str(value))
        yield


def rank_test(size: int) -> Callable[[RankBody], Callable[[World, Path], None]]:
    """Make a test of a function, or coroutine function, that all ranks run: `test(rank, size, tmp_path)`."""

    def decorate(body: RankBody) -> Callable[[World, Path], None]:
        name = body.__name__
        _bodies[body.__module__, name] = body

        def test(world: World, tmp_path: Path) -> None:
            world.run(size, _Body(body.__module__, name), tmp_path)

        test.__name__, test.__qualname__, test.__module__, test.__doc__ = name, name, body.__module__, body.__doc__
        return test

    return decorate


class _FailedError(Exception):
    """A rank's traceback."""


def _work(connection: Connection) -> None:
    import signal

    import torch
    import torch.distributed as dist

    faulthandler.register(signal.SIGTERM, chain=True)
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, port, function, args = connection.recv()
        except EOFError:
            return
        try:
            store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
            try:
                result = function(rank, size, *args)
            finally:
                dist.destroy_process_group()
        except Exception:
            result = _FailedError(traceback.format_exc())
        connection.send(result)
