"""Small tensors as columns: each stored whole, in this library's framing, and wanted in one stretch of memory.

Of those a model has thousands, and what a load does for each decides how long it takes: here that is one checksum and
one copy, and all else is done for all of them at once. To a device they cross with what lies between them, and are
taken apart there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .._engine.device_copies import DeviceCopies
from .._engine.device_gather import GatherBuffer, TakenPart
from .._engine.gil_fairness import AT_ONCE
from .._engine.host_memory import Arena
from .._engine.threads import SHORT_NBYTES, Threads, in_thread_if_long
from .._format.alignment import ALIGNMENT
from .._format.archive_writer import Frame, frame_tensor
from .._format.arrays import Array
from .._format.checksum import Checksum
from .._format.dcp import Metadata
from .._format.extension import opaque_names
from .._format.indexed_metadata import IndexedMetadata, IndexedTensor
from .._format.item_tables import ItemCrcs
from .._state.capture import SHORT
from .._state.plain_tensors import PLAIN_TENSORS, QUANTIZED
from ..errors import LoadError
from .coalesce import DIRECT_NBYTES, GAP_NBYTES, SPAN_NBYTES, gap_within
from .decode import ItemDecoder
from .plan import TensorRead

_copy = ctypes.PyDLL(None).memmove  # holds the GIL: to let go of it would take longer than what is copied
_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy.restype = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """Small tensors: the names under which they are wanted and stored, where they go, and which kind each is of."""

    fqns: list[str]
    sources: list[str]
    into: list[torch.Tensor]
    kinds: list[int]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tensors that are stored alike: `kind` is the number of the frame around them."""

    dtype: torch.dtype
    size: torch.Size
    kind: int
    is_complex: bool


class SmallChooser:
    """Chooses, of all that a load wants, the small tensors."""

    def __init__(self, metadata: Metadata, device: torch.device | None = None) -> None:
        """Choose from what a checkpoint has, for tensors in host memory, and on a device if there is exactly one."""
        self._metadata = metadata
        self._device = device
        self._opaque = opaque_names(metadata)
        self._frames: list[Frame] = []
        self._alike: dict[int, _Alike | None] = {}  # by what is stored, which values that are alike have in common

    def choose(
        self, fqns: Sequence[str], sources: Sequence[str | None], values: Sequence[Any]
    ) -> tuple[SmallReads | None, list[int]]:
        """Choose the small tensors that are wanted as they are stored.

        Returns:
            What is read of them, if there are any; and the numbers of all others, but for what has no source.
        """
        entries, alike, opaque = self._metadata.state_dict_metadata, self._alike, self._opaque
        chosen: list[int] = []
        kinds: list[int] = []
        others: list[int] = []
        plain, strided, unknown, device = PLAIN_TENSORS, torch.strided, self._find_alike, self._device
        for number, (source, value) in enumerate(zip(sources, values, strict=True)):
            if source is None:
                continue
            if type(value) in plain:
                entry = entries[source]
                known = alike[id(entry)] if id(entry) in alike else unknown(entry)
                if (
                    known is not None
                    and value.dtype is known.dtype
                    and value.layout is strided
                    and (value.is_cpu or value.device == device)
                    and value.shape == known.size
                    and value.is_contiguous()
                    and value.data_ptr()
                    and not (value.is_inference() or value.is_neg() or (known.is_complex and value.is_conj()))
                    and source not in opaque
                ):
                    chosen.append(number)
                    kinds.append(known.kind)
                    continue
            others.append(number)
        if not chosen:
            return None, others
        assert isinstance(self._metadata, IndexedMetadata)
        columns = fqns, sources, values
        if len(chosen) < len(fqns):
            wanted, stored, into = ([*map(each.__getitem__, chosen)] for each in columns)
        else:
            wanted, stored, into = map(list, columns)
        return SmallReads(self._metadata, Chosen(wanted, stored, into, kinds), self._frames), others

    def _find_alike(self, entry: object) -> _Alike | None:
        known: _Alike | None = None
        if type(entry) is IndexedTensor and entry.is_whole and entry.properties.layout is torch.strided:
            dtype = entry.properties.dtype
            frame = frame_tensor(dtype, tuple(entry.size)) if dtype not in QUANTIZED else None
            if frame is not None and 0 < frame.nbytes < DIRECT_NBYTES:
                known = _Alike(dtype, entry.size, len(self._frames), dtype.is_complex)
                self._frames.append(frame)
        self._alike[id(entry)] = known
        return known


