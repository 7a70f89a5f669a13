"""Worlds of real processes for tests of several ranks: started once, used by many tests.

def check(rank: int, size: int, ...) -> Any:  # at the top level of the test file: runs in each process
    ...

world.run(3, check, ...)  # on ranks 0, 1 and 2 of a fresh process group; returns the results by rank
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch._C._distributed_c10d import TCPStore

LIMIT_S = 60.0  # for one function on all ranks: beyond it the processes are reported to print their stacks and end


class Killed:
    """What a rank returned that ended itself."""


class World:
    """Processes that wait for functions to run."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._context = multiprocessing.get_context("spawn")

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
                raise TimeoutError(f"{function.__name__}: no answer from ranks {sorted(waiting.values())}\n{reported}")
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
