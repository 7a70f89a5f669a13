"""From scratch memory to the targets."""

from __future__ import annotations

import torch

from .._engine.device_copies import DeviceCopies
from .._engine.gc_pause import gc_paused
from .._engine.host_memory import Arena
from .._format.chunks import cut
from .._format.dtypes import NOT_COPIED, copyable
from .._state.plain_tensors import PLAIN_TENSORS
from ..errors import LoadError
from .coalesce import ReadSpan
from .decode import ItemDecoder, unpack
from .plan import TensorRead


def scatter(span: ReadSpan, arena: Arena, decoder: ItemDecoder, device_copies: DeviceCopies) -> None:
    """Check the items of a span that has been read into `arena`, and copy them to their targets."""
    memory = arena.memory
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    odd: list[tuple[TensorRead, torch.Tensor, torch.Tensor]] = []

    device_copies.enter_thread()
    with gc_paused():
        for read in span.items:
            frame, dtype, into = read.frame, read.dtype, read.into
            offset = read.offset - span.start
            if frame is None:
                tensor = unpack(read, arena, offset, decoder)
            elif read.bare:
                assert read.part is not None
                rows, first = arena.typed(dtype), offset // dtype.itemsize
                if offset % dtype.itemsize:  # in files of DCP's, where items begin anywhere
                    rows, first = arena.tensor[offset : offset + read.nbytes].clone().view(dtype), 0
                tensor = rows.as_strided(read.part[1], frame.strides, first)
            else:
                start = offset + len(frame.header)
                decoder.framed(read, frame.header_crc + offset, memory, memory[start : start + frame.nbytes])
                tensor = arena.typed(dtype).as_strided(frame.shape, frame.strides, start // dtype.itemsize)
            if read.part is not None and not read.bare:
                tensor = cut(tensor, read.part)
            if dtype in NOT_COPIED:
                tensor, into = copyable(tensor), copyable(into)
            if into.is_conj() or into.is_neg() or type(into) not in PLAIN_TENSORS:  # no kernel for many knows those
                odd.append((read, into, tensor))
                continue
            sources.append(tensor)
            targets.append(into)
    for read, into, tensor in odd:
        try:
            with torch.no_grad():
                into.copy_(tensor)
        except Exception as error:
            raise LoadError(f"{read.fqn}: a {type(into).__name__} cannot be filled in place: {error!r}") from error
    if targets:
        try:  # before the memory is used again, and before the caller looks
            device_copies.wait_for(device_copies.copy(targets, sources))
        except BaseException:
            device_copies.drain(arena, targets)
            raise
