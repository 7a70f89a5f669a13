"""The `Checkpointer`, which saves and loads."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload
from weakref import WeakSet

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from .._distributed.operation import Operation
from .._distributed.votes import OperationKind
from .._engine.device_copies import CopyStreams
from .._engine.gil_fairness import yield_to_engine
from .._engine.loop import at_exit
from .._engine.milestone import MilestoneSource
from .._engine.sync_bridge import SyncContext, sync_method
from .._format.checksum import Checksum, default_checksum
from .._load.find_targets import find_targets
from .._load.loader import Loader
from .._load.options import Loaded, LoadOptions, Rename
from .._load.read_custom_metadata import read_custom_metadata
from .._load.report import LoadReport
from .._load.targets import LoadTargets
from .._log import SafeLogger
from .._save.bounded_staging import MIN_NBYTES
from .._save.commit import remove_files
from .._save.pipeline import WritePipeline
from .._save.request import PartRequest, SaveJob
from .._save.saver import Saver
from .._save.sharing import OnDisagreement
from .._save.start_agreement import POLICIES
from .._state.capture import Capture, capture
from .._state.flatten import KnownNames
from .._state.planner_capture import capture_planned
from .._state.tear_detector import TearDetector
from .._telemetry.progress_bar import Bar, NoBar
from .._telemetry.trace import Trace
from ..errors import (
    ArgumentError,
    BusyError,
    CheckpointError,
    ClosedError,
    LoadError,
    SaveCancelled,
    SaveError,
    StageError,
)
from ..storage.base import Storage
from ..storage.error_mapping import write_errors
from ..storage.local import LocalStorage
from ..storage.retry import Attempt, Retry, RetryingStorage
from .arguments import CheckpointId, check_custom_metadata, check_id, digest_of, ranks_on_this_host
from .caller_loop import answer, from_caller
from .checkpoint import RETOLD_LENGTH, Checkpoint, EarlierFailureError
from .optimizer_guard import Guard, Guards
from .session import Session

log = SafeLogger(__name__)

T = TypeVar("T")


class Checkpointer(SyncContext):
    """Save and load checkpoints in DCP's format from an event loop that goes on turning meanwhile.

        async with aiodcp.Checkpointer() as checkpointer:
            ckpt = await checkpointer.save({"model": model, "optim": optimizer}, "checkpoints/step-100")
            await ckpt.staged    # the state may change again
            await ckpt.uploaded  # the checkpoint is durable

    One save is in flight at a time. Leaving the block, by an error too, waits for it; a failed save that nobody
    awaited is raised there, or by the next `save`. Without an event loop the same calls are `with`, `save_sync`,
    `load_sync` and `prepare_sync`, and of what they return `staged.wait()` and `uploaded.wait()`.

    Args:
        storage: where checkpoints live; by default directories of the local file system.
        process_group: the ranks that save and load together; by default all, if torch.distributed is initialized. Its
            members open the `Checkpointer` together, and call `save`, `load` and `prepare` in the same order. It says
            who they are; its connections are not used.
        coordinator: who plans and commits: a rank of that group, counted in it.
        no_dist: save and load alone, whatever torch.distributed says.
        timeout: seconds after which a rank that is not done with a phase, or does not answer, counts as missing.
        keep_buffers: keep the staging buffer, which is as large as this rank's part of the checkpoint, from save to
            save. False gives the memory back after each, and the next save takes longer to stage: fresh memory must
            be touched first.
        max_host_bytes: of staging memory on this rank. A checkpoint that is larger goes through it in windows, and
            `staged` comes when the last window is copied: when most of it is written. By default as much as it takes.
        check_torn: fail a save whose tensors changed before they were staged, with `TornSnapshotError`. It is seen by
            their version counters, and by optimizers that begin a step; not seen are writes through `.data` and
            `numpy()`. False does not look.
        copy_threads: cores that copy host tensors while a save is staged; by default all, up to four, which is what
            it takes to fill the memory's bandwidth. Under torchrun the ranks of a host share them.
        io_threads: threads that read and write files.
        retry: how often to try again what storage refuses for the moment.
        checksum: computes CRC32s, with the arguments of `zlib.crc32`; by default isal's if the extra `fast` is
            installed, else zlib's.
        on_disagreement: what to do where ranks hold different values of what is saved once, such as a random state
            that is not in a `PerRank`: "warn" once a name, and say whose is saved; "raise" `DisagreementError`, and
            commit nothing; or "ignore", and do not compare. Looked for at every save: in all bytes of values and of
            tensors up to 64 KiB, and in a sample of larger ones.
    """

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        coordinator: int = 0,
        no_dist: bool = False,
        timeout: float = 600.0,
        keep_buffers: bool = True,
        max_host_bytes: int | None = None,
        check_torn: bool = True,
        copy_threads: int | None = None,
        io_threads: int = 4,
        retry: Retry | None = None,
        checksum: Checksum | None = None,
        on_disagreement: OnDisagreement = "warn",
    ) -> None:
        if on_disagreement not in POLICIES:
            problem = f'{on_disagreement!r} is none of "warn", "raise", "ignore"'
            raise ArgumentError("on_disagreement", problem)
        if copy_threads is None:
            copy_threads = max(1, min(4, len(os.sched_getaffinity(0)) // ranks_on_this_host()))
        for name, value in (("copy_threads", copy_threads), ("io_threads", io_threads)):
            if type(value) is not int or value < 1:
                raise ArgumentError(name, f"{value!r} is not a number of threads")
        if max_host_bytes is not None and (type(max_host_bytes) is not int or max_host_bytes < MIN_NBYTES):
            raise ArgumentError("max_host_bytes", f"{max_host_bytes!r} is not a number of bytes from {MIN_NBYTES} on")
        if storage is not None and (isinstance(storage, type) or not isinstance(storage, Storage)):
            raise ArgumentError("storage", f"{storage!r} has not the methods of aiodcp.Storage")
        if checksum is not None and not callable(checksum):
            raise ArgumentError("checksum", f"{checksum!r} cannot be called")
        if type(timeout) not in (int, float) or not 0 < timeout < float("inf"):
            raise ArgumentError("timeout", f"{timeout!r} is not a number of seconds")
        if no_dist and process_group is not None:
            raise ArgumentError("no_dist", "means no other ranks: leave out the process_group")
        if type(coordinator) is not int or coordinator < 0:
            raise ArgumentError("coordinator", f"{coordinator!r} is not a rank")
        if retry is not None and not isinstance(retry, Retry):
            raise ArgumentError("retry", f"{retry!r} is no aiodcp.Retry")
        self._service = Session(copy_threads=copy_threads, io_threads=io_threads)
        self._storage = RetryingStorage(
            storage if storage is not None else LocalStorage(),
            retry if retry is not None else Retry(),
            lambda place, path, attempt: self._on_retry(place, path, attempt),
            self._service.engine.activity.doing,
        )
        self._on_retry: Callable[[str, str, Attempt], None] = _log_retry  # with place and path; in the engine's thread
        self._process_group = process_group
        self._coordinator = coordinator
        self._no_dist = no_dist
        self._timeout = float(timeout)
        self._keep_buffers = keep_buffers
        self._max_host_bytes = max_host_bytes
        self._check_torn = check_torn
        self._checksum = checksum or default_checksum()
        self._on_disagreement: OnDisagreement = on_disagreement
        self._unsafe: set[str] = set()  # fqns of which it was said that they need more than plain data to be loaded
        self._last: Checkpoint | None = None
        self._staging: list[Checkpoint] = []  # captured, and perhaps not staged yet
        self._saver: Saver
        self._loader: Loader
        self._guards: Guards
        self._streams: CopyStreams
        self._names: KnownNames = {}
        self._trace = Trace()

    def __repr__(self) -> str:
        line = self._service.line
        ranks = f"rank {line.rank} of {line.size}, " if line else ""
        is_busy = self._service.is_asked() or (self._last is not None and not self._last.uploaded.done())
        return f"<Checkpointer on {self._storage!r}, {self._service.engine!r}, {ranks}{'busy' if is_busy else 'idle'}>"

    async def __aenter__(self) -> Checkpointer:
        try:
            await self._service.open(self._find_group(), coordinator=self._coordinator, timeout_s=self._timeout)
            self._make_ready()
        except BaseException:  # Ctrl-C, too
            if self._service.is_open:
                await self._service.close()
            raise
        _open.add(self)
        return self

    def _make_ready(self) -> None:
        threads = self._service.engine.threads
        make_transfer = partial(
            WritePipeline,
            self._storage,
            threads,
            keep_buffers=self._keep_buffers,
            max_host_nbytes=self._max_host_bytes,
            checksum=self._checksum,
        )
        self._streams = CopyStreams(self._service.engine.activity, threads.given_up)
        self._saver = Saver(
            self._storage,
            threads,
            make_transfer,
            share_transfer=self._max_host_bytes is not None,
            on_disagreement=self._on_disagreement,
        )
        self._loader = Loader(self._storage, threads, checksum=self._checksum)
        self._guards = Guards(self._on_step)

    def _find_group(self) -> torch.distributed.ProcessGroup | None:
        """Return the ranks to save with, if there are others."""
        if self._no_dist or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            if self._process_group is not None:
                raise ArgumentError("process_group", "torch.distributed is not initialized")
            return None
        group = self._process_group or torch.distributed.group.WORLD
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise ArgumentError("process_group", f"{group!r} is no process group that this rank belongs to")
        if self._coordinator >= group.size():
            raise ArgumentError("coordinator", f"{self._coordinator} is no rank of {group.size()}")
        return group if group.size() > 1 else None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.refuse_inside("to leave the Checkpointer")
        problem: CheckpointError | None = None
        try:
            await self._service.close()
        except ClosedError as stuck:
            problem = stuck
        finally:
            _open.discard(self)
            self._guards.close()
            del self._saver, self._loader  # and with them the host memory
        failure = self._take_unretrieved() or problem
        self._last = None
        if failure is None:
            return
        if error is None:
            raise failure
        log.error("the save in flight failed while the block was left by %s: %s", repr(error), repr(failure))
        if isinstance(error, asyncio.CancelledError):  # of an aborted task group, which collects failures
            raise failure from error
        error.add_note(f"aiodcp: besides, the save in flight failed: {failure!r}")

    def _finish_at_exit(self) -> None:
        self._service.finish_at_exit()
        failure = self._take_unretrieved()
        if failure is not None:
            text = f"the last save failed, and nobody has seen it: {failure!r}"
            log.error("%s", text)
            if log.has_handlers():  # else the log is standard error
                sys.stderr.write(f"aiodcp: {text}\n")

    # --- saving

    @overload
    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        on_busy: Literal["wait", "raise"] = ...,
    ) -> Checkpoint: ...

    @overload
    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        on_busy: Literal["wait", "skip", "raise"],
    ) -> Checkpoint | None: ...

    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        on_busy: Literal["wait", "skip", "raise"] = "wait",
    ) -> Checkpoint | None:
        """Begin to save `state_dict`, and return as soon as it is captured.

        Until `staged` is reached the tensors must not change, or the save fails with `TornSnapshotError`; all other
        values are taken as they are now. The values of the top level may be `Stateful` (with `state_dict()` and
        `load_state_dict()`), as in DCP. An existing checkpoint at the same place is replaced when the new one is
        complete, and not before.

        With several ranks all of them call it. Sharded tensors are saved by those who hold their parts, everything
        else by one of its holders, each rank about as many bytes. A failure on one rank, here too, fails the save on
        all of them.

        Args:
            state_dict: nested dicts and lists of tensors and any picklable values.
            checkpoint_id: where to; for the local file system a directory, which is made. The same on all ranks.
            planner: your own, instead of DCP's. It is asked for a local plan, and for every item's data, here at each
                save; for a global plan when the local ones have changed. It plans what is in the arena, so the data
                of an item must have the dtype and shape that it planned.
            custom_metadata: a note that is committed with the checkpoint, in words of JSON; `read_custom_metadata`
                returns it. Of several ranks' the coordinator's.
            on_busy: what to do while another save is in flight: "wait" for its end, in turn; "skip" this one and
                return None; or "raise" `BusyError`. Of several ranks the coordinator chooses for all.

        Raises:
            CaptureError: a value cannot be saved, or is on a device whose current stream captures a graph; names it.
            BusyError: see `on_busy`.
            SaveError: an earlier save failed and nobody had awaited it.

        Cancellation: while it waits its turn, gives the turn up.
        """

        async def encode() -> Callable[[], bytes]:
            note = check_custom_metadata(custom_metadata)
            return lambda: note

        return await self._save(state_dict, checkpoint_id, encode, planner=planner, on_busy=on_busy)

    async def _save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        first: Callable[[], Awaitable[Callable[[], bytes]]],
        *,
        planner: SavePlanner | None,
        on_busy: Literal["wait", "skip", "raise"],
    ) -> Checkpoint | None:
        """Save as `save` does.

        `first` is awaited before; it returns what makes the note, or fails the save on all ranks.
        """
        self._service.check_open()
        if on_busy == "wait":
            self._service.refuse_inside("a save")
        number = self._service.count_call()
        skipped = on_busy in ("skip", "raise") and await self._service.skips.ask()
        checkpoint: Checkpoint | None = None
        turn = MilestoneSource("turn")
        asked: Future[SaveJob] = Future()
        with self._service.waiting(turn, asked):
            try:
                place = self._storage.resolve(check_id(checkpoint_id))
                note = await first()
                if on_busy not in ("wait", "skip", "raise"):
                    raise ArgumentError("on_busy", f'{on_busy!r} is none of "wait", "skip", "raise"')
                if planner is not None and not isinstance(planner, SavePlanner):
                    raise ArgumentError("planner", f"a {type(planner).__name__} is no SavePlanner")
                self._raise_unretrieved()
                if skipped and on_busy == "skip":
                    return None
                if skipped:
                    raise BusyError(self._service.in_flight or place)
                checkpoint = self._begin(number, place, checkpoint_id, turn, asked)
                await turn.reached()
                self._raise_unretrieved()  # of the save that this one waited for
                job = self._capture(checkpoint, state_dict, note, planner)
                if not answer(asked, job):
                    await checkpoint.uploaded  # another rank has failed: raises that
                    raise ClosedError("the Checkpointer was closed before this save was captured")
                self._last = checkpoint
            except BaseException as error:
                reason = error if isinstance(error, Exception) else SaveCancelled(str(checkpoint_id))
                if self._last is not None and self._last._uploaded.error() is error:
                    reason = EarlierFailureError(f"told of an earlier save: {error!r}"[:RETOLD_LENGTH])
                if checkpoint is None and self._service.line is not None and not skipped:  # the others must hear of it
                    checkpoint = self._begin(number, str(checkpoint_id), checkpoint_id, turn, asked)
                if checkpoint is not None:
                    checkpoint._mark_retrieved()  # it is raised here
                answer(asked, reason)
                raise
        yield_to_engine(asyncio.get_running_loop(), checkpoint._uploaded)
        return checkpoint

    def _capture(
        self,
        checkpoint: Checkpoint,
        state_dict: Mapping[str, Any],
        note: Callable[[], bytes] = bytes,
        planner: SavePlanner | None = None,
    ) -> SaveJob:
        """Take the state as it is now. In the caller's thread."""
        checkpoint._log.restart()
        with checkpoint.timeline.record("capture"), _capture_errors():
            if planner is None:
                may_be_empty = self._service.line is not None
                taken = capture(state_dict, self._service.rank, may_be_empty=may_be_empty, names=self._names)
            else:
                taken = capture_planned(state_dict, planner, is_coordinator=self._service.skips.decides)
            self._warn_unsafe(taken)
            checkpoint._device_copies = self._streams.begin(taken.devices, taken.name_on)
            if self._check_torn:
                checkpoint._watch = TearDetector(taken)
                self._guards.arm()
        self._staging = [*(each for each in self._staging if not each.staged.done()), checkpoint]
        self._trace.add(checkpoint.checkpoint_id, checkpoint.timeline)
        return SaveJob(
            taken=taken,
            planner=planner,
            device_copies=checkpoint._device_copies,
            watch=checkpoint._watch,
            checkpoint_id=checkpoint.checkpoint_id,
            note=note,
            queued=checkpoint._queued,
            staged=checkpoint._staged,
            uploaded=checkpoint._uploaded,
            log=checkpoint._log,
            timeline=checkpoint.timeline,
        )

    def _warn_unsafe(self, taken: Capture) -> None:
        """Say of values that `load` will not build by default that they are so, once a name."""
        for place, frozen in taken.frozen.items():
            fqn = taken.fqns[place]
            if frozen.needs and fqn not in self._unsafe:
                self._unsafe.add(fqn)
                warnings.warn(
                    f"{fqn} is saved, but is more than plain data: to load it needs weights_only=False, or "
                    f"torch.serialization.add_safe_globals for {', '.join(frozen.needs)}",
                    UserWarning,
                    stacklevel=2,
                )

    def _begin(
        self, number: int, place: str, checkpoint_id: object, turn: MilestoneSource, asked: Future[SaveJob]
    ) -> Checkpoint:
        checkpoint = Checkpoint(place, self._service.engine)
        loop = asyncio.get_running_loop()

        async def take() -> SaveJob:
            return await from_caller(asked, loop)

        async def save(operation: Operation) -> list[str]:
            try:
                return await self._saver.save(operation, digest_of(checkpoint_id), take)
            finally:
                checkpoint._watch = None  # and with it what it held of the state

        checkpoint._operation = self._begin_flow(number, place, turn, save, checkpoint._fail)
        return checkpoint

    def _begin_several(
        self,
        place: str,
        turn: MilestoneSource,
        note: Callable[[], bytes],
        wishes: Callable[[], Awaitable[PartRequest]],
        succeed: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> Operation:
        """Begin a save of several states, which its user wishes for one by one."""

        async def save(operation: Operation) -> list[str]:
            replaced = await self._saver.save_several(operation, digest_of(place), place, note, wishes)
            succeed()
            return replaced

        return self._begin_flow(self._service.count_call(), place, turn, save, fail)

    def _begin_flow(
        self,
        number: int,
        place: str,
        turn: MilestoneSource,
        save: Callable[[Operation], Awaitable[list[str]]],
        fail: Callable[[Exception], None],
    ) -> Operation:
        async def save_or_fail(operation: Operation) -> list[str]:
            try:
                return await save(operation)
            except CheckpointError as error:
                fail(error)
            except Exception as error:
                failure = SaveError(repr(error))
                failure.__cause__ = error
                fail(failure)
            return []

        # Removing a large file takes long (0.2 s a GiB on ext4): the next save need not wait for it.
        remove = partial(remove_files, self._storage, place)
        return self._service.begin_save(number, place, turn, save_or_fail, remove, on_failure=fail)

    def guard(self, *optimizers: torch.optim.Optimizer) -> Guard:
        """Make optimizers wait, before each step, for the staging that is in flight.

            checkpointer.guard(optimizer)  # from here on there is no need to await `staged`

        Their `step()` then blocks the thread that calls it, for as long as `await ckpt.staged` would have taken; a
        save that fails lets them go on. Works in loops with and without asyncio.

        Args:
            optimizers: which; by default all of the process.

        Returns:
            The guard. It is removed by its `remove()`, on leaving a `with` block of it, and with the Checkpointer.
        """
        self._service.check_open()
        return self._guards.add(optimizers)

    def step(self, number: int) -> AbstractContextManager[None]:
        """Tell of a step of the caller's, which `write_trace` shows beside the saves: `with checkpointer.step(n):`."""
        return self._trace.step(number)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what all saves of this rank have done, and when, as a Chrome trace: https://ui.perfetto.dev opens it.

        The last thousand saves are in it, and the last ten thousand of the caller's steps. Times are the host's wall
        clock's, so that the traces of several ranks fit together. Blocks, for some milliseconds.

        Raises:
            WriteError: the file cannot be written.
        """
        with write_errors(os.fspath(path)):
            Path(path).write_text(self._trace.render(torch.distributed.get_rank() if self._service.line else 0))

    def _on_step(self, optimizer: torch.optim.Optimizer, guarded: bool) -> None:
        for checkpoint in self._staging:
            if checkpoint.staged.done():
                continue
            if guarded:
                checkpoint.fence()
            elif (watch := checkpoint._watch) is not None:
                watch.begins_step(optimizer)

    def _raise_unretrieved(self) -> None:
        error = self._take_unretrieved()
        if error is not None:
            raise error

    def _take_unretrieved(self) -> Exception | None:
        """Return the failure of the last save if nobody has seen it, and count it as seen."""
        if self._last is None:
            return None
        error = self._last._unretrieved()
        if error is not None:
            self._last._mark_retrieved()
        return error

    async def prepare(self, state_dict: Mapping[str, Any]) -> None:
        """Plan for states of this structure and have the host memory ready, so that the first save is quick too.

        Raises:
            CaptureError: a value cannot be saved; names it.
            StageError: there is not enough host memory.
            RankError: that happened on some rank.

        Cancellation: takes effect when the step under way is done.
        """
        self._service.check_open()
        self._service.refuse_inside("a preparation")
        may_be_empty = self._service.line is not None
        rank, names = self._service.rank, self._names
        take = self._take(lambda: capture(state_dict, rank, may_be_empty=may_be_empty, names=names))
        operation = self._service.operation(OperationKind.PREPARE, ClosedError("the preparation was cancelled"))

        async def prepare_in_turn() -> None:
            async with self._service.slot:
                with self._service.under_way(operation):
                    await self._saver.prepare(operation, take)

        await self._service.run(prepare_in_turn, operation=operation)

    def _take(self, function: Callable[[], T]) -> Callable[[], Awaitable[T]]:
        """Call `function` here and now; what it returns or raises is for the engine, so that all ranks hear of it."""
        taken: Future[T] = Future()
        try:
            taken.set_result(function())
        except Exception as error:
            if self._service.line is None:
                raise
            taken.set_exception(error)

        async def take() -> T:
            return taken.result()

        return take

    # --- loading

    async def load(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: LoadPlanner | None = None,
        strict: bool = True,
        cast: bool = False,
        rename: Rename | None = None,
        weights_only: bool = True,
        check_crc: bool = True,
    ) -> LoadReport:
        """Load a checkpoint into `state_dict`: tensors in place, other values replaced.

        Names are compared below the names of the top level that are asked for: `load({"model": model}, id)` loads the
        model and leaves the optimizer that is stored beside it alone. What is asked for and not stored, or stored
        below `model` and not asked for on any rank, is an error.

        Tensors are filled in place where one of the right name, shape and dtype is there; the rest of the structure is
        the checkpoint's. An object with `load_state_dict()` at the top level is given its state as it was saved, and
        judges it: modules by the names of their parameters and buffers, optimizers as torch does, by number and shapes
        of parameters (and names, if both have them). Lists have the length that was saved. Numbers become 0-d tensors,
        and the other way round, where the state dict has those. A tensor on the meta device is made.

        Everything that can be known without the data is checked before the first byte of the caller's tensors changes,
        and all other values are read before the first tensor.

        With several ranks all of them call it, and the checkpoint may come from any number of them: each reads what
        it holds. It begins on all ranks or on none, and a failure on one fails it on all, but for one of a
        `load_state_dict()`, which comes last; those are called in the order of their names. It waits for a save in
        flight, but for the joint checkpoint inside whose block it is called.

        Args:
            state_dict: what is wanted, with tensors of the right shapes on the devices where they are wanted.
            checkpoint_id: where from; written by this library or by `torch.distributed.checkpoint`.
            planner: your own, instead of this library's planning. It decides what is strict, and how bytes are
                decoded; it is called in threads of the engine. What it adds at the top level is handed over.
            strict: names must agree. False loads those that both have, and reports the others; a whole part that is
                stored under another name at the top level is an error all the same.
            cast: allow conversions that lose, such as float32 to bfloat16; others are always allowed.
            rename: makes of stored names the names that are wanted: a mapping of prefixes, the longest first, or a
                function. Names begin with the name at the top level.
            weights_only: build plain data and what `torch.serialization.add_safe_globals` allows, nothing else. False
                runs whatever code the checkpoint brings: only for files that you trust as you trust your own programs.
            check_crc: compare each item with its CRC32. One of which only a part is wanted and read cannot be
                compared.

        Returns:
            What was left out or converted; false if nothing was.

        Raises:
            NotACheckpointError: there is no committed checkpoint.
            FormatError: there is one of another format.
            MismatchError: names every value that is missing, unexpected, or does not fit.
            CorruptError: what is stored is not what was saved. Found by its CRC32 after loading began, tensors may
                already have changed.
            UnsafeError: the checkpoint asks for more than data.
            StatefulError: an object's `load_state_dict()` raised.
            RankError: one of these, on some rank.

        Cancellation: takes effect when the read under way is done; tensors may already have changed.
        """
        return await self.load_shown(
            state_dict,
            checkpoint_id,
            NoBar(),
            planner,
            LoadOptions(strict=strict, cast=cast, weights_only=weights_only, check_crc=check_crc, rename=rename),
        )

    async def load_shown(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        shown: Bar,
        planner: LoadPlanner | None,
        options: LoadOptions,
    ) -> LoadReport:
        """Load as `load` does, and show how far it has come."""
        self._service.check_open()
        place = ""

        def ask() -> LoadTargets:
            nonlocal place
            place = self._storage.resolve(check_id(checkpoint_id))
            return find_targets(state_dict, self._service.rank, planner, self._streams)

        with _load_errors():
            await self._service.wait_for_saves()
            loaded = await self._load(self._take(ask), lambda: place, checkpoint_id, shown, options)
            loaded.targets.hand_over(state_dict, absent=loaded.absent)
        return loaded.targets.report

    async def _load(
        self,
        take: Callable[[], Awaitable[LoadTargets]],
        place: Callable[[], str],
        checkpoint_id: CheckpointId,
        shown: Bar,
        options: LoadOptions,
    ) -> Loaded:
        if self._service.line is not None:  # ranks wait for each other's turns
            self._service.refuse_inside("a load of several ranks")
        operation = self._service.operation(OperationKind.LOAD, LoadError("the load was cancelled"))

        async def load() -> Loaded:
            with self._service.under_way(operation):
                return await self._loader.load(operation, digest_of(checkpoint_id), take, place(), options, shown)

        async def load_in_turn() -> Loaded:
            async with self._service.slot:
                return await load()

        return await self._service.run(load_in_turn if self._service.line else load, operation=operation)

    async def read_custom_metadata(self, checkpoint_id: CheckpointId) -> dict[str, Any]:
        """Return what was noted of a checkpoint when it was saved; empty if nothing was. Each rank may ask for itself.

        Raises:
            NotACheckpointError: there is no committed checkpoint.
            ReadError: storage refused.
        """
        self._service.check_open()
        return await self._service.run(
            read_custom_metadata, self._storage, self._storage.resolve(check_id(checkpoint_id))
        )

    # --- without an event loop

    save_sync = sync_method(save)
    prepare_sync = sync_method(prepare)
    load_sync = sync_method(load)
    read_custom_metadata_sync = sync_method(read_custom_metadata)


_open: WeakSet[Checkpointer] = WeakSet()  # entered, and not left


def _finish_all() -> None:
    for checkpointer in list(_open):
        try:
            checkpointer._finish_at_exit()
        except Exception:
            log.exception("%r could not be finished", checkpointer)


at_exit(_finish_all)


@contextmanager
def _capture_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise StageError(0, "there is no host memory to take the values in") from error


@contextmanager
def _load_errors() -> Iterator[None]:
    """Let nothing leave a load that is not of our tree."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise LoadError(f"failed: {error!r}") from error


def _log_retry(place: str, path: str, attempt: Attempt) -> None:
    log.warning("%s: %s", path, attempt)
