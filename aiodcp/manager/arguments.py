"""Checks of what a `CheckpointManager` is given."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from ..checkpointer.arguments import ON_BUSY, check_custom_metadata
from ..checkpointer.checkpointer import Checkpointer, session_of
from ..checkpointer.save_calls import OnBusy
from ..errors import ArgumentError
from .events import Event
from .retention import Retention

RESERVED = {
    "step",
    "saved_at",
    "metrics",
    "commit_number",
    "committed_after",
    "uncounted",
}  # of the custom metadata of a step: the manager's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of a `CheckpointManager`, which see; checked."""

    root: str
    checkpointer: Checkpointer
    retention: Retention
    save_interval: int | None
    on_busy: OnBusy
    on_error: Literal["raise", "warn"]
    signals: Sequence[signal.Signals]
    grace_s: float
    deadline: float | None
    progress: bool
    on_event: Callable[[Event], None] | None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ArgumentError: one of them cannot be used.
        """
        if not isinstance(self.checkpointer, Checkpointer):
            raise ArgumentError("checkpointer", f"a {type(self.checkpointer).__name__} is not a Checkpointer")
        if self.save_interval is not None and (type(self.save_interval) is not int or self.save_interval < 1):
            raise ArgumentError("save_interval", f"{self.save_interval!r} is not a number of steps")
        if self.on_busy not in ON_BUSY:
            raise ArgumentError("on_busy", f'{self.on_busy!r} is none of "wait", "skip", "raise"')
        if self.on_error not in ("raise", "warn"):
            raise ArgumentError("on_error", f'{self.on_error!r} is neither "raise" nor "warn"')
        for each in self.signals:
            if not isinstance(each, signal.Signals):
                raise ArgumentError("signals", f"{each!r} is not a signal.Signals")
        if type(self.grace_s) not in (int, float) or not 0 < self.grace_s < float("inf"):
            raise ArgumentError("grace_s", f"{self.grace_s!r} is not a number of seconds")
        if self.deadline is not None and type(self.deadline) not in (int, float):
            raise ArgumentError("deadline", f"{self.deadline!r} is not a number of seconds, as time.time()'s")
        if self.deadline is not None and not isfinite(self.deadline):
            raise ArgumentError("deadline", f"{self.deadline!r} is not a time; None means that there is none")
        if self.on_event is not None and not callable(self.on_event):
            raise ArgumentError("on_event", f"{self.on_event!r} cannot be called")
        try:
            session_of(self.checkpointer).storage.resolve(self.root)
        except ArgumentError as error:
            raise ArgumentError("root", error.problem) from None


def check_step(step: object) -> int:
    """Return the number of a step, or raise `ArgumentError` if it is none."""
    if type(step) is not int or step < 0:
        raise ArgumentError("step", f"{step!r} is not a step: a number from 0 on")
    return step


def check_own_custom_metadata(custom_metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the caller's custom metadata, or raise `ArgumentError` if it cannot be stored beside the manager's."""
    if custom_metadata is None:
        return {}
    check_custom_metadata(custom_metadata)
    if reserved := sorted(RESERVED & custom_metadata.keys()):
        raise ArgumentError("custom_metadata", f"{', '.join(reserved)} is the manager's own: choose another name")
    return custom_metadata


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return metrics as numbers by name, or raise `ArgumentError` if they are none."""
    if metrics is None:
        return {}
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("metrics", f"{metrics!r} are not numbers by name: {error}") from error
