"""Leaving out what the caller does not want: names that are not included, or excluded. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._format.dcp import KeyPath
from .._format.extension import Containers
from .._state.name_patterns import Matcher, Names
from ..errors import ArgumentError
from .name_hints import did_you_mean
from .stored_names import StoredNames
from .targets import LoadTargets

Kept = list[tuple[KeyPath, Any]]
"""Leaves that stay as they are: where, and what."""


class Choice:
    """Says whether a name is wanted."""

    def __init__(self, include: Names | None, exclude: Names | None) -> None:
        """Take what the caller gives.

        Raises:
            ArgumentError: these are no names.
        """
        self.include: Matcher | None = Matcher(include, "include") if include is not None else None
        self._exclude = Matcher(exclude, "exclude") if exclude is not None else None

    def __call__(self, fqn: str) -> bool:
        is_in = self.include is None or self.include(fqn)
        return is_in and (self._exclude is None or not self._exclude(fqn))


def leave_out(targets: LoadTargets, stored: StoredNames, is_wanted: Choice) -> Kept:
    """Take what is not wanted out of the targets, and out of what is stored; return what stays as it is.

    Raises:
        ArgumentError: of an optimizer only a part is wanted, or what is included is no name.
    """
    if is_wanted.include is not None:
        known = [*dict.fromkeys((*targets.fqns, *stored.entries))]
        is_wanted.include.refuse_unused(known, lambda pattern: did_you_mean(pattern, known))
    keeps = [is_wanted(fqn) for fqn in targets.fqns]
    _refuse_parts_of_optimizers(targets, sorted({*targets.fqns, *stored.entries}), is_wanted)
    stored.entries = {fqn: entry for fqn, entry in stored.entries.items() if is_wanted(fqn)}
    if stored.containers is not None:
        empty = [path for path in stored.containers.empty if is_wanted(".".join(map(str, path)))]
        stored.containers = Containers(empty, stored.containers.int_keys)
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
