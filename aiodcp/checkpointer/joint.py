"""One checkpoint of several participants, each with a state of its own, committed once: all of them or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
from .arguments import CheckpointId, EncodeMetadata, check_id, metadata_encoder
from .caller_loop import CHECK_INTERVAL_S, HandOver, LoopWatch
from .checkpoint import Checkpoint, EarlierFailureError, SaveState
from .checkpointer import Checkpointer, session_of
from .session import Session

log: SafeLogger = SafeLogger(__name__)


class JointCheckpoint:
    """A checkpoint that participants are added to, inside its block.

    Attributes:
        checkpoint_id: where it goes.
        participants: by name, each with its own `staged`, `timeline` and `progress`. Their `uploaded` is reached by
            all of them at once, after the block: not to be awaited inside it.
    """

    def __init__(self, save: JointSave) -> None:
        self.checkpoint_id: str = save.checkpoint_id
        self.participants: dict[str, Checkpoint] = {}
        self._save = save

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {each.progress.phase}" for name, each in self.participants.items())
        return f"<JointCheckpoint {self.checkpoint_id!r} of {states or 'no participants yet'}>"

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
            ArgumentError: the name is not a name, or taken.
            CaptureError: a value cannot be saved; names it.
        """
        if self._save.is_closed:
            raise ClosedError("the joint checkpoint's block has ended: participants can no longer be added")
        if type(name) is not str or not name:
            raise ArgumentError("name", f"must be a str that is not empty, got {name!r}")
        if name in self.participants:
            raise ArgumentError("name", f"a participant named {name!r} already exists")
        part = self._save.new_part(name)
        self.participants[name] = checkpoint = Checkpoint(part.state)
        if isawaitable(state):
            self._save.await_state(part, lambda: state)
        elif not callable(state) or isinstance(state, Mapping | Stateful):
            self._save.capture(part, state)
        elif iscoroutinefunction(state) or iscoroutinefunction(getattr(state, "__call__", None)):  # noqa: B004
            self._save.await_state(part, state)
        else:
            self._save.call_later(part, state)
        return checkpoint

    def cancel(self) -> None:
        """Ask for the checkpoint to stop, as `Checkpoint.cancel` does; leaving the block raises `SaveCancelled`."""
        self._save.give_up(SaveCancelled(self.checkpoint_id))


class Part:
    """A participant of a joint checkpoint, from the inside.

    Attributes:
        name: its name.
        state: of its save.
        captured: what the engine waits for.
    """

    def __init__(self, name: str, state: SaveState) -> None:
        self.name = name
        self.state = state
        self.captured: HandOver[SaveJob] = HandOver()


