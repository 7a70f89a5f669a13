"""What `.metadata` says, as columns behind its pickle: a rank finds its own pieces without a single object a chunk.

The outline that stands there in any case has the names, dtypes and shapes. Behind it come the keys that lead to the
values, how tensors are cut into chunks (many alike), and for each chunk its file, its place there and its bytes. All
but the id of the save and the places of frozen values is the same for all saves of one plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import Array
from .dcp import KeyPath
from .extension import Containers
from .naming import data_file, piece_file
from .runs import Runs, pack_runs, read_runs
from .sections import SectionReader, pack_column, pack_section

_SAVE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlaces:
    """Where chunks, and values that are no tensors, lie: one after the other, in the order of their names.

    Attributes:
        counts: by name, how many there are.
        patterns: by name, which of `cuts` it has; -1 for a value that is no tensor.
        cuts: offsets and sizes of the chunks of tensors that are cut alike, a row each.
        files: by chunk, which file it lies in.
        starts: bytes, where in the file; of what is frozen 0.
        nbytes: of its archive; likewise.
        frozen: which of them lie in a tail, in the order in which each save says where.
        file_parts: by file: the state it is of, the rank that writes it, and its number if it is a piece, else -1.
    """

    counts: Array
    patterns: Array
    cuts: Sequence[tuple[Array, Array]]
    files: Runs
    starts: Runs
    nbytes: Runs
    frozen: Array
    file_parts: Array


def encode_columns(
    places: ChunkPlaces,
    names: Sequence[str],
    paths: Mapping[str, KeyPath],
    opaque: Sequence[str],
    containers: Containers,
) -> bytes:
    """Return what is the same for all saves, but for the outline.

    Args:
        places: see there.
        names: of all values that are stored.
        paths: keys that lead to values, by name; of what is not stored, too.
        opaque, containers: see `build_metadata`.
    """
    splits = [_split_of(name, paths.get(name)) for name in names]
    by_names = {name for name, split in zip(names, splits, strict=True) if split >= 0}
    header = {
        "paths": [[name, path] for name, path in paths.items() if name not in by_names],
        "opaque": list(opaque),
        "empty": containers.empty,
        "int_keys": containers.int_keys,
        "cuts": [list(offsets.shape) for offsets, _ in places.cuts],
        "chunks": len(places.files),
        "frozen": len(places.frozen),
        "files": len(places.file_parts),
    }
    columns = [places.frozen, places.file_parts.T.reshape(-1)]
    columns += [each.T.reshape(-1) for cut in places.cuts for each in cut]
    sections = [pack_section(json.dumps(header, separators=(",", ":")).encode())]
    sections += map(pack_column, (np.array(splits, dtype=np.int64), places.counts, places.patterns))
    sections += map(pack_runs, (places.files, places.starts, places.nbytes))
    return b"".join([*sections, *map(pack_column, columns)])


LARGEST = 1 << 62  # of a file, bytes

MOST_STEPS = 64  # of a path that its name tells


def _split_of(name: str, path: KeyPath | None) -> int:
    """Return where to split a name, for its path to come of it; -1 if it does not: see `path_of`."""
    if path is None or not 0 < len(path) < MOST_STEPS:
        return -1
    if len(path) == 1:
        return 0 if path[0] == name else -1
    with_dots = [place for place, step in enumerate(path) if type(step) is not str or "." in step]
    first = with_dots[0] if with_dots else len(path) - 1
    split = first + MOST_STEPS * (len(path) - 1 - first)
    return split if path_of(name, split) == path else -1


def path_of(name: str, split: int) -> KeyPath:
    """Return the steps that lead to a value: of its name some from the left, some from the right, and what is between.

    Args:
        name: of the value, its steps joined by dots.
        split: how many from the left, and 64 times how many from the right.
    """
    right, left = divmod(split, MOST_STEPS)
    steps = name.split(".", left)
    return (*steps[:-1], *steps[-1].rsplit(".", right)) if right else tuple(steps)


def encode_save(save_id: str, frozen: Iterable[tuple[int, int]]) -> bytes:
    """Return what one save adds: its id, and where its frozen values lie."""
    flat = [number for each in frozen for number in each]
    return save_id.encode() + np.array(flat, dtype="<i8").tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What stands behind an outline.

    Attributes:
        places: where the chunks lie, of this save.
        splits: by name, how its path comes of it (see `path_of`); -1 where it does not.
        paths: of these, and of what is not stored.
        opaque, containers: see `build_metadata`.
        file_names: of all files.
    """

    places: ChunkPlaces
    splits: Array
    paths: dict[str, KeyPath]
    opaque: list[str]
    containers: Containers
    file_names: list[str] = field(default_factory=list)


