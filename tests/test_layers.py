"""The table of imports, who may know what, how long a file may be, and the public names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiodcp

PACKAGE = Path(aiodcp.__file__).parent

LEAVES = {"errors", "_log"}
ENGINE_ROOM = {"storage", "_engine", "_format", "_telemetry", "_state", "_distributed"}

# What each package may import, besides the standard library and third parties.
TABLE = {
    "errors": set(),
    "_log": set(),
    "storage": LEAVES,
    "_engine": LEAVES,
    "_format": LEAVES,
    "_telemetry": LEAVES | {"_engine"},
    "_state": LEAVES | {"_format"},
    "_distributed": LEAVES | {"_engine"},
    "_foreign": LEAVES | {"storage", "_engine", "_format", "_state"},
    "_save": LEAVES | ENGINE_ROOM,
    "_load": LEAVES | ENGINE_ROOM | {"_foreign"},
    "checkpointer": LEAVES | ENGINE_ROOM | {"_save", "_load"},
    "manager": LEAVES
    | {"storage", "_engine", "_telemetry", "checkpointer"}
    # Plain data and types of the public signatures, and what lists steps without torch.
    | {"_format.naming", "_load.options", "_load.read_custom_metadata", "_load.report", "_distributed.stop_agreement"}
    | {"_state.name_patterns"},
    "testing": LEAVES | {"storage", "checkpointer", "manager"},
    "reader": LEAVES | ENGINE_ROOM | {"_foreign", "_load", "checkpointer"},
    "integrations": LEAVES | {"checkpointer", "manager", "reader", "_state.per_rank"},
    "_cli": LEAVES | ENGINE_ROOM | {"_save", "_load", "checkpointer", "manager", "reader"},
}

# May not import torch, directly or through others.
WITHOUT_TORCH = [
    "aiodcp",
    "aiodcp.errors",
    "aiodcp.storage",
    "aiodcp.storage.retry",
    "aiodcp._format.checksum",
    "aiodcp._telemetry.progress",
    "aiodcp._telemetry.timeline",
    "aiodcp._telemetry.trace",
    "aiodcp._telemetry.otel",
    "aiodcp._telemetry.progress_bar",
    "aiodcp.manager.steps",
    "aiodcp.manager.retention",
    "aiodcp.manager.catalog",
    "aiodcp.manager.events",
    "aiodcp.manager.event_feed",
    "aiodcp._format.naming",
    "aiodcp._format.seal",
    "aiodcp._format.custom_metadata",
    "aiodcp._cli.main",
    "aiodcp._cli.ls",
    "aiodcp._cli.gc",
    "aiodcp._cli.text_tables",
]


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {_name(path): path for path in PACKAGE.rglob("*.py")}

TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def _imports(name: str) -> set[str]:
    """Return the files of ours that a file imports, each by its name."""
    path = FILES[name]
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = ".".join((*package[: len(package) - node.level + 1], *([node.module] if node.module else [])))
            for alias in node.names:
                below = f"{above}.{alias.name}" if above else alias.name
                found.add(below if below in FILES else above)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(each.split(".")[0] == "aiodcp" for each in names), f"{name}: import our own relatively"
    return found


def test_packages_import_only_what_their_row_of_the_table_allows() -> None:
    for name in FILES:
        package = name.split(".")[0]
        if package in ("", "__main__"):
            continue
        for imported in _imports(name):
            above = imported.split(".")[0]
            assert above == package or TABLE[package] & {above, imported}, f"{name} imports {imported}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def walk(name: str, below: list[str]) -> None:
        assert name not in below, " imports ".join([*below[below.index(name) :], name])
        if name not in done:
            for imported in _imports(name) - {name}:
                walk(imported, [*below, name])
            done.add(name)

    for name in FILES:
        if name not in ("", "manager"):  # these are lazy: whoever asks for a name imports what they list
            walk(name, [])


def test_every_package_has_its_row() -> None:
    assert {name.split(".")[0] for name in FILES} - {"", "__main__"} == TABLE.keys()


def test_what_the_command_line_needs_at_once_imports_no_torch() -> None:
    program = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    program += "    assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", program, *WITHOUT_TORCH], check=True)


# Private names of torch and Python: where each is used, for the day on which one of them is gone.
PRIVATE = {
    "_distributed.channel": {"_Options", "_devices", "_timeout"},  # gloo's, which have no other names
    "_cli.bench.hardware": {"_foreach_copy_"},
    "_cli.bench.many": {"_foreach_copy_"},
    "_engine.device_copies": {"_foreach_copy_"},
    "_engine.device_gather": {"_foreach_copy_"},
    "_engine.interpreter_exit": {"_register_atexit"},
    "_format.archive_writer": {"_utils", "_rebuild_tensor_v3"},
    "_format.dcp": {"_get_layout"},
    "_format.plain_data": {
        "_Unpickler",
        "_utils",
        "_weights_only_unpickler",
        "_get_allowed_globals",
        "_validate_loaded_sparse_tensors",
    },
    "_state.planner_capture": {"_enable_plan_caching"},
    "_state.sharding": {"_local_tensor"},
    "_state.stateful": {"_modules"},
    "_state.versions": {"_version"},
    "checkpointer.optimizer_guard": {"_optimizer_step_pre_hooks"},
    "integrations.accelerate": {"_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects"},
}


# Private modules and names of torch that are imported: where each is.
PRIVATE_IMPORTS = {
    "_cli.bench.store": {"torch.distributed.checkpoint._fsspec_filesystem"},
    "_distributed.channel": {"torch._C._distributed_c10d"},
    "_distributed.group_store": {"torch._C._distributed_c10d"},
    "_engine.loop": {"anyio._backends._asyncio"},  # which has no other name, and is only imported
    "_format.dcp": {
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    },
    "_state.known_tensors": {"torch._C._dynamo.guards"},
    "_state.sharding": {"torch.distributed._shard.sharded_tensor.api"},
}


def _private_imports(tree: ast.Module) -> set[str]:
    """Return the private names that a file imports, and the private modules of others."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names if re.search(r"(^|\.)_[^_]", each.name))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.update(f"{module}.{each.name}" for each in node.names if re.match(r"_[^_]", each.name))
            if not node.level and re.search(r"(^|\.)_[^_]", module):
                found.add(module)
    return found


