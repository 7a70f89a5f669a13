"""How two checkpoints differ."""

from __future__ import annotations

import io
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from anyio import to_thread

from .._engine.sync_bridge import sync_function
from .._state.plain_tensors import is_plain
from .._telemetry.progress_bar import Bar, NoBar
from ..checkpointer.arguments import CheckpointId
from ..storage.base import Storage
from .stored_checkpoint import open_checkpoint
from .stored_values import StoredTensor, StoredValue, name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a value differs between two checkpoints.

    Attributes:
        fqn: the value.
        change: in words: "only in A", "other shape", "other values" and so on.
        count: elements that differ; None where that cannot be said.
        largest, mean: of the absolute differences, likewise.
    """

    fqn: str
    change: str
    count: int | None = None
    largest: float | None = None
    mean: float | None = None


async def diff(
    a: CheckpointId, b: CheckpointId, *, storage: Storage | None = None, bar: Bar | None = None
) -> list[Difference]:
    """Compare all values of two checkpoints, and return those that differ, by name.

        changed = await aiodcp.diff("run/step-100", "run/step-200")

    Args:
        a, b: which; as for `aiodcp.open`, and not of one format necessarily.
        storage: where; by default where the ids say.
        bar: told how many bytes one of the two has, by `total`, and have been compared, by `advance`.

    Raises:
        LoadError: one of them cannot be read.

    Cancellation: takes effect when the read under way is done.
    """
    bar = bar or NoBar()
    async with open_checkpoint(a, storage=storage) as of_a, open_checkpoint(b, storage=storage) as of_b:
        found = [Difference(fqn=fqn, change="only in A") for fqn in of_a.keys() - of_b.keys()]
        found += [Difference(fqn=fqn, change="only in B") for fqn in of_b.keys() - of_a.keys()]
        alike: list[str] = []
        for fqn in sorted(of_a.keys() & of_b.keys()):
            change = _change_of_kind(of_a[fqn], of_b[fqn])
            if change:
                found.append(Difference(fqn=fqn, change=change))
            else:
                alike.append(fqn)
        bar.total(sum(_tensor_nbytes(of_a[fqn]) for fqn in alike))
        if not alike:
            return sorted(found, key=lambda each: each.fqn)
        chosen = frozenset(alike).__contains__
        streams = of_a.stream(chosen, order=alike), of_b.stream(chosen, order=alike)
        async with aclosing(streams[0]) as stream_a, aclosing(streams[1]) as stream_b:
            async for fqn, one in stream_a:
                _, other = await anext(stream_b)
                difference = await to_thread.run_sync(_compare, fqn, one, other)
                if difference is not None:
                    found.append(difference)
                bar.advance(_tensor_nbytes(of_a[fqn]))
    return sorted(found, key=lambda each: each.fqn)


def _tensor_nbytes(stored: StoredTensor | StoredValue) -> int:
    return stored.nbytes if isinstance(stored, StoredTensor) else 0


def _change_of_kind(one: StoredTensor | StoredValue, other: StoredTensor | StoredValue) -> str:
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        if one.shape != other.shape:
            return f"shape {tuple(one.shape)} in A, {tuple(other.shape)} in B"
        return "" if one.dtype is other.dtype else f"{name_of(one.dtype)} in A, {name_of(other.dtype)} in B"
    if isinstance(one, StoredTensor) or isinstance(other, StoredTensor):
        tensor, value = ("A", "B") if isinstance(one, StoredTensor) else ("B", "A")
        return f"a tensor in {tensor}, another kind of value in {value}"
    return ""


def _compare(fqn: str, one: Any, other: Any) -> Difference | None:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        same = type(one) is type(other) and _archive_of(one) == _archive_of(other)
        return None if same else Difference(fqn=fqn, change=_short(one) + " in A, " + _short(other) + " in B")
    if not (is_plain(one) and is_plain(other)):
        return None if _archive_of(one) == _archive_of(other) else Difference(fqn=fqn, change="other values")
    if not one.numel() or torch.equal(_bytes_of(one), _bytes_of(other)):
        return None
    try:
        differs = (one != other) & ~((one != one) & (other != other))  # what is not itself is NaN
        count = int(differs.sum())
        if not count:
            return Difference(fqn=fqn, change="other bits, the same values", count=0, largest=0.0, mean=0.0)
        apart = _apart(one[differs], other[differs])
    except RuntimeError:  # dtypes that torch does not compute with
        return Difference(fqn=fqn, change="other bits")
    mean = float(apart.sum()) / one.numel()
    return Difference(fqn=fqn, change="other values", count=count, largest=float(apart.max()), mean=mean)


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the absolute differences, in float64; of integers computed as such, where that is exact."""
    if one.is_complex():
        return (one.to(torch.complex128) - other.to(torch.complex128)).abs()
    if one.is_floating_point() or one.dtype is torch.uint64:
        return (one.double() - other.double()).abs()
    return (one.long() - other.long()).abs().double()


def _archive_of(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


diff_sync = sync_function(diff)
