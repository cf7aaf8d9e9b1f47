"""Texts on which tokenizers and the cutting of rows are tried."""

from hypothesis import strategies as st

# fmt: off
HANDPICKED = [
    "", " ", "\n", "\r\n", "\t \u00a0 ", "don't DON'T we've 'tis '' 's'", "a  b   c    ", " a", "a ",
    "\u200b\u200d\ufeff", "e\u0301\u0301\u0301", "👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x01\x7f\x85\xa0", "<|endoftext|>",
    "a<|endoftext|> b", "<|endoftext|", "मनीष नमस्ते", "สวัสดีครับ", "שלום עולם", "العربية ـــ", "漢字かな交じり文。テスト",
    "\U0001d518\U0001d52b\U0001d526 \U00010380", "½ Ⅷ ٣ \u09ea 1,234.5", "\u2028\u2029\x1c\x1d", "ﷺ" * 5,
    "A\u030a Å \u212b",
    "\U0010ffff\ue000\ufdd0", "a\u00adb", "@-@ , . = = = <unk>", "=" * 50, " " * 50 + "x", "😀" * 20,
]
FRAGMENTS = st.sampled_from([
    *"abzAZ019 '.,!-\n\t\r", "  ", "   ", "'s", "'ll", "'re", "n't", "é", "ß", "ǅ", "ʰ", "\u0301", "漢", "。", "か",
    "한",
    "\u0627", "\u0640", "м", "😀", "\u200d", "\u00a0", "\u2003", "\u3000", "\x85", "\x1c", "\x0b", "\u2028", "½", "٣",
    "<|endoftext|>", "<|end", "oftext|>", "|>", "<",
])
# fmt: on
TEXTS = st.lists(FRAGMENTS | st.text(max_size=2), max_size=60).map("".join)
