"""What `torch.distributed.checkpoint` writes besides its usual format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, zeros

import aiodcp
from aiodcp import Checkpointer, CorruptError

from ..support.ranks import rank_test
from ..support.states import assert_equal, blank, make_state


def save_as_safetensors(state: dict[str, Any], place: Path) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(place, serialization_format=SerializationFormat.SAFETENSORS))


@rank_test(2)
async def test_dcps_safetensors_format_is_read(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(24.0).view(6, 4)
    state = make_state(3) | {"w": distribute_tensor(whole, mesh, [Shard(0)])}
    del state["model"]["scalar"]  # which torch itself cannot write so
    save_as_safetensors(state, tmp_path)
    loaded = blank(state) | {"w": zeros(6, 4, device_mesh=mesh, placements=[Shard(1)])}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(loaded, tmp_path)
    assert torch.equal(loaded.pop("w").full_tensor(), whole)
    del state["w"]
    assert_equal(state, loaded)


def test_dcps_safetensors_format_is_opened_and_its_damage_found(tmp_path: Path) -> None:
    save_as_safetensors({"w": torch.arange(6.0), "n": 3}, tmp_path)
    with aiodcp.open(tmp_path) as ckpt:
        assert "SAFETENSORS" in ckpt.written_by
        assert_equal({"w": torch.arange(6.0), "n": 3}, dict(sorted(ckpt.state_dict_sync().items(), reverse=True)))
    [path] = tmp_path.glob("*.distcp")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"w":{"dtype"', b'"v":{"dtype"'))
    with Checkpointer() as checkpointer, pytest.raises(CorruptError, match="does not have the tensor"):
        checkpointer.load_sync({"w": torch.zeros(6)}, tmp_path)
    path.write_bytes(data[:-4])
    with Checkpointer() as checkpointer, pytest.raises(CorruptError, match="truncated"):
        checkpointer.load_sync({"w": torch.zeros(6)}, tmp_path)


@rank_test(2)
async def test_without_collectives_each_rank_has_its_own(rank: int, size: int, tmp_path: Path) -> None:
    state = {"mine": torch.full((3,), float(rank)), f"only.{rank}": torch.ones(2) + rank, "n": 10 + rank}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path), use_collectives=False)
    torch.distributed.barrier()
    loaded = blank(state)
    async with Checkpointer() as checkpointer:
        await checkpointer.load(loaded, tmp_path)
    assert_equal(state, loaded)
    async with aiodcp.open(tmp_path) as ckpt:  # alone: rank 0's, and what only others have
        assert (await ckpt.read("n")) == 10
        assert torch.equal(await ckpt.read("only.1"), torch.ones(2) + 1)
