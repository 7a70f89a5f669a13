import asyncio
import io
import pickle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from aiodcp import (
    ArgumentError,
    Checkpointer,
    CorruptError,
    MemoryStorage,
    MismatchError,
    NotACheckpointError,
    ReadError,
    UnsafeError,
    joint_checkpoint,
)
from aiodcp._format.checksum import Checksum, default_checksum
from aiodcp._format.dcp import StorageInfo
from aiodcp.testing import FaultyStorage, Gate

from ..support.in_memory import load, saved
from ..support.states import assert_equal, blank, make_state

LARGE = 1 << 19  # float32 elements: 2 MiB, read straight into the target


# --- what does not fit is reported before anything changes


async def test_every_misfit_is_named_at_once_and_nothing_is_touched() -> None:
    state = {
        "same": torch.ones(3), "shape": torch.ones(3), "dtype": torch.ones(3, dtype=torch.float64),
        "kind": torch.ones(3), "value": 7, "gone": 1, "meta": torch.ones(2), "expanded": torch.ones(2, 2),
    }  # fmt: skip
    storage = await saved(state)
    target = {
        "same": torch.zeros(3), "shape": torch.zeros(4), "dtype": torch.zeros(3), "kind": "text",
        "value": torch.zeros(1), "new": torch.zeros(1), "meta": torch.ones(2, device="meta"),
        "expanded": torch.zeros(1).expand(2, 2),
    }  # fmt: skip
    with pytest.raises(MismatchError) as caught:
        await load(storage, target)
    assert caught.value.missing == ("new",)
    assert caught.value.unexpected == ()  # all names here are of the top level: nobody asked for "gone"
    problems = dict(problem.split(" ", 1) for problem in caught.value.problems)
    assert set(problems) == {"shape", "dtype", "kind", "expanded"}
    with pytest.raises(MismatchError, match="value is a tensor in the state dict, but another kind"):  # known when read
        await load(storage, {"same": target["same"], "value": torch.zeros(1)})
    assert "(3,) in the checkpoint, (4,)" in problems["shape"]
    assert "cast=True" in problems["dtype"]
    assert torch.equal(target["same"], torch.zeros(3))  # type: ignore[arg-type]
    assert target["kind"] == "text"


async def test_a_partial_load_fills_what_both_have() -> None:
    storage = await saved({"a": torch.ones(2), "b": 2, "c": torch.ones(1)})
    target = {"a": torch.zeros(2), "b": 0, "x": torch.zeros(3), "y": "kept"}
    await load(storage, target, strict=False)
    assert_equal({"a": torch.ones(2), "b": 2, "x": torch.zeros(3), "y": "kept"}, target)


@pytest.mark.parametrize(
    ("stored", "wanted", "lossless"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float64, True),
        (torch.uint8, torch.int16, True),
        (torch.int8, torch.int64, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.int64, torch.float64, False),
        (torch.bool, torch.int8, False),
        (torch.float8_e4m3fn, torch.float32, False),
    ],
)
@pytest.mark.parametrize("elements", [3, LARGE])
async def test_casts_that_lose_must_be_asked_for(
    stored: torch.dtype, wanted: torch.dtype, lossless: bool, elements: int
) -> None:
    source = torch.ones(elements).to(stored)
    storage = await saved({"w": source})
    target = torch.zeros(elements).to(wanted)
    if not lossless:
        with pytest.raises(MismatchError, match="w is"):
            await load(storage, {"w": target})
        assert not target.to(torch.float32).any()
    await load(storage, {"w": target}, cast=not lossless)
    assert torch.equal(target, source.to(wanted))


async def test_a_value_in_a_container_that_takes_none_is_refused() -> None:
    storage = await saved({"a": {"b": 1}})
    with pytest.raises(ArgumentError, match=r"a\.b.*mappingproxy"):
        await load(storage, {"a": MappingProxyType({"b": 0})})


# --- what is not there, or damaged


