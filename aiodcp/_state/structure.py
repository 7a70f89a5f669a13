"""Containers rebuilt as they were saved, from the paths of what lies in them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

from .._format.dcp import KeyPath
from .._format.extension import Containers
from .per_rank import PerRank

_MISSING = object()


class _Node(dict[str | int, Any]):
    """A container that is being rebuilt: its children, by step."""


_EMPTY = _Node()

MOST_EMPTY = 1000  # mappings in one list: more are no structure that anyone has saved


def rebuild(
    base: KeyPath, items: Iterable[tuple[KeyPath, Any]], template: Any, empty: Iterable[KeyPath], int_keys: set[KeyPath]
) -> Any:
    """Return the container, or the value, that was saved at `base`.

    Args:
        base: where.
        items: paths from the root on and values, in the order of saving.
        template: what is there now: mappings are made of the same type, and keep their attributes and kinds of keys.
        empty: mappings without a key.
        int_keys: mappings whose keys are ints.
    """
    root: Any = _MISSING
    for path, value in items:
        root = _put(root, path[len(base) :], value)
    for path in empty:
        if path[: len(base)] == base:
            root = _put(root, path[len(base) :], _Node())
    return {} if root is _MISSING else _finish(root, template, base, int_keys)


def _put(root: Any, steps: KeyPath, value: Any) -> Any:
    if not steps:
        return value if root is _MISSING else root
    node = root = root if isinstance(root, _Node) else _Node()
    for step in steps[:-1]:
        below = node.get(step)
        if not isinstance(below, _Node):
            below = node[step] = _Node()
        node = below
    node.setdefault(steps[-1], value)
    return root


def _finish(node: Any, template: Any, path: KeyPath, int_keys: set[KeyPath]) -> Any:
    if not isinstance(node, _Node):
        return node
    if node and all(type(step) is int for step in node):
        listed = template if isinstance(template, list) else []
        return [
            _finish(node.get(step, _EMPTY), listed[step] if step < len(listed) else None, (*path, step), int_keys)
            for step in _steps_of(node)
        ]
    if isinstance(template, PerRank) and len(node) == 1:
        [(step, child)] = node.items()
        own = _finish(child, template.value, (*path, step), int_keys)
        return PerRank(own, new_rank=template.new_rank)
    known = {str(key): key for key in template} if isinstance(template, Mapping) else {}
    made = like(template)
    for step, child in node.items():
        key: Any = known.get(str(step), _MISSING)
        below = None if key is _MISSING else template[key]
        if key is _MISSING:
            key = int(step) if path in int_keys and str(step).lstrip("-").isdecimal() else step
        made[key] = _finish(child, below, (*path, step), int_keys)
    return made


def _steps_of(node: _Node) -> Sequence[int]:
    """Return the positions in a list; those between others, too, where a mapping was without a key, which DCP drops."""
    steps = sorted(map(int, node))
    return range(steps[-1] + 1) if steps[-1] - len(steps) < MOST_EMPTY else steps


def like(template: Any) -> MutableMapping[Any, Any]:
    """Return an empty mapping of the same type, with the same attributes, if that can be had."""
    if type(template) is dict or not isinstance(template, MutableMapping):
        return {}
    try:
        made = copy(template)
        made.clear()
    except Exception:  # whatever an application's mapping does: then use a dict
        return {}
    return made


class Finder:
    """Finds containers by paths, which have all keys of mappings as text."""

    def __init__(self) -> None:
        self._keys: dict[int, tuple[Any, dict[str, Any]]] = {}  # by id, of mappings whose keys are no strings

    def find(self, root: Any, path: KeyPath) -> tuple[Any, Any, Any]:
        """Return what lies at a path, the container that holds it, and its key there.

        Raises:
            LookupError, TypeError: nothing does.
        """
        holder: Any = None
        key: Any = None
        below = root
        for step in path:
            holder, key = below, step
            if isinstance(holder, PerRank):
                key, below = "value", holder.value
                continue
            if isinstance(holder, Mapping) and step not in holder:
                if id(holder) not in self._keys:
                    self._keys[id(holder)] = holder, {str(each): each for each in holder}
                key = self._keys[id(holder)][1][str(step)]
            below = holder[key]
        return below, holder, key


def find(root: Any, path: KeyPath) -> tuple[Any, Any, Any]:
    """As `Finder.find`, once."""
    return Finder().find(root, path)


def with_int_keys(template: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yield where mappings are whose keys are ints, in what lies at `path`."""
    if isinstance(template, Mapping):
        if template and all(type(key) is int for key in template):
            yield path
        for key, below in template.items():
            yield from with_int_keys(below, (*path, str(key)))
    elif isinstance(template, list):
        for number, below in enumerate(template):
            yield from with_int_keys(below, (*path, number))


def int_keys_of(containers: Containers | None, paths: Iterable[KeyPath]) -> set[KeyPath]:
    """Return which mappings have ints for keys; of a checkpoint that does not say so, optimizers' states."""
    if containers is not None:
        return set(containers.int_keys)
    groups = {path[:position] for path in paths for position, step in enumerate(path) if step == "param_groups"}
    return {(*base, "state") for base in groups}
