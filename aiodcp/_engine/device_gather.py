"""Many small tensors on a device: gathered there, so that they cross in one copy instead of thousands.

A gather buffer is device memory of the size of one stretch of the arena. What stands in the arena around the payloads
comes to the device first and goes back with them:

    arena    frames | payloads of the save before  --->  buffer
    tensors                                        --->  buffer, one kernel for hundreds of them
    buffer   frames | payloads                     --->  arena
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]

Pick = Callable[[Sequence[Any]], tuple[Any, ...]]

# Bytes of a tensor on average, below which the way there and back takes less time than the calls. A call costs the
# host some 5 us, in which a device brings 256 KiB at 50 GB/s.
SMALL_NBYTES = 256 << 10

# dtypes that torch has kernels for which copy many tensors at once; others are seen as integers of their size.
_WITH_KERNEL = {
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GatherBuffer:
    """Device memory for one stretch of host memory at a time; its user puts one copy after the other on one stream.

    Attributes:
        memory: the device memory, as bytes; None if the device had not so much to spare.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.memory: torch.Tensor | None = None
        try:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:  # then the tensors cross one by one: slower, and no reason to fail
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenPart:
    """Tensors of one dtype that are taken out of a stretch of bytes, where each begins at a multiple of its itemsize.

    Attributes:
        dtype: as they are seen: one that torch has a kernel for.
        targets: on the device.
        starts: bytes, where in the stretch each is.
    """

    dtype: torch.dtype
    targets: list[torch.Tensor]
    starts: list[int]

    @classmethod
    def of(cls, targets: Sequence[torch.Tensor], starts: Sequence[int]) -> list[TakenPart]:
        """Return tensors by their dtypes."""
        parts: dict[torch.dtype, TakenPart] = {}
        for target, start in zip(targets, starts, strict=True):
            dtype = target.dtype
            if dtype not in _WITH_KERNEL:
                dtype = _INTEGERS[dtype.itemsize]
                target = target.detach().view(dtype)
            part = parts.get(dtype)
            if part is None:
                part = parts[dtype] = cls(dtype=dtype, targets=[], starts=[])
            part.targets.append(target)
            part.starts.append(start)
        return list(parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Tensors of one dtype, strided as their views of the buffer: one call copies all. Or any, one after the other."""

    pick: Pick
    views: list[torch.Tensor]
    is_alike: bool
    seen_as: torch.dtype | None


class Gather:
    """How the tensors of one stretch are gathered: in groups that torch copies with one kernel for hundreds of tensors.

    Made of the tensors of one save, and used for later ones as long as it `fits`. Tensors whose strides have changed
    since are copied all the same, and one by one.

    Attributes:
        host_targets: of tensors that are not on the device, where in the stretch they go.
        pick_host: takes those out of all sources.
    """

    def __init__(self, memory: torch.Tensor, stretch: torch.Tensor, targets: Tensors, sources: Tensors) -> None:
        """Plan.

        Args:
            memory: of a gather buffer.
            stretch: of host memory, in which `targets` lie.
            targets, sources: in step.
        """
        self.stretch = stretch
        self.gathered: torch.Tensor = memory[: stretch.nbytes]
        self._where = list(map(torch.Tensor.get_device, sources))
        start, here = stretch.data_ptr(), memory.get_device()
        host: list[int] = []
        groups: dict[torch.dtype | None, list[int]] = {}
        views: dict[int, torch.Tensor] = {}
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if self._where[number] != here:
                host.append(number)
                continue
            first = target.data_ptr() - start if target.numel() else 0
            view = memory[first : first + target.nbytes].view(target.dtype).view(target.shape)
            is_alike = source.stride() == view.stride() and not source.is_conj() and not source.is_neg()
            views[number] = view
            groups.setdefault(target.dtype if is_alike else None, []).append(number)
        self.host_targets: list[torch.Tensor] = [targets[number] for number in host]
        self.pick_host: Pick = picker(host)
        self.groups: list[_Group] = [_group(dtype, numbers, views) for dtype, numbers in groups.items()]

    def fits(self, sources: Tensors) -> bool:
        """Whether these are where the ones were that this was planned for, and can be seen as integers as those."""
        return list(map(torch.Tensor.get_device, sources)) == self._where and not any(
            source.is_conj() or source.is_neg()
            for group in self.groups
            if group.seen_as is not None
            for source in group.pick(sources)
        )


def _group(dtype: torch.dtype | None, numbers: list[int], views: dict[int, torch.Tensor]) -> _Group:
    seen_as = None if dtype is None or dtype in _WITH_KERNEL else _INTEGERS.get(dtype.itemsize)
    found = [views[number] if seen_as is None else views[number].view(seen_as) for number in numbers]
    return _Group(pick=picker(numbers), views=found, is_alike=dtype is not None, seen_as=seen_as)


def gather_and_copy(gather: Gather, sources: Tensors) -> None:
    """Queue, on the current stream, what brings `sources` into the stretch, by way of the buffer.

    What comes from host memory must be there already: the stretch goes to the device and back as a whole.
    """
    if not gather.groups:
        return
    gather.gathered.copy_(gather.stretch, non_blocking=True)
    for group in gather.groups:
        chosen = group.pick(sources)
        if not group.is_alike:
            for view, source in zip(group.views, chosen, strict=True):
                view.copy_(source, non_blocking=True)
            continue
        if group.seen_as is not None:
            chosen = tuple(source.view(group.seen_as) for source in chosen)
        torch._foreach_copy_(group.views, chosen, non_blocking=True)
    gather.stretch.copy_(gather.gathered, non_blocking=True)


def picker(indices: list[int]) -> Pick:
    """Return what takes the values at `indices` out of a sequence."""
    if not indices:
        return lambda values: ()
    if len(indices) == 1:
        [index] = indices
        return lambda values: (values[index],)
    return itemgetter(*indices)
