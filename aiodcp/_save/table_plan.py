"""Who writes what and where, for all ranks, planned on arrays. Pure.

It follows DCP's own planner in all but the question who writes what several ranks hold, and makes no object a chunk:
the plan of 4,096 ranks with 500 tensors each has two millions of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .._format.archive_writer import frame_tensor
from .._format.arrays import Array, Flags
from .._format.dcp import KeyPath
from .._format.extension import Containers
from .._format.layout import place_all
from .._state.capture import nothing_to_save
from ..errors import CaptureError
from .holdings import Chunks, Holdings, RankGroup, choose_writers, find_chunks
from .sharing import SharingPlan, plan_sharing


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where what is written lies. All go in step: an entry for each chunk or value, in the order of the chunks.

    Attributes:
        ranks: which writes it.
        numbers: which item of its local plan it is.
        frozen: whether it was frozen at capture: it lies in the tail.
        offsets: bytes, where in the file its archive begins; of what is frozen 0.
        nbytes: of the archive; likewise.
        pieces: which of its rank's files, where these are pieces; of what is frozen the last.
    """

    ranks: Array
    numbers: Array
    frozen: Flags
    offsets: Array
    nbytes: Array
    pieces: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """The plan of a state for all ranks.

    Attributes:
        held: all that the ranks hold.
        chunks: what is written.
        placed: where.
        paths: by name, the keys that lead to it.
        containers: what dotted names do not say of them.
        pieces: by rank, how many files it writes besides its last; -1 for one that writes nothing.
        kept: by rank, which items of its local plan it writes.
        sharing: which items several ranks hold.
    """

    held: Holdings
    chunks: Chunks
    placed: Placed
    paths: dict[str, KeyPath]
    containers: Containers
    pieces: Array
    kept: list[Array]
    sharing: SharingPlan


def plan_tables(groups: Sequence[RankGroup]) -> TablePlan:
    """Share the work out among all ranks. Every chunk is written by one of those that hold it.

    Raises:
        CaptureError: the ranks hold different tensors under one name, or parts that do not make up a whole.
    """
    piece_nbytes = {group.table.piece_nbytes for group in groups}
    if len(piece_nbytes) > 1:
        problem = "the ranks cut files at different sizes: max_host_bytes and storage must be the same on all of them"
        raise CaptureError("", problem)
    held = Holdings.of(groups)
    if not len(held.ranks) and not any(group.table.containers.empty for group in groups):
        raise nothing_to_save()
    chunks = find_chunks(held)
    writers = choose_writers(held, chunks)
    placed, pieces = _place(held, chunks, chunks.order[writers], piece_nbytes.pop())
    paths: dict[str, KeyPath] = {}
    for group in groups:
        paths.update(group.all_paths())
    return TablePlan(
        held=held,
        chunks=chunks,
        placed=placed,
        paths=paths,
        containers=_join_containers(groups, paths),
        pieces=pieces,
        kept=_by_rank(placed, len(held.starts) - 1),
        sharing=_plan_sharing(held, chunks, placed),
    )


def _by_rank(placed: Placed, size: int) -> list[Array]:
    order = np.lexsort((placed.numbers, placed.ranks))
    ends = np.searchsorted(placed.ranks[order], np.arange(size + 1)).tolist()
    numbers = placed.numbers[order]
    return [numbers[start:stop] for start, stop in pairwise(ends)]


def _join_containers(groups: Sequence[RankGroup], paths: dict[str, KeyPath]) -> Containers:
    """Join what all ranks say; what is empty on one rank need not be so on another."""
    filled = {path[:length] for path in paths.values() for length in range(1, len(path))}
    known = [group.all_containers() for group in groups]
    empty = {path: None for each in known for path in each.empty if path not in filled}
    int_keys = {path: None for each in known for path in each.int_keys}
    return Containers(list(empty), list(int_keys))


def _place(held: Holdings, chunks: Chunks, writers: Array, piece_nbytes: int | None) -> tuple[Placed, Array]:
    """Find out where in its rank's file each chunk lies, given the holding that is written of each."""
    frozen = held.frozen[writers]
    ranks, numbers = held.ranks[writers], held.numbers[writers]
    nbytes = np.where(frozen, 0, _archive_nbytes(held, chunks))
    in_file = np.lexsort((numbers, ranks, frozen))[: int((~frozen).sum())]  # tensors, rank by rank
    offsets, pieces = np.zeros(len(chunks), dtype=np.int64), np.zeros(len(chunks), dtype=np.int64)
    size = len(held.starts) - 1
    bounds = np.searchsorted(ranks[in_file], np.arange(size + 1))
    offsets[in_file], pieces[in_file], more = place_all(nbytes[in_file], bounds, piece_nbytes)
    if piece_nbytes is None:
        pieces[:], more = 0, np.zeros(size, dtype=np.int64)
    pieces[frozen] = more[ranks[frozen]]
    more[np.bincount(ranks, minlength=size) == 0] = -1
    return Placed(ranks=ranks, numbers=numbers, frozen=frozen, offsets=offsets, nbytes=nbytes, pieces=pieces), more


def _archive_nbytes(held: Holdings, chunks: Chunks) -> Array:
    """Return the bytes of each chunk's archive."""
    found = np.zeros(len(chunks), dtype=np.int64)
    known: dict[tuple[int, torch.dtype], Array] = {}
    for name, pattern in enumerate(chunks.patterns):
        spec = held.specs[name]
        if pattern is None or spec is None:
            continue
        dtype = spec.properties.dtype
        key = id(pattern), dtype
        if key not in known:
            sizes, place = np.unique(pattern.sizes, axis=0, return_inverse=True)
            nbytes = [frame_tensor(dtype, tuple(size)).item_nbytes for size in sizes.tolist()]
            known[key] = np.array(nbytes, dtype=np.int64)[place.reshape(-1)]
        found[chunks.first[name] : chunks.first[name + 1]] = known[key]
    return found


def _plan_sharing(held: Holdings, chunks: Chunks, placed: Placed) -> SharingPlan:
    return plan_sharing(
        fqns=[held.names[name] for name in chunks.names.tolist()],
        starts=chunks.starts,
        ranks=held.ranks[chunks.order],
        numbers=held.numbers[chunks.order],
        writers=placed.ranks,
        nbytes=chunks.nbytes,
        size=len(held.starts) - 1,
    )
