"""Loads of a part, and what a load would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiodcp import ArgumentError, Checkpointer, CorruptError, MismatchError, NotACheckpointError

from ..support.ranks import rank_test
from ..support.states import assert_equal


class App:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return self.data

    def load_state_dict(self, data: dict[str, Any]) -> None:
        self.data = data
        self.loads += 1


def make(*, trained: bool = False) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if trained else 0.1)
    if trained:
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    values = [1, torch.ones(1), 3] if trained else [1]
    app = App({"a": torch.full((2,), float(trained)), "list": values, "k": 9 if trained else 5})
    return {"model": model, "optim": optimizer, "app": app, "step": 7 if trained else 0, "rest": {"x": float(trained)}}


async def saved(tmp_path: Path) -> dict[str, Any]:
    state = make(trained=True)
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
    return state


async def test_what_is_excluded_stays_as_it_is(tmp_path: Path) -> None:
    stored, state = await saved(tmp_path), make()
    bias = state["model"][0].bias.clone()
    async with Checkpointer() as checkpointer:
        report = await checkpointer.load(state, tmp_path, exclude=["optim", "model.0.bias", "app.k", "rest"])
    assert not report
    assert torch.equal(state["model"][0].bias, bias)
    assert torch.equal(state["model"][0].weight, stored["model"][0].weight)
    assert not state["optim"].state
    assert state["optim"].param_groups[0]["lr"] == 0.1
    assert state["app"].data["k"] == 5
    assert torch.equal(state["app"].data["a"], torch.ones(2))
    assert len(state["app"].data["list"]) == 3
    assert state["step"] == 7
    assert state["rest"] == {"x": 0.0}
    assert {"model.0.bias", "app.k", "rest.x", "optim.param_groups.0.lr"} <= set(report.excluded)
    assert {"model.0.weight", "step"} <= set(report.loaded)


async def test_only_what_is_included_is_loaded(tmp_path: Path) -> None:
    stored, state = await saved(tmp_path), make()
    async with Checkpointer() as checkpointer:
        await checkpointer.load(state, tmp_path, include="model", exclude="*.bias")
        assert torch.equal(state["model"][1].weight, stored["model"][1].weight)
        assert not torch.equal(state["model"][1].bias, stored["model"][1].bias)
        assert (state["step"], state["app"].loads, len(state["optim"].state)) == (0, 0, 0)
        await checkpointer.load(state, tmp_path, include=lambda name: name.startswith("optim"))
        assert_equal(stored["optim"].state_dict(), state["optim"].state_dict())
        larger: dict[str, Any] = {"model": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))}
        with pytest.raises(MismatchError):
            await checkpointer.load(larger, tmp_path)
        await checkpointer.load(larger, tmp_path, exclude="model.1")
        assert torch.equal(larger["model"][0].weight, stored["model"][0].weight)


async def test_a_part_of_an_optimizer_is_refused(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with Checkpointer() as checkpointer:
        for options in ({"exclude": "optim.state"}, {"include": ["model", "optim.state.0"]}):
            with pytest.raises(ArgumentError, match="part of the optimizer 'optim'"):
                await checkpointer.load(make(), tmp_path, **options)
        with pytest.raises(ArgumentError, match="include"):
            await checkpointer.load(make(), tmp_path, include=3)  # type: ignore[arg-type]


async def test_check_reports_what_a_load_would_do_and_changes_nothing(tmp_path: Path) -> None:
    await saved(tmp_path)
    state = make()
    before = {name: tensor.clone() for name, tensor in state["model"].state_dict().items()}
    async with Checkpointer() as checkpointer:
        report = await checkpointer.check(state, tmp_path)
        assert not report
        assert "model.0.weight" in report.loaded
        assert_equal(before, dict(state["model"].state_dict()))
        assert (state["step"], state["app"].loads, len(state["optim"].state)) == (0, 0, 0)
        other: dict[str, Any] = {"model": nn.Linear(9, 9), "new": 1, "step": torch.tensor(1)}
        report = await checkpointer.check(other, tmp_path)
        assert report
        assert report.missing == ["model.bias", "model.weight", "new"]
        assert "model.0.weight" in report.unexpected
        assert isinstance(report.refusal, MismatchError)
        with pytest.raises(MismatchError) as caught:
            await checkpointer.load(other, tmp_path)
        assert str(caught.value) == str(report.refusal)
        report = await checkpointer.check({"model": make()["model"].half()}, tmp_path)
        assert report.refusal is not None
        assert "lossy" in report.refusal.problems[0]
        assert (await checkpointer.check({"model": make()["model"].double()}, tmp_path)).converted
        with pytest.raises(NotACheckpointError):
            await checkpointer.check(state, tmp_path / "nothing")
        [path] = tmp_path.glob("*.distcp")
        path.unlink()
        with pytest.raises(CorruptError, match="missing"):
            await checkpointer.check(state, tmp_path)


def test_check_without_an_event_loop(tmp_path: Path) -> None:
    with Checkpointer() as checkpointer:
        checkpointer.save_sync({"a": 1}, tmp_path).uploaded.wait()
        state = {"a": 0}
        assert not checkpointer.check_sync(state, tmp_path)
        assert state == {"a": 0}


@rank_test(2)
async def test_ranks_check_together(rank: int, size: int, tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        state: dict[str, Any] = {"a": torch.ones(3), f"own.{rank}": torch.ones(2)}
        await (await checkpointer.save(state, tmp_path)).uploaded
        target = {name: torch.zeros_like(value) for name, value in state.items()}
        assert not await checkpointer.check(target, tmp_path)
        assert not target["a"].any()
        target["b" if rank else "c"] = torch.ones(1)
        report = await checkpointer.check(target, tmp_path)
        assert report.missing == ["b" if rank else "c"]
        assert report.refusal is not None
        await checkpointer.load(target, tmp_path, exclude=["b", "c"])
        assert_equal(state["a"], target["a"])


@pytest.mark.parametrize(
    ("include", "problem"),
    [
        ("modle", "did you mean model"),
        (["model", "optm"], "'optm'"),
        ("model.w*ght", "means nothing"),
        (lambda name: False, "is true for no name"),
    ],
)
async def test_what_is_included_must_be_there(include: Any, problem: str, tmp_path: Path) -> None:
    await saved(tmp_path)
    state = make()
    async with Checkpointer() as checkpointer:
        with pytest.raises(ArgumentError, match=problem) as caught:
            await checkpointer.load(state, tmp_path, include=include)
        assert caught.value.argument == "include"
        with pytest.raises(ArgumentError, match=problem):
            await checkpointer.check(state, tmp_path, include=include)
