"""`python -m aiodcp`: the command line."""

from __future__ import annotations

import argparse
import os


def main(arguments: list[str] | None = None) -> None:
    """Parse `arguments` (by default the process's own) and run the command."""
    parser = argparse.ArgumentParser(prog="python -m aiodcp", description="Asyncio-native checkpoints for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser(
        "bench", help="measure saving and loading on this machine, or under torchrun, against DCP; takes minutes"
    )
    bench.add_argument("directory", nargs="?", default=".", help="on the file system to measure (default: here)")
    bench.add_argument("--gib", type=_positive_float, default=1.0, help="size of the state in 64 tensors (default: 1)")
    bench.add_argument(
        "--tensors", type=_positive_int, default=10_000, help="of 4 KiB in the other state (default: 10000)"
    )
    bench.add_argument("--repeat", type=_positive_int, default=5, help="rounds that count (default: 5)")
    bench.add_argument("--plan", type=_positive_int, metavar="RANKS", help="measure planning, for simulated ranks")
    bench.add_argument(
        "--device", default="cpu", help="where the state is; cuda measures what a save holds up on host and device"
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)

    # Imported here: torch takes seconds to import, and --help needs none of it.
    if options.plan:
        from . import _bench_plan

        _bench_plan.run(options.plan, as_json=options.json)
    elif options.device != "cpu":
        from . import _bench_device

        _bench_device.run(options.device, options.directory, repeat=options.repeat, as_json=options.json)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from . import _bench_ranks

        _bench_ranks.run(options.directory, gib=options.gib, repeat=options.repeat, as_json=options.json)
    else:
        from . import bench as benchmark

        benchmark.run(
            options.directory, gib=options.gib, tensors=options.tensors, repeat=options.repeat, as_json=options.json
        )


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    main()
