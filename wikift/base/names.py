"""Names that settings, data and cards share."""

WIKITEXT = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
TRACKERS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}  # by the name of their library
CUT_SEED = 42  # of the validation cut; runs with other seeds are measured on the same validation text
EXPORT_RECORD = "wikift.json"  # in the folder that `consolidate` makes, what it tells of it
