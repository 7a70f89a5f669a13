"""Who holds what, of all ranks, as arrays: one entry for each item that a rank holds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .._format.arrays import Array, Flags
from .._format.chunks import grid_makes_up, is_whole
from .._format.dcp import ChunkStorageMetadata, KeyPath, TensorStorageMetadata
from .._format.extension import Containers
from .._state.per_rank import per_rank_key
from ..errors import CaptureError
from .plan import FROZEN_NBYTES
from .state_table import OWN, Spec, StateTable, containers_with, put_key


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Ranks that have one table.

    Attributes:
        table: theirs.
        ranks: which.
        places: of each, a row.
    """

    table: StateTable
    ranks: Array
    places: Array

    def number_names(self, index: dict[str, int]) -> Array:
        """Number the names of all values, and return those of the items: a row, or if they differ one for each rank."""
        table = self.table
        keys = [per_rank_key(rank) for rank in self.ranks.tolist()] if table.has_own else [OWN]
        own = [fqn for fqn in table.paths if table.has_own and OWN in fqn]
        for fqn in table.paths:
            index.setdefault(fqn.replace(OWN, keys[0]), len(index))
        for key in keys[1:]:
            for fqn in own:
                index.setdefault(fqn.replace(OWN, key), len(index))
        first = np.array(
            [index.setdefault(fqn.replace(OWN, keys[0]), len(index)) for fqn in table.fqns], dtype=np.int64
        ).reshape(1, -1)
        if not own:
            return first
        rows = np.repeat(first, len(keys), axis=0)
        for item, fqn in enumerate(table.fqns):
            if table.has_own and OWN in fqn:
                rows[:, item] = [index[fqn.replace(OWN, key)] for key in keys]
        return rows

    def all_paths(self) -> dict[str, KeyPath]:
        """Return the keys that lead to the values of all these ranks, by name."""
        paths: dict[str, KeyPath] = {}
        for fqn, path in self.table.paths.items():
            if not self.table.has_own or OWN not in fqn:
                paths[fqn] = path
                continue
            for key in map(per_rank_key, self.ranks.tolist()):
                paths[fqn.replace(OWN, key)] = put_key(path, OWN, key)
        return paths

    def all_containers(self) -> Containers:
        """Return what names do not say of the containers of all these ranks."""
        found = self.table.containers
        if not self.table.has_own:
            return found
        all_ = [containers_with(found, OWN, per_rank_key(rank)) for rank in self.ranks.tolist()]
        empty = dict.fromkeys(path for each in all_ for path in each.empty)
        return Containers(list(empty), list(dict.fromkeys(path for each in all_ for path in each.int_keys)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """All that the ranks hold, rank by rank, each in the order of its local plan.

    Attributes:
        names: of all values, in the order of the state dict.
        specs: what the tensors of these names are; None for other values.
        ranks: whose each holding is.
        numbers: which item of its local plan.
        fqns: index of its name.
        offsets, sizes: which part of the tensor; of other values, and beyond its dimensions, 0 and 1.
        frozen: whether it was frozen at capture.
        starts: by rank, where its holdings begin; and the end.
    """

    names: list[str]
    specs: list[Spec | None]
    ranks: Array
    numbers: Array
    fqns: Array
    offsets: Array
    sizes: Array
    frozen: Flags
    starts: Array

    @classmethod
    def of(cls, groups: Sequence[RankGroup]) -> Holdings:
        """Return what all ranks hold.

        Raises:
            CaptureError: ranks hold different tensors under one name, or a tensor on one and something else on another.
        """
        groups = sorted(groups, key=lambda group: int(group.ranks[0]))
        index: dict[str, int] = {}
        specs: list[Spec | None] = []
        first_rank: dict[int, int] = {}
        columns = []
        for group in groups:
            columns.append(group.number_names(index))
            specs += [None] * (len(index) - len(specs))
            items = list(range(len(group.table.specs)))
            others = np.flatnonzero((columns[-1] != columns[-1][:1]).any(axis=0)).tolist()
            # One row, if all have the same names; of the others only what differs.
            for rank, row in zip(group.ranks.tolist(), columns[-1].tolist(), strict=False):
                for item in items:
                    name, spec = row[item], group.table.specs[item]
                    if name not in first_rank:
                        first_rank[name], specs[name] = rank, spec
                    elif spec is not specs[name] and _words(spec) != _words(specs[name]):
                        known, what = _words(specs[name]), _words(spec)
                        problem = f"rank {first_rank[name]} has {known}, rank {rank} has {what}"
                        raise CaptureError(list(index)[name], problem)
                items = others
        size = sum(len(group.ranks) for group in groups)
        counts = np.zeros(size + 1, dtype=np.int64)
        for group, column in zip(groups, columns, strict=True):
            counts[group.ranks + 1] = column.shape[1]
        starts = np.cumsum(counts)
        dimensions = max((len(spec.size) for spec in specs if spec is not None), default=0)
        total = int(starts[-1])
        ranks, numbers, fqns = (np.zeros(total, dtype=np.int64) for _ in range(3))
        offsets = np.zeros((total, dimensions), dtype=np.int64)
        sizes = np.ones((total, dimensions), dtype=np.int64)
        frozen = np.zeros(total, dtype=np.bool_)
        for group, column in zip(groups, columns, strict=True):
            rows = starts[group.ranks][:, None] + np.arange(column.shape[1])
            ranks[rows] = group.ranks[:, None]
            numbers[rows] = np.arange(column.shape[1])
            fqns[rows] = column
            frozen[rows] = np.array(group.table.frozen, dtype=np.bool_)
            _spread(group, rows, offsets, sizes)
        return cls(
            names=list(index),
            specs=specs,
            ranks=ranks,
            numbers=numbers,
            fqns=fqns,
            offsets=offsets,
            sizes=sizes,
            frozen=frozen,
            starts=starts,
        )


def _words(spec: Spec | None) -> object:
    return "no tensor" if spec is None else (spec.properties.dtype, spec.size)


def _spread(group: RankGroup, rows: Array, offsets: Array, sizes: Array) -> None:
    """Put a group's places where they belong: tensors of so many dimensions in one go."""
    lengths = np.array([0 if spec is None else len(spec.size) for spec in group.table.specs], dtype=np.int64)
    begins = np.cumsum(2 * lengths) - 2 * lengths
    for dimensions in set(lengths.tolist()) - {0}:
        [items] = np.nonzero(lengths == dimensions)
        where = begins[items][:, None] + np.arange(dimensions)
        offsets[rows[:, items], :dimensions] = group.places[:, where]
        sizes[rows[:, items], :dimensions] = group.places[:, where + dimensions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """How a tensor is cut into chunks; many tensors are cut alike.

    Attributes:
        offsets, sizes: of the chunks, in their order; each a row.
    """

    offsets: Array
    sizes: Array

    def makes_up(self, size: tuple[int, ...]) -> bool:
        """Whether the chunks make up a tensor of this size, each element once."""
        return grid_makes_up(self.offsets, self.sizes, size) or is_whole(self.entry(size))

    def entry(self, size: tuple[int, ...]) -> TensorStorageMetadata:
        """Return the chunks as DCP says them, of a tensor of this size; without properties."""
        chunks = [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in zip(self.offsets.tolist(), self.sizes.tolist(), strict=True)
        ]
        return TensorStorageMetadata(properties=None, size=torch.Size(size), chunks=chunks)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """All that is to be written, each chunk and each other value once: by name, then by where it lies in the tensor.

    Attributes:
        order: the holdings in the order of the chunks that they are; of one chunk by rank.
        of_holding: of each of these, its chunk.
        starts: by chunk, where its holdings begin in `order`; and the end.
        names: by chunk, the index of its name.
        first: by name, its first chunk; and the end. Names without chunks have none.
        nbytes: by chunk, of the tensor's elements; of other values 0.
        patterns: by name, how it is cut; None for other values, and for names without chunks.
    """

    order: Array
    of_holding: Array
    starts: Array
    names: Array
    first: Array
    nbytes: Array
    patterns: list[Pattern | None]

    @property
    def holders(self) -> Array:
        """How many ranks hold each chunk."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.names)


def find_chunks(held: Holdings) -> Chunks:
    """Find out what chunks there are, and make sure that they make up the tensors.

    Raises:
        CaptureError: ranks hold parts of different sizes at one place, or parts that do not make up a whole.
    """
    place = _place_in_tensor(held)
    order = np.lexsort((place, held.fqns))
    fqns, place = held.fqns[order], place[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (fqns[1:] != fqns[:-1]) | (place[1:] != place[:-1])
    [starts] = np.nonzero(is_first)
    of_holding = np.cumsum(is_first) - 1
    leaders = order[starts]
    differs = (held.sizes[order] != held.sizes[leaders][of_holding]).any(axis=1)
    if differs.any():
        where = int(np.argmax(differs))
        one, other = int(leaders[of_holding[where]]), int(order[where])
        chunk = tuple(held.offsets[other].tolist())
        problem = f"ranks {held.ranks[one]} and {held.ranks[other]} hold parts of different sizes at {chunk}"
        raise CaptureError(held.names[int(fqns[where])], problem)
    names = fqns[starts]
    first = np.searchsorted(names, np.arange(len(held.names) + 1))
    itemsizes = np.array([0 if spec is None else spec.properties.dtype.itemsize for spec in held.specs], dtype=np.int64)
    return Chunks(
        order=order,
        of_holding=of_holding,
        starts=np.append(starts, len(order)),
        names=names,
        first=first,
        nbytes=held.sizes[leaders].prod(axis=1) * itemsizes[names],
        patterns=_find_patterns(held, leaders, first),
    )


def _place_in_tensor(held: Holdings) -> Array:
    """Return one number for each holding's offsets, in row-major order; parts without elements have one of their own.

    Raises:
        CaptureError: it does not lie within its tensor.
    """
    dimensions = held.offsets.shape[1]
    wholes = np.ones((len(held.names), dimensions), dtype=np.int64)
    strides = np.zeros((len(held.names), dimensions), dtype=np.int64)
    for name, spec in enumerate(held.specs):
        step = 1
        for dimension in reversed(range(len(spec.size) if spec is not None else 0)):
            strides[name, dimension], wholes[name, dimension] = step, spec.size[dimension]  # type: ignore[union-attr]
            step *= spec.size[dimension] + 1  # type: ignore[union-attr]
    outside = (held.offsets < 0) | (held.sizes < 0) | (held.offsets + held.sizes > wholes[held.fqns])
    if outside.any():
        where = int(np.argmax(outside.any(axis=1)))
        raise _not_whole(held, int(held.fqns[where]), held.offsets[where : where + 1], held.sizes[where : where + 1])
    places: Array = (held.offsets * strides[held.fqns]).sum(axis=1)
    return places


def _find_patterns(held: Holdings, leaders: Array, first: Array) -> list[Pattern | None]:
    known: dict[tuple[int, bytes, bytes], Pattern] = {}
    wholes: dict[tuple[int, ...], Pattern] = {}
    is_sound: set[tuple[int, tuple[int, ...]]] = set()
    found: list[Pattern | None] = []
    bounds = first.tolist()
    is_at_start = (held.offsets[leaders] == 0).all(axis=1).tolist()
    counts = held.sizes[leaders].prod(axis=1).tolist()
    for name, spec in enumerate(held.specs):
        start, stop = bounds[name], bounds[name + 1]
        if spec is None or start == stop:
            found.append(None)
            continue
        if stop - start == 1 and spec.size in wholes and counts[start] == spec.numel and is_at_start[start]:
            found.append(wholes[spec.size])
            continue
        rows = leaders[start:stop]
        dimensions = len(spec.size)
        offsets, sizes = held.offsets[rows, :dimensions], held.sizes[rows, :dimensions]
        key = dimensions, offsets.tobytes(), sizes.tobytes()
        pattern = known.setdefault(key, Pattern(offsets=offsets, sizes=sizes))
        if (id(pattern), spec.size) not in is_sound:
            if not pattern.makes_up(spec.size):
                raise _not_whole(held, name, offsets, sizes)
            is_sound.add((id(pattern), spec.size))
            if stop - start == 1 and spec.numel:
                wholes[spec.size] = pattern
        found.append(pattern)
    return found


def _not_whole(held: Holdings, name: int, offsets: Array, sizes: Array) -> CaptureError:
    spec = held.specs[name]
    assert spec is not None
    dimensions = len(spec.size)
    chunks = ", ".join(
        f"{tuple(size[:dimensions])} at {tuple(offset[:dimensions])}"
        for offset, size in zip(offsets[:8].tolist(), sizes[:8].tolist(), strict=True)
    )
    return CaptureError(held.names[name], f"the ranks' shards do not cover its shape exactly: {spec.size}: {chunks}")


def choose_writers(held: Holdings, chunks: Chunks) -> Array:
    """Decide for each chunk which of its holders writes it: each rank about as many bytes. By place in `chunks.order`.

    `dedup_save_plans` of DCP counts every chunk with the bytes of its whole tensor, and the items in their order.
    Here what only one rank holds is counted first, then the rest from the largest on goes to who has least.
    """
    ranks = held.ranks[chunks.order]
    is_value = np.fromiter((spec is None for spec in held.specs), dtype=np.bool_, count=len(held.specs))
    weights = np.where(is_value[chunks.names], FROZEN_NBYTES, chunks.nbytes)
    writers = chunks.starts[:-1].copy()
    is_alone = chunks.holders == 1
    load = np.zeros(len(held.starts) - 1, dtype=np.int64)
    np.add.at(load, ranks[writers[is_alone]], weights[is_alone])
    [shared] = np.nonzero(~is_alone)
    _, begins = np.unique(chunks.names[shared], return_index=True)
    ends = np.append(begins[1:], len(shared))
    largest = np.maximum.reduceat(weights[shared], begins) if len(shared) else begins
    for number in np.argsort(-largest, kind="stable").tolist():
        of_name = shared[begins[number] : ends[number]]
        start, stop = int(chunks.starts[of_name[0]]), int(chunks.starts[of_name[-1] + 1])
        holders = ranks[start:stop]
        if len(of_name) < MANY or len(of_name) != of_name[-1] + 1 - of_name[0] or _has_twice(holders):
            for chunk in of_name[np.argsort(-weights[of_name], kind="stable")].tolist():
                begin, end = int(chunks.starts[chunk]), int(chunks.starts[chunk + 1])
                writers[chunk] = begin + int(load[ranks[begin:end]].argmin())
                load[ranks[writers[chunk]]] += weights[chunk]
            continue
        # No rank holds two of these: the choices do not depend on each other.
        by_load = np.lexsort((load[holders], chunks.of_holding[start:stop]))
        writers[of_name] = start + by_load[chunks.starts[of_name] - start]
        load[ranks[writers[of_name]]] += weights[of_name]
    return writers


MANY = 8


def _has_twice(ranks: Array) -> bool:
    return len(np.unique(ranks)) < len(ranks)
