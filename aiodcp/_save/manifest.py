"""`.metadata` as a template for all saves of one plan."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from .._format.arrays import Array
from .._format.dcp import (
    STORAGE_TYPES,
    KeyPath,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorStorageMetadata,
)
from .._format.extension import Containers
from .._format.index_columns import ChunkPlaces, encode_columns, encode_save
from .._format.layout import Layout
from .._format.metadata_opcodes import ChunkLines, TensorKind, write_metadata
from .._format.metadata_writer import build_metadata
from .._format.naming import data_file, piece_file
from .._format.outline import encode_kinds, encode_outline
from .._format.pickle_template import MetadataTemplate, PickleTemplate, Placeholder
from .._format.runs import Runs
from .._format.seal import in_pieces
from ..errors import CaptureError, SaveError
from .plan import GlobalPlan, Share
from .table_plan import TablePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Where a frozen value lies in the data file, in bytes."""

    offset: int
    nbytes: int


class ManifestTemplate:
    """`.metadata` for all saves of the same plans: only ids, file names and the ranges of frozen values differ."""

    def __init__(
        self,
        template: MetadataTemplate | PickleTemplate,
        index: bytes,
        writers: Sequence[tuple[int, int]],
        pieces: Sequence[int],
    ) -> None:
        """Begin.

        Args:
            template: its fields are the checkpoint's id, the save's, the names of all files, and the ranges of frozen
                values: offset and bytes; these and the names writer by writer.
            index: what all saves have behind the pickle.
            writers: who writes a file: which of the plans, and which rank.
            pieces: of each, how many files it writes besides the last.
        """
        self._template = template
        self._writers = writers
        self._pieces = pieces
        self._index = index

    def render(self, checkpoint_id: str, save_id: str, frozen: Sequence[Sequence[Sequence[ByteRange]]]) -> bytes:
        """Return `.metadata`'s content for one save, given the ranges of frozen values, by plan and by rank."""
        files = self._files(save_id)
        items = [item for part, rank in self._writers for item in frozen[part][rank]]
        numbers = [number for item in items for number in (item.offset, item.nbytes)]
        return self._template.render([checkpoint_id, save_id, *files, *numbers])

    def index(self, save_id: str, frozen: Sequence[Sequence[Sequence[ByteRange]]]) -> bytes:
        """Return what stands behind the pickle, given the same as `render`."""
        if isinstance(self._template, PickleTemplate):  # the planner's objects have no columns
            return in_pieces(self._index)
        items = [item for part, rank in self._writers for item in frozen[part][rank]]
        return in_pieces(self._index + encode_save(save_id, [(item.offset, item.nbytes) for item in items]))

    def in_order_of_files(self, save_id: str, numbers: Sequence[Sequence[int]]) -> list[int]:
        """Return numbers, given by plan and by rank, in the order of the names of the data files that they are of."""
        named = sorted((data_file(rank, save_id, part), numbers[part][rank]) for part, rank in self._writers)
        return [number for _, number in named]

    def table_files(self, save_id: str) -> list[str]:
        """Return the names of the data files that have tables, in the order of `in_order_of_files`."""
        return sorted(data_file(rank, save_id, part) for part, rank in self._writers)

    def files(self, save_id: str) -> set[str]:
        """Return the names of all data files of a save."""
        return set(self._files(save_id))

    def _files(self, save_id: str) -> list[str]:
        """Return their names, rank by rank; of each rank first the pieces of its data file, if it has any."""
        writers = zip(self._writers, self._pieces, strict=True)
        return [name for (part, rank), pieces in writers for name in _names(data_file(rank, save_id, part), pieces)]


def make_manifest(plans: Sequence[GlobalPlan | TablePlan]) -> ManifestTemplate:
    """Return the template for one state's plan, or of several states' that are committed together, in their order.

    Raises:
        CaptureError: two of them have a value of the same name.
    """
    tables = [plan for plan in plans if isinstance(plan, TablePlan)]
    return _of_tables(tables) if tables else _of_planners([plan for plan in plans if isinstance(plan, GlobalPlan)])


