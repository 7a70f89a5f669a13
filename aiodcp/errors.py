"""Every error that aiodcp raises.

    CheckpointError
    ├── ArgumentError (also ValueError)      an argument of ours cannot be used: raised before anything happens
    ├── ClosedError (also RuntimeError)      the Checkpointer is not open, or belongs to the parent of this fork
    │   └── DeadlockError                    the call would wait for what only its caller can end
    ├── BusyError                            a save is in flight and the caller chose not to wait
    ├── SaveError                            a save failed; nothing was committed
    │   ├── CaptureError                     the state dict cannot be saved as it is: names the fqn
    │   ├── StageError                       host memory could not be had, or a copy into it failed
    │   ├── TornSnapshotError                tensors changed before they were staged: names their fqns
    │   ├── DisagreementError                the ranks hold different values of one name, and the caller forbade that
    │   ├── ParticipantError                 a participant of a joint checkpoint failed: names it
    │   ├── WriteError                       storage refused: names the path, the OSError is its cause
    │   └── SaveCancelled                    `Checkpoint.cancel()` was called; nothing was committed
    ├── RankError (a SaveError and LoadError) a rank failed or is missing: the same error on all ranks
    └── LoadError                            a load failed
        ├── NotACheckpointError (also FileNotFoundError)  no committed checkpoint there
        ├── ReadError                        storage refused: names the path, the OSError is its cause
        ├── CorruptError                     what is stored is not what was saved: names path and fqn
        ├── FormatError                      what is there is written in another format: says which
        ├── UnsafeError                      the checkpoint asks for more than data: names all that it needs
        ├── MismatchError                    checkpoint and state dict do not fit: names every fqn and why
        └── StatefulError                    an object's load_state_dict() raised: that error is the cause

Every error takes its facts as arguments, so that it survives pickling, and keeps them as attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class CheckpointError(Exception):
    """The root of the tree: `except aiodcp.CheckpointError` catches all that this library raises."""


class ArgumentError(CheckpointError, ValueError):
    """An argument cannot be used.

    Attributes:
        argument: its name.
        problem: what is wrong with its value.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class ClosedError(CheckpointError, RuntimeError):
    """The Checkpointer was used outside `async with`, or in a forked child of the process that opened it."""


class DeadlockError(ClosedError):
    """The call would wait for ever for what its own caller must end first, such as the block that it is in."""


class BusyError(CheckpointError):
    """A save is in flight and `on_busy="raise"` was asked for.

    Attributes:
        checkpoint_id: where the save in flight is going.
    """

    def __init__(self, checkpoint_id: str) -> None:
        super().__init__(checkpoint_id)
        self.checkpoint_id = checkpoint_id

    def __str__(self) -> str:
        return f"a save to {self.checkpoint_id!r} is in flight"


class SaveError(CheckpointError):
    """A save failed and committed nothing: what `checkpoint_id` held before, it still holds."""


class CaptureError(SaveError):
    """The state dict cannot be saved as it is.

    Attributes:
        fqn: the value that cannot, by its dotted name; empty when it is the state dict as a whole.
        problem: why.
    """

    def __init__(self, fqn: str, problem: str) -> None:
        super().__init__(fqn, problem)
        self.fqn = fqn
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.fqn}: {self.problem}" if self.fqn else self.problem


class StageError(SaveError):
    """Tensors could not be brought into host memory.

    Attributes:
        nbytes: the bytes that were to be staged.
        problem: why they were not.
    """

    def __init__(self, nbytes: int, problem: str) -> None:
        super().__init__(nbytes, problem)
        self.nbytes = nbytes
        self.problem = problem

    def __str__(self) -> str:
        return f"staging {self.nbytes} bytes: {self.problem}"