class SmallReads:
    """What is read, one entry a tensor.

    Attributes:
        fqns: the tensors.
        into: where they go.
        file_names: of the files.
        files: which file each lies in, [tensors].
        starts: bytes, where in that its item begins, [tensors].
        nbytes: of the item, [tensors].
        payloads: where in the item its elements begin, their bytes, and where their CRC32 stands, [tensors, 3].
        crcs: what the files' tables say of the items, once that is known; -1 where they say nothing, [tensors].
    """

    def __init__(self, metadata: IndexedMetadata, chosen: Chosen, frames: Sequence[Frame]) -> None:
        """Find the items.

        Args:
            metadata: says where they are.
            chosen: which.
            frames: that there are around them.
        """
        rows, places = metadata.rows_of(chosen.sources), metadata.places
        self.fqns: list[str] = chosen.fqns
        self.into: list[torch.Tensor] = chosen.into
        self.file_names: list[str] = metadata.file_names
        self.files: Array = places.files.at(rows)
        self.starts: Array = places.starts.at(rows)
        self.nbytes: Array = places.nbytes.at(rows)
        self._buffer: GatherBuffer | None = None
        self._buffer_nbytes = 0
        self._taking = threading.Lock()
        self._frames = frames
        self._kinds: Array = np.array(chosen.kinds, dtype=np.int64)
        kinds = [(len(each.header), each.nbytes, each.header_crc, each.item_nbytes) for each in frames]
        *payload, self._expected = np.array(kinds, dtype=np.int64)[self._kinds].T
        self.payloads: Array = np.stack(payload, axis=1)
        self.crcs: Array = np.full(len(rows), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.fqns)

    def used_files(self) -> dict[str, str]:
        """Return the files, each with the name of a tensor in it."""
        files, first = np.unique(self.files, return_index=True)
        return {
            self.file_names[file]: self.fqns[number]
            for file, number in zip(files.tolist(), first.tolist(), strict=True)
        }

    def find_misplaced(self, file_nbytes: Mapping[str, int]) -> tuple[int, str] | None:
        """Return the number of an item that cannot be where the metadata says, and why; None if there is none."""
        for file in np.unique(self.files).tolist():
            length = file_nbytes[self.file_names[file]]
            beyond = np.flatnonzero((self.files == file) & (self.starts + self.nbytes > length))
            if len(beyond):
                number = int(beyond[0])
                stop = int(self.starts[number] + self.nbytes[number])
                return number, f"truncated: {length} bytes, the value ends at {stop}"
        odd = np.flatnonzero(self.starts % ALIGNMENT)
        if len(odd):
            number = int(odd[0])
            return number, f"begins at byte {int(self.starts[number])}, where no value of this framing does"
        odd = np.flatnonzero(self.nbytes != self._expected)
        if len(odd):
            number = int(odd[0])
            into = self.into[number]
            stored = int(self.nbytes[number])
            return number, f"is stored as {stored} bytes, not the size of {into.dtype} {tuple(into.shape)}"
        return None

    def take_crcs(self, tables: Mapping[str, ItemCrcs]) -> None:
        """Take the CRC32s from the files' tables."""
        for file in np.unique(self.files).tolist():
            table = tables.get(self.file_names[file])
            if table is not None:
                chosen = self.files == file
                self.crcs[chosen] = table.of(self.starts[chosen])

    def spans(self, gap_nbytes: int) -> Iterator[SmallSpan]:
        """Group what lies close together, as `coalesce_reads` does."""
        order = np.lexsort((self.starts, self.files))
        files, starts = self.files[order], self.starts[order]
        stops = starts + self.nbytes[order]
        apart = (files[1:] != files[:-1]) | (starts[1:] - stops[:-1] > GAP_NBYTES)
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]
        first = 0
        for begin, end in pairwise(bounds):
            if begin > first:  # what lies before may be close enough yet
                gap = int(starts[begin] - stops[begin - 1])
                if files[begin] != files[begin - 1] or gap > gap_within(
                    int(stops[begin - 1] - starts[first]), gap_nbytes
                ):
                    yield self._span(order[first:begin])
                    first = begin
            while int(stops[end - 1] - starts[first]) > SPAN_NBYTES:
                last = int(np.searchsorted(stops[first:end], starts[first] + SPAN_NBYTES, side="right"))
                yield self._span(order[first : first + max(last, 1)])
                first += max(last, 1)
        if first < len(order):
            yield self._span(order[first:])

    def _span(self, numbers: Array) -> SmallSpan:
        first, last = int(numbers[0]), int(numbers[-1])
        return SmallSpan(
            reads=self,
            file=self.file_names[int(self.files[first])],
            start=int(self.starts[first]),
            stop=int(self.starts[last] + self.nbytes[last]),
            numbers=numbers,
        )

    def buffer(self, nbytes: int, device_copies: DeviceCopies) -> GatherBuffer:
        """Return memory on the device for a span. All spans use it: one after the other, on one stream."""
        with self._taking:
            if self._buffer is None or nbytes > self._buffer_nbytes:
                self._buffer, self._buffer_nbytes = device_copies.gather_buffer(nbytes), nbytes
            return self._buffer

    def overlaps(self, tensor: torch.Tensor) -> bool:
        """Whether some of what is filled shares memory with a tensor."""
        start = tensor.data_ptr()
        if not start or not len(self):
            return False
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + tensor.itemsize * (1 + steps)
        addresses = np.fromiter(map(torch.Tensor.data_ptr, self.into), dtype=np.int64, count=len(self))
        return bool(((addresses < stop) & (addresses + self.payloads[:, 1] > start)).any())

    def as_reads(self) -> list[TensorRead]:
        """Return the same, an object for each."""
        columns = (each.tolist() for each in (self._kinds, self.files, self.starts, self.nbytes, self.crcs))
        return [
            TensorRead(
                fqn,
                self.file_names[file],
                start,
                nbytes,
                into.dtype,
                into.shape,
                self._frames[kind],
                None,
                into,
                bare=False,
                crc=crc if crc >= 0 else None,
            )
            for fqn, into, kind, file, start, nbytes, crc in zip(self.fqns, self.into, *columns, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallSpan:
    """Neighbouring items of one file, read together: bytes `start` to `stop`.

    Attributes:
        reads: what they belong to.
        numbers: which of those they are, in their order in the file.
    """

    reads: SmallReads
    file: str
    start: int
    stop: int
    numbers: Array

    async def fill_by(self, threads: Threads, arena: Arena, decoder: ItemDecoder, device_copies: DeviceCopies) -> None:
        """Do what `fill` does: in a thread, unless that takes no longer than to ask one to."""
        is_short = len(self.numbers) <= SHORT and self.stop - self.start <= SHORT_NBYTES and not device_copies
        await in_thread_if_long(is_short, threads.compute, self.fill, arena, decoder, device_copies)

    def fill(self, arena: Arena, decoder: ItemDecoder, device_copies: DeviceCopies) -> None:
        """Check the items, which have been read into `arena`, and copy them to their places.

        Raises:
            CorruptError: they are not what was saved.
        """
        reads, numbers = self.reads, self.numbers
        begins = reads.starts[numbers] - self.start
        headers, lengths, crc_places = reads.payloads[numbers].T
        payloads = begins + headers
        if decoder.crc32 is not None:
            self._check(arena.memory, payloads, lengths, begins + crc_places, decoder, decoder.crc32)
        targets = [reads.into[number] for number in numbers.tolist()]
        for first in range(0, len(targets), AT_ONCE):
            torch.autograd.graph.increment_version(targets[first : first + AT_ONCE])
        if device_copies:
            targets, payloads, lengths = self._send(arena, targets, payloads, lengths, device_copies)
        for into, source, nbytes in zip(targets, (payloads + arena.address).tolist(), lengths.tolist(), strict=True):
            address = into.data_ptr()  # as it is now: the caller may have moved it
            if not address:
                name = next(fqn for fqn, each in zip(reads.fqns, reads.into, strict=True) if each is into)
                raise LoadError(f"{name}: its memory was freed while it was loaded")
            _copy(address, source, nbytes)

    def _check(
        self,
        memory: memoryview,
        payloads: Array,
        lengths: Array,
        crc_places: Array,
        decoder: ItemDecoder,
        crc32: Checksum,
    ) -> None:
        reads, numbers = self.reads, self.numbers
        stops = (payloads + lengths).tolist()
        found = np.array([crc32(memory[start:stop], 0) for start, stop in zip(payloads.tolist(), stops, strict=True)])
        bytes_of_crcs = np.frombuffer(memory, dtype=np.uint8)[crc_places[:, None] + np.arange(4)].astype(np.int64)
        stored, crcs = bytes_of_crcs @ (1 << np.arange(0, 32, 8)), reads.crcs[numbers]
        wrong = np.flatnonzero((found != stored) | ((crcs >= 0) & (crcs != found)))
        if len(wrong):
            place = int(wrong[0])
            number, crc = int(numbers[place]), int(crcs[place])
            known = crc if crc >= 0 else None
            decoder.compare(reads.fqns[number], self.file, int(found[place]), int(stored[place]), known)

    def _send(
        self, arena: Arena, targets: list[torch.Tensor], payloads: Array, lengths: Array, device_copies: DeviceCopies
    ) -> tuple[list[torch.Tensor], Array, Array]:
        """Bring what goes to the device there; return the rest."""
        where = np.fromiter(map(torch.Tensor.get_device, targets), dtype=np.int64, count=len(targets))
        sent, here = np.flatnonzero(where >= 0), np.flatnonzero(where < 0)
        if len(sent):
            parts = TakenPart.of([targets[place] for place in sent.tolist()], payloads[sent].tolist())
            whole = arena.tensor[: self.stop - self.start]
            try:
                buffer = self.reads.buffer(whole.nbytes, device_copies)
                device_copies.wait_for(device_copies.take_apart(whole, parts, buffer))
            except BaseException:
                device_copies.drain(arena, targets)
                raise
        return [targets[place] for place in here.tolist()], payloads[here], lengths[here]
