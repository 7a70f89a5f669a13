"""Optimizers, in every state in which a resuming program may have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from aiodcp import Checkpointer, MemoryStorage, MismatchError
from aiodcp._state.optimizers import find_optimizer

from ..support.in_memory import load, saved
from ..support.states import assert_equal

Make = Callable[[nn.Module], torch.optim.Optimizer]

KINDS: dict[str, Make] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.5),
    "Adam, amsgrad": lambda model: torch.optim.Adam(model.parameters(), amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4),
}


class App:
    """Application state as most people write it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict(), "epoch": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optim"])
        assert state["epoch"] == 3


def make_model(sizes: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 2)).to(dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    parameter = next(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(2, parameter.shape[1], dtype=parameter.dtype)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(times):
        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 3], ids=lambda steps: f"after {steps} steps")
async def test_the_state_of_any_optimizer_comes_back_bit_for_bit(kind: str, steps: int) -> None:
    model = make_model()
    optimizer = KINDS[kind](model)
    step(model, optimizer, 2)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        other = make_model()
        made = KINDS[kind](other)
        step(other, made, steps)
        return other, made

    storage = await saved({"model": model, "optim": optimizer})
    other, at_the_top = fresh()
    await load(storage, {"model": other, "optim": at_the_top})
    assert_equal(optimizer.state_dict(), at_the_top.state_dict())

    app = App(*fresh())
    await load(await saved({"app": App(model, optimizer)}), {"app": app})
    assert_equal(optimizer.state_dict(), app.optimizer.state_dict())

    _, bare = fresh()
    state = {"nested": [{"optim": bare.state_dict()}]}
    await load(await saved({"nested": [{"optim": optimizer.state_dict()}]}), state)
    bare.load_state_dict(state["nested"][0]["optim"])
    assert_equal(optimizer.state_dict(), bare.state_dict())


async def test_a_participant_of_a_joint_checkpoint_is_loaded_alike() -> None:
    from aiodcp import joint_checkpoint

    model = make_model()
    optimizer = KINDS["AdamW"](model)
    step(model, optimizer)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        async with joint_checkpoint(checkpointer, "ckpt") as ckpt:
            ckpt.add("trainer", {"model": model.state_dict(), "optim": optimizer.state_dict()})
        other = make_model()
        fresh = KINDS["AdamW"](other)
        state = {"trainer": {"model": other.state_dict(), "optim": fresh.state_dict()}}
        await checkpointer.load(state, "ckpt")
    fresh.load_state_dict(state["trainer"]["optim"])
    assert_equal(optimizer.state_dict(), fresh.state_dict())


def _stepped_for(layers: Iterable[int]) -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    for layer in layers:
        model[layer](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("stored", "live"), [([0], [0, 1]), ([0, 1], [0]), ([1], [0]), ([0, 1], [0, 1])])