class TornSnapshotError(SaveError):
    """Tensors changed between `save` and `staged`: what was staged is no state that ever was.

    Attributes:
        fqns: the tensors that changed, in the order of the state dict.
    """

    SHOWN = 5

    def __init__(self, fqns: Sequence[str]) -> None:
        super().__init__(tuple(fqns))
        self.fqns = tuple(fqns)

    def __str__(self) -> str:
        more = f" and {len(self.fqns) - self.SHOWN} more" if len(self.fqns) > self.SHOWN else ""
        names = ", ".join(self.fqns[: self.SHOWN])
        return f"changed before they were staged: {names}{more}; wait for `staged` before changing tensors, or guard()"


class DisagreementError(SaveError):
    """The ranks hold different values of what is saved once, and `on_disagreement="raise"` was asked for.

    Attributes:
        fqns: the names, sorted.
    """

    SHOWN = 5

    def __init__(self, fqns: Sequence[str]) -> None:
        super().__init__(tuple(fqns))
        self.fqns = tuple(fqns)

    def __str__(self) -> str:
        more = f" and {len(self.fqns) - self.SHOWN} more" if len(self.fqns) > self.SHOWN else ""
        named = ", ".join(self.fqns[: self.SHOWN])
        return f"the ranks hold different values of {named}{more}: wrap what is each rank's own in aiodcp.PerRank"


class ParticipantError(SaveError):
    """A participant of a `JointCheckpoint` failed or was cancelled; what it raised is the cause.

    Attributes:
        participant: its name.
        problem: what became of it.
    """

    def __init__(self, participant: str, problem: str) -> None:
        super().__init__(participant, problem)
        self.participant = participant
        self.problem = problem

    def __str__(self) -> str:
        return f"participant {self.participant!r} {self.problem}"


class WriteError(SaveError):
    """Storage refused a write; the `OSError` is the cause.

    Attributes:
        path: the file or object that could not be written.
        problem: the system's words.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"cannot write {self.path}: {self.problem}"


class SaveCancelled(SaveError):  # noqa: N818 - the name asyncio gave to this outcome
    """The save was cancelled by `Checkpoint.cancel()`, and what it had written is removed.

    Attributes:
        checkpoint_id: where it was going.
    """

    def __init__(self, checkpoint_id: str) -> None:
        super().__init__(checkpoint_id)
        self.checkpoint_id = checkpoint_id

    def __str__(self) -> str:
        return f"the save to {self.checkpoint_id!r} was cancelled"


class LoadError(CheckpointError):
    """A load failed."""


class NotACheckpointError(LoadError, FileNotFoundError):
    """There is no committed checkpoint at the path: no `.metadata`.

    Attributes:
        checkpoint_id: where one was looked for.
    """

    def __init__(self, checkpoint_id: str) -> None:
        super().__init__(checkpoint_id)
        self.checkpoint_id = checkpoint_id

    def __str__(self) -> str:
        return f"no committed checkpoint at {self.checkpoint_id!r}: there is no .metadata"


class ReadError(LoadError):
    """Storage refused a read; the `OSError` is the cause.

    Attributes:
        path: the file or object that could not be read.
        problem: the system's words.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.problem}"


class FormatError(LoadError):
    """What is there is no checkpoint of this format, but of another one.

    Attributes:
        path: the file or directory.
        problem: what it is, and what opens it.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class StatefulError(LoadError):
    """An object's `load_state_dict()` raised, after everything was read; that error is the cause.

    Attributes:
        key: the object, by its name at the top level.
        problem: what it raised.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


class CorruptError(LoadError):
    """What is stored is not what was saved.

    Attributes:
        path: the file that is damaged, missing, or too short.
        fqn: the value it was to give; empty when the damage is not in one value.
        problem: what was found.
    """

    def __init__(self, path: str, fqn: str, problem: str) -> None:
        super().__init__(path, fqn, problem)
        self.path = path
        self.fqn = fqn
        self.problem = problem

    def __str__(self) -> str:
        where = f"{self.path} ({self.fqn})" if self.fqn else self.path
        return f"{where}: {self.problem}"


