"""The look at a state's tensors, which knows what it has seen before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from aiodcp._state import known_tensors
from aiodcp._state.known_tensors import KEPT_STATES, KnownTensors, Seen


def make() -> list[Any]:
    """Return values of all kinds, more than are looked at in one call."""
    tensors: list[Any] = [torch.zeros(number % 7, 2) for number in range(25)]
    tensors[3] = torch.nn.Parameter(torch.zeros(2))
    tensors[15:18] = [1, "text", None]
    return tensors


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 2)


CHANGES: dict[str, Callable[[], Any]] = {
    "shape": lambda: torch.zeros(3, 3),
    "dtype": lambda: torch.zeros(2, 2, dtype=torch.int64),
    "order": lambda: torch.zeros(2, 2).t(),
    "class": lambda: torch.nn.Parameter(torch.zeros(2, 2)),
    "subclass": lambda: torch.zeros(2, 2).as_subclass(type("Own", (torch.Tensor,), {})),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8),
    "nowhere": lambda: torch.zeros(2, 2, device="meta"),
    "inference": inference,
    "changed": lambda: torch.zeros(2, 2).add_(1),
    "number": lambda: 5,
    "nothing": lambda: None,
}


@pytest.fixture(autouse=True)
def ten_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_tensors, "AT_ONCE", 10)


@pytest.fixture(params=["guards", "none", "others"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has; it may give that up, or change its arguments: it is private."""
    if request.param != "guards":
        monkeypatch.setattr(known_tensors, "TensorGuards", None if request.param == "none" else lambda *tensors: 1)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("index", [2, 14, 16])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(change: str, index: int) -> None:
    known, values = KnownTensors(), make()
    first = known.look(values)
    assert first == KnownTensors().look(values)
    changed = [*values]
    changed[index] = CHANGES[change]()
    for state in (changed, changed, values, [*reversed(values)], values[:-1], values):
        assert known.look(state) == KnownTensors().look(state)
    assert first.odd == [15, 16, 17]


def test_a_value_that_is_made_a_tensor_is_seen() -> None:
    known, values = KnownTensors(), make()
    known.look(values)
    values[16] = torch.zeros(2)
    assert known.look(values).odd == [15, 17]


def test_tensors_that_are_known_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known, values = KnownTensors(), make()
    first = known.look(values)
    looks: list[int] = []
    look_at = known_tensors._look_at

    def count(some: Sequence[Any]) -> Any:
        looks.append(len(some))
        return look_at(some)

    monkeypatch.setattr(known_tensors, "_look_at", count)
    values[5].add_(1)
    again = known.look([value.detach() if type(value) is torch.Tensor else value for value in values])
    assert looks == []
    assert again == Seen(
        odd=first.odd, kinds=first.kinds, versions=[*first.versions[:5], 1, *first.versions[6:]], devices=set()
    )
    values[20] = torch.zeros(9)
    known.look(values)
    assert looks == [5]  # what is left of the last ten


def test_host_memory_is_no_device_whatever_else_is_there() -> None:
    for other in (torch.zeros(2), torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()):
        assert KnownTensors().look([torch.zeros(2), other]).devices == set()


def test_a_state_without_tensors_is_looked_at() -> None:
    known = KnownTensors()
    for _ in range(2):
        assert known.look([1, None]) == Seen(odd=[0, 1], kinds=[None, None], versions=[0, 0], devices=set())


def test_a_tensor_that_is_there_twice_is_looked_at_each_time() -> None:
    known, tied = KnownTensors(), torch.zeros(2)
    for _ in range(2):
        assert known.look([tied, tied]).kinds == [(torch.Tensor, torch.float32, torch.Size([2]))] * 2


def test_no_tensor_is_kept_alive() -> None:
    known, tensor = KnownTensors(), torch.zeros(2)
    kept = weakref.ref(tensor)
    known.look([tensor])
    del tensor
    assert kept() is None


def test_the_states_of_one_checkpoint_are_known_side_by_side() -> None:
    known = KnownTensors()
    for count in range(KEPT_STATES + 2):
        known.look([torch.zeros(2)] * count)
    assert [*known._known] == [*range(2, KEPT_STATES + 2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_that_has_moved_to_a_device_is_seen() -> None:
    known, values = KnownTensors(), make()
    known.look(values)
    values[2] = values[2].cuda()
    for state, devices in ((values, {torch.device("cuda", 0)}), (make(), set())):
        assert known.look(state) == KnownTensors().look(state)
        assert known.look(state).devices == devices
