"""Reading checkpoints without the program that saved them."""

from .diff import Difference, diff, diff_sync
from .export import Exported, convert, convert_sync, export, export_sync
from .stored_checkpoint import StoredCheckpoint, open_checkpoint
from .stored_checkpoint import open_checkpoint as open  # noqa: A004 - as `aiodcp.open`
from .stored_values import StoredChunk, StoredTensor, StoredValue
from .verify import Problem, verify, verify_sync

__all__ = [
    "Difference",
    "Exported",
    "Problem",
    "StoredCheckpoint",
    "StoredChunk",
    "StoredTensor",
    "StoredValue",
    "convert",
    "convert_sync",
    "diff",
    "diff_sync",
    "export",
    "export_sync",
    "open",
    "open_checkpoint",
    "verify",
    "verify_sync",
]