class UnsafeError(LoadError):
    """The checkpoint asks the reader to run or name something that is not plain data.

    Attributes:
        path: the file that asks.
        fqn: the value that asks; empty for `.metadata`.
        problem: what it asks for.
        names: of all classes and functions that the value needs, sorted.
    """

    def __init__(self, path: str, fqn: str, problem: str, names: Sequence[str] = ()) -> None:
        super().__init__(path, fqn, problem, tuple(names))
        self.path = path
        self.fqn = fqn
        self.problem = problem
        self.names = tuple(names)

    def __str__(self) -> str:
        where = f"{self.path} ({self.fqn})" if self.fqn else self.path
        return f"{where}: {self.problem}"


class MismatchError(LoadError):
    """Checkpoint and state dict do not fit; the state dict is untouched.

    Attributes:
        checkpoint_id: the checkpoint.
        missing: fqns that the state dict has and the checkpoint has not, sorted.
        unexpected: fqns that the checkpoint has below the names that were asked for and no rank wants, sorted.
        problems: one sentence for each value that is in both and does not fit, each beginning with its fqn.
        suggestions: for missing fqns the stored ones that were most likely meant.
        hint: what would help, if that can be told.
    """

    SHOWN = 10  # of each kind: a wrong model has thousands, and the first few tell which mistake it was

    def __init__(
        self,
        checkpoint_id: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        problems: Sequence[str] = (),
        suggestions: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(
            checkpoint_id, tuple(missing), tuple(unexpected), tuple(problems), dict(suggestions or {}), hint
        )
        self.checkpoint_id = checkpoint_id
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.problems = tuple(problems)
        self.suggestions = dict(suggestions or {})
        self.hint = hint

    def __str__(self) -> str:
        text = f"the checkpoint at {self.checkpoint_id!r} does not fit the state dict"
        missing = [
            f"{name} (did you mean {self.suggestions[name]}?)" if name in self.suggestions else name
            for name in self.missing
        ]
        for title, names in (
            ("missing in the checkpoint", missing),
            ("not in the state dict", self.unexpected),
            ("different", self.problems),
        ):
            if names:
                more = [f"and {len(names) - self.SHOWN} more"] if len(names) > self.SHOWN else []
                text += "\n  ".join([f"\n{title} ({len(names)}):", *names[: self.SHOWN], *more])
        return f"{text}\n{self.hint}" if self.hint else text


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """What went wrong on one rank, as text: an exception need not survive the way to the others.

    Attributes:
        rank: in the world, as torchrun counts.
        kind: the exception's class.
        text: its message.
        traceback: as Python prints it.
    """

    rank: int
    kind: str
    text: str
    traceback: str


class RankError(SaveError, LoadError):
    """A save or load of several ranks failed; every rank is told the same. A save has committed nothing.

    On the ranks that failed their own exception is the cause.

    Attributes:
        phase: what was being done.
        failures: what went wrong, by rank.
        missing: ranks that died, left, or were not done in time.
    """

    SHOWN = 4  # different failures told in full; of the others the ranks

    def __init__(self, phase: str, failures: Sequence[RankFailure] = (), missing: Sequence[int] = ()) -> None:
        super().__init__(phase, tuple(failures), tuple(missing))
        self.phase = phase
        self.failures = tuple(failures)
        self.missing = tuple(missing)

    def __str__(self) -> str:
        told: list[str] = []
        if self.missing:
            ranks = ", ".join(f"rank {rank}" for rank in self.missing)
            told.append(f"missing (died, left, or not done in time): {ranks}")
        alike: dict[tuple[str, str], list[RankFailure]] = {}
        for failure in self.failures:
            alike.setdefault((failure.kind, failure.text), []).append(failure)
        tracebacks = ""
        for (kind, text), failures in list(alike.items())[: self.SHOWN]:
            ranks = ", ".join(f"rank {failure.rank}" for failure in failures)
            told.append(f"{ranks}: {kind}: {text}")
            tracebacks += f"\n--- rank {failures[0].rank}\n{failures[0].traceback.rstrip()}"
        rest = [str(failure.rank) for failures in list(alike.values())[self.SHOWN :] for failure in failures]
        if rest:
            told.append("differently: rank " + ", ".join(rest))
        return f"{self.phase}: " + "; ".join(told or ["the ranks were cut off from each other"]) + tracebacks
