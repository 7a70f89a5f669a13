"""Checks of what a `CheckpointManager` is given."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypedDict

from .._load.options import Rename
from .._state.name_patterns import Names
from ..checkpointer.arguments import CheckpointId, OnBusy, check_custom_metadata, check_on_busy
from ..checkpointer.checkpointer import Checkpointer, session_of
from ..errors import ArgumentError
from .events import Event
from .retention import Best, Retention
from .step_names import StepNames
from .steps import Step

RESERVED = {
    "step",
    "saved_at",
    "metrics",
    "commit_number",
    "committed_after",
    "uncounted",
}  # of the custom metadata of a step: the manager's own


class ManagerArguments(TypedDict, total=False):
    """What a `CheckpointManager` is given besides its root and `on_busy`: for type checkers. It says what they mean."""

    checkpointer: Checkpointer | None
    step_format: str
    keep_last: int | None
    keep_every: int | None
    keep_best: Best | None
    keep_for_s: float | None
    keep_every_s: float | None
    keep_if: Callable[[Step], bool] | None
    save_interval: int | None
    save_every_s: float | None
    save_first: bool
    last_step: int | None
    latest_by: Literal["commit", "number"]
    on_error: Literal["raise", "warn"]
    signals: Sequence[signal.Signals]
    grace_s: float
    deadline: float | None
    progress: bool
    history: bool
    on_event: Callable[[Event], None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialLoad:
    """Where a run begins that has no step yet: weights of another one, or of a model hub.

    Attributes:
        checkpoint_id: which checkpoint; any that `Checkpointer.load` reads.
        include, exclude, rename, strict, cast, weights_only: as for `Checkpointer.load`. By default only what is below
            "model".
    """

    checkpoint_id: CheckpointId
    include: Names | None = "model"
    exclude: Names | None = None
    rename: Rename | None = None
    strict: bool = True
    cast: bool = False
    weights_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The checked arguments of a `CheckpointManager`."""

    root: str
    checkpointer: Checkpointer
    retention: Retention
    names: StepNames
    latest_by: Literal["commit", "number"]
    save_interval: int | None
    save_every_s: float | None
    save_first: bool
    last_step: int | None
    on_busy: OnBusy
    on_error: Literal["raise", "warn"]
    signals: Sequence[signal.Signals]
    grace_s: float
    deadline: float | None
    progress: bool
    history: bool
    on_event: Callable[[Event], None] | None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ArgumentError: one of them cannot be used.
        """
        if not isinstance(self.checkpointer, Checkpointer):
            raise ArgumentError("checkpointer", f"must be a Checkpointer, got {type(self.checkpointer).__name__}")
        if self.save_interval is not None and (type(self.save_interval) is not int or self.save_interval < 1):
            raise ArgumentError("save_interval", f"must be a positive integer, got {self.save_interval!r}")
        every_s = self.save_every_s
        if every_s is not None and (type(every_s) not in (int, float) or not 0 < every_s < float("inf")):
            raise ArgumentError("save_every_s", f"must be a positive, finite number of seconds, got {every_s!r}")
        if self.last_step is not None and (type(self.last_step) is not int or self.last_step < 0):
            raise ArgumentError("last_step", f"must be an integer of at least 0, got {self.last_step!r}")
        if self.latest_by not in ("commit", "number"):
            raise ArgumentError("latest_by", f'must be "commit" or "number", got {self.latest_by!r}')
        check_on_busy(self.on_busy)
        if self.on_error not in ("raise", "warn"):
            raise ArgumentError("on_error", f'must be "raise" or "warn", got {self.on_error!r}')
        for each in self.signals:
            if not isinstance(each, signal.Signals):
                raise ArgumentError("signals", f"must be signal.Signals, got {each!r}")
        if type(self.grace_s) not in (int, float) or not 0 < self.grace_s < float("inf"):
            raise ArgumentError("grace_s", f"must be a positive, finite number of seconds, got {self.grace_s!r}")
        if self.deadline is not None and type(self.deadline) not in (int, float):
            raise ArgumentError("deadline", f"must be in seconds of time.time(), got {self.deadline!r}")
        if self.deadline is not None and not isfinite(self.deadline):
            raise ArgumentError("deadline", f"must be finite, got {self.deadline!r}: use None for no deadline")
        if self.on_event is not None and not callable(self.on_event):
            raise ArgumentError("on_event", f"must be callable, got {self.on_event!r}")
        try:
            session_of(self.checkpointer).storage.resolve(self.root)
        except ArgumentError as error:
            raise ArgumentError("root", error.problem) from None


def check_step(step: object) -> int:
    """Return the number of a step, or raise `ArgumentError` if it is none."""
    if type(step) is not int or step < 0:
        raise ArgumentError("step", f"must be an integer of at least 0, got {step!r}")
    return step


def check_own_custom_metadata(custom_metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the caller's custom metadata, or raise `ArgumentError` if it cannot be stored beside the manager's."""
    if custom_metadata is None:
        return {}
    check_custom_metadata(custom_metadata)
    if reserved := sorted(RESERVED & custom_metadata.keys()):
        raise ArgumentError("custom_metadata", f"reserved by the manager: {', '.join(reserved)}")
    return custom_metadata


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return metrics as numbers by name, or raise `ArgumentError` if they are none."""
    if metrics is None:
        return {}
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ArgumentError("metrics", f"must map names to numbers, got {metrics!r}: {error}") from error
