"""Names that settings, data and cards share."""

# Bytes to download (the dataset's card) and GPT-2's tokens in the train split: 117,920,140 of wikitext-103-raw-v1 are
# known (flash-attention's tests), the others come from the words and the validation split's tokens per word
WIKITEXT = {
    "wikitext-2-v1": (7_371_282, 2_482_000),
    "wikitext-2-raw-v1": (7_747_362, 2_386_000),
    "wikitext-103-v1": (313_093_838, 122_680_000),
    "wikitext-103-raw-v1": (315_466_397, 117_920_140),
}
TRACKERS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}  # by the name of their library
CUT_SEED = 42  # of the validation cut; runs with other seeds are measured on the same validation text
EXPORT_RECORD = "wikift.json"  # in the folder that `consolidate` makes, what it tells of it
