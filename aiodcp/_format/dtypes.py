"""dtypes that torch does not copy."""

from __future__ import annotations

import re

import torch


def _cannot_copy(dtype: torch.dtype) -> bool:
    one = torch.empty(1, dtype=dtype)
    try:
        one.copy_(one.clone())
    except NotImplementedError:  # torch has no kernel for it
        return True
    return False


# dtypes below a byte that this version of torch does not copy: found by trying, as they become fewer.
NOT_COPIED = {
    dtype
    for name, dtype in vars(torch).items()
    if re.fullmatch(r"u?int[1-7]|float[48]_\w+", name) and dtype.itemsize == 1 and _cannot_copy(dtype)
}


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, seen as bytes if torch can copy it only so."""
    return tensor.view(torch.uint8) if tensor.dtype in NOT_COPIED else tensor