def _of_tables(plans: Sequence[TablePlan]) -> ManifestTemplate:
    writers = [(part, rank) for part, plan in enumerate(plans) for rank in np.flatnonzero(plan.pieces >= 0).tolist()]
    pieces = [int(plans[part].pieces[rank]) for part, rank in writers]
    first_field = 2 + np.cumsum([0, *(each + 1 for each in pieces)])
    next_field = int(first_field[-1])
    names: list[str] = []
    kinds: list[TensorKind | None] = []
    counts: list[Array] = []
    files: list[Array] = []
    fields: dict[int, tuple[int, int]] = {}
    paths: dict[str, KeyPath] = {}
    containers = Containers()
    chunks = 0
    for part, plan in enumerate(plans):
        first = np.zeros(len(plan.pieces), dtype=np.int64)  # by rank, the number of its first file
        for (of_part, rank), field in zip(writers, first_field.tolist(), strict=False):
            if of_part == part:
                first[rank] = field - 2
        in_tail, next_field = _frozen_fields(plan, next_field)
        fields |= {chunks + chunk: each for chunk, each in in_tail.items()}
        files.append(first[plan.placed.ranks] + plan.placed.pieces)
        counts.append(np.diff(plan.chunks.first))
        names += compress(plan.held.names, counts[-1].tolist())  # those that have chunks
        kinds += _kinds_of(plan, counts[-1])
        if twice := paths.keys() & plan.paths.keys():
            raise CaptureError(min(twice), "two participants have a value of this name")
        paths.update(plan.paths)
        containers.empty += plan.containers.empty
        containers.int_keys += plan.containers.int_keys
        chunks += len(plan.chunks)
    each_count = np.concatenate(counts)
    lines = ChunkLines(
        names=names,
        kinds=kinds,
        first=np.cumsum([0, *each_count[each_count > 0].tolist()]),
        files=np.concatenate(files),
        starts=np.concatenate([plan.placed.offsets for plan in plans]),
        nbytes=np.concatenate([plan.placed.nbytes for plan in plans]),
        fields=fields,
    )
    assert int(lines.first[-1]) == len(lines.files) == chunks, "the lines are in the order of the chunks"
    in_tail_of = np.searchsorted(lines.first, np.array(sorted(fields), dtype=np.int64), side="right") - 1
    opaque = [names[name] for name in dict.fromkeys(in_tail_of.tolist()) if kinds[name] is not None]
    template = write_metadata(lines, paths, range(2, int(first_field[-1])), 0, 1, opaque, containers)
    numbered = [(part, rank, more) for (part, rank), more in zip(writers, pieces, strict=True)]
    places = _places_of(lines, numbered)
    facts = (None if kind is None else (kind.properties, kind.size) for kind in kinds)
    index = encode_kinds(names, facts) + encode_columns(places, names, paths, opaque, containers)
    return ManifestTemplate(template, index, writers, pieces)


def _kinds_of(plan: TablePlan, counts: Array) -> Iterator[TensorKind | None]:
    """Yield what the values of a plan are that have chunks, in the order of their names."""
    known: dict[tuple[int, int], TensorKind] = {}
    for spec, pattern, count in zip(plan.held.specs, plan.chunks.patterns, counts.tolist(), strict=True):
        if not count:
            continue
        if spec is None or pattern is None:
            yield None
            continue
        key = id(spec), id(pattern)
        if key not in known:
            known[key] = TensorKind(
                properties=spec.properties,
                size=spec.size,
                offsets=pattern.offsets,
                sizes=pattern.sizes,
                pattern=id(pattern),
            )
        yield known[key]


def _places_of(lines: ChunkLines, writers: Sequence[tuple[int, int, int]]) -> ChunkPlaces:
    """Return where all chunks lie, given of each writer which state and rank it is, and how many pieces it has."""
    cuts: dict[Hashable, int] = {}
    distinct: list[tuple[Array, Array]] = []
    cut_of = {id(None): -1}
    patterns = []
    for kind in lines.kinds:
        if id(kind) not in cut_of:
            assert kind is not None
            if kind.pattern not in cuts:
                cuts[kind.pattern] = len(distinct)
                distinct.append((kind.offsets, kind.sizes))
            cut_of[id(kind)] = cuts[kind.pattern]
        patterns.append(cut_of[id(kind)])
    named = [(part, rank, piece if piece < more else -1) for part, rank, more in writers for piece in range(more + 1)]
    return ChunkPlaces(
        counts=np.diff(lines.first),
        patterns=np.array(patterns, dtype=np.int64),
        cuts=distinct,
        files=Runs.of(lines.files),
        starts=Runs.of(lines.starts),
        nbytes=Runs.of(lines.nbytes),
        frozen=np.array(sorted(lines.fields, key=lines.fields.__getitem__), dtype=np.int64),
        file_parts=np.array(named, dtype=np.int64).reshape(-1, 3),
    )


