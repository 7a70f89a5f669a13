"""The same calls without an event loop: `with` instead of `async with`, and `save_sync` instead of `await save`.

There is one implementation, the coroutines; here they run on a loop that turns only while a call waits, in the
caller's own thread: what is captured is captured there, as with `await`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from functools import update_wrapper
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ..errors import ClosedError

T = TypeVar("T")
S = TypeVar("S", bound="SyncContext")
P = ParamSpec("P")

_left_behind: list[asyncio.Runner] = []  # in forked children: to close one would unregister the parent's descriptors


class SyncContext(ABC):
    """Can be entered without an event loop, too."""

    _runner: asyncio.Runner | None = None
    _sigint: Any = None
    _thread = _pid = 0
    _borrower: SyncContext | None = None

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __enter__(self) -> Self:
        _refuse_inside_a_loop("async with")
        if self._runner is not None:
            raise ClosedError("it is open already: use one `with` at a time")
        self._sigint = signal.getsignal(signal.SIGINT)  # a Runner that runs sets its own for as long
        self._thread, self._pid = threading.get_ident(), os.getpid()
        runner = asyncio.Runner()
        try:
            runner.get_loop()  # which is made here
        except OSError as error:  # no descriptors are left
            raise ClosedError(f"an event loop cannot be opened: {error}") from error
        self._runner = runner
        entered: list[Self] = []

        async def enter() -> None:
            entered.append(await self.__aenter__())

        try:
            self._runner.run(enter())
        except BaseException:  # Ctrl-C, too, which the runner raises when all is done
            try:
                if entered:
                    self._runner.run(self.__aexit__(None, None, None))
            finally:
                self._close_runner()
            raise
        return entered[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        if self._pid != os.getpid():  # forked: what this loop would let go of is the parent's, its selector too
            _left_behind.append(self._runner)
            self._runner = None
            return
        try:
            self._runner.run(self.__aexit__(kind, error, trace))
        finally:
            self._close_runner()

    def lend_runner(self, other: SyncContext) -> None:
        """Let the same thread call what this one has opened, without an event loop, until this one is left."""
        if self._runner is not None:
            other._runner, other._thread, other._pid = self._runner, self._thread, self._pid
            self._borrower = other

    def _close_runner(self) -> None:
        runner, self._runner = self._runner, None
        if self._borrower is not None:
            self._borrower._runner = None
            self._borrower = None
        if runner is not None:
            runner.close()


def sync_method(method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[S, P], T]:
    """Make of a coroutine method one that blocks until it is done, inside `with`."""
    name = method.__name__

    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_inside_a_loop(f"await {name}()")
        if self._runner is None:
            raise ClosedError(
                f"{name}_sync() works only inside a `with` block: inside `async with`, use `await {name}()`"
            )
        if self._pid != os.getpid():
            raise ClosedError("this process was forked from the one that entered the `with` block: enter one here")
        if self._thread != threading.get_ident():
            raise ClosedError(f"{name}_sync() must be called from the thread that entered the `with` block")
        return self._runner.run(method(self, *args, **kwargs))

    update_wrapper(call, method)
    call.__name__ = f"{name}_sync"
    call.__qualname__ = f"{method.__qualname__}_sync"
    call.__doc__ = f"Like `await {name}()`, for callers without an event loop: blocks until it is done."
    return call


def sync_function(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make of a coroutine function one that blocks until it is done."""
    name = function.__name__

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_inside_a_loop(f"await {name}()")
        return asyncio.run(function(*args, **kwargs))

    update_wrapper(call, function)
    call.__name__ = call.__qualname__ = f"{name}_sync"
    call.__doc__ = f"Like `await {name}()`, for callers without an event loop: blocks until it is done."
    return call


def _refuse_inside_a_loop(instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ClosedError(f"an event loop is running in this thread, and would be blocked: use `{instead}`")
