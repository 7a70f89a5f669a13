"""Asyncio-native checkpoints for PyTorch, in `torch.distributed.checkpoint`'s own format."""

from ._capture import PerRank
from ._checkpoint import Checkpoint
from ._events import (
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
    StepRemoved,
)
from ._guard import Guard
from ._joint import JointCheckpoint, joint_checkpoint
from ._milestone import Milestone, Progress
from ._retry import Attempt, Retry
from ._timeline import Span, Timeline
from .checkpointer import Checkpointer
from .errors import (
    ArgumentError,
    BusyError,
    CaptureError,
    CheckpointError,
    ClosedError,
    CorruptError,
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
    TornSnapshotError,
    UnsafeError,
    WriteError,
)
from .manager import CheckpointManager, Stats
from .storage import LocalStorage, MemoryStorage, Storage

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
    "Event",
    "FellBack",
    "Guard",
    "JointCheckpoint",
    "LeftoverRemoved",
    "LoadError",
    "LocalStorage",
    "MemoryStorage",
    "Milestone",
    "MismatchError",
    "NotACheckpointError",
    "ParticipantError",
    "PerRank",
    "Preempted",
    "Progress",
    "RankError",
    "RankFailure",
    "ReadError",
    "RemovalFailed",
    "Restored",
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
    "Stats",
    "StepRemoved",
    "Storage",
    "Timeline",
    "TornSnapshotError",
    "UnsafeError",
    "WriteError",
    "joint_checkpoint",
]
