"""Threads that work for an engine, and can be given up when the system does not answer them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

_Work = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class WorkerThreads(ThreadPoolExecutor):
    """An executor whose threads the interpreter does not wait for when it ends, and that no failure breaks for good.

    `ThreadPoolExecutor` joins its threads at exit, so that one read from a dead file server keeps a process for ever;
    and it refuses all work once a thread could not be begun. asyncio takes nothing but a subclass of it.
    """

    def __init__(self, size: int, name: str, begin: Callable[[], object] = lambda: None) -> None:
        """Begin without a thread.

        Args:
            size: how many threads there may be.
            name: of the threads, before a number.
            begin: called first in each of them. What it raises fails the work that the thread was started for.
        """
        super().__init__(size, name)
        self._size = size
        self._name = name
        self._begin = begin
        self._mutex = threading.Lock()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = 0
        self._running: dict[threading.Thread, None] = {}
        self._is_closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have `fn` called in one of the threads.

        Raises:
            RuntimeError: they are closed, or there is no thread and none can be started.
        """
        future: Future[T] = Future()
        work: _Work = (future, fn, args, kwargs)
        with self._mutex:
            if self._is_closed:
                raise RuntimeError(f"{self._name}: the threads are closed")
            if self._idle:
                self._idle -= 1
                self._work.put(work)
            elif len(self._running) < self._size:
                self._start(work)
            else:
                self._work.put(work)
        return future

    def _start(self, work: _Work) -> None:
        thread = threading.Thread(
            target=self._run, args=([work],), name=f"{self._name}_{len(self._running)}", daemon=True
        )
        self._running[thread] = None
        try:
            thread.start()
        except BaseException as error:
            del self._running[thread]
            if not self._running or not isinstance(error, RuntimeError):
                raise
            self._work.put(work)  # for the threads that there are

    def _run(self, first: list[_Work]) -> None:
        work: _Work | None = first.pop()  # the thread's object keeps its arguments
        assert work is not None
        try:
            self._begin()
        except BaseException as error:
            self._fail(work, error)
            return
        while work is not None:
            _do(*work)
            del work  # or the last call's arguments would live on
            work = self._next()
        with self._mutex:
            del self._running[threading.current_thread()]

    def _next(self) -> _Work | None:
        with self._mutex:
            try:
                return self._work.get_nowait()
            except queue.Empty:
                self._idle += 1
        return self._work.get()

    def _fail(self, work: _Work, error: BaseException) -> None:
        """Fail what a thread was started for; and what waits, if there is no other thread to do it."""
        with self._mutex:
            del self._running[threading.current_thread()]
            failed: list[_Work | None] = [work]
            while not self._running and not self._work.empty():
                failed.append(self._work.get())
        for each in failed:
            if each is not None and each[0].set_running_or_notify_cancel():
                each[0].set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout_s: float = 10.0) -> None:
        """Take no more work, and let the threads end when they have done what they were given.

        Args:
            wait: for that, up to `timeout_s` seconds: a thread that the system does not answer is given up.
            cancel_futures: what has not begun yet is not to be done.
            timeout_s: likewise.
        """
        with self._mutex:
            self._is_closed = True
            running = list(self._running)
            if cancel_futures:
                while not self._work.empty():
                    if (work := self._work.get()) is not None:
                        work[0].cancel()
            for _ in running:
                self._work.put(None)
        until = time.monotonic() + timeout_s
        for thread in running if wait else ():
            thread.join(max(0.0, until - time.monotonic()))


def _do(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call_guarded(function, *args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def call_guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function, and make a `RuntimeError` of what would end the event loop, as `sys.exit()` in it would."""
    try:
        return function(*args, **kwargs)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"raised {error!r}") from error
