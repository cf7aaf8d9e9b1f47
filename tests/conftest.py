"""Settings of the whole suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
