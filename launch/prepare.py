"""Text to a token store: see `python launch/prepare.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wikift.commands.main import run
from wikift.commands.prepare import main

if __name__ == "__main__":
    run(main)
