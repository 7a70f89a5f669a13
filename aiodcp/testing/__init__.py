"""For tests: what every storage must pass, and a storage with faults.

    from aiodcp.testing import StorageSuite

    class TestMyStorage(StorageSuite):
        def make_storage(self):
            return MyStorage()

pytest finds the tests of `StorageSuite` in the subclass. They need pytest's `tmp_path`, and no plugin.
"""

from .faulty_storage import FaultyStorage, Gate
from .storage_suite import StorageSuite

__all__ = ["FaultyStorage", "Gate", "StorageSuite"]
