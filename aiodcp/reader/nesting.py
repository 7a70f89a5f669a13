"""The nested state dict of values that are named by dotted names."""

from __future__ import annotations

from typing import Any

from .._format.dcp import KeyPath, Metadata
from .._format.extension import containers_of
from .._state.structure import int_keys_of, rebuild


def nest(flat: dict[str, Any], metadata: Metadata, *, is_whole: bool = True) -> dict[str, Any]:
    """Return the nested state dict of flat values: with lists and int keys as they were saved.

    Args:
        flat: the values.
        metadata: of the checkpoint that they are from.
        is_whole: whether they are all of it: then with its empty dicts, too.
    """
    paths: dict[str, KeyPath] = {fqn: tuple((metadata.planner_data or {}).get(fqn, (fqn,))) for fqn in flat}
    containers = containers_of(metadata)
    empty = containers.empty if containers is not None and is_whole else []
    items = [(paths[fqn], value) for fqn, value in flat.items()]
    nested: dict[str, Any] = rebuild((), items, None, empty, int_keys_of(containers, paths.values()))
    return nested
