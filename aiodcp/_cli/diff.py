"""`aiodcp diff`: how two checkpoints differ."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .._format.dcp import TensorStorageMetadata
from .._state.plain_tensors import is_plain
from .reading import load, make_checkpointer, name_of, nbytes_of, pieces, read
from .text_tables import number, plural, table


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


def diff(a: str, b: str, advance: Callable[[int], None], total: Callable[[int], None]) -> list[Difference]:
    """Compare all values of two checkpoints, and return those that differ, by name.

    Args:
        a, b: the directories.
        advance, total: as for `verify`, with the bytes of one of the two.

    Raises:
        LoadError: one of them cannot be read.
    """
    entries = [read(each)[0].state_dict_metadata for each in (a, b)]
    found = [Difference(fqn=fqn, change="only in A") for fqn in entries[0].keys() - entries[1].keys()]
    found += [Difference(fqn=fqn, change="only in B") for fqn in entries[1].keys() - entries[0].keys()]
    alike: list[str] = []
    for fqn in sorted(entries[0].keys() & entries[1].keys()):
        change = _change_of_kind(entries[0][fqn], entries[1][fqn])
        if change:
            found.append(Difference(fqn=fqn, change=change))
        else:
            alike.append(fqn)
    total(sum(nbytes_of(entries[0][fqn]) for fqn in alike))
    with make_checkpointer(a) as of_a, make_checkpointer(b) as of_b:
        for names in pieces(entries[0], alike):
            wanted = {fqn: entries[0][fqn] for fqn in names}
            states = [load(of_a, a, wanted), load(of_b, b, wanted)]
            for fqn in names:
                difference = _compare(fqn, states[0][fqn], states[1][fqn])
                if difference is not None:
                    found.append(difference)
            advance(sum(nbytes_of(entries[0][fqn]) for fqn in names))
    return sorted(found, key=lambda each: each.fqn)


def _change_of_kind(one: Any, other: Any) -> str:
    tensors = [isinstance(each, TensorStorageMetadata) for each in (one, other)]
    if tensors[0] is not tensors[1]:
        return f"a tensor in {'A' if tensors[0] else 'B'}, another kind of value in {'B' if tensors[0] else 'A'}"
    if not tensors[0]:
        return ""
    if one.size != other.size:
        return f"shape {tuple(one.size)} in A, {tuple(other.size)} in B"
    if one.properties.dtype is not other.properties.dtype:
        return f"{name_of(one.properties.dtype)} in A, {name_of(other.properties.dtype)} in B"
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


def format_diff(differences: list[Difference]) -> str:
    """Return the table of `aiodcp diff`."""
    if not differences:
        return "the same, bit for bit"
    rows = [
        [
            each.fqn,
            each.change,
            "" if each.count is None else str(each.count),
            "" if each.largest is None else number(each.largest),
            "" if each.mean is None else number(each.mean),
        ]
        for each in differences
    ]
    verb = "differs" if len(differences) == 1 else "differ"
    titles = ["name", "change", ">elements", ">largest", ">mean"]
    return f"{table(titles, rows)}\n{plural(len(differences), 'value')} {verb}"