async def test_nothing_committed_is_no_checkpoint(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        (tmp_path / "__0_0.distcp").write_text("data without a commit")
        for place in (tmp_path, tmp_path / "nothing", tmp_path / "__0_0.distcp"):
            with pytest.raises(NotACheckpointError) as caught:
                await checkpointer.load({}, place)
            assert isinstance(caught.value, FileNotFoundError)
            assert caught.value.checkpoint_id == str(place)


@pytest.mark.parametrize("elements", [10, LARGE])
async def test_one_flipped_bit_anywhere_in_a_payload_is_found_and_named(elements: int) -> None:
    storage = await saved({"a": torch.ones(elements), "b": torch.ones(elements)})
    [file] = [name for name in storage.files["ckpt"] if name != ".metadata"]
    data = bytearray(storage.files["ckpt"][file])
    place = data.rfind(torch.ones(4).numpy().tobytes())  # near the end: in b
    data[place] ^= 1
    storage.files["ckpt"][file] = bytes(data)
    target = {"a": torch.zeros(elements), "b": torch.zeros(elements)}
    with pytest.raises(CorruptError, match="CRC32") as caught:
        await load(storage, target)
    assert caught.value.fqn == "b"
    assert file in caught.value.path
    await load(storage, target, check_crc=False)
    assert torch.equal(target["a"], torch.ones(elements))


async def test_a_damaged_value_is_found_before_any_tensor_changes() -> None:
    storage = await saved({"w": torch.ones(3), "name": "some text"})
    [file] = [name for name in storage.files["ckpt"] if name != ".metadata"]
    storage.files["ckpt"][file] = storage.files["ckpt"][file].replace(b"some text", b"some Text")
    target = {"w": torch.zeros(3), "name": "kept"}
    with pytest.raises(CorruptError) as caught:
        await load(storage, target)
    assert caught.value.fqn == "name"
    assert_equal({"w": torch.zeros(3), "name": "kept"}, target)


@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
async def test_a_file_that_is_missing_or_short_is_named_before_anything_changes(damage: str) -> None:
    storage = await saved(make_state())
    [file] = [name for name in storage.files["ckpt"] if name != ".metadata"]
    if damage == "missing":
        del storage.files["ckpt"][file]
    else:
        storage.files["ckpt"][file] = storage.files["ckpt"][file][: 0 if damage == "empty" else 8000]
    target = blank(make_state())
    with pytest.raises(CorruptError, match=file):
        await load(storage, target)
    assert_equal(blank(make_state()), target)


async def test_an_error_while_reading_keeps_the_systems_words(faulty: FaultyStorage) -> None:
    await saved({"w": torch.ones(3)}, faulty)
    for call in ("get", "open", "read"):

        def fail(name: str, call: str = call) -> None:
            if name == call:
                raise PermissionError(13, "Permission denied")

        faulty.gate = fail
        with pytest.raises(ReadError, match="Permission denied") as caught:
            await load(faulty, {"w": torch.zeros(3)})
        assert isinstance(caught.value.__cause__, PermissionError)
    assert faulty.open_files == 0


# --- values that are more than data


class Custom:
    """Not known to torch.load(weights_only=True)."""

    def __init__(self, number: int) -> None:
        self.number = number


async def test_a_value_that_is_more_than_data_needs_the_callers_word() -> None:
    with pytest.warns(UserWarning, match=r"custom is not plain data.* tests\.load\.test_loader\.Custom"):
        storage = await saved({"w": torch.ones(2), "custom": Custom(3)})
    target = {"w": torch.zeros(2), "custom": None}
    with pytest.raises(UnsafeError, match=r"needs tests\.load\.test_loader\.Custom.*weights_only=False") as caught:
        await load(storage, target)
    assert caught.value.fqn == "custom"
    assert_equal({"w": torch.zeros(2), "custom": None}, target)
    await load(storage, target, weights_only=False)
    assert isinstance(target["custom"], Custom)
    assert target["custom"].number == 3


async def test_values_that_hold_tensors_or_plain_torch_things_are_data() -> None:
    state = {
        "pair": (torch.arange(3), [1, {"a": torch.ones(2)}]),
        "dtype": torch.bfloat16,
        "rng": torch.get_rng_state(),
        "sparse": torch.eye(3).to_sparse(),
    }
    storage = await saved(state)
    target: dict[str, Any] = {"pair": None, "dtype": None, "rng": torch.zeros_like(torch.get_rng_state())}
    target["sparse"] = torch.zeros(3, 3).to_sparse()
    await load(storage, target)
    assert torch.equal(target["pair"][0], torch.arange(3))
    assert torch.equal(target["pair"][1][1]["a"], torch.ones(2))
    assert target["dtype"] is torch.bfloat16
    assert torch.equal(target["rng"], state["rng"])  # type: ignore[arg-type]
    assert torch.equal(target["sparse"].to_dense(), torch.eye(3))


# --- pieces


def sharded(chunks: list[tuple[tuple[int, int], tuple[int, int]]], size: tuple[int, int]) -> MemoryStorage:
    """A checkpoint of one tensor `w` of consecutive numbers in pieces, as several ranks of DCP would write it."""
    whole = torch.arange(float(size[0] * size[1])).view(size)
    storage = MemoryStorage()
    stored = {}
    pieces = []
    for number, (offsets, sizes) in enumerate(chunks):
        file = io.BytesIO()
        piece = whole[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1]].clone()
        torch.save(piece, file)
        storage.files["ckpt"][f"__{number}_0.distcp"] = file.getvalue()
        stored[MetadataIndex("w", offsets)] = StorageInfo(f"__{number}_0.distcp", 0, len(file.getvalue()))
        pieces.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    entry = TensorStorageMetadata(TensorProperties(), torch.Size(size), pieces)
    storage.files["ckpt"][".metadata"] = pickle.dumps(Metadata({"w": entry}, storage_data=stored))
    return storage


