"""From a state dict to named leaves, at one instant, in the caller's thread.

Names and leaves are DCP's (`torch.distributed.checkpoint._nested_dict.flatten_state_dict`): mappings are walked, and
lists that hold tensors or mappings; everything else is a leaf. Tensors are only referred to: staging copies them.
All other leaves are frozen here, pickled as `torch.save` does it, so that what is saved is their value now.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, Partial

from ._layout import frame_value
from ._plain_data import not_plain, unsafe_in_archive
from .errors import ArgumentError, CaptureError
from .metadata import ContainerNotes

Path = tuple[str | int, ...]
StateDict = dict[str, Any]
# Of a mapping: its keys, their types, fqns, paths.
KnownNames = dict[Path, tuple[tuple[Any, ...], set[type], list[str], list[Path]]]

PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_NEVER_STATEFUL = {*PLAIN_TENSORS, DTensor, dict, list, tuple, int, float, str, bytes, bool, type(None)}
_SCALARS = {int, float, str, bytes, bool, type(None)}
MANY = 64  # tensors, from which on it is quicker to compare their keys with known ones than to make their names
SHOWN = 80  # characters of a name that is too long
COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps
QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}


@dataclass(slots=True)
class Frozen:
    """A value as it was at the moment of capture.

    Attributes:
        data: its pickle, or an archive of `torch.save`.
        framed: which of the two.
        needs: what it names that is not plain data: `load` does not build it by default.
    """

    data: bytes
    framed: bool
    needs: tuple[str, ...] = ()

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
        parts: of each leaf with any number of parts, by place, where among the values its first part is.
        devices: where the tensors are that are staged.
        versions: of each value, how often it was changed; None if nobody has looked.
        notes: what the names do not say of the containers.
        planned: the plan of the caller's own planner, whose items are the leaves.
    """

    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    frozen: dict[int, Frozen]
    sharded: dict[int, DTensor | ShardedTensor]
    parts: dict[int, int]
    devices: set[torch.device]
    versions: list[int] | None = None
    notes: ContainerNotes = field(default_factory=ContainerNotes)
    planned: SavePlan | None = None

    @property
    def names(self) -> list[str]:
        """The name of each of `values`; of parts that of their leaf."""
        if not self.parts:
            return self.fqns
        starts = {start: self.fqns[place] for place, start in self.parts.items()}
        names = list(self.fqns)
        for place in range(len(names), len(self.values)):
            names.append(starts.get(place, names[-1]))
        return names

    def name_on(self, device: torch.device) -> str:
        """Return the name of a tensor on `device`."""
        on_it = (isinstance(value, torch.Tensor) and value.device == device for value in self.values)
        return next(compress(self.names, on_it))

    def leaf(self, place: int) -> Any:
        """Return a leaf as it stands in the state dict."""
        return self.sharded.get(place, self.values[place])


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of a state dict: names, paths and values, in step and in its order.

    Attributes:
        optimizers: where mappings are that have the shape of an optimizer's state dict.
        per_rank: where values are of which each rank has its own.
    """

    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    notes: ContainerNotes
    optimizers: list[Path]
    per_rank: list[tuple[Path, PerRank]]


NewRank = Literal["keep", "raise"] | Callable[[Mapping[int, Any]], Any]


class PerRank:
    """A value of which every rank has its own, under one name: `{"rng": PerRank(torch.get_rng_state())}`.

    DCP keeps one rank's value of what is not sharded. This one is kept for each rank, as `rng.rank-0`, `rng.rank-1`
    and so on, and loaded by the rank of the same number: `load` fills the tensors inside, or replaces `value`. At the
    top level `value` may be `Stateful`.

    Args:
        value: this rank's.
        new_rank: what a rank of which the checkpoint has no value gets, because it was saved by fewer ranks: "keep"
            its own; "raise" `MismatchError`; or what this function returns for the values of all ranks that are
            stored, by rank: a position to go on from, say. It is called in a thread of the library's.
    """

    def __init__(self, value: Any, *, new_rank: NewRank = "keep") -> None:
        if new_rank not in ("keep", "raise") and not callable(new_rank):
            raise ArgumentError("new_rank", f'{new_rank!r} is neither "keep" nor "raise", and cannot be called')
        self.value = value
        self.new_rank = new_rank

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def capture(
    state_dict: Mapping[str, Any], rank: int = 0, *, may_be_empty: bool = False, names: KnownNames | None = None
) -> Capture:
    """Take `state_dict` apart.

    Args:
        state_dict: of the caller.
        rank: whose it is.
        may_be_empty: whether another rank may hold all of it.
        names: see `flatten`.

    Raises:
        ArgumentError: it is no mapping.
        CaptureError: it is empty, a `state_dict()` raised, or a leaf cannot be saved.
    """
    leaves = flatten(call_stateful(state_dict), rank, names)
    fqns, values = leaves.fqns, leaves.values
    if not fqns and not leaves.notes.empty and not may_be_empty:
        raise nothing_to_save()
    seen = _look_at(values)
    odd, devices = seen.odd, seen.devices
    sharded = {place: values[place] for place in odd if is_sharded(values[place])}
    parts: dict[int, int] = {}
    frozen: dict[int, Frozen] = {}
    for place, value in sharded.items():
        held = local_parts(fqns[place], value)
        devices |= {part.device for part in held}
        if isinstance(value, DTensor) and not holds_shards(value):
            [values[place]] = held
            if not is_plain(held[0]) and not held[0].is_meta:
                frozen[place] = freeze(fqns[place], held[0])
        else:
            parts[place] = len(values)
            values[place] = None
            values += held
    frozen |= {place: freeze(fqns[place], values[place]) for place in odd if place not in sharded}
    return Capture(
        fqns=fqns,
        paths=leaves.paths,
        values=values,
        frozen=frozen,
        sharded=sharded,
        parts=parts,
        devices=devices,
        versions=seen.versions,
        notes=leaves.notes,
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is seen of the values of a state in one go.

    Attributes:
        odd: the places of all but tensors that are only referred to (see `is_plain`).
        devices: where those are, but for host memory.
        versions: of each value, how often it was changed; None if they are to be read one by one.
    """

    odd: list[int]
    devices: set[torch.device]
    versions: list[int] | None


