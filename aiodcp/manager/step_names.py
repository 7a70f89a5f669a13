"""What the directories of steps are called. Pure; no torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from string import Formatter

from ..errors import ArgumentError

STEP_FORMAT = "step-{step}"
"""As torchtitan's."""

KNOWN_FORMATS = (STEP_FORMAT, "checkpoint-{step}", "iter_{step:07d}", "step_{step}", "epoch-{step}", "epoch_{step}")
"""Of torchtitan, of Hugging Face's Trainer, of Megatron, and others: what the command line looks for."""


@dataclass(frozen=True, slots=True)
class StepNames:
    """Names of steps: what a format makes of a number, and back.

    Attributes:
        format: such as "checkpoint-{step}" or "iter_{step:07d}".
    """

    format: str = STEP_FORMAT
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise `ArgumentError` for what is no such format."""
        object.__setattr__(self, "_pattern", re.compile(_pattern_of(self.format)))

    def name(self, step: int) -> str:
        """Return what the directory of a step is called."""
        return self.format.format(step=step)

    def path(self, root: str, step: int) -> str:
        """Return where below `root` the checkpoint of a step is."""
        return f"{root}/{self.name(step)}"

    def step_of(self, name: str) -> int | None:
        """Return the step whose directory has this name; None if it is not one."""
        found = self._pattern.fullmatch(name)
        step = int(found[1]) if found else None
        return step if step is not None and self.name(step) == name else None


def _pattern_of(text: object) -> str:
    problem = f'must be a name with one {{step}}, such as "checkpoint-{{step}}" or "iter_{{step:07d}}", got {text!r}'
    if not isinstance(text, str):
        raise ArgumentError("step_format", problem)
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ArgumentError("step_format", problem) from error
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    literal = "".join(before for before, *_ in parts)
    if [name for name, *_ in fields] != ["step"]:
        raise ArgumentError("step_format", problem)
    [(_, spec, conversion)] = fields
    if conversion or not re.fullmatch("(0[0-9]{1,2})?d?", spec or ""):
        raise ArgumentError("step_format", problem)
    if "/" in literal or text.startswith(".") or "\0" in literal or (literal and literal[-1].isdecimal()):
        raise ArgumentError("step_format", problem)
    pattern = ""
    for before, name, _, _ in parts:
        pattern += re.escape(before) + ("([0-9]+)" if name is not None else "")
    return pattern


def find_names(names: Iterable[str]) -> StepNames:
    """Return how the steps are called that a directory has; as by default if it has none."""
    held = list(names)
    counted = [(sum(each.step_of(name) is not None for name in held), each) for each in map(StepNames, KNOWN_FORMATS)]
    return max(counted, key=lambda each: each[0])[1]
