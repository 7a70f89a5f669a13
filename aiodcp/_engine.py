"""The engine: an event loop of its own in one background thread, and the threads that work for it.

A training step blocks the caller's loop for as long as it runs. Nothing of a save runs there: flows are coroutines
on the engine's loop, copies and checksums are in its executors, and aiofiles uses that loop's default executor.
This is the one file that knows about threads.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar, TypeVarTuple

import torch
from anyio import CancelScope
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .errors import ClosedError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NAME = "aiodcp"

_limiting = threading.Lock()
_left_behind: list[ExitStack] = []  # of the parent's: to let go of them would wait for its threads


class Threads:
    """The executors of one engine.

    Attributes:
        staging: one thread, which copies tensors and waits for devices.
        compute: checksums, plans, pickles.
    """

    def __init__(self, copy_threads: int, compute_threads: int) -> None:
        self.staging = ThreadPoolExecutor(1, f"{NAME}-stage", _limit_torch, (copy_threads,))
        self.compute = ThreadPoolExecutor(compute_threads, f"{NAME}-compute", _limit_torch, (1,))

    def close(self) -> None:
        """Wait for the threads to end."""
        self.staging.shutdown()
        self.compute.shutdown()


async def in_thread(executor: Executor, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run `function` in a thread of `executor`.

    Cancellation: takes effect when the function has returned; what it works on must not be freed before.
    """
    with CancelScope(shield=True):
        result = await asyncio.get_running_loop().run_in_executor(executor, function, *args)
    return result


def _limit_torch(threads: int) -> None:
    """Let what torch computes in this thread use so many cores: the others belong to the training step.

    `torch.set_num_threads` sets the calling thread's own number and, besides, the one with which threads begin that
    have not used torch yet. A second thread puts that back. Source: aten/src/ATen/ParallelOpenMP.cpp.
    """
    with _limiting:  # one at a time: else the second would take the first one's number for the process's
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        restore = threading.Thread(target=torch.set_num_threads, args=(before,), name=f"{NAME}-restore")
        restore.start()
        restore.join()


class Engine:
    """A running event loop in a background thread, to which work is handed from any thread."""

    def __init__(self, *, copy_threads: int, io_threads: int) -> None:
        self._copy_threads = copy_threads
        self._io_threads = io_threads
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self._pid = 0
        self.threads: Threads

    def __repr__(self) -> str:
        return f"<Engine {'closed' if self._portal is None else 'running'}>"

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that started it."""
        return os.getpid() != self._pid

    def start(self) -> None:
        """Start the loop and the threads."""
        if self._portal is not None:
            raise ClosedError("the Checkpointer is open already: use one `async with` at a time")
        self._pid = os.getpid()
        self._portal = self._stack.enter_context(start_blocking_portal("asyncio", name=f"{NAME}-engine"))
        self.threads = Threads(self._copy_threads, max(1, (os.cpu_count() or 1) // 2))
        self._stack.callback(self.threads.close)
        self._portal.call(self._set_up)

    def _set_up(self) -> None:
        files = ThreadPoolExecutor(self._io_threads, f"{NAME}-io")
        asyncio.get_running_loop().set_default_executor(files)  # aiofiles' threads, to the last close()

    def call_soon(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> Future[T]:
        """Begin `function` on the engine's loop.

        Raises:
            ClosedError: the engine does not run, or runs in the process that this one was forked from.
        """
        if self._portal is None:
            raise ClosedError("the Checkpointer is not open: use it inside `async with` or `with`")
        if self.is_forked:
            raise ClosedError("this process was forked from the one that opened the Checkpointer: open one here")
        return self._portal.start_task_soon(function, *args)

    def stop(self) -> None:
        """Wait for the last work and end every thread. Blocks for a few milliseconds when nothing is under way."""
        self._portal = None
        if self.is_forked:  # the threads are the parent's
            _left_behind.append(self._stack.pop_all())
        else:
            self._stack.close()
