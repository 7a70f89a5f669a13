"""Does a stored value fit its target? Pure."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Partial

from .._format.dcp import TensorStorageMetadata
from .._log import SafeLogger
from .._state.plain_tensors import PLAIN_TENSORS
from .._state.sharding import is_sharded, parts_of, shape_and_dtype
from .conversion import as_number, can_convert, holds_number, is_lossy
from .read_plan import ReadPlan
from .targets import LoadTargets

log = SafeLogger(__name__)


def settle_values(plan: ReadPlan, targets: LoadTargets, *, cast: bool) -> list[str]:
    """Convert between numbers and tensors, given the values; return why something does not fit."""
    problems: list[str] = []
    loaded = targets.loaded
    for index in plan.numbers:
        stored, wanted = loaded[index].item(), type(targets.values[index])
        number = as_number(stored, wanted, cast=cast)
        if number is None:
            problems.append(
                f"{targets.fqns[index]} is the tensor {stored!r} in the checkpoint, {wanted.__name__} in the state "
                "dict: a lossy conversion, which cast=True allows"
            )
        loaded[index] = number
        targets.report.converted.append(targets.fqns[index])
    fills, plan.fills = plan.fills, []
    for index in fills:
        fqn, value, tensor = targets.fqns[index], loaded[index], targets.values[index]
        if value is None and targets.kinds.get(str(targets.paths[index][0])) == "plain":
            continue  # there was none
        if not isinstance(value, torch.Tensor | int | float) and _is_optimizers(targets, index):
            continue  # of its own kind, such as LBFGS before its first step
        plan.fills.append(index)
        if isinstance(value, torch.Tensor):  # of another format: one that lies there with the values
            if value.shape != tensor.shape or (not cast and is_lossy(value.dtype, tensor.dtype)):
                problems.append(
                    f"{fqn} is {value.dtype} of shape {tuple(value.shape)} in the checkpoint, "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} in the state dict"
                )
            continue
        is_scalar = not tensor.dim() and not is_sharded(tensor) and tensor.layout is torch.strided
        if not isinstance(value, int | float) or not is_scalar:
            problems.append(f"{fqn} is a tensor in the state dict, but another kind of value in the checkpoint")
        elif not holds_number(tensor.dtype, value, cast=cast):
            problems.append(
                f"{fqn} is the number {value!r} in the checkpoint, {tensor.dtype} in the state dict: a lossy "
                "conversion, which cast=True allows"
            )
        targets.report.converted.append(fqn)
    for index in plan.opaque:
        value, tensor = loaded[index], targets.values[index]
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            problems.append(f"{targets.fqns[index]} is a {type(value).__name__} in the checkpoint")
        elif value.layout is not tensor.layout:
            problems.append(
                f"{targets.fqns[index]} is {value.layout} in the checkpoint, {tensor.layout} in the state dict"
            )
    return problems


def _is_optimizers(targets: LoadTargets, index: int) -> bool:
    path = targets.paths[index]
    return any(path[: len(scope.path)] == scope.path for scope in targets.optimizers)


def fill_whole(plan: ReadPlan, targets: LoadTargets) -> None:
    """Fill, after everything is checked, the tensors that are not filled part by part."""
    with torch.no_grad():
        opaque = list(plan.opaque)
        for index in plan.fills:
            if isinstance(targets.loaded[index], torch.Tensor):
                opaque.append(index)
            else:
                targets.values[index].fill_(targets.loaded.pop(index))
        for index in opaque:
            target = targets.values[index]
            try:
                target.copy_(targets.loaded[index])
            except Exception as error:  # whatever its kind of tensor says that it cannot: then it is replaced
                log.debug("%s is replaced, it cannot be filled: %r", targets.fqns[index], error)
                continue
            del targets.loaded[index]


def misfit(value: torch.Tensor, entry: TensorStorageMetadata, *, cast: bool) -> str:
    """Say why a stored tensor cannot go into this one; empty when it can."""
    return differs(value, entry, cast=cast) or unfillable(value)


def differs(value: torch.Tensor, entry: TensorStorageMetadata, *, cast: bool) -> str:
    """Say in what a tensor differs from the stored one; empty when it does not, or in nothing that matters."""
    if torch.nn.parameter.is_lazy(value):
        return "is a parameter of a lazy module, which has no shape yet"
    shape, wanted = shape_and_dtype(value)
    if shape != entry.size:
        return f"has shape {tuple(entry.size)} in the checkpoint, {tuple(shape)} in the state dict"
    dtype = entry.properties.dtype
    if dtype is not wanted and not can_convert(dtype, wanted):
        return f"is {dtype} in the checkpoint, {wanted} in the state dict, to which torch cannot convert it"
    if not cast and is_lossy(dtype, wanted):
        return f"is {dtype} in the checkpoint, {wanted} in the state dict: a lossy conversion, which cast=True allows"
    if isinstance(value, DTensor) and any(isinstance(placement, Partial) for placement in value.placements):
        return f"has Partial placements {value.placements} (a pending reduction), which cannot be loaded into"
    layout = entry.properties.layout
    return f"is {layout} in the checkpoint, {value.layout} in the state dict" if layout is not value.layout else ""


def unfillable(value: torch.Tensor) -> str:
    """Say why nothing can be copied into a tensor, or one of its parts; empty when it can."""
    return next(filter(None, map(_cannot_fill, parts_of(value))), "")


def _cannot_fill(value: torch.Tensor) -> str:
    """Say why nothing can be copied into a tensor; empty when it can."""
    if value.is_meta:
        return "is on the meta device, which has no memory to load into"
    if value.is_inference():
        return "was made in inference mode, and cannot be changed"
    if value.layout is not torch.strided or type(value) not in PLAIN_TENSORS:
        return ""
    if not value.is_contiguous() and _overlaps_itself(value):
        return "is expanded in the state dict: its elements share memory"
    if value.data_ptr() == 0 and value.numel():
        return "has no memory in the state dict: its storage has been freed"
    return ""


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address: a step does not lead beyond what the smaller steps reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
