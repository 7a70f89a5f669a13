"""The error for what is wanted and stored and does not fit. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import MismatchError
from .name_hints import explain, suggest
from .report import LoadReport
from .resolve import Resolution
from .targets import LoadTargets


def refuse(
    targets: LoadTargets,
    found: Resolution,
    checkpoint_id: str,
    *,
    strict: bool,
    unexpected: Sequence[str],
) -> MismatchError | None:
    """Return the error for what does not fit, if that is one.

    Args:
        targets: what is wanted.
        found: what came of comparing it with the checkpoint.
        checkpoint_id: the checkpoint.
        strict: whether names must agree.
        unexpected: the names that no rank wants, as far as that is known.
    """
    missing = sorted(found.missing)
    if not strict:
        # Nothing in common is not a partial load, but the wrong checkpoint or the wrong name.
        missing = _misnamed(targets, found, missing) if targets.fqns else missing
        unexpected = unexpected if missing else ()
    if not missing and not unexpected and not found.problems:
        return None
    hint = explain(missing, sorted(unexpected) or found.others)
    if not hint and strict and not found.problems and not _names_optimizers(targets, (*missing, *unexpected)):
        hint = "strict=False loads what both have, and reports the rest"
    return MismatchError(
        checkpoint_id, missing, sorted(unexpected), found.problems, suggest(missing, found.others), hint
    )


def raise_or_note(targets: LoadTargets, error: MismatchError | None, *, is_dry: bool) -> None:
    """Raise an error, or only report it where nothing is loaded."""
    if error is None:
        return
    if not is_dry:
        raise error
    targets.report = replace(targets.report, refusal=error)


def _misnamed(targets: LoadTargets, found: Resolution, missing: Sequence[str]) -> list[str]:
    """Return the names of whole parts that are stored only under a top-level name that was not asked for."""
    elsewhere = {fqn.partition(".")[2] for fqn in found.others if _top_of(targets, fqn) not in targets.kinds}
    misnamed: list[str] = []
    for top in sorted(found.absent):
        names = [fqn for fqn in missing if fqn.startswith(f"{top}.")]
        if any(fqn.removeprefix(f"{top}.") in elsewhere for fqn in names):
            misnamed += names
    return misnamed


def _top_of(targets: LoadTargets, fqn: str) -> str:
    for name in targets.kinds:
        if fqn == name or fqn.startswith(f"{name}."):
            return name
    return fqn


def _names_optimizers(targets: LoadTargets, fqns: Iterable[str]) -> bool:
    """Whether to leave these names out would leave an optimizer without its state."""
    bases = [".".join(map(str, scope.path)) + "." for scope in targets.optimizers]
    return any(fqn.startswith(base) for fqn in fqns for base in bases) or any(".param_groups." in fqn for fqn in fqns)


def note_left_out(report: LoadReport, found: Resolution, unexpected: Iterable[str]) -> None:
    report.missing.extend(sorted(found.missing))
    report.unexpected.extend(sorted(unexpected))
