"""Fine-tune GPT-2, or train it from scratch: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wikift.commands.main import run
from wikift.commands.train import main

if __name__ == "__main__":
    run(main)
