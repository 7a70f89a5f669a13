"""Conversions between dtypes, and which of them are lossy. Pure."""

from __future__ import annotations

from functools import cache

import torch


def is_lossy(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether some value of `stored` is no value of `wanted`."""
    if stored is wanted:
        return False
    kinds = [(d.is_floating_point, d.is_complex, d is torch.bool) for d in (stored, wanted)]
    if kinds[0] != kinds[1]:
        return True
    try:
        return torch.promote_types(stored, wanted) is not wanted
    except RuntimeError:  # torch has no promotion for the float8 and the wider unsigned types
        return True


@cache
def can_convert(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether torch knows how to: not for some of its packed and quantized types."""
    try:
        torch.zeros(1, dtype=wanted).copy_(torch.empty(1, dtype=stored))
    except RuntimeError:  # a NotImplementedError is one
        return False
    return True


def as_number(value: object, kind: type, *, cast: bool) -> int | float | bool | None:
    """Return a number as one of another kind; None if that is lossy, unless `cast`."""
    if not isinstance(value, int | float):
        return None
    try:
        made: int | float | bool = kind(value)
    except (OverflowError, ValueError):
        return None
    return made if cast or made == value or (made != made and value != value) else None


def holds_number(dtype: torch.dtype, value: object, *, cast: bool) -> bool:
    """Whether a tensor of this dtype can hold a number without a loss."""
    if not isinstance(value, int | float):
        return False
    try:
        held = torch.tensor(value, dtype=dtype).item()
    except (OverflowError, RuntimeError, TypeError):
        return False
    return cast or held == value or (held != held and value != value)
