"""What the files of a checkpoint are called. No torch here."""

from __future__ import annotations

import re

METADATA_NAME = ".metadata"


def data_file(rank: int, save_id: str, part: int = 0) -> str:
    """Return a rank's data file: a name that no other save has, so that the old checkpoint's files stay whole.

    Args:
        rank: whose.
        save_id: no other save has it.
        part: which of the states that are committed together.
    """
    return f"__{rank}_{part}_{save_id}.distcp"


def piece_file(file: str, number: int) -> str:
    """Return the name of a piece of a data file, where a store takes it in several; the last has the file's own."""
    return f"{file.removesuffix('.distcp')}_{number}.distcp"


def split_piece(name: str) -> tuple[str, int | None]:
    """Return the data file that a piece is of, and the piece's number; the name itself and None if it is not one."""
    found = _PIECE.fullmatch(name)
    return (f"{found[1]}.distcp", int(found[2])) if found else (name, None)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is part of a DCP checkpoint's data, or of one that was never finished."""
    return name.endswith(".distcp") or (name.startswith(METADATA_NAME) and name.endswith(".tmp"))


_OURS = re.compile(r"__\d+_\d+_([0-9a-f]{32})(?:_\d+)?\.distcp")

_PIECE = re.compile(r"(__\d+_\d+_[0-9a-f]{32})_(\d+)\.distcp")

_OUR_TEMPORARY = re.compile(re.escape(METADATA_NAME) + r"\.[0-9a-f]{32}\.tmp")


def save_id_of(name: str) -> str | None:
    """Return the id of the save of this library that a data file belongs to; None if it is not such a file."""
    found = _OURS.fullmatch(name)
    return found[1] if found else None


def is_our_leftover(name: str) -> bool:
    """Whether a file of this name is data of this library's: files of `dcp.save` may be in use, and do not say so."""
    return save_id_of(name) is not None or _OUR_TEMPORARY.fullmatch(name) is not None