def _frozen_fields(plan: TablePlan, first: int) -> tuple[dict[int, tuple[int, int]], int]:
    """Return of each chunk that is frozen the fields that say where it lies, from the first one on; and the next."""
    placed = plan.placed
    [frozen] = np.nonzero(placed.frozen)
    in_order = frozen[np.lexsort((placed.numbers[frozen], placed.ranks[frozen]))].tolist()
    found = {chunk: (first + 2 * number, first + 2 * number + 1) for number, chunk in enumerate(in_order)}
    return found, first + 2 * len(in_order)


def _of_planners(plans: Sequence[GlobalPlan]) -> ManifestTemplate:
    """Do it for plans that the caller's own planner has made."""
    checkpoint_id, save_id = Placeholder(0, text=True), Placeholder(1, text=True)
    used = [checkpoint_id, save_id]
    stored: dict[MetadataIndex, StorageInfo] = {}
    opaque: list[str] = []
    writers = [
        (part, rank)
        for part, plan in enumerate(plans)
        for rank, share in enumerate(plan.shares)
        if share.staged or share.frozen
    ]
    all_pieces = [plans[part].shares[rank].layout.pieces for part, rank in writers]
    files: list[Placeholder] = []  # the last of each rank's, which has its frozen values
    for (part, rank), pieces in zip(writers, all_pieces, strict=True):
        own = [Placeholder(len(used) + number, text=True) for number in range(pieces + 1)]
        used += own
        files.append(own[-1])
        _store_tensors(stored, plans[part].shares[rank], own)
    for file, (part, rank) in zip(files, writers, strict=True):
        share = plans[part].shares[rank]
        for item in share.frozen:
            offset_field, nbytes_field = Placeholder(len(used)), Placeholder(len(used) + 1)
            used += [offset_field, nbytes_field]
            stored[item.index] = StorageInfo(
                file.stand_in,  # type: ignore[arg-type]
                offset_field.stand_in,  # type: ignore[arg-type]
                nbytes_field.stand_in,  # type: ignore[arg-type]
            )
        opaque += [item.index.fqn for item in share.frozen if item.tensor_data is not None]
    meta = StorageMeta(checkpoint_id.stand_in, save_id.stand_in)  # type: ignore[arg-type]
    containers = Containers()
    for plan in plans:
        containers.empty += plan.containers.empty
        containers.int_keys += plan.containers.int_keys
    metadata = build_metadata(*_join(plans), stored, meta, opaque, containers)
    _check_complete(metadata)
    return ManifestTemplate(PickleTemplate(metadata, used), encode_outline(metadata), writers, all_pieces)


def names_of(file: str, layout: Layout) -> list[str]:
    """Return the names of the files that a rank's data file is stored as."""
    return _names(file, layout.pieces)


def _names(file: str, pieces: int) -> list[str]:
    return [*(piece_file(file, number) for number in range(pieces)), file]


def _store_tensors(stored: dict[MetadataIndex, StorageInfo], share: Share, files: Sequence[Placeholder]) -> None:
    """Note where a rank's tensors lie, in its pieces, or else in its one file."""
    layout = share.layout
    for number, segment in enumerate(layout.segments):
        file, start = (files[number], segment.start) if layout.in_pieces else (files[-1], 0)
        for record in range(segment.first, segment.stop_record):
            offset, nbytes = layout.offsets[record] - start, layout.frames[record].item_nbytes
            stored[share.staged[record].index] = StorageInfo(file.stand_in, offset, nbytes)  # type: ignore[arg-type]


def _join(plans: Sequence[GlobalPlan]) -> tuple[Metadata, dict[str, KeyPath] | None]:
    """Return names, shapes and chunks of all plans, and the keys that lead to them."""
    if len(plans) == 1:
        return plans[0].metadata, plans[0].paths
    entries: dict[str, STORAGE_TYPES] = {}
    paths: dict[str, KeyPath] = {}
    for plan in plans:
        for fqn, entry in plan.metadata.state_dict_metadata.items():
            if entries.setdefault(fqn, entry) is not entry:
                raise CaptureError(fqn, "two participants have a value of this name")
        paths.update(plan.paths or {})
    return Metadata(entries), paths


def _check_complete(metadata: Metadata) -> None:
    """Refuse to commit a checkpoint of which a chunk is not written."""
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        for offset in offsets:
            if MetadataIndex(fqn, offset) not in metadata.storage_data:
                raise SaveError(f"{fqn}: planned, but no rank writes its chunk at {offset}")
