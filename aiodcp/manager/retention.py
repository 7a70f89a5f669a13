"""Which steps are kept. Pure: no files, no clock but the one that is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from typing import Literal

from .._log import SafeLogger
from ..errors import ArgumentError
from .steps import Step, in_order

log: SafeLogger = SafeLogger(__name__)

Best = tuple[str, Literal["min", "max"]] | tuple[str, Literal["min", "max"], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Keep the last steps, the recent ones, every so many-th, one an interval, the best, and others; see
    `CheckpointManager`.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: Best | None = None
    keep_for_s: float | None = None
    keep_every_s: float | None = None
    keep_if: Callable[[Step], bool] | None = None

    def __post_init__(self) -> None:
        """Raise `ArgumentError` for what cannot be meant."""
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(name, f"must be a positive integer, got {value!r}")
        for name in ("keep_for_s", "keep_every_s"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not isfinite(value) or value <= 0):
                raise ArgumentError(name, f"must be a positive, finite number of seconds, got {value!r}")
        if self.keep_if is not None and not callable(self.keep_if):
            raise ArgumentError("keep_if", f"must be a function of a step, got {self.keep_if!r}")
        if self.keep_best is not None:
            match self.keep_best:
                case [str(), "min" | "max"]:
                    pass
                case [str(), "min" | "max", int(count)] if count > 0:
                    pass
                case other:
                    raise ArgumentError(
                        "keep_best", f'must look like ("loss", "min") or ("loss", "min", 3), got {other!r}'
                    )
        if self.keeps_all:
            for name in ("keep_every", "keep_every_s", "keep_if"):
                if getattr(self, name) is not None:
                    raise ArgumentError(name, "requires keep_last or keep_for_s, to whose steps it adds")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.keep_last is None and self.keep_for_s is None

    def best(self, steps: Sequence[Step]) -> list[int]:
        """Return the steps that have the metric, from the best to the worst; of equal ones the newest first."""
        if self.keep_best is None:
            return []
        name, mode = self.keep_best[:2]
        sign = 1.0 if mode == "min" else -1.0
        rated = [(sign * each.metrics[name], -each.step) for each in steps if not isnan(each.metrics.get(name, nan))]
        return [-number for _, number in sorted(rated)]

    def to_remove(self, steps: Sequence[Step], *, latest: int | None = None, now: float | None = None) -> list[int]:
        """Return the complete `steps` that are not to be kept, oldest first; never the one committed last.

        Args:
            steps: the complete ones.
            latest: one that is kept in any case.
            now: in seconds of `time.time()`.
        """
        if self.keeps_all:
            return []
        ordered = in_order(steps)
        numbers = [each.step for each in ordered]
        kept = {latest, *numbers[-(self.keep_last or 1) :]}
        if self.keep_every is not None:
            kept.update(number for number in numbers if number % self.keep_every == 0)
        if self.keep_best is not None:
            kept.update(self.best(steps)[: self.keep_best[2] if len(self.keep_best) == 3 else 1])
        if self.keep_for_s is not None:
            since = (time.time() if now is None else now) - self.keep_for_s
            kept.update(each.step for each in ordered if each.saved_at >= since)
        if self.keep_every_s is not None:
            kept.update(_one_an_interval(ordered, self.keep_every_s))
        if self.keep_if is not None:
            kept.update(each.step for each in ordered if each.step not in kept and self._keeps(each))
        return [number for number in numbers if number not in kept]

    def _keeps(self, step: Step) -> bool:
        assert self.keep_if is not None
        try:
            return bool(self.keep_if(step))
        except BaseException:  # SystemExit, too: it would end the engine's event loop
            log.exception("keep_if raised for step %d, which is kept", step.step)
            return True


def _one_an_interval(steps: Sequence[Step], seconds: float) -> list[int]:
    """Return the first step, and each that was saved so many seconds after the one before."""
    kept: list[int] = []
    last = -float("inf")
    for each in sorted(steps, key=lambda each: (each.saved_at, each.step)):
        if each.saved_at - last >= seconds:
            kept.append(each.step)
            last = each.saved_at
    return kept
