"""Saves as their caller sees them: the turn, the capture, the hand-over, and failures raised once."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from .._distributed.operation import Operation
from .._distributed.votes import OperationKind
from .._engine.device_copies import CopyStreams, DeviceCopies
from .._engine.gc_pause import gc_paused
from .._engine.gil_fairness import yield_to_engine
from .._engine.threads import in_thread
from .._save.commit import Replaced, remove_replaced
from .._save.parts import PartExchange, PartTicket
from .._save.pipeline import WritePipeline
from .._save.request import PartRequest, SaveJob
from .._save.saver import Saver
from .._state.capture import Capture, Instant, take
from .._state.flatten import KnownNames
from .._state.known_tensors import KnownTensors
from .._state.planner_capture import take_planned
from .._state.tear_detector import TearDetector
from .._telemetry.trace import Trace
from ..errors import (
    ArgumentError,
    BusyError,
    CheckpointError,
    ClosedError,
    DeadlockError,
    SaveCancelled,
    SaveError,
    StageError,
)
from ..storage.retry import RetryingStorage
from .arguments import CheckpointId, EncodeMetadata, OnBusy, Options, check_id, check_on_busy, digest_of
from .capture_call import captured_here
from .checkpoint import EarlierFailureError, SaveState
from .flows import Flows
from .handshake import Handshake
from .optimizer_guard import Guard, Guards
from .snapshot import is_inside_snapshot_of

FinishCapture = Callable[[], SaveJob]
"""What looks at the tensors of what was taken, from any thread."""


class SaveCalls:
    """The saves of one `Checkpointer`, as they are asked for. Its methods are called from the caller's thread.

    Attributes:
        trace: of all saves.
        last: the last save that was captured.
    """

    def __init__(self, flows: Flows, storage: RetryingStorage, options: Options) -> None:
        self.trace: Trace = Trace()
        self.last: SaveState | None = None
        self._flows = flows
        self._storage = storage
        self._options = options
        self._unsafe: set[str] = set()  # fqns that were warned about: they need more than plain data to be loaded
        self._staging: list[SaveState] = []  # captured, and perhaps not staged yet
        self._names: KnownNames = KnownNames()
        self._known: KnownTensors = KnownTensors()
        self._saver: Saver
        self._guards: Guards
        self._streams: CopyStreams

    def open(self, streams: CopyStreams) -> None:
        """Make what is kept from save to save; the engine runs."""
        options, threads = self._options, self._flows.engine.threads
        make_pipeline = partial(
            WritePipeline,
            self._storage,
            threads,
            keep_buffers=options.keep_buffers,
            max_host_nbytes=options.max_host_bytes,
            checksum=options.checksum,
            spare_buffer=options.spare_buffer,
        )
        self._streams = streams
        self._saver = Saver(
            self._storage,
            threads,
            make_pipeline,
            share_pipeline=options.max_host_bytes is not None,
            max_host_nbytes=options.max_host_bytes,
            on_disagreement=options.on_disagreement,
        )
        self._guards = Guards(self._on_step)
        # On the engine's loop, if that answers: to free what is kept for many tensors takes long.
        self._flows.at_close(self._saver.close)

    def close(self) -> None:
        """Give the host memory back, and let optimizers step."""
        self._guards.close()
        self._saver.close()
        del self._saver

    # --- one state

    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        encode_metadata: EncodeMetadata,
        *,
        planner: SavePlanner | None,
        on_busy: OnBusy,
        overwrite: bool = True,
        part: PartExchange | None = None,
    ) -> SaveState | None:
        """Implement `Checkpointer.save`; return None if the save is skipped."""
        flows = self._flows
        flows.check_open()
        number = flows.count_call()
        is_skipped = on_busy in ("skip", "raise") and await flows.skips.ask()
        handshake: Handshake[FinishCapture] = Handshake()
        with flows.waiting(handshake):
            try:
                if on_busy == "wait":
                    flows.refuse_inside("save")
                self.refuse_inside_snapshot()
                path = self._storage.resolve(check_id(checkpoint_id))
                custom_metadata = await encode_metadata()
                _check_choices(on_busy, planner)
                self.raise_unretrieved()
                if is_skipped and on_busy == "raise":
                    raise BusyError(flows.in_flight or path)
            except BaseException as error:
                if flows.channel is not None and not is_skipped:
                    self._report_to_others(error, number, checkpoint_id, handshake)
                raise
            if is_skipped:
                return None
            state = self._begin(number, path, checkpoint_id, handshake, part)
            try:
                await handshake.wait_for_turn()
                self.raise_unretrieved()  # of the save that this one waited for
                finish = self.take(state, state_dict, custom_metadata, planner, overwrite=overwrite)
                if not handshake.hand_over(finish):
                    await state.uploaded.reached()  # another rank has failed: raises that
                    raise ClosedError("the Checkpointer was closed before this save was captured")
                self.last = state
                yield_to_engine(asyncio.get_running_loop(), state.uploaded)
                await self._wait_for_capture(state)
            except BaseException as error:
                state.mark_retrieved()  # it is raised here
                handshake.fail(self._reason_for(error, checkpoint_id))
                raise
        return state

    async def _wait_for_capture(self, state: SaveState) -> None:
        try:
            await state.captured.reached()
        except asyncio.CancelledError:
            state.cancel()
            raise

    def _report_to_others(
        self,
        error: BaseException,
        number: int,
        checkpoint_id: CheckpointId,
        handshake: Handshake[FinishCapture],
    ) -> None:
        """Take part in the save after all, to fail it: the other ranks wait for this one."""
        handshake.fail(self._reason_for(error, checkpoint_id))
        self._begin(number, str(checkpoint_id), checkpoint_id, handshake).mark_retrieved()

    def _reason_for(self, error: BaseException, checkpoint_id: CheckpointId) -> Exception:
        """Return why the save fails, for the engine and the other ranks, when `error` is raised to its caller."""
        if self.last is not None and self.last.uploaded.error() is error:
            return EarlierFailureError.of(error)
        return error if isinstance(error, Exception) else SaveCancelled(str(checkpoint_id))

    def _begin(
        self,
        number: int,
        path: str,
        checkpoint_id: CheckpointId,
        handshake: Handshake[FinishCapture],
        part: PartExchange | None = None,
    ) -> SaveState:
        state = SaveState(path, self._flows.engine, self)
        state.part = part

        async def take() -> SaveJob:
            finish = await handshake.wait_for_capture()
            if state.captured.done():
                return finish()
            try:
                job = await in_thread(self._flows.engine.threads.compute, finish)
            except Exception as error:
                state.captured.fail(error)
                raise
            state.captured.reach()
            return job

        async def save(operation: Operation) -> Replaced:
            try:
                return await self._saver.save(operation, digest_of(checkpoint_id), take, part)
            finally:
                state.tears = None  # and with it what it held of the state

        state.operation = self._begin_flow(number, path, handshake.give_turn, save, state.fail)
        return state

    async def commit(
        self,
        checkpoint_id: CheckpointId,
        tickets: Sequence[PartTicket],
        encode_metadata: EncodeMetadata,
        *,
        overwrite: bool,
    ) -> None:
        """Implement `Checkpointer.commit`."""
        self._flows.check_open()
        last = self.last
        if self._flows.channel is not None and last is not None and last.part is not None and not last.uploaded.done():
            raise DeadlockError("these ranks have a part in flight, whose end this would wait for: commit elsewhere")
        path = self._storage.resolve(check_id(checkpoint_id))
        custom_metadata = await encode_metadata()

        async def commit() -> bytes:
            await self._saver.commit_parts(path, tickets, custom_metadata, overwrite=overwrite)
            return b""

        await self._flows.ask("commit parts", commit)

    def give_up_part(self) -> None:
        """Say of a part in flight that it is not committed, as far as is known: nobody can say so any more."""
        if self.last is not None and self.last.part is not None:
            self.last.part.decide(is_committed=False)

    # --- several states

    def begin_joint(
        self,
        path: str,
        give_turn: Callable[[], None],
        custom_metadata: Callable[[], bytes],
        next_part: Callable[[], Awaitable[PartRequest]],
        succeed: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> Operation:
        """Begin a save of several states, which its user requests one by one.

        Args:
            path: where to.
            give_turn: called when it has its turn.
            custom_metadata: returns the custom metadata, encoded, when all states are there.
            next_part: waits for the next request; the last has no name.
            succeed, fail: called when it is over.
        """

        async def save(operation: Operation) -> Replaced:
            replaced = await self._saver.save_several(operation, digest_of(path), path, custom_metadata, next_part)
            succeed()
            return replaced

        return self._begin_flow(self._flows.count_call(), path, give_turn, save, fail)

    # --- both

    def _begin_flow(
        self,
        number: int,
        path: str,
        give_turn: Callable[[], None],
        save: Callable[[Operation], Awaitable[Replaced]],
        fail: Callable[[Exception], None],
    ) -> Operation:
        async def save_or_fail(operation: Operation) -> Replaced:
            try:
                return await save(operation)
            except CheckpointError as error:
                fail(error)
            except Exception as error:
                failure = SaveError(repr(error))
                failure.__cause__ = error
                fail(failure)
            return Replaced()

        # Removing a large file takes long (0.2 s a GiB on ext4): the next save need not wait for it.
        remove = partial(remove_replaced, self._storage, path)
        return self._flows.begin_save(number, path, give_turn, save_or_fail, remove, on_failure=fail)

    def capture(self, state: SaveState, state_dict: Mapping[str, Any]) -> SaveJob:
        """Take the state as it is now, and look at it. In the caller's thread."""
        return self.take(state, state_dict, is_here=True)()

    def take(
        self,
        state: SaveState,
        state_dict: Mapping[str, Any],
        custom_metadata: Callable[[], bytes] = bytes,
        planner: SavePlanner | None = None,
        *,
        overwrite: bool = True,
        is_here: bool = False,
    ) -> FinishCapture:
        """Take the state as it is now, in the caller's thread.

        If it is small, or is to be looked at here, that is done and `captured` reached.
        """
        state.log.restart()
        with state.timeline.record("capture"), _capture_errors():
            instant = self._instant(state_dict, planner)
            self._warn_unsafe(instant)
            state.device_copies = self._streams.begin(instant.devices, instant.name_on)
            if self._options.check_torn:
                state.tears = TearDetector()
                self._guards.arm()
        self._staging = [*(each for each in self._staging if not each.staged.done()), state]
        self.trace.add(state.checkpoint_id, state.timeline)
        is_here = is_here or instant.is_small

        def finish() -> SaveJob:
            captured = self._look_at(instant, None if is_here else state.device_copies)
            state.device_copies.add(captured.devices - instant.devices, captured.name_on)
            if state.tears is not None:
                state.tears.watch(captured, instant.versions)
            return SaveJob(
                captured=captured,
                planner=planner,
                device_copies=state.device_copies,
                tears=state.tears,
                checkpoint_id=state.checkpoint_id,
                custom_metadata=custom_metadata,
                source=state.source,
                queued=state.queued,
                staged=state.staged,
                uploaded=state.uploaded,
                log=state.log,
                timeline=state.timeline,
                overwrite=overwrite,
            )

        if not is_here:
            return finish
        job = finish()
        state.captured.reach()
        return lambda: job

    def _instant(self, state_dict: Mapping[str, Any], planner: SavePlanner | None = None) -> Instant:
        if planner is not None:
            return take_planned(state_dict, planner, is_coordinator=self._flows.skips.decides)
        with gc_paused():
            return take(state_dict, self._flows.rank, may_be_empty=self._flows.channel is not None, names=self._names)

    def _look_at(self, instant: Instant, copies: DeviceCopies | None = None) -> Capture:
        """Look at what was taken; in a thread of the engine with the `copies`, whose marks tensors are computed by."""

        def wait_for_devices() -> None:
            if copies is not None:
                copies.enter_thread()
                copies.wait_for_marks()

        with _capture_errors(), gc_paused():
            return instant.look(self._known, wait_for_devices)

    def _warn_unsafe(self, taken: Instant) -> None:
        """Warn of values that `load` will not build by default, once a name."""
        unsafe = {index: frozen for index, frozen in taken.frozen.items() if frozen.needs}
        fqns = taken.named().fqns if unsafe else []
        for index, frozen in unsafe.items():
            fqn = fqns[index]
            if fqn not in self._unsafe:
                self._unsafe.add(fqn)
                warnings.warn(
                    f"{fqn} is not plain data: loading it will require weights_only=False, or "
                    f"torch.serialization.add_safe_globals for {', '.join(frozen.needs)}",
                    UserWarning,
                    stacklevel=2,
                )

        for fqn in taken.odd_keys:
            if fqn not in self._unsafe:
                self._unsafe.add(fqn)
                warnings.warn(
                    f"{fqn} has keys that are neither all str nor all int, which are stored as text: loading restores "
                    "them only where the state dict has them already",
                    UserWarning,
                    stacklevel=2,
                )

    # --- ahead of a save, and while it is staged

    async def prepare(self, state_dict: Mapping[str, Any], checkpoint_id: CheckpointId | None) -> None:
        """Implement `Checkpointer.prepare`."""
        path = "" if checkpoint_id is None else self._storage.resolve(check_id(checkpoint_id))
        flows = self._flows
        flows.check_open()
        flows.refuse_inside("prepare")
        self.refuse_inside_snapshot()
        taken = captured_here(lambda: self._instant(state_dict), is_alone=flows.channel is None)

        async def look() -> Capture:  # what it pickles is not kept: it need not be computed yet
            return await in_thread(flows.engine.threads.compute, self._look_at, await taken())

        operation = flows.operation(OperationKind.PREPARE, ClosedError("the preparation was cancelled"))

        async def prepare_in_turn() -> None:
            async with flows.slot:
                with flows.under_way(operation):
                    await self._saver.prepare(operation, path, look)

        await flows.run(prepare_in_turn, operation=operation)

    def guard(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> Guard:
        """Implement `Checkpointer.guard`."""
        self._flows.check_open()
        return self._guards.add(optimizers)

    def _on_step(self, optimizer: torch.optim.Optimizer, guarded: bool) -> None:
        for state in self._staging:
            if state.staged.done():
                continue
            if guarded:
                state.fence()
            elif (tears := state.tears) is not None:
                tears.begins_step(optimizer)

    def refuse_inside_snapshot(self) -> None:
        """Refuse what needs the staging buffer in a block that keeps it.

        Raises:
            DeadlockError: the caller is in the block of a snapshot of one of these saves.
        """
        if not self._options.spare_buffer and is_inside_snapshot_of(self):
            raise DeadlockError(
                "the next save needs the staging buffer, which this snapshot's block keeps: leave the block first, or "
                "use Checkpointer(spare_buffer=True), which takes a second buffer"
            )

    # --- failures that were not retrieved

    def raise_unretrieved(self) -> None:
        """Raise the failure of the last save unless it was retrieved."""
        error = self.take_unretrieved()
        if error is not None:
            raise error

    def take_unretrieved(self) -> Exception | None:
        """Return the failure of the last save unless it was retrieved, and mark it as such."""
        if self.last is None:
            return None
        error = self.last.unretrieved()
        if error is not None:
            self.last.mark_retrieved()
        return error

    def is_busy(self) -> bool:
        """Whether a save is in flight, or asked for."""
        return self._flows.is_asked() or (self.last is not None and not self.last.uploaded.done())


def _check_choices(on_busy: str, planner: object) -> None:
    check_on_busy(on_busy)
    if planner is not None and not isinstance(planner, SavePlanner):
        raise ArgumentError("planner", f"must be a SavePlanner, got {type(planner).__name__}")


@contextmanager
def _capture_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise StageError(0, "out of host memory while the values were captured") from error
