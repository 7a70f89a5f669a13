"""Small tensors, which are read as columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiodcp import Checkpointer, CorruptError, LoadError, MemoryStorage
from aiodcp._engine.device_copies import DeviceCopies
from aiodcp._engine.device_gather import GatherBuffer
from aiodcp._format.item_tables import ItemCrcs, ItemTables
from aiodcp._load import coalesce, small_reads
from aiodcp._load.small_reads import SmallReads, SmallSpan

from ..support.counting_storage import CountingStorage
from ..support.devices import Driver
from ..support.in_memory import load, saved
from ..support.states import assert_equal, blank


class Seen:
    """What was read as columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fqns: set[str] = set()
        self.spans: list[SmallSpan] = []
        real = SmallReads.spans

        def spans(reads: SmallReads, gap_nbytes: int) -> Iterable[SmallSpan]:
            self.fqns |= set(reads.fqns)
            for span in real(reads, gap_nbytes):
                self.spans.append(span)
                yield span

        monkeypatch.setattr(SmallReads, "spans", spans)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


async def test_only_what_is_wanted_as_it_is_stored_and_small_is_a_column(seen: Seen) -> None:
    base = torch.randn(40, 30)
    small: dict[str, Any] = {
        "float": base,
        "half": torch.randn(7, dtype=torch.bfloat16),
        "eight": torch.ones(5).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    others: dict[str, Any] = {
        "large": torch.randn(1 << 18),
        "empty": torch.empty(0, 3),
        "turned": base.t(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "cast": torch.randn(3, dtype=torch.float64),
        "number": 7,
    }
    storage = await saved(small | others)
    target = blank(small | others)
    target["turned"] = torch.zeros(40, 30).t()
    target["conj"] = torch.zeros(3, dtype=torch.complex64).conj()
    target["cast"] = torch.zeros(3)
    await load(storage, target, cast=True)
    assert seen.fqns == small.keys()
    assert_equal(others.pop("cast").float(), target.pop("cast"))
    assert_equal(small | others, target)


async def test_what_lies_apart_is_read_apart_and_no_span_is_too_long(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_reads, "SPAN_NBYTES", 200_000)
    monkeypatch.setattr(small_reads, "GAP_NBYTES", 10_000)
    monkeypatch.setattr(coalesce, "GAP_NBYTES", 10_000)
    state = {f"w{n:03}": torch.randn(5_000) for n in range(100)}  # 20,000 bytes each
    storage = await saved(state)
    wanted = {fqn for number, fqn in enumerate(state) if number < 50 or number % 4 == 0}
    target = {fqn: torch.zeros(5_000) for fqn in wanted}
    await load(storage, target, strict=False)
    assert all(torch.equal(target[fqn], state[fqn]) for fqn in wanted)
    assert sorted(number for span in seen.spans for number in span.numbers.tolist()) == list(range(len(wanted)))
    assert all(span.stop - span.start <= 200_000 for span in seen.spans)
    sizes = [len(span.numbers) for span in seen.spans]
    assert max(sizes) == 9
    assert sizes.count(1) >= 12
    for span in seen.spans:
        starts, nbytes = span.reads.starts[span.numbers], span.reads.nbytes[span.numbers]
        assert bool((np.diff(starts) - nbytes[:-1] <= 10_000).all())


def of_every_kind() -> dict[str, torch.Tensor]:
    dtypes = [
        *(torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex32, torch.bool, torch.uint8),
        *(torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64),
    ]
    raw = torch.randint(0, 2, (24 * 16,), dtype=torch.uint8)
    shapes = [(), (1,), (3, 7), (2, 3, 4)]
    return {
        f"{str(dtype)[6:]}.{len(shape)}": raw[: dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape).clone()
        for dtype in dtypes
        for shape in shapes
    }


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("has_memory", [True, False])
async def test_to_a_device_they_cross_as_they_lie_and_are_taken_apart_there(
    devices: Driver, seen: Seen, monkeypatch: pytest.MonkeyPatch, has_memory: bool
) -> None:
    state = of_every_kind() | {f"w{n}": torch.randn(50) for n in range(300)}
    storage = await saved(state)
    target = {
        fqn: torch.zeros_like(tensor) if number % 3 == 0 else devices.put(torch.zeros_like(tensor))
        for number, (fqn, tensor) in enumerate(state.items())
    }
    target["w1"] = torch.nn.Parameter(target["w1"])
    versions = {fqn: tensor._version for fqn, tensor in target.items()}
    if not has_memory:

        def take(copies: DeviceCopies, nbytes: int) -> GatherBuffer:
            made = GatherBuffer.__new__(GatherBuffer)
            made.memory = None
            return made

        monkeypatch.setattr(DeviceCopies, "gather_buffer", take)
    before = devices.launches
    await load(storage, target)
    assert seen.fqns == state.keys()
    assert {fqn: bits(tensor.detach()) for fqn, tensor in target.items()} == {
        fqn: bits(tensor) for fqn, tensor in state.items()
    }
    assert all(tensor._version > versions[fqn] for fqn, tensor in target.items())
    if has_memory:
        assert 0 < devices.launches - before <= 10  # one for each dtype that there is a kernel for


def damage(storage: MemoryStorage, tensor: torch.Tensor) -> tuple[str, bytes]:
    """Change a bit of a stored tensor; return the name of its file, and what it held."""
    [name] = [name for name in storage.files["ckpt"] if name.endswith(".distcp")]
    whole = bytes(storage.files["ckpt"][name])
    place = whole.index(tensor.numpy().tobytes()) + 5
    storage.files["ckpt"][name] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    return name, whole


async def test_damage_is_found_before_anything_crosses(devices: Driver) -> None:
    state = {f"w{n}": torch.full((100,), float(n)) for n in range(50)}
    storage = await saved(state)
    damage(storage, state["w31"])
    target = {fqn: devices.put(torch.zeros(100)) for fqn in state}
    with pytest.raises(CorruptError, match=r"w31.*CRC32"):
        await load(storage, target)
    assert not any(bits(tensor).strip(b"\0") for tensor in target.values())


async def test_only_their_bytes_leave_storage(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(2_000) for n in range(1_000)}
    storage = CountingStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        storage.read.clear()
        target = {name: torch.zeros(2_000) for name in ("w7", "w500", "w993")}
        await checkpointer.load(target, tmp_path, strict=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.items())
    of_data = sum(nbytes for name, nbytes in storage.read.items() if name.endswith(".distcp"))
    assert of_data < 3 * 12_000 + 4 * len(state) + 8_000  # and the table of checksums


async def test_damage_and_exchanged_items_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"w{n}": torch.full((100,), float(n)) for n in range(50)}
    storage = await saved(state)
    name, whole = damage(storage, state["w31"])
    with pytest.raises(CorruptError, match=r"w31.*CRC32"):
        await load(storage, blank(state))
    storage.files["ckpt"][name] = whole
    real = ItemTables.read

    def exchanged(tables: ItemTables, file: str, table: bytes) -> dict[str, ItemCrcs]:
        found = real(tables, file, table)
        [crcs] = found.values()
        crcs._crcs[[0, 1]] = crcs._crcs[[1, 0]]
        return found

    monkeypatch.setattr(ItemTables, "read", exchanged)
    with pytest.raises(CorruptError, match="w0"):
        await load(storage, blank(state))
    await load(storage, blank(state), check_crc=False)


async def test_a_small_view_of_a_large_tensor_is_loaded_beside_it() -> None:
    whole = torch.randn(1 << 19)
    state = {"whole": whole, "part": whole[1000:1100]}
    storage = await saved(state)
    memory = torch.zeros(1 << 19)
    await load(storage, {"whole": memory, "part": memory[1000:1100]})
    assert torch.equal(memory, whole)


async def test_it_counts_as_a_change_of_the_tensors() -> None:
    storage = await saved({"w": torch.ones(3), "v": torch.ones(4)})
    target = {"w": torch.zeros(3, requires_grad=True), "v": torch.zeros(4)}
    before = {name: tensor._version for name, tensor in target.items()}
    used: Any = (target["w"] * target["w"]).sum()
    await load(storage, target)
    assert all(tensor._version > before[name] for name, tensor in target.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


async def test_memory_that_is_freed_or_moved_meanwhile_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await saved({"w": torch.ones(300), "v": torch.ones(300)})
    target = {"w": torch.zeros(300), "v": torch.zeros(300)}
    real = SmallSpan.fill
    change: Callable[[], object] = target["w"].share_memory_

    def fill(span: SmallSpan, *args: Any) -> None:
        change()
        real(span, *args)

    monkeypatch.setattr(SmallSpan, "fill", fill)
    await load(storage, target)
    assert_equal({"w": torch.ones(300), "v": torch.ones(300)}, target)
    change = partial(target["v"].untyped_storage().resize_, 0)
    with pytest.raises(LoadError, match="v: its memory was freed while it was loaded"):
        await load(storage, target)
