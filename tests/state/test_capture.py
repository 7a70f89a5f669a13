import io
import threading
import warnings
import weakref
from collections import OrderedDict
from enum import Enum
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from aiodcp import ArgumentError, CaptureError, Checkpointer, MemoryStorage
from aiodcp._state.capture import capture, take
from aiodcp._state.flatten import KnownNames, Walk, flatten

from ..support.states import assert_equal, make_state

T = torch.ones(2)


class Marked(torch.Tensor):
    """A subclass that the framing does not know."""


@pytest.mark.parametrize(
    "state",
    [
        make_state(),
        {"a": {"b": {"c": T}}, "d": [1, 2, 3], "e": [T, 1], "f": [[T]], "g": [[1, 2], [3]], "h": (T, T)},
        {"a": [{"x": 1}, {"y": [T, {"z": 2}]}], "empty": {}, "none": None, "l": []},
        {"": 1, "a.b": 2, "ünïcode.☃": T, "7": {8: T, 9: [OrderedDict(q=T)]}},
        {1: {2: T}},
    ],
    ids=str,
)
def test_names_and_leaves_are_dcps(state: dict[str, Any]) -> None:
    flat, mappings = flatten_state_dict(state)
    leaves = flatten(state)
    assert leaves.fqns == list(flat)
    assert leaves.paths == list(mappings.values())
    assert all(a is b for a, b in zip(leaves.values, flat.values(), strict=True))


def test_other_values_are_frozen_as_torch_save_reads_them() -> None:
    values = {
        "int": 3, "float": 2.5, "str": "ü", "bytes": b"\0", "none": None, "tuple": (1, (2,)), "set": {1, 2},
        "big": 1 << 80, "dict": {}, "list": [1, [2]], "dtype": torch.float16, "size": torch.Size([2]),
        "tensors": (torch.arange(3), {"a": torch.ones(1)}), "storage": torch.ones(2).untyped_storage(),
    }  # fmt: skip
    taken = capture(values)
    for place, fqn in enumerate(taken.fqns):
        back = torch.load(io.BytesIO(taken.frozen[place].archive()), weights_only=False)
        if fqn == "storage":
            assert list(back) == list(values[fqn])  # type: ignore[call-overload]
        elif fqn == "tensors":
            assert_equal(back[0], values[fqn][0])  # type: ignore[index]
        else:
            assert back == values[fqn]


def test_a_frozen_value_is_the_one_at_the_moment_of_capture() -> None:
    history = [1, 2]
    taken = capture({"history": history})
    history.append(3)
    assert torch.load(io.BytesIO(taken.frozen[0].archive())) == [1, 2]


def test_tensors_are_referred_to_and_those_no_copy_understands_are_frozen() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)

    marked = torch.ones(2).as_subclass(Marked)
    taken = capture({"p": parameter, "s": sparse, "q": quantized, "m": marked, "t": T.expand(3, 2)})
    assert taken.values[0] is parameter
    assert sorted(taken.frozen) == [1, 2, 3]


def test_a_value_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(CaptureError, match="lock") as caught:
        capture({"a": {"b": threading.Lock()}})
    assert caught.value.fqn == "a.b"
    assert caught.value.__cause__ is not None


def test_a_meta_tensor_is_named() -> None:
    with pytest.raises(CaptureError, match="meta") as caught:
        capture({"a": {"w": torch.empty(3, device="meta")}})
    assert caught.value.fqn == "a.w"


def test_a_state_dict_that_raises_is_named_with_its_cause() -> None:
    class App:
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("inner")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(CaptureError) as caught:
        capture({"app": App()})
    assert caught.value.fqn == "app"
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ArgumentError, match="state_dict: must be a mapping"):
        capture([T])  # type: ignore[arg-type]


def test_a_state_without_a_value_is_refused_unless_another_rank_may_hold_it() -> None:
    with pytest.raises(CaptureError, match="nothing to save"):
        capture({})
    assert capture({}, may_be_empty=True).fqns == []
    assert capture({"scaler": {}}).containers.empty == [("scaler",)]


def test_something_stateful_below_the_top_level_is_named() -> None:
    with pytest.raises(CaptureError, match="only at the top level") as caught:
        capture({"app": {"model": torch.nn.Linear(1, 1)}})
    assert caught.value.fqn == "app.model"


