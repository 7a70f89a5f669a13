"""Imports only point down, and the public names are the ones that are meant to be."""

import ast
from pathlib import Path

import pytest

import aiodcp

PACKAGE = Path(aiodcp.__file__).parent

# Each line may import from the lines above it, never from its own or from below.
LAYERS = [
    [
        "errors",
        "_activity",
        "_dcp",
        "_dtypes",
        "_layout",
        "_log",
        "_device_gather",
        "_names",
        "_pickle_screen",
        "_note",
        "_plain_data",
        "_tables",
        "_threads",
        "_turns",
        "storage.base",
        "_strips",
        "storage._claims",
    ],
    [
        "_blocking",
        "_devices",
        "_free_memory",
        "_guard",
        "_judge",
        "_metadata_reader",
        "_timeline",
        "storage.memory",
        "storage.local",
    ],
    ["_item_tables", "metadata"],
    ["_arena", "_archive", "_callbacks", "_engine", "_progress", "storage"],
    ["_milestone"],
    ["_preempt", "_skips"],
    ["_steps", "_retry"],
    ["_retain", "_events", "_telemetry"],
    ["_catalog", "_roots"],
    ["_capture", "_stage", "_line"],
    ["_chunks", "_comparison", "_ranks", "_windows", "_structure", "_matching", "_optimizer_state"],
    ["_plan", "_targets", "_watch"],
    ["_reads", "_resolve"],
    ["_commit", "_decode", "_planner", "_transfer"],
    ["_spans", "_prepare"],
    ["_large_reads"],
    ["_save", "_load", "_checkpoint", "_service"],
    ["checkpointer"],
    ["_inspect"],
    ["_diff", "_export", "_show", "_verify"],
    ["_joint", "_report"],
    ["manager"],
    ["_floors"],
    ["bench", ""],
    ["_bench_device", "_bench_ranks", "_bench_plan"],
    ["__main__"],
]


def _imports(path: Path) -> set[str]:
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*above, name)) for name in names if name}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "aiodcp" for name in names), f"{path}: import our own relatively"
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def test_imports_only_point_down() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        for imported in _imports(path):
            assert level[imported] < level[_name(path)], f"{_name(path)} imports {imported}"


def test_every_file_has_its_layer() -> None:
    assert {_name(path) for path in PACKAGE.rglob("*.py")} == {name for names in LAYERS for name in names}


def test_public_names_are_documented_and_imported_as_they_are_declared() -> None:
    declared = {
        (node.module, alias.name)
        for block in ast.parse(Path(aiodcp.__file__).read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {(module, name) for module, names in aiodcp._HOMES.items() for name in names}
    assert aiodcp.__all__ == sorted(name for _, name in declared)
    for name in aiodcp.__all__:
        assert getattr(aiodcp, name).__doc__, name
    assert aiodcp.errors.SaveError is aiodcp.SaveError
    assert {*aiodcp.__all__, "errors"} <= set(dir(aiodcp))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        aiodcp.Nothing  # type: ignore[attr-defined] # noqa: B018


def test_two_files_know_dcps_private_storage_record() -> None:
    users = [_name(path) for path in PACKAGE.rglob("*.py") if "_StorageInfo" in path.read_text()]
    assert sorted(users) == ["_dcp", "_metadata_reader"]
