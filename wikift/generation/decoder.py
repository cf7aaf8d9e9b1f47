"""GPT-2 token by token: its own forward over a static KV cache, for one row or a batch padded on the left.

One token of one row is bound by reading the weights, so they are read as fast as the memory gives them (layers.py).
The rest is what the library's loop does besides: masks, cache objects, logits processors, 5 ms a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from wikift.kernels.attention import causal_mask
from wikift.kernels.few_rows import PIECES, layer_of, matmul, relayout_head

_GUESSES = 2  # tokens read beside one; three rows cost 1.6 times one on two cores, five 2.7 times
_MOST_DOUBT = 5  # after so many wrong guesses in a row 32 tokens are waited for before the next
_COMPILED_STEP = 256  # columns: a compiled step is made once for each multiple of it, not for every length

# attend(layer, query, key, value), each (rows, heads, length, head width) -> the values attended to, in query's shape
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """A model and the rows it is writing. `begin` with texts, then `advance` by one token a row, again and again.

    The text of a row that has come to the model's `positions` slides: its last half is read anew and written on.
    `windows[row]` are the tokens that the row's next one depends on, `slides[row]` how often it slid; up to `guesses`
    tokens are read ahead, with the same logits to rounding.
    """

    def __init__(self, model: GPT2LMHeadModel, *, relayout: bool = False, compile: bool = False) -> None:
        config = model.config
        self.heads, self.width = config.n_head, config.n_embd
        self.positions: int = config.n_positions
        self.device, self.dtype = model.device, model.dtype
        self.wte, self.wpe, self.ln_f = model.transformer.wte, model.transformer.wpe, model.transformer.ln_f
        if relayout and model.device.type == "cpu":
            relayout_head(model)
        self.head = model.lm_head.weight.detach().t()  # (width, vocabulary)
        self.blocks = [layer_of(model, number) for number in range(config.n_layer)]
        self.compiled = compile
        on_mkl = model.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkl.is_available()
        # other libraries take a batch's products one by one, and inductor takes them apart: 58 ms a token for 36
        self.pieces = PIECES if on_mkl and not compile and torch.get_num_threads() > 1 else 1
        self._step: Callable[..., Tensor] = self._one_token
        if compile:
            # CUDA graphs replay a step without its 200 launches; on a CPU the element-wise work is fused
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self._step = torch.compile(self._one_token, mode=mode)  # type: ignore[call-overload,unused-ignore]
        self._keep_in_place(self.head, *(part for block in self.blocks for part in block if isinstance(part, Tensor)))
        self.keys, self.values = list[Tensor](), list[Tensor]()  # of each layer, (rows, heads, columns, head width)
        self.windows, self.slides = list[list[int]](), list[int]()
        self.guesses = 0 if compile or model.device.type != "cpu" else _GUESSES
        self._ahead: list[tuple[int, Tensor]] = []  # tokens that may follow, and the logits after each
        self._doubt = self._wait = 0

    def begin(self, windows: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Read one text a row, each of 1 to `positions` tokens; gives the logits (rows, vocabulary) of what follows.

        Memory: 2 * layers * width values for each of rows * min(positions, longest text + `new_tokens`).
        """
        self.windows, self.slides = [list(window) for window in windows], [0] * len(windows)
        self._ahead, self._doubt, self._wait = [], 0, 0
        rows, self.used = len(windows), max(len(window) for window in windows)
        columns = min(self.positions, self.used + new_tokens)
        if self.compiled:
            columns = min(self.positions, -(-columns // _COMPILED_STEP) * _COMPILED_STEP)
        shape = (rows, self.heads, columns, self.width // self.heads)
        if not self.keys or self.keys[0].shape != shape:  # else a CUDA graph goes on with what it knows
            # a tensor for each layer: of a part of one, torch.compile would write back the whole to change a column
            self.keys, self.values = (
                [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.blocks] for _ in range(2)
            )
            self._keep_in_place(*self.keys, *self.values)
        for part in (*self.keys, *self.values):
            part.zero_()
        return self._read(self.windows, range(rows))

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; gives the logits (rows, vocabulary) of the next."""
        for window, token in zip(self.windows, tokens, strict=True):
            window.append(token)
        full = [row for row, window in enumerate(self.windows) if len(window) > self.positions]
        for row in full:
            self.windows[row] = self.windows[row][-max(1, self.positions // 2) :]
            self.slides[row] += 1
        if self._ahead:
            guessed, logits = self._ahead.pop(0)
            if guessed == tokens[0]:
                self.used, self._doubt = self.used + 1, 0
                return logits
            self._ahead, self._doubt = [], min(self._doubt + 1, _MOST_DOUBT)
            self._wait = 2**self._doubt
        lengths = [len(window) for window in self.windows]
        if guesses := self._guesses():
            return self._with_guesses(guesses)
        if self.used == self._columns():  # only where a row slides can there be no column left
            self._shift(self.used + 1 - max(lengths))
        found = self._columns_step(tokens, lengths) if len(full) < len(lengths) else None
        self.used += 1
        if full:
            anew = [self._read([self.windows[row]], [row]) for row in full]
            found = torch.cat(anew) if found is None else found.index_copy(0, self._ids(full), torch.cat(anew))
        assert found is not None
        return found

    def _guesses(self) -> list[int]:
        """What followed when the last two tokens of the only row stood together before; none after wrong guesses."""
        if len(self.windows) != 1:
            return []
        self._wait -= 1
        window = self.windows[0]
        room = min(self.guesses, self.positions - len(window), self._columns() - self.used - 1)
        if self._wait >= 0 or room < 1:
            return []
        pair = window[-2:]
        earlier = (place for place in range(len(window) - 3, -1, -1) if window[place : place + 2] == pair)
        place = next(earlier, None)
        return [] if place is None else window[place + 2 : place + 2 + room]

    def _with_guesses(self, guesses: list[int]) -> Tensor:
        """The logits (1, vocabulary) after the row's last token; those after each guess, read with it, wait their turn.

        One token of one row waits for the weights to come from memory, and a few more come along at little cost: prompt
        lookup decoding (Saxena, 2023). A guess is never taken: it only answers sooner what follows if it is chosen.
        """
        window, used = self.windows[0], self.used
        count = 1 + len(guesses)
        places = torch.arange(len(window) - 1, len(window) - 1 + count)[None]
        columns = torch.arange(used + count)
        mask = (columns >= used + 1 - len(window)) & (columns <= torch.arange(used, used + count)[:, None])
        ids = self._ids([[window[-1], *guesses]])
        logits = self._forward(ids, places, self._attend_to_cache(used, mask, count), ends=count)
        self.used += 1
        self._ahead = [(guess, logits[n : n + 1]) for n, guess in enumerate(guesses, 1)]
        return logits[:1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._ahead = []
        self.windows, self.slides = [self.windows[row] for row in rows], [self.slides[row] for row in rows]
        self._shift(self.used - max(len(window) for window in self.windows), self._ids(rows))

    def alone(self, row: int) -> Tensor:
        """The logits (1, vocabulary) after a row's window read in one piece by itself: no neighbour tells in them."""
        return self._prefill([self.windows[row]], lambda layer, key, value: None)

    def _columns_step(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        """The logits after one more column: row r's text lies in its last `lengths[r]` columns."""
        used, ids = self.used, self._ids(tokens)[:, None]
        places = self._ids([length - 1 for length in lengths])[:, None]
        starts = self._ids([max(0, used + 1 - length) for length in lengths])[:, None]
        if self.compiled:
            columns = torch.arange(self._columns(), device=self.device)
            mask = ((columns >= starts) & (columns <= used))[:, None, None]
            return self._step(ids, places, self._ids([used]), mask).clone()
        padded = min(lengths) < used + 1
        mask_or_none = (torch.arange(used + 1, device=self.device) >= starts)[:, None, None] if padded else None
        return self._forward(ids, places, self._attend_to_cache(used, mask_or_none))

    def _attend_to_cache(self, used: int, mask: Tensor | None, count: int = 1) -> Attend:
        end = used + count

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, used:end] = key
            values[:, :, used:end] = value
            keys, values = keys[:, :, :end], values[:, :, :end]
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=self.blocks[layer].scale)

        return attend

    def _one_token(self, ids: Tensor, places: Tensor, column: Tensor, mask: Tensor) -> Tensor:
        """`_columns_step` in shapes that do not grow: over all columns, `column` (1,) written, `mask` for the rest."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys = self.keys[layer].index_copy_(2, column, key)
            values = self.values[layer].index_copy_(2, column, value)
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=self.blocks[layer].scale)

        return self._forward(ids, places, attend)

    def _read(self, windows: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Fill the cache of `rows` (all of them, or one) up to column `used` from their windows."""
        length = max(len(window) for window in windows)
        columns = slice(self.used - length, self.used)
        place = slice(rows[0], rows[-1] + 1)

        def store(layer: int, key: Tensor, value: Tensor) -> None:
            self.keys[layer][place, :, columns] = key
            self.values[layer][place, :, columns] = value

        return self._prefill(windows, store)

    def _prefill(self, windows: Sequence[Sequence[int]], store: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """The logits (rows, vocabulary) after windows padded on the left; `store` gets each layer's key and value."""
        length = max(len(window) for window in windows)
        padding = [length - len(window) for window in windows]
        ids = self._ids([[0] * pad + list(window) for pad, window in zip(padding, windows, strict=True)])
        columns = torch.arange(length, device=self.device)
        starts = self._ids(padding)[:, None]
        mask = causal_mask(columns >= starts) if any(padding) else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            store(layer, key, value)
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None and length > 1, scale=self.blocks[layer].scale
            )

        return self._forward(ids, (columns - starts).clamp(min=0), attend)

    def _forward(self, ids: Tensor, places: Tensor, attend: Attend, ends: int = 1) -> Tensor:
        """Logits (rows * ends, vocabulary) in fp32 after the last `ends` of `ids` (rows, length) at `places`."""
        rows, length = ids.shape
        product = partial(matmul, self.pieces)
        hidden = (self.wte(ids) + self.wpe(places)).view(rows * length, self.width)
        for number, block in enumerate(self.blocks):
            qkv = product(block.ln_1(hidden), block.qkv, block.qkv_bias)
            query, key, value = qkv.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = attend(number, query, key, value).transpose(1, 2).reshape(rows * length, self.width)
            hidden = hidden + product(attended, block.proj, block.proj_bias)
            inner = block.act(product(block.ln_2(hidden), block.fc, block.fc_bias))
            hidden = hidden + product(inner, block.out, block.out_bias)
        last = self.ln_f(hidden.view(rows, length, self.width)[:, -ends:].flatten(0, 1))
        logits: Tensor = product(last, self.head).float()
        return logits

    def _shift(self, columns: int, rows: Tensor | None = None) -> None:
        """Move the cache `columns` to the left, which hold no row's text, and take `rows` of it."""
        if rows is not None:
            self.keys, self.values = ([part[rows] for part in cache] for cache in (self.keys, self.values))
            self._keep_in_place(*self.keys, *self.values)
        if columns > 0:
            left = self.used - columns
            for part in (*self.keys, *self.values):
                part[..., :left, :] = part[..., columns : self.used, :].clone()
            self.used = left

    def _keep_in_place(self, *tensors: Tensor) -> None:
        """Promise a compiled step that `tensors` stay where they are.

        torch makes no CUDA graph of a step that changes another tensor, and copies those that it reads before each.
        """
        if self.compiled:
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)  # type: ignore[no-untyped-call,unused-ignore]

    def _columns(self) -> int:
        return self.keys[0].shape[2]

    def _ids(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)  # with device= a GPU would be waited for
