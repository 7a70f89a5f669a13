"""Tensors whose elements lie in a dense buffer."""

from __future__ import annotations

import torch

PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}

QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}


def is_plain(value: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in a dense buffer that the staging copy understands."""
    return (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and value.dtype not in QUANTIZED
        and not value.is_meta
    )
