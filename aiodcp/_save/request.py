"""What a save is asked for: one state to save, and parts of a joint checkpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlanner

from .._engine.device_copies import DeviceCopies
from .._engine.milestone import MilestoneSource
from .._state.capture import Capture
from .._state.tear_detector import TearDetector
from .._telemetry.progress import ProgressLog
from .._telemetry.timeline import Timeline
from ..errors import TornSnapshotError
from .plan_cache import CachedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """One save: what was captured, by whose planner, where it goes, and whom to tell.

    Attributes:
        device_copies: brings tensors from devices.
        watch: sees whether the captured tensors change before they are staged; None not to look.
        note: returns the custom metadata, encoded; called at the commit.
        queued: reached when all copies from devices are queued, or no tensor must be waited for.
    """

    taken: Capture
    planner: SavePlanner | None
    device_copies: DeviceCopies
    watch: TearDetector | None
    checkpoint_id: str
    note: Callable[[], bytes]
    queued: MilestoneSource
    staged: MilestoneSource
    uploaded: MilestoneSource
    log: ProgressLog
    timeline: Timeline

    def let_go(self) -> None:
        """Tell the caller that the tensors may change and be freed."""
        self.taken.values.clear()
        self.queued.reach()
        self.staged.reach()

    def check_torn(self) -> None:
        if self.watch is not None and (changed := self.watch.changed()):
            raise TornSnapshotError(changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPart:
    """A state that is staged and written, on all ranks, and not committed yet."""

    job: SaveJob
    prepared: CachedPlan
    tables: Sequence[int]  # CRC32s of the tables in the data files, by rank; known to the coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRequest:
    """What the user of a checkpoint of several states wants next.

    Attributes:
        name: of the state; empty to commit.
        take: waits for the state.
    """

    name: str
    take: Callable[[], Awaitable[SaveJob]] | None = None