class JointSave:
    """The save of a joint checkpoint, from the inside.

    Attributes:
        checkpoint_id: where it goes.
        parts: its participants, by name.
        is_closed: whether its block is left, so that participants can no longer be added.
        turn: reached when it has its turn.
        ended: reached when the checkpoint is committed; fails if it is not.
    """

    def __init__(self, session: Session, checkpoint_id: str) -> None:
        """Begin: it waits its turn from now on."""
        self.checkpoint_id = checkpoint_id
        self.parts: dict[str, Part] = {}
        self.is_closed: bool = False
        self.turn: MilestoneSource = MilestoneSource("turn")
        self.ended: MilestoneSource = MilestoneSource("ended")
        self._session = session
        self._custom_metadata: Callable[[], bytes] = bytes
        self._group = asyncio.TaskGroup()
        self._requests: asyncio.Queue[PartRequest] = asyncio.Queue()  # of the engine's loop
        self._later: dict[str, Callable[[], None]] = {}  # what is called when the body is done, by participant
        self._working: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._operation: Operation = session.saves.begin_joint(
            checkpoint_id,
            self.turn.reach,
            lambda: self._custom_metadata(),
            self._next_request,
            self.ended.reach,
            self._fail,
        )
        yield_to_engine(self._loop, self.ended)

    # --- participants

    def new_part(self, name: str) -> Part:
        """Return a participant of that name, whose state is still to be taken."""
        state = SaveState(self.checkpoint_id, self._session.flows.engine, self._session.saves)
        state.operation = self._operation
        state.mark_retrieved()  # a failure is raised when the block is left
        state.uploaded.check_before(self._refuse_uploaded)
        state.staged.check_before(partial(self._refuse_staged, name))
        state.blocked_by = partial(self._never_ready, name, blocking=True)
        self.parts[name] = part = Part(name, state)
        self._request(PartRequest(name=name, take=part.captured.wait))
        return part

    def capture(self, part: Part, state: Any) -> None:
        """Take a participant's state as it is now."""
        try:
            job = self._session.saves.capture(part.state, {part.name: state})
        except Exception as error:
            part.captured.fail(copy(error))  # whoever catches the error: a participant that is not there fails all
            raise
        part.captured.give(job)  # too late, if the save has failed meanwhile

    def await_state(self, part: Part, function: Callable[[], Any]) -> None:
        """Begin what will return a participant's state, as a task of the block."""
        self._working.append(self._group.create_task(self._await_and_capture(part, function)))

    def call_later(self, part: Part, function: Callable[[], Any]) -> None:
        """Have a function called that returns a participant's state, when the block's body is done."""

        def call() -> None:
            try:
                state = function()
            except Exception as error:
                raise ParticipantError(part.name, f"raised {error!r}") from error
            if isawaitable(state):
                self.await_state(part, lambda: state)
            else:
                self.capture(part, state)

        self._later[part.name] = call

    async def _await_and_capture(self, part: Part, function: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            state = await function()
        except asyncio.CancelledError as error:
            if task.cancelling():  # because the block ends
                raise
            raise ParticipantError(part.name, "was cancelled") from error
        except Exception as error:
            raise ParticipantError(part.name, f"raised {error!r}") from error
        self.capture(part, state)

    # --- waits that would never end

    def _never_ready(self, name: str, *, blocking: bool) -> str:
        """Return a participant for which `name` waits to be staged, and which is not ready before the caller goes on.

        Alone, each is staged by itself; several ranks keep to the order in which they were added.
        """
        names = [name]
        if self._session.flows.channel is not None:
            names = list(self.parts)[: list(self.parts).index(name) + 1]
        for each in names:
            state = self.parts[each].state
            if state.timeline.between("capture") or state.staged.done():
                continue
            if blocking or each in self._later:
                return each
        return ""

    def _refuse_staged(self, name: str, blocking: bool) -> None:
        if not self._session.flows.is_inside(self._operation):
            return
        if other := self._never_ready(name, blocking=blocking and _current_loop() is self._loop):
            when = "when the block's body ends" if other in self._later else "by this thread's event loop"
            raise DeadlockError(
                f"waiting for `staged` of {name!r} here would deadlock: the state of {other!r} is captured {when}"
            )

    def _refuse_uploaded(self, blocking: bool) -> None:
        if self._session.flows.is_inside(self._operation):
            raise DeadlockError("`uploaded` is reached only after the joint checkpoint's block: await it there")

    # --- from the beginning to the end

    async def wait_for_turn(self, encode_metadata: EncodeMetadata) -> None:
        """Wait until participants may be added.

        Raises:
            CheckpointError: an earlier save failed and was not awaited, or what `encode_metadata` raises.
        """
        saves = self._session.saves
        saves.raise_unretrieved()
        self._custom_metadata = await encode_metadata()
        await self.turn.reached()
        saves.raise_unretrieved()  # of the save that this one waited for

    @asynccontextmanager
    async def block(self) -> AsyncIterator[None]:
        """Run the caller's block, and what it has begun; commit what has come of it.

        Raises:
            BaseExceptionGroup: the block or a participant raised, or the save failed meanwhile.
        """
        async with self._group:
            watching = self._group.create_task(self._raise_failure())
            with self._session.flows.inside(self._operation):
                yield
            self.is_closed = True
            for name in list(self._later):  # no await between them
                self._later.pop(name)()
            await asyncio.gather(*self._working)
            watching.cancel()
            if not self.parts:  # most likely a mistake: it would replace a checkpoint by nothing
                raise CaptureError("", "no participant was added to the checkpoint")
        self._request(PartRequest(name=None))
        await self.ended.settled()

    async def _raise_failure(self) -> None:
        await self.ended.settled()
        if (error := self.ended.error()) is not None:
            raise error

    def give_up(self, error: CheckpointError) -> None:
        """Cancel the save, which fails with `error`."""
        with suppress(ClosedError):  # the engine has stopped, and with it the save
            self._session.flows.cancel(self._operation, error)

    async def end(self, error: BaseException) -> None:
        """Cancel the save because of `error`, and wait until it is over, unless it has not begun."""
        last = self._session.saves.last
        if last is not None and last.uploaded.error() is error:
            self.give_up(EarlierFailureError.of(error))
        elif isinstance(error, CheckpointError):
            # A copy: the error itself is on its way through the caller's frames, which are not the engine's to clear.
            self.give_up(copy(error))
        else:
            self.give_up(SaveCancelled(self.checkpoint_id))
        if not self.turn.done():
            return
        await self.ended.settled_uncancellable()
        if (failure := self.ended.error()) is not None:
            self._fail_parts(failure)  # also those that were added since

    def _fail(self, error: Exception) -> None:
        self._fail_parts(error)
        self.ended.fail(error)

    def _fail_parts(self, error: Exception) -> None:
        for part in list(self.parts.values()):
            part.state.fail(error)

    def _request(self, request: PartRequest) -> None:
        self._session.flows.engine.call_soon(self._requests.put, request)

    async def _next_request(self) -> PartRequest:
        """Wait for the caller's next request, for as long as the caller's event loop is there."""
        watch = LoopWatch(self._loop)
        while True:
            with move_on_after(CHECK_INTERVAL_S):
                return await self._requests.get()
            watch.check()


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
        checkpointer: saves it.
        checkpoint_id: where to, as for `Checkpointer.save`.
        custom_metadata: likewise.

    Raises:
        ParticipantError: a participant raised, or was cancelled.
        SaveError: the checkpoint is not committed.

    Cancellation: gives the checkpoint up, and waits until it has left nothing. Once the commit has begun it is
    finished instead.
    """
    encode = metadata_encoder(custom_metadata)
    async with joint_save(session_of(checkpointer), checkpoint_id, encode) as save:
        yield JointCheckpoint(save)


@asynccontextmanager
async def joint_save(
    session: Session,
    checkpoint_id: CheckpointId,
    encode_metadata: EncodeMetadata,
    on_end: Callable[[JointSave, Exception | None], None] = lambda save, error: None,
) -> AsyncIterator[JointSave]:
    """As `joint_checkpoint`, for a session.

    Args:
        session: of a Checkpointer.
        checkpoint_id: as for `joint_checkpoint`.
        encode_metadata: awaited before.
        on_end: called when it is known how the checkpoint has ended, in whatever thread knows it.
    """
    session.flows.check_open()
    session.flows.refuse_inside("begin a joint checkpoint")
    problem: ArgumentError | None = None
    try:
        path = session.storage.resolve(check_id(checkpoint_id))
    except ArgumentError as error:  # the other ranks are to hear of it
        path, problem = str(checkpoint_id), error
    save = JointSave(session, path)
    save.ended.when_done(partial(on_end, save))
    try:
        if problem is not None:
            raise problem
        await save.wait_for_turn(encode_metadata)
        async with save.block():
            yield save
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]  # which may be a group of the body's own
        for other in errors.exceptions[1:]:
            log.error("%s: another participant also failed: %s", path, repr(other))
        await save.end(first)
        raise first from first.__cause__
    except BaseException as error:
        await save.end(error)
        raise
    finally:
        save.is_closed = True
    if (failure := save.ended.error()) is not None:
        raise failure


def _current_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # none is running in this thread
        return None
