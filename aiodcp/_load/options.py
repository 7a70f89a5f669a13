"""What a caller asks of a load, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .._state.name_patterns import Names
from .targets import LoadTargets

Rename = Mapping[str, str] | Callable[[str], str]
"""Of stored names to wanted ones: by prefixes, or by a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What the caller of a load asked for: see `Checkpointer.load`."""

    strict: bool
    cast: bool
    weights_only: bool
    check_crc: bool
    rename: Rename | None
    include: Names | None = None
    exclude: Names | None = None
    is_dry: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What came of a load.

    Attributes:
        targets: with all values, to be handed over.
        absent: names of the top level of which nothing is stored.
    """

    targets: LoadTargets
    absent: set[str]
