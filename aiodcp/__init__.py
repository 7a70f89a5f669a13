"""Asyncio-native checkpoints for PyTorch, in `torch.distributed.checkpoint`'s own format."""

from ._capture import PerRank
from ._checkpoint import Checkpoint
from ._guard import Guard
from ._milestone import Milestone, Progress
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
from .storage import LocalStorage, MemoryStorage, Storage

__all__ = [
    "ArgumentError",
    "BusyError",
    "CaptureError",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "ClosedError",
    "CorruptError",
    "Guard",
    "LoadError",
    "LocalStorage",
    "MemoryStorage",
    "Milestone",
    "MismatchError",
    "NotACheckpointError",
    "PerRank",
    "Progress",
    "RankError",
    "RankFailure",
    "ReadError",
    "SaveCancelled",
    "SaveError",
    "Span",
    "StageError",
    "Storage",
    "Timeline",
    "TornSnapshotError",
    "UnsafeError",
    "WriteError",
]
