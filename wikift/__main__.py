"""`python -m wikift COMMAND ...`, also below `torchrun -m`."""

from wikift.commands.main import start

if __name__ == "__main__":
    start()
