"""What is saved and what is loaded by default agree."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import pickle
import random
import types
import uuid
import warnings
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from aiodcp import CaptureError, LoadError, UnsafeError
from aiodcp._format.plain_data import NotPlainError, load_plain

from ..support.in_memory import load, saved
from ..support.states import assert_equal


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Mode(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Settings:
    lr: float
    colour: Colour = Colour.RED
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: int
    b: tuple[int, ...] = ()


class Pair(NamedTuple):
    x: int
    y: float


def _buffer() -> io.BytesIO:
    buffer = io.BytesIO(b"scales")
    buffer.seek(3)
    return buffer


PLAIN: dict[str, Any] = {
    "numpy array": np.arange(6).reshape(2, 3),
    "numpy array of a structure": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "numpy array of text": np.array(["a", "bb"]),
    "numpy array of objects": np.array([1, None, "x"], dtype=object),
    "numpy scalars": [np.float64(0.5), np.int8(3), np.bool_(True), np.datetime64("2026-01-01")],
    "numpy dtypes": (np.dtype("f4"), np.float32, np.dtype([("a", "i4")])),
    "numpy random state": np.random.RandomState(0).get_state(),
    "numpy generator's state": np.random.default_rng(0).bit_generator.state,
    "random state": random.Random(0).getstate(),
    "bytes": [b"", b"\0\xff", bytearray(b"x"), _buffer()],
    "paths": [Path("a/b"), PurePosixPath("/c")],
    "dates": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        datetime.timedelta(1, 2, 3),
        datetime.date(2026, 1, 2),
        datetime.time(1, 2),
        datetime.timezone(datetime.timedelta(hours=1)),
    ],
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1j, 1 << 80],
    "collections": (  # a tuple: of a list mappings are looked into
        collections.deque([1, 2], maxlen=3),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.defaultdict(list, {1: [2]}),
        frozenset({1, (2, 3)}),
        {1, 2},
        range(1, 9, 2),
        slice(1, None, 2),
    ),
    "namespaces": [argparse.Namespace(a=1), types.SimpleNamespace(b=[2])],
    "classes of the program's": [Colour.BLUE, Mode.A | Mode.B, Settings(0.1, Colour.BLUE, [1]), Frozen(1, (2,))],
    "named tuple": (Pair(1, 0.5), uuid.UUID(int=5)),
    "of torch": (torch.bfloat16, torch.Size([1, 2]), torch.device("cpu"), torch.strided),
    "beside tensors": (torch.arange(3), {"p": Path("x"), "d": collections.deque([np.float32(1)])}),
}


def _comparable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, io.BytesIO):
        return value.getvalue(), value.tell()
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [type(value), *map(_comparable, value)]
    if type(value) is dict:
        return {key: _comparable(each) for key, each in value.items()}
    return type(value), value


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("planned", [False, True], ids=["", "by a planner"])
async def test_plain_data_come_back_by_default_without_a_word(name: str, planned: bool) -> None:
    from torch.distributed.checkpoint import DefaultSavePlanner

    from aiodcp import Checkpointer, MemoryStorage

    value = PLAIN[name]
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save({"v": value}, "ckpt", planner=DefaultSavePlanner() if planned else None))
        target: dict[str, Any] = {"v": None}
        await checkpointer.load(target, "ckpt")
    assert _comparable(target["v"]) == _comparable(value)


class Custom:
    def __init__(self, number: int) -> None:
        self.number = number


class Other(Custom):
    pass


class Stateful(Settings):
    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the class's own")


@pytest.mark.parametrize(
    ("value", "needed"),
    [
        (Custom(1), ["Custom"]),
        ([Custom(1), (Other(2), torch.ones(1))], ["Custom", "Other"]),
        (Settings(0.1, more=Custom(1)), ["Custom"]),
        (Stateful(0.1), ["Stateful"]),
    ],
    ids=["object", "objects and a tensor", "object in a dataclass", "dataclass with state_dict"],
)
async def test_what_is_more_than_plain_data_is_reported_when_it_is_saved_with_all_that_it_needs(
    value: Any, needed: list[str]
) -> None:
    from aiodcp import Checkpointer, MemoryStorage

    names = [f"{__name__}.{each}" for each in needed]
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.warns(UserWarning, match="v is not plain data") as reported:
            await checkpointer.save({"v": value, "w": torch.ones(1)}, "ckpt")
        await (await checkpointer.save({"v": value, "w": torch.ones(1)}, "ckpt"))  # without another warning
        assert len(reported) == 1
        assert all(name in str(reported[0].message) for name in names)
        target: dict[str, Any] = {"v": None, "w": torch.zeros(1)}
        with pytest.raises(UnsafeError, match=r"v\): needs") as caught:
            await checkpointer.load(target, "ckpt")
        assert caught.value.names == tuple(names)
        assert not target["w"].any()
        if needed == ["Stateful"]:
            return
        with torch.serialization.safe_globals([Custom, Other]):
            await checkpointer.load(target, "ckpt")
        assert type(target["v"]) is type(value)


def test_a_pickle_cannot_change_what_it_names() -> None:
    # GLOBAL collections.OrderedDict, a state for it, BUILD: would set an attribute of the class
    hostile = b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    with pytest.raises(pickle.UnpicklingError, match="sets attributes"):
        load_plain(hostile)
    for names in ("os system", "builtins eval", "builtins exec", "posix system", "torch load", "functools partial"):
        module, name = names.split()
        with pytest.raises(NotPlainError, match=name):
            load_plain(f"c{module}\n{name}\n(X\x01\x00\x00\x00atR.".encode())
    with pytest.raises(pickle.UnpicklingError, match="an attribute"):
        load_plain(b"cbuiltins\ngetattr\n(K\x01X\x06\x00\x00\x00__or__tR.")
    with pytest.raises(pickle.UnpicklingError, match="defaultdict of"):
        load_plain(b"ccollections\ndefaultdict\n(cdatetime\ndatetime\ntR.")


async def test_a_class_that_is_gone_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await saved({"c": Colour.BLUE})
    monkeypatch.delitem(globals(), "Colour")
    with pytest.raises(LoadError, match="Colour"):
        await load(storage, {"c": None})


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([nn.Linear(1, 1)], r"v\.0"),
        ({"a": (1, [nn.Linear(1, 1)])}, r"v\.a\.1\.0"),
        ((torch.ones(1), nn.Linear(1, 1)), r"v\.1"),
        ([torch.optim.SGD(nn.Linear(1, 1).parameters())], r"v\.0"),
        (types.SimpleNamespace(model=nn.Linear(1, 1)), "v"),
        (collections.deque([nn.Linear(1, 1)]), "v"),
    ],
    ids=str,
)
async def test_an_object_inside_a_value_is_refused_by_its_name(value: Any, name: str) -> None:
    with pytest.raises(CaptureError, match=rf"^{name}: is a (Linear|SGD): .* only at the top level"):
        await saved({"v": value})


async def test_a_lazy_parameter_is_refused_by_its_name() -> None:
    with pytest.raises(CaptureError, match=r"m\.weight: is a parameter of a lazy module"):
        await saved({"m": nn.LazyLinear(3)})


# --- kinds of tensors


class Quantized(torch.Tensor):
    """A subclass without storage that knows no `copy_`, as some of torchao's."""

    data_: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Quantized:
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
        return made

    def __init__(self, data: torch.Tensor) -> None:
        self.data_ = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Quantized:
        return Quantized(inner["data_"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].data_)
        raise NotImplementedError(function)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Quantized({self.data_})"


