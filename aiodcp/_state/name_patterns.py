"""Which names are meant: by a name, a pattern, several of them, or a function. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from ..errors import ArgumentError

Names = str | Iterable[str] | Callable[[str], bool]
"""Patterns of dotted names, with `*`, `?` and `[...]`, each for what it matches and all below; or a predicate."""


def matcher(names: Names, argument: str) -> Callable[[str], bool]:
    """Return a function: whether a name is meant.

    Raises:
        ArgumentError: these are no names; from the function, that the caller's predicate raised.
    """
    if isinstance(names, str):
        names = (names,)
    if callable(names):
        predicate = names

        def ask(name: str) -> bool:
            try:
                return bool(predicate(name))
            except Exception as error:
                raise ArgumentError(argument, f"raised {error!r} for {name!r}") from error

        return ask
    try:
        patterns = _checked(names, argument)
    except TypeError:
        problem = f"must be names, patterns of them, or a function of a name, got a {type(names).__name__}"
        raise ArgumentError(argument, problem) from None
    exact = {pattern for pattern in patterns if not _MAGIC.intersection(pattern)}
    others = [each for pattern in patterns if _MAGIC.intersection(pattern) for each in (pattern, f"{pattern}.*")]

    def matches(name: str) -> bool:
        if exact and (name in exact or name.startswith(tuple(f"{each}." for each in exact))):
            return True
        return any(fnmatchcase(name, each) for each in others)

    return matches


def _checked(names: Iterable[object], argument: str) -> list[str]:
    patterns = []
    for each in names:
        if not isinstance(each, str) or not each:
            raise ArgumentError(argument, f"{each!r} is no name, and no pattern of names")
        patterns.append(each)
    return patterns


_MAGIC = set("*?[")
