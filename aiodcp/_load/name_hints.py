"""Suggestions for names that do not agree. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from .._state.stateful import COMPILED
from .stored_names import DATA_PARALLEL

SUGGESTED_FOR = 10  # wanted names for which another one is suggested

SEARCHED = 2000  # stored names among which that is looked for


def suggest(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str]:
    """Return for wanted names that are not stored the stored ones that were most likely meant."""
    suggestions = {}
    for name in missing[:SUGGESTED_FOR]:
        last = name.rpartition(".")[2]
        likely = [each for each in unexpected if each.rpartition(".")[2] == last][:SEARCHED] or unexpected[:SEARCHED]
        if close := get_close_matches(name, likely, 1, 0.7):
            suggestions[name] = close[0]
    return suggestions


def near(name: str, known: Sequence[str]) -> list[str]:
    """Return the names that were most likely meant, at most three."""
    last = name.rpartition(".")[2]
    likely = [each for each in known if each.rpartition(".")[2] == last][:SEARCHED]
    return get_close_matches(name, likely, 3, 0.6) or get_close_matches(name, known[:SEARCHED], 3, 0.6)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence: which names, or what they are below, were most likely meant; empty if none was."""
    above = [*dict.fromkeys(each[:end] for each in known for end, letter in enumerate(each) if letter == ".")]
    names = near(name, [*above, *known])
    return f": did you mean {' or '.join(names)}?" if names else ""


def explain(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Say in one sentence by what the names differ, if it is one prefix; else nothing."""
    if not missing or not unexpected:
        return ""
    for prefix in (COMPILED, DATA_PARALLEL):
        for one, other in ((missing, unexpected), (unexpected, missing)):
            if any(prefix in each for each in one) and {each.replace(prefix, "") for each in one} & set(other):
                side = "the state dict" if one is missing else "the checkpoint"
                return f'the names in {side} have the prefix "{prefix}", the others do not: use rename= to map them'
    tops = {each.partition(".")[0] for each in missing}
    if len(tops) == 1 and {each.partition(".")[2] for each in missing} & set(unexpected):
        [top] = tops
        return f'the checkpoint has the names without "{top}.": rename={{"": "{top}"}} puts it before them'
    tails = [{each.partition(".")[2] for each in names} for names in (missing, unexpected)]
    if tails[0] == tails[1] and "" not in tails[0]:
        return "the names differ only in their first component: use rename= to map them"
    return ""
