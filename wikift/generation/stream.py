"""Tokens to text that can be printed at once, in whole characters and up to a stop string.

A byte-level token may end inside a character, so what is decoded from the tokens so far can end in U+FFFD. That one is
held back until the character is complete, and so is the beginning of a stop string; all before it can no longer change.
Cost: the text is decoded again for every token, 1 ms at 1,024 tokens, against 10 to 100 ms for the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The complete characters of `ids`, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removesuffix("\N{REPLACEMENT CHARACTER}")


class Stream:
    """Tokens to text; `write` gets complete characters as soon as no token and no stop string can change them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.write, self.stop = tokenizer, write, stop
        self.ids: list[int] = []
        self.text = ""  # what was written
        self.stopped = False

    def take(self, token: int, *, show: bool = True) -> None:
        """The next token. Without `show` the text waits for `finish`, which saves decoding it at each token."""
        self.ids.append(token)
        if show:
            self._show(final=False)

    def finish(self) -> str:
        """Write what was held back for a stop string that did not come; returns the text."""
        self._show(final=True)
        return self.text

    def _show(self, *, final: bool) -> None:
        if self.stopped:
            return
        text = decode(self.tokenizer, self.ids)
        starts = [text.find(stop) for stop in self.stop if stop in text]
        if starts:
            self.stopped, text = True, text[: min(starts)]
        elif not final:
            text = text[: len(text) - max((_begun(text, stop) for stop in self.stop), default=0)]
        self.write(text[len(self.text) :])
        self.text = text


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
