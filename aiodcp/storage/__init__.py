"""Where checkpoint bytes live: the protocol, and the storages that come with the library."""

from .base import BLOCK, Reader, Storage, Writer
from .local import LocalStorage
from .memory import MemoryStorage

__all__ = ["BLOCK", "LocalStorage", "MemoryStorage", "Reader", "Storage", "Writer"]
