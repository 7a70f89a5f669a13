"""Asyncio-native checkpoints for PyTorch, in `torch.distributed.checkpoint`'s own format.

What needs torch, or an event loop, is imported by who first asks for it: the command line waits for neither.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._load.report import LoadReport
from ._state.per_rank import PerRank
from ._telemetry.timeline import Span, Timeline
from .errors import (
    ArgumentError,
    BusyError,
    CaptureError,
    CheckpointError,
    ClosedError,
    CorruptError,
    DeadlockError,
    DisagreementError,
    FormatError,
    LoadError,
    MismatchError,
    NotACheckpointError,
    ParticipantError,
    RankError,
    RankFailure,
    ReadError,
    SaveCancelled,
    SaveError,
    StageError,
    StatefulError,
    TornSnapshotError,
    UnsafeError,
    WriteError,
)
from .manager.events import (
    Event,
    FellBack,
    LeftoverRemoved,
    Preempted,
    RemovalFailed,
    Restored,
    Retried,
    SaveBegan,
    SaveFailed,
    SaveFinished,
    SaveSkipped,
    Stats,
    StepRemoved,
)

if TYPE_CHECKING:
    __version__: str
    from ._engine.milestone import Milestone as Milestone
    from ._telemetry.progress import Progress as Progress
    from .checkpointer import Checkpoint as Checkpoint
    from .checkpointer import Checkpointer as Checkpointer
    from .checkpointer import Guard as Guard
    from .checkpointer import JointCheckpoint as JointCheckpoint
    from .checkpointer import PartSave as PartSave
    from .checkpointer import PartTicket as PartTicket
    from .checkpointer import Snapshot as Snapshot
    from .checkpointer import SnapshotPart as SnapshotPart
    from .checkpointer import joint_checkpoint as joint_checkpoint
    from .manager import CheckpointManager as CheckpointManager
    from .manager import InitialLoad as InitialLoad
    from .manager import RestoredStep as RestoredStep
    from .manager.lease import lease as lease
    from .manager.lease import lease_sync as lease_sync
    from .manager.steps import Step as Step
    from .manager.watch import WatchedStep as WatchedStep
    from .manager.watch import watch as watch
    from .manager.watch import watch_sync as watch_sync
    from .reader import Difference as Difference
    from .reader import Exported as Exported
    from .reader import Problem as Problem
    from .reader import StoredCheckpoint as StoredCheckpoint
    from .reader import StoredChunk as StoredChunk
    from .reader import StoredTensor as StoredTensor
    from .reader import StoredValue as StoredValue
    from .reader import convert as convert
    from .reader import convert_sync as convert_sync
    from .reader import diff as diff
    from .reader import diff_sync as diff_sync
    from .reader import export as export
    from .reader import export_sync as export_sync
    from .reader import open as open  # noqa: A004
    from .reader import verify as verify
    from .reader import verify_sync as verify_sync
    from .storage import LocalStorage as LocalStorage
    from .storage import MemoryStorage as MemoryStorage
    from .storage import ObjectStorage as ObjectStorage
    from .storage import Storage as Storage
    from .storage.retry import Attempt as Attempt
    from .storage.retry import Retry as Retry

_LAZY = {
    "Attempt": "storage.retry",
    "Checkpoint": "checkpointer",
    "CheckpointManager": "manager",
    "Checkpointer": "checkpointer",
    "Difference": "reader",
    "Exported": "reader",
    "Guard": "checkpointer",
    "InitialLoad": "manager",
    "JointCheckpoint": "checkpointer",
    "LocalStorage": "storage",
    "MemoryStorage": "storage",
    "Milestone": "_engine.milestone",
    "ObjectStorage": "storage",
    "PartSave": "checkpointer",
    "PartTicket": "checkpointer",
    "Problem": "reader",
    "Progress": "_telemetry.progress",
    "RestoredStep": "manager",
    "Retry": "storage.retry",
    "Snapshot": "checkpointer",
    "SnapshotPart": "checkpointer",
    "Step": "manager.steps",
    "Storage": "storage",
    "StoredCheckpoint": "reader",
    "StoredChunk": "reader",
    "StoredTensor": "reader",
    "StoredValue": "reader",
    "WatchedStep": "manager.watch",
    "convert": "reader",
    "convert_sync": "reader",
    "diff": "reader",
    "diff_sync": "reader",
    "export": "reader",
    "export_sync": "reader",
    "joint_checkpoint": "checkpointer",
    "lease": "manager.lease",
    "lease_sync": "manager.lease",
    "open": "reader",
    "verify": "reader",
    "verify_sync": "reader",
    "watch": "manager.watch",
    "watch_sync": "manager.watch",
}

__all__ = [
    "ArgumentError",
    "Attempt",
    "BusyError",
    "CaptureError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "Checkpointer",
    "ClosedError",
    "CorruptError",
    "DeadlockError",
    "Difference",
    "DisagreementError",
    "Event",
    "Exported",
    "FellBack",
    "FormatError",
    "Guard",
    "InitialLoad",
    "JointCheckpoint",
    "LeftoverRemoved",
    "LoadError",
    "LoadReport",
    "LocalStorage",
    "MemoryStorage",
    "Milestone",
    "MismatchError",
    "NotACheckpointError",
    "ObjectStorage",
    "PartSave",
    "PartTicket",
    "ParticipantError",
    "PerRank",
    "Preempted",
    "Problem",
    "Progress",
    "RankError",
    "RankFailure",
    "ReadError",
    "RemovalFailed",
    "Restored",
    "RestoredStep",
    "Retried",
    "Retry",
    "SaveBegan",
    "SaveCancelled",
    "SaveError",
    "SaveFailed",
    "SaveFinished",
    "SaveSkipped",
    "Snapshot",
    "SnapshotPart",
    "Span",
    "StageError",
    "StatefulError",
    "Stats",
    "Step",
    "StepRemoved",
    "Storage",
    "StoredCheckpoint",
    "StoredChunk",
    "StoredTensor",
    "StoredValue",
    "Timeline",
    "TornSnapshotError",
    "UnsafeError",
    "WatchedStep",
    "WriteError",
    "convert",
    "convert_sync",
    "diff",
    "diff_sync",
    "export",
    "export_sync",
    "joint_checkpoint",
    "lease",
    "lease_sync",
    "open",
    "verify",
    "verify_sync",
    "watch",
    "watch_sync",
]


if not TYPE_CHECKING:  # a type checker is to know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        elif name in ("checkpointer", "reader", "storage", "testing"):
            value = import_module(f".{name}", __name__)
        elif name == "__version__":
            from importlib.metadata import version

            value = version(__name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


if "torch" in sys.modules:  # it will be needed, and half a second of imports holds an event loop up
    import_module(".manager.manager", __name__)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "checkpointer", "errors", "manager", "reader", "storage", "testing"]
