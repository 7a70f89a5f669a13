"""A checkpoint, read without a state dict that says what is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import aiodcp
from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointError,
    ClosedError,
    CorruptError,
    LoadError,
    MemoryStorage,
    NotACheckpointError,
    StoredTensor,
    StoredValue,
)

from ..support.counting_storage import CountingStorage
from ..support.ranks import rank_test
from ..support.states import assert_equal, make_state


async def save(state: dict[str, Any], place: Path, **options: Any) -> None:
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save(state, place, **options)).uploaded


def by_aiodcp(state: dict[str, Any], place: Path) -> None:
    with Checkpointer(no_dist=True) as checkpointer:
        checkpointer.save_sync(state, place).uploaded.wait()


def by_dcp(state: dict[str, Any], place: Path) -> None:
    dcp.save(state, checkpoint_id=place, no_dist=True)


def by_torch(state: dict[str, Any], place: Path) -> None:
    torch.save(state, place)


WRITERS: list[tuple[str, Callable[[dict[str, Any], Path], None]]] = [
    ("aiodcp", by_aiodcp),
    ("torch.distributed.checkpoint", by_dcp),
    ("torch.save", by_torch),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_all_of_it_comes_back_nested_as_it_was_saved(
    tmp_path: Path, name: str, write: Callable[[dict[str, Any], Path], None]
) -> None:
    state = make_state(2) | {"quantized": torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8)}
    write(state, tmp_path / "ckpt")
    with aiodcp.open(tmp_path / "ckpt") as ckpt:
        assert ckpt.written_by == name
        assert_equal(state, ckpt.state_dict_sync())
        assert_equal(state["model"], ckpt.state_dict_sync("model")["model"])


async def test_names_shapes_and_places_are_known_without_reading_data(tmp_path: Path) -> None:
    state = make_state()
    await save(state, tmp_path, custom_metadata={"why": "test"})
    storage = CountingStorage()
    async with aiodcp.open(tmp_path, storage=storage) as ckpt:
        assert storage.read.keys() == {".metadata"}
        assert ckpt.custom_metadata == {"why": "test"}
        assert len(ckpt) == len(list(ckpt)) == len(ckpt.keys())
        assert list(ckpt)[:2] == ["model.weight", "model.bias"]
        weight, blob = ckpt["model.weight"], ckpt["blob"]
        assert isinstance(weight, StoredTensor)
        assert (weight.shape, weight.dtype, weight.nbytes) == ((40, 30), torch.float32, 4800)
        assert [(chunk.offsets, chunk.sizes) for chunk in weight.chunks] == [((0, 0), (40, 30))]
        assert weight.chunks[0].nbytes >= 4800
        assert weight.path == ("model", "weight")
        assert isinstance(blob, StoredValue)
        assert "model.nothing" not in ckpt
        with pytest.raises(KeyError):
            ckpt["model.nothing"]
        assert storage.read.keys() == {".metadata"}
    with pytest.raises(ClosedError):
        len(ckpt)


async def test_one_tensor_many_and_rows(tmp_path: Path) -> None:
    state = make_state(5)
    await save(state, tmp_path)
    model = state["model"]
    async with aiodcp.open(tmp_path) as ckpt:
        assert_equal(model["weight"], await ckpt.read("model.weight"))
        assert await ckpt.read("name") == "state 5"
        assert_equal({f"model.{name}": each for name, each in model.items()}, await ckpt.read("model.*"))
        assert_equal({f"model.{name}": each for name, each in model.items()}, await ckpt.read("model"))
        assert (await ckpt.read(lambda name: name.endswith("bias"))).keys() == {"model.bias"}
        assert (await ckpt.read(["epoch", "*.scalar"])).keys() == {"epoch", "model.scalar"}
        weight = model["weight"]
        for rows in (slice(3, 9), slice(None, 5), slice(-2, None), slice(50, 60), slice(4, 4)):
            assert_equal(weight[rows], await ckpt.read("model.weight", rows))
        assert_equal(weight[1:5, 2:4], await ckpt.read("model.weight", (slice(1, 5), slice(2, 4))))
        half = await ckpt.read("model", dtype=torch.float16)
        assert half["model.weight"].dtype is half["model.bias"].dtype is torch.float16
        assert half["model.ids"].dtype is torch.int64


async def test_what_cannot_be_meant_is_named(tmp_path: Path) -> None:
    await save(make_state(), tmp_path)
    async with aiodcp.open(tmp_path) as ckpt:
        for call, argument, text in [
            (ckpt.read("model.wieght"), "what", "did you mean model.weight"),
            (ckpt.read("nothing.*"), "what", "nothing"),
            (ckpt.read(3), "what", "int"),  # type: ignore[call-overload, unused-ignore, arg-type]
            (ckpt.read(["a", 3]), "what", "3"),  # type: ignore[list-item]
            (ckpt.read(lambda name: 1 / 0 > 1), "what", "ZeroDivisionError"),
            (ckpt.read("epoch", slice(1)), "rows", "not a tensor"),
            (ckpt.read("model.*", slice(1)), "rows", "one tensor"),
            (ckpt.read("model.weight", slice(0, 4, 2)), "rows", "step"),
            (ckpt.read("model.weight", (slice(1), slice(1), slice(1))), "rows", "2 dimensions"),
            (ckpt.read("model.weight", 3), "rows", "slice"),  # type: ignore[arg-type]
            (ckpt.read("model.weight", slice("a")), "rows", "integers"),
            (ckpt.read("model.weight", dtype="float16"), "dtype", "float16"),  # type: ignore[arg-type]
            (ckpt.read("model.weight", device="nowhere"), "device", "nowhere"),
            (ckpt.read("model.weight", placements=[Shard(0)]), "placements", "device_mesh"),
        ]:
            with pytest.raises(ArgumentError, match=text) as caught:
                await call
            assert caught.value.argument == argument
        for order, text in (("size", "must be"), (["model.weight", "gone"], "gone")):
            with pytest.raises(ArgumentError, match=text):
                async for _ in ckpt.stream(order=order):
                    pass
    with pytest.raises(NotACheckpointError):
        async with aiodcp.open(tmp_path / "nothing"):
            pass


@pytest.mark.parametrize("write", [by_aiodcp, by_dcp])
async def test_one_tensor_costs_little_more_than_its_own_bytes(
    tmp_path: Path, write: Callable[[dict[str, Any], Path], None]
) -> None:
    state = {f"layers.{number}.weight": torch.randn(64, 256) for number in range(100)} | {"w": torch.randn(4096, 256)}
    await asyncio.to_thread(write, state, tmp_path)
    storage = CountingStorage()
    async with aiodcp.open(tmp_path, storage=storage) as ckpt:
        before = storage.nbytes
        assert_equal(state["w"], await ckpt.read("w"))
        assert storage.nbytes - before <= 1.2 * state["w"].nbytes
        before = storage.nbytes
        assert_equal(state["w"][1000:1500], await ckpt.read("w", slice(1000, 1500)))
        assert storage.nbytes - before <= 1.2 * state["w"][1000:1500].nbytes
        before = storage.nbytes
        assert_equal(state["layers.7.weight"], await ckpt.read("layers.7.weight"))
        assert storage.nbytes - before <= 1.2 * state["layers.7.weight"].nbytes


async def test_tensors_stream_in_any_order_and_bounded(tmp_path: Path) -> None:
    state = {f"w{number:02}": torch.full((1000,), float(number)) for number in reversed(range(50))} | {"n": 3}
    await save(state, tmp_path)
    storage = CountingStorage()
    async with aiodcp.open(tmp_path, storage=storage) as ckpt:
        for order, expected in (
            ("stored", None),
            ("saved", list(state)),
            ("name", sorted(state)),
            (["w03", "n", "w01"], ["w03", "n", "w01"]),
        ):
            seen = {}
            async for fqn, value in ckpt.stream(order=order, max_bytes=20_000):
                seen[fqn] = value
            assert expected is None or list(seen) == expected
            assert_equal({name: state[name] for name in seen}, seen)
        assert [fqn async for fqn, _ in ckpt.stream("w0*", order="name")] == [f"w{n:02}" for n in range(10)]
        before = storage.nbytes
        async with aclosing(ckpt.stream(order="name", max_bytes=20_000)) as stream:
            async for fqn, _ in stream:
                if fqn == "w05":
                    break
        assert storage.nbytes - before < 100_000  # of 200,000: what is ahead is bounded
        assert_equal(state["w07"], await ckpt.read("w07"))  # and nothing is disturbed


async def test_a_stream_can_be_cancelled_in_the_middle(tmp_path: Path) -> None:
    await save({f"w{number}": torch.ones(1000) for number in range(50)}, tmp_path)
    async with aiodcp.open(tmp_path) as ckpt:
        arrived = asyncio.Event()

        async def consume() -> None:
            async for _ in ckpt.stream(max_bytes=8000):
                arrived.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(consume())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert torch.equal(await ckpt.read("w3"), torch.ones(1000))


def test_streams_without_an_event_loop(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((1000,), float(number)) for number in range(9)}
    by_aiodcp(state, tmp_path)
    with aiodcp.open(tmp_path) as ckpt:
        assert_equal(state, dict(ckpt.stream_sync(order="name", max_bytes=9000)))
        assert_equal(state["w3"], ckpt.read_sync("w3"))


@rank_test(2)
async def test_shards_are_read_by_who_holds_them(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(2048.0 * 256).view(2048, 256)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "b": torch.ones(3), "n": 3}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
    storage = CountingStorage()
    async with aiodcp.open(tmp_path, storage=storage) as ckpt:
        stored = ckpt["w"]
        assert isinstance(stored, StoredTensor)
        assert [chunk.offsets for chunk in stored.chunks] == [(0, 0), (1024, 0)]
        before = storage.nbytes
        for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
            made = await ckpt.read("w", device_mesh=mesh, placements=placements)
            assert isinstance(made, DTensor)
            assert torch.equal(made.to_local(), distribute_tensor(whole, mesh, placements).to_local())
            if placements == [Shard(0)]:
                assert storage.nbytes - before <= 0.6 * whole.nbytes
        state_dict = await ckpt.state_dict(
            device_mesh=mesh, placements=lambda stored: [Shard(0) if len(stored.shape) > 1 else Replicate()]
        )
        assert state_dict["n"] == 3
        assert state_dict["w"].placements == (Shard(0),)
        assert state_dict["b"].placements == (Replicate(),)


async def test_damage_and_what_was_replaced_meanwhile(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000), "b": torch.zeros(1000)}
    await save(state, tmp_path)
    [path] = tmp_path.glob("*.distcp")
    data = path.read_bytes()
    place = data.index(torch.ones(9).numpy().tobytes())
    path.write_bytes(data[:place] + b"\1" + data[place + 1 :])
    async with aiodcp.open(tmp_path) as ckpt:
        assert_equal(state["b"], await ckpt.read("b"))
        with pytest.raises(CorruptError, match="CRC32"):
            await ckpt.read("a")
    async with aiodcp.open(tmp_path, check_crc=False) as ckpt:
        await ckpt.read("a")
    async with aiodcp.open(tmp_path) as ckpt:
        await save(state, tmp_path)
        with pytest.raises(LoadError, match="replaced since it was opened"):
            await ckpt.read("a")
    async with aiodcp.open(tmp_path) as ckpt:
        assert_equal(state["a"], await ckpt.read("a"))
        await save(state, tmp_path)
        assert_equal(state["b"], await ckpt.read("b"))  # of the file that is open


async def test_files_are_closed_and_many_reads_run_at_once(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((5000,), float(number)) for number in range(40)}
    await save(state, tmp_path)
    storage = CountingStorage()
    async with aiodcp.open(tmp_path, storage=storage) as ckpt:
        values = await asyncio.gather(*(ckpt.read(name) for name in state))
        assert_equal(state, dict(zip(state, values, strict=True)))
        assert storage.opened
    assert not storage.opened


async def test_values_are_safe_by_default(tmp_path: Path) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        with pytest.warns(UserWarning, match="f is not plain data"):
            await (await checkpointer.save({"f": print, "n": 1}, "ckpt")).uploaded
    async with aiodcp.open("ckpt", storage=storage) as ckpt:
        assert await ckpt.read("n") == 1
        with pytest.raises(aiodcp.UnsafeError, match="print"):
            await ckpt.read("f")
        with pytest.raises(CheckpointError):
            await ckpt.state_dict()
    async with aiodcp.open("ckpt", storage=storage, weights_only=False) as ckpt:
        assert await ckpt.read("f") is print


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"dtype": torch.qint8}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"dtype": torch.float4_e2m1fn_x2}, "dtype"),
        ({"dtype": "bf16"}, "dtype"),
        ({"device": "meta"}, "device"),
        ({"device": "nowhere"}, "device"),
        ({"device": "xpu:3"}, "device"),
        ({"device_mesh": 5, "placements": [Shard(0)]}, "device_mesh"),
    ],
)
async def test_arguments_that_cannot_be_used_are_refused(
    arguments: dict[str, Any], argument: str, tmp_path: Path
) -> None:
    await save({"w": torch.zeros(3)}, tmp_path)
    async with aiodcp.open(tmp_path) as ckpt:
        with pytest.raises(ArgumentError) as caught:
            await ckpt.read("w", **arguments)
        assert caught.value.argument == argument
        with pytest.raises(ArgumentError, match="order"):
            async for _ in ckpt.stream(order=5):  # type: ignore[arg-type]
                pass


@rank_test(2)
async def test_all_of_a_training_state_is_read_into_shards(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    state = {"w": torch.arange(8.0).view(4, 2), "step": torch.tensor(3.0), "n": 3}
    if rank == 0:
        await save(state, tmp_path / "ckpt")
    torch.distributed.barrier()
    async with aiodcp.open(tmp_path / "ckpt") as ckpt:
        for placements in ([Shard(0)], [Shard(-1)], (Shard(1),), lambda stored: [Shard(0)]):
            found = await ckpt.state_dict(device_mesh=mesh, placements=placements)
            assert found["step"].placements == (Replicate(),)
            assert_equal(
                state, {name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in found.items()}
            )
        for wrong in (
            Shard(0),
            "x",
            [None],
            [Shard(0), Shard(1)],
            [],
            [Shard(2)],
            [Shard(-3)],
            lambda stored: 1 / 0,
            7,
        ):
            with pytest.raises(ArgumentError) as caught:
                await ckpt.state_dict(device_mesh=mesh, placements=wrong)  # type: ignore[arg-type]
            assert caught.value.argument == "placements"
