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
    from .checkpointer import joint_checkpoint as joint_checkpoint
    from .manager import CheckpointManager as CheckpointManager
    from .manager import RestoredStep as RestoredStep
    from .manager.lease import lease as lease
    from .manager.lease import lease_sync as lease_sync
    from .manager.watch import WatchedStep as WatchedStep
    from .manager.watch import watch as watch
    from .manager.watch import watch_sync as watch_sync
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
    "Guard": "checkpointer",
    "JointCheckpoint": "checkpointer",
    "LocalStorage": "storage",
    "MemoryStorage": "storage",
    "Milestone": "_engine.milestone",
    "ObjectStorage": "storage",
    "Progress": "_telemetry.progress",
    "RestoredStep": "manager",
    "Retry": "storage.retry",
    "Storage": "storage",
    "WatchedStep": "manager.watch",
    "joint_checkpoint": "checkpointer",
    "lease": "manager.lease",
    "lease_sync": "manager.lease",
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
    "DisagreementError",
    "Event",
    "FellBack",
    "FormatError",
    "Guard",
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
    "ParticipantError",
    "PerRank",
    "Preempted",
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
    "Span",
    "StageError",
    "StatefulError",
    "Stats",
    "StepRemoved",
    "Storage",
    "Timeline",
    "TornSnapshotError",
    "UnsafeError",
    "WatchedStep",
    "WriteError",
    "joint_checkpoint",
    "lease",
    "lease_sync",
    "watch",
    "watch_sync",
]


if not TYPE_CHECKING:  # a type checker is to know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        elif name in ("checkpointer", "storage", "testing"):
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
    return [*__all__, "__version__", "checkpointer", "errors", "manager", "storage", "testing"]
