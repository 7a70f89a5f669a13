"""The page: what `report` knows as HTML, with its style and its pictures in it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from ..text_tables import duration, number, plural, printable, size
from .charts import bar_chart, retention_strip, timeline_chart
from .runs import CALLER, Runs, Save

SHOWN_BARS = 200  # saves in a chart, the last ones
SHOWN_TIMELINES = 6
SHOWN_ROWS = 500  # of a table

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #66707a; --line: #dfe3e6;
  --engine: #2f6fb2; --caller: #d9822b; --steps: #a9b3bc; --bad: #c0392b; --good: #2e8b57; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #98a2ac;
  --line: #32383e; --engine: #6aa5e3; --caller: #eba55c; --steps: #5c6771; --bad: #ef7b6f; --good: #6cc796; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 23px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 4px; }
h3 { font-size: 14px; margin: 14px 0 2px; font-weight: 600; }
p { margin: 2px 0 10px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); gap: 10px; margin-top: 18px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 19px; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.bad b { color: var(--bad); }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .value { fill: var(--ink); }
svg .inside { fill: var(--ink); } svg .axis { stroke: var(--line); }
svg .median { stroke: var(--soft); stroke-dasharray: 3 4; }
.engine { fill: var(--engine); } .caller { fill: var(--caller); } .steps { fill: var(--steps); }
.bad { fill: var(--bad); }
.kept { fill: var(--good); } .gone { fill: none; stroke: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px 0 14px; }
.legend i:first-child { margin-left: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; } td, th { padding: 4px 14px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
.right { text-align: right; } td.bad { color: var(--bad); overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def page_of(root: str, rows: Sequence[Mapping[str, Any]], runs: Runs, *, now: float) -> str:
    """Return the page.

    Args:
        root: what it is about, as people call it.
        rows: its steps, as `aiodcp ls` lists them.
        runs: what is known of how they came about.
        now: in seconds since the epoch.
    """
    title = f"Checkpoints of {_text(root)}"
    sections = [
        f"<h1>{title}</h1><p>{_when(now)}, by <code>aiodcp report</code></p>",
        _tiles(rows, runs, now),
        _charts(runs),
        _timelines(runs),
        _retention(rows, runs),
        _troubles(runs),
        _steps(rows, now),
        _saves(runs),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def _text(text: object) -> str:
    return escape(printable(str(text), keep=""))


def _when(at: float | None) -> str:
    return "?" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.3g} MB/s"


def _tiles(rows: Sequence[Mapping[str, Any]], runs: Runs, now: float) -> str:
    good = [save for save in runs.saves if not save.failure]
    failed = len(runs.saves) - len(good)
    dates = [row["saved_at"] for row in rows if row["saved_at"] is not None]
    tiles = [
        (str(sum(row["complete"] for row in rows)), f"steps kept, {size(sum(row['nbytes'] for row in rows))}", ""),
        (duration(now - max(dates)) if dates else "none", "since the last commit" if dates else "committed", ""),
    ]
    if runs.saves:
        tiles += [
            (str(len(good)), f"saves in {plural(runs.count, 'run')}", ""),
            (str(failed), "failed" + (f", {runs.skipped} skipped" if runs.skipped else ""), "bad" if failed else ""),
        ]
    if good:
        stalls = [save.stall_s for save in good]
        tiles += [
            (_ms(median(stalls)), f"training held up, median; {_ms(max(stalls))} at most", ""),
            (_ms(median(save.durable_s for save in good)), "until durable, median", ""),
            (_rate(median(save.bytes_per_s for save in good)), "median", ""),
        ]
    cells = (
        f'<div class="tile {kind}"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small, kind in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _charts(runs: Runs) -> str:
    saves = runs.saves[-SHOWN_BARS:]
    if not saves:
        return (
            "<h2>Saves</h2><p>No history is kept below this root: a <code>CheckpointManager</code> keeps one, "
            "unless it is made with <code>history=False</code>.</p>"
        )
    charts = [
        ("Training held up", "caller", [1000 * save.stall_s for save in saves], "ms"),
        ("Until durable", "engine", [1000 * save.durable_s for save in saves], "ms"),
        ("Throughput", "engine", [save.bytes_per_s / 1e9 for save in saves], "GB/s"),
    ]
    names = [f"step {save.step}" + (f": {save.failure}" if save.failure else "") for save in saves]
    failed = [bool(save.failure) for save in saves]
    drawn = "".join(
        f"<h3>{title}</h3>{bar_chart(values, names, failed, kind=kind, unit=unit)}"
        for title, kind, values, unit in charts
    )
    which = f"The last {len(saves)} of {len(runs.saves)} saves" if len(saves) < len(runs.saves) else "Each save"
    return (
        f"<h2>Saves</h2><p>{which}, from left to right; the dashed line is the median, red has failed.</p>"
        f'<div class="card">{drawn}</div>'
    )


def _timelines(runs: Runs) -> str:
    saves = [save for save in runs.saves if save.spans][-SHOWN_TIMELINES:]
    if not saves:
        return ""
    drawn = "".join(f"<h3>{_headline(save)}</h3>{timeline_chart(save)}" for save in reversed(saves))
    legend = (
        '<p class="legend"><i style="background:var(--steps)"></i>steps of training, under '
        '<code>checkpointer.step(n)</code><i style="background:var(--caller)"></i>training is held up'
        '<i style="background:var(--engine)"></i>in the background</p>'
    )
    return f'<h2>The last saves, phase by phase</h2>{legend}<div class="card">{drawn}</div>'


def _headline(save: Save) -> str:
    what = f"failed: {save.failure}" if save.failure else f"{size(save.nbytes)}, {_rate(save.bytes_per_s)}"
    return _text(
        f"step {save.step}, {_when(save.began)}: held up {_ms(save.stall_s)}, {_ms(save.durable_s)} in all, {what}"
    )


def _retention(rows: Sequence[Mapping[str, Any]], runs: Runs) -> str:
    there = {int(row["step"]) for row in rows if row["complete"]}
    failed = {save.step for save in runs.saves if save.failure} - there
    gone = ({save.step for save in runs.saves} | runs.removed) - there - failed
    if not (gone or failed):
        return ""
    strip = retention_strip(there=there, gone=gone, failed=failed)
    text = f"{plural(len(there), 'step')} kept (filled), {len(gone)} removed (hollow), {len(failed)} never there (red)."
    return f'<h2>Retention</h2><p>{text}</p><div class="card">{strip}</div>'


def _troubles(runs: Runs) -> str:
    if not runs.troubles:
        return ""
    rows = [
        [_when(at), str(step) if step >= 0 else "", what] for at, step, what in reversed(runs.troubles[-SHOWN_ROWS:])
    ]
    return f'<h2>What went wrong</h2><div class="card scroll">{_table(["when", ">step", "what"], rows, bad=2)}</div>'


def _steps(rows: Sequence[Mapping[str, Any]], now: float) -> str:
    cells = []
    for row in rows[::-1][:SHOWN_ROWS]:
        metrics = row["problem"] or ", ".join(f"{name} {number(value)}" for name, value in row["metrics"].items())
        age = "" if row["saved_at"] is None else duration(now - row["saved_at"])
        when = _when(row["saved_at"]) if row["complete"] else "incomplete"
        cells.append([str(row["step"]), when, age, size(row["nbytes"]), str(row["files"]), metrics])
    if not cells:
        return "<h2>Steps</h2><p>There are none.</p>"
    table = _table([">step", "saved", ">age", ">size", ">files", "metrics"], cells)
    return f'<h2>Steps</h2><div class="card scroll">{table}</div>'


def _saves(runs: Runs) -> str:
    if not runs.saves:
        return ""
    phases = list(dict.fromkeys(name for save in runs.saves for name, _, _ in save.spans if name not in CALLER))
    rows = []
    for save in reversed(runs.saves[-SHOWN_ROWS:]):
        spent = {name: sum(stop - start for each, start, stop in save.spans if each == name) for name in phases}
        times = [_ms(save.stall_s), _ms(save.durable_s), *(_ms(spent[name]) if spent[name] else "" for name in phases)]
        rows.append([str(save.step), _when(save.began), size(save.nbytes), *times, save.failure])
    titles = [">step", "asked for", ">size", ">held up", ">durable", *(f">{name}" for name in phases), "failure"]
    table = _table(titles, rows, bad=len(titles) - 1)
    return f"<h2>All saves</h2><details><summary>{plural(len(rows), 'save')}</summary>" + (
        f'<div class="card scroll">{table}</div></details>'
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, bad: int | None = None) -> str:
    """Return rows as a table; a title that begins with ">" is flush right, and column `bad` is in red."""
    kinds = ["right" if title.startswith(">") else "" for title in titles]
    if bad is not None:
        kinds[bad] = "bad"
    head = "".join(
        f'<th class="{kind}">{_text(title.lstrip(">"))}</th>' for title, kind in zip(titles, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{_text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
