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
from .._format.metadata_writer import build_metadata
from .._format.naming import data_file
from .._format.pickle_template import PickleTemplate, Placeholder
from ..errors import CaptureError, SaveError
from .plan import GlobalPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Where a frozen value lies in the data file, in bytes."""

    offset: int
    nbytes: int


class ManifestTemplate:
    """`.metadata` for all saves of the same plans: only ids, file names and the ranges of frozen values differ."""

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
        for part, rank in self._writers:
            share, file = plans[part].shares[rank], Placeholder(len(used), text=True)
            used.append(file)
            for item, frame, offset in zip(share.staged, share.layout.frames, share.layout.offsets, strict=True):
                stored[item.index] = StorageInfo(file.stand_in, offset, frame.item_nbytes)  # type: ignore[arg-type]
        for file, (part, rank) in zip(used[2:], self._writers, strict=True):
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

    def render(self, checkpoint_id: str, save_id: str, frozen: Sequence[Sequence[Sequence[ByteRange]]]) -> bytes:
        """Return `.metadata`'s content for one save, given the ranges of frozen values, by plan and by rank."""
        files = [data_file(rank, save_id, part) for part, rank in self._writers]
        items = [item for part, rank in self._writers for item in frozen[part][rank]]
        numbers = [number for item in items for number in (item.offset, item.nbytes)]
        return self._template.render([checkpoint_id, save_id, *files, *numbers])

    def in_order_of_files(self, save_id: str, numbers: Sequence[Sequence[int]]) -> list[int]:
        """Return numbers, given by plan and by rank, in the order of the names of the data files that they are of."""
        named = sorted((data_file(rank, save_id, part), numbers[part][rank]) for part, rank in self._writers)
        return [number for _, number in named]

    def files(self, save_id: str) -> set[str]:
        """Return the names of all data files of a save."""
        return {data_file(rank, save_id, part) for part, rank in self._writers}


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
