"""Checkpoints in other formats, and back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import aiodcp
from aiodcp import ArgumentError, Checkpointer, CorruptError, NotACheckpointError, WriteError
from aiodcp._telemetry.progress_bar import NoBar

from ..support.states import assert_equal, blank, make_state


async def save(state: dict[str, Any], place: Path) -> None:
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save(state, place)).uploaded


async def test_a_model_out_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = {
        "model": {"embed.weight": torch.randn(5, 3), "head.weight": torch.zeros(5, 3), "ids": torch.arange(3)},
        "optim": {"lr": 0.1},
    }
    state["model"]["head.weight"] = state["model"]["embed.weight"].clone()  # type: ignore[index]
    await save(state, tmp_path / "ckpt")
    done = await aiodcp.export(
        tmp_path / "ckpt",
        tmp_path / "hf",
        include="model",
        rename={"model": ""},
        dtype=torch.bfloat16,
        tied={"head.weight": "embed.weight"},
    )
    assert done.files == [str(tmp_path / "hf" / "model.safetensors")]
    assert (done.tensors, done.left_out) == (2, [])
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    expected = state["model"]["embed.weight"].bfloat16()  # type: ignore[index]
    assert_equal({"embed.weight": expected, "ids": torch.arange(3)}, dict(sorted(loaded.items())))
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


async def test_a_snapshot_and_an_open_checkpoint(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3, 4), "b": torch.randn(3).half()}, "n": 3}
    async with Checkpointer(no_dist=True) as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path / "ckpt")
        async with ckpt.snapshot() as view:
            await aiodcp.export(view, tmp_path / "a", rename={"model": ""})
            await aiodcp.export(view, tmp_path / "half", dtype=torch.float16)
            with pytest.raises(ArgumentError, match="only tensors"):
                await aiodcp.export(view, tmp_path / "state.pt", format="torch")
        await ckpt.uploaded
    async with aiodcp.open(tmp_path / "ckpt") as stored:
        await aiodcp.export(stored, tmp_path / "b", rename={"model": ""})
        assert_equal(state["model"]["w"], await stored.read("model.w"))  # type: ignore[index]
    for folder in ("a", "b"):
        assert_equal(
            state["model"], dict(sorted(load_file(tmp_path / folder / "model.safetensors").items(), reverse=True))
        )
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}


async def test_shards_are_of_a_bounded_size_and_load_again(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((100,), float(number)) for number in range(10)} | {"n": 3}
    await save(state, tmp_path / "ckpt")
    done = await aiodcp.export(tmp_path / "ckpt", tmp_path / "hf", shard_nbytes=1000)
    assert done.left_out == ["n"]
    assert len(done.files) == 6
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    loaded = {f"w{number}": torch.zeros(100) for number in range(10)}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(loaded, tmp_path / "hf")
    del state["n"]
    assert_equal(state, loaded)


async def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    await save({"a": torch.ones(2), "b": torch.zeros(2), "n": 3}, tmp_path / "ckpt")
    out = tmp_path / "hf"
    for options, argument in (
        ({"include": "c"}, "include"),
        ({"exclude": "*"}, "include"),
        ({"include": "n"}, "include"),
        ({"rename": lambda name: "same"}, "rename"),
        ({"rename": {"a": ""}}, "rename"),
        ({"tied": {"a": "b"}}, "tied"),
        ({"tied": {"a": "gone"}}, "tied"),
        ({"format": "gguf"}, "format"),
        ({"shard_nbytes": 0}, "shard_nbytes"),
        ({"format": "torch", "rename": {"a": "b"}}, "rename"),
    ):
        with pytest.raises(ArgumentError) as caught:
            await aiodcp.export(tmp_path / "ckpt", out, **options)
        assert caught.value.argument == argument
        assert not out.exists()
    with pytest.raises(ArgumentError, match="is a URL"):
        await aiodcp.export(tmp_path / "ckpt", "s3://bucket/out")
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    with pytest.raises(WriteError, match="will not be overwritten"):
        await aiodcp.export(tmp_path / "ckpt", out)
    assert (out / "model.safetensors").read_text() == "mine"
    with pytest.raises(NotACheckpointError):
        await aiodcp.export(tmp_path / "nothing", out)


async def test_convert_makes_a_checkpoint_of_dcps_of_anything(tmp_path: Path) -> None:
    state = make_state(1)
    torch.save(state, tmp_path / "state.pt")
    where = await aiodcp.convert(tmp_path / "state.pt", tmp_path / "one")
    assert where == str(tmp_path / "one")
    loaded = blank(state)
    dcp.load(loaded, checkpoint_id=where, no_dist=True)
    assert_equal(state, loaded)
    (tmp_path / "hf").mkdir()
    save_file(state["model"], tmp_path / "hf" / "model.safetensors")
    await aiodcp.convert(tmp_path / "hf", tmp_path / "two", exclude="scalar", dtype=torch.float16)
    async with aiodcp.open(tmp_path / "two") as ckpt:
        assert "scalar" not in ckpt
        assert (await ckpt.read("weight")).dtype is torch.float16
    with pytest.raises(WriteError, match="will not be overwritten"):
        await aiodcp.convert(tmp_path / "hf", tmp_path / "two")


def test_without_an_event_loop(tmp_path: Path) -> None:
    with Checkpointer() as checkpointer:
        for number in (1, 2):
            checkpointer.save_sync({"w": torch.full((3,), float(number))}, tmp_path / str(number)).uploaded.wait()
    assert aiodcp.verify_sync(tmp_path / "1") == []
    [difference] = aiodcp.diff_sync(tmp_path / "1", tmp_path / "2")
    assert (difference.fqn, difference.count, difference.largest) == ("w", 3, 1.0)
    aiodcp.export_sync(tmp_path / "1", tmp_path / "hf")
    assert not aiodcp.diff_sync(tmp_path / "1", tmp_path / "hf")
    aiodcp.convert_sync(tmp_path / "hf", tmp_path / "3")
    assert not aiodcp.diff_sync(tmp_path / "1", tmp_path / "3")


async def test_an_export_that_is_cancelled_leaves_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    await save({f"w{number}": torch.zeros(1000) for number in range(6)}, tmp_path / "ckpt")

    class CancelAfterTwo(NoBar):
        count = 0

        def advance(self, nbytes: int) -> None:
            self.count += 1
            if self.count == 2:
                task.cancel()

    def export(bar: NoBar) -> Coroutine[Any, Any, aiodcp.Exported]:
        return aiodcp.export(tmp_path / "ckpt", tmp_path / "hf", shard_nbytes=4000, bar=bar)

    task = asyncio.create_task(export(CancelAfterTwo()))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "hf").iterdir()) == []
    assert len((await export(NoBar())).files) == 7


async def test_a_part_of_a_model_is_not_taken_for_all_of_it(tmp_path: Path) -> None:
    await save({f"w{number}": torch.zeros(1000) for number in range(3)}, tmp_path / "ckpt")
    await aiodcp.export(tmp_path / "ckpt", tmp_path / "hf", shard_nbytes=4000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(
        json.dumps(content | {"weight_map": content["weight_map"] | {"zz": "model-00001-of-00003.safetensors"}})
    )
    with pytest.raises(CorruptError, match="zz"):
        async with aiodcp.open(tmp_path / "hf"):
            pass
    index.write_text("[" * 100_000)
    [found] = await aiodcp.verify(tmp_path / "hf")
    assert "is no index of files" in found.problem
    index.unlink()
    async with aiodcp.open(tmp_path / "hf") as ckpt:
        assert set(ckpt) == {"w0", "w1", "w2"}
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"model-00001-of-00003\.safetensors is one of 3"):
        async with aiodcp.open(tmp_path / "hf"):
            pass


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"dtype": "bf16"}, "dtype"),
        ({"dtype": torch.int8}, "dtype"),
        ({"out": "o\0o"}, "out"),
        ({"out": ""}, "out"),
    ],
)
async def test_arguments_that_cannot_be_used_are_refused(
    arguments: dict[str, Any], argument: str, tmp_path: Path
) -> None:
    await save({"w": torch.zeros(3)}, tmp_path / "ckpt")
    with pytest.raises(ArgumentError) as caught:
        await aiodcp.export(tmp_path / "ckpt", **({"out": tmp_path / "hf"} | arguments))
    assert caught.value.argument == argument
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
