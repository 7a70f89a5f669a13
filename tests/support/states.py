"""States to save, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch


def make_state(seed: int = 0) -> dict[str, Any]:
    """A state with what real ones have: nested dicts and lists, several dtypes, numbers, strings, None."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "weight": torch.randn(40, 30, generator=generator),
            "bias": torch.randn(40, generator=generator).to(torch.bfloat16),
            "ids": torch.arange(7) + seed,
            "scalar": torch.tensor(2.5 + seed),
            "empty": torch.empty(0, 3),
        },
        "optim": {
            "state": {0: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(40, 30, generator=generator)}},
            "param_groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "epoch": seed,
        "name": f"state {seed}",
        "blob": bytes([seed, 1, 2]),
        "none": None,
        "history": [torch.full((3,), float(seed)), {"loss": 0.5 * seed}],
    }


def blank(value: Any) -> Any:
    """The same state with zeros for tensors and wrong values for everything else."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(each) for key, each in value.items()}
    if isinstance(value, list) and any(isinstance(each, torch.Tensor | dict | list) for each in value):
        return [blank(each) for each in value]
    return "not loaded"


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert one.dtype is other.dtype, path
        assert one.shape == other.shape, path
        if not one.is_quantized and one.layout is torch.strided:
            flat, same = (each.detach().resolve_conj().contiguous().reshape(-1) for each in (one, other))
            if flat.numel():
                flat, same = flat.view(torch.uint8), same.view(torch.uint8)
            assert torch.equal(flat, same), path
        else:
            assert torch.equal(one.to_dense(), other.to_dense()) if one.is_sparse else torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}.{number}")
    else:
        assert one == other, path
        assert type(one) is type(other), path
