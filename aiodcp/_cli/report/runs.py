"""The history of a root as saves and what else happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CALLER = ("wait", "capture", "fence")
"""Phases in which the caller is held up: waiting for the save before, capturing, waiting for staging."""

PHASES = (*CALLER, "plan", "stage", "checksum", "write", "vote", "commit")

Span = tuple[str, float, float]
"""A name, and seconds from when the save was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """A save that has ended.

    Attributes:
        step: which.
        began: when it was asked for, in seconds since the epoch.
        seconds: until it was durable, or had failed.
        nbytes: that the coordinator wrote.
        spans: its phases.
        steps: the caller's steps beside them.
        failure: why it failed; empty if it did not.
    """

    step: int
    began: float
    seconds: float
    nbytes: int
    spans: Sequence[Span]
    steps: Sequence[Span]
    failure: str

    @property
    def stall_s(self) -> float:
        """Seconds for which the caller was held up."""
        return sum(stop - start for name, start, stop in self.spans if name in CALLER)

    @property
    def durable_s(self) -> float:
        """Seconds from its turn until it was durable."""
        waited = sum(stop - start for name, start, stop in self.spans if name == "wait")
        return max(self.seconds - waited, 0.0)

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.durable_s if self.durable_s else 0.0


@dataclass(slots=True)
class Runs:
    """What is known of all runs below a root.

    Attributes:
        count: managers that have saved.
        saves: in the order in which they ended.
        removed: steps that retention has removed.
        skipped: saves that were skipped.
        troubles: warnings and errors: when, at which step, and what.
        restored: when, and which step.
    """

    count: int = 0
    saves: list[Save] = field(default_factory=list)
    removed: set[int] = field(default_factory=set)
    skipped: int = 0
    troubles: list[tuple[float, int, str]] = field(default_factory=list)
    restored: list[tuple[float, int]] = field(default_factory=list)


def runs_of(events: Sequence[Mapping[str, Any]]) -> Runs:
    """Return what events, as `read_history` returns them, tell."""
    runs = Runs(count=len({event["run"] for event in events}))
    for event in events:
        kind, step, at = event["event"], int(event.get("step", -1)), event["at"]
        if kind in ("SaveFinished", "SaveFailed"):
            runs.saves.append(_save(event, step, at))
            runs.removed.discard(step)
        elif kind == "StepRemoved":
            runs.removed.add(step)
        elif kind == "SaveSkipped":
            runs.skipped += 1
        elif kind == "Restored":
            runs.restored.append((at, step))
        if int(event.get("level", 0)) >= WARNING:
            runs.troubles.append((at, step, str(event.get("text", kind))))
    return runs


WARNING = 30


def _save(event: Mapping[str, Any], step: int, at: float) -> Save:
    began = float(event.get("began", at))
    spans = [(str(name), float(start), float(stop)) for name, start, stop in event.get("spans", ())]
    return Save(
        step=step,
        began=began,
        seconds=at - began,
        nbytes=int(event.get("nbytes", 0)),
        spans=[span for span in spans if span[0] in PHASES],
        steps=[span for span in spans if span[0] not in PHASES],
        failure=str(event.get("text", "failed")) if event["event"] == "SaveFailed" else "",
    )
