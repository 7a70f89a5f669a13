"""The plan of all ranks, made on arrays: compared with what DCP's own planner makes of the same."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from aiodcp import CaptureError
from aiodcp._format.dcp import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    KeyPath,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from aiodcp._format.extension import Containers
from aiodcp._format.index_reader import MAGIC, read_index, without_pickle
from aiodcp._format.indexed_metadata import IndexedTensor, chunks_over
from aiodcp._format.item_tables import ItemTables
from aiodcp._format.layout import FIRST_SEGMENT_NBYTES, lay_out, place_all
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._format.naming import split_piece
from aiodcp._format.outline import decode_outline, outline_of
from aiodcp._format.pickle_screen import is_harmless
from aiodcp._format.seal import open_seal, seal
from aiodcp._save.manifest import ByteRange, make_manifest
from aiodcp._save.plan import LocalPlan
from aiodcp._save.plan_cache import LocalMessage, message_of, plan_for_all
from aiodcp._save.sharing import nbytes_of
from aiodcp._save.state_table import StateTable, places_of
from aiodcp._save.table_plan import TablePlan


def tensor(
    fqn: str,
    size: Sequence[int],
    offsets: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> WriteItem:
    """Return an item as DCP's planner makes it: of a whole tensor, or of a shard."""
    is_shard = offsets is not None
    offsets, sizes = offsets or [0] * len(size), size if sizes is None else sizes
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(size))
    kind = WriteItemType.SHARD if is_shard else WriteItemType.TENSOR
    return WriteItem(index=MetadataIndex(fqn, torch.Size(offsets)), type=kind, tensor_data=data)


def value(fqn: str) -> WriteItem:
    return WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)


def local_of(items: Sequence[WriteItem], *, piece_nbytes: int | None = None, **more: Any) -> LocalPlan:
    frozen = {number for number, item in enumerate(items) if item.type is WriteItemType.BYTE_IO}
    paths: dict[str, KeyPath] = {item.index.fqn: tuple(item.index.fqn.split(".")) for item in items}
    return LocalPlan(
        items=list(items),
        sources=list(range(len(items))),
        frozen=frozen | more.pop("frozen", set()),
        paths=paths,
        piece_nbytes=piece_nbytes,
        **more,
    )


def plan(locals_: Sequence[LocalPlan]) -> TablePlan:
    """Plan as the coordinator does, from what the ranks send."""
    messages = [message_of(local, "table" if len(locals_) > 1 else "none", rank) for rank, local in enumerate(locals_)]
    known = messages[0].digest
    sent = [each.whole if each.digest != known else each.without_table for n, each in enumerate(messages)]
    planned, _, _ = plan_for_all(sent, messages[0], None, 0)
    assert isinstance(planned, TablePlan)
    return planned


def kept_items(planned: TablePlan, locals_: Sequence[LocalPlan]) -> list[list[WriteItem]]:
    return [[local.items[number] for number in planned.kept[rank].tolist()] for rank, local in enumerate(locals_)]


def rendered(planned: TablePlan, locals_: Sequence[LocalPlan]) -> tuple[Metadata, bytes, list[list[ByteRange]]]:
    """Return the metadata of a save, its pickle, and the ranges of frozen values that it was given."""
    manifest = make_manifest([planned])
    ranges = [
        [ByteRange(offset=1000 * rank + number, nbytes=7 + number) for number, kept in enumerate(numbers) if kept]
        for rank, numbers in enumerate(
            [number in local.frozen for number in planned.kept[rank].tolist()] for rank, local in enumerate(locals_)
        )
    ]
    pickled = manifest.render("run/step-1", "0123456789abcdef" * 2, [ranges])
    index = manifest.index("0123456789abcdef" * 2, [ranges])
    data = seal(pickled, b"", [0] * len(manifest.table_files("0123456789abcdef" * 2)), index)
    found, sealed = open_seal(data)
    assert bytes(found) == pickled
    assert is_harmless(pickled)
    metadata: Metadata = pickle.loads(pickled)  # as torch reads it
    assert repr(read_metadata(pickled, "")) == repr(metadata)  # of classes of its own
    assert decode_outline(sealed.outline) == outline_of(metadata)
    check_index(metadata, data)
    return metadata, pickled, ranges


