"""Files of safetensors: folders of Hugging Face's, single files, those of DCP's own writer for them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, zeros

import aiodcp
from aiodcp import Checkpointer, CorruptError, FormatError, MemoryStorage, MismatchError, NotACheckpointError

from ..support.counting_storage import CountingStorage
from ..support.ranks import rank_test
from ..support.states import assert_equal

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def state_of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"of.{dtype}": torch.randint(0, 256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(4, 6)
        for dtype in DTYPES
        if dtype is not torch.bool
    }
    state["of.bool"] = torch.tensor([True, False, True])
    state["empty"] = torch.empty(0, 3)
    state["scalar"] = torch.tensor(2.5)
    state["large"] = torch.randn(700, 900, generator=generator)
    return state


def save_folder(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """Write as `save_pretrained` does."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("kind", ["file", "folder", "sharded"])
async def test_all_dtypes_and_shapes_load_bit_for_bit(tmp_path: Path, kind: str) -> None:
    state = state_of_all_kinds()
    place = tmp_path / "hf"
    if kind == "sharded":
        save_folder(place, state, 3)
    else:
        place.mkdir()
        save_file(state, place / "model.safetensors")
    where = place / "model.safetensors" if kind == "file" else place
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    made: dict[str, Any] = dict.fromkeys(state)
    async with Checkpointer() as checkpointer:
        assert not await checkpointer.load(loaded, where)
        await checkpointer.load(made, where)
    assert_equal(state, loaded)
    assert_equal(state, made)


async def test_names_of_transformers_and_of_a_training_framework_meet(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    stored = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    blank = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    async with Checkpointer() as checkpointer:
        await checkpointer.load({"model": blank}, tmp_path, rename={"backbone": "model"})
        assert_equal(dict(model.state_dict()), dict(blank.state_dict()))
        with pytest.raises(MismatchError, match="backbone"):
            await checkpointer.load({"model": blank}, tmp_path)
        save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
        with pytest.raises(MismatchError, match=r'rename=\{"": "model"\}'):
            await checkpointer.load({"model": blank}, tmp_path)
        await checkpointer.load({"model": blank}, tmp_path, rename={"": "model"})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


async def test_a_tied_weight_that_is_stored_once_is_not_missing(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.arange(15.0).view(5, 3)}, tmp_path / "model.safetensors")
    tied, loose = Tied(), Tied()
    loose.head.weight = nn.Parameter(torch.zeros(5, 3))
    async with Checkpointer() as checkpointer:
        assert not await checkpointer.load({"m": tied}, tmp_path, rename={"": "m"})
        assert torch.equal(tied.head.weight, torch.arange(15.0).view(5, 3))
        with pytest.raises(MismatchError) as caught:
            await checkpointer.load({"m": loose}, tmp_path, rename={"": "m"})
    assert caught.value.missing == ("m.head.weight",)


@rank_test(2)
async def test_ranks_read_only_the_ranges_of_their_shards(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(2048.0 * 512).view(2048, 512)
    if rank == 0:
        save_folder(tmp_path / "hf", {"w": whole, "v": whole + 1, "b": torch.ones(8)}, 2)
    torch.distributed.barrier()
    storage = CountingStorage()
    state = {name: zeros(2048, 512, device_mesh=mesh, placements=[Shard(0)]) for name in ("w", "v")}
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.load(state, tmp_path / "hf")
    for name, expected in (("w", whole), ("v", whole + 1)):
        assert torch.equal(state[name].to_local(), distribute_tensor(expected, mesh, [Shard(0)]).to_local())
    assert whole.nbytes <= storage.nbytes <= 1.05 * whole.nbytes + (256 << 10)  # half of each, and the headers on one


@rank_test(2)
async def test_what_dcps_own_writer_has_written_in_shards(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(24.0).view(6, 4)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "b": torch.ones(3)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    loaded = {"w": zeros(6, 4, device_mesh=mesh, placements=[Shard(1)]), "b": torch.zeros(3)}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(loaded, tmp_path)
    assert torch.equal(loaded["w"].full_tensor(), whole)  # type: ignore[attr-defined]
    assert torch.equal(loaded["b"], torch.ones(3))


async def test_a_folder_in_any_storage(tmp_path: Path) -> None:
    storage = MemoryStorage()
    state = {"w": torch.arange(6.0), "v": torch.ones(2, 2)}
    save_folder(tmp_path, state, 2)
    storage.files["base"] = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        await checkpointer.load(loaded, "base")
        assert_equal(state, loaded)
        one: dict[str, Any] = {"w": None}
        for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            async with aiodcp.open(f"base/{file}", storage=storage) as ckpt:
                if "w" in ckpt:
                    await checkpointer.load(one, f"base/{file}")
    assert torch.equal(one["w"], state["w"])


def damage(path: Path, change: Any) -> None:
    """Change a file's header."""
    data = path.read_bytes()
    nbytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + nbytes])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + nbytes :])


