"""wikift report: one file that needs nothing else, with all that a run recorded; looked at by a browser.

pytest tests/watch/test_report.py
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.trained import text_store, trained_run
from wikift.base.errors import UserError
from wikift.commands.main import main

HOSTILE = "</script><script>document.title = 'taken'</script><b>&amp;"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with samples, the first evaluated, with an event and a text that would end the page's script."""
    folder = tmp_path_factory.mktemp("runs")
    store, prompts = text_store(folder / "store"), folder / "prompts.txt"
    prompts.write_text(f"The Renaissance\n{HOSTILE}\n")
    for name, settings in (("one", {"sample_prompts": prompts, "sample_steps": 4}), ("two", {"learning_rate": 0.005})):
        trained_run(folder / name, store.path, **settings)
    assert main(["evaluate", str(folder / "one"), "--split", "test", "--device", "cpu", "--quiet"]) == 0
    with open(folder / "one" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "event": "loss spike", "message": HOSTILE + "\ud800", "loss": 9.5}) + "\n")
    return folder


def written(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["report", *map(str, words)]) == 0
    out = re.fullmatch("report: (.*)\n", capsys.readouterr().out)
    assert out is not None
    return Path(out[1]).read_text(encoding="utf-8")


def test_the_page_has_what_the_run_recorded_and_no_address(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(capsys, runs / "one")
    text = html.unescape(re.sub("<[^>]*>", " ", page))
    (score,) = [json.loads(line) for line in (runs / "one" / "evaluations.jsonl").read_text().splitlines()][:1]
    environment = json.loads((runs / "one" / "config.json").read_text())["environment"]
    perplexity = f"{score['perplexity']:.6g}"
    for fact in ("12 of 12", "finished", perplexity, "loss spike", HOSTILE, "wikift train --from-scratch"):
        assert fact in text or fact in html.unescape(page), fact
    assert (environment["engine"], environment["precision"]) == ("single", "fp32")
    assert environment["torch"] in text
    assert HOSTILE not in page
    assert "config_overrides" in text
    assert not re.search(r"<link|\bsrc=|@import|url\(", page), "something of the network"
    data = json.loads(re.search('id="data">(.*)</script>', page)[1])  # type: ignore[index]
    assert data["runs"][0]["columns"]["step"] == list(range(1, 13))
    assert data["runs"][0]["events"] == [7]


def test_several_runs_show_what_differs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    page = written(capsys, runs / "one", runs / "two")
    assert (tmp_path / "report.html").is_file()
    assert re.search("learning_rate.*<td>0.01</td><td>0.005</td>", page)
    assert main(["report", str(runs / "one"), str(runs / "two"), "--text"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^learning_rate \(schedule\) +0\.01 +0\.005$", text, re.MULTILINE)
    assert "global_batch_size" not in text


def test_a_long_run_is_thinned_and_keeps_its_spikes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "two", tmp_path / "long", ignore=shutil.ignore_patterns("checkpoints"))
    rows = [{"step": step, "loss": 1.0 + step % 7 / 100, "grad_norm": 1.0} for step in range(1, 200_001)]
    rows[77_776]["loss"], rows[100_000]["eval_loss"] = 9.25, 2.125
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = written(capsys, tmp_path / "long")
    assert len(page) < 5e6
    data = json.loads(re.search('id="data">(.*)</script>', page)[1])["runs"][0]["columns"]  # type: ignore[index]
    assert (data["step"][0], data["step"][-1]) == (1, 200_000)
    assert 10_000 < len(data["step"]) < 26_000
    assert {9.25} < set(data["loss"])
    assert 2.125 in data["eval_loss"]


def test_what_is_no_run_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        main(["report", str(tmp_path), "nothing", "--text", "--out", "a.html"])
    assert len(caught.value.problems) == 3


# Run in the page after all else: zoom, cursor, smoothing and what is hidden, by keys and clicks as by a person.
PROBE = """<script>
setTimeout(() => {
  const figures = document.querySelectorAll("figure"), seen = {};
  const span = () => charts.map((chart) => chart.scales.x.max - chart.scales.x.min);
  const press = (key) => figures[0].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const later = (work) => new Promise((done) => setTimeout(() => done(work()), 50));
  (async () => {
    seen.title = document.title;
    seen.charts = charts.length;
    seen.wide = document.documentElement.scrollWidth - innerWidth;
    seen.all = await later(span);
    press("+");
    seen.zoomed = await later(span);
    press("0");
    seen.reset = await later(span);
    press("ArrowRight"); press("ArrowRight");
    seen.read = await later(() => figures[0].querySelector(".u-legend").innerText);
    document.querySelector("[data-zoom='0.5']").click();
    seen.clicked = await later(span);
    smooth.value = 0.5; smooth.oninput();
    seen.raw = document.querySelectorAll(".u-legend .raw").length;
    axis.value = "epoch"; axis.onchange();
    seen.epochs = await later(span);
    const usable = [...document.querySelectorAll("button, select, input, figure")];
    seen.focusable = usable.every((item) => item.tabIndex === 0);
    seen.page = getComputedStyle(document.body).backgroundColor;
    document.title = "PROBE" + JSON.stringify(seen);
  })();
}, 200);
</script>"""


def browser() -> str:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    return program or pytest.skip(f"needs a browser: {', '.join(BROWSERS)} (Debian: chromium-headless-shell)")


def test_a_picture_is_made_by_a_browser_that_is_there(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["report", str(runs / "two"), "--png", "--out", str(tmp_path / "two.html")]
    browser()
    assert main(words) == 0
    picture = (tmp_path / "two.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert (int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")) == (1000, 1400)
    assert len(picture) > 20_000, "an empty page"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--png: needs one of .*apt install chromium-headless-shell"):
        main(words)


@pytest.mark.parametrize(("width", "dark"), [(390, 0), (1280, 1)])
def test_a_browser_draws_it_without_a_complaint(
    runs: Path, tmp_path: Path, width: int, dark: int, capsys: pytest.CaptureFixture[str]
) -> None:
    program, page = browser(), written(capsys, runs / "one", runs / "two", "--out", tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    fixed = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    fixed += f" --window-size={width},900 --blink-settings=preferredColorScheme={1 - dark}"
    line = [program, *fixed.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert not re.findall(":CONSOLE.*", done.stderr)
    title = re.search("<title>PROBE(.*)</title>", done.stdout)
    assert title is not None, done.stdout[-2000:] + done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert seen["title"] == "2 runs"
    assert seen["charts"] == 6
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert seen["all"] == [11.0] * 6
    assert seen["zoomed"] == seen["clicked"] == [5.5] * 6
    assert seen["reset"] == seen["all"]
    assert re.search(r"one, training:?\s*\d\.\d+", seen["read"])
    assert seen["raw"] == 6
    assert seen["epochs"] != seen["all"]
    assert seen["focusable"]
    assert seen["page"] == ("rgb(18, 22, 31)" if dark else "rgb(255, 255, 255)")
