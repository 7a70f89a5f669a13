"""From a nested state dict to named leaves, as DCP names them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .._format.dcp import KeyPath
from .._format.extension import Containers
from ..errors import CaptureError
from .per_rank import PerRank, per_rank_key
from .plain_tensors import PLAIN_TENSORS

MANY = 64  # dicts, from which on it is quicker to take them together

_ONLY_DICT, _ONLY_INT, _ONLY_STR = {dict}, {int}, {str}

_SCALARS = {int, float, str, bytes, bool, type(None)}

_LEAVES = {*PLAIN_TENSORS, DTensor, *_SCALARS}

SHOWN = 80  # characters of a name that is too long


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of a state dict: names, paths and values, in step and in its order.

    Attributes:
        optimizers: where mappings are that have the shape of an optimizer's state dict.
        per_rank: where values are of which each rank has its own.
    """

    fqns: list[str]
    paths: list[KeyPath]
    values: list[Any]
    containers: Containers
    optimizers: list[KeyPath]
    per_rank: list[tuple[KeyPath, PerRank]]


def flatten(state_dict: Mapping[str, Any], rank: int = 0) -> Leaves:
    """Return names, paths and leaves, in the order of the state dict.

    Args:
        state_dict: what to walk.
        rank: whose it is.

    Raises:
        CaptureError: it is nested deeper than Python's recursion limit, or contains itself.
    """
    return Walk(state_dict, rank).leaves()


Named = tuple[list[str], list[KeyPath]]


class Names:
    """The names below one mapping or list. They are made when they are asked for, and kept for the next state.

    Attributes:
        keys: of the mapping; of a list the range of its indices.
        below: the names further down, by position.
        rows: those of all leaves below, if the values are dicts of leaves.
    """

    __slots__ = ("_above", "_kinds", "_named", "_place", "below", "keys", "rows")

    def __init__(self, above: Names | None, place: int, keys: tuple[Any, ...] | range) -> None:
        self.keys = keys
        self.below: dict[int, Names] = {}
        self.rows: RowNames | None = None
        self._above = above
        self._place = place
        self._kinds: set[type] | None = None
        self._named: Named | None = None

    @classmethod
    def of(cls, known: Names | None, above: Names | None, place: int, keys: Mapping[Any, Any] | range) -> Names:
        """Return the names of `keys`, which lie at a position of those above: the known ones, if they are these."""
        if isinstance(keys, range):
            return known if known is not None and known.keys == keys else cls(above, place, keys)
        if known is None or isinstance(known.keys, range) or len(known.keys) != len(keys):
            return cls(above, place, tuple(keys))
        if all(map(is_, known.keys, keys)):
            return known
        names = cls(above, place, tuple(keys))
        # Equal keys of another type have other names: 1 and True.
        is_alike = known.keys == names.keys and known.kinds == names.kinds and len(names.kinds) < 2
        return known if is_alike else names

    @property
    def kinds(self) -> set[type]:
        """The types of the keys of a mapping."""
        if self._kinds is None:
            self._kinds = set(map(type, self.keys))
        return self._kinds

    @property
    def path(self) -> KeyPath:
        """Where the mapping or list lies."""
        steps: list[str | int] = []
        names = self
        while names._above is not None:  # not by recursion, whose limit may have been reached
            names, place = names._above, names._place
            steps.append(names._step(names.keys[place]))
        return tuple(reversed(steps))

    def _step(self, key: Any) -> str | int:
        return key if isinstance(self.keys, range) else str(key)

    def all(self) -> Named:
        """Return names and paths of what lies directly below."""
        if self._named is None:
            path = self.path
            prefix = "".join(f"{step}." for step in path)
            self._named = [f"{prefix}{key}" for key in self.keys], [(*path, self._step(key)) for key in self.keys]
        return self._named


class RowNames:
    """The names of all leaves of the dicts of one mapping, as an optimizer has one for each parameter."""

    __slots__ = ("_above", "_keys", "_lengths", "_named")

    def __init__(self, above: Names, lengths: list[int], keys: list[str]) -> None:
        self._above = above
        self._lengths = lengths
        self._keys = keys
        self._named: Named | None = None

    def are(self, lengths: list[int], keys: list[str]) -> bool:
        """Whether dicts of so many leaves, with these keys, have these names."""
        return self._lengths == lengths and self._keys == keys

    def all(self) -> Named:
        if self._named is None:
            fqns, paths = self._above.all()
            rows = chain.from_iterable(map(repeat, range(len(fqns)), self._lengths))
            pairs = list(zip(rows, self._keys, strict=True))
            self._named = [f"{fqns[row]}.{key}" for row, key in pairs], [(*paths[row], key) for row, key in pairs]
        return self._named


class KnownNames:
    """The names of one state dict, for the next: it mostly has the same, and to compare them is quicker."""

    def __init__(self) -> None:
        self.top: Names | None = None