async def test_a_tensor_stored_in_pieces_is_put_together() -> None:
    storage = sharded([((0, 0), (2, 3)), ((2, 0), (1, 3)), ((0, 3), (3, 2)), ((3, 0), (0, 5))], (3, 5))
    target = torch.zeros(3, 5)
    await load(storage, {"w": target})
    assert torch.equal(target, torch.arange(15.0).view(3, 5))


@pytest.mark.parametrize(
    "chunks",
    [
        [((0, 0), (2, 3))],
        [((0, 0), (3, 3)), ((1, 3), (2, 2))],
        [((0, 0), (3, 3)), ((0, 2), (3, 2)), ((0, 0), (0, 0))],
        [],
    ],
    ids=["too little", "a hole", "overlapping", "nothing"],
)
async def test_pieces_that_do_not_make_the_tensor_are_refused_before_reading(chunks: Any) -> None:
    target = torch.zeros(3, 5)
    with pytest.raises(CorruptError, match="do not cover"):
        await load(sharded(chunks, (3, 5)), {"w": target})
    assert not target.any()


async def test_a_piece_that_is_stored_nowhere_is_named() -> None:
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])
    entry.chunks.append(ChunkStorageMetadata(torch.Size([0]), torch.Size([1])))
    storage = MemoryStorage()
    metadata = Metadata({"w": entry, "x": BytesStorageMetadata()}, storage_data={})
    storage.files["ckpt"][".metadata"] = pickle.dumps(metadata)
    for target in ({"w": torch.zeros(1)}, {"x": 1}):
        with pytest.raises(CorruptError, match="no storage location"):
            await load(storage, target, strict=False)


async def test_an_item_that_holds_another_tensor_than_announced_is_refused() -> None:
    storage = sharded([((0, 0), (3, 5))], (3, 5))
    file = io.BytesIO()
    torch.save(torch.zeros(4, 5), file)
    metadata = pickle.loads(storage.files["ckpt"][".metadata"])
    metadata.storage_data = {MetadataIndex("w", (0, 0)): StorageInfo("__0_0.distcp", 0, len(file.getvalue()))}
    storage.files["ckpt"] = {"__0_0.distcp": file.getvalue(), ".metadata": pickle.dumps(metadata)}
    with pytest.raises(CorruptError, match="but the metadata says"):
        await load(storage, {"w": torch.zeros(3, 5)})


async def test_large_and_small_tensors_and_gaps_between_them_are_read(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(LARGE if n % 5 == 0 else 1000 + n) for n in range(30)}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        some = {name: torch.zeros_like(tensor) for name, tensor in state.items() if int(name[1:]) % 3 == 0}
        await checkpointer.load(some, tmp_path, strict=False)
    for name, tensor in some.items():
        assert torch.equal(tensor, state[name])


async def test_loading_counts_as_a_change_of_the_tensor() -> None:
    storage = await saved({"a": torch.ones(3), "b": torch.ones(LARGE)})
    target = {"a": torch.zeros(3), "b": torch.zeros(LARGE)}
    versions = {name: tensor._version for name, tensor in target.items()}
    await load(storage, target)
    assert all(tensor._version > versions[name] for name, tensor in target.items())


async def test_parameters_that_require_grad_are_loaded_in_place() -> None:
    storage = await saved({"w": torch.ones(3), "v": torch.ones(LARGE)})
    target = {"w": torch.nn.Parameter(torch.zeros(3)), "v": torch.nn.Parameter(torch.zeros(LARGE))}
    same = dict(target)
    await load(storage, target)
    assert all(target[name] is same[name] and bool(target[name].all()) for name in target)


# --- Stateful and cancellation


