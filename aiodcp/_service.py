"""What runs behind a `Checkpointer`: an engine, a line to the other ranks, and all that has been asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import ContextVar
from itertools import count
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakSet

import anyio
import torch

from ._engine import Engine
from ._judge import Kind
from ._line import Line
from ._milestone import Milestone
from ._ranks import Operation
from ._skips import Skips
from ._turns import give_turns, prompt_turns
from .errors import CheckpointError, ClosedError, LoadError, RankError, SaveCancelled

# The joint checkpoints in whose blocks the caller is: what it asks for there cannot wait for their end.
around: ContextVar[tuple[Operation, ...]] = ContextVar("around", default=())

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Service:
    """One rank's end. Its methods are called from the caller's thread.

    Attributes:
        engine: the loop and the threads.
        line: to the other ranks; None when there are none.
        is_open: whether anything may be asked.
        slot: is held by whatever is alone in flight: a save, and all that talks to other ranks.
        skips: which saves are skipped.
        held: on the engine's loop, what is let go of when all is drained.
        in_flight: where the last save goes that had its turn.
    """

    def __init__(self, *, copy_threads: int, io_threads: int) -> None:
        self.engine = Engine(copy_threads=copy_threads, io_threads=io_threads)
        self.line: Line | None = None
        self.is_open = False
        self.slot: anyio.Semaphore
        self.skips: Skips
        self.held: AsyncExitStack
        self.in_flight = ""
        self._calls = count(1)  # the same call has the same number on all ranks
        self._saves: set[Future[None]] = set()  # from being asked for until what they replaced is removed
        self._turns: dict[Milestone, Future[Any]] = {}  # of the saves that are not captured yet
        self._work: set[Future[Any]] = set()  # all else that is waited for
        self._background: set[Future[Any]] = set()  # and what nobody waits for before the end
        self._operations: WeakSet[Operation] = WeakSet()  # all that has been asked for and is not over
        self._unfinished: dict[Operation, Milestone] = {}  # saves that are not over, and what is reached when they are

    @property
    def rank(self) -> int:
        """This rank's position among those that save together."""
        return self.line.rank if self.line else 0

    @property
    def is_coordinator(self) -> bool:
        return self.line is None or self.line.rank == self.line.root

    async def open(self, group: torch.distributed.ProcessGroup | None, *, coordinator: int, timeout_s: float) -> None:
        """Start the engine, and connect with the others of `group`, if there are any.

        Raises:
            ClosedError: it is open already.
            RankError: not all ranks came in time.
        """
        self.engine.start()
        try:
            if group is not None:
                self.line = Line(group, root=coordinator, timeout_s=timeout_s)
                await self.run(self._connect, self.line)
        except BaseException:
            self.line = None
            self.engine.stop()
            raise
        self._calls = count(1)
        self.slot = anyio.Semaphore(1)  # fair: saves go in the order in which they were asked for
        self.skips = Skips(decides=self.is_coordinator)
        self.held = AsyncExitStack()
        self.is_open = True

    async def _connect(self, line: Line) -> None:
        operation = Operation(line, Kind.OPEN, 0, ClosedError("opening was cancelled"))

        async def nothing() -> None:
            pass

        try:
            await operation.together("open", nothing)
        except RankError:
            await line.give_up_opening()
            raise

    async def close(self) -> None:
        """Wait for all that was asked for, and stop.

        Cancellation: gives it all up, and waits for that.
        """
        self.is_open = False
        if self.engine.is_forked:  # all that was asked is the parent's
            self.engine.stop()
            return
        try:
            try:
                await self._drain()
            finally:
                await self.run(self.held.aclose)
        finally:
            if self.line is not None:
                self.line.close()
            self.engine.stop()
            self.line = None

    async def _drain(self) -> None:
        cancelled = False
        while flows := [*self._saves, *self._work, *self._background]:
            done = Milestone("drained")
            flows[0].add_done_callback(lambda _, done=done: done.reach())  # type: ignore[misc]
            try:
                await done
            except asyncio.CancelledError:
                cancelled = True
                self._give_up()
        if cancelled:
            raise asyncio.CancelledError

    def _give_up(self) -> None:
        for turn, asked in list(self._turns.items()):
            closed = ClosedError("the Checkpointer was closed before this save had its turn")
            turn.fail(closed)
            answer(asked, closed)
        for operation in list(self._operations):
            self.engine.call_soon(_cancel, operation)
        for work in [*self._background, *(self._work if self.line is None else ())]:
            work.cancel()

    def check_open(self) -> None:
        """Raise `ClosedError` unless anything may be asked."""
        if not self.is_open:
            raise ClosedError("the Checkpointer is not open: use it inside `async with` or `with`")

    def is_asked(self) -> bool:
        """Whether a save waits its turn, or is being captured."""
        return bool(self._turns)

    # --- what is asked

    def count_call(self) -> int:
        """Return the number of a call that all ranks make."""
        return next(self._calls)

    def operation(self, kind: Kind, cancelled: CheckpointError, number: int | None = None) -> Operation:
        """Return an operation of all ranks, by default for a call that is made now."""
        operation = Operation(self.line, kind, self.count_call() if number is None else number, cancelled)
        self._operations.add(operation)
        return operation

    @contextmanager
    def under_way(self, operation: Operation) -> Iterator[None]:
        """Count an operation as over when the block is left."""
        try:
            with prompt_turns():
                yield
        finally:
            operation.close()
            self._operations.discard(operation)

    def begin_save(
        self,
        number: int,
        place: str,
        turn: Milestone,
        save: Callable[[Operation], Awaitable[T]],
        after: Callable[[T], Awaitable[None]],
        *,
        on_failure: Callable[[RankError], None],
    ) -> Operation:
        """Begin a save: it waits its turn, and `after` it the next may have its own.

        Args:
            number: of the call.
            place: where to.
            turn: reached when the save has its turn.
            save: does it. Never raises.
            after: what is left to do, given what `save` returned.
            on_failure: see `Operation`.
        """
        self.skips.open()
        operation = Operation(
            self.line, Kind.SAVE, number, SaveCancelled(place), skips=self.skips, on_failure=on_failure
        )
        self._operations.add(operation)

        ended = Milestone("ended")
        self._unfinished[operation] = ended

        def end(_: object = None) -> None:
            self._unfinished.pop(operation, None)
            ended.reach()

        async def save_in_turn() -> None:
            async with self.slot:
                self.in_flight = place
                turn.reach()
                with self.under_way(operation):
                    result = await save(operation)
            end()
            await after(result)

        flow = self.engine.call_soon(save_in_turn)
        self._saves.add(flow)
        flow.add_done_callback(self._saves.discard)
        flow.add_done_callback(end)
        return operation

    async def wait_for_saves(self) -> None:
        """Wait for the saves that have been begun, whatever comes of them, but for those around the caller.

        Ranks wait for each other's turns instead, in `slot`.
        """
        if self.line is not None:
            return
        for operation, ended in [*self._unfinished.items()]:
            if operation not in around.get():
                await ended

    @contextmanager
    def waiting(self, turn: Milestone, asked: Future[Any]) -> Iterator[None]:
        """While the caller waits for a save's `turn`, and then captures: given up, both are failed."""
        self._turns[turn] = asked
        try:
            yield
        finally:
            self._turns.pop(turn, None)

    def in_background(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> None:
        """Begin `function` on the engine's loop. Closing waits for it; given up, it is cancelled."""
        self._begin(self._background, function, *args)

    def _begin(self, where: set[Future[Any]], function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> Future[T]:
        future = self.engine.call_soon(function, *args)
        where.add(future)
        future.add_done_callback(where.discard)
        return future

    async def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, operation: Operation | None = None) -> T:
        """Run `function` on the engine's loop and wait for it here.

        Cancellation: cancels it there, and waits until it has stopped: it may be using the caller's memory. An
        `operation` of several ranks is given up instead, so that the others hear of it.
        """
        ended = Milestone("ended")

        async def run_there() -> T:
            try:
                with prompt_turns():
                    return await function(*args)
            finally:
                ended.reach()

        future = self._begin(self._work, run_there)
        give_turns(asyncio.get_running_loop(), ended.done)
        try:
            await ended
        except asyncio.CancelledError:
            if operation is not None and self.line is not None:
                self.engine.call_soon(_cancel, operation)
            else:
                future.cancel()
            while not ended.done():
                with suppress(asyncio.CancelledError):
                    await ended
            raise
        if future.cancelled():
            raise ClosedError("the Checkpointer was closed meanwhile")
        return future.result()

    async def ask(
        self, phase: str, function: Callable[[], Awaitable[bytes]], *, problem: Exception | None = None
    ) -> bytes:
        """Have the coordinator call `function`, on its engine's loop, and return its answer on every rank.

        A `problem` that this rank has fails it on all.
        """
        operation = self.operation(Kind.ASK, LoadError(f"{phase}: cancelled"))

        async def look() -> bytes:
            if problem is not None:
                raise problem
            return await function() if operation.is_coordinator else b""

        async def ask() -> bytes:
            with self.under_way(operation):
                answered, _ = await operation.together(phase, look)
                return await operation.broadcast(answered)

        async def ask_in_turn() -> bytes:
            async with self.slot:
                return await ask()

        return await self.run(ask_in_turn if self.line else ask, operation=operation)


def answer(asked: Future[T], given: T | Exception) -> bool:
    """Answer a flow that waits, unless it has been answered already; tell whether this was the answer."""
    with suppress(InvalidStateError):
        if isinstance(given, Exception):
            asked.set_exception(given)
        else:
            asked.set_result(given)
        return True
    return False


async def _cancel(operation: Operation) -> None:
    operation.cancel()
