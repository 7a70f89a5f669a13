"""Tensors that change before they are staged fail the save, and the guard keeps them from changing."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks

from aiodcp import ArgumentError, Checkpointer, ClosedError, RankError, StageError, TornSnapshotError
from aiodcp._save.staging import Staging
from aiodcp._state.capture import capture
from aiodcp._state.tear_detector import TearDetector
from aiodcp.checkpointer.checkpoint import SaveState
from aiodcp.testing import FaultyStorage

from ..support.ranks import World, rank_test
from ..support.slow_copy import SlowCopy
from ..support.states import assert_equal, blank


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCopy]:
    made = SlowCopy(monkeypatch)
    yield made
    made.let_go.set()


def _stepped(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[dict[str, Any], Callable[[], object]]:
    model = torch.nn.Linear(4, 3)
    optimizer = kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optim": optimizer}, optimizer.step


def _forward_of_batch_norm() -> tuple[dict[str, Any], Callable[[], object]]:
    model = torch.nn.BatchNorm1d(3)
    return {"model": model}, lambda: model(torch.randn(5, 3))


def _write(how: Callable[[torch.Tensor], Any]) -> tuple[dict[str, Any], Callable[[], object]]:
    tensor = torch.zeros(6)
    return {"w": tensor, "v": torch.ones(3)}, lambda: how(tensor)


SEEN: dict[str, tuple[Callable[[], tuple[dict[str, Any], Callable[[], object]]], tuple[str, ...]]] = {
    "sgd": (lambda: _stepped(torch.optim.SGD, foreach=False), ("model.weight", "model.bias")),
    "sgd foreach": (lambda: _stepped(torch.optim.SGD, foreach=True), ("model.weight", "model.bias")),
    "adam": (
        lambda: _stepped(torch.optim.Adam, foreach=False),
        (
            "model.weight",
            "model.bias",
            *(f"optim.state.{n}.{name}" for n in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")),
        ),
    ),
    "adam foreach": (
        lambda: _stepped(torch.optim.Adam, foreach=True),
        (
            "model.weight",
            "model.bias",
            *(f"optim.state.{n}.{name}" for n in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")),
        ),
    ),
    "adam fused": (
        lambda: _stepped(torch.optim.Adam, fused=True),
        ("model.weight", "model.bias", "optim.state.0.step", "optim.state.1.step"),
    ),
    "sgd fused": (lambda: _stepped(torch.optim.SGD, fused=True), ("model.weight", "model.bias")),
    "batch norm": (_forward_of_batch_norm, ("model.num_batches_tracked",)),
    "copy_": (lambda: _write(lambda tensor: tensor.copy_(torch.ones(6))), ("w",)),
    "through a view": (lambda: _write(lambda tensor: tensor[2:4].mul_(2)), ("w",)),
    "detached": (lambda: _write(lambda tensor: tensor.detach().add_(1)), ("w",)),
}


@pytest.mark.parametrize(("make", "changed"), SEEN.values(), ids=SEEN)
async def test_a_change_before_staged_fails_the_save_and_names_the_tensors(
    tmp_path: Path,
    slow: SlowCopy,
    make: Callable[[], tuple[dict[str, Any], Callable[[], object]]],
    changed: tuple[str, ...],
) -> None:
    state, change = make()
    path = tmp_path / "ckpt"
    async with Checkpointer() as checkpointer:
        slow.let_go.set()
        await (await checkpointer.save({"n": 1}, path)).uploaded
        before = sorted(each.name for each in path.iterdir())
        slow.let_go.clear()
        ckpt = await checkpointer.save(state, path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        change()
        slow.let_go.set()
        with pytest.raises(TornSnapshotError) as caught:
            await ckpt.staged
        assert caught.value.fqns == changed
        with pytest.raises(TornSnapshotError):
            await ckpt.uploaded
        assert sorted(each.name for each in path.iterdir()) == before
        ckpt = await checkpointer.save(state, path)
        await ckpt.staged
        change()  # from here on it may
        await ckpt.uploaded


UNSEEN: dict[str, Callable[[], tuple[dict[str, Any], Callable[[], object]]]] = {
    "data": lambda: _write(lambda tensor: tensor.data.add_(1)),
    "numpy": lambda: _write(lambda tensor: tensor.numpy().fill(1)),
    "fused by hand": lambda: _write(
        lambda tensor: torch._fused_sgd_(
            [tensor],
            [torch.ones(6)],
            [],
            weight_decay=0,
            momentum=0,
            lr=0.1,
            dampening=0,
            nesterov=False,
            maximize=False,
            is_first_step=True,
        )
    ),
}


@pytest.mark.parametrize("make", UNSEEN.values(), ids=UNSEEN)
async def test_what_version_counters_do_not_count_is_not_seen(
    tmp_path: Path, slow: SlowCopy, make: Callable[[], tuple[dict[str, Any], Callable[[], object]]]
) -> None:
    state, change = make()
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        change()
        slow.let_go.set()
        await ckpt.uploaded


async def test_check_torn_false_does_not_look(tmp_path: Path, slow: SlowCopy) -> None:
    state = {"w": torch.zeros(6)}
    async with Checkpointer(check_torn=False) as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        state["w"].add_(1)
        slow.let_go.set()
        await ckpt.uploaded


async def test_a_change_of_what_is_copied_already_counts_too(tmp_path: Path, slow: SlowCopy) -> None:
    """A fused step changes the parameters unseen: its counter may be staged by then, in an earlier segment."""
    state = {f"w{n}": torch.zeros(5 << 20, dtype=torch.uint8) for n in range(8)}
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        assert ckpt.progress.bytes_staged > 5 << 20
        state["w0"].add_(1)
        slow.let_go.set()
        with pytest.raises(TornSnapshotError) as caught:
            await ckpt.staged
        assert caught.value.fqns == ("w0",)


async def test_inference_tensors_have_no_version_and_are_saved_all_the_same(tmp_path: Path) -> None:
    with torch.inference_mode():
        state = {"w": torch.arange(6.0), "n": 3}
    state["v"] = torch.ones(3)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        target = blank(state)
        await checkpointer.load(target, tmp_path)
    assert_equal(state, target)


async def test_what_was_frozen_at_capture_may_change(tmp_path: Path, slow: SlowCopy) -> None:
    sparse = torch.eye(3).to_sparse()
    state = {"sparse": sparse, "w": torch.zeros(3)}
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        sparse.mul_(2)
        slow.let_go.set()
        await ckpt.uploaded
        target = {"sparse": torch.zeros(3, 3).to_sparse(), "w": torch.ones(3)}
        await checkpointer.load(target, tmp_path)
    assert_equal(target["sparse"].to_dense(), torch.eye(3))


def _change_sharded(rank: int, size: int, path: Path, foreach: bool) -> None:
    mesh = init_device_mesh("cpu", (size,))
    weight = torch.nn.Parameter(distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=foreach)
    assert isinstance(weight, DTensor)
    weight.grad = DTensor.from_local(torch.ones(6 // size, 2), mesh, [Shard(0)])

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            slow = SlowCopy(patch)
            async with Checkpointer() as checkpointer:
                ckpt = await checkpointer.save({"model": {"w": weight}}, path)
                assert await asyncio.to_thread(slow.reached.wait, 30)
                if rank == 1:
                    optimizer.step()
                slow.let_go.set()
                with pytest.raises(RankError, match=r"rank 1: TornSnapshotError: .*model\.w") as caught:
                    await ckpt.uploaded
                assert {each.rank for each in caught.value.failures} == {1}
                assert isinstance(caught.value.__cause__, TornSnapshotError) is (rank == 1)
                await (await checkpointer.save({"model": {"w": weight}}, path)).uploaded

    asyncio.run(main())


@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_on_one_rank_fails_the_save_on_all(world: World, tmp_path: Path, foreach: bool) -> None:
    world.run(2, _change_sharded, tmp_path / "ckpt", foreach)


# --- guard


def _net() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


class Fences:
    """Tells when an optimizer has begun to wait."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        fence = SaveState.fence

        def reached(state: SaveState) -> None:
            self.reached.set()
            fence(state)

        patch.setattr(SaveState, "fence", reached)


