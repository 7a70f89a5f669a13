"""The load contract: of what is wanted and what is stored, what is loaded, and into what. Pure.

Names are compared below the names of the top level that are asked for. Tensors are filled in place where one of the
right name, shape and dtype is there. Beyond that the structure is the checkpoint's, as far as its owner allows:

    module       names of parameters and buffers must agree, both ways; its `_extra_state` is as stored
    optimizer    see `optimizer_plan`
    `Stateful`   all as stored: its `load_state_dict()` is the judge
    plain        names must agree; but lists have the length that was saved, and None and empty containers anything
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._engine.gil_fairness import to_dict
from .._format.dcp import KeyPath, TensorStorageMetadata
from .._format.extension import Containers
from .._state.per_rank import per_rank_key
from .._state.sharding import memory_place
from .._state.structure import find, int_keys_of, with_int_keys
from .optimizer_plan import STATE_KEYS, group_fqns, has_same_parameters, plan_optimizer, prefix_of
from .stored_names import StoredNames, unwrapped
from .targets import LoadTargets, OptimizerScope, own_path

EXTRA_STATE = "_extra_state"  # the last part of a module's key, as torch has it

_PER_RANK = per_rank_key(0)[:-1]

_ABSENT = object()


@dataclass(slots=True, kw_only=True)
class Resolution:
    """What came of it besides the changed targets.

    Attributes:
        missing: wanted names that are not stored.
        unexpected: stored names below those asked for that this rank does not want; another one may.
        problems: why something cannot be loaded.
        others: all stored names that are not wanted, if some are missing.
        absent: names of the top level of which nothing is stored.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)


def groups_needed(targets: LoadTargets, stored: StoredNames) -> list[str]:
    """Return the names of the optimizers' options that must be read before anything is planned."""
    return [
        fqn
        for scope in targets.optimizers
        for fqn in group_fqns(scope.path, stored.entries)
        if not isinstance(stored.entries[fqn], TensorStorageMetadata)
    ]


