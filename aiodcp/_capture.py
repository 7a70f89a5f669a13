"""From a state dict to named leaves, at one instant, in the caller's thread.

Names and leaves are DCP's (`torch.distributed.checkpoint._nested_dict.flatten_state_dict`): mappings are walked, and
lists that hold tensors or mappings; everything else is a leaf. Tensors are only referred to: staging copies them.
All other leaves are frozen here, pickled as `torch.save` does it, so that what is saved is their value now.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, Partial

from ._layout import frame_value
from .errors import ArgumentError, CaptureError

Path = tuple[str | int, ...]
StateDict = dict[str, Any]

PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_NEVER_STATEFUL = {*PLAIN_TENSORS, DTensor, dict, list, tuple, int, float, str, bytes, bool, type(None)}
_SCALARS = {int, float, str, bytes, bool, type(None)}
_QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}


@dataclass(slots=True)
class Frozen:
    """A value as it was at the moment of capture.

    Attributes:
        data: its pickle, or an archive of `torch.save`.
        framed: which of the two.
    """

    data: bytes
    framed: bool

    def archive(self) -> bytes:
        """Return the archive of `torch.save`. Framing a pickle takes ten times as long as making it."""
        return self.data if self.framed else frame_value(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A state dict taken apart; `fqns`, `paths` and `values` go in step.

    Attributes:
        fqns: dotted names.
        paths: the keys and list indices that lead to each value.
        values: the leaves themselves; of sharded ones the part that this rank holds. A `ShardedTensor` has any number
            of parts, which follow all leaves.
        frozen: for every leaf that is not staged, by place, its pickle; framed as `torch.save` does it or still bare.
        sharded: the leaves that are sharded, by place.
        parts: of each `ShardedTensor`, by place, where among the values its first part is.
        planned: the plan of the caller's own planner, whose items are the leaves.
    """

    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    frozen: dict[int, Frozen]
    sharded: dict[int, DTensor | ShardedTensor]
    parts: dict[int, int]
    planned: SavePlan | None = None

    def leaf(self, place: int) -> Any:
        """Return a leaf as it stands in the state dict."""
        return self.sharded.get(place, self.values[place])


class PerRank:
    """A value of which every rank has its own, under one name: `{"rng": PerRank(torch.get_rng_state())}`.

    DCP keeps one rank's value of what is not sharded. This one is kept for each rank, as `rng.rank-0`, `rng.rank-1`
    and so on, and loaded by the rank of the same number: `load` fills the tensors inside, or replaces `value`. At the
    top level `value` may be `Stateful`.

    Attributes:
        value: this rank's.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def capture(state_dict: Mapping[str, Any], rank: int = 0) -> Capture:
    """Take `state_dict` apart.

    Raises:
        ArgumentError: it is no mapping.
        CaptureError: it is empty, a `state_dict()` raised, or a leaf cannot be pickled.
    """
    fqns, paths, values = flatten(call_stateful(state_dict), rank)
    if not fqns:  # most likely a mistake, and one that would replace a checkpoint by nothing
        raise CaptureError("", "the state dict holds no value to save")
    sharded = {
        place: value for place, value in enumerate(values) if type(value) not in PLAIN_TENSORS and is_sharded(value)
    }
    parts: dict[int, int] = {}
    for place, value in sharded.items():
        held = local_parts(fqns[place], value)
        if isinstance(value, ShardedTensor):
            parts[place] = len(values)
            values[place] = None
            values += held
        else:
            [values[place]] = held
    frozen = {
        place: freeze(fqns[place], value)
        for place, value in enumerate(values[: len(fqns)])
        # A tensor whose elements lie in a dense buffer that the staging copy understands is only referred to. The
        # test is spelt out: a call for each of 10,000 tensors is half of the time for which the caller is held.
        if type(value) not in PLAIN_TENSORS
        or value.layout is not torch.strided
        or value.dtype in _QUANTIZED
        or value.is_meta
        if place not in sharded
    }
    return Capture(fqns=fqns, paths=paths, values=values, frozen=frozen, sharded=sharded, parts=parts)


def is_plain(value: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in a dense buffer that the staging copy understands."""
    return (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and value.dtype not in _QUANTIZED
        and not value.is_meta
    )


