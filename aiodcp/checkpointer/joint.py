"""One checkpoint of several participants, each with a state of its own, committed once: all of them or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from copy import copy
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from anyio import move_on_after
from torch.distributed.checkpoint.stateful import Stateful

from .._distributed.operation import Operation
from .._engine.gil_fairness import yield_to_engine
from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from .._save.request import PartRequest, SaveJob
from ..errors import (
    ArgumentError,
    CaptureError,
    CheckpointError,
    ClosedError,
    DeadlockError,
    ParticipantError,
    SaveCancelled,
)
from .arguments import CheckpointId, check_custom_metadata, check_id
from .caller_loop import LOOK_S, LoopWatch, answer, from_caller
from .checkpoint import RETOLD_LENGTH, Checkpoint, EarlierFailureError
from .checkpointer import Checkpointer

log = SafeLogger(__name__)


class JointCheckpoint:
    """A checkpoint that participants are added to, inside its block.

    Attributes:
        checkpoint_id: where it goes.
        participants: by name, each with its own `staged`, `timeline` and `progress`. Their `uploaded` is reached by
            all of them at once, after the block: not to be awaited inside it.
    """

    def __init__(
        self, checkpointer: Checkpointer, checkpoint_id: str, group: asyncio.TaskGroup, ended: MilestoneSource
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self.participants: dict[str, Checkpoint] = {}
        self._checkpointer = checkpointer
        self._group = group
        self._ended = ended
        self._wishes: asyncio.Queue[PartRequest] = asyncio.Queue()  # of the engine's loop
        self._later: dict[str, Callable[[], None]] = {}  # what is called when the body is done, by participant
        self._working: list[asyncio.Task[None]] = []
        self._operation: Operation | None = None
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {each.progress.phase}" for name, each in self.participants.items())
        return f"<JointCheckpoint {self.checkpoint_id!r} of {states or 'nobody yet'}>"

    def add(self, name: str, state: Any) -> Checkpoint:
        """Add a participant, whose state is saved under `name`, as `save({name: state})` would.

        When the state is taken depends on what it is:

        - a state dict, anything `Stateful` and any other value: now, before `add` returns. Between two calls without
          an `await` nothing else runs on the event loop, so their states are of one instant.
        - a function that returns such a state: when the block's body is done, one after the other, without an `await`
          between them: of one instant, too.
        - an `async` function: it is begun now, as a task of the block, and its state is taken when it returns. So is
          that of anything else that can be awaited, such as the answer of another process.

        With several ranks all of them add the same names in the same order, and the states are written in that order.

        Returns:
            The participant's own part of the save. When its `staged` is reached its tensors may change again, however
            long the others take.

        Raises:
            ArgumentError: the name is no name, or taken.
            CaptureError: a value cannot be saved; names it.
        """
        if self._is_closed:
            raise ClosedError("the joint checkpoint's block is left: nobody can be added any more")
        if type(name) is not str or not name:
            raise ArgumentError("name", f"{name!r} is not the name of a participant")
        if name in self.participants:
            raise ArgumentError("name", f"{name!r} is there already")
        part = Checkpoint(self.checkpoint_id, self._checkpointer._service.engine)
        part._operation = self._operation
        part._mark_retrieved()  # a failure is raised when the block is left
        part._uploaded.check_before(self._refuse_uploaded)
        part._staged.check_before(partial(self._refuse_staged, name))
        part._blocked_by = partial(self._never_ready, name, blocking=True)
        self.participants[name] = part
        asked: Future[SaveJob] = Future()
        self._wish(PartRequest(name=name, take=lambda: from_caller(asked, self._loop)))
        if isawaitable(state):
            self._await(name, lambda: state, part, asked)
        elif not callable(state) or isinstance(state, Mapping | Stateful):
            self._capture(name, state, part, asked)
        elif iscoroutinefunction(state) or iscoroutinefunction(getattr(state, "__call__", None)):  # noqa: B004
            self._await(name, state, part, asked)
        else:
            self._later[name] = partial(self._call, name, state, part, asked)
        return part

    def cancel(self) -> None:
        """Ask for the checkpoint to stop, as `Checkpoint.cancel` does; leaving the block raises `SaveCancelled`."""
        assert self._operation is not None
        self._give_up(SaveCancelled(self.checkpoint_id))

    def _never_ready(self, name: str, *, blocking: bool) -> str:
        """Return a participant for which `name` waits to be staged, and which is not ready before the caller goes on.

        Alone, each is staged by itself; several ranks keep to the order in which they were added.
        """
        names = [name]
        if self._checkpointer._service.line is not None:
            names = list(self.participants)[: list(self.participants).index(name) + 1]
        for each in names:
            if self.participants[each].timeline.between("capture") or self.participants[each]._staged.done():
                continue
            if blocking or each in self._later:
                return each
        return ""

    def _refuse_staged(self, name: str, blocking: bool) -> None:
        if not self._checkpointer._service.is_inside(self._operation):
            return
        if other := self._never_ready(name, blocking=blocking and _current_loop() is self._loop):
            when = "when the body of the block is done" if other in self._later else "by the event loop of this thread"
            raise DeadlockError(f"`staged` of {name!r} would wait for the state of {other!r}, which is taken {when}")

    def _refuse_uploaded(self, blocking: bool) -> None:
        if self._checkpointer._service.is_inside(self._operation):
            raise DeadlockError("`uploaded` is reached when the block of the joint checkpoint is left: await it there")

    async def _next_wish(self) -> PartRequest:
        """Wait for the caller's next wish, for as long as the caller's event loop is there."""
        watch = LoopWatch(self._loop)
        while True:
            with move_on_after(LOOK_S):
                return await self._wishes.get()
            watch.look()

    def _capture(self, name: str, state: Any, part: Checkpoint, asked: Future[SaveJob]) -> None:
        try:
            job = self._checkpointer._capture(part, {name: state})
        except Exception as error:
            answer(asked, copy(error))  # whoever catches the error: a participant that is not there fails all
            raise
        answer(asked, job)  # to nobody, if the save has failed meanwhile

    def _call(self, name: str, function: Callable[[], Any], part: Checkpoint, asked: Future[SaveJob]) -> None:
        try:
            state = function()
        except Exception as error:
            raise ParticipantError(name, f"raised {error!r}") from error
        if isawaitable(state):
            self._await(name, lambda: state, part, asked)
        else:
            self._capture(name, state, part, asked)

    def _await(self, name: str, function: Callable[[], Any], part: Checkpoint, asked: Future[SaveJob]) -> None:
        self._working.append(self._group.create_task(self._take_part(name, function, part, asked)))

    async def _take_part(
        self, name: str, function: Callable[[], Awaitable[Any]], part: Checkpoint, asked: Future[SaveJob]
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            state = await function()
        except asyncio.CancelledError as error:
            if task.cancelling():  # because the block ends
                raise
            raise ParticipantError(name, "was cancelled") from error
        except Exception as error:
            raise ParticipantError(name, f"raised {error!r}") from error
        self._capture(name, state, part, asked)

    def _fail(self, error: Exception) -> None:
        for part in list(self.participants.values()):
            part._fail(error)

    def _wish(self, wish: PartRequest) -> None:
        self._checkpointer._service.engine.call_soon(self._wishes.put, wish)

    def _give_up(self, error: CheckpointError) -> None:
        async def cancel() -> None:
            if self._operation is not None:
                self._operation.cancel(error)

        with suppress(ClosedError):  # the engine has stopped, and with it the save
            self._checkpointer._service.engine.call_soon(cancel)


@asynccontextmanager
async def joint_checkpoint(
    checkpointer: Checkpointer, checkpoint_id: CheckpointId, *, custom_metadata: Mapping[str, Any] | None = None
) -> AsyncIterator[JointCheckpoint]:
    """Save what several participants hold in one checkpoint, which is committed when the block is left.

        async with aiodcp.joint_checkpoint(checkpointer, "checkpoints/step-100") as ckpt:
            ckpt.add("model", model)
            ckpt.add("optim", optimizer)
            ckpt.add("replay", replay.snapshot)  # a function, or an async one

    It waits its turn first: one save is in flight at a time. Then each participant is staged and written when its
    state is there, while others still work on theirs. Left without an error, the block's checkpoint is complete and
    durable. An error in the block, of a participant or of its cancellation, of storage or of another rank ends the
    others and leaves nothing.

    It reads as any other checkpoint, each participant's values under its name: `load({"model": ..., "replay": ...})`.

    Args:
        checkpointer: of which it is a save.
        checkpoint_id: where to, as for `Checkpointer.save`.
        custom_metadata: likewise.

    Raises:
        ParticipantError: a participant raised, or was cancelled.
        SaveError: the checkpoint is not committed.

    Cancellation: gives the checkpoint up, and waits until it has left nothing. Once the commit has begun it is
    finished instead.
    """

    async def encode() -> Callable[[], bytes]:
        note = check_custom_metadata(custom_metadata)
        return lambda: note

    async with joint_after(checkpointer, checkpoint_id, encode) as joint:
        yield joint


@asynccontextmanager
async def joint_after(
    checkpointer: Checkpointer,
    checkpoint_id: CheckpointId,
    first: Callable[[], Awaitable[Callable[[], bytes]]],
    told: Callable[[JointCheckpoint, Exception | None], None] = lambda joint, error: None,
) -> AsyncIterator[JointCheckpoint]:
    """As `joint_checkpoint`.

    Args:
        checkpointer, checkpoint_id: likewise.
        first: is awaited before; it returns what makes the note, or fails the checkpoint on all ranks.
        told: called when it is known how the checkpoint has ended, in whatever thread knows it.
    """
    service = checkpointer._service
    service.check_open()
    service.refuse_inside("a joint checkpoint")
    wrong: ArgumentError | None = None
    try:
        place = checkpointer._storage.resolve(check_id(checkpoint_id))
    except ArgumentError as error:  # the other ranks are to hear of it
        place, wrong = str(checkpoint_id), error
    note: Callable[[], bytes] = bytes
    turn, ended = MilestoneSource("turn"), MilestoneSource("ended")
    group = asyncio.TaskGroup()
    joint = JointCheckpoint(checkpointer, place, group, ended)
    ended.when_done(partial(told, joint))

    def fail(error: Exception) -> None:
        joint._fail(error)
        ended.fail(error)

    operation = checkpointer._begin_several(place, turn, lambda: note(), joint._next_wish, ended.reach, fail)
    joint._operation = operation
    yield_to_engine(asyncio.get_running_loop(), ended)

    async def watch() -> None:
        await ended.settled()
        if (error := ended.error()) is not None:
            raise error

    try:
        if wrong is not None:
            raise wrong
        checkpointer._raise_unretrieved()
        note = await first()
        await turn.reached()
        checkpointer._raise_unretrieved()  # of the save that this one waited for
        async with group:
            watching = group.create_task(watch())
            with service.inside(operation):
                yield joint
            joint._is_closed = True
            for name in list(joint._later):  # no await between them
                joint._later.pop(name)()
            await asyncio.gather(*joint._working)
            watching.cancel()
            if not joint.participants:  # most likely a mistake: it would replace a checkpoint by nothing
                raise CaptureError("", "the checkpoint has no participant")
        joint._wish(PartRequest(name=""))
        await ended.settled()
    except BaseExceptionGroup as errors:
        first_one = errors.exceptions[0]  # which may be a group of the body's own
        for other in errors.exceptions[1:]:
            log.error("%s: besides, a participant failed: %s", place, repr(other))
        await _end(joint, turn, ended, first_one)
        raise first_one from first_one.__cause__
    except BaseException as error:
        await _end(joint, turn, ended, error)
        raise
    finally:
        joint._is_closed = True
    if (failure := ended.error()) is not None:
        raise failure


def _current_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # none is running in this thread
        return None


async def _end(joint: JointCheckpoint, turn: MilestoneSource, ended: MilestoneSource, error: BaseException) -> None:
    """Give the save up, and wait until it is over, unless it has not begun."""
    # A copy: the error itself is on its way through the caller's frames, which are not the engine's to clear.
    last = joint._checkpointer._last
    given_up = copy(error) if isinstance(error, CheckpointError) else SaveCancelled(joint.checkpoint_id)
    if last is not None and last._uploaded.error() is error:
        given_up = EarlierFailureError(f"told of an earlier save: {error!r}"[:RETOLD_LENGTH])
    joint._give_up(given_up)
    if not turn.done():
        return
    await ended.settled_whatever_cancels()
    if (failure := ended.error()) is not None:
        joint._fail(failure)  # also those who were added since
