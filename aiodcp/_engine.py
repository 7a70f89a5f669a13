"""The engine: an event loop of its own in one background thread, and the threads that work for it.

A training step blocks the caller's loop for as long as it runs. Nothing of a save runs there: flows are coroutines
on the engine's loop, copies and checksums are in its executors, and aiofiles uses that loop's default executor.

All threads are daemons, so that the end of the interpreter waits for none of them: `at_exit` finishes what is to be
finished, in a bounded time, while they still run.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import TypeVar, TypeVarTuple

import anyio
import torch
from anyio import CancelScope
from anyio.from_thread import BlockingPortal

from ._activity import Activity
from ._threads import WorkerThreads
from .errors import ClosedError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NAME = "aiodcp"
END_S = 10.0  # for idle threads to end: milliseconds, unless the machine is very busy

_limiting = threading.Lock()
_left_behind: list[object] = []  # of the parent's, in a forked child: an open loop would warn that it was not closed


class Threads:
    """The executors of one engine.

    Attributes:
        staging: one thread, which copies tensors and waits for devices.
        compute: checksums, plans, pickles.
        files: reads and writes.
        given_up: set when what these threads wait for is not waited for any longer.
    """

    def __init__(self, copy_threads: int, compute_threads: int, io_threads: int) -> None:
        self.given_up = threading.Event()
        self.staging = WorkerThreads(1, f"{NAME}-stage", partial(_limit_torch, copy_threads))
        self.compute = WorkerThreads(compute_threads, f"{NAME}-compute", partial(_limit_torch, 1))
        self.files = WorkerThreads(io_threads, f"{NAME}-io")

    def close(self, *, wait: bool = True) -> None:
        """Let the threads end, and wait for that, up to a bound; or, without `wait`, give them up."""
        for each in (self.staging, self.compute, self.files):
            each.shutdown(wait, cancel_futures=not wait)


async def in_thread(executor: Executor, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run `function` in a thread of `executor`.

    Cancellation: takes effect when the function has returned; what it works on must not be freed before.
    """
    with CancelScope(shield=True):
        result = await asyncio.get_running_loop().run_in_executor(executor, function, *args)
    return result


def _limit_torch(threads: int) -> None:
    """Limit torch to so many cores in this thread: the others belong to the training step.

    `torch.set_num_threads` sets the calling thread's own number and, besides, the one with which threads begin that
    have not used torch yet. A second thread puts that back. Source: aten/src/ATen/ParallelOpenMP.cpp.
    """
    with _limiting:  # one at a time: else the second would take the first one's number for the process's
        before = torch.get_num_threads()
        restore = threading.Thread(target=torch.set_num_threads, args=(before,), name=f"{NAME}-restore", daemon=True)
        torch.set_num_threads(threads)
        try:
            restore.start()
        except RuntimeError:  # no memory for a thread
            torch.set_num_threads(before)
            raise
        restore.join()


class _LoopThread:
    """An event loop in a thread, which ends when it is asked to and its last flow is over.

    Nothing here refers to the `Engine`, so that one that is forgotten can be collected.
    """

    def __init__(self, files: WorkerThreads) -> None:
        self._files = files
        self._begun: Future[BlockingPortal] = Future()
        self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._thread = threading.Thread(  # in a context of its own: the caller's belongs to the caller
            target=Context().run, args=(self._run_loop,), name=f"{NAME}-engine", daemon=True
        )

    def start(self) -> BlockingPortal:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ClosedError(f"the engine's thread cannot be started: {error}") from error
        return self._begun.result()

    def _run_loop(self) -> None:
        try:
            anyio.run(self._run)
        except BaseException as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self._files)  # aiofiles' threads
        self._stopped = asyncio.Event()
        if self._is_stopped:
            self._stopped.set()
        async with BlockingPortal() as portal:
            self._begun.set_result(portal)
            await self._stopped.wait()

    def stop_soon(self) -> None:
        """Have it end. Returns at once, whatever thread this is called in."""
        self._is_stopped = True
        if self._loop is not None and self._stopped is not None:
            try:
                self._loop.call_soon_threadsafe(self._stopped.set)
            except RuntimeError:  # it has ended
                return

    def join(self, timeout_s: float) -> None:
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)


class Engine:
    """A running event loop in a background thread, to which work is handed from any thread.

    Attributes:
        threads: that work for it; made by `start`.
        activity: what is under way.
    """

    def __init__(self, *, copy_threads: int, io_threads: int) -> None:
        self._copy_threads = copy_threads
        self._io_threads = io_threads
        self._running: tuple[_LoopThread, BlockingPortal] | None = None
        self._pid = 0
        self._forgotten: weakref.finalize[..., Engine] | None = None
        self.threads: Threads
        self.activity = Activity()

    def __repr__(self) -> str:
        return f"<Engine {'closed' if self._running is None else 'running'}>"

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that started it."""
        return self._pid not in (0, os.getpid())

    def start(self) -> None:
        """Start the loop and the threads.

        Raises:
            ClosedError: they run already, or no thread can be started.
        """
        if self._running is not None:
            raise ClosedError("the Checkpointer is open already: use one `async with` at a time")
        self._pid = os.getpid()
        threads = Threads(self._copy_threads, max(1, (os.cpu_count() or 1) // 2), self._io_threads)
        loop = _LoopThread(threads.files)
        try:
            self._running = loop, loop.start()
        except BaseException:  # Ctrl-C, too
            self._running = None
            loop.stop_soon()
            raise
        self.threads = threads
        self._forgotten = weakref.finalize(self, _let_end, loop, threads)
        self._forgotten.atexit = False

    def call_soon(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> Future[T]:
        """Begin `function` on the engine's loop.

        Raises:
            ClosedError: the engine does not run, or runs in the process that this one was forked from.
        """
        if self._running is None:
            raise ClosedError("the Checkpointer is not open: use it inside `async with` or `with`")
        if self.is_forked:
            raise ClosedError("this process was forked from the one that opened the Checkpointer: open one here")
        return self._running[1].start_task_soon(function, *args)

    def stop(self, *, wait: bool = True) -> None:
        """Wait for the last work and end every thread. Blocks for a few milliseconds when nothing is under way.

        Without `wait` what is under way is given up: it may go on, and nobody waits for it.
        """
        running, self._running = self._running, None
        if self._forgotten is not None:
            self._forgotten.detach()
        if running is None:
            return
        if self.is_forked:  # the threads are the parent's
            _left_behind.append(running)
            return
        running[0].stop_soon()
        if wait:
            running[0].join(END_S)
        self.threads.close(wait=wait)


def _let_end(loop: _LoopThread, threads: Threads) -> None:
    loop.stop_soon()
    threads.close(wait=False)


def at_exit(function: Callable[[], None]) -> None:
    """Have `function` called when the interpreter ends, while all threads still run: `atexit` comes too late.

    Functions are called in the opposite order, so this one before `concurrent.futures` refuses all work, as the
    application's own storage may need it. Source: Lib/threading.py, `_shutdown`.
    """
    with suppress(RuntimeError):  # it is ending already: what is opened now is not waited for
        threading._register_atexit(function)  # type: ignore[attr-defined]
