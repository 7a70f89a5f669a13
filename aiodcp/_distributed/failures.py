"""A failure on one rank, as text for the others."""

from __future__ import annotations

import traceback

from ..errors import RankFailure
from .channel import Channel

_TEXT_NBYTES = 16 << 10  # of each failure's text and traceback


def describe_failure(line: Channel, error: Exception) -> RankFailure:
    try:
        text = str(error)
        trace = "".join(traceback.format_exception(error))
    except Exception as unprintable:  # an exception of anybody's making
        text, trace = f"(its text cannot be had: {unprintable!r})", ""
    return RankFailure(
        rank=line.members[line.rank],
        kind=type(error).__name__,
        text=text[:_TEXT_NBYTES],
        traceback=trace[-_TEXT_NBYTES:],
    )


def failure_as_json(failure: RankFailure) -> dict[str, object]:
    return {
        "rank": failure.rank,
        "kind": failure.kind,
        "text": failure.text,
        "traceback": failure.traceback,
    }
