"""Texts on which tokenizers and the cutting of rows are tried."""

from hypothesis import strategies as st

# fmt: off
FRAGMENTS = st.sampled_from([
    *"abzAZ019 '.,!-\n\t\r", "  ", "   ", "'s", "'ll", "'re", "n't", "é", "ß", "ǅ", "ʰ", "\u0301", "漢", "。", "か",
    "한",
    "\u0627", "\u0640", "м", "😀", "\u200d", "\u00a0", "\u2003", "\u3000", "\x85", "\x1c", "\x0b", "\u2028", "½", "٣",
    "<|endoftext|>", "<|end", "oftext|>", "|>", "<",
])
# fmt: on
TEXTS = st.lists(FRAGMENTS | st.text(max_size=2), max_size=60).map("".join)
