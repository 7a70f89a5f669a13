"""Checks of what a manager is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..checkpointer.arguments import check_custom_metadata
from ..errors import ArgumentError

OnBusy = Literal["wait", "skip", "raise"]

RESERVED = {
    "step",
    "saved_at",
    "metrics",
    "commit_number",
    "committed_after",
    "uncounted",
}  # of the custom metadata of a step: the manager's own


def check_step(step: object) -> int:
    if type(step) is not int or step < 0:
        raise ArgumentError("step", f"{step!r} is not a step: a number from 0 on")
    return step


def check_own_custom_metadata(custom_metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if custom_metadata is None:
        return {}
    check_custom_metadata(custom_metadata)
    if reserved := sorted(RESERVED & custom_metadata.keys()):
        raise ArgumentError("custom_metadata", f"{', '.join(reserved)} is the manager's own: choose another name")
    return custom_metadata


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    if metrics is None:
        return {}
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("metrics", f"{metrics!r} are no numbers by name: {error}") from error
