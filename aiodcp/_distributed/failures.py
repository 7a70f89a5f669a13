"""A failure on one rank, as text for the others."""

from __future__ import annotations

import traceback

from ..errors import RankFailure
from .channel import Channel

_TEXT_NBYTES = 16 << 10  # of each failure's text and traceback


def describe_failure(channel: Channel, error: Exception) -> RankFailure:
    try:
        text = str(error)
        trace = "".join(traceback.format_exception(error))
    except Exception as unprintable:  # whatever an application's exception does
        text, trace = f"(printing it raised {unprintable!r})", ""
    return RankFailure(
        rank=channel.members[channel.rank],
        kind=type(error).__name__,
        text=text[:_TEXT_NBYTES],
        traceback=trace[-_TEXT_NBYTES:],
    )
