"""Let a trained model go on from a prompt; interactive without one. `--help` tells the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wikift.commands.generate import main
from wikift.commands.main import run

if __name__ == "__main__":
    run(main)
