"""How much memory is left is what the machine has, and what the control groups around the process allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodcp import StageError
from aiodcp._engine import free_memory
from aiodcp._engine.free_memory import free_nbytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1048576 kB\n")
    for name in ("meminfo", "cgroup"):
        monkeypatch.setattr(free_memory, {"meminfo": "_MEMINFO", "cgroup": "_MEMBERSHIP"}[name], tmp_path / name)
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path / "fs")
    return tmp_path


def _group(path: Path, *, limit: str, used: int, cache: int, v1: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (path / names[0]).write_text(limit + "\n")
    (path / names[1]).write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\n{'total_cache' if v1 else 'file'} {cache}\n")


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    assert free_nbytes() == 1024 * MIB


def test_the_group_with_least_left_counts_and_its_page_cache_can_be_had(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/pod/job\n")
    _group(machine / "fs" / "pod" / "job", limit="max", used=5, cache=0)
    assert free_nbytes() == 1024 * MIB
    _group(machine / "fs" / "pod", limit=str(400 * MIB), used=300 * MIB, cache=50 * MIB)
    assert free_nbytes() == 150 * MIB
    _group(machine / "fs" / "pod" / "job", limit=str(200 * MIB), used=190 * MIB, cache=2 * MIB)
    assert free_nbytes() == 12 * MIB
    _group(machine / "fs" / "pod" / "job", limit=str(200 * MIB), used=210 * MIB, cache=0)
    assert free_nbytes() == 0


def test_shared_memory_cannot_be_had(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/job\n")
    _group(machine / "fs" / "job", limit=str(100 * MIB), used=90 * MIB, cache=80 * MIB)
    with (machine / "fs" / "job" / "memory.stat").open("a") as stat:
        stat.write(f"shmem {70 * MIB}\n")
    assert free_nbytes() == 20 * MIB


def test_groups_of_the_first_version_count_too(machine: Path) -> None:
    (machine / "cgroup").write_text("12:cpu,cpuacct:/x\n5:memory:/docker/1\n0::/\n")
    _group(machine / "fs" / "memory" / "docker" / "1", limit=str(100 * MIB), used=40 * MIB, cache=10 * MIB, v1=True)
    assert free_nbytes() == 70 * MIB


def test_a_machine_that_does_not_tell_is_an_error(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 9 kB\n")
    with pytest.raises(StageError, match="how much memory is free"):
        free_nbytes()
