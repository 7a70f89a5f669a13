"""What all ranks do together: one operation at a time, and each of its phases succeeds on all ranks or on none.

A phase is some local work that every rank does, and an agreement on how it went. While a rank works it sends
*heartbeats*: it reports its state to the coordinator and hears the coordinator's decision, a few times a second. So a
failure stops the work of all others soon, a rank that is not done at the deadline can be named, and one that died is
noticed.

    rank       working -> done | failed                       one row of integers: `votes.Row`
    decision   go on -> all done | stop -> failed             one row of integers, the same for all

What a phase exchanges besides are few integers (a proposal up, what is agreed down), or bytes in `gather`, `scatter`
and `broadcast`. With one rank all of this is nothing but the work itself.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from typing import Generic, TypeVar

import anyio.lowlevel
import torch
from anyio import CancelScope, Event

from ..errors import CheckpointError, RankError, RankFailure
from .channel import Channel, ChannelBrokenError
from .exchange import broadcast_bytes, gather_bytes, scatter_bytes
from .failures import describe_failure
from .relay import Relay
from .skip_agreement import SkipAgreement
from .votes import (
    PROPOSAL_LENGTH,
    STOP_GRACE_S,
    Agree,
    Decision,
    OperationKind,
    PhaseVote,
    RankState,
    Row,
    is_final,
    padded,
)

T = TypeVar("T")

FIRST_HEARTBEAT_S = 0.01

LAST_HEARTBEAT_S = 0.25  # heartbeats cost some 0.1 ms each on every rank: this often they are no load

PART = "add participant"  # the phase in which ranks meet for one of several states, or for the end of them


async def _nothing() -> None:
    await anyio.lowlevel.checkpoint()


class _Work(Generic[T]):
    """This rank's work in one phase."""

    def __init__(self) -> None:
        self.scope = CancelScope()
        self.finished = Event()
        self.result: list[T] = []
        self.error: Exception | None = None

    async def run(self, function: Callable[[], Awaitable[T]]) -> None:
        try:
            with self.scope:
                self.result.append(await function())
        except Exception as error:
            self.error = error
        finally:
            self.finished.set()

    @property
    def state(self) -> RankState:
        if not self.finished.is_set():
            return RankState.WORKING
        if self.error is not None:
            return RankState.FAILED
        return RankState.DONE if self.result else RankState.STOPPED


