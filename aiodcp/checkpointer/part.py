"""A part of a checkpoint that this process writes, and another one commits."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from .._engine.milestone import Milestone
from .._save.parts import PartExchange
from .._save.parts import PartTicket as PartTicket
from ..errors import CheckpointError, SaveCancelled
from .checkpoint import Checkpoint, SaveState
from .flows import Flows
from .snapshot import SnapshotBlock


class PartSave:
    """One part under way: what `Checkpointer.save_part` returns.

        async with await checkpointer.save_part({"trainer": state}, "run/step-100") as part:
            await part.staged                 # the state may change again
            ticket = await part.ticket()      # durable: send it to the process that commits
            ...                               # which calls `checkpointer.commit("run/step-100", tickets)`
            part.mark_committed()

    The block removes what it has written if it is left without that.

    Attributes:
        staged: reached when the state may change again.
    """

    def __init__(self, state: SaveState, exchange: PartExchange, flows: Flows) -> None:
        self.checkpoint_id: str = state.checkpoint_id
        self.staged: Milestone = Milestone(state.staged)
        self._checkpoint = Checkpoint(state)
        self._state = state
        self._exchange = exchange
        self._is_committed = False
        self._flows = flows
        self._block = ExitStack()

    def __repr__(self) -> str:
        return f"<PartSave of {self.checkpoint_id!r}, {self._checkpoint.progress.phase}>"

    async def __aenter__(self) -> PartSave:
        assert self._state.operation is not None, "it has begun"
        self._block.enter_context(self._flows.inside(self._state.operation))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._block:
            await self.finish(committed=self._is_committed)

    async def ticket(self) -> PartTicket | None:
        """Wait until the part is durable, and return what the one that commits needs; None but on the coordinator.

        Raises:
            SaveError: it could not be written.

        Cancellation: of the wait; the part is written.
        """
        try:
            await Milestone(self._exchange.written)
        except CheckpointError:
            self._state.mark_retrieved()  # it is the failure of the save
            raise
        return self._exchange.ticket

    def snapshot(self) -> SnapshotBlock:
        """As of a `Checkpoint`."""
        return self._checkpoint.snapshot()

    def mark_committed(self) -> None:
        """Say that the commit was made: what is written stays."""
        self._is_committed = True

    async def finish(self, *, committed: bool) -> None:
        """Say what became of the commit, and end. All ranks call it; the coordinator's word counts.

        A part that was not committed is removed; but not if a checkpoint that names it is found all the same.

        Raises:
            SaveError: the part could not be written.
        """
        self._exchange.decide(is_committed=committed)
        try:
            await self._checkpoint.uploaded
        except SaveCancelled:
            if committed:
                raise