def check_index(metadata: Metadata, data: bytes) -> None:
    """Compare what the columns say with what the pickle does."""
    tail = without_pickle(data)
    assert tail.startswith(MAGIC)
    indexed, _ = read_index(tail, "")
    assert list(indexed.state_dict_metadata) == list(metadata.state_dict_metadata)
    for fqn, entry in metadata.state_dict_metadata.items():
        found = indexed.state_dict_metadata[fqn]
        if isinstance(entry, BytesStorageMetadata):
            assert isinstance(found, BytesStorageMetadata)
            continue
        assert isinstance(found, IndexedTensor)
        assert (found.properties, found.size, found.chunks) == (entry.properties, entry.size, entry.chunks)
        for part in entry.chunks[:3]:
            near = chunks_over(found, part)
            assert len(near) == 1 or not part.sizes.numel()
            assert not part.sizes.numel() or near == [part]
            assert indexed.find(fqn, part.offsets) == metadata.storage_data[MetadataIndex(fqn, part.offsets)]
    assert indexed.storage_data == metadata.storage_data
    assert indexed.planner_data == metadata.planner_data
    assert vars(indexed)["aiodcp"] == {
        key: value for key, value in vars(metadata)["aiodcp"].items() if key in vars(indexed)["aiodcp"]
    }
    files = {info.relative_path for info in metadata.storage_data.values()}
    tables = [7 for _ in {split_piece(file)[0] for file in files}]
    one, other = ItemTables(indexed, tables), ItemTables(metadata, tables)
    assert {file: one.file_of(file) for file in files} == {file: other.file_of(file) for file in files}
    for file in files:
        assert one.nbytes(file) == other.nbytes(file)
        if one.nbytes(file):
            table = bytes(range(256)) * (one.nbytes(file) // 256 + 1)
            table = table[: one.nbytes(file)]
            for each in (one, other):
                each._crcs[file] = zlib.crc32(table)
            assert one.read(file, table) == other.read(file, table)


def check(locals_: Sequence[LocalPlan]) -> TablePlan:
    """Plan, and compare all of it with what DCP's planner makes of the same shares."""
    planned = plan(locals_)
    kept = kept_items(planned, locals_)
    written = Counter((item.index.fqn, item.index.offset) for items in kept for item in items)
    held = {(item.index.fqn, item.index.offset) for local in locals_ for item in local.items}
    assert written == Counter(held)  # each once
    _, expected = create_default_global_save_plan([SavePlan(items) for items in kept])
    metadata, _, ranges = rendered(planned, locals_)
    assert metadata.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    for fqn, entry in expected.state_dict_metadata.items():
        found = metadata.state_dict_metadata[fqn]
        if isinstance(entry, BytesStorageMetadata):
            assert isinstance(found, BytesStorageMetadata)
            continue
        assert isinstance(found, TensorStorageMetadata)
        assert (found.properties, found.size) == (entry.properties, entry.size)
        order = sorted(entry.chunks, key=lambda chunk: chunk.offsets)
        assert found.chunks == order
    assert metadata.planner_data == {fqn: path for local in locals_ for fqn, path in local.paths.items()}
    for rank, (local, items) in enumerate(zip(locals_, kept, strict=True)):
        names = [item.index.fqn for item in items]
        frozen = [number in local.frozen for number in planned.kept[rank].tolist()]
        staged = [item for item, is_frozen in zip(items, frozen, strict=True) if not is_frozen]
        assert all(item.tensor_data is not None for item in staged)
        layout = lay_out(
            [(item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)) for item in staged],  # type: ignore[union-attr]
            local.piece_nbytes,
        )
        assert planned.pieces[rank] == (layout.pieces if names else -1)
        tail = iter(ranges[rank])
        for item, is_frozen in zip(items, frozen, strict=True):
            info = metadata.storage_data[item.index]
            assert info.relative_path.startswith(f"__{rank}_0_")
            if is_frozen:
                span = next(tail)
                assert (info.offset, info.length) == (span.offset, span.nbytes)
                continue
            record = [each.index for each in staged].index(item.index)
            [number] = [n for n, each in enumerate(layout.segments) if each.first <= record < each.stop_record]
            start = layout.segments[number].start if layout.in_pieces else 0
            assert (info.offset, info.length) == (layout.offsets[record] - start, layout.frames[record].item_nbytes)
            is_last = not layout.in_pieces or number == layout.pieces
            assert info.relative_path.count("_") == (4 if is_last else 5)
    return planned