class Walk:
    """A walk through a state dict, which collects its leaves as they are now, and can name them later.

    Attributes:
        values: the leaves.
        kinds: the types of all that was met, but for dicts.
    """

    def __init__(self, state_dict: Mapping[str, Any], rank: int = 0, known: KnownNames | None = None) -> None:
        """Walk.

        Args:
            state_dict: through this.
            rank: whose it is.
            known: the names of the state before, and then of this one.

        Raises:
            CaptureError: see `flatten`.
        """
        self.values: list[Any] = []
        self.kinds: set[type] = set()
        self._rank = rank
        self._runs: list[tuple[Names | RowNames, int, int]] = []  # of leaves: the names from here to there
        self._int_keys: list[Names] = []
        self._empty: list[Names] = []
        self._optimizers: list[Names] = []
        self._per_rank: list[tuple[Names, PerRank]] = []
        self._odd_keys: list[Names] = []
        self._stops: list[int] = []  # where among the values the runs end
        self._last: Names | None = None
        known = known or KnownNames()
        try:
            known.top = self._through_mapping(known.top, None, 0, state_dict)
        except RecursionError as error:
            raise CaptureError(f"{self._here()[:SHOWN]}...", "is nested too deeply, or contains itself") from error

    def _here(self) -> str:
        return ".".join(map(str, self._last.path)) if self._last is not None else ""

    def fqn(self, index: int) -> str:
        """Return the name of one leaf."""
        run = bisect_right(self._stops, index)
        names, _, stop = self._runs[run]
        return names.all()[0][stop - (self._stops[run] - index)]

    def odd_keys(self) -> list[KeyPath]:
        """Return where mappings are whose keys are neither all texts nor all ints."""
        return [names.path for names in self._odd_keys]

    def leaves(self) -> Leaves:
        """Return the leaves with their names. From any thread."""
        fqns: list[str] = []
        paths: list[KeyPath] = []
        for names, first, stop in self._runs:
            its_fqns, its_paths = names.all()
            fqns += its_fqns[first:stop]
            paths += its_paths[first:stop]
        return Leaves(
            fqns,
            paths,
            self.values,
            Containers([each.path for each in self._empty], [each.path for each in self._int_keys]),
            [each.path for each in self._optimizers],
            [(each.path, value) for each, value in self._per_rank],
        )

    def _through_mapping(
        self, known: Names | None, above: Names | None, place: int, mapping: Mapping[Any, Any]
    ) -> Names:
        names = Names.of(known, above, place, mapping)
        if above is not None:
            kinds = names.kinds
            if not mapping:
                self._empty.append(names)
            elif kinds == _ONLY_INT:
                self._int_keys.append(names)
            elif not all(issubclass(kind, str) for kind in kinds) and above not in self._optimizers:
                self._odd_keys.append(names)
            elif "param_groups" in mapping and "state" in mapping:
                self._optimizers.append(names)
        self._through([*mapping.values()], names)
        return names

    def _through_list(self, known: Names | None, above: Names | None, place: int, values: list[Any]) -> Names:
        names = Names.of(known, above, place, range(len(values)))
        self._through([*values], names)
        return names

    def _through_own(self, known: Names | None, above: Names | None, place: int, value: PerRank) -> Names:
        names = Names.of(known, above, place, {per_rank_key(self._rank): value})
        self._per_rank.append((names, value))
        self._through([value.value], names)
        return names

    def _through(self, values: list[Any], names: Names) -> None:
        """Walk through the values of the mapping or list whose names these are."""
        self._last = names
        below: dict[int, Names] = {}
        kinds = set(map(type, values))
        self.kinds |= kinds - _ONLY_DICT
        if kinds <= _LEAVES:
            self._take(names, 0, values)
        elif len(values) < MANY or kinds != _ONLY_DICT or not self._through_rows(values, names):
            first = 0
            for index, value in enumerate(values):
                if type(value) in _LEAVES or (through := self._way_through(value)) is None:
                    continue
                self._take(names, first, values[first:index])
                first = index + 1
                below[index] = through(names.below.get(index), names, index, value)
            self._take(names, first, values[first:])
        names.below = below

    def _through_rows(self, values: list[Any], names: Names) -> bool:
        """Walk through dicts that hold only leaves, in one go; return whether they are such."""
        keys, leaves = [*chain.from_iterable(values)], [*chain.from_iterable(map(dict.values, values))]
        lengths = [*map(len, values)]
        kinds = set(map(type, leaves))
        self.kinds |= kinds
        if (
            not _ONLY_STR.issuperset(map(type, keys))
            or not kinds <= _LEAVES
            or not min(lengths)
            or "param_groups" in keys
        ):
            return False
        if names.rows is None or not names.rows.are(lengths, keys):
            names.rows = RowNames(names, lengths, keys)
        self._take(names.rows, 0, leaves)
        return True

    def _take(self, names: Names | RowNames, first: int, values: list[Any]) -> None:
        if values:
            self._runs.append((names, first, first + len(values)))
            if self.values:
                self.values += values
            else:
                self.values = values
            self._stops.append(len(self.values))

    def _way_through(self, value: object) -> Callable[[Names | None, Names | None, int, Any], Names] | None:
        """Return what walks through a value; None if it is a leaf."""
        if type(value) is dict or isinstance(value, Mapping):
            return self._through_mapping
        if isinstance(value, list):
            return None if _is_leaf(value) else self._through_list
        return self._through_own if isinstance(value, PerRank) else None


def _is_leaf(values: list[Any]) -> bool:
    """Whether DCP keeps this list whole: it holds no tensor, and no list or mapping that does."""
    return _SCALARS.issuperset(map(type, values)) or not any(
        isinstance(value, (torch.Tensor, Mapping, PerRank)) or (isinstance(value, list) and not _is_leaf(value))
        for value in values
    )
