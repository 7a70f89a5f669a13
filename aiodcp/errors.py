"""Every error that aiodcp raises.

    CheckpointError
    ├── ArgumentError (also ValueError)      an argument is invalid: raised before anything happens
    ├── ClosedError (also RuntimeError)      the Checkpointer is not open, or belongs to the parent of this fork
    │   └── DeadlockError                    the call would wait for what only its caller can finish
    ├── BusyError                            a save is in flight and the caller chose not to wait
    ├── SaveError                            a save failed; nothing was committed
    │   ├── CaptureError                     the state dict cannot be saved as it is: names the fqn
    │   ├── StageError                       host memory could not be allocated, or a copy into it failed
    │   ├── TornSnapshotError                tensors changed before they were staged: names their fqns
    │   ├── DisagreementError                values differ between ranks, and `on_disagreement="raise"`
    │   ├── ParticipantError                 a participant of a joint checkpoint failed: names it
    │   ├── WriteError                       storage failed: names the path, the OSError is its cause
    │   └── SaveCancelled                    `Checkpoint.cancel()` was called; nothing was committed
    ├── RankError (a SaveError and LoadError) a rank failed or is missing: the same error on all ranks
    └── LoadError                            a load failed
        ├── NotACheckpointError (also FileNotFoundError)  no committed checkpoint there
        ├── ReadError                        storage failed: names the path, the OSError is its cause
        ├── CorruptError                     what is stored is not what was saved: names path and fqn
        ├── FormatError                      what is there is written in another format: says which
        ├── UnsafeError                      the checkpoint needs more than plain data, or files elsewhere
        ├── MismatchError                    checkpoint and state dict do not match: names every fqn
        └── StatefulError                    an object's load_state_dict() raised: that error is the cause

An error that has facts is a dataclass: they are its arguments and its attributes. Every error survives pickling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar, dataclass_transform

E = TypeVar("E", bound=Exception)


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def _error(cls: type[E]) -> type[E]:
    """Make a dataclass of an exception, which stays equal to itself only, and prints its arguments."""
    return dataclass(eq=False, repr=False)(cls)


class CheckpointError(Exception):
    """The root of the tree: `except aiodcp.CheckpointError` catches all that this library raises."""

    message: ClassVar[str] = ""  # a template over the fields
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__init__(*(getattr(self, name) for name in self.__match_args__))  # its `args`, for pickling

    def __str__(self) -> str:
        return self.message.format_map(vars(self)) if self.message else super().__str__()


@_error
class ArgumentError(CheckpointError, ValueError):
    """An argument cannot be used.

    Attributes:
        argument: its name.
        problem: what is wrong with its value.
    """

    message: ClassVar[str] = "{argument}: {problem}"
    argument: str
    problem: str


class ClosedError(CheckpointError, RuntimeError):
    """The Checkpointer was used outside `async with`, or in a forked child of the process that opened it."""


class DeadlockError(ClosedError):
    """The call would deadlock: it waits for what only its caller can finish, such as the block it is called from."""


@_error
class BusyError(CheckpointError):
    """A save is in flight and `on_busy="raise"` was asked for.

    Attributes:
        checkpoint_id: where the save in flight is going.
    """

    message: ClassVar[str] = "a save to {checkpoint_id!r} is in flight"
    checkpoint_id: str


class SaveError(CheckpointError):
    """A save failed and committed nothing: the previous checkpoint at `checkpoint_id`, if any, is intact."""


@_error
class CaptureError(SaveError):
    """The state dict cannot be saved as it is.

    Attributes:
        fqn: the value that cannot be saved, by its dotted name; empty when it is the state dict as a whole.
        problem: why.
    """

    fqn: str
    problem: str

    def __str__(self) -> str:
        return f"{self.fqn}: {self.problem}" if self.fqn else self.problem


@_error
class StageError(SaveError):
    """Tensors could not be copied into host memory.

    Attributes:
        nbytes: the bytes that were to be staged; 0 if that is not known.
        problem: why they were not.
    """

    nbytes: int
    problem: str

    def __str__(self) -> str:
        return f"cannot stage {self.nbytes} bytes: {self.problem}" if self.nbytes else f"staging failed: {self.problem}"


@_error
class TornSnapshotError(SaveError):
    """Tensors changed between `save` and `staged`: what was staged is a mix of states.

    Attributes:
        fqns: the tensors that changed, in the order of the state dict.
    """

    fqns: Sequence[str]

    def __post_init__(self) -> None:
        self.fqns = tuple(self.fqns)
        super().__post_init__()

    def __str__(self) -> str:
        advice = "wait for `staged` before changing tensors, or guard()"
        return f"changed before they were staged: {_some(self.fqns)}; {advice}"


@_error
class DisagreementError(SaveError):
    """The ranks hold different values of what is saved once, and `on_disagreement="raise"` was asked for.

    Attributes:
        fqns: the names, sorted.
    """

    fqns: Sequence[str]

    def __post_init__(self) -> None:
        self.fqns = tuple(self.fqns)
        super().__post_init__()

    def __str__(self) -> str:
        return f"the ranks hold different values of {_some(self.fqns)}: wrap what is each rank's own in aiodcp.PerRank"


@_error
class ParticipantError(SaveError):
    """A participant of a `JointCheckpoint` failed or was cancelled; what it raised is the cause.

    Attributes:
        participant: its name.
        problem: what happened to it.
    """

    message: ClassVar[str] = "participant {participant!r} {problem}"
    participant: str
    problem: str


@_error
class WriteError(SaveError):
    """Storage failed to write; the `OSError` is the cause.

    Attributes:
        path: the file or object that could not be written.
        problem: the error message of the storage or the operating system.
    """

    message: ClassVar[str] = "cannot write {path}: {problem}"
    path: str
    problem: str


@_error
class SaveCancelled(SaveError):  # noqa: N818 - the name asyncio gave to this outcome
    """The save was cancelled by `Checkpoint.cancel()`, and what it had written is removed.

    Attributes:
        checkpoint_id: where it was going.
    """

    message: ClassVar[str] = "the save to {checkpoint_id!r} was cancelled"
    checkpoint_id: str


class LoadError(CheckpointError):
    """A load failed."""


@_error
class NotACheckpointError(LoadError, FileNotFoundError):
    """There is no committed checkpoint at the path: no `.metadata`.

    Attributes:
        checkpoint_id: where one was looked for.
    """

    message: ClassVar[str] = "no committed checkpoint at {checkpoint_id!r}: there is no .metadata"
    checkpoint_id: str


@_error
class ReadError(LoadError):
    """Storage failed to read; the `OSError` is the cause.

    Attributes:
        path: the file or object that could not be read.
        problem: the error message of the storage or the operating system.
    """

    message: ClassVar[str] = "cannot read {path}: {problem}"
    path: str
    problem: str


@_error
class FormatError(LoadError):
    """What is there is in another format.

    Attributes:
        path: the file or directory.
        problem: which format it is, and what opens it.
    """

    message: ClassVar[str] = "{path}: {problem}"
    path: str
    problem: str


@_error
class StatefulError(LoadError):
    """An object's `load_state_dict()` raised, after everything was read; that error is the cause.

    Attributes:
        key: the object, by its name at the top level.
        problem: what it raised.
    """

    message: ClassVar[str] = "{key}: {problem}"
    key: str
    problem: str


@_error
class CorruptError(LoadError):
    """What is stored is not what was saved.

    Attributes:
        path: the file that is damaged, missing, or too short.
        fqn: the value it was to give; empty when the damage is not in one value.
        problem: what was found.
    """

    path: str
    fqn: str
    problem: str

    def __str__(self) -> str:
        return f"{_where(self.path, self.fqn)}: {self.problem}"


@_error
class UnsafeError(LoadError):
    """The checkpoint needs more than plain data, or refers to files outside its directory.

    Attributes:
        path: the file that asks.
        fqn: the value that asks; empty for `.metadata`.
        problem: what it asks for.
        names: all classes and functions that the value needs, sorted.
    """

    path: str
    fqn: str
    problem: str
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        super().__post_init__()

    def __str__(self) -> str:
        return f"{_where(self.path, self.fqn)}: {self.problem}"


@_error
class MismatchError(LoadError):
    """Checkpoint and state dict do not match; the state dict is untouched.

    Attributes:
        checkpoint_id: the checkpoint.
        missing: fqns of the state dict that are not in the checkpoint, sorted.
        unexpected: stored fqns below the requested top-level names that are in no rank's state dict, sorted.
        problems: one sentence for each value that is in both and does not fit, each beginning with its fqn.
        suggestions: for missing fqns the stored ones that were most likely meant.
        hint: what would help, if that is known.
    """

    SHOWN: ClassVar[int] = 10  # of each kind: a wrong model has thousands, and the first few show which mistake it was

    checkpoint_id: str
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    problems: Sequence[str] = ()
    suggestions: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""

    def __post_init__(self) -> None:
        self.missing, self.unexpected = tuple(self.missing), tuple(self.unexpected)
        self.problems, self.suggestions = tuple(self.problems), dict(self.suggestions)
        super().__post_init__()

    def __str__(self) -> str:
        text = f"the checkpoint at {self.checkpoint_id!r} does not match the state dict"
        missing = [
            f"{name} (did you mean {self.suggestions[name]}?)" if name in self.suggestions else name
            for name in self.missing
        ]
        for title, names in (
            ("missing from the checkpoint", missing),
            ("not in the state dict", self.unexpected),
            ("incompatible", self.problems),
        ):
            if names:
                more = [f"and {len(names) - self.SHOWN} more"] if len(names) > self.SHOWN else []
                text += "\n  ".join([f"\n{title} ({len(names)}):", *names[: self.SHOWN], *more])
        return f"{text}\n{self.hint}" if self.hint else text


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """What went wrong on one rank, as text, because an exception may not survive being sent to other ranks.

    Attributes:
        rank: the global one, as numbered by torchrun.
        kind: the exception's class.
        text: its message.
        traceback: as Python prints it.
    """

    rank: int
    kind: str
    text: str
    traceback: str


@_error
class RankError(SaveError, LoadError):
    """A save or load of several ranks failed; every rank raises the same. A save has committed nothing.

    On the ranks that failed their own exception is the cause.

    Attributes:
        phase: what was being done.
        failures: what went wrong, by rank.
        missing: ranks that died, left, or were not done in time.
    """

    SHOWN: ClassVar[int] = 4  # different failures shown in full; of the others the ranks

    phase: str
    failures: Sequence[RankFailure] = ()
    missing: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.failures, self.missing = tuple(self.failures), tuple(self.missing)
        super().__post_init__()

    def __str__(self) -> str:
        parts: list[str] = []
        if self.missing:
            ranks = ", ".join(f"rank {rank}" for rank in self.missing)
            parts.append(f"missing: {ranks} (died, left, or timed out)")
        alike: dict[tuple[str, str], list[RankFailure]] = {}
        for failure in self.failures:
            alike.setdefault((failure.kind, failure.text), []).append(failure)
        tracebacks = ""
        for (kind, text), failures in list(alike.items())[: self.SHOWN]:
            ranks = ", ".join(f"rank {failure.rank}" for failure in failures)
            parts.append(f"{ranks}: {kind}: {text}")
            tracebacks += f"\n--- rank {failures[0].rank}\n{failures[0].traceback.rstrip()}"
        rest = [str(failure.rank) for failures in list(alike.values())[self.SHOWN :] for failure in failures]
        if rest:
            parts.append("other errors: rank " + ", ".join(rest))
        return f"{self.phase}: " + "; ".join(parts or ["the connection between the ranks was lost"]) + tracebacks


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _where(path: str, fqn: str) -> str:
    return f"{path} ({fqn})" if fqn else path