def _look_at(values: Sequence[Any]) -> _Seen:
    """Look at every value once: of 20,000 tensors none is in the cache, and each look takes 3 ms more."""
    odd: list[int] = []
    versions: list[int] = []
    facts: set[tuple[torch.layout, torch.dtype, torch.device | bool]] = set()
    plain, note, add = PLAIN_TENSORS, versions.append, facts.add
    try:
        for place, value in enumerate(values):
            if type(value) in plain:
                note(value._version)
                add((value.layout, value.dtype, value.is_cpu or value.device))  # a device takes longer to make
            else:
                odd.append(place)
                note(0)
    except RuntimeError:  # an inference tensor has no version
        versions = []
    devices = {device for _, _, device in facts if isinstance(device, torch.device)}
    if not versions or any(
        layout is not torch.strided or dtype in QUANTIZED or torch.device("meta") in devices
        for layout, dtype, _ in facts
    ):
        odd = [place for place, value in enumerate(values) if type(value) not in PLAIN_TENSORS or not is_plain(value)]
        others = set(odd)
        return _Seen(odd, {value.device for place, value in enumerate(values) if place not in others}, None)
    has_others = any(isinstance(values[place], torch.Tensor) for place in odd)
    return _Seen(odd, devices, None if has_others else versions)


def nothing_to_save() -> CaptureError:
    """Return the error for what is most likely a mistake, and would replace a checkpoint by nothing."""
    return CaptureError("", "the state dict holds no value to save")


