"""What a checkpoint stores, by the names under which it is wanted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .._format.dcp import STORAGE_TYPES, KeyPath, Metadata
from .._format.extension import Containers, containers_of
from .._state.stateful import COMPILED
from ..errors import ArgumentError
from .options import Rename

DATA_PARALLEL = "module."


class StoredNames:
    """What a checkpoint stores, by the names under which it is wanted.

    Attributes:
        entries: by wanted name.
        paths: keys and list indices that lead to it, by wanted name.
        containers: what the checkpoint says of mappings, by the paths under which they are wanted; None if nothing.
    """

    def __init__(self, metadata: Metadata, tops: Iterable[str], rename: Rename | None) -> None:
        """Take the names of a checkpoint.

        Args:
            metadata: its metadata.
            tops: the names of the top level that are asked for.
            rename: stored names to wanted ones.

        Raises:
            ArgumentError: `rename` makes one name of two, or is none.
        """
        self.entries: dict[str, STORAGE_TYPES] = metadata.state_dict_metadata
        self.paths: Mapping[str, KeyPath] = metadata.planner_data or {}
        self.containers: Containers | None = containers_of(metadata)
        self._tops = set(tops)
        self._sources: dict[str, str] | None = None
        if rename is not None:
            self._rename(renaming(rename))

    def _rename(self, renamed: Callable[[str], str]) -> None:
        sources: dict[str, str] = {}
        paths: dict[str, KeyPath] = {}
        for stored in self.entries:
            try:
                wanted = renamed(stored)
            except Exception as error:
                raise ArgumentError("rename", f"raised {error!r} for {stored!r}") from error
            if type(wanted) is not str or not wanted:
                raise ArgumentError("rename", f"maps {stored!r} to {wanted!r}, which is not a name")
            if wanted in sources:
                raise ArgumentError("rename", f"maps both {sources[wanted]!r} and {stored!r} to {wanted!r}")
            sources[wanted] = stored
            path = self.paths.get(stored)
            if path is not None:
                paths[wanted] = path if wanted == stored else self._moved(path, wanted)
        if self.containers is not None:
            self._move_containers(self.containers, renamed, sources, paths)
        self.entries = {wanted: self.entries[stored] for wanted, stored in sources.items()}
        self.paths = paths
        self._sources = sources

    def _move_containers(
        self,
        containers: Containers,
        renamed: Callable[[str], str],
        sources: Mapping[str, str],
        paths: Mapping[str, KeyPath],
    ) -> None:
        """Have mappings where what lies in them is now, and empty ones where a value of their name would be."""
        pairs = [(self.paths[stored], paths[wanted]) for wanted, stored in sources.items() if stored in self.paths]
        empty: list[KeyPath] = []
        for path in containers.empty:
            try:
                wanted = renamed(".".join(map(str, path)))
            except Exception:  # it is no name that was promised
                empty.append(path)
                continue
            empty.append(self._moved(path, wanted) if type(wanted) is str and wanted else path)
        pairs += zip(containers.empty, empty, strict=True)
        known = {tuple(path) for path in containers.int_keys}
        int_keys: dict[KeyPath, None] = {}
        for before, after in pairs if known else ():
            for depth in range(1, len(before)):
                below = tuple(before[depth:])
                if tuple(before[:depth]) in known and after[-len(below) :] == below:
                    int_keys[after[: -len(below)]] = None
        self.containers = Containers(empty, [*int_keys])

    def _moved(self, path: KeyPath, wanted: str) -> KeyPath:
        """Return the path of a renamed value: its last steps as they were, below the name that is asked for."""
        for position in range(len(path)):
            tail = ".".join(map(str, path[position:]))
            if wanted == tail:
                return path[position:]
            if wanted.endswith(f".{tail}"):
                return (*self._split(wanted[: -len(tail) - 1]), *path[position:])
        return self._split(wanted)

    def _split(self, name: str) -> KeyPath:
        for position, letter in enumerate(name):
            if letter == "." and name[:position] in self._tops:
                return name[:position], name[position + 1 :]
        return (name,)

    def source(self, wanted: str) -> str:
        """Return by which name it is stored."""
        return self._sources[wanted] if self._sources is not None else wanted

    def path(self, wanted: str) -> KeyPath:
        """Return the keys that lead to a stored value; where the checkpoint does not say, its name below the top."""
        path = self.paths.get(wanted)
        return tuple(path) if path is not None else self._split(wanted)

    def alias(self, wanted: str, stored: str) -> None:
        """Know a name by another one."""
        if self._sources is None:
            self._sources = {name: name for name in self.entries}
            self.entries, self.paths = dict(self.entries), dict(self.paths)
        self._sources[wanted] = self._sources.pop(stored)
        self.entries[wanted] = self.entries.pop(stored)
        path = self.paths.get(stored)
        if path is not None:
            assert isinstance(self.paths, dict)
            self.paths[wanted] = self._moved(path, wanted)

    def in_order(self) -> list[str]:
        """Return all names in the order in which they were saved."""
        known = [name for name in self.paths if name in self.entries]  # a planner may note keys that it did not save
        return [*known, *(name for name in self.entries if name not in self.paths)]

    def is_below(self, name: str) -> bool:
        """Whether a stored name is one that is asked for, or below one."""
        if name in self._tops:
            return True
        position = name.find(".")
        while position >= 0:
            if name[:position] in self._tops:
                return True
            position = name.find(".", position + 1)
        return False


def renaming(rename: Rename) -> Callable[[str], str]:
    if not isinstance(rename, Mapping):
        if not callable(rename):
            problem = f"a {type(rename).__name__} is neither a mapping of prefixes nor a function of a name"
            raise ArgumentError("rename", problem)
        return rename
    for each in (*rename, *rename.values()):
        if not isinstance(each, str):
            raise ArgumentError("rename", f"{each!r} is not a prefix")
    prefixes = sorted(rename, key=len, reverse=True)

    def renamed(name: str) -> str:
        for prefix in prefixes:
            bare = prefix.removesuffix(".")
            if name == bare or not bare or name.startswith(f"{bare}."):
                rest = name[len(bare) :].removeprefix(".") if bare else name
                return ".".join(part for part in (rename[prefix].removesuffix("."), rest) if part)
        return name

    return renamed


def unwrapped(name: str) -> list[str]:
    """Return by which names the wrapped parameter of a module may be known without its wrappers."""
    bare = name.replace(COMPILED, "")
    top, _, rest = bare.partition(".")
    return [bare, f"{top}.{rest.removeprefix(DATA_PARALLEL)}", f"{top}.{rest.replace(DATA_PARALLEL, '')}"]
