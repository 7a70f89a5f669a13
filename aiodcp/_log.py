"""The log `aiodcp`: no handler, filter or formatter of the application's can stop what writes to it.

A filter that reads a context variable raises in threads that do not have it, and `logging` lets that through.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from typing import Any


class SafeLogger:
    """A logger whose methods do not raise; what the application's handlers raise goes to standard error."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, *args: object) -> None:
        self._log(logging.DEBUG, message, args)

    def warning(self, message: str, *args: object) -> None:
        self._log(logging.WARNING, message, args)

    def error(self, message: str, *args: object) -> None:
        self._log(logging.ERROR, message, args)

    def exception(self, message: str, *args: object) -> None:
        """Log at ERROR, with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, message, args, exc_info=True)

    def log(self, level: int, message: str, *args: object, **options: Any) -> None:
        self._log(level, message, args, **options)

    def has_handlers(self) -> bool:
        """Whether records go anywhere but to `logging.lastResort`, which is standard error."""
        return self._logger.hasHandlers()

    def _log(self, level: int, message: str, args: tuple[object, ...], **options: Any) -> None:
        try:
            self._logger.log(level, message, *args, stacklevel=3, **options)
        except Exception:
            _report_to_stderr()
        except BaseException:  # SystemExit of a handler: in the main thread the application means it
            if threading.current_thread() is threading.main_thread():
                raise
            _report_to_stderr()


def _report_to_stderr() -> None:
    if not logging.raiseExceptions:
        return
    try:
        sys.stderr.write("--- a handler of the logger 'aiodcp' failed\n")
        traceback.print_exc()
    except Exception:
        pass