class App:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"w": torch.zeros(2), "n": 0}

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.state["w"].clone(), "n": self.state["n"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


async def test_stateful_values_are_given_their_state_and_stay_what_they_are() -> None:
    one, other = App(), App()
    one.state = {"w": torch.ones(2), "n": 5}
    storage = await saved({"app": one, "step": 3})
    target = {"app": other, "step": 0}
    await load(storage, target)
    assert target == {"app": other, "step": 3}
    assert_equal(one.state, other.state)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
async def test_a_fresh_optimizer_is_given_the_state_that_it_has_not_made_yet(kind: Any) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        return model, kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(number))).sum().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    storage = await saved({"model": model, "optim": optimizer, "step": 3})
    train(model, optimizer)
    again, fresh = make()
    await load(storage, {"model": again, "optim": fresh, "step": 0})
    train(again, fresh)
    assert_equal(model.state_dict(), again.state_dict())
    assert_equal(optimizer.state_dict(), fresh.state_dict())


async def test_a_partial_load_with_nothing_in_common_is_reported() -> None:
    storage = await saved({"model": {"w": torch.ones(1)}})
    with pytest.raises(MismatchError) as caught:
        await load(storage, {"net": {"w": torch.ones(1)}}, strict=False)
    assert caught.value.missing == ("net.w",)
    assert "the names differ only in their first component" in str(caught.value) or "did you mean model.w" in str(
        caught.value
    )


async def test_cancelling_a_load_stops_it_and_the_next_one_works(faulty: FaultyStorage) -> None:
    await saved({"w": torch.ones(3)}, faulty)
    async with Checkpointer(storage=faulty) as checkpointer:
        for call in ("get", "open", "read"):
            gate = Gate(call)
            faulty.gate = gate
            target = {"w": torch.zeros(3)}
            task = asyncio.create_task(checkpointer.load(target, "ckpt"))
            await gate.wait_reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert faulty.open_files == 0
            assert not target["w"].any()
        faulty.gate = lambda name: None
        await checkpointer.load(target, "ckpt")
        assert target["w"].all()