def _two(value: float) -> TwoTensor:
    return TwoTensor(torch.full((2, 3), value), torch.full((2, 3), value + 1))  # type: ignore[no-untyped-call]


async def test_subclasses_are_filled_by_copy_or_replaced_where_they_are() -> None:
    with torch.serialization.safe_globals([TwoTensor, Quantized]):
        stored = {"two": _two(1.0), "list": [Quantized(torch.ones(2, dtype=torch.int8))], "none": _two(3.0)}
        storage = await saved(stored)
        two = _two(0.0)
        target: dict[str, Any] = {"two": two, "list": [Quantized(torch.zeros(2, dtype=torch.int8))], "none": None}
        await load(storage, target)
        assert target["two"] is two
        assert torch.equal(two.a, torch.ones(2, 3))
        assert torch.equal(target["list"][0].data_, torch.ones(2, dtype=torch.int8))
        assert torch.equal(target["none"].b, torch.full((2, 3), 4.0))

        model = nn.Linear(3, 2)
        model.weight = nn.Parameter(_two(1.0))
        other = nn.Linear(3, 2)
        other.weight = nn.Parameter(_two(0.0))
        await load(await saved({"m": model}), {"m": other})
        assert torch.equal(other.weight.data.b, torch.full((2, 3), 2.0))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
async def test_a_sparse_tensor_may_have_another_number_of_elements(layout: str) -> None:
    def make(dense: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = getattr(dense, "to_sparse" if layout == "coo" else f"to_sparse_{layout}")()
        return made

    storage = await saved({"w": torch.ones(3), "s": make(torch.eye(4))})
    for there in (make(torch.ones(4, 4)), None):
        target: dict[str, Any] = {"w": torch.zeros(3), "s": there}
        await load(storage, target)
        assert torch.equal(target["s"].to_dense(), torch.eye(4))
    target = {"w": torch.zeros(3), "s": torch.zeros(4, 4)}
    with pytest.raises(LoadError, match=r"s is torch\.sparse_\w+ in the checkpoint, torch\.strided"):
        await load(storage, target)
    assert not target["w"].any()


async def test_conjugated_and_negated_views_are_filled_too() -> None:
    large = torch.randn(300_000, dtype=torch.complex64)
    state = {"z": torch.randn(4, dtype=torch.complex64), "x": torch.randn(4), "large": large}
    target = {
        "z": torch.zeros(8, dtype=torch.complex64)[::2].conj(),
        "x": torch._neg_view(torch.zeros(4)),
        "large": torch.zeros_like(large).conj(),
    }
    await load(await saved(state), target)
    assert_equal(state, {name: each.resolve_conj().resolve_neg() for name, each in target.items()})


async def test_no_warning_of_torchs_is_shown_for_what_dcp_save_wrote(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from aiodcp import Checkpointer

    dcp.save({"w": torch.ones(4)}, checkpoint_id=str(tmp_path), no_dist=True)
    target = {"w": torch.zeros(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Checkpointer() as checkpointer:
            await checkpointer.load(target, tmp_path)
    assert target["w"].all()
