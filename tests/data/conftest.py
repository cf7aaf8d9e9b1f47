"""The tokenizers that the tests of data share."""

import pytest

from tests.real import GPT2_TOKENIZER
from wikift.data import tokenizer
from wikift.data.fast_encode import HOSTILE


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.SavedTokenizer:
    """A trained BPE with merges over all that the tests throw at it."""
    line = "the cat's don't we'll  three   spaces a1 b2, (x) the then there\n"
    texts = [line * 20, *HOSTILE * 3, "aaaa" * 9, "=" * 40]
    return tokenizer.train(texts, 420, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.SavedTokenizer:
    return tokenizer.load_tokenizer(str(GPT2_TOKENIZER), tmp_path_factory.mktemp("gpt2"))