async def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    async def load() -> None:
        async with Checkpointer() as checkpointer:
            await checkpointer.load({"w": torch.zeros(4)}, tmp_path)

    def fresh() -> bytes:
        save_file({"w": torch.ones(4)}, path)
        return path.read_bytes()

    for cut in (0, 7, 9, 40, len(fresh()) - 1):
        path.write_bytes(fresh()[:cut])
        with pytest.raises((CorruptError, FormatError)) as caught:
            await load()
        assert str(path) in str(caught.value)
    changes: list[tuple[type[Exception], Any]] = [
        (CorruptError, lambda header: header["w"].update(data_offsets=[0, 12])),
        (CorruptError, lambda header: header["w"].update(data_offsets=[4, 20])),
        (CorruptError, lambda header: header["w"].update(shape=[-4])),
        (CorruptError, lambda header: header["w"].pop("dtype")),
        (CorruptError, lambda header: header.update(w=3)),
        (CorruptError, lambda header: header["w"].update(data_offsets=["a", "b"])),
        (FormatError, lambda header: header["w"].update(dtype="F4")),
    ]
    for kind, change in changes:
        fresh()
        damage(path, change)
        with pytest.raises(kind, match="w"):
            await load()
    path.write_bytes(struct.pack("<Q", 10) + b'{"w": [[[[' + bytes(64))
    with pytest.raises(CorruptError, match="malformed"):
        await load()


async def test_folders_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    async def load(place: Path) -> None:
        async with Checkpointer() as checkpointer:
            await checkpointer.load({"w": torch.zeros(2)}, place)

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"w is in a.safetensors and in b.safetensors"):
        await load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, problem in (
        ('{"weight_map": {"w": "gone.safetensors"}}', "gone"),
        ('{"weight_map": {"w": "../a.safetensors"}}', r"\.\./a"),
        ("[]", "weight_map"),
        ("{", "weight_map"),
        ('{"weight_map": {"w": 3}}', "3"),
    ):
        index.write_text(text)
        with pytest.raises(CorruptError, match=problem):
            await load(tmp_path)
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    await load(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match="several indices"):
        await load(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(NotACheckpointError):
        await load(tmp_path / "nothing")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(), "b": entry(data_offsets=[4, 12])},
        {"a": entry(), "b": entry()},
        {"a": entry(shape="2")},
        {"a": entry(shape=[2.0])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(shape=[float("inf")])},
        {"a": entry(shape=[-2])},
        {"a": entry(data_offsets=[0.0, 8.0])},
        {"a": entry(shape=[0, 10**30], data_offsets=[0, 0])},
        {"a": entry(shape=[2**63, 0], data_offsets=[0, 0])},
        {"a": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])},
        {"a": entry(), "__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [1e999]}}'}},
        {"a": entry(), "__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [9223372036854775807]}}'}},
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
async def test_headers_that_the_library_would_not_write_are_damage(header: Any, tmp_path: Path) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CorruptError):
        async with aiodcp.open(tmp_path / "w.safetensors"):
            pass


async def test_tensors_without_elements_may_lie_anywhere(tmp_path: Path) -> None:
    state = {"a": torch.zeros(0), "b": torch.ones(2), "c": torch.zeros(0, 3), "d": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    async with aiodcp.open(tmp_path / "w.safetensors") as ckpt:
        assert_equal(state, dict(sorted((await ckpt.state_dict()).items())))
