"""What a resuming program asks for and what is stored: names, structure, objects that judge for themselves."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import aiodcp
from aiodcp import ArgumentError, Checkpointer, LoadReport, MismatchError, PerRank, StatefulError
from aiodcp._load import loader, local_plan
from aiodcp._state.structure import rebuild

from ..support.in_memory import saved
from ..support.states import assert_equal


class Holder:
    """An object that takes whatever state it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


async def resume(stored: dict[str, Any], wanted: dict[str, Any], **options: Any) -> LoadReport:
    async with Checkpointer(storage=await saved(stored)) as checkpointer:
        return await checkpointer.load(wanted, "ckpt", **options)


# --- names


async def test_what_is_stored_beside_the_names_that_are_asked_for_is_left_alone() -> None:
    model, optimizer = nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters())
    other = nn.Linear(2, 2)
    report = await resume({"model": model, "optim": optimizer, "step": 7}, {"model": other})
    assert not report
    assert_equal(model.state_dict(), other.state_dict())
    flat = {"w": torch.zeros(1)}
    await resume({"w": torch.ones(1), "v": torch.ones(1)}, flat)
    assert flat["w"] == 1


@pytest.mark.parametrize("strict", [True, False])
async def test_a_model_only_load_checks_the_model_both_ways(strict: bool) -> None:
    def make(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    stored = {"model": make("body", "old"), "optim": {"lr": 0.1}}
    wanted = {"model": make("body", "head")}
    if strict:
        with pytest.raises(MismatchError) as caught:
            await resume(stored, wanted)
        assert caught.value.missing == ("model.head.bias", "model.head.weight")
        assert caught.value.unexpected == ("model.old.bias", "model.old.weight")
        assert "strict=False loads what both have" in str(caught.value)
    else:
        report = await resume(stored, wanted, strict=False)
        assert report.missing == ["model.head.bias", "model.head.weight"]
        assert report.unexpected == ["model.old.bias", "model.old.weight"]
        names = "model", "body.weight"
        assert torch.equal(*(each[names[0]].get_parameter(names[1]) for each in (stored, wanted)))  # type: ignore[attr-defined]


async def test_a_partial_load_is_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "aiodcp"):
        stored = {"a": torch.ones(1), "d": {"x": 1, "gone": 2}, "half": torch.ones(1, dtype=torch.bfloat16)}
        wanted = {"a": torch.zeros(1), "b": torch.zeros(1), "d": {"x": 0}, "half": torch.zeros(1)}
        report = await resume(stored, wanted, strict=False)
    assert report == LoadReport(missing=["b"], unexpected=["d.gone"], converted=["half"])
    reported = "\n".join(caplog.messages)
    assert "not in the checkpoint: b" in reported
    assert "in the checkpoint only: d.gone" in reported
    assert "converted: half" in reported


async def test_a_part_that_is_new_is_left_out_of_a_partial_load() -> None:
    model, average, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    before = copy.deepcopy(average.state_dict())
    wanted = {"model": other, "average": average, "scaler": torch.amp.GradScaler("cpu")}
    report = await resume({"model": model}, wanted, strict=False)
    assert report.missing[:2] == ["average.bias", "average.weight"]
    assert any(name.startswith("scaler.") for name in report.missing)
    assert_equal(before, average.state_dict())
    assert_equal(model.state_dict(), other.state_dict())


async def test_a_whole_part_that_is_stored_under_another_name_is_no_partial_load() -> None:
    for wanted in ({"modle": nn.Linear(1, 1), "step": 0}, {"modle": {"weight": torch.ones(1)}, "step": 0}):
        with pytest.raises(MismatchError, match=r"modle\.weight \(did you mean model\.weight\?\)"):
            await resume({"model": nn.Linear(1, 1), "step": 1}, wanted, strict=False)
        assert wanted["step"] == 0


async def test_the_words_never_advise_what_would_leave_an_optimizer_without_its_state() -> None:
    optimizer = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    for stored, wanted in (
        ({"x": 1}, {"optim": optimizer, "x": 1}),
        ({"app": {"optim": optimizer}}, {"app": {"x": 1}}),
    ):
        with pytest.raises(MismatchError) as caught:
            await resume(stored, wanted)
        assert "strict=False" not in str(caught.value)


