"""Saves of steps: what is recorded of each, who may remove what meanwhile, and what follows a commit."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from torch.distributed.checkpoint.planner import SavePlanner

from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from ..checkpointer.arguments import OnBusy, check_custom_metadata
from ..checkpointer.checkpoint import SaveState
from ..checkpointer.joint import JointSave, joint_save
from ..checkpointer.session import Session
from ..errors import BusyError, SaveCancelled
from ..storage.error_mapping import write_errors
from ..storage.leases import LEASE_S
from .arguments import check_metrics, check_own_custom_metadata, check_step
from .catalog import StepCatalog
from .deadline import Deadline
from .reporter import Reporter, SaveRecord

log: SafeLogger = SafeLogger(__name__)


CLEAR_AGAIN_S = 1.5 * LEASE_S


class StepSaves:
    """The saves of one manager.

    Attributes:
        last: the last save of one state that was captured.
    """

    def __init__(
        self, session: Session, catalog: StepCatalog, reporter: Reporter, deadline: Deadline, *, warns: bool
    ) -> None:
        """Begin; `warns` is whether a failure is only reported, unless it is awaited."""
        self.last: SaveState | None = None
        self._session = session
        self._catalog = catalog
        self._reporter = reporter
        self._deadline = deadline
        self._warns = warns
        self._lock: AsyncExitStack | None = None  # holds the root, against removal by other processes
        self._clears_at = (
            0.0  # by `time.monotonic()`: when to look again for leftovers, once others are not alive any more
        )

    def close(self) -> None:
        """Note that what was kept until close has been released."""
        self._lock = None

    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None,
        custom_metadata: Mapping[str, Any] | None,
        planner: SavePlanner | None,
        overwrite: bool,
        on_busy: OnBusy,
    ) -> SaveState | None:
        """Implement `CheckpointManager.save`; return None if the save is skipped."""
        record = self._reporter.save(step)
        numbers: dict[str, float] = {}
        state: SaveState | None = None
        self._catalog.acquire(step)
        try:
            async with self._deadline.in_time():
                state = await self._session.saves.save(
                    state_dict,
                    self._path(step),
                    partial(self._encode_metadata, step, metrics, custom_metadata, numbers),
                    planner=planner,
                    on_busy=on_busy,
                    overwrite=overwrite,
                )
        except BusyError:
            self._reporter.skipped(step)
            raise
        except TimeoutError as error:  # no time is left, and the save before is still in flight
            raise SaveCancelled(self._path(step)) from error
        finally:
            if state is None:
                self._catalog.release(step)
        if state is None:
            self._reporter.skipped(step)
            return None
        if self._warns:
            state.mark_retrieved()
        self.last = state
        self._reporter.began(record, state.timeline)
        # In the engine's thread, most likely:
        state.uploaded.when_done(lambda error: self._note_end(record, numbers, [state], error))
        self._session.flows.in_background(self._see_through, step, state)
        return state

    @asynccontextmanager
    async def joint(
        self, step: int, *, metrics: Mapping[str, float] | None, custom_metadata: Mapping[str, Any] | None
    ) -> AsyncIterator[JointSave]:
        """Implement `CheckpointManager.checkpoint`."""
        self._session.flows.check_open()
        record = self._reporter.save(step)
        numbers: dict[str, float] = {}
        encode = partial(self._encode_metadata, step, metrics, custom_metadata, numbers)

        def note_end(save: JointSave, error: Exception | None) -> None:  # in the engine's thread, most likely
            self._note_end(record, numbers, [part.state for part in save.parts.values()], error)

        self._catalog.acquire(step)
        try:
            async with self._deadline.in_time():
                async with joint_save(self._session, self._path(step), encode, note_end) as save:
                    self._session.flows.in_background(self._prune_after, step, save.ended)
                    yield save
        except TimeoutError as error:
            if not self._deadline.is_known():
                raise
            raise SaveCancelled(self._path(step)) from error  # no time is left

    def _path(self, step: int) -> str:
        return self._catalog.path(step)

    async def _encode_metadata(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        custom_metadata: Mapping[str, Any] | None,
        numbers: dict[str, float],
    ) -> Callable[[], bytes]:
        """Check what is given, make sure that what is to be written is not removed, and return what makes the metadata.

        The metrics as they are now go into `numbers`.
        """
        numbers.update(check_metrics(metrics))
        own = {"step": check_step(step), "metrics": numbers}
        own.update(json.loads(check_custom_metadata(check_own_custom_metadata(custom_metadata))))  # as it is now
        flows = self._session.flows
        if flows.is_coordinator:
            await self._lock_root()
        await self._catalog.until_removed(step)
        if flows.is_coordinator:
            await flows.run(self._catalog.note_other_steps)

        def encode() -> bytes:  # at the commit: commits have their numbers in the order in which they are made
            return check_custom_metadata({**own, **self._catalog.count_commit(step), "saved_at": time.time()})

        return encode

    async def _lock_root(self) -> None:
        """Hold the root until the manager is left, so that no other process removes what is being saved there.

        First what interrupted saves have left is removed, and not sooner: a manager that only reads removes nothing.
        Where another process seemed to be alive it is tried again: in a store one counts as such for a while after its
        death.
        """
        flows, lock = self._session.flows, self._lock or AsyncExitStack()
        if self._lock is not None and time.monotonic() < self._clears_at:
            return
        self._clears_at = 0.0
        if self._lock is not None:
            await flows.run(lock.aclose)
        is_clear = await flows.run(self._clear_up)
        with write_errors(self._session.storage.describe(self._catalog.root)):
            await flows.run(lock.enter_async_context, self._session.storage.lock(self._catalog.root, exclusive=False))
        if self._lock is None:
            await flows.keep_until_close(lock)
            await flows.keep_until_close(self._reporter.keeping_history())
            self._lock = lock
        self._clears_at = float("inf") if is_clear else time.monotonic() + CLEAR_AGAIN_S

    async def _clear_up(self) -> bool:
        """Remove what interrupted saves have left; return whether that could be known."""
        cleared = await self._catalog.clear_up(self._session.is_saving)
        for step in cleared or ():
            self._reporter.cleared(step)
        return cleared is not None

    def _note_end(
        self, record: SaveRecord, metrics: Mapping[str, float], states: list[SaveState], error: Exception | None
    ) -> None:
        """Note how a save has ended."""
        self._catalog.release(record.step)
        if error is None:
            self._catalog.add(record.step, metrics)
            self._catalog.mark_for_removal(removes=self._session.flows.is_coordinator)
        self._reporter.ended(record, states, error)

    async def _see_through(self, step: int, state: SaveState) -> None:
        """Show how far a save has come, and remove what is not to be kept after it."""
        await self._reporter.show(step, state.log)
        await self._prune_after(step, state.uploaded)

    async def _prune_after(self, step: int, ended: MilestoneSource) -> None:
        await ended.settled()
        if ended.error() is not None and await self._catalog.find_if_committed(step):
            log.warning("step %d: the save reported a failure after its commit; the step is complete", step)
            self._catalog.mark_for_removal(removes=self._session.flows.is_coordinator)
        await self._catalog.prune(self._reporter.removed)
        await self._reporter.write_history()
