"""Where checkpoint bytes live: the protocol, and the storages that come with the library."""

from .base import WRITE_ALIGNMENT, Reader, Storage, Writer
from .local import LocalStorage
from .memory import MemoryStorage

__all__ = ["WRITE_ALIGNMENT", "LocalStorage", "MemoryStorage", "Reader", "Storage", "Writer"]
