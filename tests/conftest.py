"""Settings of the whole suite."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores; threads that wait for a core spin
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Started in the background of a shell the suite ignores SIGINT, and every process that a test starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