def is_plain(value: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in a dense buffer that the staging copy understands."""
    return (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and value.dtype not in QUANTIZED
        and not value.is_meta
    )


def local_parts(fqn: str, value: DTensor | ShardedTensor) -> list[torch.Tensor]:
    """Return what this rank holds of a sharded tensor: of a `DTensor` mostly one part, else any number.

    Raises:
        CaptureError: it is no part of the tensor's value, or not of a kind that can be copied.
    """
    if isinstance(value, DTensor) and any(isinstance(placement, Partial) for placement in value.placements):
        raise CaptureError(
            fqn, f"has Partial placements {value.placements} (a pending reduction): redistribute it first"
        )
    parts = held_parts(value)
    whole = isinstance(value, DTensor) and not holds_shards(value)
    for part in parts:
        if part.is_meta and part.numel():
            raise CaptureError(fqn, "a tensor on the meta device has no data to save")
        if not part.is_meta and not is_plain(part) and not whole:
            raise CaptureError(fqn, f"a {type(value).__name__} of {type(part).__name__}, {part.layout}, {part.dtype}")
    return parts


def held_parts(value: DTensor | ShardedTensor) -> list[torch.Tensor]:
    """Return what this rank holds of a sharded tensor."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    with torch.no_grad():
        local = value.to_local()
    shards: list[torch.Tensor] = local.local_shards() if holds_shards(value) else [local]  # type: ignore[attr-defined]
    return shards


def holds_shards(value: DTensor) -> bool:
    """Whether the local part of a `DTensor` is itself a list of shards, as torchrec's is (`LocalShardsWrapper`)."""
    return hasattr(value._local_tensor, "local_shards")


def call_stateful(state_dict: Mapping[str, Any]) -> StateDict:
    """Return `state_dict` with each `Stateful` of its top level (where DCP looks for them) replaced by its state.

    They are asked in the order of their names, so that ranks whose dicts have another order meet in collectives.
    """
    if not isinstance(state_dict, Mapping):
        problem = f'is a mapping, such as {{"model": model}}, not {type(state_dict).__name__}'
        raise ArgumentError("state_dict", problem)
    called: StateDict = dict(state_dict)
    if _NEVER_STATEFUL.issuperset(map(type, called.values())):
        return called
    for key in sorted([key for key, value in called.items() if type(value) not in _NEVER_STATEFUL], key=str):
        value = called[key]
        stateful = value.value if type(value) is PerRank else value
        if is_stateful(stateful):
            try:
                state = stateful.state_dict()
            except Exception as error:
                raise CaptureError(str(key), f"state_dict() of {type(stateful).__name__} raised {error!r}") from error
            if isinstance(stateful, torch.nn.Module):
                state = without_wrappers(stateful, state)
            called[key] = PerRank(state, new_rank=value.new_rank) if type(value) is PerRank else state
    return called


def is_stateful(value: object) -> bool:
    """Whether a value of the top level is asked for its `state_dict()`."""
    return type(value) not in _NEVER_STATEFUL and isinstance(value, Stateful)


def without_wrappers(module: torch.nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a module's state under the names that it has without `torch.compile` and data-parallel wrappers."""
    names = short_names(module, state)
    if names is None:
        return state
    return OrderedDict((short, state[name]) for name, short in names.items())


def short_names(module: torch.nn.Module, names: Iterable[str]) -> dict[str, str] | None:
    """Return names as they are without wrappers, by the names that they have; None if there are no wrappers."""
    prefix, inner = "", module
    while True:
        if isinstance(inner, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            prefix, inner = f"{prefix}module.", inner.module
        elif "_orig_mod" in inner._modules:
            prefix, inner = f"{prefix}{COMPILED}", inner._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            break
    if not prefix and COMPILED not in "\0".join(names):
        return None
    short = {name: name.removeprefix(prefix).replace(COMPILED, "") for name in names}
    return short if len(set(short.values())) == len(short) else None


def flatten(state_dict: Mapping[str, Any], rank: int = 0, names: KnownNames | None = None) -> Leaves:
    """Return names, paths and leaves, in the order of the state dict.

    Args:
        state_dict: what to walk.
        rank: whose it is.
        names: those of the state before, and then of this one: large mappings have the same in the next save.

    Raises:
        CaptureError: it is nested deeper than Python's recursion limit, or contains itself.
    """
    names = {} if names is None else names
    used: KnownNames = {}
    fqns: list[str] = []
    paths: list[Path] = []
    values: list[Any] = []
    notes = ContainerNotes()
    optimizers: list[Path] = []
    per_rank: list[tuple[Path, PerRank]] = []

    here = ""

    def walk(prefix: str, path: Path, items: Iterable[tuple[Any, Any]], *, listed: bool) -> None:
        nonlocal here
        here = prefix
        for key, value in items:
            step = key if listed else str(key)
            if type(value) not in PLAIN_TENSORS:
                if type(value) is PerRank:
                    per_rank.append(((*path, step), value))
                    walk(f"{prefix}{key}.", (*path, step), [(per_rank_key(rank), value.value)], listed=False)
                    continue
                if isinstance(value, Mapping):
                    if not value:
                        notes.empty.append((*path, step))
                    elif type(next(iter(value))) is int and all(type(each) is int for each in value):
                        notes.int_keys.append((*path, step))
                    elif "param_groups" in value and "state" in value:
                        optimizers.append((*path, step))
                    walk_mapping(f"{prefix}{key}.", (*path, step), value)
                    continue
                if isinstance(value, list) and not _is_leaf(value):
                    walk(f"{prefix}{key}.", (*path, step), enumerate(value), listed=True)
                    continue
            fqns.append(f"{prefix}{key}")
            paths.append((*path, step))
            values.append(value)

    def walk_mapping(prefix: str, path: Path, mapping: Mapping[Any, Any]) -> None:
        if len(mapping) < MANY or not PLAIN_TENSORS.issuperset(map(type, mapping.values())):
            walk(prefix, path, mapping.items(), listed=False)
            return
        keys = tuple(mapping)
        kinds = set(map(type, keys))  # equal keys of another type have other names: 1 and True
        known = names.get(path)
        if known is None or known[:2] != (keys, kinds) or len(kinds) > 1:
            known = keys, kinds, [f"{prefix}{key}" for key in keys], [(*path, str(key)) for key in keys]
        used[path] = known
        fqns.extend(known[2])
        paths.extend(known[3])
        values.extend(mapping.values())

    try:
        walk_mapping("", (), state_dict)
    except RecursionError as error:
        raise CaptureError(f"{here[:SHOWN]}...", "is nested too deeply, or contains itself") from error
    names.clear()
    names.update(used)
    return Leaves(fqns, paths, values, notes, optimizers, per_rank)


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


class _NestedStatefulError(Exception):
    """The value has an object inside whose `state_dict()` nobody would ask for."""


class _Pickler(pickle.Pickler):
    """Pickles a value, and finds out what is in it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.holds_tensors = False
        self.holds_objects = False

    def reducer_override(self, obj: object) -> Any:  # called for nothing that pickle itself writes: fast
        self.holds_objects = True
        if isinstance(obj, PerRank) or is_sharded(obj):
            raise TypeError(f"a {type(obj).__name__} inside is not looked for: hold it in a dict or list")
        if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)):
            self.holds_tensors = True  # only `torch.save` knows how to write it; here look on for the rest
            return int, ()
        if not isinstance(obj, type) and isinstance(obj, Stateful):
            raise _NestedStatefulError(obj)
        return NotImplemented


def freeze(fqn: str, value: object) -> Frozen:
    """Pickle a value as `torch.save` does, for the many values without tensors in a hundredth of its time.

    Raises:
        CaptureError: it cannot be pickled, or what would be loaded is not what is meant.
    """
    if type(value) in _SCALARS:
        return Frozen(pickle.dumps(value, protocol=2), False)
    if isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            raise CaptureError(fqn, "is a parameter of a lazy module, which has no value before the first forward")
        if value.is_meta:
            raise CaptureError(fqn, "a tensor on the meta device has no data to save")
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(value)
        if not pickler.holds_tensors:
            data = file.getvalue()
            return Frozen(data, False, tuple(not_plain(data)) if pickler.holds_objects else ())
        data = _archive(value)
    except _NestedStatefulError as error:
        raise refuse_nested(fqn, value, error.args[0]) from None
    except Exception as error:
        raise CaptureError(fqn, f"{type(value).__name__} cannot be pickled: {error!r}") from error
    return Frozen(data, True, tuple(unsafe_in_archive(data)))


def refuse_nested(fqn: str, value: object, found: object) -> CaptureError:
    """Return the error for an object with a `state_dict()` that is not at the top level."""
    problem = f"is a {type(found).__name__}, whose state_dict() is called only at the top level: save what it returns"
    return CaptureError(_name_of(fqn, value, found), problem)


def _name_of(fqn: str, value: object, wanted: object) -> str:
    """Return by which name an object inside a value is best called."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return fqn
    for key, each in items:
        if each is wanted:
            return f"{fqn}.{key}"
        if (name := _name_of(f"{fqn}.{key}", each, wanted)) != f"{fqn}.{key}":
            return name
    return fqn


def _archive(value: object) -> bytes:
    file = io.BytesIO()
    with checksums():
        torch.save(value, file)
    return file.getvalue()


@contextmanager
def checksums() -> Iterator[None]:
    """Have `torch.save` write CRC32s in the block, whatever the process has set."""
    before = torch.serialization.get_crc32_options()
    if not before:
        torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        if not before:
            torch.serialization.set_crc32_options(False)