class Compiled(nn.Module):
    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)  # no wrapper, in spite of its name
        inner = nn.Linear(2, 2)
        self.inner = torch.compile(inner) if compiled else inner


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's compiler, on import
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("stored", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("wanted", [True, False], ids=["into compiled", "into plain"])
async def test_torch_compile_leaves_no_trace_in_names(where: str, stored: bool, wanted: bool) -> None:
    def make(compiled: bool) -> Any:
        if where == "inside":
            return Compiled(compiled)
        return torch.compile(nn.Linear(2, 2)) if compiled else nn.Linear(2, 2)

    source, target = make(stored), make(wanted)
    storage = await saved({"m": source})
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.load({"m": target}, "ckpt")
        names = {"module.weight": torch.zeros(2, 2)} if where == "inside" else {"weight": torch.zeros(2, 2)}
        await checkpointer.load({"m": names}, "ckpt", strict=False)
    assert any(each.any() for each in names.values())
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)

    again = make(wanted)  # and what was saved with the prefixes, as by dcp.save
    await resume({"m": dict(source.state_dict())}, {"m": again})
    assert torch.equal(next(again.parameters()), next(source.parameters()))


async def test_names_with_a_wrapper_in_a_plain_dict_are_explained() -> None:
    with pytest.raises(
        MismatchError, match=r'in the state dict have the prefix "_orig_mod\.", the others do not: use rename='
    ):
        await resume({"m": {"weight": torch.ones(1)}}, {"m": {"_orig_mod.weight": torch.ones(1)}})
    with pytest.raises(MismatchError, match=r'in the checkpoint have the prefix "module\."'):
        await resume({"m": {"module.weight": torch.ones(1)}}, {"m": {"weight": torch.ones(1)}})


async def test_names_are_mapped_by_prefixes_or_by_a_function() -> None:
    model = nn.Linear(2, 2)
    target = nn.Linear(2, 2)
    await resume({"old": {"enc": model.state_dict()}}, {"net": target}, rename={"old.enc": "net"})
    assert_equal(model.state_dict(), target.state_dict())
    target = nn.Linear(2, 2)
    await resume(dict(model.state_dict()), {"net": target}, rename={"": "net"})
    assert_equal(model.state_dict(), target.state_dict())
    target = nn.Linear(2, 2)
    await resume(dict(model.state_dict()), {"net": target}, rename=lambda name: f"net.{name}")
    assert_equal(model.state_dict(), target.state_dict())
    holder = Holder({})
    await resume({"x": Holder({"enc": {"w": torch.ones(1), "n": 3}})}, {"x": holder}, rename={"x.enc": "x.dec"})
    assert holder.state == {"dec": {"w": torch.ones(1), "n": 3}}


