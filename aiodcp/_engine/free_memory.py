"""How much host memory can be had: of the machine, and of the control groups that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import StageError

_CGROUPS = Path("/sys/fs/cgroup")

_MEMBERSHIP = Path("/proc/self/cgroup")

_MEMINFO = Path("/proc/meminfo")

# The files of a group with its limit and what is used, and what its statistics call the page cache and shared memory.
_FIRST_VERSION = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"

_SECOND_VERSION = "memory.max", "memory.current", "file", "shmem"


def free_nbytes() -> int:
    """Return the bytes of memory that can be had, the page cache's included.

    Source: proc(5), MemAvailable; the Linux kernel's cgroup-v2.rst (memory.max) and cgroup-v1/memory.rst.
    """
    return min([_machine_nbytes(), *_groups_nbytes()])


def _machine_nbytes() -> int:
    for line in _MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(rest.split()[0])
    raise StageError(0, "/proc/meminfo does not say how much memory is free")


def _groups_nbytes() -> Iterator[int]:
    """Return what is left in every control group around this process that has a limit."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, (limit, used, cache, shared) = _CGROUPS, _SECOND_VERSION
            elif "memory" in controllers.split(","):
                root, (limit, used, cache, shared) = _CGROUPS / "memory", _FIRST_VERSION
            else:
                continue
            group = root / path.lstrip("/")
            for each in (group, *group.parents):
                with suppress(OSError, ValueError):  # no limit, or a group that cannot be seen from in here
                    most = int((each / limit).read_text())
                    can_be_dropped = _stat(each, cache) - _stat(each, shared)
                    yield max(0, most - int((each / used).read_text()) + can_be_dropped)
                if each == root:
                    break


def _stat(group: Path, name: str) -> int:
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