class Operation:
    """A save, a load or a preparation, on all ranks.

    Attributes:
        is_failure_agreed: whether a failure of the operation was agreed on. False when the channel broke: then what
            the others did after their last heartbeat is unknown.
    """

    def __init__(
        self,
        channel: Channel | None,
        kind: OperationKind,
        number: int,
        cancelled: CheckpointError,
        *,
        skips: SkipAgreement | None = None,
        on_failure: Callable[[RankError], None] = lambda error: None,
    ) -> None:
        """Begin.

        Args:
            channel: to the other ranks; None when there are none.
            kind: what is done; all ranks must do the same.
            number: of the caller's call. A rank that is behind the others fails its operations until it has caught up.
            cancelled: raised when this rank gives up.
            skips: counted by the caller as under way; closed here, with the last decision.
            on_failure: called when a failure is known and local work does not stop: whoever waits hears of it before.
        """
        self.is_failure_agreed: bool = True
        self._channel = channel
        self._kind = kind
        self._number = number
        self._given_up = cancelled
        self._skips = skips
        self._on_failure = on_failure
        self._step = 0  # of the operation: every agreement and every exchange is one
        self._has_met = False  # all ranks, since they had nothing to wait for but each other
        self._doing = ""
        self._cancelled = False
        self._scope: CancelScope | None = None
        self._branches: list[Operation] = []

    @property
    def rank(self) -> int:
        return self._channel.rank if self._channel else 0

    @property
    def size(self) -> int:
        return self._channel.size if self._channel else 1

    @property
    def is_coordinator(self) -> bool:
        return self._channel is None or self._channel.rank == self._channel.root

    def world_rank(self, rank: int) -> int:
        """Return which rank of the world, as torchrun counts, a rank of the group is."""
        return self._channel.members[rank] if self._channel else rank

    def cancel(self, error: CheckpointError | None = None) -> None:
        """Give up: the work under way is cancelled, and no other begins. It fails with `error`, if that is given."""
        if error is not None and not self._cancelled:
            self._given_up = error
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()
        for branch in self._branches:
            branch.cancel(error)

    def branch(self) -> Operation:
        """Return an operation for work that is done beside other branches', where there are no other ranks."""
        assert self._channel is None
        branch = Operation(None, self._kind, self._number, self._given_up)
        branch._cancelled = self._cancelled
        self._branches.append(branch)
        return branch

    async def wait_for(self, function: Callable[[], Awaitable[T]]) -> T:
        """Wait for what is not this operation's work, such as the caller's next request.

        Raises:
            CheckpointError: the one for giving up, on the rank that does so meanwhile.
            RankError: the same, reported by another rank.
        """
        found: list[T] = []
        self._has_met = False
        with CancelScope() as self._scope:
            if not self._cancelled:
                found.append(await function())
        self._scope = None
        while not found:
            await self.run_phase(PART, _nothing)  # raises, also on the other ranks
        return found[0]

    async def run_phase(
        self,
        phase: str,
        function: Callable[[], Awaitable[T]],
        *,
        propose: Callable[[T], Row] | None = None,
        agree: Agree | None = None,
        last: bool = False,
    ) -> tuple[T, Row]:
        """Run `function` on every rank, and return its result when all have succeeded, with what is agreed.

        Args:
            phase: for errors: what is being done.
            function: this rank's work. It is cancelled when another rank has failed.
            propose: makes of the result up to `PROPOSAL_LENGTH` integers for the coordinator.
            agree: makes, on the coordinator, of all ranks' proposals as many integers for all of them. It may raise.
            last: whether the operation ends with this phase.

        Raises:
            RankError: it failed on some rank, or not all were done in time. With one rank its own exception.
            CheckpointError: the one for giving up, on the rank that did.
        """
        work: _Work[T] = _Work()
        self._scope = work.scope
        if self._cancelled:
            work.scope.cancel()
        if self._channel is None:
            await work.run(function)
            self._scope = None
            if last or not work.result:
                self.close()
            if work.error is not None:
                raise work.error
            if not work.result:
                raise self._given_up
            table = [padded(propose(work.result[0]) if propose else ())]
            return work.result[0], padded(agree(table) if agree else ())
        failure: RankError | None = None
        agreed: Row = []
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(work.run, function)
                with CancelScope(shield=True):
                    try:
                        agreed = await self._agree(self._channel, phase, work, propose, agree, last)
                    except RankError as error:
                        failure = error
                        failure.__cause__ = work.error
                        work.scope.cancel()
                        with anyio.move_on_after(STOP_GRACE_S):
                            await work.finished.wait()
                        if not work.finished.is_set():
                            self._on_failure(error)
        finally:
            self._scope = None
        if failure is not None:
            if self._cancelled and not failure.missing:
                raise self._given_up from failure
            raise failure
        return work.result[0], agreed

    async def _agree(
        self,
        channel: Channel,
        phase: str,
        work: _Work[T],
        propose: Callable[[T], Row] | None,
        agree: Agree | None,
        last: bool,
    ) -> Row:
        self._doing = phase
        self._step += 1
        vote = PhaseVote(channel.timeout_s, agree)
        heartbeat_s = max(FIRST_HEARTBEAT_S, channel.round_trip_s)  # over a slow link work is done sooner than heard of
        while True:
            with anyio.move_on_after(heartbeat_s):
                await work.finished.wait()
            heartbeat_s = min(2 * heartbeat_s, LAST_HEARTBEAT_S)
            state = RankState.STOPPED if self._cancelled and work.finished.is_set() and not last else work.state
            mine = propose(work.result[0]) if propose and state is RankState.DONE else ()
            decision, agreed = await self._heartbeat(channel, phase, vote, state, mine, work.error, last=last)
            if decision == Decision.ALL_DONE:
                return agreed
            if decision == Decision.STOP:
                work.scope.cancel()

    async def _heartbeat(
        self,
        channel: Channel,
        step: str,
        vote: PhaseVote,
        state: RankState,
        proposal: Sequence[int],
        error: Exception | None = None,
        *,
        last: bool = False,
    ) -> tuple[int, Row]:
        """Report this rank's state and proposal; return the decision and what is agreed, unless it is a failure."""
        doing = zlib.crc32(step.encode())
        row = torch.tensor([self._number, self._kind, self._step, doing, state, *padded(proposal)], dtype=torch.int64)
        limit_s = channel.silence_s if self._has_met else channel.timeout_s
        began = time.perf_counter()
        with self._breaks_reported(channel, error):
            table = await channel.gather(row, limit_s=limit_s)
            heard = torch.zeros(2 + PROPOSAL_LENGTH, dtype=torch.int64)
            if table is not None:
                decision, *agreed = vote.decide(table.tolist())
                heard = torch.tensor([decision, self._skipped(is_final(decision, last)), *agreed], dtype=torch.int64)
            await channel.broadcast(heard, limit_s=limit_s)
        channel.note_round_trip(time.perf_counter() - began)
        self._has_met = True
        decision, skipped, *agreed = heard.tolist()
        if not self.is_coordinator and self._skips:
            self._skips.hear(skipped)
        if decision == Decision.BEHIND:
            if self._number == agreed[0]:
                return Decision.GO_ON, agreed
            behind = CheckpointError(f"this rank is at call {self._number}, others are at call {agreed[0]}")
            raise RankError(self._doing, [describe_failure(channel, behind)])
        if is_final(decision, last):
            self.close()
        if decision in (Decision.FAILED, Decision.OUT_OF_STEP):
            raise await self._share_failures(channel, error, vote)
        return decision, agreed

    async def _meet(self, channel: Channel, step: str, nbytes: int) -> int:
        """Begin an exchange of bytes on all ranks, and return the largest number of them.

        All that ranks send without having agreed before is a row of this one size: gloo ends the process when sizes
        differ.
        """
        self._step += 1
        vote = PhaseVote(channel.timeout_s, lambda table: [max(row[0] for row in table)])
        while True:
            decision, agreed = await self._heartbeat(channel, step, vote, RankState.DONE, [nbytes])
            if decision == Decision.ALL_DONE:
                return agreed[0]

    def _skipped(self, final: bool) -> int:
        """Return, on the coordinator, what a decision says of skipped saves."""
        if self._skips is None:
            return 0
        return self.close() if final else self._skips.current()

    def close(self) -> int:
        """Count the operation as over, if it is not yet, and return what the others must hear of skipped saves."""
        if self._skips is None:
            return 0
        skips, self._skips = self._skips, None
        return skips.close()

    async def _share_failures(self, channel: Channel, error: Exception | None, vote: PhaseVote) -> RankError:
        """Share what went wrong with all ranks, and make one error of it."""
        if self._cancelled and error is None:
            error = self._given_up
        mine = json.dumps(asdict(describe_failure(channel, error))).encode() if error else b""
        with self._breaks_reported(channel, error):
            texts = await gather_bytes(channel, mine)
            report = b""
            if texts:
                failures = [json.loads(text) for text in texts if text]
                if vote.error is not None:
                    failures.append(asdict(describe_failure(channel, vote.error)))
                report = json.dumps([failures, vote.missing]).encode()
            failures, missing = json.loads(await broadcast_bytes(channel, report))
        if channel.root in missing:  # it may still finish what it does, a commit too
            self.is_failure_agreed = False
        return RankError(
            self._doing, [RankFailure(**failure) for failure in failures], [channel.members[rank] for rank in missing]
        )

    @contextmanager
    def _breaks_reported(self, channel: Channel, error: Exception | None = None) -> Iterator[None]:
        try:
            yield
        except ChannelBrokenError as cut:
            self.is_failure_agreed = False
            self.close()
            failures = [describe_failure(channel, error)] if error else []
            broken = RankError(self._doing, failures, [channel.members[rank] for rank in cut.missing])
            raise broken from None

    # --- bytes: these raise RankError when the channel breaks.

    async def gather(self, data: bytes, longest: int | None = None) -> list[bytes]:
        """Collect each rank's bytes at the coordinator, by position; an empty list elsewhere.

        Args:
            data: this rank's.
            longest: how many bytes any rank has at most, if they have agreed on that; it saves a round.
        """
        channel = self._channel
        if channel is None:
            return [data]
        if longest is None:
            longest = await self._meet(channel, "gather", len(data))
        with self._breaks_reported(channel):
            return await gather_bytes(channel, data, longest)

    async def scatter(self, parts: Sequence[bytes], longest: int | None = None) -> bytes:
        """Give each rank its part of the coordinator's `parts`, which no other rank sees.

        Args:
            parts: by position; empty elsewhere.
            longest: how many bytes a part has at most, if the ranks have agreed on that; it saves a round.
        """
        channel = self._channel
        if channel is None:
            return parts[0]
        if longest is None:
            longest = await self._meet(channel, "scatter", max(map(len, parts), default=0))
        with self._breaks_reported(channel):
            return await scatter_bytes(channel, parts, longest)

    def relay(self, members: Sequence[int]) -> Relay:
        """Return a relay between some of the ranks, not connected yet; one at a time for each set of them."""
        assert self._channel is not None
        name = sha256(json.dumps(list(members)).encode()).hexdigest()
        return Relay(self._channel, members, f"relay/{self._number}/{self._step}/{name}")

    async def broadcast(self, data: bytes, length: int | None = None) -> bytes:
        """Give every rank the coordinator's bytes.

        Args:
            data: of the coordinator; not looked at elsewhere.
            length: how many they are, if the ranks have agreed on that; it saves a round.
        """
        channel = self._channel
        if channel is None:
            return data
        if length is None:
            length = await self._meet(channel, "broadcast", len(data) if self.is_coordinator else 0)
        with self._breaks_reported(channel):
            return await broadcast_bytes(channel, data, length)
