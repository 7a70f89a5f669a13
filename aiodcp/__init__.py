"""Asyncio-native checkpoints for PyTorch, in `torch.distributed.checkpoint`'s own format.

Names are imported when they are first used: the command line does not wait for torch where it needs none.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._capture import PerRank as PerRank
    from ._checkpoint import Checkpoint as Checkpoint
    from ._events import Event as Event
    from ._events import FellBack as FellBack
    from ._events import LeftoverRemoved as LeftoverRemoved
    from ._events import Preempted as Preempted
    from ._events import RemovalFailed as RemovalFailed
    from ._events import Restored as Restored
    from ._events import Retried as Retried
    from ._events import SaveBegan as SaveBegan
    from ._events import SaveFailed as SaveFailed
    from ._events import SaveFinished as SaveFinished
    from ._events import SaveSkipped as SaveSkipped
    from ._events import StepRemoved as StepRemoved
    from ._guard import Guard as Guard
    from ._joint import JointCheckpoint as JointCheckpoint
    from ._joint import joint_checkpoint as joint_checkpoint
    from ._matching import LoadReport as LoadReport
    from ._milestone import Milestone as Milestone
    from ._milestone import Progress as Progress
    from ._report import Stats as Stats
    from ._retry import Attempt as Attempt
    from ._retry import Retry as Retry
    from ._timeline import Span as Span
    from ._timeline import Timeline as Timeline
    from .checkpointer import Checkpointer as Checkpointer
    from .errors import ArgumentError as ArgumentError
    from .errors import BusyError as BusyError
    from .errors import CaptureError as CaptureError
    from .errors import CheckpointError as CheckpointError
    from .errors import ClosedError as ClosedError
    from .errors import CorruptError as CorruptError
    from .errors import DeadlockError as DeadlockError
    from .errors import DisagreementError as DisagreementError
    from .errors import FormatError as FormatError
    from .errors import LoadError as LoadError
    from .errors import MismatchError as MismatchError
    from .errors import NotACheckpointError as NotACheckpointError
    from .errors import ParticipantError as ParticipantError
    from .errors import RankError as RankError
    from .errors import RankFailure as RankFailure
    from .errors import ReadError as ReadError
    from .errors import SaveCancelled as SaveCancelled
    from .errors import SaveError as SaveError
    from .errors import StageError as StageError
    from .errors import StatefulError as StatefulError
    from .errors import TornSnapshotError as TornSnapshotError
    from .errors import UnsafeError as UnsafeError
    from .errors import WriteError as WriteError
    from .manager import CheckpointManager as CheckpointManager
    from .manager import RestoredStep as RestoredStep
    from .storage import LocalStorage as LocalStorage
    from .storage import MemoryStorage as MemoryStorage
    from .storage import Storage as Storage

_HOMES = {
    "_capture": ("PerRank",),
    "_checkpoint": ("Checkpoint",),
    "_events": (
        "Event",
        "FellBack",
        "LeftoverRemoved",
        "Preempted",
        "RemovalFailed",
        "Restored",
        "Retried",
        "SaveBegan",
        "SaveFailed",
        "SaveFinished",
        "SaveSkipped",
        "StepRemoved",
    ),
    "_guard": ("Guard",),
    "_joint": (
        "JointCheckpoint",
        "joint_checkpoint",
    ),
    "_matching": ("LoadReport",),
    "_milestone": (
        "Milestone",
        "Progress",
    ),
    "_report": ("Stats",),
    "_retry": (
        "Attempt",
        "Retry",
    ),
    "_timeline": (
        "Span",
        "Timeline",
    ),
    "checkpointer": ("Checkpointer",),
    "errors": (
        "ArgumentError",
        "BusyError",
        "CaptureError",
        "CheckpointError",
        "ClosedError",
        "CorruptError",
        "DeadlockError",
        "DisagreementError",
        "FormatError",
        "LoadError",
        "MismatchError",
        "NotACheckpointError",
        "ParticipantError",
        "RankError",
        "RankFailure",
        "ReadError",
        "SaveCancelled",
        "SaveError",
        "StageError",
        "StatefulError",
        "TornSnapshotError",
        "UnsafeError",
        "WriteError",
    ),
    "manager": (
        "CheckpointManager",
        "RestoredStep",
    ),
    "storage": (
        "LocalStorage",
        "MemoryStorage",
        "Storage",
    ),
}
_MODULES = ("bench", "checkpointer", "errors", "manager", "metadata", "storage")
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


if not TYPE_CHECKING:  # a type checker is to know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        elif name in _MODULES:
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


if "torch" in sys.modules:  # it will be needed, and half a second of imports holds an event loop up
    import_module(".manager", __name__)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
