"""How often tensors were changed: PyTorch counts it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch

from .plain_tensors import AT_ONCE, PLAIN_TENSORS

_VERSION = attrgetter("_version")


def version_of(value: object) -> int:
    """Return how often a tensor was changed; 0 of what has no version: inference tensors, and what is no tensor."""
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return 0
    try:
        return value._version
    except RuntimeError:  # one that was given other `.data` since says that it is none
        return 0


def versions_of(values: Sequence[Any]) -> list[int]:
    """Return the same of many: where all have one, without Python code for each."""
    versions: list[int] = []
    for start in range(0, len(values), AT_ONCE):
        some = values[start : start + AT_ONCE]
        try:
            if PLAIN_TENSORS.issuperset(map(type, some)):
                versions += map(_VERSION, some)
            else:  # nothing else is asked for what it may take for something of its own
                versions += [each._version if type(each) in PLAIN_TENSORS else version_of(each) for each in some]
        except RuntimeError:
            del versions[start:]  # those before the one that has none
            versions += map(version_of, some)
    return versions