async def test_a_parameters_state_may_be_absent_on_either_side(stored: list[int], live: list[int]) -> None:
    source, target = _stepped_for(stored), _stepped_for(live)
    await load(await saved({"o": source}), {"o": target})
    assert_equal(source.state_dict(), target.state_dict())


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch 2.9's set_state_dict wants a state for every parameter, also with strict=False",
)
async def test_parameters_that_were_never_used_have_no_state_under_their_names_either() -> None:
    def make(layers: Iterable[int]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(model.parameters())
        for name in layers:
            model["ab"[name]](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer

    class Named:
        def __init__(self, layers: Iterable[int]) -> None:
            self.model, self.optimizer = make(layers)

        def state_dict(self) -> dict[str, Any]:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optim": optimizer}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.given = state["optim"]
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optim"],
                options=StateDictOptions(strict=False),  # else torch, the judge here, wants a state for every parameter
            )

    for stored, live in ([0], [0, 1]), ([0, 1], [0]), ([0], []):
        source, target = Named(stored), Named(live)
        await load(await saved({"app": source}), {"app": target})
        assert_equal(source.model.state_dict(), target.model.state_dict())
        assert_equal(source.state_dict()["optim"], target.given)


async def test_a_part_of_a_parameters_state_is_a_misfit() -> None:
    model = make_model()
    sgd, adam = KINDS["SGD, momentum"](model), KINDS["AdamW"](model)
    step(model, sgd)
    step(model, adam)
    before = copy.deepcopy(adam.state_dict())
    with pytest.raises(MismatchError, match=r"o\.state\.0\.exp_avg is in the state dict") as caught:
        await load(await saved({"o": sgd}), {"o": adam})
    assert "o.state.0.momentum_buffer is in the checkpoint" in str(caught.value)
    assert "strict=False" not in str(caught.value)  # it would leave the optimizer without its state
    assert_equal(before, adam.state_dict())


async def test_options_are_those_that_were_saved_and_the_optimizers_own_where_they_were_not(tmp_path: Path) -> None:
    model = make_model()
    optimizer = KINDS["AdamW"](model)
    step(model, optimizer)
    older = optimizer.state_dict()
    del older["param_groups"][0]["decoupled_weight_decay"]  # which torch before 2.8 does not have
    older["param_groups"][0]["lr"] = 0.25
    dcp.save({"optim": older}, checkpoint_id=str(tmp_path), no_dist=True)
    fresh = KINDS["AdamW"](make_model())
    async with Checkpointer() as checkpointer:
        await checkpointer.load({"optim": fresh}, tmp_path)
    assert fresh.param_groups[0]["lr"] == 0.25
    assert fresh.param_groups[0]["decoupled_weight_decay"] is True
    assert fresh.state

    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # puts initial_lr beside lr
    storage = await saved({"o": optimizer})
    bare = KINDS["AdamW"](make_model())
    await load(storage, {"o": bare})
    assert bare.param_groups[0]["initial_lr"] == optimizer.param_groups[0]["initial_lr"]
    scheduled = KINDS["AdamW"](make_model())
    torch.optim.lr_scheduler.StepLR(scheduled, 2)
    await load(await saved({"o": KINDS["AdamW"](model)}), {"o": scheduled})
    assert scheduled.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize("steps", [0, 1])
async def test_a_learning_rate_is_of_the_kind_that_was_saved(steps: int) -> None:
    for stored, there in ((0.1, torch.tensor(0.5)), (torch.tensor(0.1), 0.5), (torch.tensor(0.1), torch.tensor(0.5))):
        model, other = make_model(), make_model()
        optimizer, fresh = (
            torch.optim.Adam(each.parameters(), lr=lr) for each, lr in ((model, stored), (other, there))
        )
        step(model, optimizer)
        step(other, fresh, steps)
        await load(await saved({"o": optimizer}), {"o": fresh})
        assert_equal(optimizer.state_dict(), fresh.state_dict())


async def test_parameters_are_matched_by_their_names_where_both_have_them() -> None:
    def make(order: str) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "abc"})
        groups = [
            {"params": [(f"{name}.weight", model[name].weight) for name in group], "lr": 0.1 * len(group)}
            for group in order.split()
        ]
        return model, torch.optim.AdamW(groups)

    model, optimizer = make("ab c")
    for number, name in enumerate("abc", 1):
        model[name](torch.full((1, 4), float(number))).sum().backward()
    optimizer.step()
    storage = await saved({"o": optimizer})
    other, reordered = make("c ba")
    await load(storage, {"o": reordered})
    for name in "abc":
        now, before = other.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")
        assert torch.equal(reordered.state[now]["exp_avg"], optimizer.state[before]["exp_avg"])
    assert [group["lr"] for group in reordered.param_groups] == [0.1, 0.2]
    assert reordered.param_groups[1]["param_names"] == ["b.weight", "a.weight"]
    with pytest.raises(MismatchError, match=r"o\.param_groups\.0 does not match a parameter group"):
        await load(storage, {"o": make("a bc")[1]})
    with pytest.raises(MismatchError, match=r"the checkpoint also has c\.weight"):
        await load(storage, {"o": make("b a")[1]})


