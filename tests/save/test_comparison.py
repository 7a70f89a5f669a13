"""Ranks that hold different values of what is saved once are found at every save."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from aiodcp import Checkpointer, CheckpointError, CheckpointManager, PerRank
from aiodcp._save import sharing
from aiodcp._save.comparison import Comparison
from aiodcp._save.sharing import agree, find_disagreements, plan_sharing
from aiodcp.checkpointer.checkpointer import session_of

from ..support.ranks import World

# --- the numbers


def _digests(plan: sharing.SharingPlan, checksums: list[dict[int, int]]) -> list[int]:
    """Return each rank's digest, given what it holds of each item: as `Comparison.digest` does it."""
    digests = []
    for part, held in zip(plan.parts, checksums, strict=True):
        blocks = [b"" for _ in part.weights]
        for item, group in zip(part.ids.tolist(), part.groups.tolist(), strict=True):
            blocks[group] += held[item].to_bytes(4, "little")
        weights = part.weights.tolist()
        digests.append(sum(weight * zlib.crc32(block) for weight, block in zip(weights, blocks, strict=True)))
    return digests


def _plan(held: Sequence[Sequence[tuple[int, int]]], *, nbytes: int = 8, ranks: int = 2) -> sharing.SharingPlan:
    """Plan for items w0, w1 and so on, given who holds each: its rank, and its own number of it."""
    flat = np.array([each for holders in held for each in holders], dtype=np.int64)
    plan = plan_sharing(
        fqns=[f"w{n}" for n in range(len(held))],
        starts=np.cumsum([0, *map(len, held)]),
        ranks=flat[:, 0],
        numbers=flat[:, 1],
        writers=np.array([holders[0][0] for holders in held]),
        nbytes=np.full(len(held), nbytes),
        size=ranks,
    )
    for part in plan.parts:  # as it is sent
        sent = sharing.SharedItems.unpack(part.pack())
        for field in dataclasses.fields(part):
            assert np.array_equal(getattr(part, field.name), getattr(sent, field.name))
    return plan


def test_the_digests_cancel_out_exactly_where_all_hold_the_same() -> None:
    chance = random.Random(0)
    for _ in range(50):
        ranks = chance.randint(2, 6)
        plan = _plan(
            [[(rank, n) for rank in sorted(chance.sample(range(ranks), chance.randint(1, ranks)))] for n in range(12)],
            ranks=ranks,
        )
        values = {item: chance.getrandbits(32) for item in range(len(plan.fqns))}
        same = [{item: values[item] for item in part.ids.tolist()} for part in plan.parts]
        assert agree(_digests(plan, same))
        if not plan.fqns:
            continue
        changed = chance.choice([rank for rank, part in enumerate(plan.parts) if len(part.ids)])
        item = chance.choice(plan.parts[changed].ids.tolist())
        same[changed][item] ^= 1 << chance.randrange(32)
        assert not agree(_digests(plan, same))
        packed = [
            b"".join(held[each].to_bytes(4, "little") for each in part.ids.tolist())
            for part, held in zip(plan.parts, same, strict=True)
        ]
        assert list(find_disagreements(plan, packed)) == [plan.fqns[item]]


def test_two_values_that_have_changed_places_are_not_the_same() -> None:
    plan = _plan([[(0, 0), (1, 0)], [(0, 1), (1, 1)]])
    assert not agree(_digests(plan, [{0: 5, 1: 7}, {0: 7, 1: 5}]))


def test_large_items_are_sampled_and_small_ones_too_where_there_are_too_many() -> None:
    def whole(nbytes: int, count: int) -> bool:
        plan = _plan([[(0, n), (1, n)] for n in range(count)], nbytes=nbytes)
        return bool(plan.parts[0].whole[0])

    assert whole(64 << 10, 1)
    assert not whole((64 << 10) + 1, 1)
    assert whole(64 << 10, 256)
    assert not whole(64 << 10, 257)
    assert whole(1 << 10, 1 << 14)


# --- ranks