async def test_a_load_waits_for_the_save_in_flight(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    async with Checkpointer(storage=faulty) as checkpointer:
        await checkpointer.save({"w": torch.ones(3)}, "ckpt")
        target = {"w": torch.zeros(3)}
        loading = asyncio.create_task(checkpointer.load(target, "ckpt"))
        await gate.wait_reached()
        assert not loading.done()
        gate.open()
        await loading
    assert target["w"].all()


async def test_a_load_in_the_block_of_a_joint_checkpoint_does_not_wait_for_its_end() -> None:
    storage = await saved({"w": torch.ones(3)})
    target = {"w": torch.zeros(3)}
    async with Checkpointer(storage=storage) as checkpointer:
        async with joint_checkpoint(checkpointer, "other") as ckpt:
            await checkpointer.load(target, "ckpt")
            await asyncio.create_task(checkpointer.load(target, "ckpt"))
            ckpt.add("model", target)
    assert target["w"].all()


@pytest.mark.parametrize("checksum", ["zlib", "isal"])
async def test_both_checksums_write_and_check_the_same(checksum: str) -> None:
    functions: dict[str, Checksum] = {}
    import zlib

    from isal import isal_zlib

    functions = {"zlib": zlib.crc32, "isal": isal_zlib.crc32}
    storage = MemoryStorage()
    async with Checkpointer(storage=storage, checksum=functions[checksum]) as checkpointer:
        await (await checkpointer.save(make_state(), "ckpt")).uploaded
    for function in functions.values():
        async with Checkpointer(storage=storage, checksum=function) as checkpointer:
            target = blank(make_state())
            await checkpointer.load(target, "ckpt")
            assert_equal(make_state(), target)


def test_the_default_checksum_is_zlibs_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import zlib

    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    assert default_checksum() is zlib.crc32


@pytest.mark.parametrize("when", [["open"], ["open", "read", "open", "read", "read"]])
async def test_a_checkpoint_replaced_while_it_is_read_is_loaded_in_its_new_form(
    faulty: FaultyStorage, when: list[str]
) -> None:
    await saved({"w": torch.ones(3), "old": 1, "both": 1}, faulty)
    newer = (await saved({"w": torch.full((3,), 2.0), "both": 2})).files["ckpt"]
    calls: list[str] = []

    def replace(call: str) -> None:
        calls.extend([call] if call != "get" else [])
        if calls == when:
            faulty.files["ckpt"] = dict(newer)
            if call == "read":  # of values; as from an object store, whose files are opened by each read
                raise FileNotFoundError(2, "No such file or directory")

    faulty.gate = replace
    target: dict[str, Any] = {"w": torch.zeros(3), "both": 0}
    await load(faulty, target, strict=False)
    assert torch.equal(target["w"], torch.full((3,), 2.0))
    assert target["both"] == 2
    assert calls[: len(when)] == when


async def test_targets_that_overlap_themselves_are_refused() -> None:
    storage = await saved({"w": torch.arange(6.0).view(3, 2)})
    with pytest.raises(MismatchError, match="share memory"):
        await load(storage, {"w": torch.zeros(4).as_strided((3, 2), (1, 1))})
    transposed = torch.zeros(2, 3).t()
    await load(storage, {"w": transposed})
    assert torch.equal(transposed, torch.arange(6.0).view(3, 2))


async def test_names_that_share_one_large_tensor_are_loaded_one_after_the_other() -> None:
    storage = await saved({"a": torch.ones(LARGE), "b": torch.full((LARGE,), 2.0), "c": torch.ones(LARGE)})
    tied = torch.zeros(LARGE)
    target = {"a": tied, "b": tied, "c": torch.zeros(LARGE)}
    await load(storage, target)
    assert tied[0] in (1, 2)
    assert bool((tied == tied[0]).all())
    assert bool((target["c"] == 1).all())


@pytest.mark.parametrize("make", ["freed", "inference"])
async def test_targets_that_cannot_be_written_are_named(make: str) -> None:
    storage = await saved({"w": torch.ones(3)})
    if make == "freed":
        target = torch.zeros(3)
        target.untyped_storage().resize_(0)
    else:
        with torch.inference_mode():
            target = torch.zeros(3)
    with pytest.raises(MismatchError, match=r"w (has no memory|was made in inference mode)"):
        await load(storage, {"w": target})


async def test_what_is_no_dict_is_refused_before_anything_is_read(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        for wrong in (MappingProxyType({"w": 1}), [torch.zeros(1)], torch.nn.Linear(1, 1)):
            with pytest.raises(ArgumentError, match="state_dict"):
                await checkpointer.load(wrong, "ckpt")  # type: ignore[arg-type]
    assert faulty.calls == []


async def test_many_values_under_int_keys_are_replaced_under_their_own_keys() -> None:
    state = {"state": {number: {"buffer": number} for number in range(300)}}
    storage = await saved(state)
    target: dict[str, Any] = {"state": {number: {"buffer": None} for number in range(300)}}
    await load(storage, target)
    assert target == state


async def test_a_load_under_way_is_waited_for_on_leaving(faulty: FaultyStorage) -> None:
    await saved({"w": torch.ones(3)}, faulty)
    gate = Gate("read")
    faulty.gate = gate
    target = {"w": torch.zeros(3)}
    async with Checkpointer(storage=faulty) as checkpointer:
        task = asyncio.create_task(checkpointer.load(target, "ckpt"))
        await gate.wait_reached()
        asyncio.get_running_loop().call_later(0.01, gate.open)
    await task
    assert target["w"].all()


@pytest.mark.parametrize("damage", ["a name", "an entry", "a path", "our mark"])
async def test_metadata_that_is_damaged_inside_is_called_damaged(damage: str) -> None:
    storage = await saved({"a": torch.ones(4), "b": {"c": 1}})
    metadata = pickle.loads(storage.files["ckpt"][".metadata"])
    if damage == "a name":
        metadata.state_dict_metadata[5] = metadata.state_dict_metadata["a"]
        metadata.planner_data[5] = (5,)
    elif damage == "an entry":
        metadata.state_dict_metadata["a"].chunks = 3
    elif damage == "a path":
        metadata.planner_data["b.c"] = 7
    else:
        metadata.aiodcp["opaque"] = 3
    storage.files["ckpt"][".metadata"] = pickle.dumps(metadata)
    with pytest.raises(CorruptError, match=r"\.metadata") as caught:
        await load(storage, {"a": torch.zeros(4), "b": {"x": 1}})
    assert str(caught.value)


async def test_keys_that_are_recorded_and_not_saved_are_passed_over() -> None:
    storage = await saved({"o": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}})
    metadata = pickle.loads(storage.files["ckpt"][".metadata"])
    metadata.planner_data["o.state.1.m"] = ("o", "state", "1", "m")
    metadata.planner_data["x"] = ("x",)
    storage.files["ckpt"][".metadata"] = pickle.dumps(metadata)
    target: dict[str, Any] = {"o": {"state": {}, "param_groups": [{"lr": 0.0, "params": [0]}]}}
    await load(storage, target)
    assert list(target["o"]["state"]) == [0]