@pytest.mark.parametrize("which", ["one", "all"])
async def test_a_guarded_optimizer_steps_when_all_is_staged(
    tmp_path: Path, slow: SlowCopy, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    model, optimizer = _net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fences = Fences(monkeypatch)
    async with Checkpointer() as checkpointer:
        checkpointer.guard(*([optimizer] if which == "one" else []))
        ckpt = await checkpointer.save({"model": model}, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        step = asyncio.create_task(asyncio.to_thread(optimizer.step))  # a plain thread, without an event loop
        assert await asyncio.to_thread(fences.reached.wait, 30)
        assert_equal(dict(model.state_dict()), before)
        slow.let_go.set()
        await step
        await ckpt.uploaded
        target = blank(before)
        await checkpointer.load({"model": target}, tmp_path)
        assert_equal(target, before)
        assert not torch.equal(model.weight, before["weight"])
        optimizer.step()  # nothing to wait for


async def test_a_guard_ends_with_its_block_and_another_goes_on(tmp_path: Path, slow: SlowCopy) -> None:
    (model, optimizer), (other, second) = _net(), _net()
    state = {"model": model, "other": other}
    async with Checkpointer() as checkpointer:
        kept = checkpointer.guard(second)
        with checkpointer.guard(optimizer, second) as guard:
            assert repr(guard) == "<Guard of 2 optimizers>"
        guard.remove()
        assert "removed" in repr(guard)
        assert "removed" not in repr(kept)
        ckpt = await checkpointer.save(state, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        optimizer.step()
        step = asyncio.create_task(asyncio.to_thread(second.step))
        slow.let_go.set()
        await step
        with pytest.raises(TornSnapshotError) as caught:
            await ckpt.uploaded
        assert caught.value.fqns == ("model.weight", "model.bias")


async def test_a_save_that_fails_lets_a_guarded_optimizer_go_on_and_is_reported_all_the_same(
    faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _net()

    def copy(*_: object) -> None:
        raise RuntimeError("no copy today")

    monkeypatch.setattr(Staging, "copy", copy)
    with pytest.raises(StageError, match="no copy today"):
        async with Checkpointer(storage=faulty) as checkpointer:
            checkpointer.guard(optimizer)
            await checkpointer.save({"model": model}, "a")
            optimizer.step()


async def test_no_hook_stays_behind() -> None:
    hooks = dict(_global_optimizer_pre_hooks)
    async with Checkpointer() as checkpointer:
        checkpointer.guard()
        assert len(_global_optimizer_pre_hooks) == len(hooks) + 1
        with pytest.raises(ArgumentError, match="Linear"):
            checkpointer.guard(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert _global_optimizer_pre_hooks == hooks
    with pytest.raises(ClosedError):
        checkpointer.guard()


async def test_a_hook_of_the_callers_own_may_wait_instead(tmp_path: Path, slow: SlowCopy) -> None:
    model, optimizer = _net()
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save({"model": model}, tmp_path)
        optimizer.register_step_pre_hook(lambda *_: ckpt.staged.wait(30))
        assert await asyncio.to_thread(slow.reached.wait, 30)
        step = asyncio.create_task(asyncio.to_thread(optimizer.step))
        slow.let_go.set()
        await step
        await ckpt.uploaded


async def test_an_optimizer_of_other_tensors_may_step(tmp_path: Path, slow: SlowCopy) -> None:
    model, _ = _net()
    _, optimizer = _net()
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save({"model": model}, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        optimizer.step()
        slow.let_go.set()
        await ckpt.uploaded


async def test_a_parameter_without_a_gradient_is_not_stepped(tmp_path: Path, slow: SlowCopy) -> None:
    model, _ = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model.bias.grad = None
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save({"model": {"bias": model.bias}}, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        optimizer.step()
        slow.let_go.set()
        await ckpt.uploaded


async def test_a_forked_child_has_nothing_to_wait_for(tmp_path: Path, slow: SlowCopy) -> None:
    model, optimizer = _net()
    async with Checkpointer() as checkpointer:
        checkpointer.guard(optimizer)
        ckpt = await checkpointer.save({"model": model}, tmp_path)
        assert await asyncio.to_thread(slow.reached.wait, 30)
        real = os.getpid()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: real + 1)
            optimizer.step()
        assert not ckpt.staged.done()
        slow.let_go.set()
        with pytest.raises(TornSnapshotError):  # it was this process after all
            await ckpt.uploaded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, of torch.jit
async def test_a_compiled_step_is_guarded_too(tmp_path: Path) -> None:
    model, optimizer = _net()
    step = torch.compile(optimizer.step, backend="eager")
    async with Checkpointer() as checkpointer:
        checkpointer.guard(optimizer)
        for _ in range(3):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            ckpt = await checkpointer.save({"model": model}, tmp_path)
            step()
            await ckpt.uploaded
            target = blank(before)
            await checkpointer.load({"model": target}, tmp_path)
            assert_equal(target, before)
            assert not torch.equal(model.weight, before["weight"])


@rank_test(2)
async def test_a_save_that_is_over_holds_nothing_of_the_state(rank: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    mesh = init_device_mesh("cpu", (size,))
    async with Checkpointer() as checkpointer:
        weight = distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)])
        assert isinstance(weight, DTensor)
        here = weakref.ref(weight)
        ckpt = await checkpointer.save({"w": weight}, path)
        del weight
        await ckpt.uploaded
        await checkpointer.load({"w": torch.zeros(8, 2)}, path)  # the save has wound up by then
        gc.collect()
        assert here() is None


def test_a_watch_is_over_when_the_values_are_let_go() -> None:
    """By the engine's thread, at any moment: also between a caller's look at `staged` and its fence."""
    model, optimizer = _net()
    taken = capture({"model": model})
    watch = TearDetector()
    watch.watch(taken, {})
    taken.values.clear()
    watch.begins_step(optimizer)
    watch.close()
    assert watch.changed() == []


def test_a_step_of_parameters_without_storage_changes_nothing() -> None:
    """Those of FSDP1 between two uses: where nothing is stored lies every empty tensor, too."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    watch = TearDetector()
    watch.watch(capture({"empty": torch.zeros(0), "w": torch.ones(2)}), {})
    weight.grad = torch.ones(3)
    weight.untyped_storage().resize_(0)
    watch.begins_step(optimizer)
    assert watch.changed() == []
