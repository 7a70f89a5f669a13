"""What a save has staged, read before it is uploaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from types import TracebackType

import torch

from .._engine.milestone import Milestone
from .._format.chunks import cut
from .._save.plan import WritePlan
from .._save.snapshot_source import SnapshotSource
from .._save.staging import Staging

_around: ContextVar[tuple[SnapshotSource, ...]] = ContextVar("_around", default=())


class _OfThread(threading.local):
    """Of blocks that were entered without an event loop: a loop that is run for one call has a context of its own."""

    def __init__(self) -> None:
        self.around: tuple[SnapshotSource, ...] = ()


_of_thread = _OfThread()


def is_inside_snapshot_of(owner: object) -> bool:
    """Whether the caller is in the block of a snapshot of one of `owner`'s saves."""
    return any(source.owner is owner and source.is_held for source in (*_around.get(), *_of_thread.around))


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPart:
    """A part of a tensor, as this rank has staged it.

    Attributes:
        offsets, sizes: which elements of the whole, by dimension.
        tensor: those elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor


class Snapshot(Mapping[str, torch.Tensor]):
    """The tensors of a save that is staged, by name: views of the staging buffer.

    Of several ranks each has what it writes: of sharded tensors its parts, of replicated ones those that fell to it.
    Tensors that are not dense, such as quantized ones, are not there, nor are values of other kinds.

    The views are to be read only. They are inference tensors: torch raises where one is changed in place outside
    `torch.inference_mode`, though only after it has done it, to what is being uploaded.

    Attributes:
        checkpoint_id: where the save goes.
    """

    def __init__(self, checkpoint_id: str, plan: WritePlan, staging: Staging) -> None:
        self.checkpoint_id = checkpoint_id
        self._plan = plan
        self._staging: Staging | None = staging
        self._records: dict[str, list[int]] = {}
        for number, item in enumerate(plan.share.staged):
            self._records.setdefault(item.index.fqn, []).append(number)

    def __repr__(self) -> str:
        return f"<Snapshot of {self.checkpoint_id!r}, {len(self)} tensors>"

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __contains__(self, fqn: object) -> bool:
        return fqn in self._records

    def __getitem__(self, fqn: str) -> torch.Tensor:
        """Return a tensor; of a sharded one what this rank has of it, if that is one block of elements."""
        parts = self.parts(fqn)
        if len(parts) == 1:
            return parts[0].tensor
        # One that is stored in several pieces, since it is large, is put together again: a copy.
        first = tuple(map(min, zip(*(part.offsets for part in parts), strict=True)))
        ends = [tuple(o + s for o, s in zip(part.offsets, part.sizes, strict=True)) for part in parts]
        sizes = tuple(last - start for start, last in zip(first, map(max, zip(*ends, strict=True)), strict=True))
        if sum(prod(part.sizes) for part in parts) != prod(sizes):
            raise KeyError(f"{fqn} is {len(parts)} parts that are no block of elements: see Snapshot.parts")
        whole = parts[0].tensor.new_empty(sizes)
        for part in parts:
            place = torch.Size(o - f for o, f in zip(part.offsets, first, strict=True)), torch.Size(part.sizes)
            cut(whole, place).copy_(part.tensor)
        return whole

    def parts(self, fqn: str) -> list[SnapshotPart]:
        """Return what this rank has of a tensor, and which of its elements that is.

        Raises:
            KeyError: it has none of it, or the block is over.
        """
        if self._staging is None:
            raise KeyError(f"{fqn}: the block of this snapshot is over")
        found = []
        for number in self._records[fqn]:
            data = self._plan.share.staged[number].tensor_data
            assert data is not None
            sizes = tuple(data.chunk.sizes)
            tensor = _view(self._staging, number)
            found.append(SnapshotPart(offsets=tuple(data.chunk.offsets), sizes=sizes, tensor=tensor))
        return found

    def shape(self, fqn: str) -> torch.Size:
        """Return the shape of a whole tensor, of which this rank may have a part."""
        data = self._plan.share.staged[self._records[fqn][0]].tensor_data
        assert data is not None
        return torch.Size(data.size)

    def close(self) -> None:
        """Let go of the buffer."""
        self._staging = None


def _view(staging: Staging, number: int) -> torch.Tensor:
    frame, start = staging.layout.frames[number], staging.layout.offsets[number]
    first = (start + len(frame.header)) // frame.dtype.itemsize
    storage = staging.arena.tensor.untyped_storage()
    with torch.inference_mode():
        return torch.empty(0, dtype=frame.dtype).set_(storage, first, frame.shape, frame.strides)


class SnapshotBlock:
    """The block of `Checkpoint.snapshot()`."""

    def __init__(self, checkpoint_id: str, staged: Milestone, source: SnapshotSource) -> None:
        self._checkpoint_id = checkpoint_id
        self._staged = staged
        self._source = source
        self._snapshot: Snapshot | None = None

    async def __aenter__(self) -> Snapshot:
        self._source.hold()
        try:
            await self._staged
            return self._begin()
        except BaseException:
            self._source.release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __enter__(self) -> Snapshot:
        self._source.hold()
        try:
            self._staged.wait()
            snapshot = self._begin()
            _of_thread.around = (*_of_thread.around, self._source)
            return snapshot
        except BaseException:
            self._source.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _of_thread.around = tuple(each for each in _of_thread.around if each is not self._source)
        self._end()

    def _begin(self) -> Snapshot:
        self._snapshot = Snapshot(self._checkpoint_id, *self._source.staged())
        _around.set((*_around.get(), self._source))
        return self._snapshot

    def _end(self) -> None:
        assert self._snapshot is not None
        self._snapshot.close()
        _around.set(tuple(each for each in _around.get() if each is not self._source))
        self._source.release()
