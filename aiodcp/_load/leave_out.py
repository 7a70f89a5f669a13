"""Leaving out what the caller does not want: names that are not included, or excluded. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._format.dcp import KeyPath
from .._state.name_patterns import Names, matcher
from ..errors import ArgumentError
from .stored_names import StoredNames
from .targets import LoadTargets

Kept = list[tuple[KeyPath, Any]]
"""Leaves that stay as they are: where, and what."""


def chooser(include: Names | None, exclude: Names | None) -> Callable[[str], bool] | None:
    """Return a function: whether a name is wanted; None if all are.

    Raises:
        ArgumentError: these are no names.
    """
    if include is None and exclude is None:
        return None
    is_in = matcher(include, "include") if include is not None else lambda fqn: True
    is_out = matcher(exclude, "exclude") if exclude is not None else lambda fqn: False
    return lambda fqn: is_in(fqn) and not is_out(fqn)


def leave_out(targets: LoadTargets, stored: StoredNames, is_wanted: Callable[[str], bool]) -> Kept:
    """Take what is not wanted out of the targets, and out of what is stored; return what stays as it is.

    Raises:
        ArgumentError: of an optimizer only a part is wanted.
    """
    keeps = [is_wanted(fqn) for fqn in targets.fqns]
    _refuse_parts_of_optimizers(targets, sorted({*targets.fqns, *stored.entries}), is_wanted)
    stored.entries = {fqn: entry for fqn, entry in stored.entries.items() if is_wanted(fqn)}
    kept = [(path, value) for path, value, keep in zip(targets.paths, targets.values, keeps, strict=True) if not keep]
    targets.report.excluded.extend(fqn for fqn, keep in zip(targets.fqns, keeps, strict=True) if not keep)
    wanted = [number for number, keep in enumerate(keeps) if keep]
    targets.fqns = [targets.fqns[number] for number in wanted]
    targets.paths = [targets.paths[number] for number in wanted]
    targets.values = [targets.values[number] for number in wanted]
    targets.per_rank = [each for each in targets.per_rank if _is_any_below(targets.paths, each[0])]
    targets.optimizers = [each for each in targets.optimizers if _is_any_below(targets.paths, each.path)]
    return kept


def _is_any_below(paths: list[KeyPath], base: KeyPath) -> bool:
    return any(path[: len(base)] == base for path in paths)


def _refuse_parts_of_optimizers(targets: LoadTargets, fqns: Iterable[str], is_wanted: Callable[[str], bool]) -> None:
    bases = [".".join(map(str, scope.path)) for scope in targets.optimizers]
    for base in bases:
        below = [fqn for fqn in fqns if fqn.startswith(f"{base}.")]
        left = [fqn for fqn in below if not is_wanted(fqn)]
        if left and len(left) < len(below):
            problem = f"would load a part of the optimizer {base!r}, without {left[0]}: leave out all of it, or nothing"
            raise ArgumentError("exclude", problem)
