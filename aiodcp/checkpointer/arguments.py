"""Checks of what a `Checkpointer` is given, before anything happens."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

import torch

from .._format.checksum import Checksum
from .._format.custom_metadata import encode_custom_metadata
from .._save.bounded_staging import MIN_NBYTES
from .._save.sharing import POLICIES, OnDisagreement
from ..errors import ArgumentError
from ..storage.base import Storage
from ..storage.retry import Retry

CheckpointId = str | os.PathLike[str]

OnBusy = Literal["wait", "skip", "raise"]

EncodeMetadata = Callable[[], Awaitable[Callable[[], bytes]]]
"""Awaited before a save begins; it fails the save on all ranks, or returns what makes the custom metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The checked arguments of a `Checkpointer`."""

    storage: Storage
    process_group: torch.distributed.ProcessGroup | None
    coordinator: int
    no_dist: bool
    timeout: float
    heartbeat_timeout: float
    keep_buffers: bool
    spare_buffer: bool
    max_host_bytes: int | None
    check_torn: bool
    copy_threads: int
    io_threads: int
    retry: Retry
    checksum: Checksum
    on_disagreement: OnDisagreement
    share_reads: bool | None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ArgumentError: one of them cannot be used.
        """
        if self.on_disagreement not in POLICIES:
            problem = f'must be "warn", "raise" or "ignore", got {self.on_disagreement!r}'
            raise ArgumentError("on_disagreement", problem)
        for name in ("copy_threads", "io_threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(name, f"must be a positive integer, got {value!r}")
        most = self.max_host_bytes
        if most is not None and (type(most) is not int or most < MIN_NBYTES):
            raise ArgumentError("max_host_bytes", f"must be an integer of at least {MIN_NBYTES}, got {most!r}")
        if isinstance(self.storage, type) or not isinstance(self.storage, Storage):
            raise ArgumentError("storage", f"must implement aiodcp.Storage, got {self.storage!r}")
        if not callable(self.checksum):
            raise ArgumentError("checksum", f"must be callable, got {self.checksum!r}")
        for name in ("timeout", "heartbeat_timeout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ArgumentError(name, f"must be a positive, finite number of seconds, got {value!r}")
        if self.share_reads is not None and type(self.share_reads) is not bool:
            raise ArgumentError("share_reads", f"must be True, False or None, got {self.share_reads!r}")
        if self.no_dist and self.process_group is not None:
            raise ArgumentError("no_dist", "cannot be combined with process_group")
        if type(self.coordinator) is not int or self.coordinator < 0:
            raise ArgumentError("coordinator", f"must be a rank, got {self.coordinator!r}")
        if not isinstance(self.retry, Retry):
            raise ArgumentError("retry", f"must be an aiodcp.Retry, got {self.retry!r}")

    def find_group(self) -> torch.distributed.ProcessGroup | None:
        """Return the ranks to save with, if there are others.

        Raises:
            ArgumentError: there is no such group, or this rank does not belong to it.
        """
        if self.no_dist or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            if self.process_group is not None:
                raise ArgumentError("process_group", "torch.distributed is not initialized")
            return None
        group = self.process_group or torch.distributed.group.WORLD
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise ArgumentError("process_group", f"must be a process group that this rank belongs to, got {group!r}")
        if self.coordinator >= group.size():
            raise ArgumentError(
                "coordinator", f"rank {self.coordinator} does not exist in a process group of {group.size()} ranks"
            )
        return group if group.size() > 1 else None


def default_copy_threads() -> int:
    """Return this rank's share of the cores, up to four.

    More copying threads than cores wait for each other: measured, 10 times as long.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    ranks_here = max(1, int(ranks)) if ranks.isdecimal() else 1
    return max(1, min(4, len(os.sched_getaffinity(0)) // ranks_here))


def check_on_busy(on_busy: object) -> None:
    """Raise `ArgumentError` for what is none of its values."""
    if on_busy not in get_args(OnBusy):
        raise ArgumentError("on_busy", f'must be "wait", "skip" or "raise", got {on_busy!r}')


def check_id(checkpoint_id: object, argument: str = "checkpoint_id") -> str:
    """Return a path as text, or raise `ArgumentError` if it is none."""
    if not isinstance(checkpoint_id, str | os.PathLike):
        raise ArgumentError(argument, f"must be a str or os.PathLike, got {type(checkpoint_id).__name__}")
    path = os.fsdecode(checkpoint_id)
    if not path or "\0" in path:
        raise ArgumentError(argument, f"must be a path, got {path!r}")
    return path


def check_custom_metadata(custom_metadata: Mapping[str, Any] | None) -> bytes:
    """Return custom metadata as it is stored, or raise `ArgumentError` if it cannot be."""
    if custom_metadata is None:
        return b""
    try:
        return encode_custom_metadata(custom_metadata)
    except (TypeError, ValueError) as error:
        raise ArgumentError("custom_metadata", f"cannot be written as JSON: {error}") from error


def metadata_encoder(custom_metadata: Mapping[str, Any] | None) -> EncodeMetadata:
    """Return what checks and encodes custom metadata once the save has begun: a mistake then fails all ranks."""

    async def encode() -> Callable[[], bytes]:
        encoded = check_custom_metadata(custom_metadata)
        return lambda: encoded

    return encode


def digest_of(checkpoint_id: object) -> int:
    """Return a number by which ranks compare where they save to."""
    name = str(checkpoint_id).encode("utf-8", "surrogatepass")  # a path need not be UTF-8
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)
