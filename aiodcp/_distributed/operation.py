"""What all ranks do together: one operation at a time, and each of its phases succeeds on all ranks or on none.

A phase is some local work that every rank does, and an agreement on how it went. While a rank works it *beats*: it
tells the coordinator its state and hears the coordinator's verdict, a few times a second. So a failure stops the work
of all others soon, a rank that is not done at the deadline can be named, and one that died is noticed.

    rank       working -> done | failed                       one row of integers: `_Row`
    verdict    go on -> all done | stop -> failed             one row of integers, the same for all

What a phase exchanges besides are few integers (`facts` up, `answer` down), or bytes in `gather`, `scatter` and
`broadcast`. With one rank all of this is nothing but the work itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import anyio.lowlevel
import torch
from anyio import CancelScope, Event

from ..errors import CheckpointError, RankError, RankFailure
from .channel import Channel, ChannelBrokenError
from .exchange import broadcast_bytes, bytes_of, gather_bytes, tensor_of
from .failures import describe_failure, failure_as_json
from .skip_agreement import SkipAgreement
from .votes import FACTS, STOP_GRACE_S, Agree, Decision, OperationKind, PhaseVote, RankState, Row, is_final, padded

T = TypeVar("T")

FIRST_BEAT_S = 0.01

LAST_BEAT_S = 0.25  # beats cost some 0.1 ms each on every rank: this often they are no load

PART = "part"  # the phase in which ranks meet for one of several states, or for the end of them


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
        agreed: whether a failure of the operation was agreed on. False when the line broke: then nobody can be sure
            what the others did after they were last heard.
    """

    def __init__(
        self,
        line: Channel | None,
        kind: OperationKind,
        number: int,
        cancelled: CheckpointError,
        *,
        skips: SkipAgreement | None = None,
        on_failure: Callable[[RankError], None] = lambda error: None,
    ) -> None:
        """Begin.

        Args:
            line: to the other ranks; None when there are none.
            kind: what is done; all ranks must do the same.
            number: of the caller's call. A rank that is behind the others fails its operations until it has caught up.
            cancelled: raised when this rank gives up.
            skips: counted by the caller as under way; closed here, with the last verdict.
            on_failure: called when a failure is known and local work does not stop: who waits is told before.
        """
        self.agreed = True
        self._line = line
        self._kind = kind
        self._number = number
        self._given_up = cancelled
        self._skips = skips
        self._on_failure = on_failure
        self._step = 0  # of the operation: every agreement and every exchange is one
        self._doing = ""
        self._cancelled = False
        self._scope: CancelScope | None = None
        self._branches: list[Operation] = []

    @property
    def rank(self) -> int:
        return self._line.rank if self._line else 0

    @property
    def size(self) -> int:
        return self._line.size if self._line else 1

    @property
    def is_coordinator(self) -> bool:
        return self._line is None or self._line.rank == self._line.root

    def world_rank(self, rank: int) -> int:
        """Return which rank of the world, as torchrun counts, a rank of the group is."""
        return self._line.members[rank] if self._line else rank

    def cancel(self, error: CheckpointError | None = None) -> None:
        """Give up: the work under way is cancelled, and no other begins. `error` says why, if it is to be told."""
        if error is not None and not self._cancelled:
            self._given_up = error
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()
        for branch in self._branches:
            branch.cancel(error)

    def branch(self) -> Operation:
        """Return an operation for work that is done beside other branches', where there are no other ranks."""
        assert self._line is None
        branch = Operation(None, self._kind, self._number, self._given_up)
        branch._cancelled = self._cancelled
        self._branches.append(branch)
        return branch

    async def wait_for(self, function: Callable[[], Awaitable[T]]) -> T:
        """Wait for what is not this operation's work, such as the caller's next wish.

        Raises:
            CheckpointError: the one for giving up, on the rank that does so meanwhile.
            RankError: the same, told by another rank.
        """
        found: list[T] = []
        with CancelScope() as self._scope:
            if not self._cancelled:
                found.append(await function())
        self._scope = None
        while not found:
            await self.together(PART, _nothing)  # raises, and tells the other ranks
        return found[0]

    async def together(
        self,
        phase: str,
        function: Callable[[], Awaitable[T]],
        *,
        facts: Callable[[T], Sequence[int]] | None = None,
        decide: Agree | None = None,
        last: bool = False,
    ) -> tuple[T, Row]:
        """Run `function` on every rank, and return its result when all have succeeded, with the coordinator's answer.

        Args:
            phase: for errors: what is being done.
            function: this rank's work. It is cancelled when another rank has failed.
            facts: makes of the result up to `FACTS` integers for the coordinator.
            decide: the coordinator makes of all ranks' facts the answer, up to `FACTS` integers. It may raise.
            last: whether the operation ends with this phase.

        Raises:
            RankError: it failed on some rank, or not all were done in time. With one rank its own exception.
            CheckpointError: the one for giving up, on the rank that did.
        """
        work: _Work[T] = _Work()
        self._scope = work.scope
        if self._cancelled:
            work.scope.cancel()
        if self._line is None:
            await work.run(function)
            self._scope = None
            if last or not work.result:
                self.close()
            if work.error is not None:
                raise work.error
            if not work.result:
                raise self._given_up
            table = [padded(facts(work.result[0]) if facts else ())]
            return work.result[0], padded(decide(table) if decide else ())
        failure: RankError | None = None
        answer: Row = []
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(work.run, function)
                with CancelScope(shield=True):
                    try:
                        answer = await self._agree(self._line, phase, work, facts, decide, last)
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
        return work.result[0], answer

    async def _agree(
        self,
        line: Channel,
        phase: str,
        work: _Work[T],
        facts: Callable[[T], Sequence[int]] | None,
        decide: Agree | None,
        last: bool,
    ) -> Row:
        self._doing = phase
        self._step += 1
        judge = PhaseVote(line.timeout_s, decide)
        beat_s = FIRST_BEAT_S
        while True:
            with anyio.move_on_after(beat_s):
                await work.finished.wait()
            beat_s = min(2 * beat_s, LAST_BEAT_S)
            state = RankState.STOPPED if self._cancelled and work.finished.is_set() and not last else work.state
            mine = facts(work.result[0]) if facts and state is RankState.DONE else ()
            verdict, answer = await self._beat(line, phase, judge, state, mine, work.error, last=last)
            if verdict == Decision.ALL_DONE:
                return answer
            if verdict == Decision.STOP:
                work.scope.cancel()

    async def _beat(
        self,
        line: Channel,
        step: str,
        judge: PhaseVote,
        state: RankState,
        facts: Sequence[int],
        error: Exception | None = None,
        *,
        last: bool = False,
    ) -> tuple[int, Row]:
        """Tell the coordinator this rank's state and facts; return its verdict and answer, unless it is a failure."""
        doing = zlib.crc32(step.encode())
        row = torch.tensor([self._number, self._kind, self._step, doing, state, *padded(facts)], dtype=torch.int64)
        with self._cut_told(line, error):
            table = await line.gather(row)
            heard = torch.zeros(2 + FACTS, dtype=torch.int64)
            if table is not None:
                verdict, *answer = judge.judge(table.tolist())
                heard = torch.tensor([verdict, self._skipped(is_final(verdict, last)), *answer], dtype=torch.int64)
            await line.broadcast(heard)
        verdict, skipped, *answer = heard.tolist()
        if not self.is_coordinator and self._skips:
            self._skips.hear(skipped)
        if verdict == Decision.BEHIND:
            if self._number == answer[0]:
                return Decision.GO_ON, answer
            behind = CheckpointError(f"this is call {self._number} of this rank, others are at call {answer[0]}")
            raise RankError(self._doing, [describe_failure(line, behind)])
        if is_final(verdict, last):
            self.close()
        if verdict in (Decision.FAILED, Decision.OUT_OF_STEP):
            raise await self._tell(line, error, judge)
        return verdict, answer

    async def _meet(self, line: Channel, step: str, nbytes: int) -> int:
        """Begin an exchange of bytes on all ranks, and return the largest number of them.

        All that ranks send without having agreed before is a row of this one size: gloo ends the process when sizes
        differ.
        """
        self._step += 1
        judge = PhaseVote(line.timeout_s, lambda table: [max(row[0] for row in table)])
        while True:
            verdict, answer = await self._beat(line, step, judge, RankState.DONE, [nbytes])
            if verdict == Decision.ALL_DONE:
                return answer[0]

    def _skipped(self, final: bool) -> int:
        """Return, on the coordinator, what a verdict says of skipped saves."""
        if self._skips is None:
            return 0
        return self.close() if final else self._skips.current()

    def close(self) -> int:
        """Count the operation as over, if it is not yet, and return what the others must hear of skipped saves."""
        if self._skips is None:
            return 0
        skips, self._skips = self._skips, None
        return skips.close()

    async def _tell(self, line: Channel, error: Exception | None, judge: PhaseVote) -> RankError:
        """Share what went wrong, and make one error of it."""
        if self._cancelled and error is None:
            error = self._given_up
        mine = json.dumps(failure_as_json(describe_failure(line, error))).encode() if error else b""
        with self._cut_told(line, error):
            texts = await gather_bytes(line, mine)
            told = b""
            if texts:
                failures = [json.loads(text) for text in texts if text]
                if judge.error is not None:
                    failures.append(failure_as_json(describe_failure(line, judge.error)))
                told = json.dumps([failures, judge.missing]).encode()
            failures, missing = json.loads(await broadcast_bytes(line, told))
        if line.root in missing:  # it may still finish what it does, a commit too
            self.agreed = False
        return RankError(
            self._doing, [RankFailure(**failure) for failure in failures], [line.members[rank] for rank in missing]
        )

    @contextmanager
    def _cut_told(self, line: Channel, error: Exception | None = None) -> Iterator[None]:
        try:
            yield
        except ChannelBrokenError as cut:
            self.agreed = False
            self.close()
            failures = [describe_failure(line, error)] if error else []
            told = RankError(self._doing, failures, [line.members[rank] for rank in cut.missing])
            raise told from None

    # --- bytes: these raise RankError when the line breaks.

    async def gather(self, data: bytes) -> list[bytes]:
        """Collect each rank's bytes at the coordinator, by position; an empty list elsewhere."""
        line = self._line
        if line is None:
            return [data]
        await self._meet(line, "gather", len(data))
        with self._cut_told(line):
            return await gather_bytes(line, data)

    async def scatter(self, parts: Sequence[bytes]) -> bytes:
        """Give each rank its part of the coordinator's `parts`, which nobody else looks at."""
        line = self._line
        if line is None:
            return parts[0]
        longest = max(1, await self._meet(line, "scatter", max(map(len, parts), default=0)))
        with self._cut_told(line):
            lengths = torch.tensor([[len(part)] for part in parts], dtype=torch.int64) if parts else None
            length = torch.zeros(1, dtype=torch.int64)
            await line.scatter(lengths, length)
            table = None
            if parts:
                table = torch.zeros(line.size, longest, dtype=torch.uint8)
                for rank, part in enumerate(parts):
                    table[rank, : len(part)] = tensor_of(part)
            row = torch.zeros(longest, dtype=torch.uint8)
            await line.scatter(table, row)
        return bytes_of(row[: int(length)])

    async def broadcast(self, data: bytes) -> bytes:
        """Give every rank the coordinator's bytes."""
        line = self._line
        if line is None:
            return data
        await self._meet(line, "broadcast", len(data))
        with self._cut_told(line):
            return await broadcast_bytes(line, data)
