"""One rank's plan for a load: what it wants, compared with what is stored, and where that lies. Pure.

In two steps, because between them the options of optimizers are read: they say what belongs to which parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .._format.dcp import Metadata
from ..errors import CheckpointError, LoadError
from .chunk_index import ChunkIndex
from .leave_out import Choice, Kept, leave_out
from .name_union import pack_marks
from .options import LoadOptions
from .plan import ValueRead
from .planning import plan_load
from .read_plan import ReadPlan
from .refuse import raise_or_note, refuse
from .resolve import Resolution, Resolver, groups_needed, names_wanted
from .stored_names import StoredNames
from .targets import LoadTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """One rank's plan, and what it found out on the way.

    Attributes:
        plan: what is read.
        found: how wanted and stored names compare.
        names: all that is stored, sorted; empty when there are no other ranks.
        marks: which of them this rank wants, and asks for.
    """

    plan: ReadPlan
    found: Resolution = field(default_factory=Resolution)
    names: list[str] = field(default_factory=list)
    marks: bytes = b""


class LocalPlanning:
    """Compares one rank's targets with a checkpoint, and changes them to what is to be loaded."""

    def __init__(
        self, checkpoint_id: str, metadata: Metadata, targets: LoadTargets, options: LoadOptions, *, rank: int
    ) -> None:
        """Begin.

        Args:
            checkpoint_id, metadata: of the checkpoint.
            targets: what this rank wants of it.
            options: what the caller asked for.
            rank: this rank's position.
        """
        self._checkpoint_id = checkpoint_id
        self._metadata = metadata
        self._targets = targets
        self._options = options
        self._rank = rank
        self._stored: StoredNames
        self._kept: Kept = []

    def compare(self) -> list[ValueRead]:
        """Compare names; return where the options of optimizers lie that are to be read before `find`.

        Raises:
            LoadError: the names cannot be compared.
        """
        options = self._options
        with self._planning():
            self._stored = stored = StoredNames(self._metadata, self._targets.kinds, options.rename)
            if options.include is not None or options.exclude is not None:
                self._kept = leave_out(self._targets, stored, Choice(options.include, options.exclude))
            needed = groups_needed(self._targets, stored)
            if not needed:
                return []
            pieces = ChunkIndex(self._metadata, self._checkpoint_id)
            places = [pieces.find(stored.source(fqn), None) for fqn in needed]
            return [
                ValueRead(fqn, number, place.relative_path, place.offset, place.length)
                for number, (fqn, place) in enumerate(zip(needed, places, strict=True))
            ]

    def find(self, values: Mapping[str, Any], *, is_alone: bool) -> LocalPlan:
        """Find what is to be read for each target.

        Args:
            values: the options of optimizers, by name.
            is_alone: whether what this rank does not want nobody wants; else that is known when all have been asked.

        Raises:
            MismatchError: what is wanted and stored does not fit, and something is to be loaded.
            LoadError: it cannot be planned.
        """
        metadata, targets, options, stored = self._metadata, self._targets, self._options, self._stored
        with self._planning():
            resolver = Resolver(
                targets,
                stored,
                stored.containers,
                values,
                rank=self._rank,
                cast=options.cast,
                kept=self._kept,
            )
            found = resolver.run()
            pieces = ChunkIndex(metadata, self._checkpoint_id)
            plan, problems = plan_load(metadata, targets, pieces, cast=options.cast)
            found.problems += problems
            unexpected = found.unexpected if is_alone else ()
            error = refuse(targets, found, self._checkpoint_id, strict=options.strict, unexpected=unexpected)
            raise_or_note(targets, error, is_dry=options.is_dry)
            targets.report.loaded.extend(
                fqn for fqn, source in zip(targets.fqns, targets.sources, strict=True) if source is not None
            )
            if is_alone:
                return LocalPlan(plan=plan, found=found)
            names = sorted(stored.entries)
            wanted = names_wanted(targets, stored)
            return LocalPlan(plan=plan, found=found, names=names, marks=pack_marks(names, wanted, stored.is_below))

    @contextmanager
    def _planning(self) -> Iterator[None]:
        """Make one error of what goes wrong in the block: the metadata is sound, so it is not damage."""
        try:
            yield
        except CheckpointError:  # ArgumentError is a ValueError
            raise
        except Exception as error:
            raise LoadError(f"{self._checkpoint_id}: cannot be planned: {error!r}") from error
