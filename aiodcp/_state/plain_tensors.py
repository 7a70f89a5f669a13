"""Tensors whose elements lie in a dense buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}

AT_ONCE = 1000  # tensors: for as long as they are looked at no other thread has the GIL

QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}


def devices_of(tensors: Sequence[torch.Tensor]) -> set[torch.device]:
    """Return the devices on which tensors are, but for host memory: to ask each for its device takes six times as long.

    Of two devices with one number, which are of two kinds, one is returned.
    """
    by_number: dict[int, torch.Tensor] = {}
    for start in range(0, len(tensors), AT_ONCE):
        some = tensors[start : start + AT_ONCE]
        by_number.update(zip(map(torch.Tensor.get_device, some), some, strict=True))
    return {tensor.device for number, tensor in by_number.items() if number >= 0}


def is_plain(value: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in a dense buffer that the staging copy understands."""
    return (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and value.dtype not in QUANTIZED
        and not value.is_meta
    )
