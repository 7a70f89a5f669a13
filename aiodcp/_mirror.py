"""Many small tensors on a device: gathered there, so that they cross in one copy instead of thousands.

A mirror is device memory of the size of one stretch of the arena. What stands in the arena around the payloads comes
to the device first and goes back with them:

    arena    frames | payloads of the save before  --->  mirror
    tensors                                        --->  mirror, one kernel for hundreds of them
    mirror   frames | payloads                     --->  arena
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]

# Bytes of a tensor on average, below which the way there and back takes less time than the calls. A call costs the
# host some 5 us, in which a device brings 256 KiB at 50 GB/s.
SMALL_NBYTES = 256 << 10


class Mirror:
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

    def places(self, stretch: torch.Tensor, targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return where in the mirror each of `targets`, which lie within `stretch`, is gathered."""
        assert self.memory is not None
        start = stretch.data_ptr()
        found = []
        for target in targets:
            first = target.data_ptr() - start if target.numel() else 0
            found.append(self.memory[first : first + target.nbytes].view(target.dtype).view(target.shape))
        return found


def copy_through(
    memory: torch.Tensor, places: Tensors, stretch: torch.Tensor, targets: Tensors, sources: Tensors
) -> None:
    """Queue, on the current stream, what brings `sources` to `targets`; what lies elsewhere is copied at once.

    Args:
        memory: the mirror's.
        places: in it, one for each target.
        stretch: of host memory, in which `targets` lie.
        targets, sources: in step.
    """
    device = memory.device
    inside = [source.device == device for source in sources]
    if not all(inside):  # first: it must be there when the stretch goes to the device, or would be lost
        torch._foreach_copy_(_those(targets, inside, False), _those(sources, inside, False))
        places, sources = _those(places, inside, True), _those(sources, inside, True)
    if not places:
        return
    mirrored = memory[: stretch.nbytes]
    mirrored.copy_(stretch, non_blocking=True)
    torch._foreach_copy_(places, sources, non_blocking=True)
    stretch.copy_(mirrored, non_blocking=True)


def _those(tensors: Tensors, inside: Sequence[bool], wanted: bool) -> list[torch.Tensor]:
    return [tensor for tensor, each in zip(tensors, inside, strict=True) if each is wanted]