def cut(size: int, parts: int) -> list[tuple[int, int]]:
    """Return offsets and lengths as torch shards a dimension: the last ones may be shorter, or empty."""
    step = -(-size // parts)
    return [(min(n * step, size), max(min(step, size - n * step), 0)) for n in range(parts)]


@pytest.mark.parametrize("seed", range(6))
def test_it_plans_as_dcp_does(seed: int) -> None:
    chance = random.Random(seed)
    rows, columns = chance.choice([(1, 1), (4, 1), (2, 3), (5, 2), (12, 1)])
    ranks = rows * columns
    items: list[list[WriteItem]] = [[] for _ in range(ranks)]
    for number in range(chance.randint(5, 25)):
        fqn = f"model.{chance.choice('abcdef')}.{number}"
        size = [chance.randint(1, 9) for _ in range(chance.randint(0, 4))]
        dtype = chance.choice([torch.float32, torch.int8, torch.float64, torch.bfloat16])
        kind = chance.choice(["replicated", "value", "rows", "grid", "alone"])
        alone = chance.randrange(ranks)
        for rank in range(ranks):
            row, column = divmod(rank, columns)
            if kind == "value":
                items[rank].append(value(fqn))
            elif kind == "alone":
                if rank == alone:
                    items[rank].append(tensor(fqn, size, dtype=dtype))
            elif kind == "replicated" or not size:
                items[rank].append(tensor(fqn, size, dtype=dtype))
            else:
                offsets, sizes = [0] * len(size), list(size)
                offsets[0], sizes[0] = cut(size[0], rows)[row]
                if kind == "grid" and len(size) > 1:
                    offsets[1], sizes[1] = cut(size[1], columns)[column]
                items[rank].append(tensor(fqn, size, offsets, sizes, dtype=dtype))
    check([local_of(each) for each in items])


def test_many_chunks_and_files_are_said_as_few_are() -> None:
    ranks = 300  # more than the short opcodes of the memo can count
    locals_ = []
    for rank in range(ranks):
        items = [tensor(f"w{n}", [ranks * 3, 5], [rank * 3, 0], [3, 5]) for n in range(3)]
        items += [tensor("large", [ranks * 1000, 70_000], [rank * 1000, 0], [1000, 70_000]), tensor("same", [4])]
        locals_.append(local_of([*items, value("step")]))
    planned = check(locals_)
    assert sum(len(planned.kept[rank]) for rank in range(ranks)) == 4 * ranks + 2


@pytest.mark.parametrize("piece_nbytes", [None, 1 << 16])
def test_files_in_segments_and_pieces(piece_nbytes: int | None) -> None:
    for ranks in (1, 3, 20):
        locals_ = []
        for rank in range(ranks):
            shape = [1 << 10, 1 + rank]
            items = [
                tensor(f"w{n}", [shape[0] * 1, shape[1]]) if ranks == 1 else tensor(f"r{rank}.w{n}", shape)
                for n in range(8)
            ]
            large = FIRST_SEGMENT_NBYTES // 8
            items += [tensor(f"r{rank}.large{n}", [large]) for n in range(5)] if piece_nbytes is None else []
            locals_.append(local_of([*items, value(f"r{rank}.step")], piece_nbytes=piece_nbytes))
        check(locals_)


def test_frozen_tensors_and_containers_and_values_without_items() -> None:
    opaque = tensor("sparse", [3, 3])
    local = local_of([opaque, tensor("w", [3]), value("n")], frozen={0})
    local.paths["elsewhere"] = ("elsewhere",)
    containers = Containers([("empty",), ("i", "e")], [("i",)])
    locals_ = [dataclasses.replace(local, containers=containers), dataclasses.replace(local, containers=containers)]
    planned = plan(locals_)
    metadata, _, _ = rendered(planned, locals_)
    mark: dict[str, Any] = vars(metadata)["aiodcp"]
    assert (mark["opaque"], mark["empty"], mark["int_keys"]) == (["sparse"], [("empty",), ("i", "e")], [("i",)])
    assert metadata.planner_data["elsewhere"] == ("elsewhere",)
    assert "elsewhere" not in metadata.state_dict_metadata


def test_states_that_differ_by_rank_are_joined() -> None:
    shared = [tensor("embed", [8, 2]), value("step")]
    locals_ = [
        local_of([*shared, *(tensor(f"stage{rank // 2}.w{n}", [4, 4], [2 * (rank % 2), 0], [2, 4]) for n in range(3))])
        for rank in range(6)
    ]
    check(locals_)


def test_what_is_each_ranks_own_is_in_one_table() -> None:
    def of_rank(rank: int, *, odd: bool = False) -> LocalPlan:
        key = f"rank-{rank}"
        items = [tensor("w", [6, 2], [rank, 0], [1, 2]), tensor(f"rng.{key}.cpu", [4]), value(f"rng.{key}.n")]
        items += [value(f"data.{key}"), *([value("rank-2.odd")] if odd else [])]
        return local_of(items, containers=Containers([("rng", key, "empty")], [("rng", key)]))

    locals_ = [of_rank(rank) for rank in range(6)]
    messages = [message_of(local, "table", rank) for rank, local in enumerate(locals_)]
    assert len({message.digest for message in messages}) == 1
    planned = check(locals_)
    assert planned.containers.int_keys == [("rng", f"rank-{rank}") for rank in range(6)]
    assert len(planned.containers.empty) == 6
    check([of_rank(rank, odd=True) for rank in range(6)])  # a name that only looks like it
    check([local_of([tensor("\0own", [2]), value("a.\0own.b")]) for _ in range(3)])
    check([local_of([tensor("\0own", [2]), value("a.\0own.b")])])


def test_each_rank_writes_about_as_much() -> None:
    ranks = 8
    locals_ = [local_of([tensor(f"w{n}", [64 + n]) for n in range(200)]) for _ in range(ranks)]
    planned = check(locals_)
    load = [sum(map(nbytes_of, items)) for items in kept_items(planned, locals_)]
    assert max(load) - min(load) < 1000
    # Shards that two ranks hold each, as of HSDP.
    replicas = [
        local_of([tensor(f"w{n}", [64, 100], [8 * (rank % 8), 0], [8, 100]) for n in range(50)]) for rank in range(16)
    ]
    planned = check(replicas)
    assert {len(planned.kept[rank]) for rank in range(16)} == {25}


@pytest.mark.parametrize(
    ("one", "other", "problem"),
    [
        ([tensor("w", [3])], [tensor("w", [3], dtype=torch.int8)], r"rank 0 has \(torch.float32, .*rank 1 has"),
        ([tensor("w", [3])], [tensor("w", [4])], "rank 1 has"),
        ([tensor("w", [3])], [value("w")], "rank 1 has no tensor"),
        ([tensor("w", [4], [0], [2])], [tensor("w", [4], [0], [3])], "parts of different sizes"),
        ([tensor("w", [4], [0], [2])], [tensor("w", [4], [3], [1])], "do not cover its shape exactly"),
        ([tensor("w", [4], [0], [3])], [tensor("w", [4], [2], [2])], "do not cover its shape exactly"),
        ([tensor("w", [4], [0], [4])], [tensor("w", [4], [2], [2])], "do not cover its shape exactly"),
        ([tensor("w", [4], [0], [2])], [tensor("w", [4], [2], [3])], "do not cover its shape exactly"),
        ([tensor("w", [4], [-2], [2])], [tensor("w", [4], [0], [4])], "do not cover its shape exactly"),
        ([], [], "nothing to save"),
    ],
)
def test_states_that_do_not_fit_together_are_refused(
    one: list[WriteItem], other: list[WriteItem], problem: str
) -> None:
    with pytest.raises(CaptureError, match=problem):
        plan([local_of(one), local_of(other)])


def test_ranks_that_cut_files_at_different_sizes_are_refused() -> None:
    with pytest.raises(CaptureError, match="different sizes"):
        plan([local_of([tensor("w", [3])], piece_nbytes=n) for n in (1 << 20, 1 << 21)])


def test_parts_that_are_no_grid_may_still_make_up_a_whole() -> None:
    parts = [([0, 0], [2, 2]), ([0, 2], [1, 2]), ([1, 2], [1, 2]), ([2, 0], [2, 3]), ([2, 3], [2, 1])]
    check([local_of([tensor("w", [4, 4], *each)]) for each in parts])
    with pytest.raises(CaptureError, match="do not cover"):
        plan([local_of([tensor("w", [4, 4], *each)]) for each in [*parts[:-1], ([1, 3], [2, 1])]])


def test_a_table_says_the_same_when_it_is_read_again() -> None:
    items = [tensor("a", [3, 2], [1, 0], [2, 2]), value("n"), tensor("\ud800", [], dtype=torch.int64)]
    local = local_of(items, containers=Containers([("e", 0)], [("i",)]), piece_nbytes=5)
    local.paths["a"] = ("a", 0, "b")
    table = StateTable.of(local)
    assert StateTable.unpack(table.pack()) == table
    assert table.pack() == StateTable.of(dataclasses.replace(local)).pack()
    assert places_of(local).tolist() == [1, 0, 2, 2]


def test_what_ranks_send_is_small_and_the_table_is_sent_once() -> None:
    ranks = 64
    locals_ = [
        local_of([tensor(f"layers.{n}.weight", [8 * ranks, 64], [8 * rank, 0], [8, 64]) for n in range(500)])
        for rank in range(ranks)
    ]
    messages: list[LocalMessage] = [message_of(local, "table", rank) for rank, local in enumerate(locals_)]
    assert len({message.digest for message in messages}) == 1
    assert max(len(message.without_table) for message in messages) < 1024
    assert len(messages[0].whole) < 16 << 10
    sent = [message.whole if rank == 0 else message.without_table for rank, message in enumerate(messages)]
    _, _, parts = plan_for_all(sent, messages[0], None, 0)
    assert max(map(len, parts)) < 4096


def test_files_are_placed_side_by_side_as_one_by_one() -> None:
    chance = random.Random(0)
    for piece_nbytes in (None, 1 << 20):
        files = [
            [chance.choice([100, 5000, 3 << 20, 40 << 20]) for _ in range(chance.randint(0, 30))] for _ in range(40)
        ]
        flat = np.array([nbytes for each in files for nbytes in each], dtype=np.int64)
        bounds = np.cumsum([0, *map(len, files)])
        offsets, segments, more = place_all(flat, bounds, piece_nbytes)
        for file, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            alone = place_all(flat[start:stop], np.array([0, stop - start]), piece_nbytes)
            assert np.array_equal(alone[0], offsets[start:stop])
            assert np.array_equal(alone[1], segments[start:stop])
            assert alone[2][0] == more[file]


def test_a_checkpoint_of_one_rank_is_of_the_same_kind() -> None:
    local = local_of([tensor("w", [2]), value("n")])
    metadata, pickled, _ = rendered(plan([local]), [local])
    assert {type(info) for info in metadata.storage_data.values()} == {StorageInfo}
    assert len(pickled) < 1500
