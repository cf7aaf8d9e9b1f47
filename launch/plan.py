"""`wikift plan` from a checkout, and for launchers that take a script: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wikift.commands.main import main, run

if __name__ == "__main__":
    run(main, ["plan", *sys.argv[1:]])
