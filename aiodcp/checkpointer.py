"""What a user holds: the `Checkpointer`, which saves and loads, and a `Checkpoint`, which is one save under way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, MutableMapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from traceback import clear_frames
from types import TracebackType
from typing import Any, Literal, TypeVar, TypeVarTuple, overload

import anyio
import torch
from anyio import CancelScope
from torch.distributed.checkpoint.stateful import Stateful

from ._capture import Capture, call_stateful, capture, flatten
from ._commit import remove_files
from ._engine import Engine
from ._load import Loader, find_holders
from ._milestone import Milestone, Progress, ProgressLog
from ._save import Job, Saver
from ._stage import Checksum, default_checksum, mark_streams
from ._turns import give_turns, prompt_turns
from .errors import (
    ArgumentError,
    BusyError,
    CaptureError,
    CheckpointError,
    ClosedError,
    LoadError,
    SaveCancelled,
    SaveError,
)
from .storage import LocalStorage, Storage

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CheckpointId = str | os.PathLike[str]


class Checkpoint:
    """One save under way, or done.

    Attributes:
        checkpoint_id: where it goes.
        staged: reached when the state may change again: all of it is in host memory.
        uploaded: reached when the checkpoint is committed and durable. Fails if the save fails, as `staged` does if
            it was not reached before.
    """

    def __init__(self, checkpoint_id: str, engine: Engine) -> None:
        self.checkpoint_id = checkpoint_id
        self.staged = Milestone("staged")
        self.uploaded = Milestone("uploaded")
        self._engine = engine
        self._log = ProgressLog()
        self._scope = CancelScope()

    def __repr__(self) -> str:
        latest = self.progress
        return (
            f"<Checkpoint {self.checkpoint_id!r} {latest.phase}: "
            f"{latest.bytes_staged} staged, {latest.bytes_written} written of {latest.bytes_total} bytes>"
        )

    def __await__(self) -> Generator[Any, None, None]:
        """Wait for `uploaded`."""
        return self.uploaded.__await__()

    @property
    def progress(self) -> Progress:
        """How far the save has come, now."""
        return self._log.latest

    def events(self) -> AsyncIterator[Progress]:
        """Iterate over the progress from the beginning to the end of the save, as it is made.

        The last one's phase is "done", "failed" or "cancelled"; a failure is raised by the milestones, not here.
        """
        return self._log.follow()

    def cancel(self) -> None:
        """Ask for the save to stop. Returns at once; from any thread.

        Both milestones then fail with `SaveCancelled` and what was written is removed, unless the commit has already
        begun: then the save is finished, and `uploaded` is reached.
        """
        with suppress(ClosedError):  # the engine has stopped, and with it every save
            self._engine.call_soon(self._cancel)

    async def _cancel(self) -> None:
        self._scope.cancel()

    def _fail(self, error: Exception) -> None:
        _let_go(error)
        cancelled = isinstance(error, SaveCancelled)
        self._log.report("cancelled" if cancelled else "failed")
        for milestone in (self.staged, self.uploaded):
            milestone.fail(error, told=cancelled)  # who cancels a save need not be told that it was cancelled

    def _untold(self) -> Exception | None:
        """The failure of this save, if no milestone has told anyone."""
        error = self.uploaded.untold()
        if error is not None and self.staged.failed() and self.staged.untold() is None:
            return None
        return error


class Checkpointer:
    """Save and load checkpoints in DCP's format from an event loop that goes on turning meanwhile.

        async with aiodcp.Checkpointer() as checkpointer:
            ckpt = await checkpointer.save({"model": model, "optim": optimizer}, "checkpoints/step-100")
            await ckpt.staged    # the state may change again
            await ckpt.uploaded  # the checkpoint is durable

    One save is in flight at a time. Leaving the block, by an error too, waits for it; a failed save that nobody
    awaited is raised there, or by the next `save`.

    Args:
        storage: where checkpoints live; by default directories of the local file system.
        keep_buffers: keep the staging buffer, which is as large as the checkpoint, from save to save. False gives
            the memory back after each, and the next save takes longer to stage: fresh memory must be touched first.
        copy_threads: cores that copy host tensors while a save is staged; by default all, up to four, which is what
            it takes to fill the memory's bandwidth.
        io_threads: threads that read and write files.
        checksum: computes the CRC32 of bytes; by default isal's if the extra `fast` is installed, else zlib's.
    """

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        keep_buffers: bool = True,
        copy_threads: int | None = None,
        io_threads: int = 4,
        checksum: Checksum | None = None,
    ) -> None:
        if copy_threads is None:
            copy_threads = min(4, os.cpu_count() or 1)
        for name, value in (("copy_threads", copy_threads), ("io_threads", io_threads)):
            if type(value) is not int or value < 1:
                raise ArgumentError(name, f"{value!r} is not a number of threads")
        if storage is not None and (isinstance(storage, type) or not isinstance(storage, Storage)):
            raise ArgumentError("storage", f"{storage!r} has not the methods of aiodcp.Storage")
        if checksum is not None and not callable(checksum):
            raise ArgumentError("checksum", f"{checksum!r} cannot be called")
        self._storage = storage if storage is not None else LocalStorage()
        self._keep_buffers = keep_buffers
        self._checksum = checksum or default_checksum()
        self._engine = Engine(copy_threads=copy_threads, io_threads=io_threads)
        self._open = False
        self._saves: set[Future[None]] = set()  # from being asked for until what they replaced is removed
        self._turns: dict[Milestone, Future[Job | None]] = {}  # of the saves that are not captured yet
        self._work: set[Future[Any]] = set()  # loads and preparations
        self._last: Checkpoint | None = None
        self._saver: Saver
        self._loader: Loader
        self._slot: anyio.Semaphore

    def __repr__(self) -> str:
        return f"<Checkpointer on {self._storage!r}, {self._engine!r}, {'busy' if self._is_busy() else 'idle'}>"

    async def __aenter__(self) -> Checkpointer:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world_size = torch.distributed.get_world_size()
            if world_size > 1:
                raise CheckpointError(f"{world_size} ranks: this version saves and loads from one process")
        self._engine.start()
        self._open = True
        self._slot = anyio.Semaphore(1)  # fair: saves go in the order in which they were asked for
        self._saver = Saver(
            self._storage, self._engine.threads, keep_buffers=self._keep_buffers, checksum=self._checksum
        )
        self._loader = Loader(self._storage, self._engine.threads, checksum=self._checksum)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        try:
            await self._drain()
        finally:
            self._engine.stop()
            del self._saver, self._loader  # and with them the host memory
        untold = self._take_untold()
        self._last = None
        if untold is None:
            return
        if error is None:
            raise untold
        error.add_note(f"aiodcp: besides, the save in flight failed: {untold!r}")

    async def _drain(self) -> None:
        """Wait for all that was asked for. Cancelled meanwhile, give it all up, and wait for that."""
        cancelled = False
        while flows := [*self._saves, *self._work]:
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
            turn.fail(ClosedError("the Checkpointer was closed before this save had its turn"))
            _answer(asked, None)
        if self._last is not None:
            self._last.cancel()
        for work in list(self._work):
            work.cancel()

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError("the Checkpointer is not open: use it inside `async with`")

    def _is_busy(self) -> bool:
        return bool(self._turns) or (self._last is not None and not self._last.uploaded.done())

    # --- saving

    @overload
    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        on_busy: Literal["wait", "raise"] = ...,
    ) -> Checkpoint: ...

    @overload
    async def save(
        self, state_dict: Mapping[str, Any], checkpoint_id: CheckpointId, *, on_busy: Literal["skip"]
    ) -> Checkpoint | None: ...

    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        on_busy: Literal["wait", "skip", "raise"] = "wait",
    ) -> Checkpoint | None:
        """Begin to save `state_dict`, and return as soon as it is captured.

        Until `staged` is reached the tensors must not change; all other values are taken as they are now. The values
        of the top level may be `Stateful` (with `state_dict()` and `load_state_dict()`), as in DCP. An existing
        checkpoint at the same place is replaced when the new one is complete, and not before.

        Args:
            state_dict: nested dicts and lists of tensors and any picklable values.
            checkpoint_id: where to; for the local file system a directory, which is made.
            on_busy: what to do while another save is in flight: "wait" for its end, in turn; "skip" this one and
                return None; or "raise" `BusyError`.

        Raises:
            CaptureError: a value cannot be saved; names it.
            BusyError: see `on_busy`.
            SaveError: an earlier save failed and nobody had awaited it.

        Cancellation: while it waits its turn, gives the turn up.
        """
        self._check_open()
        place = self._storage.resolve(_check_id(checkpoint_id))
        if on_busy not in ("wait", "skip", "raise"):
            raise ArgumentError("on_busy", f'{on_busy!r} is none of "wait", "skip", "raise"')
        untold = self._take_untold()
        if untold is not None:
            raise untold
        if self._is_busy() and on_busy == "skip":
            return None
        if self._is_busy() and on_busy == "raise":
            raise BusyError(self._last.checkpoint_id if self._last else place)
        checkpoint = Checkpoint(place, self._engine)
        turn = Milestone("turn")
        asked: Future[Job | None] = Future()
        flow = self._engine.call_soon(self._save_in_turn, checkpoint, turn, asked)
        self._saves.add(flow)
        flow.add_done_callback(self._saves.discard)
        self._turns[turn] = asked
        try:
            await turn
            untold = self._take_untold()  # of the save that this one waited for
            if untold is not None:
                raise untold
            checkpoint._log.restart()
            taken = capture(state_dict)
            job = Job(
                taken=taken,
                marks=mark_streams(taken.values),
                checkpoint_id=place,
                staged=checkpoint.staged,
                uploaded=checkpoint.uploaded,
                log=checkpoint._log,
            )
            if not _answer(asked, job):
                raise ClosedError("the Checkpointer was closed before this save was captured")
            self._last = checkpoint
        except BaseException:
            _answer(asked, None)
            raise
        finally:
            del self._turns[turn]
        give_turns(asyncio.get_running_loop(), checkpoint.uploaded.done)
        return checkpoint

    async def _save_in_turn(self, checkpoint: Checkpoint, turn: Milestone, asked: Future[Job | None]) -> None:
        replaced: list[str] = []
        async with self._slot:
            turn.reach()
            job = await asyncio.wrap_future(asked)
            if job is None:
                return
            try:
                with prompt_turns(), checkpoint._scope:
                    replaced = await self._saver.save(job)
                if checkpoint._scope.cancelled_caught:
                    checkpoint._fail(SaveCancelled(checkpoint.checkpoint_id))
            except CheckpointError as error:
                checkpoint._fail(error)
            except Exception as error:
                failure = SaveError(repr(error))
                failure.__cause__ = error
                checkpoint._fail(failure)
        # Removing a large file takes long (0.2 s a GiB on ext4): the next save need not wait for it.
        await remove_files(self._storage, checkpoint.checkpoint_id, replaced)

    def _take_untold(self) -> Exception | None:
        """Return the failure of the last save if nobody was told, and count it as told."""
        last = self._last
        if last is None:
            return None
        error = last._untold()
        if error is not None:
            last.uploaded.fail(error, told=True)
        return error

    async def prepare(self, state_dict: Mapping[str, Any]) -> None:
        """Plan for states of this structure and have the host memory ready, so that the first save is quick too.

        Raises:
            CaptureError: a value cannot be saved; names it.
            StageError: there is not enough host memory.

        Cancellation: takes effect when the step under way is done.
        """
        self._check_open()
        await self._on_engine(self._prepare, capture(state_dict))

    async def _prepare(self, taken: Capture) -> None:
        async with self._slot:
            await self._saver.prepare(taken)

    # --- loading

    async def load(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        strict: bool = True,
        cast: bool = False,
        weights_only: bool = True,
        check_crc: bool = True,
    ) -> None:
        """Load a checkpoint into `state_dict`: tensors in place, other values replaced.

        `Stateful` values of the top level are asked for their `state_dict()`, which is filled and given to their
        `load_state_dict()`. An optimizer that has not stepped yet has no state to fill: it is given the checkpoint's.
        Everything that can be known without the data is checked before the first byte of the
        caller's tensors changes, and all other values are read before the first tensor.

        Args:
            state_dict: what is wanted, with tensors of the right shapes on the devices where they are wanted.
            checkpoint_id: where from; written by this library or by `torch.distributed.checkpoint`.
            strict: both must have the same names. False loads those that both have.
            cast: allow conversions that lose, such as float32 to bfloat16; others are always allowed.
            weights_only: unpickle values with torch's restricted unpickler. False runs whatever code the checkpoint
                brings: only for files that you trust as you trust your own programs.
            check_crc: compare each item with its CRC32.

        Raises:
            NotACheckpointError: there is no committed checkpoint.
            MismatchError: names every value that is missing, unexpected, or does not fit.
            CorruptError: what is stored is not what was saved. Found by its CRC32 after loading began, tensors may
                already have changed.
            UnsafeError: the checkpoint asks for more than data.

        Cancellation: takes effect when the read under way is done; tensors may already have changed.
        """
        self._check_open()
        place = self._storage.resolve(_check_id(checkpoint_id))
        if not isinstance(state_dict, MutableMapping):
            raise ArgumentError("state_dict", f"a {type(state_dict).__name__} takes no values: pass a dict")
        try:
            states = call_stateful(state_dict)
        except CaptureError as error:
            raise LoadError(str(error)) from error.__cause__
        lazy = [
            key
            for key, value in state_dict.items()
            if isinstance(value, torch.optim.Optimizer) and not states[key]["state"]
        ]
        if lazy:
            await self._on_engine(self._loader.grow_optimizers, states, lazy, place)
        fqns, paths, values = flatten(states)
        holders = find_holders(states, fqns, paths, values)
        marks = mark_streams(values)
        loaded = await self._on_engine(
            lambda: self._loader.load(
                fqns, values, place, marks, strict=strict, cast=cast, weights_only=weights_only, check_crc=check_crc
            )
        )
        for number, value in loaded.items():
            holder, key = holders[number]
            holder[key] = value
        for key, state in states.items():
            target = state_dict[key]
            if target is not state and isinstance(target, Stateful):
                target.load_state_dict(state)
            else:
                state_dict[key] = state

    async def _on_engine(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run `function` on the engine's loop and wait for it here.

        Cancellation: cancels it there, and waits until it has stopped: it may be using the caller's memory.
        """
        ended = Milestone("ended")

        async def run() -> T:
            try:
                with prompt_turns():
                    return await function(*args)
            finally:
                ended.reach()

        future = self._engine.call_soon(run)
        self._work.add(future)
        future.add_done_callback(self._work.discard)
        give_turns(asyncio.get_running_loop(), ended.done)
        try:
            await ended
        except asyncio.CancelledError:
            future.cancel()
            while not ended.done():
                with suppress(asyncio.CancelledError):
                    await ended
            raise
        if future.cancelled():
            raise ClosedError("the Checkpointer was closed meanwhile")
        return future.result()


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an error's tracebacks hold: in their variables is the staging buffer."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _answer(asked: Future[Job | None], job: Job | None) -> bool:
    """Answer a flow that has its turn, unless it has been answered already; tell whether this was the answer."""
    with suppress(InvalidStateError):
        asked.set_result(job)
        return True
    return False


def _check_id(checkpoint_id: object) -> str:
    if not isinstance(checkpoint_id, str | os.PathLike):
        raise ArgumentError("checkpoint_id", f"a {type(checkpoint_id).__name__} is not a path")
    place = os.fsdecode(checkpoint_id)
    if not place or "\0" in place:
        raise ArgumentError("checkpoint_id", f"{place!r} is not a path")
    return place