@contextmanager
def _logged() -> Iterator[list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aiodcp").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("aiodcp").removeHandler(handler)


def _save(checkpointer: Checkpointer, state: dict[str, Any], folder: Path, **options: Any) -> str:
    """Return what became of a save, in a word or the error's."""
    try:
        checkpointer.save_sync(state, folder, **options).uploaded.wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


def _compare_every_save(rank: int, size: int, folder: Path) -> list[list[str]]:
    """Return what is warned of after each save; each changes one thing."""
    reported: list[list[str]] = []
    large = torch.ones(40_000)
    state: dict[str, Any] = {
        "rng": torch.zeros(5056, dtype=torch.uint8),
        "position": 7,
        "large": large,
        "strided": torch.ones(300, 200).t(),
        "own": PerRank(rank),
        "names": ({"alpha", "beta", "gamma", "delta"}, frozenset("abcdef")),  # in each process in an order of its own
    }
    with _logged() as records, Checkpointer() as checkpointer:

        def save() -> None:
            assert _save(checkpointer, state, folder) == "saved"
            reported.append([*records])
            records.clear()

        save()
        save()
        state["rng"][5000] = rank
        save()
        save()  # once a name
        state["position"] = rank
        save()
        large += rank
        save()
        state["strided"] = torch.ones(300, 200).t() + rank
        save()
        state["more"] = rank  # another structure: what was reported is not reported again
        save()
    return reported


def test_each_name_is_reported_once_at_the_save_at_which_the_ranks_disagree(world: World, tmp_path: Path) -> None:
    first, *others = world.run(3, _compare_every_save, tmp_path)
    names = ("rng", "position", "large", "strided", "more")
    found = [" ".join(name for name in names if name in "".join(reported)) for reported in first]
    assert found == ["", "", "rng", "", "position", "large", "strided", "more"]
    words = "'s is saved): wrap what is each rank's own in aiodcp.PerRank"
    assert all(words in each for reported in first for each in reported)
    assert not any(others[0] + others[1])


def _one_shares_nothing(rank: int, size: int, folder: Path) -> str:
    with _logged() as records, Checkpointer() as checkpointer:
        assert _save(checkpointer, {"a": rank, "b": 1} if rank < 2 else {}, folder) == "saved"
    return " ".join(records)


def test_a_rank_that_shares_nothing_takes_part(world: World, tmp_path: Path) -> None:
    assert "different values of a (rank " in world.run(3, _one_shares_nothing, tmp_path)[0]


def _policies(rank: int, size: int, folder: Path) -> list[str]:
    reported = []
    with Checkpointer(on_disagreement="raise") as checkpointer:
        reported.append(_save(checkpointer, {"a": rank, "b": 1}, folder / "a"))
        reported.append(_save(checkpointer, {"a": 1, "b": 1}, folder / "a"))
        reported.append(_save(checkpointer, {"a": rank, "b": 1}, folder / "a"))
        target = {"a": None, "b": None}
        checkpointer.load_sync(target, folder / "a")  # the one before stays
        assert target == {"a": 1, "b": 1}
    with Checkpointer(on_disagreement="raise" if rank else "ignore") as checkpointer:
        reported.append(_save(checkpointer, {"a": rank}, folder / "b"))
    with _logged() as records, Checkpointer(on_disagreement="ignore") as checkpointer:
        reported.append(_save(checkpointer, {"a": rank}, folder / "c"))
        assert not records
    return reported


def test_a_disagreement_can_be_an_error_or_ignored(world: World, tmp_path: Path) -> None:
    for reported in world.run(2, _policies, tmp_path):
        assert "DisagreementError: the ranks hold different values of a: wrap" in reported[0]
        assert reported[1] == "saved"
        assert "different values of a" in reported[2]
        assert "on_disagreement: must be the same on all ranks, got 'raise' and 'ignore'" in reported[3]
        assert reported[4] == "saved"


def _everywhere(rank: int, size: int, folder: Path) -> dict[str, str]:
    """Return, by what is tried, what is warned of."""
    reported: dict[str, str] = {}
    state = {"e": torch.full((200, 200), float(rank)), "n": rank, "same": torch.ones(300, 300)}
    mesh = init_device_mesh("cpu", (size,))
    with _logged() as records:

        def take(name: str) -> None:
            reported[name] = " ".join(records)
            records.clear()

        with Checkpointer() as checkpointer:
            assert _save(checkpointer, state, folder / "p", planner=dcp.DefaultSavePlanner()) == "saved"
            take("planner")
        with Checkpointer(max_host_bytes=2 << 20) as checkpointer:
            big = {"e": torch.full((1 << 20,), float(rank)), "same": torch.ones(1 << 20)}
            assert _save(checkpointer, big, folder / "w") == "saved"
            take("windows")
        with CheckpointManager(folder / "m") as manager:
            manager.save_sync(1, state).uploaded.wait()
            take("manager")
        with Checkpointer() as checkpointer:
            held = {
                "replicated": distribute_tensor(torch.ones(100, 100), mesh, [Replicate()]),
                "sharded": distribute_tensor(torch.ones(100, 100), mesh, [Shard(0)]),
            }
            held["replicated"].to_local().fill_(rank)
            held["sharded"].to_local().fill_(rank)
            assert _save(checkpointer, held, folder / "d") == "saved"
            take("DTensor")
        with Checkpointer() as checkpointer:
            model = FullyShardedDataParallel(torch.nn.Linear(64, 64), device_id=torch.device("cpu"))
            optimizer = torch.optim.AdamW(model.parameters())
            model(torch.randn(2, 64) + rank).square().sum().backward()
            optimizer.step()
            assert _save(checkpointer, {"optim": optimizer}, folder / "f") == "saved"
            take("FSDP1")
    return reported


async def _joint(folder: Path, rank: int) -> str:
    from aiodcp import joint_checkpoint

    with _logged() as records:
        async with Checkpointer() as checkpointer:
            async with joint_checkpoint(checkpointer, folder) as ckpt:
                ckpt.add("a", {"same": 1})
                ckpt.add("b", {"rng": rank})
    return " ".join(records)


def _joint_ranks(rank: int, size: int, folder: Path) -> str:
    import asyncio

    return asyncio.run(_joint(folder, rank))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_way_to_save_compares(world: World, tmp_path: Path) -> None:
    reported = world.run(2, _everywhere, tmp_path)[0]
    for name in ("planner", "manager"):
        assert "different values of e (rank " in reported[name]
        assert "n (rank " in reported[name]
        assert "same" not in reported[name]
    assert "different values of e (rank " in reported["windows"]
    assert "different values of replicated (rank " in reported["DTensor"]
    assert "sharded" not in reported["DTensor"]
    assert "optim.state.0.exp_avg (rank " in reported["FSDP1"]
    assert "different values of b.rng (rank " in world.run(2, _joint_ranks, tmp_path / "j")[0]


def _constant(rank: int, size: int, folder: Path, count: int) -> int:
    state: dict[str, Any] = {f"w{n}": torch.ones(10) for n in range(count)} | {"norm": torch.zeros(3)}
    with _logged(), Checkpointer() as checkpointer:
        line = session_of(checkpointer).flows.channel
        assert line is not None
        for step in range(5):
            before = line.nbytes
            state["norm"].fill_(rank + step)  # differs at every save, as running averages do
            assert _save(checkpointer, state, folder) == "saved"
        return line.nbytes - before


def test_what_is_known_to_differ_costs_nothing_at_later_saves(world: World, tmp_path: Path) -> None:
    few, many = (max(world.run(2, _constant, tmp_path, count)) for count in (10, 2000))
    assert few < 1024
    assert many < 4 * 1024  # a heartbeat more on a slow machine


def _held(rank: int, size: int, folder: Path) -> tuple[bool, bool]:
    """Return whether `staged` was reached while the comparison still read, and afterwards."""
    let_go = threading.Event()
    real = Comparison.digest

    def held(*args: Any) -> int:
        assert let_go.wait(30)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, Checkpointer() as checkpointer:
        patch.setattr(Comparison, "digest", held)
        ckpt = checkpointer.save_sync({"w": torch.ones(100)}, folder)
        with pytest.raises(TimeoutError):
            ckpt.staged.wait(0.2)
        before = ckpt.staged.done()
        let_go.set()
        ckpt.uploaded.wait()
        return before, ckpt.staged.done()


def test_the_tensors_may_not_change_before_they_are_compared(world: World, tmp_path: Path) -> None:
    assert world.run(2, _held, tmp_path) == [(False, True)] * 2
