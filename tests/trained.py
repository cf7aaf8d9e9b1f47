"""A run trained in a second on real sentences with a tokenizer of its own: what export, evaluate and generate read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import arguments
from wikift.data.store import Encoded, TokenStore, write_store
from wikift.data.tokenizer import train

SENTENCES = (
    "The Renaissance was a period of European history .\n",
    "Theodor W. Hänsch shared the Nobel Prize in Physics with John L. Hall .\n",
    "Maria Skłodowska was born in Warsaw ; she studied in Paris .\n",
    "The theory of relativity describes space and time — and gravity .\n",
    "\n",
    "Steam engines drove the Industrial Revolution … in Great Britain .\n",
    "東京 and 🜚 are outside of the alphabet .\n",
)


def text_store(folder: Path, *, vocabulary: int = 320, repeat: int = 6) -> TokenStore:
    """A store of SENTENCES with a byte-level BPE trained on them: splits train, validation and test."""
    from tokenizers import Tokenizer

    saved = train(SENTENCES, vocabulary, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(saved.file))

    def part(rows: tuple[str, ...]) -> list[Encoded]:
        ids = [i for row in rows for i in tokenizer.encode(row, add_special_tokens=False).ids]
        words = sum(len(row.split()) + 1 for row in rows)
        return [Encoded(np.array(ids, np.uint16), len(rows), words, sum(len(row.encode()) for row in rows))]

    splits = {"train": part(SENTENCES * repeat), "validation": part(SENTENCES), "test": part(SENTENCES[:3])}
    return write_store(
        folder,
        splits,
        vocab_size=saved.vocab_size,
        eos_token_id=saved.eos_token_id,
        tokenizer_fingerprint=saved.fingerprint,
        record={"dataset": "sentences.txt", "revision": "1", "tokenizer": {"name": saved.name}},
    )


def trained_run(folder: Path, store: Path, **settings: Any) -> Path:
    """A run of wikift train in this process: 12 steps, checkpoints at 4, 8 and 12, positions for 32 tokens."""
    from wikift.commands.train import main

    shape = "n_layer=2,n_head=2,n_embd=32,n_positions=32"
    words = {"config_overrides": shape, "block_size": 16, "save_total_limit": 9, **settings}
    assert main(arguments(store, folder, **words)) == 0
    return folder
