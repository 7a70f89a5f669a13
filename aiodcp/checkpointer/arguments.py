"""Checks of arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from .._format.custom_metadata import encode_custom_metadata
from ..errors import ArgumentError

CheckpointId = str | os.PathLike[str]


def ranks_on_this_host() -> int:
    """As torchrun tells it. More copying threads than cores wait for each other: measured, 10 times as long."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(told)) if told.isdecimal() else 1


def check_id(checkpoint_id: object, argument: str = "checkpoint_id") -> str:
    """Return a path as text, or raise `ArgumentError` if it is none."""
    if not isinstance(checkpoint_id, str | os.PathLike):
        raise ArgumentError(argument, f"a {type(checkpoint_id).__name__} is not a path")
    place = os.fsdecode(checkpoint_id)
    if not place or "\0" in place:
        raise ArgumentError(argument, f"{place!r} is not a path")
    return place


def check_custom_metadata(custom_metadata: Mapping[str, Any] | None) -> bytes:
    """Return a note as it is stored, or raise `ArgumentError` if it cannot be."""
    if custom_metadata is None:
        return b""
    try:
        return encode_custom_metadata(custom_metadata)
    except (TypeError, ValueError) as error:
        raise ArgumentError("custom_metadata", f"JSON has no words for it: {error}") from error


def digest_of(checkpoint_id: object) -> int:
    """A number by which ranks compare where they save to."""
    name = str(checkpoint_id).encode("utf-8", "surrogatepass")  # a path need not be UTF-8
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)
