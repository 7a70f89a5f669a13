"""When the run is to stop: what a manager knows of it, from one time that it is entered to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .._distributed.stop_agreement import StopAgreement
from .._engine.milestone import Milestone, MilestoneSource
from .arguments import Options
from .preemption import Preemption


class Stopping:
    """Whether the run is to stop, why, and how much time is left."""

    def __init__(
        self, options: Options, *, on_heard: Callable[[], None], report: Callable[[int, str, float], None]
    ) -> None:
        """Be ready.

        Args:
            options: signals, deadline and grace period.
            on_heard: called when this rank hears that the run is to stop.
            report: called once with the step, the reason, and the seconds that are left.
        """
        self._options = options
        self._on_heard = on_heard
        self._report = report
        self._source = MilestoneSource("preempted")
        self._preemption: Preemption | None = None  # made by `begin`
        self._asked_early: str | None = None  # why the run is to stop, if that was asked before
        self._is_reported = False

    @property
    def milestone(self) -> Milestone:
        """Reached when the run is to stop."""
        return Milestone(self._source)

    @property
    def left_s(self) -> float | None:
        """Seconds until the process is ended; None if the run is not to stop."""
        return None if self._preemption is None else self._preemption.left_s

    def begin(self, agreement: StopAgreement | None, before: Mapping[int, Any]) -> None:
        """Listen to signals, to the clock, and to other ranks.

        Args:
            agreement: of the ranks on a step, if there are several.
            before: handlers to put back in the end, where they are not the ones that are set now.

        Raises:
            ValueError, OSError: no handler can be installed here.
        """
        if self._preemption is not None:  # once more
            self._source, self._preemption, self._is_reported = MilestoneSource("preempted"), None, False
        self._preemption = Preemption(
            self._source,
            signals=self._options.signals,
            before=before,
            grace_s=self._options.grace_s,
            deadline=self._options.deadline,
            agreement=agreement,
            on_heard=self._on_heard,
        )
        if self._asked_early is not None:
            self._preemption.ask(self._asked_early)

    def close(self) -> None:
        """Listen no longer."""
        if self._preemption is not None:
            self._preemption.close()

    def ask(self, reason: str) -> None:
        """Ask the run to stop, on all ranks. From any thread."""
        if self._preemption is None:
            self._asked_early = reason
        else:
            self._preemption.ask(reason)

    def stops_at(self, step: int) -> bool:
        """Whether the run stops at this step; all ranks ask. Waits until they agree, once one of them is to stop."""
        preemption = self._preemption
        if preemption is None or not preemption.stops_at(step):
            return False
        if not self._is_reported:
            self._is_reported = True
            self._report(step, preemption.reason, preemption.left_s or 0.0)
        return True
