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
from concurrent.futures import Future
from contextvars import Context
from typing import TypeVar, TypeVarTuple

import anyio
import anyio._backends._asyncio  # which anyio loads when it is first used: in the caller's loop, 15 ms
from anyio.from_thread import BlockingPortal

from ..errors import ClosedError
from .activity import Activity
from .broadcast import call_soon
from .threads import NAME, Threads
from .worker_threads import WorkerThreads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

JOIN_TIMEOUT_S = 10.0  # for idle threads to end: milliseconds, unless the machine is very busy

_left_behind: list[object] = []  # of the parent's, in a forked child: an open loop would warn that it was not closed


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
        try:
            return self._begun.result()
        except OSError as error:  # no descriptors are left
            raise ClosedError(f"the engine's event loop cannot be opened: {error}") from error

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
            call_soon(self._loop, self._stopped.set)  # unless it has ended

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
        self.activity: Activity = Activity()

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

        Without `wait` what is under way is given up: it may go on, and is not waited for.
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
            running[0].join(JOIN_TIMEOUT_S)
        self.threads.close(wait=wait)


def _let_end(loop: _LoopThread, threads: Threads) -> None:
    loop.stop_soon()
    threads.close(wait=False)
