"""Perplexity and bits per byte of models on a token store. `--help` tells the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wikift.commands.evaluate import main
from wikift.commands.main import run

if __name__ == "__main__":
    run(main)
