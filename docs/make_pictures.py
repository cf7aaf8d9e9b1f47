"""docs/screen.svg and docs/report.png: the live screen and the report of one run of `make demo`, in a tmux of its own.

python docs/make_pictures.py
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

DOCS, DEMO = Path(__file__).resolve().parent, Path("demo/pictures")
COLUMNS, LINES, STEP, SECONDS = 100, 20, 250, 900  # the screen is taken after that step
FONTS = re.compile(r"@font-face \{\{.*?\}\}", re.DOTALL)  # of the network


def tmux(*words: str) -> str:
    return subprocess.run(
        ["tmux", "-L", "wikift-pictures", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists() or text not in path.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, f"{path}: no {text} in {SECONDS} s"
        time.sleep(0.2)


def main() -> None:
    shutil.rmtree(DEMO, ignore_errors=True)
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), *sys.argv[1:] or ["make", "demo", f"DEMO={DEMO}"])
    wait_for(DEMO / "run" / "metrics.jsonl", f'"step": {STEP}')
    screen = tmux("capture-pane", "-ep")
    wait_for(DEMO / "run" / "report.html", "</html>")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen))
    console.save_svg(str(DOCS / "screen.svg"), title="wikift train", code_format=FONTS.sub("", CONSOLE_SVG_FORMAT))
    subprocess.run([sys.executable, "-m", "wikift", "report", DEMO / "run", "--png"], check=True)
    shutil.copyfile(DEMO / "run" / "report.png", DOCS / "report.png")


if __name__ == "__main__":
    main()
