"""Writes one small checkpoint with stock torch.distributed.checkpoint: make.py OUT. The values follow from the names below."""

import sys, os, platform, warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed.checkpoint as dcp


def state():
    g = torch.Generator().manual_seed(7)
    r = lambda *s: torch.randn(*s, generator=g)
    return {
        "model": {
            "weight": r(6, 4),
            "bias": r(6),
            "half": r(3, 3).to(torch.bfloat16),
            "ids": torch.arange(10),
            "mask": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "transposed": r(4, 5).t(),
            "channels_last": r(2, 3, 4, 4).to(memory_format=torch.channels_last),
        },
        "optim": {
            "state": {"weight": {"step": torch.tensor(3.0), "exp_avg": r(6, 4)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": ["weight", "bias"]}],
        },
        "epoch": 3,
        "name": "golden",
        "blob": b"\x00\x01\x02",
        "none": None,
    }


if __name__ == "__main__":
    out = sys.argv[1]
    writer = dcp.FileSystemWriter(out, thread_count=2)
    dcp.save(state(), storage_writer=writer)
    open(os.path.join(out, "made-with.txt"), "w").write(
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}\n"
    )