@pytest.mark.parametrize(
    ("rename", "problem"),
    [
        (3, "neither a mapping of prefixes nor a function"),
        ({"a": 1}, "1 is not a prefix"),
        (lambda name: "same", "maps both 'a' and 'b' to 'same'"),
        (lambda name: None, "maps 'a' to None"),
        (lambda name: 1 // 0, "raised ZeroDivisionError"),
    ],
)
async def test_a_rename_that_cannot_be_meant_is_refused(rename: Any, problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        await resume({"a": 1, "b": 2}, {"a": 0}, rename=rename)


# --- structure


@pytest.mark.parametrize(
    ("stored", "there"),
    [
        ({"a": {"b": 1}}, {"a": {}}),
        ({"a": {1: {2: torch.ones(1)}}}, {"a": {}}),
        ({"history": [{"loss": 0.5}]}, {"history": []}),
        ({"history": [{"loss": 0.5}]}, {"history": [{"loss": 0.0}, {"loss": 0.0}]}),
        ({"history": []}, {"history": [{"loss": 0.0}]}),
        ({"history": [1, 2]}, {"history": [torch.ones(1)]}),
        ({"buffer": [torch.arange(3), torch.arange(2)]}, {"buffer": [torch.zeros(3, dtype=torch.int64)]}),
        ({"best": torch.tensor(0.5)}, {"best": None}),
        ({"best": {"w": torch.ones(2)}}, {"best": None}),
        ({"best": None}, {"best": torch.ones(2)}),
        ({"best": None}, {"best": {"a": 1}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", ["an object", "a dict"])
async def test_lists_dicts_and_none_come_back_as_they_were_saved(stored: Any, there: Any, inside: str) -> None:
    if inside == "an object":
        holder = Holder(copy.deepcopy(there))
        await resume({"x": Holder(copy.deepcopy(stored))}, {"x": holder})
        assert_equal(stored, holder.state)
    else:
        target = {"x": copy.deepcopy(there)}
        await resume({"x": copy.deepcopy(stored)}, target)
        assert_equal(stored, target["x"])


@pytest.mark.parametrize(
    ("stored", "there"),
    [
        ({"a": {}}, {"a": {"b": 1}}),
        ({"a": {"b": torch.ones(3)}}, {"a": {"b": torch.zeros(2)}}),
        ({"a": torch.ones(3, dtype=torch.bfloat16)}, {"a": torch.zeros(3)}),
        ({"a": "text"}, {"a": torch.zeros(3)}),
        ({"a": torch.zeros(3)}, {"a": "text"}),
        ({"b": 2, "a": 1}, {"a": 1, "c": 3}),
        (OrderedDict(z=1, y={"x": torch.ones(1)}), {"y": {"w": 1}}),
        ({"a": torch.eye(3).to_sparse()}, {"a": torch.zeros(3, 3)}),
    ],
    ids=str,
)
async def test_an_object_is_given_its_state_as_it_was_saved(stored: Any, there: Any) -> None:
    holder = Holder(copy.deepcopy(there))
    await resume({"x": Holder(stored)}, {"x": holder})
    assert_equal(dict(stored), holder.state)


async def test_tensors_of_an_object_are_filled_in_place_where_they_fit() -> None:
    fits, fits_not = torch.zeros(2), torch.zeros(3)
    holder = Holder({"fits": fits, "other": fits_not, "gone": torch.zeros(1)})
    await resume({"x": Holder({"fits": torch.ones(2), "other": torch.ones(4), "new": torch.ones(1)})}, {"x": holder})
    assert holder.state["fits"] is fits
    assert holder.state["other"] is not fits_not
    assert list(holder.state) == ["fits", "other", "new"]
    assert not fits_not.any()


async def test_a_state_dict_that_is_the_objects_own_is_not_emptied_under_it() -> None:
    class Live(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state.clear()
            self.state.update(state)

    live = Live({"a": {"x": 1}, "gone": 2})
    await resume({"x": Holder({"a": {"x": 3}, "new": torch.ones(1)})}, {"x": live})
    assert live.state == {"a": {"x": 3}, "new": torch.ones(1)}


async def test_a_plain_dict_is_changed_where_it_is() -> None:
    history: list[Any] = []
    empty: dict[str, Any] = {}
    await resume({"h": [{"l": 1}], "e": {"a": torch.ones(1)}}, {"h": history, "e": empty})
    assert history == [{"l": 1}]
    assert empty == {"a": torch.ones(1)}


class Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    ("stored", "there"),
    [
        (torch.arange(200, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)),
        ({"scale": 2.0}, {}),
        ({}, {"scale": 2.0}),
        ({"a": {"b": torch.ones(2)}}, {"a": {"b": torch.zeros(3), "c": 1}}),
        (None, torch.ones(3)),
        (torch.ones(3), None),
        ([1, {"a": 2}], []),
        ({1: 2}, {}),
    ],
    ids=str,
)
async def test_a_modules_extra_state_is_handed_over_as_it_was_saved(stored: Any, there: Any) -> None:
    model = nn.Sequential(Extra(copy.deepcopy(there)))
    await resume({"m": nn.Sequential(Extra(stored))}, {"m": model})
    assert_equal(stored, model[0].extra)


@pytest.mark.parametrize("enabled", [(True, True), (True, False), (False, False)], ids=str)
async def test_a_scaler_judges_its_own_state(enabled: tuple[bool, bool]) -> None:
    stored, wanted = (torch.amp.GradScaler("cpu", enabled=each, init_scale=2.0) for each in enabled)
    for beside in ({}, {"w": torch.ones(1)}):
        await resume({"scaler": stored, **beside}, {"scaler": wanted, **beside})
    assert stored.state_dict() == wanted.state_dict() or not enabled[1]


async def test_what_an_object_raises_is_reported_with_its_name() -> None:
    stored, wanted = (torch.amp.GradScaler("cpu", enabled=each) for each in (False, True))
    with pytest.raises(StatefulError, match=r"scaler: load_state_dict\(\) of GradScaler raised RuntimeError") as caught:
        await resume({"scaler": stored}, {"scaler": wanted})
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_numbers_and_tensors_without_dimensions_become_each_other() -> None:
    target: dict[str, Any] = {"a": torch.tensor(0.0), "b": 0.0, "c": torch.tensor(False), "d": 0}
    stored = {"a": 5, "b": torch.tensor(0.5), "c": True, "d": torch.tensor(3)}
    report = await resume(stored, target)
    assert (target["a"].item(), target["b"], target["c"].item(), target["d"]) == (5.0, 0.5, True, 3)
    assert sorted(report.converted) == ["a", "b", "c", "d"]
    for lossy, there in (
        (torch.tensor(0.5), 0),
        (0.1, torch.tensor(0.0)),
        (1 << 60, torch.tensor(0, dtype=torch.int8)),
    ):
        target = {"v": copy.copy(there), "w": torch.zeros(1)}
        with pytest.raises(MismatchError, match=r"v is the .*lossy conversion, which cast=True"):
            await resume({"v": lossy, "w": torch.ones(1)}, target)
        assert not target["w"].any()
    target = {"v": 0}
    await resume({"v": torch.tensor(2.5)}, target, cast=True)
    assert target["v"] == 2


async def test_tensors_on_the_meta_device_and_of_lazy_modules_are_made() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    await resume({"m": model}, {"m": empty})
    assert_equal(model.state_dict(), empty.state_dict())
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    await resume({"m": model}, {"m": lazy})
    assert_equal(model.state_dict(), lazy.state_dict())
    target = {"w": torch.zeros(2, device="meta")}
    await resume({"w": torch.ones(2)}, target)
    assert torch.equal(target["w"], torch.ones(2))
    with pytest.raises(MismatchError, match=r"w has shape \(2,\)"):
        await resume({"w": torch.ones(2)}, {"w": torch.zeros(3, device="meta")})


async def test_an_object_below_the_top_level_is_named_when_loading_too() -> None:
    for there in ({"model": nn.Linear(1, 1)}, [nn.Linear(1, 1)], (1, nn.Linear(1, 1))):
        with pytest.raises(ArgumentError, match=r"x\.(model|0|1): is a Linear: .* only at the top level"):
            await resume({"x": 1}, {"x": there})


async def test_nothing_but_errors_of_the_tree_leaves_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyError("k"), MemoryError(), RuntimeError("r"), TypeError("t")):

        def fail(*args: Any, error: Exception = error) -> None:
            raise error

        for where, name in (
            (local_plan, "plan_load"),
            (loader, "settle_values"),
            (loader, "read_found"),
            (loader, "fill_whole"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(where, name, fail)
                with pytest.raises(aiodcp.LoadError):
                    await resume({"w": torch.ones(1)}, {"w": torch.zeros(1)})


async def test_a_number_goes_into_a_tensor_without_memory_and_not_into_one_that_cannot_be_changed() -> None:
    wanted: dict[str, Any] = {"n": torch.zeros((), device="meta")}
    await resume({"n": 5}, wanted)
    assert_equal(wanted["n"], torch.tensor(5.0))
    with torch.device("meta"):
        model = nn.BatchNorm1d(2)
    await resume({"model": nn.BatchNorm1d(2).state_dict() | {"num_batches_tracked": 7}}, {"model": model})
    assert_equal(model.num_batches_tracked, torch.tensor(7))
    with torch.inference_mode():
        fixed = torch.zeros(())
    for tensor, problem in ((fixed, "inference mode"), (torch.zeros(()).to_sparse(), "another kind of value")):
        before = torch.zeros(2)
        with pytest.raises(MismatchError, match=rf"n .*{problem}"):
            await resume({"n": 5, "w": torch.ones(2)}, {"n": tensor, "w": before})
        assert not before.any()


async def test_dtypes_that_torch_cannot_convert_are_refused_before_anything_changes() -> None:
    packed = torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for stored, target in ((packed, torch.zeros(2)), (torch.ones(2), packed.clone())):
        before = torch.zeros(2)
        with pytest.raises(MismatchError, match=r"x is torch\.\w+ in the checkpoint, .* torch cannot convert"):
            await resume({"x": stored, "w": torch.ones(2)}, {"x": target, "w": before}, cast=True)
        assert not before.any()


@pytest.mark.parametrize(
    "state",
    [
        {"workers": {0: {"pos": 1}, 1: {"pos": 2}}},
        {"parts": [{}, {"a": 1}, torch.ones(1)]},
        {"n": 1, "empty": {}},
        {"n": 1, "by step": {3: {}, 8: {}}},
    ],
)
async def test_renamed_containers_are_what_they_were(state: dict[str, Any]) -> None:
    def by_function(name: str) -> str:
        return {"data": "loader"}[name.partition(".")[0]] + name[len("data") :]

    for rename in ({"data": "loader"}, by_function):
        holder = Holder({})
        await resume({"data": Holder(state)}, {"loader": holder}, rename=rename)
        assert_equal(state, holder.state)
        keys = [type(key) for value in holder.state.values() if isinstance(value, dict) for key in value]
        assert keys == [type(key) for value in state.values() if isinstance(value, dict) for key in value]


async def test_what_is_excluded_is_not_given_its_own_state() -> None:
    class Loader(Holder):
        def load_state_dict(self, state: Any) -> None:
            raise AssertionError("an excluded object is left alone")

    state = {"position": 1, "empty": {}}
    wanted = {"data": Loader(state), "w": torch.zeros(1)}
    await resume({"data": Holder(state), "w": torch.ones(1)}, wanted, exclude="data")
    assert wanted["w"] == 1


@pytest.mark.parametrize("extra", [torch.arange(20, dtype=torch.uint8), {"s": 2.0}, torch.ones(2).bfloat16()])
async def test_a_modules_extra_state_is_as_stored_also_where_each_rank_has_its_own(extra: Any) -> None:
    for wrap in (lambda module: module, PerRank):
        wanted = Extra({} if isinstance(extra, dict) else torch.zeros(2))
        await resume({"model": wrap(Extra(extra))}, {"model": wrap(wanted)})
        assert_equal(wanted.extra, extra)


async def test_keys_and_empty_mappings_that_dcp_does_not_note_come_of_what_is_there(tmp_path: Path) -> None:
    """DCP keeps neither the kind of keys nor empty mappings: siblings and the numbers of list items say it."""
    stored = {"milestones": Counter({3: 1, 8: 1}), "parts": [{}, {"a": 1}, torch.ones(1)]}
    dcp.save({"x": Holder(stored)}, checkpoint_id=tmp_path, no_dist=True)
    holder = Holder({"milestones": Counter({5: 1, 8: 1}), "parts": []})
    async with Checkpointer() as checkpointer:
        await checkpointer.load({"x": holder}, tmp_path)
    assert holder.state["milestones"] == stored["milestones"]
    assert_equal(holder.state["parts"], stored["parts"])


async def test_a_list_whose_numbers_make_no_sense_is_not_filled_up() -> None:
    assert rebuild((), [((0,), "a"), ((10**12,), "b")], [], [], set()) == ["a", "b"]
