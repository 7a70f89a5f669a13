"""What this library stores in DCP's `Metadata` beyond DCP's own fields; stock readers ignore it."""

from __future__ import annotations

from collections.abc import Callable
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
