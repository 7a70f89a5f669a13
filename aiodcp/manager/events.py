"""What a manager reports: typed events and counts. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..storage.retry import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to the checkpoint of a step.

    Attributes:
        step: which.
        rank: on which rank; each rank reports its own.
        checkpoint_id: where the checkpoint is, or was to be.
    """

    level: ClassVar[int] = logging.INFO

    step: int
    rank: int
    checkpoint_id: str

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBegan(Event):
    """The state is captured.

    Attributes:
        waited_s: seconds for which it waited for the save before.
        held_s: seconds for which the caller was held to capture it.
    """

    level: ClassVar[int] = logging.DEBUG

    waited_s: float
    held_s: float

    def __str__(self) -> str:
        return f"captured in {self.held_s:.3f} s, after waiting {self.waited_s:.3f} s for the previous save"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFinished(Event):
    """The checkpoint is committed and durable.

    Attributes:
        nbytes: that this rank wrote.
        held_s: seconds for which the caller was held, to capture the state and in fences.
        staged_s: seconds until the tensors might change again, from when `save` had its turn.
        seconds: likewise, until all was durable.
        phases: by name, for how long each was at work; see `Timeline`.
    """

    nbytes: int
    held_s: float
    staged_s: float
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in self.phases.items())
        return (
            f"saved {self.nbytes} bytes in {self.seconds:.3f} s, staged after {self.staged_s:.3f} s, "
            f"caller held {self.held_s:.3f} s (ms: {phases})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """The checkpoint is not committed.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.ERROR

    error: Exception

    def __str__(self) -> str:
        return f"save failed: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A transient storage error: the call is retried. Its `step` is -1 where it is about the root itself.

    Attributes:
        path: what was to be read or written.
        attempt: which attempt failed, why, and when the next one is.
    """

    level: ClassVar[int] = logging.WARNING

    path: str
    attempt: Attempt

    def __str__(self) -> str:
        return f"{self.path}: {self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(Event):
    """The save before was still in flight, and `on_busy` was "skip"."""

    level: ClassVar[int] = logging.WARNING

    def __str__(self) -> str:
        return "skipped: the previous save is still in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """The run is to stop at this step, on all ranks.

    Attributes:
        reason: why, in words.
        left_s: seconds until the process is ended.
    """

    level: ClassVar[int] = logging.WARNING

    reason: str
    left_s: float

    def __str__(self) -> str:
        return f"stopping at this step, {self.left_s:.1f} s left: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRemoved(Event):
    """A checkpoint that is not to be kept is removed."""

    def __str__(self) -> str:
        return "removed by the retention policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverRemoved(Event):
    """Leftovers of an interrupted save are removed."""

    def __str__(self) -> str:
        return "removed leftovers of an interrupted save"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalFailed(Event):
    """A checkpoint could not be removed; it is tried again.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.WARNING

    error: Exception

    def __str__(self) -> str:
        return f"could not be removed: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """The checkpoint is loaded.

    Attributes:
        seconds: that it took.
    """

    seconds: float

    def __str__(self) -> str:
        return f"restored in {self.seconds:.3f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class FellBack(Event):
    """The checkpoint could not be loaded, and the one before is tried.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.ERROR

    error: Exception

    def __str__(self) -> str:
        return f"cannot be restored, falling back to the next candidate: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a manager has done since it was made.

    Attributes:
        saved, failed, skipped: checkpoints asked for, by what became of them.
        removed: steps that were not to be kept.
        retried: calls that were retried after transient storage errors.
        waited_s: seconds for which saves waited for the one before.
        age_s: seconds since the last commit; None if there was none.
    """

    saved: int
    failed: int
    skipped: int
    removed: int
    retried: int
    waited_s: float
    age_s: float | None
