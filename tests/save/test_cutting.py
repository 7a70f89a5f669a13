"""Large tensors cut into chunks, for stores that take files whole."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from aiodcp._format.chunks import cut, is_whole
from aiodcp._save.cutting import cut_item
from aiodcp._save.planning import plan_local
from aiodcp._state.capture import capture


def _item(tensor: torch.Tensor, offsets: tuple[int, ...] | None = None) -> WriteItem:
    at = torch.Size(offsets or [0] * tensor.dim())
    size = torch.Size(offset + length for offset, length in zip(at, tensor.shape, strict=True))
    data = TensorWriteData(ChunkStorageMetadata(at, tensor.shape), TensorProperties.create_from_tensor(tensor), size)
    return WriteItem(MetadataIndex("w", at), WriteItemType.TENSOR, tensor_data=data)


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ((1000,), 400),
        ((1000,), 396),
        ((1001,), 400),
        ((7, 100), 800),
        ((7, 100), 399),
        ((2, 3, 50), 100),
        ((1, 1, 1000), 64),
        ((100, 1, 3), 24),
        ((5, 5), 1),
    ],
)
def test_the_parts_are_contiguous_small_enough_and_make_up_the_tensor(shape: tuple[int, ...], nbytes: int) -> None:
    tensor = torch.arange(float(prod(shape))).view(shape)
    found = cut_item(_item(tensor), tensor, nbytes)
    chunks = [item.tensor_data.chunk for item, _ in found if item.tensor_data is not None]
    assert is_whole(TensorStorageMetadata(TensorProperties(), tensor.shape, chunks))
    flat = []
    for (item, part), chunk in zip(found, chunks, strict=True):
        view = cut(tensor, part)
        assert view.is_contiguous()
        assert view.nbytes <= max(nbytes, tensor.itemsize)
        assert item.type is WriteItemType.SHARD
        assert (chunk.offsets, chunk.sizes) == part
        assert item.index.offset == chunk.offsets
        flat.append(view.reshape(-1))
    assert torch.equal(torch.cat(flat), tensor.view(-1))


def test_parts_of_a_shard_lie_where_the_shard_does() -> None:
    tensor = torch.arange(40.0).view(10, 4)
    offsets = [item.index.offset for item, _ in cut_item(_item(tensor, (100, 8)), tensor, 64)]
    assert offsets == [torch.Size([100 + row, 8]) for row in (0, 4, 8)]


def test_what_is_small_or_cannot_be_cut_is_left_whole() -> None:
    tensor = torch.arange(100.0)
    assert cut_item(_item(tensor), tensor, 400) == []
    assert cut_item(_item(tensor), tensor.to_sparse(), 10) == []
    assert cut_item(_item(torch.empty(0, 5)), torch.empty(0, 5), 10) == []
    assert cut_item(_item(torch.tensor(1.5)), torch.tensor(1.5), 3) == []


def test_a_plan_has_an_item_and_a_source_for_each_part() -> None:
    captured = capture({"w": torch.arange(100.0), "b": torch.ones(3), "step": 1})
    local = plan_local(captured, 100)
    assert [item.index.fqn for item in local.items] == ["w"] * 4 + ["b", "step"]
    assert local.sources == [3, 4, 5, 6, 1, 2]
    assert [each.source for each in local.cuts] == [0] * 4
    assert plan_local(captured).sources == [0, 1, 2]
