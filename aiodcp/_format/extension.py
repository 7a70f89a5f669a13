"""What this library stores in DCP's `Metadata` beyond DCP's own fields; stock readers ignore it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .dcp import Metadata


@dataclass(slots=True)
class Containers:
    """What dotted names do not say of the containers of a state dict, by path.

    Attributes:
        empty: mappings without a key.
        int_keys: mappings all of whose keys are ints; paths have them as text, as in DCP.
    """

    empty: list[tuple[str | int, ...]] = field(default_factory=list)
    int_keys: list[tuple[str | int, ...]] = field(default_factory=list)


def containers_of(metadata: Metadata) -> Containers | None:
    """Return what is stored about the containers; None if nothing is."""
    mark = vars(metadata).get("aiodcp")
    if not isinstance(mark, dict) or "empty" not in mark:
        return None
    return Containers(list(mark["empty"]), list(mark.get("int_keys", ())))


def is_ours(metadata: Metadata) -> bool:
    """Whether this library has written the checkpoint."""
    mark = vars(metadata).get("aiodcp")
    return isinstance(mark, dict) and "framing" in mark


def framed_by_us(metadata: Metadata) -> Callable[[str], bool]:
    """Return a function: whether the tensor of an fqn lies in this library's framing."""
    mark = vars(metadata).get("aiodcp")
    if not isinstance(mark, dict) or mark.get("framing") != 1:
        return lambda fqn: False
    opaque = opaque_names(metadata)
    return lambda fqn: fqn not in opaque


def opaque_names(metadata: Metadata) -> frozenset[str]:
    """Return the fqns of tensors that this library has stored as `torch.save` writes them."""
    mark = vars(metadata).get("aiodcp")
    return frozenset(mark.get("opaque", ())) if isinstance(mark, dict) else frozenset()


Stamp = tuple[int, float | None]
"""A file's size in bytes, and when it was written, if storage knows: one that was replaced has another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLayout:
    """How a checkpoint that is not DCP's lies in its files.

    Attributes:
        written_by: what wrote it, in words: "safetensors".
        strides: of its tensors, by fqn; None for one that is contiguous. Their elements lie bare, without a frame.
        inline: values that lie in no file of their own, as archives of `torch.save`: a `StorageInfo` without a file has
            the number of one for its offset.
        notes: small facts that the files say of themselves.
        in_parent: whether the checkpoint's id names a file: what it refers to lies beside that, not below it.
        stamps: of the files as they were when their headers were read, by name.
    """

    written_by: str
    strides: Mapping[str, tuple[int, ...] | None]
    inline: Sequence[bytes] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    in_parent: bool = False
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


INLINE = ""
"""What stands for the file of a value that is inline."""


def foreign_layout(metadata: Metadata) -> ForeignLayout | None:
    """Return how another format's checkpoint lies in its files; None for one of DCP's.

    No pickle can set this: it would lead out of the checkpoint's directory.
    """
    found = vars(metadata).get("foreign")
    return found if type(found) is ForeignLayout else None


def set_foreign_layout(metadata: Metadata, layout: ForeignLayout, containers: Containers) -> None:
    """Say that a checkpoint is of another format, and what is known of its containers."""
    vars(metadata)["foreign"] = layout
    vars(metadata)["aiodcp"] = {"empty": containers.empty, "int_keys": containers.int_keys}
