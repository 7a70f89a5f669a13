"""How often tensors were changed: PyTorch counts it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch

from .plain_tensors import AT_ONCE

_VERSION = attrgetter("_version")


def version_of(value: object) -> int:
    """Return how often a tensor was changed; 0 of what has no version: inference tensors, and what is no tensor."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def versions_of(values: Sequence[Any]) -> list[int]:
    """Return the same of many: where all have one, without Python code for each."""
    versions: list[int] = []
    for start in range(0, len(values), AT_ONCE):
        some = values[start : start + AT_ONCE]
        try:
            versions += map(_VERSION, some)
        except (AttributeError, RuntimeError):
            del versions[start:]  # those before the one that has none
            versions += map(version_of, some)
    return versions
