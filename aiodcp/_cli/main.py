"""The command line, `aiodcp` or `python -m aiodcp`. What needs no torch does not wait for it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any, TypeVar

from ..errors import ArgumentError, CheckpointError, CorruptError
from .text_tables import printable

T = TypeVar("T")

DIFFERENT = 1  # exit status: `verify` has found damage, `diff` a difference

FAILED = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` (by default the process's own) and run the command.

    Exits with 0; with 1 if `verify` finds damage or `diff` a difference; with 2 if the command fails.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(parser)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "show" and options.fqn is None and rest and not rest[0].startswith("-"):
        options.fqn = rest.pop(0)  # argparse finds an optional name only before the flags
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may have lone surrogates
    try:
        status = options.run(options)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except ArgumentError as error:
        status = _fail(options, error.problem)
    except CorruptError as error:
        status = _fail(options, f"{error}; run `aiodcp verify` to list all damage")
    except (CheckpointError, OSError) as error:
        status = _fail(options, str(error))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:  # such as no memory for what a damaged file asks for
        status = _fail(options, f"{type(error).__name__}: {error}")
    if status:
        sys.exit(status)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a line goes on: `eval "$(register-python-argcomplete aiodcp)"`."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def _fail(options: argparse.Namespace, text: str) -> int:
    print(printable(f"aiodcp {options.command}: {text}", keep=""), file=sys.stderr)
    return FAILED


def _version() -> str:
    try:
        return version("aiodcp")
    except PackageNotFoundError:
        return "(not installed)"


class _Commands:
    """The parser of the command line, to which commands are added."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(prog="aiodcp", description="Asyncio-native checkpoints for PyTorch.")
        self.parser.add_argument("--version", action="version", version=f"aiodcp {_version()}")
        self._commands = self.parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(self, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """Add a command that calls `run` with its options; `text` is what its help says."""
        command = self._commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command


def _parser() -> argparse.ArgumentParser:
    commands = _Commands()
    _add_ls(commands)
    _add_show(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_gc(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_report(commands)
    _add_bench(commands)
    return commands.parser


def _add_ls(commands: _Commands) -> None:
    ls = commands.add("ls", _ls, "list the steps in a root directory, complete or not")
    ls.add_argument("root", help="directory or URL that contains the step-<n> directories")


def _add_show(commands: _Commands) -> None:
    show = commands.add("show", _show, "show what a checkpoint holds: names, shapes, dtypes, sizes, files")
    show.add_argument("checkpoint", help="checkpoint directory or URL")
    show.add_argument("fqn", nargs="?", help="show only this value and everything below it")
    show.add_argument("--chunks", action="store_true", help="also show where the chunks of each tensor are stored")


def _add_verify(commands: _Commands) -> None:
    text = "read a whole checkpoint and verify its coverage, its files, and the CRC32 of every item"
    commands.add("verify", _verify, text).add_argument("checkpoint", help="checkpoint directory or URL")


def _add_diff(commands: _Commands) -> None:
    diff = commands.add("diff", _diff, "compare two checkpoints: what changed, and by how much")
    diff.add_argument("a", help="checkpoint directory or URL")
    diff.add_argument("b", help="checkpoint directory or URL to compare it with")


def _add_gc(commands: _Commands) -> None:
    gc = commands.add("gc", _gc, "remove steps that the options do not keep, and leftovers of interrupted saves")
    gc.add_argument("root", help="directory or URL that contains the step-<n> directories")
    gc.add_argument("--keep-last", type=_positive_int, metavar="N", help="keep the newest N steps (default: all)")
    gc.add_argument(
        "--keep-every", type=_positive_int, metavar="N", help="also keep every step that is a multiple of N"
    )
    best = "also keep the N best steps by METRIC (default: 1)"
    gc.add_argument("--keep-best", type=_best, metavar="METRIC:min|max[:N]", help=best)
    gc.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")


def _add_export(commands: _Commands) -> None:
    export = commands.add("export", _export, "write a checkpoint in another format")
    export.add_argument("checkpoint", help="checkpoint directory or URL")
    export.add_argument("--to", choices=["safetensors", "torch"], required=True, help="the format")
    export.add_argument("out", help="a file for torch, a directory for safetensors")
    export.add_argument(
        "--prefix", default="", help="safetensors: export only the names under this prefix, and strip it"
    )
    size = "safetensors: maximum GB per file, but for a single larger tensor (default: 5)"
    export.add_argument("--dtype", help="convert floating-point tensors, such as to bfloat16")
    tied = "safetensors: leave out NAME, a weight that is tied to OTHER; may be given several times"
    export.add_argument("--tied", type=_pair, action="append", default=[], metavar="NAME=OTHER", help=tied)
    export.add_argument("--shard-gb", type=_positive_float, default=5.0, help=size)


def _add_convert(commands: _Commands) -> None:
    text = "write any checkpoint that is read here as one of torch.distributed.checkpoint's format"
    convert = commands.add("convert", _convert, text)
    convert.add_argument("checkpoint", help="checkpoint directory, safetensors folder or file, torch.save file, or URL")
    convert.add_argument("out", help="directory or URL of the new checkpoint")
    convert.add_argument("--dtype", help="convert floating-point tensors, such as to bfloat16")


def _add_report(commands: _Commands) -> None:
    text = "write an HTML page about the saves below a root: phases, stalls, sizes, failures, retention"
    report = commands.add("report", _report, text)
    report.add_argument("root", help="directory or URL that contains the step-<n> directories")
    report.add_argument("--out", default="report.html", help="the page's file (default: report.html)")


def _add_bench(commands: _Commands) -> None:
    text = "measure saving and loading on this machine, or under torchrun, against DCP; takes minutes"
    bench = commands.add("bench", _bench, text)
    where = "directory on the file system to measure, which must exist; or s3://bucket/prefix (default: .)"
    bench.add_argument("directory", nargs="?", default=".", help=where)
    bench.add_argument("--gib", type=_positive_float, default=1.0, help="size of the state in 64 tensors (default: 1)")
    small = "number of tensors in the other state, of 4 KiB, on a device of 16 KiB (default: 10000)"
    bench.add_argument("--tensors", type=_positive_int, default=10_000, help=small)
    bench.add_argument(
        "--repeat", type=_positive_int, default=5, help="measured rounds, after one to warm up (default: 5)"
    )
    bench.add_argument(
        "--plan", type=_positive_int, metavar="RANKS", help="measure only planning, for RANKS simulated ranks"
    )
    many = "measure only what so many tensors of 1 KiB cost: processor time, and the lag of the caller's loop"
    bench.add_argument("--many", type=_positive_int, metavar="TENSORS", help=many)
    device = "where the state is; cuda measures how long a save holds up host and device (default: cpu)"
    bench.add_argument("--device", default="cpu", help=device)


# Each command imports what it needs: torch takes seconds to import.


def _ls(options: argparse.Namespace) -> int:
    from .ls import format_steps, list_rows

    rows = list_rows(options.root)
    _print(options, rows, lambda: format_steps(rows))
    return 0


def _gc(options: argparse.Namespace) -> int:
    from ..manager.retention import Retention
    from .gc import collect

    if options.keep_last is None and (options.keep_every or options.keep_best):
        raise ArgumentError("keep_last", "--keep-every and --keep-best require --keep-last")
    retention = Retention(keep_last=options.keep_last, keep_every=options.keep_every, keep_best=options.keep_best)
    result = collect(options.root, retention, dry_run=options.dry_run)

    def summary() -> str:
        what = "would remove" if options.dry_run else "removed"
        why = {step: f": {text}" for step, text in result.get("why", {}).items()}
        lines = [f"{what} step {step}{why.get(step, '')}" for step in result["removed"]]
        leftovers = f"{what} leftovers of an interrupted save of step"
        lines += [f"{leftovers} {step}{why.get(step, '')}" for step in result["leftovers"]]
        return "\n".join(lines) or "nothing to remove"

    _print(options, result, summary)
    return 0


def _show(options: argparse.Namespace) -> int:
    from .show import format_show, show

    result = _run(show(options.checkpoint, options.fqn))
    _print(options, result, lambda: format_show(result, chunks=options.chunks))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .._telemetry.progress_bar import bar
    from ..reader.verify import verify
    from .reading import naming_steps
    from .text_tables import plural

    async def verify_here() -> list[Any]:
        async with naming_steps(options.checkpoint):
            return await verify(options.checkpoint, bar=shown)

    with bar("verifying") as shown:
        problems = _run(verify_here())

    def text() -> str:
        lines = [": ".join(filter(None, (each.fqn, each.file, each.problem))) for each in problems]
        return "\n".join([*lines, plural(len(problems), "problem")]) if problems else "intact: no damage found"

    _print(options, {"whole": not problems, "problems": [dataclasses.asdict(each) for each in problems]}, text)
    return DIFFERENT if problems else 0


def _diff(options: argparse.Namespace) -> int:
    from .._telemetry.progress_bar import bar
    from ..reader.diff import diff
    from .diff import format_diff
    from .reading import naming_steps

    async def diff_here() -> list[Any]:
        async with naming_steps(options.a), naming_steps(options.b):
            return await diff(options.a, options.b, bar=shown)

    with bar("comparing") as shown:
        differences = _run(diff_here())
    found = {"same": not differences, "differences": [dataclasses.asdict(each) for each in differences]}
    _print(options, found, lambda: format_diff(differences))
    return DIFFERENT if differences else 0


def _export(options: argparse.Namespace) -> int:
    from .._telemetry.progress_bar import bar
    from ..reader.export import export
    from .reading import naming_steps

    if options.to == "torch" and options.prefix:
        raise ArgumentError("prefix", "--prefix requires --to safetensors")
    prefix = options.prefix.removesuffix(".")

    async def export_here() -> Any:
        async with naming_steps(options.checkpoint):
            return await export(
                options.checkpoint,
                options.out,
                format=options.to,
                include=prefix or None,
                rename={prefix: ""} if prefix else None,
                dtype=_dtype(options.dtype),
                tied=dict(options.tied),
                shard_nbytes=int(options.shard_gb * 1e9),
                bar=shown,
            )

    with bar("exporting") as shown:
        result = _run(export_here())

    def text() -> str:
        more = f"\nskipped, since they are not tensors: {', '.join(result.left_out)}" if result.left_out else ""
        return "\n".join(result.files) + f"\n{result.tensors} tensors" + more

    _print(options, dataclasses.asdict(result), text)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from ..reader.export import convert
    from .reading import naming_steps

    async def convert_here() -> str:
        async with naming_steps(options.checkpoint):
            return await convert(options.checkpoint, options.out, dtype=_dtype(options.dtype))

    where = _run(convert_here())
    _print(options, {"checkpoint_id": where}, lambda: where)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    path = write_report(options.root, options.out)
    _print(options, {"file": path}, lambda: path)
    return 0


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    import anyio

    async def wait() -> T:
        return await coroutine

    return anyio.run(wait)


def _dtype(name: str | None) -> Any:
    import torch

    found = getattr(torch, name, None) if name else None
    if name and not isinstance(found, torch.dtype):
        raise ArgumentError("dtype", f"{name} is no dtype of torch: bfloat16 is one")
    return found


def _bench(options: argparse.Namespace) -> int:
    # What is measured with is removed on the way out, also when a scheduler ends the job.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _measure(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(options: argparse.Namespace) -> int:
    is_store = "://" in options.directory and not options.directory.startswith("file:")
    if not options.plan and not is_store and not os.path.isdir(options.directory):
        raise ArgumentError("directory", f"{options.directory} is not a directory: create it first")
    if options.plan:
        from .bench import planning

        planning.run(options.plan, as_json=options.json)
    elif options.many:
        from .bench import many

        many.run(options.many, options.directory, repeat=options.repeat, as_json=options.json)
    elif is_store:
        from .bench import store

        store.run(
            options.directory, gib=options.gib, tensors=options.tensors, repeat=options.repeat, as_json=options.json
        )
    elif options.device != "cpu":
        from .bench import device

        shapes = device.make_shapes(options.gib, options.tensors)
        device.run(options.device, options.directory, shapes, repeat=options.repeat, as_json=options.json)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from .bench import ranks

        ranks.run(options.directory, gib=options.gib, repeat=options.repeat, as_json=options.json)
    else:
        from .bench import single

        single.run(
            options.directory, gib=options.gib, tensors=options.tensors, repeat=options.repeat, as_json=options.json
        )
    return 0


def _print(options: argparse.Namespace, data: Any, text: Any) -> None:
    print(json.dumps(_in_json(data), indent=2) if options.json else printable(text()))


def _in_json(value: Any) -> Any:
    """Return the value with null for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _in_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_json(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _pair(text: str) -> tuple[str, str]:
    name, equals, other = text.partition("=")
    if not (name and equals and other):
        raise argparse.ArgumentTypeError(f"must look like lm_head.weight=model.embed_tokens.weight, got {text}")
    return name, other


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _best(text: str) -> tuple[str, str] | tuple[str, str, int]:
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    if not metric or mode not in ("min", "max") or (count and not count.isdecimal()):
        raise argparse.ArgumentTypeError(f"must look like loss:min or accuracy:max:3, got {text}")
    return (metric, mode, int(count)) if count else (metric, mode)
