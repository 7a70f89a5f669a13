"""Which steps are kept. Pure: no files, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Literal

from ..errors import ArgumentError
from .steps import Step, in_order

Best = tuple[str, Literal["min", "max"]] | tuple[str, Literal["min", "max"], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Keep the last steps, every so many-th, and the best; see `CheckpointManager`."""

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: Best | None = None

    def __post_init__(self) -> None:
        """Raise `ArgumentError` for what cannot be meant."""
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(name, f"must be a positive integer, got {value!r}")
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
        if self.keep_last is None and self.keep_every is not None:
            raise ArgumentError("keep_every", "requires keep_last, to whose steps it adds")

    def best(self, steps: Sequence[Step]) -> list[int]:
        """Return the steps that have the metric, from the best to the worst; of equal ones the newest first."""
        if self.keep_best is None:
            return []
        name, mode = self.keep_best[:2]
        sign = 1.0 if mode == "min" else -1.0
        rated = [(sign * each.metrics[name], -each.step) for each in steps if not isnan(each.metrics.get(name, nan))]
        return [-number for _, number in sorted(rated)]

    def to_remove(self, steps: Sequence[Step]) -> list[int]:
        """Return the complete `steps` that are not to be kept, oldest first; never the one committed last."""
        if self.keep_last is None:
            return []
        numbers = [each.step for each in in_order(steps)]
        kept = set(numbers[-self.keep_last :])
        if self.keep_every is not None:
            kept.update(number for number in numbers if number % self.keep_every == 0)
        if self.keep_best is not None:
            kept.update(self.best(steps)[: self.keep_best[2] if len(self.keep_best) == 3 else 1])
        return [number for number in numbers if number not in kept]