def local_parts(fqn: str, value: DTensor | ShardedTensor) -> list[torch.Tensor]:
    """Return what this rank holds of a sharded tensor: of a `DTensor` one part, of a `ShardedTensor` any number.

    Raises:
        CaptureError: it is no part of the tensor's value, or not of a kind that can be copied.
    """
    if isinstance(value, DTensor):
        if any(isinstance(placement, Partial) for placement in value.placements):
            raise CaptureError(fqn, f"{value.placements} is a sum that is not made yet: redistribute it first")
        with torch.no_grad():
            parts = [value.to_local()]
    else:
        parts = [shard.tensor for shard in value.local_shards()]
    for part in parts:
        if part.is_meta and part.numel():
            raise CaptureError(fqn, "a tensor on the meta device has no data to save")
        if not part.is_meta and not is_plain(part):
            raise CaptureError(fqn, f"a {type(value).__name__} of {type(part).__name__}, {part.layout}, {part.dtype}")
    return parts


def call_stateful(state_dict: Mapping[str, Any]) -> StateDict:
    """Return `state_dict` with each `Stateful` of its top level (where DCP looks for them) replaced by its state."""
    if not isinstance(state_dict, Mapping):
        problem = f'is a mapping, such as {{"model": model}}, not {type(state_dict).__name__}'
        raise ArgumentError("state_dict", problem)
    called: StateDict = {}
    for key, value in state_dict.items():
        called[key] = value
        stateful = value.value if type(value) is PerRank else value
        if type(stateful) not in _NEVER_STATEFUL and isinstance(stateful, Stateful):
            try:
                state = stateful.state_dict()
            except Exception as error:
                raise CaptureError(str(key), f"state_dict() of {type(stateful).__name__} raised {error!r}") from error
            called[key] = PerRank(state) if type(value) is PerRank else state
    return called


def flatten(state_dict: Mapping[str, Any], rank: int = 0) -> tuple[list[str], list[Path], list[Any]]:
    """Return names, paths and leaves, in the order of the state dict."""
    fqns: list[str] = []
    paths: list[Path] = []
    values: list[Any] = []

    def walk(prefix: str, path: Path, items: Iterable[tuple[Any, Any]], *, listed: bool) -> None:
        for key, value in items:
            step = key if listed else str(key)
            if type(value) not in PLAIN_TENSORS:
                if type(value) is PerRank:
                    walk(f"{prefix}{key}.", (*path, step), [(per_rank_key(rank), value.value)], listed=False)
                    continue
                if isinstance(value, Mapping):
                    walk(f"{prefix}{key}.", (*path, step), value.items(), listed=False)
                    continue
                if isinstance(value, list) and not _is_leaf(value):
                    walk(f"{prefix}{key}.", (*path, step), enumerate(value), listed=True)
                    continue
            fqns.append(f"{prefix}{key}")
            paths.append((*path, step))
            values.append(value)

    walk("", (), state_dict.items(), listed=False)
    return fqns, paths, values


def per_rank_key(rank: int) -> str:
    """Return under which key a rank's own value lies."""
    return f"rank-{rank}"


def _is_leaf(values: list[Any]) -> bool:
    """Whether DCP keeps this list whole: it holds no tensor, and no list or mapping that does."""
    return not any(
        isinstance(value, (torch.Tensor, Mapping, PerRank)) or (isinstance(value, list) and not _is_leaf(value))
        for value in values
    )


def is_sharded(value: object) -> bool:
    """Whether `value` is one rank's part of a tensor."""
    return isinstance(value, DTensor | ShardedTensor)


def shape_and_dtype(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return those of the whole tensor; without the warning that a `ShardedTensor` gives for its attributes."""
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        return metadata.size, metadata.tensor_properties.dtype
    return value.shape, value.dtype


class _HoldsTensorsError(Exception):
    """The value has tensors inside: only `torch.save` knows how to write it."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:  # called for nothing that pickle itself writes: fast
        if isinstance(obj, PerRank) or is_sharded(obj):
            raise TypeError(f"a {type(obj).__name__} inside is not looked for: hold it in a dict or list")
        if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)):
            raise _HoldsTensorsError
        return NotImplemented


def freeze(fqn: str, value: object) -> Frozen:
    """Pickle a value as `torch.save` does, for the many values without tensors in a hundredth of its time."""
    if type(value) in _SCALARS:
        return Frozen(pickle.dumps(value, protocol=2), False)
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise CaptureError(fqn, "a tensor on the meta device has no data to save")
    if isinstance(value, Stateful):
        problem = (
            f"{type(value).__name__} has a state_dict(), which is called only at the top level: save what it returns"
        )
        raise CaptureError(fqn, problem)
    file = io.BytesIO()
    try:
        try:
            _Pickler(file, protocol=2).dump(value)
        except _HoldsTensorsError:
            file = io.BytesIO()
            torch.save(value, file)
            return Frozen(file.getvalue(), True)
    except Exception as error:
        raise CaptureError(fqn, f"{type(value).__name__} cannot be pickled: {error!r}") from error
    return Frozen(file.getvalue(), False)
