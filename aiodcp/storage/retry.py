"""Transient storage errors, retried: a network file system that stalls, a connection that is reset."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass
from typing import TypeVar

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from ..errors import ArgumentError
from .base import ObjectLimits, Reader, Storage, Writer, file_dates, object_limits, remove_all, takes_whole_files
from .error_mapping import foreign_exits

T = TypeVar("T")

_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,  # what a network file system says when a server does not answer in time
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def is_transient(error: OSError) -> bool:
    """Whether the same call may well succeed a little later; on a full disk or without permission it will not."""
    return error.errno in _TRANSIENT or isinstance(error, TimeoutError | ConnectionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often, and after which waits, transient storage errors are retried.

    Writes are retried from the staged bytes: nothing is captured again, and no other rank is involved. A file whose
    fsync failed is written again as a whole: a second fsync may succeed without the data being there. Source:
    https://lwn.net/Articles/752063/.

    Args:
        attempts: in all; 1 to retry nothing.
        wait_s: seconds to wait at most before the second attempt; twice as many before each further one, and a random
            part of that, so that thousands of ranks do not come back at once.
        max_wait_s: seconds to wait at most before any of them.
        is_transient: whether to retry after an `OSError`; by default after time-outs, lost connections and servers, and
            I/O errors.
    """

    attempts: int = 3
    wait_s: float = 1.0
    max_wait_s: float = 30.0
    is_transient: Callable[[OSError], bool] = is_transient

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ArgumentError("attempts", f"must be a positive integer, got {self.attempts!r}")
        for name in ("wait_s", "max_wait_s"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise ArgumentError(name, f"must be a finite number of seconds of at least 0, got {value!r}")

    async def call(self, function: Callable[[], Awaitable[T]], report: Callable[[Attempt], None]) -> T:
        """Call `function` until it succeeds, fails for good, or has failed too often; `report` each wait.

        Raises:
            Exception: what it raised last; but what it raised first, if what that has left is in the way.

        Cancellation: ends a wait at once.
        """
        try:
            return await function()  # what almost all calls are: the rest takes longer than to read a small file
        except Exception as error:
            failed = [error]

        def before_sleep(state: RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            error = _os_error_of(state.outcome.exception())
            assert error is not None
            report(Attempt(number=state.attempt_number, error=error, wait_s=state.next_action.sleep))

        def is_worth_it(error: BaseException) -> bool:
            refusal = _os_error_of(error)
            return refusal is not None and self.is_transient(refusal)

        retrying = AsyncRetrying(
            sleep=anyio.sleep,
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=self.wait_s, max=self.max_wait_s),
            retry=retry_if_exception(is_worth_it),
            before_sleep=before_sleep,
            reraise=True,
        )

        first: list[Exception] = []

        async def attempt() -> T:  # tenacity awaits what it sees to be a coroutine function, and nothing else
            try:
                if failed:
                    raise failed.pop()
                return await function()
            except Exception as error:
                first.append(error)
                if isinstance(_os_error_of(error), FileExistsError):
                    raise first[0] from first[0].__cause__
                del first[1:]
                raise

        try:
            return await retrying(attempt)
        finally:
            first.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt that failed, after which another one is made.

    Attributes:
        number: from 1 on.
        error: why it failed.
        wait_s: seconds until the next one.
    """

    number: int
    error: OSError
    wait_s: float

    def __str__(self) -> str:
        return f"attempt {self.number} failed, retrying in {self.wait_s:.1f} s: {self.error}"


def _os_error_of(error: BaseException | None) -> OSError | None:
    """Return what storage raised: the error itself, or the cause of one of ours."""
    for each in (error, error.__cause__ if error is not None else None):
        if isinstance(each, OSError):
            return each
    return None


class RetryingStorage:
    """A storage whose calls are retried. Writing a file is not: whoever has its bytes writes it again."""

    def __init__(
        self,
        storage: Storage,
        retry: Retry,
        report: Callable[[str, str, Attempt], None],
        doing: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Wrap `storage`; `report` is called with the checkpoint, the path and each attempt that failed.

        `doing` makes a block in which what it names is under way, for whoever watches.
        """
        self._storage = storage
        self._retry = retry
        self._report = report
        self._doing = doing

    def __repr__(self) -> str:
        return repr(self._storage)

    def resolve(self, checkpoint_id: str) -> str:
        return self._storage.resolve(checkpoint_id)

    def describe(self, checkpoint_id: str, name: str = "") -> str:
        return self._storage.describe(checkpoint_id, name)

    def limits(self, checkpoint_id: str) -> ObjectLimits | None:
        return object_limits(self._storage, checkpoint_id)

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:
        with self._doing(f"writing {self._storage.describe(checkpoint_id, name)}"), foreign_exits():
            async with self._storage.create(checkpoint_id, name) as writer:
                yield _GuardedWriter(writer)

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[Reader]:
        async with AsyncExitStack() as stack:

            async def enter() -> Reader:
                return await stack.enter_async_context(self._storage.open(checkpoint_id, name))

            reader = await self.retrying(enter, checkpoint_id, name)
            yield _RetryingReader(reader, lambda function: self.retrying(function, checkpoint_id, name))

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self.retrying(lambda: self._storage.put(checkpoint_id, name, data), checkpoint_id, name)

    async def put_new(self, checkpoint_id: str, name: str, data: memoryview) -> None:
        storage = self._storage
        assert takes_whole_files(storage)
        await self.retrying(lambda: storage.put_new(checkpoint_id, name, data), checkpoint_id, name)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        return await self.retrying(lambda: self._storage.get(checkpoint_id, name), checkpoint_id, name)

    async def file_sizes(self, checkpoint_id: str) -> dict[str, int]:
        return await self.retrying(lambda: self._storage.file_sizes(checkpoint_id), checkpoint_id)

    async def list_files(self, checkpoint_id: str) -> list[str]:
        return await self.retrying(lambda: self._storage.list_files(checkpoint_id), checkpoint_id)

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        await self.retrying(lambda: self._storage.remove(checkpoint_id, name, durable=durable), checkpoint_id, name)

    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None:
        await self.retrying(lambda: remove_all(self._storage, checkpoint_id, names), checkpoint_id)

    async def dates(self, checkpoint_id: str) -> dict[str, float]:
        return await self.retrying(lambda: file_dates(self._storage, checkpoint_id), checkpoint_id)

    async def remove_if_empty(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        await self.retrying(
            lambda: self._storage.remove_if_empty(checkpoint_id, made_by_anyone=made_by_anyone), checkpoint_id
        )

    async def remove_tree(self, checkpoint_id: str) -> None:
        await self.retrying(lambda: self._storage.remove_tree(checkpoint_id), checkpoint_id)

    async def list_children(self, root: str) -> list[str]:
        return await self.retrying(lambda: self._storage.list_children(root), root)

    @asynccontextmanager
    async def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AsyncIterator[bool]:
        async with AsyncExitStack() as stack:

            async def enter() -> bool:
                return await stack.enter_async_context(self._storage.lock(root, exclusive=exclusive, create=create))

            yield await self.retrying(enter, root)

    async def retrying(self, function: Callable[[], Awaitable[T]], checkpoint_id: str, name: str = "") -> T:
        """Call `function`, which works on this file, until it succeeds or has failed too often."""
        path = self._storage.describe(checkpoint_id, name)
        with self._doing(f"storage: {path}"), foreign_exits():
            return await self._retry.call(function, lambda attempt: self._report(checkpoint_id, path, attempt))


class _GuardedWriter:
    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def write(self, offset: int, data: memoryview) -> None:
        with foreign_exits():
            await self._writer.write(offset, data)


class _RetryingReader:
    def __init__(self, reader: Reader, retrying: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> None:
        self.nbytes = reader.nbytes
        self.modified_at: float | None = reader.modified_at
        self._reader = reader
        self._retrying = retrying

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._retrying(lambda: self._reader.read_into(offset, buffers))
