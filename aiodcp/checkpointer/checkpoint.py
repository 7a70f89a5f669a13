"""One save under way, or done: what a user awaits, fences, watches and cancels."""

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
from .._state.tear_detector import TearDetector
from .._telemetry.progress import Progress, ProgressLog
from .._telemetry.timeline import Timeline
from ..errors import CheckpointError, ClosedError, RankError, SaveCancelled, SaveError

log = SafeLogger(__name__)


RETOLD_LENGTH = 1000  # characters of an earlier failure, told to ranks that have not heard of it


class Checkpoint(Handle):
    """One save under way, or done. To wait for it is to wait for `uploaded`.

    Attributes:
        checkpoint_id: where it goes.
        staged: reached when the state may change again: all of it is in host memory.
        uploaded: reached when the checkpoint is committed and durable. Fails if the save fails, as `staged` does if
            it was not reached before.
        timeline: when each phase began and ended, and for how long the caller was held.
    """

    def __init__(self, checkpoint_id: str, engine: Engine) -> None:
        self._staged, self._uploaded = MilestoneSource("staged"), MilestoneSource("uploaded")
        super().__init__(self._uploaded)
        self.checkpoint_id = checkpoint_id
        self.staged = Milestone(self._staged)
        self.uploaded = Milestone(self._uploaded)
        self.timeline = Timeline()
        self._engine = engine
        self._log = ProgressLog(engine.activity.moved)
        self._operation: Operation | None = None
        self._watch: TearDetector | None = None
        self._device_copies = DeviceCopies()
        self._queued = MilestoneSource("queued")
        self._blocked_by: Callable[[], str] = lambda: ""

    def __repr__(self) -> str:
        latest = self.progress
        return (
            f"<Checkpoint {self.checkpoint_id!r} {latest.phase}: "
            f"{latest.bytes_staged} staged, {latest.bytes_written} written of {latest.bytes_total} bytes>"
        )

    def __del__(self) -> None:
        if (error := self._unretrieved()) is not None:
            log.error("%s: the save failed, and nobody has seen it: %s", self.checkpoint_id, repr(error))

    @property
    def progress(self) -> Progress:
        """How far the save has come, now."""
        return self._log.latest

    def events(self) -> AsyncIterator[Progress]:
        """Iterate over the progress from the beginning to the end of the save, as it is made.

        The last one's phase is "done", "failed" or "cancelled"; a failure is raised by the milestones, not here.
        """
        return self._log.follow()

    def fence(self) -> None:
        """Let this thread go on to change the tensors as soon as that does no harm: `staged`, without an event loop.

        Tensors on devices may still be on their way then: the thread's current streams wait for the copies, so that
        kernels queued from now on run after them, and `staged` comes later. For tensors in host memory, and until all
        copies are queued, the thread itself waits. A save that fails lets go too; the milestones tell the failure.
        Call it on every stream that changes the tensors.

        Raises:
            SaveError: it would wait for a participant that is not ready, and may need this very thread. Or the
                current stream captures a graph, which cannot wait for what is outside of it.
        """
        if self._staged.done() or self._engine.is_forked:
            return
        if name := self._blocked_by():
            raise SaveError(f"staging waits for the participant {name!r}, which is not ready: add it after this one")
        watch = self._watch
        with self.timeline.record("fence"):
            if not self._device_copies:
                self._staged.settle()
                return
            self._queued.settle()
            self._device_copies.fence()
            if watch is not None:
                watch.close()

    def cancel(self) -> None:
        """Ask for the save to stop. Returns at once; from any thread.

        Both milestones then fail with `SaveCancelled` and what was written is removed, unless the commit has already
        begun: then the save is finished, and `uploaded` is reached.
        """
        with suppress(ClosedError):  # the engine has stopped, and with it every save
            self._engine.call_soon(self._cancel)

    async def _cancel(self) -> None:
        if self._operation is not None:
            self._operation.cancel()

    def _fail(self, error: Exception) -> None:
        if self._uploaded.done():  # reported already, before all of this rank's work had stopped
            return
        clear_traceback_frames(error)
        cancelled = isinstance(error, SaveCancelled)
        self._log.report("cancelled" if cancelled else "failed")
        # Who cancels a save need not be told that it was cancelled. And a failure that only comes of telling another
        # rank of an earlier one is not told in its turn: ranks would fail each other's saves for ever.
        retold = isinstance(error, RankError) and {each.kind for each in error.failures} == {
            EarlierFailureError.__name__
        }
        self._queued.fail(error)
        for milestone in (self._staged, self._uploaded):
            milestone.fail(error, retrieved=cancelled or retold)

    def _unretrieved(self) -> Exception | None:
        """Return the failure of this save, if nobody has seen it at either milestone."""
        error = self._uploaded.unretrieved()
        if error is not None and self._staged.error() is not None and self._staged.unretrieved() is None:
            return None
        return error

    def _mark_retrieved(self) -> None:
        self._staged.mark_retrieved()
        self._uploaded.mark_retrieved()


class EarlierFailureError(CheckpointError):
    """A rank does not save, because it is told of an earlier save that failed."""


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
