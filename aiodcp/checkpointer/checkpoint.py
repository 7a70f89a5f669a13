"""One save under way, or done: what a user awaits, fences, watches and cancels, and what the library keeps of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from traceback import walk_tb

from .._distributed.operation import Operation
from .._engine.device_copies import DeviceCopies
from .._engine.loop import Engine
from .._engine.milestone import Handle, Milestone, MilestoneSource
from .._log import SafeLogger
from .._save.parts import PartExchange
from .._save.snapshot_source import SnapshotSource
from .._state.tear_detector import TearDetector
from .._telemetry.progress import Progress, ProgressLog
from .._telemetry.timeline import Timeline
from ..errors import CheckpointError, ClosedError, RankError, SaveCancelled, SaveError
from .snapshot import SnapshotBlock

log: SafeLogger = SafeLogger(__name__)

REPEATED_LENGTH = 1000  # characters of an earlier failure that is repeated to ranks that have not heard of it


class EarlierFailureError(CheckpointError):
    """A rank does not save, because this call raises the failure of an earlier save."""

    @classmethod
    def of(cls, error: BaseException) -> EarlierFailureError:
        """Return the error for the other ranks when `error`, of an earlier save, is raised on this one."""
        return cls(f"an earlier save failed: {error!r}"[:REPEATED_LENGTH])


class SaveState:
    """What the library keeps of a save, and writes to. A user holds the read side, a `Checkpoint`.

    Attributes:
        checkpoint_id: where it goes.
        captured: reached when its tensors have been looked at.
        queued: reached when all copies from devices are queued, or no tensor must be waited for.
        staged, uploaded: see `Checkpoint`.
        timeline: likewise.
        log: of its progress.
        operation: what the ranks do for it; None before it has begun.
        tears: sees whether captured tensors change before they are staged; None not to look.
        device_copies: brings tensors from devices.
        source: of snapshots of what is staged.
        blocked_by: returns the name of a participant that staging waits for, and that may need this very thread.
        part: of one that another process commits.
    """

    def __init__(self, checkpoint_id: str, engine: Engine, owner: object) -> None:
        self.checkpoint_id = checkpoint_id
        self.source: SnapshotSource = SnapshotSource(owner)
        self.captured: MilestoneSource = MilestoneSource("captured")
        self.queued: MilestoneSource = MilestoneSource("queued")
        self.staged: MilestoneSource = MilestoneSource("staged")
        self.uploaded: MilestoneSource = MilestoneSource("uploaded")
        self.timeline: Timeline = Timeline()
        self.log: ProgressLog = ProgressLog(engine.activity.note_progress)
        self.operation: Operation | None = None
        self.tears: TearDetector | None = None
        self.device_copies: DeviceCopies = DeviceCopies()
        self.blocked_by: Callable[[], str] = lambda: ""
        self.part: PartExchange | None = None
        self.engine = engine

    def __del__(self) -> None:
        if (error := self.unretrieved()) is not None:
            log.error("%s: the save failed, and its error was never retrieved: %s", self.checkpoint_id, repr(error))

    def fence(self) -> None:
        """As `Checkpoint.fence`."""
        if self.staged.done() or self.engine.is_forked:
            return
        if name := self.blocked_by():
            raise SaveError(
                f"staging waits for participant {name!r}, whose state may need this thread: add it after this one"
            )
        tears = self.tears
        with self.timeline.record("fence"):
            if not self.device_copies:
                self.staged.settle()
                return
            self.queued.settle()
            self.device_copies.fence()
            if tears is not None:
                tears.close()

    def cancel(self) -> None:
        """As `Checkpoint.cancel`."""
        with suppress(ClosedError):  # the engine has stopped, and with it every save
            self.engine.call_soon(self._cancel)

    async def _cancel(self) -> None:
        if self.operation is not None:
            self.operation.cancel()

    def fail(self, error: Exception) -> None:
        """Fail the milestones that are not reached yet."""
        if self.uploaded.done():  # reported already, before all of this rank's work had stopped
            return
        clear_traceback_frames(error)
        cancelled = isinstance(error, SaveCancelled)
        self.log.report("cancelled" if cancelled else "failed")
        # Cancelling a save is not a failure to be raised later. Nor is one that only repeats another rank's earlier
        # failure: ranks would fail each other's saves for ever.
        repeated = isinstance(error, RankError) and {each.kind for each in error.failures} == {
            EarlierFailureError.__name__
        }
        self.captured.fail(error)
        self.queued.fail(error)
        if self.part is not None:
            self.part.written.fail(error, retrieved=True)
        for milestone in (self.staged, self.uploaded):
            milestone.fail(error, retrieved=cancelled or repeated)

    def unretrieved(self) -> Exception | None:
        """Return the failure of this save, unless it was retrieved from either milestone."""
        error = self.uploaded.unretrieved()
        if error is not None and self.staged.error() is not None and self.staged.unretrieved() is None:
            return None
        return error

    def mark_retrieved(self) -> None:
        """Mark any failure, present or future, as retrieved; it is reported elsewhere."""
        self.staged.mark_retrieved()
        self.uploaded.mark_retrieved()


class Checkpoint(Handle):
    """One save under way, or done. To wait for it is to wait for `uploaded`.

    Attributes:
        checkpoint_id: where it goes.
        staged: reached when the state may change again: all of it is in host memory.
        uploaded: reached when the checkpoint is committed and durable. Fails if the save fails, as `staged` does if
            it was not reached before.
        timeline: when each phase began and ended, and for how long the caller was held.
    """

    def __init__(self, state: SaveState) -> None:
        super().__init__(state.uploaded)
        self.checkpoint_id: str = state.checkpoint_id
        self.staged: Milestone = Milestone(state.staged)
        self.uploaded: Milestone = Milestone(state.uploaded)
        self.timeline: Timeline = state.timeline
        self._state = state

    def __repr__(self) -> str:
        latest = self.progress
        return (
            f"<Checkpoint {self.checkpoint_id!r} {latest.phase}: "
            f"{latest.bytes_staged} staged, {latest.bytes_written} written of {latest.bytes_total} bytes>"
        )

    @property
    def progress(self) -> Progress:
        """How far the save has come, now."""
        return self._state.log.latest

    def events(self) -> AsyncIterator[Progress]:
        """Iterate over the progress from the beginning to the end of the save, as it is made.

        The last one's phase is "done", "failed" or "cancelled"; a failure is raised by the milestones, not here.
        """
        return self._state.log.follow()

    def fence(self) -> None:
        """Block this thread until it may change the tensors: `staged`, without an event loop.

        Tensors on devices may still be on their way then: the thread's current streams wait for the copies, so that
        kernels queued from now on run after them, and `staged` comes later. For tensors in host memory, and until all
        copies are queued, the thread itself waits. A save that fails ends the wait, too; the milestones raise the
        failure. Call it on every stream that changes the tensors.

        Raises:
            SaveError: it would wait for a participant that is not ready, and may need this very thread. Or the
                current stream captures a graph, which cannot wait for what is outside of it.
        """
        self._state.fence()

    def snapshot(self) -> SnapshotBlock:
        """Read what is staged, before it is uploaded: views of the staging buffer, kept while the block runs.

            async with ckpt.snapshot() as view:  # or `with`, without an event loop
                for fqn, tensor in view.items():
                    await send(fqn, tensor)

        Entering waits for `staged`. The next save waits for the end of the block; with `spare_buffer=True` it takes a
        second buffer instead. Afterwards the tensors are not to be used: copy what is to be kept.

        Raises:
            SaveError: on entering: the save failed before it was staged; a later save has taken the buffer; or with
                `max_host_bytes` the buffer never has all of it.

        Cancellation: of the wait for `staged`; the save goes on.
        """
        return SnapshotBlock(self.checkpoint_id, self.staged, self._state.source)

    def cancel(self) -> None:
        """Ask for the save to stop. Returns at once; from any thread.

        Both milestones then fail with `SaveCancelled` and what was written is removed, unless the commit has already
        begun: then the save is finished, and `uploaded` is reached.
        """
        self._state.cancel()


def clear_traceback_frames(error: BaseException | None) -> None:
    """Clear the frames that an error's tracebacks hold: in their variables is the staging buffer.

    But not coroutines of others: an error of `capture` has the caller's in its traceback, and clearing ends it.
    """
    seen: set[int] = set()  # an error that is raised again while it is handled is in its own chain
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in walk_tb(error.__traceback__):
            ours = frame.f_globals.get("__name__", "").startswith("aiodcp.")
            if ours or not frame.f_code.co_flags & (CO_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR):
                with suppress(RuntimeError):  # it is still running
                    frame.clear()
        error = error.__cause__ or error.__context__
