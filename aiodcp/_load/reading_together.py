"""One load's reads that several ranks have in common: which they are, and the relays over which they go."""

from __future__ import annotations

from contextlib import AsyncExitStack

from .._distributed.operation import Operation
from .._distributed.votes import Row
from .._engine.threads import Threads, in_thread
from .._format.archive_reader import StoredTensor
from .file_reads import FileReads, SharedReads
from .read_plan import ReadPlan
from .sharing import MIN_NBYTES, Group, OpenProposal, groups_of, one_group, share_out, table_of


class ReadingTogether:
    """One rank's view.

    Attributes:
        stored: what `FileReads.find_stored` has found, if that was asked here.
    """

    def __init__(self, operation: Operation, threads: Threads, *, is_wanted: bool) -> None:
        """Begin.

        Args:
            operation: the ranks that load.
            threads: the engine's.
            is_wanted: whether this rank takes part; of the others some may not.
        """
        self.stored: dict[int, StoredTensor] | None = None
        self._operation = operation
        self._threads = threads
        self._is_wanted = is_wanted
        self._table = table_of((), {})
        self._groups: list[Group] = []

    async def look(self, plan: ReadPlan, reads: FileReads) -> None:
        """Look at what this rank reads, whose files are open.

        Raises:
            OSError: storage failed.
        """
        if self._is_wanted:
            plan.expand()
            self.stored = await reads.find_stored(plan.tensors)
            self._table = await in_thread(self._threads.compute, table_of, plan.tensors, self.stored)

    def propose(self, opened: bool) -> Row:
        """Return what all ranks are told of it: an `OpenProposal`."""
        return OpenProposal.of(self._table, is_replaced=not opened).to_row()

    async def find(self, agreed: OpenProposal) -> None:
        """Find out, together with the other ranks, who reads the same.

        Raises:
            RankError: that failed on some rank.
        """
        operation = self._operation
        if agreed.nbytes < MIN_NBYTES:
            return
        if agreed.digest:
            groups = [one_group(operation.size, self._table)]
        else:
            tables = await operation.gather(self._table.tobytes())

            async def share() -> list[bytes]:
                return await in_thread(self._threads.compute, share_out, tables) if tables else []

            parts, _ = await operation.run_phase("compare", share)
            groups = groups_of(await operation.scatter(parts), self._table)
        near = [group.near(operation.rank) for group in groups]
        self._groups = [group for group in near if len(group.members) > 1]

    async def connect(self, stack: AsyncExitStack, plan: ReadPlan) -> list[SharedReads]:
        """Connect the ranks that read the same, until `stack` is closed: after a failure all hear of that before.

        Raises:
            LoadError: they cannot reach each other.
        """
        shared: list[SharedReads] = []
        for group in self._groups:
            relay = self._operation.relay(group.members)
            stack.callback(relay.close)
            await relay.connect()
            shared.append(SharedReads(relay=relay, reads=[plan.tensors[number] for number in group.numbers]))
        return shared
