"""What is under way behind a `Checkpointer`: its engine, its channel to the other ranks, and all that was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakSet

import anyio
import torch

from .._distributed.channel import Channel
from .._distributed.operation import Operation
from .._distributed.skip_agreement import SkipAgreement
from .._distributed.votes import OperationKind
from .._engine.gil_fairness import short_switch_interval, yield_to_engine
from .._engine.loop import Engine
from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from ..errors import CheckpointError, ClosedError, DeadlockError, LoadError, RankError, SaveCancelled, SaveError
from .drain import CANCEL_TIMEOUT_S, CHECK_INTERVAL_S, Drain
from .handshake import Handshake

log: SafeLogger = SafeLogger(__name__)


EXIT_IDLE_S = 60.0  # after which what does not move holds up the end of the interpreter no longer

# The joint checkpoints in whose blocks the caller is: what it asks for there cannot wait for their end.
around: ContextVar[tuple[Operation, ...]] = ContextVar("around", default=())

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Flows:
    """One rank's end. Its methods are called from the caller's thread.

    Attributes:
        engine: the loop and the threads.
        channel: to the other ranks; None when there are none.
        is_open: whether anything may be asked.
        timeout_s: for which nothing may move before it is given up.
        slot: is held by whatever is alone in flight: a save, and all that talks to other ranks.
        skips: which saves are skipped.
        in_flight: where the last save goes that had its turn.
    """

    def __init__(self, *, copy_threads: int, io_threads: int) -> None:
        self.engine: Engine = Engine(copy_threads=copy_threads, io_threads=io_threads)
        self.channel: Channel | None = None
        self.is_open: bool = False
        self.timeout_s: float = 0.0
        self.slot: anyio.Semaphore
        self.skips: SkipAgreement
        self.in_flight = ""
        self._until_close: AsyncExitStack  # on the engine's loop
        self._calls = count(1)  # the same call has the same number on all ranks
        self._saves: set[Future[None]] = set()  # from being asked for until what they replaced is removed
        self._handshakes: set[Handshake[Any]] = set()  # of the saves that are not captured yet
        self._work: dict[Future[None], Future[Any]] = {}  # all else that is waited for, each with what is done after it
        self._background: dict[Future[None], Future[Any]] = {}  # and what is not waited for before the end
        self._operations: WeakSet[Operation] = WeakSet()  # all that has been asked for and is not over
        self._unfinished: dict[Operation, MilestoneSource] = {}  # saves, each with what is reached when it is over
        self._fail: dict[Operation, Callable[[Exception], None]] = {}  # of these, what fails them
        self._blocks: set[Operation] = set()  # of these, the joint ones whose blocks are not left
        self._ended: set[MilestoneSource] = set()  # of `run`

    @property
    def rank(self) -> int:
        """This rank's position among those that save together."""
        return self.channel.rank if self.channel else 0

    @property
    def world_rank(self) -> int:
        """This rank, as torchrun counts."""
        return self.channel.members[self.channel.rank] if self.channel else 0

    @property
    def is_coordinator(self) -> bool:
        return self.channel is None or self.channel.rank == self.channel.root

    async def open(
        self, group: torch.distributed.ProcessGroup | None, *, coordinator: int, timeout_s: float, silence_s: float
    ) -> None:
        """Start the engine, and connect with the others of `group`, if there are any.

        Raises:
            ClosedError: it is open already.
            RankError: not all ranks came in time.
        """
        self.engine.start()
        try:
            if group is not None:
                self.channel = Channel(group, root=coordinator, timeout_s=timeout_s, silence_s=silence_s)
                await self.run(self._connect, self.channel)
        except BaseException:
            self.channel = None
            self.engine.stop()
            raise
        self.timeout_s = timeout_s
        self._calls = count(1)
        self.slot = anyio.Semaphore(1)  # fair: saves go in the order in which they were asked for
        self.skips = SkipAgreement(decides=self.is_coordinator)
        self._until_close = AsyncExitStack()
        self.is_open = True

    async def _connect(self, channel: Channel) -> None:
        operation = Operation(channel, OperationKind.OPEN, 0, ClosedError("opening was cancelled"))

        async def nothing() -> None:
            pass

        try:
            await operation.run_phase("open", nothing)
        except RankError:
            await channel.give_up_opening()
            raise

    async def close(self) -> None:
        """Wait for all that was asked for, and stop. What has not moved for `timeout_s` is given up.

        Raises:
            ClosedError: something did not end even so; says what.

        Cancellation: gives it all up, and waits for that, up to `CANCEL_TIMEOUT_S`.
        """
        self.is_open = False
        if self.engine.is_forked:  # all that was asked is the parent's
            self.engine.stop()
            return
        drained = False
        try:
            await self._drain()
            drained = True
        except asyncio.CancelledError:
            drained = not self._under_way()
            raise
        finally:
            try:
                if drained:
                    await self.run(self._until_close.aclose)
            finally:
                self._stop(wait=drained)

    def _stop(self, *, wait: bool) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.engine.stop(wait=wait)

    def _under_way(self) -> list[Future[Any]]:
        return [*self._saves, *self._work, *self._background]

    async def _drain(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        drain = Drain(self.engine.activity, self, max_idle_s=self.timeout_s)
        while flows := self._under_way():
            done = MilestoneSource("drained")
            flows[0].add_done_callback(lambda _, done=done: done.reach())  # type: ignore[misc]
            try:
                with anyio.move_on_after(
                    CHECK_INTERVAL_S, shield=cancelled is not None
                ):  # anyio cancels again and again
                    await done.settled()
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                drain.give_up("leaving was cancelled")
            drain.check()
        if cancelled is not None:
            raise cancelled

    def finish_at_exit(self) -> None:
        """Finish what is under way, as the interpreter ends: for a Checkpointer that was never left. Never raises."""
        if not self.is_open or self.engine.is_forked:
            return
        self.is_open = False
        self._fail_handshakes(ClosedError("the interpreter exited before this save was captured"))
        for operation in list(self._blocks):
            self.cancel(operation)
        drain = Drain(self.engine.activity, self, max_idle_s=min(EXIT_IDLE_S, self.timeout_s))
        try:
            while flows := self._under_way():
                wait(flows[:1], timeout=CHECK_INTERVAL_S)
                drain.check()
            wait([self.engine.call_soon(self._until_close.aclose)], timeout=CANCEL_TIMEOUT_S)
        except ClosedError as error:
            log.error("%s", error)
            self.engine.stop(wait=False)
        else:
            self._stop(wait=True)

    def _fail_handshakes(self, error: ClosedError) -> None:
        for handshake in list(self._handshakes):
            handshake.fail(error)

    def give_up(self, reason: CheckpointError | None = None) -> None:
        """Cancel all that is under way; `reason` is why, if saves are to fail with that."""
        self._fail_handshakes(ClosedError("the Checkpointer was closed before this save was captured"))
        for operation in list(self._operations):
            self.cancel(operation, reason)
        for work in [*self._background.values(), *(self._work.values() if self.channel is None else ())]:
            work.cancel()

    def abandon(self, error: CheckpointError) -> None:
        """Wake all who wait for what does not end, with `error`."""
        self.engine.threads.given_up.set()
        for fail in list(self._fail.values()):
            failure = SaveError(str(error))
            failure.__cause__ = error
            fail(failure)
        for ended in [*self._unfinished.values(), *self._ended]:
            ended.fail(error)

    def check_open(self) -> None:
        """Raise `ClosedError` unless anything may be asked."""
        if not self.is_open:
            raise ClosedError("the Checkpointer is not open: use it inside `async with` or `with`")

    def is_asked(self) -> bool:
        """Whether a save waits its turn, or is being captured."""
        return bool(self._handshakes)

    # --- what is asked

    def count_call(self) -> int:
        """Return the number of a call that all ranks make."""
        return next(self._calls)

    def operation(self, kind: OperationKind, cancelled: CheckpointError) -> Operation:
        """Return an operation of all ranks, for a call that is made now."""
        operation = Operation(self.channel, kind, self.count_call(), cancelled)
        self._operations.add(operation)
        return operation

    @contextmanager
    def under_way(self, operation: Operation) -> Iterator[None]:
        """Count an operation as over when the block is left."""
        try:
            with short_switch_interval():
                yield
        finally:
            operation.close()
            self._operations.discard(operation)

    def cancel(self, operation: Operation, reason: CheckpointError | None = None) -> None:
        """Cancel an operation; `reason` is why, if it is to fail with that. From any thread."""

        async def cancel() -> None:
            operation.cancel(reason)

        self.engine.call_soon(cancel)

    def begin_save(
        self,
        number: int,
        checkpoint_id: str,
        give_turn: Callable[[], None],
        save: Callable[[Operation], Awaitable[T]],
        after: Callable[[T], Awaitable[None]],
        *,
        on_failure: Callable[[Exception], None],
    ) -> Operation:
        """Begin a save: it waits its turn, and `after` it the next may have its own.

        Args:
            number: of the call.
            checkpoint_id: where to.
            give_turn: called when the save has its turn.
            save: does it. Never raises.
            after: what is left to do, given what `save` returned.
            on_failure: see `Operation`.
        """
        self.skips.open()
        operation = Operation(
            self.channel,
            OperationKind.SAVE,
            number,
            SaveCancelled(checkpoint_id),
            skips=self.skips,
            on_failure=on_failure,
        )
        self._operations.add(operation)

        ended = MilestoneSource("ended")
        self._unfinished[operation] = ended
        self._fail[operation] = on_failure

        def end(_: object = None) -> None:
            self._unfinished.pop(operation, None)
            self._fail.pop(operation, None)
            ended.reach()

        def fail_unsettled(flow: Future[None]) -> None:
            error = CancelledError() if flow.cancelled() else flow.exception()
            if error is not None:  # as nothing should end it: whoever waits is to hear of it
                failure = SaveError(f"the save was ended: {error!r}")
                failure.__cause__ = error
                on_failure(failure)

        async def save_in_turn() -> None:
            with self.engine.activity.doing(f"saving {checkpoint_id}"):
                async with self.slot:
                    self.in_flight = checkpoint_id
                    give_turn()
                    with self.under_way(operation):
                        result = await save(operation)
                end()
                await after(result)

        flow = self.engine.call_soon(save_in_turn)
        self._saves.add(flow)
        flow.add_done_callback(self._saves.discard)
        flow.add_done_callback(fail_unsettled)
        flow.add_done_callback(end)
        return operation

    async def wait_for_saves(self) -> None:
        """Wait for the saves that have been begun, whatever comes of them, but for those around the caller.

        Ranks wait for each other's turns instead, in `slot`.
        """
        if self.channel is not None:
            return
        for operation, ended in [*self._unfinished.items()]:
            if operation not in around.get():
                await ended.settled()

    @contextmanager
    def inside(self, operation: Operation) -> Iterator[None]:
        """Know, within the block and in tasks that are begun there, that `operation` ends when the block is left."""
        outside = around.get()
        around.set((*outside, operation))
        self._blocks.add(operation)
        try:
            yield
        finally:
            self._blocks.discard(operation)
            around.set(outside)

    def is_inside(self, operation: Operation | None = None) -> bool:
        """Whether the caller is in the block of a joint checkpoint, this one if it is given, that is still open."""
        return any(each in self._blocks for each in around.get() if operation is None or each is operation)

    def refuse_inside(self, what: str) -> None:
        """Refuse what would wait for the end of the block from which it is asked for.

        Raises:
            DeadlockError: the caller is in the block of a joint checkpoint, or of a part.
        """
        if self.is_inside():
            raise DeadlockError(
                f"cannot {what} inside the block of a joint checkpoint, or of a part of one, which it would wait for: "
                "leave the block first"
            )

    @contextmanager
    def waiting(self, handshake: Handshake[Any]) -> Iterator[None]:
        """While the caller waits for a save's turn, and then captures: given up, the handshake is failed."""
        self._handshakes.add(handshake)
        try:
            yield
        finally:
            self._handshakes.discard(handshake)

    def in_background(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> None:
        """Begin `function` on the engine's loop. Closing waits for it; given up, it is cancelled."""
        self._begin(self._background, function, *args)

    def at_close(self, function: Callable[[], object]) -> None:
        """Have `function` called on the engine's loop when all is drained."""
        self._until_close.callback(function)

    async def keep_until_close(self, context: AbstractAsyncContextManager[Any]) -> None:
        """Enter `context` on the engine's loop, and leave it when all is drained."""
        await self.run(self._until_close.enter_async_context, context)

    def _begin(
        self, where: dict[Future[None], Future[Any]], function: Callable[[*Ts], Awaitable[T]], *args: *Ts
    ) -> Future[T]:
        over: Future[None] = Future()  # the future itself is done when it is cancelled, and the flow is not

        async def flow() -> T:
            try:
                return await function(*args)
            finally:
                over.set_result(None)

        future = self.engine.call_soon(flow)
        where[over] = future
        over.add_done_callback(lambda _: where.pop(over, None))
        return future

    async def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, operation: Operation | None = None) -> T:
        """Run `function` on the engine's loop and wait for it here.

        Cancellation: cancels it there, and waits until it has stopped: it may be using the caller's memory. An
        `operation` of several ranks is given up instead, so that the others hear of it.
        """
        ended = MilestoneSource("ended")

        async def run_there() -> T:
            try:
                with short_switch_interval():
                    return await function(*args)
            finally:
                ended.reach()

        future = self._begin(self._work, run_there)
        self._ended.add(ended)
        yield_to_engine(asyncio.get_running_loop(), ended)
        try:
            await ended.settled()
        except asyncio.CancelledError:
            if operation is not None and self.channel is not None:
                self.cancel(operation)
            else:
                future.cancel()
            await ended.settled_uncancellable()
            raise
        finally:
            self._ended.discard(ended)
        if (abandoned := ended.error()) is not None:
            raise abandoned
        if future.cancelled():
            raise ClosedError("the Checkpointer was closed during this call")
        return future.result()

    async def ask(
        self, phase: str, function: Callable[[], Awaitable[bytes]], *, problem: Exception | None = None
    ) -> bytes:
        """Have the coordinator call `function`, on its engine's loop, and return its answer on every rank.

        A `problem` that this rank has fails it on all.
        """
        if self.channel is not None:  # ranks wait for each other's turns
            self.refuse_inside(phase)
        operation = self.operation(OperationKind.ASK, LoadError(f"{phase}: cancelled"))

        async def look() -> bytes:
            if problem is not None:
                raise problem
            return await function() if operation.is_coordinator else b""

        async def ask() -> bytes:
            with self.under_way(operation):
                answered, _ = await operation.run_phase(phase, look)
                return await operation.broadcast(answered)

        async def ask_in_turn() -> bytes:
            async with self.slot:
                return await ask()

        return await self.run(ask_in_turn if self.channel else ask, operation=operation)
