"""In which way what a load reads gets from storage to its place. Pure."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from .._distributed.relay import Relay
from .._engine.gc_pause import gc_paused
from .._format.archive_reader import StoredTensor
from ..storage.base import ObjectLimits
from .coalesce import GAP_NBYTES, SPAN_NBYTES, ReadSpan, coalesce_reads, group_reads, overlapping, reads_direct
from .large_reads import LargeRead, in_windows
from .plan import TensorRead
from .small_reads import SmallReads


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """In which way each part of a tensor is read.

    Attributes:
        direct: straight into its place; with those that one request is for.
        spans: with its neighbours, by way of scratch memory.
        large: a window at a time, likewise.
        relay: to the ranks that do the same.
    """

    direct: list[list[TensorRead]]
    spans: list[ReadSpan]
    large: list[LargeRead]
    relay: Relay | None = None

    @classmethod
    def choose(
        cls,
        reads: Sequence[TensorRead],
        stored: dict[int, StoredTensor],
        limits: ObjectLimits | None,
        *,
        tied: Set[int] | None = None,
        small: SmallReads | None = None,
        relay: Relay | None = None,
    ) -> Routes:
        """Choose for some reads.

        Args:
            reads: which.
            stored: where the tensors of archives lie.
            limits: of the storage.
            tied: ids of reads whose memory others write too, if that is known.
            small: what else is read.
            relay: to the ranks that read the same; what is chosen then depends on the stored bytes alone.
        """
        gap_nbytes = limits.gap_nbytes if limits else GAP_NBYTES
        with gc_paused():
            direct = [read for read in reads if reads_direct(read)] if relay is None else []
            largest = [read for read in reads if read.nbytes > SPAN_NBYTES]
            if tied is None:
                tied = overlapping(reads) if direct or largest else set()
                if small is not None:
                    tied |= {id(read) for read in (*direct, *largest) if small.overlaps(read.into)}
            direct = [read for read in direct if id(read) not in tied]
            apart = set(map(id, direct))
            large = [
                found
                for read in largest
                if id(read) not in apart
                and id(read) not in tied
                and (found := in_windows(read, stored.get(id(read)))) is not None
            ]
            apart |= {id(each.read) for each in large}
            spans = coalesce_reads([read for read in reads if id(read) not in apart] if apart else reads, gap_nbytes)
            groups = [[read] for read in direct] if limits is None else group_reads(direct, gap_nbytes)
            if relay is not None:
                large.sort(key=lambda each: (each.read.file, each.read.offset, each.read.nbytes, str(each.read.dtype)))
            return cls(direct=groups, spans=spans, large=large, relay=relay)

    def fetches(self) -> list[tuple[str, int, int]]:
        """Return file, start and stop of what is fetched by way of the relay, in order."""
        windows = [(each.read.file, window.start, window.stop) for each in self.large for window in each.windows]
        return [(span.file, span.start, span.stop) for span in self.spans] + windows

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        return (
            sum(read.nbytes for group in self.direct for read in group)
            + sum(span.stop - span.start for span in self.spans)
            + sum(window.nbytes for each in self.large for window in each.windows)
        )
