"""Which names are meant: by a name, a pattern, several of them, or a function. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from ..errors import ArgumentError

Names = str | Iterable[str] | Callable[[str], bool]
"""Patterns of dotted names, with `*`, `?` and `[...]`, each for what it matches and all below; or a predicate.

A name that is spelled out is meant in any case, whatever is in it.
"""


class Matcher:
    """Says whether a name is meant."""

    def __init__(self, names: Names, argument: str) -> None:
        """Take names as the caller gives them, in an argument of this name.

        Raises:
            ArgumentError: these are no names.
        """
        self._argument = argument
        self._predicate: Callable[[str], bool] | None = None
        self._patterns: list[str] = []
        if callable(names):
            self._predicate = names
            return
        try:
            given: tuple[object, ...] = tuple((names,) if isinstance(names, str) else names)
        except TypeError:
            problem = f"must be names, patterns of them, or a function of a name, got a {type(names).__name__}"
            raise ArgumentError(argument, problem) from None
        for each in given:
            if not isinstance(each, str) or not each:
                raise ArgumentError(argument, f"{each!r} is no name, and no pattern of names")
            self._patterns.append(each)
        self._exact = frozenset(self._patterns)
        self._above = tuple(f"{each}." for each in self._patterns if not _MAGIC.intersection(each))
        magic = [each for each in self._patterns if _MAGIC.intersection(each)]
        self._magic = [form for each in magic for form in (each, f"{each}.*")]

    def __call__(self, name: str) -> bool:
        """Whether a name is meant.

        Raises:
            ArgumentError: the caller's predicate raised.
        """
        if self._predicate is not None:
            try:
                return bool(self._predicate(name))
            except Exception as error:
                raise ArgumentError(self._argument, f"raised {error!r} for {name!r}") from error
        if name in self._exact or name.startswith(self._above):
            return True
        return any(fnmatchcase(name, each) for each in self._magic)

    def refuse_unused(self, names: Collection[str], hint: Callable[[str], str]) -> None:
        """Refuse what means none of these names: a typing error, most likely.

        Raises:
            ArgumentError: of the patterns one means nothing, or the predicate does; with the hint for that pattern.
        """
        if self._predicate is not None:
            if not any(map(self, names)):
                raise ArgumentError(self._argument, "is true for no name")
            return
        for each in self._patterns:
            if not any(map(Matcher(each, self._argument), names)):
                raise ArgumentError(self._argument, f"{each!r} means nothing that is wanted or stored{hint(each)}")


_MAGIC = set("*?[")