def decode_columns(text: bytes, names: int) -> Columns:
    """Return what `encode_columns` and `encode_save` have made bytes of, one behind the other.

    Args:
        text: the bytes.
        names: how many names the outline has.

    Raises:
        ValueError, TypeError, LookupError, RecursionError, zlib.error: they are malformed.
    """
    reader = SectionReader(text)
    header: dict[str, Any] = json.loads(reader.section())
    chunks, frozen, named = header["chunks"], header["frozen"], header["files"]
    shapes = [(int(rows), int(dimensions)) for rows, dimensions in header["cuts"]]
    splits, counts, patterns = (reader.column(names) for _ in range(3))
    files, starts, nbytes = (read_runs(reader, chunks) for _ in range(3))
    in_tail = reader.column(frozen)
    file_parts = reader.column(3 * named).reshape(3, named).T
    cuts = [(reader.column(n * d).reshape(d, n).T, reader.column(n * d).reshape(d, n).T) for n, d in shapes]
    save_id, ranges = reader.rest(32), np.frombuffer(reader.rest(), dtype="<i8").reshape(-1, 2)
    _check(counts, patterns, files, in_tail, file_parts, cuts, len(ranges))
    if len(in_tail):
        starts, nbytes = starts.with_numbers(in_tail, ranges[:, 0]), nbytes.with_numbers(in_tail, ranges[:, 1])
    if not _are_below(splits + 1, MOST_STEPS**2 + 1):
        raise ValueError("a name that is split nowhere")
    if not _SAVE_ID.fullmatch(save_id.decode()) or not (starts.are_below(LARGEST) and nbytes.are_below(LARGEST)):
        raise ValueError("an id or a place that is none")
    return Columns(
        places=ChunkPlaces(
            counts=counts,
            patterns=patterns,
            cuts=cuts,
            files=files,
            starts=starts,
            nbytes=nbytes,
            frozen=in_tail,
            file_parts=file_parts,
        ),
        splits=splits,
        paths={str(name): tuple(path) for name, path in header["paths"]},
        opaque=[str(name) for name in header["opaque"]],
        containers=Containers([tuple(path) for path in header["empty"]], [tuple(path) for path in header["int_keys"]]),
        file_names=[_file_name(save_id.decode(), *parts) for parts in file_parts.tolist()],
    )


def _check(
    counts: Array,
    patterns: Array,
    files: Runs,
    in_tail: Array,
    file_parts: Array,
    cuts: Sequence[tuple[Array, Array]],
    ranges: int,
) -> None:
    """Check that the columns refer to nothing that is not there.

    Raises:
        ValueError: they do.
    """
    rows = np.array([*(len(offsets) for offsets, _ in cuts), 1], dtype=np.int64)  # the last for -1
    is_sound = (
        counts.min(initial=0) >= 0
        and int(counts.sum()) == len(files)
        and _are_below(patterns + 1, len(cuts) + 1)
        and np.array_equal(rows[patterns], counts)
        and files.are_below(len(file_parts))
        and _are_below(in_tail, len(files))
        and len(in_tail) == ranges
        and file_parts.min(initial=0) >= -1
        and all(each.min(initial=0) >= 0 for cut in cuts for each in cut)
    )
    if not is_sound:
        raise ValueError("columns that do not fit together")


def _are_below(numbers: Array, stop: int) -> bool:
    return bool(numbers.min(initial=0) >= 0 and numbers.max(initial=-1) < stop)


def _file_name(save_id: str, part: int, rank: int, piece: int) -> str:
    file = data_file(rank, save_id, part)
    return file if piece < 0 else piece_file(file, piece)
