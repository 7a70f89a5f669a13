"""A rank's local plan as columns, to be sent: what all ranks of one program have in common, and what is its own.

Ranks of one program hold the same names, shapes and placements, and differ in where in the tensors their parts lie. The
*table* has the one, as text, so that equal ones are equal bytes; the *places* are the other: an array of numbers. Names
of what is each rank's own differ in its number: in a table a sign stands for it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from .._format.arrays import Array
from .._format.dcp import KeyPath, TensorProperties
from .._format.extension import Containers
from .._format.outline import facts_of, properties_of
from .._state.per_rank import per_rank_key
from .plan import LocalPlan


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is that an item is, or has a part of.

    Attributes:
        properties: its dtype, and what DCP keeps beside it.
        size: of the whole tensor.
    """

    properties: TensorProperties
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTable:
    """What a rank could write. The first four lists go in step, one entry an item.

    Attributes:
        fqns: names.
        specs: of the tensors; None for other values.
        frozen: whether it was frozen at capture.
        paths: by name, the keys that lead to it; also of what has no item here.
        containers: what dotted names do not say of them.
        has_own: whether `OWN` in names and keys stands for the key of a rank's own.
        piece_nbytes: of tensors in one file, at most; None where each rank has one file.
    """

    fqns: list[str]
    specs: list[Spec | None]
    frozen: list[bool]
    paths: dict[str, KeyPath]
    containers: Containers
    piece_nbytes: int | None
    has_own: bool = False

    @classmethod
    def of(cls, local: LocalPlan, rank: int | None = None) -> StateTable:
        """Return the table of a rank's own plan; with its number, if there are others, for what is its own."""
        specs: dict[int, Spec] = {}
        paths, fqns = local.paths, [item.index.fqn for item in local.items]
        containers, has_own = local.containers, False
        if rank is not None and not any(OWN in fqn for fqn in paths):
            key = per_rank_key(rank)
            own = {fqn: put_key(path, key, OWN) for fqn, path in paths.items() if key in path}
            has_own = bool(own) or containers != containers_with(containers, key, OWN)
            names = {fqn: ".".join(map(str, path)) for fqn, path in own.items()}
            paths = {names.get(fqn, fqn): own.get(fqn, path) for fqn, path in paths.items()}
            fqns = [names.get(fqn, fqn) for fqn in fqns]
            containers = containers_with(containers, key, OWN)
        return cls(
            fqns=fqns,
            specs=[_spec_of(item, specs) for item in local.items],
            frozen=[number in local.frozen for number in range(len(local.items))],
            paths=paths,
            containers=containers,
            piece_nbytes=local.piece_nbytes,
            has_own=has_own,
        )

    def pack(self) -> bytes:
        """Return it as text."""
        properties: dict[str, int] = {}
        specs: dict[tuple[int, ...], int] = {}
        codes = []
        for spec in self.specs:
            if spec is None:
                codes.append(-1)
                continue
            kept = properties.setdefault(json.dumps(facts_of(spec.properties)), len(properties))
            codes.append(specs.setdefault((kept, *spec.size), len(specs)))
        found = {
            "fqns": self.fqns,
            "specs": codes,
            "kinds": list(specs),
            "properties": [json.loads(each) for each in properties],
            "frozen": [number for number, is_frozen in enumerate(self.frozen) if is_frozen],
            "paths": list(self.paths.items()),
            "empty": self.containers.empty,
            "int_keys": self.containers.int_keys,
            "piece_nbytes": self.piece_nbytes,
            "has_own": self.has_own,
        }
        return json.dumps(found, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, text: bytes) -> StateTable:
        """Return what `pack` has made a text of."""
        found: dict[str, Any] = json.loads(text)
        properties = [properties_of(facts) for facts in found["properties"]]
        specs: list[Spec | None] = [Spec(properties[kept], tuple(size)) for kept, *size in found["kinds"]]
        frozen = set(found["frozen"])
        return cls(
            fqns=found["fqns"],
            specs=[None if code < 0 else specs[code] for code in found["specs"]],
            frozen=[number in frozen for number in range(len(found["fqns"]))],
            paths={fqn: tuple(path) for fqn, path in found["paths"]},
            containers=Containers(
                [tuple(path) for path in found["empty"]], [tuple(path) for path in found["int_keys"]]
            ),
            piece_nbytes=found["piece_nbytes"],
            has_own=found["has_own"],
        )


OWN = "\0own"
"""In names and keys of a table: what stands for the key of a rank's own."""


def put_key(path: KeyPath, old: str, new: str) -> KeyPath:
    """Return keys with another one in place of one."""
    return tuple(new if each == old else each for each in path)


def containers_with(containers: Containers, old: str, new: str) -> Containers:
    """Return containers with another key in place of one."""
    return Containers(
        [put_key(path, old, new) for path in containers.empty],
        [put_key(path, old, new) for path in containers.int_keys],
    )


def places_of(local: LocalPlan) -> Array:
    """Return where in their tensors the items lie: of each item that is a tensor its offsets, then its sizes."""
    numbers = array("q")  # to make an array of a long list holds the GIL
    for item in local.items:
        if item.tensor_data is not None:
            numbers.extend(item.tensor_data.chunk.offsets)
            numbers.extend(item.tensor_data.chunk.sizes)
    return np.array(numbers, dtype=np.int64)


def _spec_of(item: WriteItem, known: dict[int, Spec]) -> Spec | None:
    """Return what is `known` of the same tensor, by its identity: many share it."""
    data = item.tensor_data
    if item.type is WriteItemType.BYTE_IO or data is None:
        return None
    if id(data) not in known:
        known[id(data)] = Spec(data.properties, tuple(data.size))
    return known[id(data)]


def digest_of(table: bytes) -> int:
    """Return what tells tables apart, as a signed integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(table, digest_size=8).digest(), "little", signed=True)


def pack_message(table: bytes, places: Array) -> bytes:
    """Return what a rank sends: its table, or nothing if that is known, and its places."""
    table = zlib.compress(table, 1) if table else b""
    smaller = places.astype(np.int32) if not places.size or int(places.max()) < 1 << 31 else places
    return b"".join(
        (len(table).to_bytes(4, "little"), bytes([smaller.itemsize]), table, zlib.compress(smaller.tobytes(), 1))
    )


def unpack_message(message: bytes) -> tuple[bytes, Array]:
    """Return what `pack_message` was given."""
    stop = 5 + int.from_bytes(message[:4], "little")
    table = zlib.decompress(message[5:stop]) if stop > 5 else b""
    places = np.frombuffer(zlib.decompress(message[stop:]), dtype=np.int32 if message[4] == 4 else np.int64)
    return table, places.astype(np.int64)
