"""`aiodcp report`: one page about a root."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodcp import CheckpointManager, SaveError
from aiodcp._cli.main import main
from aiodcp._cli.report.charts import bar_chart, retention_strip, timeline_chart
from aiodcp._cli.report.runs import Save, runs_of

VOID = {"meta", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects text and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID or (tag == "rect" or tag == "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] == "meta":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def report(root: Path, *arguments: str) -> Page:
    out = root.parent / "page.html"
    main(["report", str(root), "--out", str(out), *arguments])
    html = out.read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script|<link|https?://", html), "it needs the network"
    return Page(html)


def test_it_shows_what_was_saved_kept_and_removed_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, state = tmp_path / "run <&>", {"w": torch.zeros(1 << 18)}
    with CheckpointManager(root, keep_last=2, on_error="warn") as manager:
        for step in range(1, 5):
            with manager.checkpointer.step(step):
                manager.save_sync(step, state, metrics={"loss": 0.5}).uploaded.wait()
        (root / "step-9").write_text("")
        with pytest.raises(SaveError):
            manager.save_sync(9, state).uploaded.wait()
    page = report(root)
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert f"Checkpoints of {root}" in page.text
    assert "2 steps kept (filled), 2 removed (hollow), 1 never there (red)." in page.text
    for words in ("What went wrong", "save failed", "Training held up", "step 4, ", "commit", "loss 0.5", "5 saves"):
        assert words in page.text, words
    assert page.tags.count("svg") == 3 + 5 + 1
    (root / ".aiodcp" / "history-2.jsonl").write_text(
        json.dumps({"event": "SaveSkipped", "at": time.time(), "step": 3})
    )
    assert "failed, 1 skipped" in report(root).text


def test_where_there_is_no_history_it_shows_the_steps(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with CheckpointManager(root, history=False) as manager:
        manager.save_sync(3, {"w": torch.zeros(3)}, metrics={"<b>": 1.5}).uploaded.wait()
    page = report(root)
    assert "No history is kept below this root" in page.text
    assert "<b> 1.5" in page.text
    (tmp_path / "empty").mkdir()
    assert "There are none." in report(tmp_path / "empty").text


def test_errors_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    for arguments, text in (
        (["report", str(tmp_path / "nowhere")], "nowhere is not a directory"),
        (["report", str(tmp_path / "run"), "--out", str(tmp_path / "no" / "page.html")], "cannot write"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert text in capsys.readouterr().err


def test_a_history_with_anything_in_it_is_drawn() -> None:
    def event(**facts: Any) -> dict[str, Any]:
        return {"event": "SaveFinished", "at": 10.0, "run": 0, "step": 1, **facts}

    runs = runs_of([event(), event(began=10.0, spans=[]), event(began=8.0, nbytes=0, spans=[["stage", 0.0, 0.0]])])
    assert [save.seconds for save in runs.saves] == [0.0, 0.0, 2.0]
    for save in runs.saves[2:]:
        Page(timeline_chart(save))
    Page(bar_chart([0.0], ["<"], [True], kind="engine", unit="ms"))
    Page(bar_chart([0.0] * 1000, ["x"] * 1000, [False] * 1000, kind="engine", unit="ms"))
    Page(retention_strip(there={1}, gone=set(), failed=set()))
    spans = [("wait", 0.0, 3.0), ("capture", 3.0, 3.5), ("write", 4.0, 13.0)]
    save = Save(step=1, began=0.0, seconds=13.0, nbytes=10**9, spans=spans, steps=[("step 1", 3, 5)], failure="")
    assert (save.stall_s, save.durable_s, save.bytes_per_s) == (3.5, 10.0, 1e8)
    assert "step 1" in Page(timeline_chart(save)).text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_shows_it_within_the_width_of_its_window(width: int, tmp_path: Path) -> None:
    root = tmp_path / "run"
    with CheckpointManager(root) as manager:
        for step in range(1, 4):
            manager.save_sync(step, {"w": torch.zeros(1 << 18)}, metrics={"loss": 0.5}).uploaded.wait()
    report(root)
    page = tmp_path / "page.html"
    probe = "<script>document.title = `${document.documentElement.scrollWidth} of ${window.innerWidth}`</script>"
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}/data", f"--window-size={width},800", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    [(content, window)] = re.findall(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert int(content) <= int(window)