class _Key(str, Enum):  # noqa: UP042 - a StrEnum is written as its value
    K0 = "k0"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([*range(70)], [*map(float, range(70))]),
        ([*range(70)], [0, True, *range(2, 70)]),
        (["k0", *map(str, range(70))], [_Key.K0, *map(str, range(70))]),
        ([0, 1.0, *range(2, 70)], [0.0, 1, *range(2, 70)]),
    ],
)
def test_equal_keys_of_another_type_have_names_of_their_own(first: list[Any], second: list[Any]) -> None:
    names = KnownNames()
    for keys in (first, second, second, first):
        state = {"m": {key: torch.zeros(1) for key in keys}}
        found, fresh = capture(state, names=names), capture(state)
        assert found.fqns == fresh.fqns
        assert found.paths == fresh.paths


def test_names_of_what_is_gone_are_forgotten() -> None:
    names = KnownNames()
    for epoch in range(5):
        capture({f"epoch{epoch}": {str(n): torch.zeros(1) for n in range(100)}}, names=names)
    assert names.top is not None
    assert [*names.top.below] == [0]
    capture({"a": torch.zeros(1), "b": 1}, names=names)
    assert not names.top.below


def test_dicts_of_leaves_are_named_as_any_other() -> None:
    """Those of an optimizer, which are taken together from some number on, as they come and go and change."""
    names, moments = KnownNames(), {"exp_avg": T, "exp_avg_sq": T}
    states: list[dict[Any, Any]] = [
        {n: {"step": 1, **moments} for n in range(100)},
        {n: {"step": 1, **moments} for n in range(100)},
        {n: {"step": 1, **(moments if n != 50 else {})} for n in range(100)},
        {n: {"step": 1, **(moments if n != 50 else {"exp_avg": {"low": T}})} for n in range(100)},
        {n: {"step": 1, **moments} if n != 50 else {} for n in range(100)},
        {n: {"step": 1, n: T} for n in range(100)},
        {f"p{n}": {"step": 1, **moments} for n in range(100)},
        {f"p{n}": {"param_groups": 1, "state": n} for n in range(100)},
        {n: OrderedDict(step=1, **moments) for n in range(100)},
    ]
    for state in [*states, *states]:
        whole = {"optim": {"state": state, "param_groups": [{"lr": 1.0, "params": [*state]}]}, "step": 3}
        flat, mappings = flatten_state_dict(whole)
        found, fresh = Walk(whole, 0, names).leaves(), flatten(whole)
        assert found.fqns == fresh.fqns == list(flat)
        assert found.paths == fresh.paths == list(mappings.values())
        assert all(a is b for a, b in zip(found.values, flat.values(), strict=True))
        assert found.containers == fresh.containers
        assert found.optimizers == fresh.optimizers


def test_a_list_and_a_dict_of_the_same_numbers_have_names_of_their_own() -> None:
    names, values = KnownNames(), [T, {"b": T}, T]
    for inner in (values, dict(enumerate(values)), values, {True: T, 1.5: T, 2: T}, {1: T, 1.5: T, 2: T}, values[:2]):
        found, fresh = Walk({"a": inner}, 0, names).leaves(), flatten({"a": inner})
        assert (found.fqns, found.paths, found.containers) == (fresh.fqns, fresh.paths, fresh.containers)


def test_what_was_taken_keeps_no_tensor_that_was_looked_at() -> None:
    state = {"w": torch.zeros(3), "log": [1]}
    here = weakref.ref(state["w"])
    instant = take(state)
    captured = instant.look()
    assert captured.values[0] is here()
    captured.values.clear()
    state.clear()
    assert here() is None
    assert instant.frozen.keys() == {1}


def test_each_frozen_value_is_named_where_it_lies() -> None:
    state = {"a": [T, 1], "b": {"c": 2, "d": {"e": [T, {"f": lambda: 0}]}}}
    with pytest.raises(CaptureError, match=r"^b\.d\.e\.1\.f: "):
        capture(state)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
async def test_a_nested_tensor_is_refused_by_name(layout: torch.layout) -> None:
    with warnings.catch_warnings(action="ignore"):  # of torch's, which has two kinds
        ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.raises(CaptureError, match=r"a\.x: a nested tensor cannot be saved"):
            await checkpointer.save({"w": torch.ones(1), "a": {"x": ragged}}, "ckpt")


@pytest.mark.parametrize("keys", [[(0, 1)], [0.5], [0, "a"], [True], [None]])
async def test_keys_that_are_stored_as_text_are_named_when_saved_once(keys: list[Any]) -> None:
    state = {"table": {key: torch.ones(1) for key in keys}}
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.warns(UserWarning, match="table has keys that are neither all str nor all int"):
            await (await checkpointer.save(state, "ckpt")).uploaded
        await (await checkpointer.save(state, "ckpt")).uploaded
        state["table"] = {key: torch.zeros(1) for key in keys}
        await checkpointer.load(state, "ckpt")
        assert [*state["table"]] == keys
        assert all(value == 1 for value in state["table"].values())
