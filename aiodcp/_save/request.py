"""What a save is asked for: one state to save, and parts of a joint checkpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlanner

from .._engine.device_copies import DeviceCopies
from .._engine.gil_fairness import let_go
from .._engine.milestone import MilestoneSource
from .._state.capture import Capture
from .._state.tear_detector import TearDetector
from .._telemetry.progress import ProgressLog
from .._telemetry.timeline import Timeline
from ..errors import TornSnapshotError
from .manifest import ByteRange
from .plan_cache import RANGE_NBYTES, CachedPlan
from .snapshot_source import SnapshotSource
from .write_agreement import WriteProposal


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """One save: what was captured, by whose planner, where it goes, and who waits for it.

    Attributes:
        device_copies: brings tensors from devices.
        tears: sees whether the captured tensors change before they are staged; None not to look.
        custom_metadata: returns the custom metadata, encoded; called at the commit.
        overwrite: whether a checkpoint that is there already may be replaced.
        source: of snapshots of what is staged.
        queued: reached when all copies from devices are queued, or no tensor must be waited for.
    """

    captured: Capture
    planner: SavePlanner | None
    device_copies: DeviceCopies
    tears: TearDetector | None
    checkpoint_id: str
    custom_metadata: Callable[[], bytes]
    source: SnapshotSource
    queued: MilestoneSource
    staged: MilestoneSource
    uploaded: MilestoneSource
    log: ProgressLog
    timeline: Timeline
    overwrite: bool = True

    def forget_tensors(self) -> None:
        """Keep nothing of the tensors: from here on the caller may free them."""
        self.captured.values.clear()
        let_go(self.captured.kinds)

    def release_tensors(self) -> None:
        """Let the caller change and free the tensors."""
        self.forget_tensors()
        self.queued.reach()
        self.staged.reach()

    def check_torn(self) -> None:
        if self.tears is not None and (changed := self.tears.changed()):
            raise TornSnapshotError(changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPart:
    """A state that is staged and written, on all ranks, and not committed yet."""

    job: SaveJob
    plan: CachedPlan
    tables: Sequence[int]  # CRC32s of the tables in the data files, by rank; known to the coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRequest:
    """What the user of a checkpoint of several states asks for next.

    Attributes:
        name: of the state; None to commit.
        take: waits for the state.
    """

    name: str | None
    take: Callable[[], Awaitable[SaveJob]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenHere:
    """What this rank has written of one state.

    Attributes:
        plan: by which.
        ranges: where its frozen values lie.
        digest: of what it shares with others.
        table_crc: CRC32 of its file's table.
    """

    plan: CachedPlan
    ranges: list[ByteRange]
    digest: int
    table_crc: int

    def proposal(self, rank: int) -> WriteProposal:
        """Return what `rank`, which is this one, tells the others of it."""
        return WriteProposal(
            is_moved=self.plan.frozen_ranges.get(rank) != self.ranges,
            digest=self.digest,
            table_crc=self.table_crc,
            ranges_nbytes=RANGE_NBYTES * len(self.ranges),
        )
