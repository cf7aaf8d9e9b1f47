"""GPT-2 token by token: its own forward over a static KV cache, for one row or a batch padded on the left.

One token of one row is bound by reading the weights (few_rows.py). What transformers' loop adds to that, masks, cache
objects and logits processors, is 5 ms a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from wikift.kernels import few_rows
from wikift.kernels.attention import causal_mask

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Decoder:
    """A model and the rows that it continues: `begin` with texts, then `advance` by one token a row, again and again.

    A row that fills the model's `positions` slides: the last half of its text is read again and continued.
    `windows[row]` are the tokens that the row's next one depends on, `slides[row]` how often it slid.
    On a CPU the model's head is laid out in memory in the order in which a few rows read it, without a second copy.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        config = model.config
        self.device, self.dtype, self.positions = model.device, model.dtype, int(config.n_positions)
        self.heads, self.width = config.n_head, config.n_embd
        self.transformer: Any = model.transformer
        if model.device.type == "cpu":
            model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
        self.head = model.lm_head.weight.detach().t()  # (width, vocabulary)
        self.act: Callable[..., Tensor] = model.get_submodule("transformer.h.0.mlp.act")
        if config.activation_function in _TANH_GELU:
            self.act = partial(F.gelu, approximate="tanh")  # the same formula as the library's, in one pass
        scale = (self.width // self.heads) ** -0.5 if config.scale_attn_weights else 1.0
        inverse = config.scale_attn_by_inverse_layer_idx
        self.scales = [scale / (layer + 1) if inverse else scale for layer in range(config.n_layer)]
        splits = few_rows.helps(model.device, model.dtype)
        self.matmul = few_rows.split_matmul if splits else few_rows.matmul
        self.cache = torch.empty(0)  # keys and values: (2, layers, rows, heads, columns, head width)
        self.windows, self.slides = list[list[int]](), list[int]()

    def begin(self, windows: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Read one text a row, each of 1 to `positions` tokens; returns the logits (rows, vocabulary) of the next.

        Memory: 2 * layers * width values for each of rows * min(positions, longest text + `new_tokens`).
        """
        self.windows, self.slides = [list(window) for window in windows], [0] * len(windows)
        self.used = max(len(window) for window in windows)
        columns = min(self.positions, self.used + new_tokens)
        shape = (2, len(self.scales), len(windows), self.heads, columns, self.width // self.heads)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self._read(self.windows, self.cache[..., : self.used, :])

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; returns the logits (rows, vocabulary) of the next."""
        for window, token in zip(self.windows, tokens, strict=True):
            window.append(token)
        full = [row for row, window in enumerate(self.windows) if len(window) > self.positions]
        for row in full:
            self.windows[row] = self.windows[row][-max(1, self.positions // 2) :]
            self.slides[row] += 1
        lengths = [len(window) for window in self.windows]
        if self.used == self.cache.shape[-2]:  # only where a row slides can there be no column left
            self._shift(self.used + 1 - max(lengths))
        self.used += 1
        logits = self._last_column(tokens, lengths)
        for row in full:
            columns = slice(self.used - len(self.windows[row]), self.used)
            logits[row] = self._read([self.windows[row]], self.cache[:, :, row : row + 1, :, columns])[0]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only, in this order."""
        self.windows, self.slides = [self.windows[row] for row in rows], [self.slides[row] for row in rows]
        self.cache = self.cache[:, :, self._ids(rows)]
        self._shift(self.used - max(len(window) for window in self.windows))

    def alone(self, row: int) -> Tensor:
        """The logits (1, vocabulary) after a row's window read by itself: independent of its neighbours."""
        shape = (*self.cache.shape[:2], 1, self.heads, len(self.windows[row]), self.cache.shape[-1])
        return self._read([self.windows[row]], self.cache.new_empty(shape))

    def _read(self, windows: Sequence[Sequence[int]], cache: Tensor) -> Tensor:
        """The logits (rows, vocabulary) after windows padded on the left, whose keys and values fill `cache`."""
        length = cache.shape[-2]
        padding = [length - len(window) for window in windows]
        ids = self._ids([[0] * pad + list(window) for pad, window in zip(padding, windows, strict=True)])
        columns, starts = torch.arange(length, device=self.device), self._ids(padding)[:, None]
        mask = causal_mask(columns >= starts) if any(padding) else None
        return self._forward(ids, (columns - starts).clamp(min=0), cache, mask)

    def _last_column(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        """The logits after `tokens`, one a row: row r's text is in the last `lengths[r]` of the columns in use."""
        mask = None
        if min(lengths) < self.used:
            starts = self._ids([self.used - length for length in lengths])[:, None]
            mask = (torch.arange(self.used, device=self.device) >= starts)[:, None, None]
        position_ids = self._ids([length - 1 for length in lengths])[:, None]
        return self._forward(self._ids(tokens)[:, None], position_ids, self.cache[..., : self.used, :], mask)

    def _forward(self, ids: Tensor, position_ids: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (rows, vocabulary) in fp32 after the last of `ids` (rows, length).

        The last `length` columns of `cache` (2, layers, rows, heads, columns, head width) are written, all are read.
        """
        rows, length = ids.shape
        transformer, matmul = self.transformer, self.matmul
        hidden = (transformer.wte(ids) + transformer.wpe(position_ids)).view(rows * length, self.width)
        for layer, block in enumerate(transformer.h):
            attn, mlp = block.attn, block.mlp
            qkv = matmul(block.ln_1(hidden), attn.c_attn.weight, attn.c_attn.bias)
            query, key, value = qkv.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            keys, values = cache[:, layer]
            keys[:, :, -length:], values[:, :, -length:] = key, value
            causal, scale = mask is None and length > 1, self.scales[layer]
            attended = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=scale)
            attended = attended.transpose(1, 2).reshape(rows * length, self.width)
            hidden = hidden + matmul(attended, attn.c_proj.weight, attn.c_proj.bias)
            inner = self.act(matmul(block.ln_2(hidden), mlp.c_fc.weight, mlp.c_fc.bias))
            hidden = hidden + matmul(inner, mlp.c_proj.weight, mlp.c_proj.bias)
        last = transformer.ln_f(hidden.view(rows, length, self.width)[:, -1])
        return matmul(last, self.head).float()

    def _shift(self, columns: int) -> None:
        """Drop the first `columns` of the cache, which hold no row's text."""
        if columns > 0:
            left = self.used - columns
            for layer in self.cache.flatten(0, 1):  # one at a time: a copy of all would double the memory
                layer[..., :left, :] = layer[..., columns : self.used, :].clone()
            self.used = left

    def _ids(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)  # with device= a GPU would be waited for
