"""What a load left out or converted."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import MismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load left out or converted. It is empty, and false, when all that is stored is loaded as it was saved.

    Attributes:
        missing: fqns that were wanted and are not stored: with `strict=False`, and of a `PerRank` on a new rank.
        unexpected: fqns that are stored below the names that were asked for, and no rank wanted: with `strict=False`.
        converted: fqns of tensors that were converted to another dtype, and of numbers to tensors and back.
        excluded: fqns that were left as they are because `include` or `exclude` said so.
        loaded: fqns of all that was loaded.
        refusal: of `Checkpointer.check`: the error that a load would raise.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list, repr=False, compare=False)
    refusal: MismatchError | None = None

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.converted or self.refusal)
