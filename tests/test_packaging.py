"""What is installed: the wheel's files, its metadata, and the version."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import aiodcp

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    [path] = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "aiodcp").rglob("*.py")} | {"aiodcp/py.typed"}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package
    assert {"aiodcp/testing/storage_suite.py", "aiodcp/_cli/main.py"} <= names


def test_its_metadata_names_the_command_the_license_and_few_dependencies(wheel: zipfile.ZipFile) -> None:
    [metadata] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA")]
    [entry_points] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "aiodcp = aiodcp._cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert "Project-URL: " in metadata
    required = [
        line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and ";" not in line
    ]
    assert [each.split(">")[0] for each in required] == ["aiofiles", "anyio", "numpy", "tenacity", "torch"]
    assert "](examples/" not in metadata  # relative links are dead where this is rendered


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert aiodcp.__version__ == project["version"]
