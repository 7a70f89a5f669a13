"""The checkpoints of a run: steps, which of them to keep, where to go on, when to stop.

`CheckpointManager` is imported by who first asks for it: `aiodcp ls` needs the steps, and no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import InitialLoad as InitialLoad
    from .manager import CheckpointManager as CheckpointManager
    from .step_restores import RestoredStep as RestoredStep

__all__ = ["CheckpointManager", "InitialLoad", "RestoredStep"]

if not TYPE_CHECKING:  # a type checker is to know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import arguments, manager, step_restores

        home = {"CheckpointManager": manager, "InitialLoad": arguments, "RestoredStep": step_restores}
        return getattr(home[name], name)
