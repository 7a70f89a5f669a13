"""One save, one load, at a time."""

from .checkpoint import Checkpoint
from .checkpointer import Checkpointer
from .joint import JointCheckpoint, joint_checkpoint
from .optimizer_guard import Guard
from .part import PartSave, PartTicket
from .snapshot import Snapshot, SnapshotPart

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Guard",
    "JointCheckpoint",
    "PartSave",
    "PartTicket",
    "Snapshot",
    "SnapshotPart",
    "joint_checkpoint",
]