async def test_another_models_state_is_refused_before_anything_changes() -> None:
    model = make_model()
    optimizer = KINDS["AdamW"](model)
    step(model, optimizer)
    storage = await saved({"model": model, "optim": optimizer})
    for steps in (0, 1):
        narrow = make_model(dtype=torch.bfloat16)
        half = KINDS["AdamW"](narrow)
        step(narrow, half, steps)
        before = copy.deepcopy(half.state_dict())
        with pytest.raises(MismatchError, match=r"exp_avg is torch\.float32 in the checkpoint.*cast=True"):
            await load(storage, {"optim": half})
        assert_equal(before, half.state_dict())
        await load(storage, {"optim": half}, cast=True)
        assert half.state_dict()["state"][0]["exp_avg"].dtype is torch.bfloat16

    with pytest.raises(MismatchError, match=r"has shape \(4, 4\) in the checkpoint, its parameter \(7, 5\)"):
        await load(storage, {"optim": KINDS["AdamW"](make_model((5, 7)))})

    other = make_model()
    nn.init.zeros_(other[0].weight)  # type: ignore[index]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(MismatchError, match="has 4 parameters in the checkpoint, 1 in the state dict"):
        await load(storage, {"model": other, "optim": torch.optim.AdamW([other[0].bias])})  # type: ignore[index]
    with pytest.raises(MismatchError, match="has 1 parameter groups in the checkpoint, 2 in the state dict"):
        groups = [{"params": list(other[0].parameters())}, {"params": list(other[1].parameters())}]  # type: ignore[index]
        await load(storage, {"model": other, "optim": torch.optim.AdamW(groups)})
    assert_equal(before, other.state_dict())


async def test_a_planner_of_the_callers_gets_room_for_a_fresh_optimizer_too() -> None:
    model = make_model()
    optimizer = KINDS["AdamW"](model)
    step(model, optimizer)
    fresh = KINDS["AdamW"](make_model())
    await load(await saved({"o": optimizer}), {"o": fresh}, planner=dcp.DefaultLoadPlanner())
    assert_equal(optimizer.state_dict()["state"], fresh.state_dict()["state"])


async def test_groups_saved_as_one_value_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch before 2.4 saved them, which left lists of mappings without tensors whole."""
    model = make_model()
    optimizer = KINDS["AdamW"](model)
    step(model, optimizer)
    monkeypatch.setattr("torch.distributed.checkpoint._version._derived_version", "2_3")
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save({"o": optimizer}, "ckpt", planner=dcp.DefaultSavePlanner()))
        monkeypatch.undo()
        fresh = KINDS["AdamW"](make_model())
        await checkpointer.load({"o": fresh}, "ckpt")
    assert_equal(optimizer.state_dict(), fresh.state_dict())


def test_of_several_optimizers_that_are_alike_the_name_decides() -> None:
    class Adversaries:
        def __init__(self) -> None:
            self.parts = {name: KINDS["SGD, momentum"](make_model()) for name in ("generator", "critic")}

        def state_dict(self) -> dict[str, Any]:
            return {name: each.state_dict() for name, each in self.parts.items()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    owner = Adversaries()
    for name, state in owner.state_dict().items():
        assert find_optimizer(owner, name, state) is owner.parts[name]
        assert find_optimizer(owner, "another", state) is None
    del owner.parts["critic"]
    assert find_optimizer(owner, "another", owner.parts["generator"].state_dict()) is owner.parts["generator"]


# --- state dicts that are more, or other, than torch's own optimizers have


class Counting(torch.optim.SGD):
    """Has something of its own beside `state` and `param_groups`, as PostLocalSGDOptimizer does."""

    def __init__(self, params: Any, steps: int = 0) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.steps = steps

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps, "mean": torch.tensor([float(self.steps)])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.steps = state_dict.pop("steps")
        assert state_dict.pop("mean") == self.steps
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("is_bare", [False, True])
async def test_what_an_optimizer_has_of_its_own_comes_back_before_its_first_step(is_bare: bool) -> None:
    def make(steps: int) -> Counting:
        model = nn.Linear(2, 2)
        optimizer = Counting(model.parameters(), steps)
        if steps:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        return optimizer

    before, after = make(7), make(0)
    if is_bare:
        wanted = {"optim": after.state_dict()}
        await load(await saved({"optim": before.state_dict()}), wanted)
        after.load_state_dict(wanted["optim"])
    else:
        await load(await saved({"optim": before}), {"optim": after})
    assert_equal(before.state_dict(), after.state_dict())
    assert after.steps == 7


async def test_what_a_bare_state_dict_has_of_its_own_and_was_not_saved_is_missing() -> None:
    weight = nn.Parameter(torch.ones(2))
    stored, wanted = (torch.optim.SGD([weight], lr=0.1).state_dict() for _ in range(2))
    wanted["steps"] = 3
    with pytest.raises(MismatchError) as caught:
        await load(await saved({"optim": stored}), {"optim": wanted})
    assert caught.value.missing == ("optim.steps",)
    target = {"optim": wanted}
    await load(await saved({"optim": stored}), target, strict=False)
    assert target["optim"]["steps"] == 3


class Odd(torch.optim.Optimizer):
    """Whose state of a parameter is no dict, and which has other keys in its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = torch.full_like(parameter, 3.0)
        self.state.update({"count": 5, "history": [1, 2]})  # type: ignore[dict-item]