class Resolver:
    """Changes targets to what is to be loaded."""

    def __init__(
        self,
        targets: LoadTargets,
        stored: StoredNames,
        containers: Containers | None,
        options: Mapping[str, Any],
        *,
        rank: int,
        cast: bool,
        kept: Sequence[tuple[KeyPath, Any]] = (),
    ) -> None:
        """Begin.

        Args:
            targets: the leaves of the caller's state dict.
            stored: what the checkpoint has.
            containers: what it says of them.
            options: values of the optimizers' options, by name.
            rank: this one.
            cast: whether conversions that lose are allowed.
            kept: leaves that stay as they are, also where their container is made anew.
        """
        self._targets = targets
        self._stored = stored
        self._containers = containers
        self._options = options
        self._rank = rank
        self._cast = cast
        self._kept = kept
        self._found = Resolution()
        self._at = to_dict(targets.fqns, range(len(targets.fqns)))
        self._dropped: set[int] = set()
        self._added: list[tuple[KeyPath, str | None, Any, bool]] = []  # path, stored name, value, whether as stored
        self._extra: dict[str, KeyPath] = {}
        self._missing: dict[str, KeyPath] = {}

    def run(self) -> Resolution:
        """Compare wanted and stored names, and decide for each what becomes of it."""
        targets, entries = self._targets, self._stored.entries
        self._missing = {fqn: path for fqn, path in zip(targets.fqns, targets.paths, strict=True) if fqn not in entries}
        self._find_extra()
        if self._missing and self._extra:
            self._match_wrapped()
        if self._missing:
            self._find_tied()
        self._mark_as_stored()
        for scope in targets.optimizers:
            self._resolve_optimizer(scope)
        if self._missing or self._extra:
            self._resolve_per_rank()
            self._resolve_objects()
            self._resolve_extra_state()
            self._resolve_plain()
        self._finish()
        return self._found

    def _find_extra(self) -> None:
        unwanted = {fqn for fqn in self._stored.entries if fqn not in self._at}
        is_below, path = self._stored.is_below, self._stored.path
        if unwanted:
            self._extra = {fqn: path(fqn) for fqn in self._stored.in_order() if fqn in unwanted and is_below(fqn)}

    def _match_wrapped(self) -> None:
        """Find the parameters of modules that were saved, or are wanted, under the names of a wrapper."""
        for fqn, path in list(self._extra.items()):
            if self._targets.kinds.get(str(path[0])) == "module":
                for name in unwrapped(fqn):
                    if name in self._missing:
                        self._stored.alias(name, fqn)
                        del self._missing[name], self._extra[fqn]
                        break

    def _find_tied(self) -> None:
        """Leave out what is missing and yet filled: a tied weight, stored once, under the other one's name."""
        values = self._targets.values
        found = self._at.keys() - self._missing.keys()
        filled = {memory_place(values[self._at[fqn]]) for fqn in found} - {None}
        for fqn in list(self._missing):
            if memory_place(values[self._at[fqn]]) in filled:
                del self._missing[fqn]
                self._dropped.add(self._at[fqn])

    def _mark_as_stored(self) -> None:
        targets = self._targets
        kinds = {name for name, kind in targets.kinds.items() if kind == "stateful"}
        modules = {name for name, kind in targets.kinds.items() if kind == "module"}
        if kinds or modules:
            for index, path in enumerate(targets.paths):
                if path[0] in kinds or (path[0] in modules and self._extra_state_of(path) is not None):
                    targets.as_stored.add(index)

    # --- optimizers

    def _resolve_optimizer(self, scope: OptimizerScope) -> None:
        base, prefix = scope.path, prefix_of(scope.path)
        groups = self._groups(base)
        if groups is None:
            return  # nothing is stored, or nothing that this reader knows for an optimizer's state
        differs = any(path[: len(base)] == base for path in (*self._extra.values(), *self._missing.values()))
        if not differs and has_same_parameters(scope.state["param_groups"], groups):
            options = (*base, "param_groups")
            length = len(options)
            self._targets.as_stored.update(
                index for index, path in enumerate(self._targets.paths) if path[:length] == options
            )
            return
        below = {
            path: fqn
            for fqn in self._stored.in_order()
            if fqn.startswith(prefix) and self._stored.is_below(fqn)
            if (path := self._stored.path(fqn))[: len(base)] == base
        }
        entries = {path: self._stored.entries[fqn] for path, fqn in below.items()}
        plan = plan_optimizer(base, scope.state, scope.optimizer, entries, groups, cast=self._cast)
        self._found.problems += plan.problems
        for fqn in below.values():
            self._extra.pop(fqn, None)
        length = len(base)
        is_plain = not base or self._targets.kinds.get(str(base[0])) == "plain"
        for index, path in enumerate(self._targets.paths):
            if path[:length] == base:
                self._dropped.add(index)
                fqn = self._targets.fqns[index]
                if is_plain and fqn in self._missing and path[length] not in STATE_KEYS:  # not torch's to judge
                    self._added.append((path, None, self._targets.values[index], False))
                else:
                    self._missing.pop(fqn, None)
        if plan.problems:
            return
        for path, fqn in below.items():
            if path in plan.targets:
                self._added.append((plan.paths.get(path, path), fqn, plan.targets[path], plan.targets[path] is None))
            elif path[length] not in STATE_KEYS:
                self._added.append((path, fqn, self._value_of(fqn), True))
        self._added += [(path, None, value, False) for path, value in plan.kept.items()]
        self._targets.empty.append((*base, "state"))
        if plan.int_keys:
            self._targets.int_keys.add((*base, "state"))
        self._rebuild(base)

    def _groups(self, scope: KeyPath) -> list[dict[str, Any]] | None:
        """Return the groups as saved; of options that are tensors only that they are there."""
        base = (*scope, "param_groups")
        found: dict[int, dict[str, Any]] = {}
        for fqn in group_fqns(scope, self._stored.entries):
            path = self._stored.path(fqn)
            if path == base:
                whole = self._options.get(fqn)
                return whole if isinstance(whole, list) and all(isinstance(each, dict) for each in whole) else None
            if path[: len(base)] == base and len(path) > len(base) + 1:
                number, key = path[len(base)], str(path[len(base) + 1])
                if isinstance(number, int):
                    value = self._options.get(fqn, _ABSENT) if len(path) == len(base) + 2 else _ABSENT
                    found.setdefault(number, {})[key] = value
        return [found[number] for number in sorted(found)] if found else None

    # --- what each rank has for itself

    def _resolve_per_rank(self) -> None:
        for base, per_rank in self._targets.per_rank:
            mine = own_path(base, self._rank)
            others: dict[int, KeyPath] = {}
            for fqn, path in [*self._extra.items()]:
                number = str(path[len(base)]).removeprefix(_PER_RANK) if len(path) > len(base) else ""
                if path[: len(base)] == base and number.isdecimal():
                    others[int(number)] = path[: len(base) + 1]
                    if path[: len(mine)] != mine:
                        self._extra.pop(fqn)
            lacking = [fqn for fqn, path in self._missing.items() if path[: len(mine)] == mine]
            if not lacking or self._is_stored_below(mine) or not others or per_rank.new_rank == "raise":
                continue
            for fqn in lacking:
                del self._missing[fqn]
                self._dropped.add(self._at[fqn])
            if per_rank.new_rank == "keep":
                self._targets.report.missing.extend(lacking)
                continue
            for fqn in self._stored.in_order():
                path = self._stored.path(fqn)
                if path[: len(base) + 1] in others.values():
                    self._added.append((path, fqn, None, True))
            self._targets.joined.append((mine, per_rank, others))

    # --- objects that judge for themselves

    def _resolve_objects(self) -> None:
        own: dict[KeyPath, KeyPath] = {base: own_path(base, self._rank) for base, _ in self._targets.per_rank}
        for name in sorted(name for name, kind in self._targets.kinds.items() if kind == "stateful"):
            self._take_as_stored(own.get((name,), (name,)))

    def _resolve_extra_state(self) -> None:
        modules = {name for name, kind in self._targets.kinds.items() if kind == "module"}
        changed = [path for path in (*self._extra.values(), *self._missing.values()) if path[0] in modules]
        for root in sorted({root for root in map(self._extra_state_of, changed) if root is not None}):
            if self._is_stored_below(root):
                self._take_as_stored(root)

    def _extra_state_of(self, path: KeyPath) -> KeyPath | None:
        """Return where a module's extra state begins that a value of the module's belongs to; None if it does not."""
        place = 1 + any(base == path[:1] for base, _ in self._targets.per_rank)
        if len(path) > place and str(path[place]).rpartition(".")[2] == EXTRA_STATE:
            return path[: place + 1]
        return None

    def _take_as_stored(self, root: KeyPath) -> None:
        """Have all that is stored below `root`, and nothing else."""
        length = len(root)
        changed = [fqn for fqn, path in (*self._extra.items(), *self._missing.items()) if path[:length] == root]
        if not changed or not self._is_stored_below(root):
            return
        handled = [scope.path for scope in self._targets.optimizers if scope.path in self._targets.rebuilt]
        kept: set[str] = set()
        for fqn in self._stored.in_order():
            path = self._stored.path(fqn)
            if path[:length] != root or any(path[: len(each)] == each for each in handled):
                continue
            kept.add(fqn)
            self._extra.pop(fqn, None)
            self._added.append((path, fqn, self._value_of(fqn), True))
        for index, path in enumerate(self._targets.paths):
            if path[:length] == root and index not in self._dropped:
                fqn = self._targets.fqns[index]
                self._dropped.add(index)
                self._missing.pop(fqn, None)
                if self._containers is None and fqn not in kept and len(path) - 1 > length:
                    self._targets.empty.append(path[:-1])  # a container that is empty leaves no name
        self._rebuild(root)

    def _value_of(self, fqn: str) -> Any:
        index = self._at.get(fqn)
        return self._targets.values[index] if index is not None else None

    # --- plain containers

    def _resolve_plain(self) -> None:
        roots: set[KeyPath] = set()
        for path in self._extra.values():
            if self._targets.kinds.get(str(path[0])) == "plain" and (root := self._open_root(path)) is not None:
                roots.add(root)
        for path in self._missing.values():
            if self._targets.kinds.get(str(path[0])) == "plain" and (root := self._shorter_list(path)) is not None:
                roots.add(root)
        for root in sorted(roots, key=len):
            if not any(root[: len(other)] == other for other in roots if other != root):
                self._take_as_stored(root)

    def _open_root(self, path: KeyPath) -> KeyPath | None:
        """Return the container in which a stored value may be new: None, an empty one, or a list that is shorter."""
        below: Any = self._targets.states
        for depth, step in enumerate(path):
            try:
                below = find(below, (step,))[0]
            except (LookupError, TypeError):
                is_open = below is None or (isinstance(below, list | Mapping) and not below)
                is_shorter = isinstance(below, list) and isinstance(step, int)
                return path[:depth] if depth and (is_open or is_shorter) else None
        return path if isinstance(below, list) or (isinstance(below, Mapping) and not _holds_tensors(below)) else None

    def _shorter_list(self, path: KeyPath) -> KeyPath | None:
        """Return the list in which a wanted value lies beyond the end that was saved."""
        for depth, step in enumerate(path):
            if isinstance(step, int) and depth:
                steps = [
                    each[depth]
                    for each in map(self._stored.path, self._stored.entries)
                    if each[:depth] == path[:depth] and len(each) > depth
                ]
                if steps and all(isinstance(each, int) and each < step for each in steps):
                    return path[:depth]
        return None

    # --- all together

    def _is_stored_below(self, root: KeyPath) -> bool:
        length = len(root)
        if self._containers is not None and any(path[:length] == root for path in self._containers.empty):
            return True
        return any(self._stored.path(fqn)[:length] == root for fqn in self._stored.entries)

    def _rebuild(self, root: KeyPath) -> None:
        rebuilt = self._targets.rebuilt
        if not any(root[: len(other)] == other for other in rebuilt):
            rebuilt[:] = [*(other for other in rebuilt if other[: len(root)] != root), root]

    def _finish(self) -> None:
        targets = self._targets
        self._found.missing = list(self._missing)
        self._found.unexpected = list(self._extra)
        self._found.others = list(self._stored.entries.keys() - self._at.keys()) if self._missing else []
        self._dropped |= {self._at[fqn] for fqn in self._missing}
        self._added += [
            (path, None, value, False)
            for path, value in self._kept
            if any(path[: len(root)] == root for root in targets.rebuilt)
        ]
        if self._containers is not None:
            targets.empty += self._containers.empty
        if targets.rebuilt or targets.joined:
            targets.int_keys |= int_keys_of(self._containers, map(self._stored.path, self._stored.entries))
        if self._containers is None:  # then what is there now tells
            for root in targets.rebuilt:
                targets.int_keys.update(with_int_keys(find(targets.states, root)[0], root))
        if self._dropped or self._added:
            self._change()
        else:
            targets.sources = [self._stored.source(fqn) for fqn in targets.fqns]
        self._found.absent = self._find_absent()

    def _change(self) -> None:
        """Leave out what is dropped, and append what is added, in the order of saving."""
        targets, source = self._targets, self._stored.source
        order = {fqn: number for number, fqn in enumerate(self._stored.in_order())}
        last = len(order)
        added = sorted(self._added, key=lambda each: last if each[1] is None else order.get(each[1], last))
        kept = [index for index in range(len(targets.fqns)) if index not in self._dropped]
        targets.as_stored = {number for number, index in enumerate(kept) if index in targets.as_stored} | {
            len(kept) + number for number, each in enumerate(added) if each[3]
        }
        sources: list[str | None] = [source(targets.fqns[index]) for index in kept]
        targets.sources = sources + [None if each[1] is None else source(each[1]) for each in added]
        targets.fqns = [targets.fqns[index] for index in kept] + [".".join(map(str, each[0])) for each in added]
        targets.paths = [targets.paths[index] for index in kept] + [each[0] for each in added]
        targets.values = [targets.values[index] for index in kept] + [each[2] for each in added]

    def _find_absent(self) -> set[str]:
        names = {name for name, kind in self._targets.kinds.items() if kind != "plain"}
        names |= {str(path[0]) for path in self._missing.values()}
        if names:
            names -= {str(path[0]) for path in self._targets.paths}
            names -= {str(path[0]) for path in self._targets.empty}
        return names


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def names_wanted(targets: LoadTargets, stored: StoredNames) -> set[str]:
    """Return all stored names that are loaded, or are another rank's own: by the names under which they are wanted."""
    wanted = set(targets.fqns)
    for base, _ in targets.per_rank:
        start = ".".join((*map(str, base), _PER_RANK))
        wanted |= {fqn for fqn in stored.entries if fqn.startswith(start)}
    return wanted
