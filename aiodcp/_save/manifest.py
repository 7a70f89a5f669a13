"""`.metadata` as a template for all saves of one plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from .._format.layout import Layout
from .._format.metadata_writer import build_metadata
from .._format.naming import data_file, piece_file
from .._format.outline import encode_outline
from .._format.pickle_template import PickleTemplate, Placeholder
from .._format.seal import in_pieces
from ..errors import CaptureError, SaveError
from .plan import GlobalPlan, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Where a frozen value lies in the data file, in bytes."""

    offset: int
    nbytes: int


class ManifestTemplate:
    """`.metadata` for all saves of the same plans: only ids, file names and the ranges of frozen values differ.

    Attributes:
        outline: of all of them, as it is stored.
    """

    def __init__(self, *plans: GlobalPlan) -> None:
        """Make the template for one state's plan, or of several states' that are committed together, in their order.

        Raises:
            CaptureError: two of them have a value of the same name.
        """
        checkpoint_id, save_id = Placeholder(0, text=True), Placeholder(1, text=True)
        used = [checkpoint_id, save_id]
        stored: dict[MetadataIndex, StorageInfo] = {}
        opaque: list[str] = []
        self._writers = [
            (part, rank)
            for part, plan in enumerate(plans)
            for rank, share in enumerate(plan.shares)
            if share.staged or share.frozen
        ]
        self._pieces = [plans[part].shares[rank].layout.pieces for part, rank in self._writers]
        files: list[Placeholder] = []  # the last of each rank's, which has its frozen values
        for (part, rank), pieces in zip(self._writers, self._pieces, strict=True):
            own = [Placeholder(len(used) + number, text=True) for number in range(pieces + 1)]
            used += own
            files.append(own[-1])
            _store_tensors(stored, plans[part].shares[rank], own)
        for file, (part, rank) in zip(files, self._writers, strict=True):
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
        self._template = PickleTemplate(metadata, used)
        self.outline: bytes = in_pieces(encode_outline(metadata))

    def render(self, checkpoint_id: str, save_id: str, frozen: Sequence[Sequence[Sequence[ByteRange]]]) -> bytes:
        """Return `.metadata`'s content for one save, given the ranges of frozen values, by plan and by rank."""
        files = self._files(save_id)
        items = [item for part, rank in self._writers for item in frozen[part][rank]]
        numbers = [number for item in items for number in (item.offset, item.nbytes)]
        return self._template.render([checkpoint_id, save_id, *files, *numbers])

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
