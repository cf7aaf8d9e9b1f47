"""Make a Hugging Face directory of a checkpoint. `--help` tells the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wikift.commands.consolidate import main
from wikift.commands.main import run

if __name__ == "__main__":
    run(main)
