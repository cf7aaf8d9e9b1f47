"""Where the real test data is, and the mark that skips a test, saying so, where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("WIKIFT_TEST_DATA", ROOT.parent / "shared" / "data"))
GPT2_TOKENIZER = DATA / "gpt2-tokenizer"
WIKITEXT_MIRROR = DATA / "wikitext-mirror"

needs_data = pytest.mark.skipif(
    not (GPT2_TOKENIZER.is_dir() and WIKITEXT_MIRROR.is_dir()),
    reason=f"no test data at {DATA} (gpt2-tokenizer, wikitext-mirror); set WIKIFT_TEST_DATA",
)


def validation_rows() -> list[str]:
    """The 3,760 rows of WikiText's validation split."""
    import pyarrow.parquet

    (file,) = (WIKITEXT_MIRROR / "wikitext-103-v1").glob("validation-*.parquet")
    rows: list[str] = pyarrow.parquet.read_table(file)["text"].to_pylist()
    return rows