def test_nobody_imports_a_private_name_of_another_file() -> None:
    found = {name: _private_imports(tree) for name, tree in TREES.items()}
    assert {name: names for name, names in found.items() if names} == PRIVATE_IMPORTS


def _reaches(tree: ast.Module) -> set[str]:
    """Return the attributes with an underscore that a file uses and does not define."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if is_own else used).add(node.attr)
    return used - own


def test_nobody_reaches_for_an_underscored_attribute_of_another_file() -> None:
    found = {name: _reaches(tree) for name, tree in TREES.items()}
    assert {name: used for name, used in found.items() if used} == PRIVATE


# What may be imported only there.
ONLY_IN = {
    # In `leases` for a task that renews a lease, whoever leaves its block: no task group can be left by another task.
    # In `stored_checkpoint` for one that reads ahead, whoever goes on with the iteration. In `ray` for its futures.
    # In `error_mapping` to tell whether a task is cancelled, or its storage has raised the same error by itself.
    "asyncio": {
        "_engine",
        "checkpointer",
        "manager",
        "_cli.bench",
        "testing",
        "storage.error_mapping",
        "storage.leases",
        "reader.stored_checkpoint",
        "integrations.ray",
    },
    "concurrent": {"_engine", "checkpointer", "_cli.bench"},
    # In `_load` and `manager` for the names of levels, in `transformers` for a filter.
    "logging": {"_log", "_load", "manager", "integrations.transformers"},
}


@pytest.mark.parametrize("module", ONLY_IN)
def test_what_few_may_know_nobody_else_imports(module: str) -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                if module in {each.split(".")[0] for each in names} and not (
                    isinstance(node, ast.ImportFrom) and node.level
                ):
                    assert any(f"{name}.".startswith(f"{each}.") for each in ONLY_IN[module]), (
                        f"{name} imports {module}"
                    )


def test_threads_are_made_in_the_engine_room_only() -> None:
    makers = {name for name, path in FILES.items() if "threading.Thread(" in path.read_text()}
    assert {name.split(".")[0] for name in makers} == {"_engine"}


LINES, CODE_LINES = 490, 60


def test_no_file_and_no_function_is_too_long() -> None:
    for name, path in FILES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= LINES, name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                assert lines <= CODE_LINES, f"{name}: {node.name}"


def test_public_names_are_documented_and_imported_as_they_are_declared() -> None:
    imported = {
        alias.name: node.module
        for block in ast.parse(Path(aiodcp.__file__).read_text()).body
        for node in (block.body if isinstance(block, ast.If) else [block])
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert aiodcp.__all__ == sorted(imported)
    for name in aiodcp.__all__:
        assert getattr(aiodcp, name).__doc__, name
    assert {name: imported[name] for name in aiodcp._LAZY} == aiodcp._LAZY
    assert {*aiodcp.__all__, "errors", "__version__"} <= set(dir(aiodcp))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        aiodcp.Nothing  # type: ignore[attr-defined] # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        aiodcp.manager.Nothing  # type: ignore[attr-defined] # noqa: B018


def test_one_file_knows_dcps_private_storage_record() -> None:
    assert [name for name, path in FILES.items() if "import _StorageInfo" in path.read_text()] == ["_format.dcp"]
