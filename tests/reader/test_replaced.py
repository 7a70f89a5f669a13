"""Checkpoints that are replaced, or contradict themselves, while they are open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import aiodcp
from aiodcp import Checkpointer, CorruptError, LoadError, MemoryStorage
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._format.outline import encode_outline
from aiodcp._format.seal import in_pieces, open_seal, seal

Write = Callable[[float, Path], None]


def by_safetensors(value: float, place: Path) -> None:
    save_file({"w": torch.full((4,), value), "v": torch.zeros(4)}, place.with_suffix(".new"))
    os.replace(place.with_suffix(".new"), place)


def in_place(value: float, place: Path) -> None:
    new = place.with_suffix(".new")
    save_file({"w": torch.full((4,), value), "v": torch.zeros(4)}, new)
    place.write_bytes(new.read_bytes())


def by_torch(value: float, place: Path) -> None:
    torch.save({"w": torch.full((4,), value), "v": torch.zeros(4)}, place)


def by_dcp(value: float, place: Path) -> None:
    dcp.save({"w": torch.full((4,), value), "v": torch.zeros(4)}, checkpoint_id=place, no_dist=True)


@pytest.mark.parametrize("write", [by_safetensors, in_place, by_torch, by_dcp])
@pytest.mark.parametrize("has_read", [False, True])
async def test_what_is_replaced_while_it_is_open_is_an_error(write: Write, has_read: bool, tmp_path: Path) -> None:
    place = tmp_path / "ckpt"
    write(1.0, place)
    async with aiodcp.open(place) as ckpt:
        if has_read:
            assert (await ckpt.read("w")).tolist() == [1.0] * 4
        write(2.0, place)
        with pytest.raises(LoadError, match="has been replaced since it was opened"):
            await ckpt.read("w")
    async with aiodcp.open(place) as ckpt:
        assert (await ckpt.read("w")).tolist() == [2.0] * 4


async def test_what_is_removed_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    by_safetensors(1.0, tmp_path / "w.safetensors")
    async with aiodcp.open(tmp_path / "w.safetensors") as ckpt:
        await ckpt.read("w")
        (tmp_path / "w.safetensors").unlink()
        with pytest.raises(LoadError, match="replaced"):
            await ckpt.read("w")


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries | {"zz": entries["w"]},
        lambda entries: {"w": entries["w"]},
        lambda entries: {"w": entries["v"], "v": entries["v"]},
    ],
)
async def test_an_outline_that_contradicts_the_metadata_is_damage(change: Change) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save({"w": torch.zeros(4), "v": torch.zeros(2, 2)}, "ckpt")).uploaded
    pickled, found = open_seal(storage.files["ckpt"][".metadata"])
    metadata = read_metadata(bytes(pickled), "")
    metadata.state_dict_metadata = change(metadata.state_dict_metadata)
    outline = in_pieces(encode_outline(metadata))
    storage.files["ckpt"][".metadata"] = seal(bytes(pickled), found.custom_metadata, list(found.tables), outline)
    async with aiodcp.open("ckpt", storage=storage) as ckpt:
        with pytest.raises(CorruptError, match="contradicts"):
            await ckpt.read("w")