@pytest.mark.parametrize("has_stepped", [False, True])
async def test_a_state_that_is_no_dict_comes_back(has_stepped: bool) -> None:
    before, after = (Odd(nn.Linear(2, 2).parameters()) for _ in range(2))
    before.step()
    if has_stepped:
        after.step()
        after.state.update({"count": 9})  # type: ignore[dict-item]
    await load(await saved({"optim": before}), {"optim": after})
    assert_equal(before.state_dict(), after.state_dict())


async def test_lbfgs_goes_back_to_when_it_had_less_history() -> None:
    models = make_model(), make_model()
    before, after = (torch.optim.LBFGS(model.parameters(), max_iter=3) for model in models)
    step(models[0], before, 1)
    step(models[1], after, 4)
    await load(await saved({"optim": before}), {"optim": after})
    assert_equal(before.state_dict(), after.state_dict())


class LowRank(torch.optim.Optimizer):
    """Whose moments have other shapes than its parameters, as GaLore's and Shampoo's do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"exp_avg": torch.ones(2, parameter.shape[1])}


async def test_moments_of_an_unknown_optimizer_need_not_have_the_shape_of_their_parameter() -> None:
    before, after, other = (LowRank([nn.Parameter(torch.ones(size))]) for size in ((8, 4), (8, 4), (5, 3)))
    before.step()
    await load(await saved({"optim": before}), {"optim": after})
    assert_equal(before.state_dict(), after.state_dict())
    with pytest.raises(MismatchError, match=r"exp_avg has shape \(2, 4\) in the checkpoint, its parameter \(5, 3\)"):
        await load(await saved({"optim": before}), {"optim": other})


@pytest.mark.parametrize("where", ["below a name", "the whole state"])
async def test_a_bare_state_dict_is_treated_alike_also_where_it_is_the_whole_state(where: str) -> None:
    def stepped() -> dict[str, Any]:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
        return copy.deepcopy(optimizer.state_dict())

    def put(state: dict[str, Any]) -> dict[str, Any]:
        return state if where == "the whole state" else {"optim": state}

    less, more, fewer, whole = (stepped() for _ in range(4))
    del less["param_groups"][0]["decoupled_weight_decay"]
    more["param_groups"][0]["initial_lr"] = 0.5
    del fewer["state"][1]
    for stored in (less, more, fewer, whole):
        for wanted in (torch.optim.AdamW(make_model().parameters()).state_dict(), stepped()):
            await load(await saved(put(stored) | {"epoch": 3}), target := put(wanted))
            loaded = target if where == "the whole state" else target["optim"]
            assert_equal(loaded["state"], stored["state"])
            assert stored["param_groups"][0].items() <= loaded["param_groups"][0].items()
            assert "epoch" not in target


async def test_an_optimizer_of_parameters_without_memory_is_refused() -> None:
    """Its moments would have none either; nor are its parameters those that the model has after the load."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    with torch.device("meta"):
        other = make_model()
        wanted = torch.optim.AdamW(other.parameters())
    with pytest.raises(MismatchError, match=r"optim\.state\.0 is of a parameter on the meta device"):
        await load(await saved({"model": model, "optim": optimizer}), {"model": other, "optim": wanted})
    await load(await saved({"model": model}), {"model": other})
    wanted = torch.optim.AdamW(other.parameters())
    await load(await saved({"optim": optimizer}), {"optim": wanted})
    assert_equal(optimizer.state_dict(), wanted.state_dict())
