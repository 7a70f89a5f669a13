"""Where checkpoint bytes live: the protocol, and the storages that come with the library."""

from .auto import AutoStorage
from .base import WRITE_ALIGNMENT, ObjectLimits, Reader, Storage, WholeFileStorage, Writer
from .local import LocalStorage
from .memory import MemoryStorage
from .object_store import ObjectStorage

__all__ = [
    "WRITE_ALIGNMENT",
    "AutoStorage",
    "LocalStorage",
    "MemoryStorage",
    "ObjectLimits",
    "ObjectStorage",
    "Reader",
    "Storage",
    "WholeFileStorage",
    "Writer",
]
