"""GPT-2 token by token: its own forward over a static KV cache, for one row or a batch padded on the left.

One token of one row is bound by reading the weights, so they are read as fast as memory allows (few_rows.py). The rest
is what the library's loop does besides: masks, cache objects, logits processors, 5 ms a token.
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

_COMPILED_STEP = 256  # columns: a compiled step is made once for each multiple of it, not for every length
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Decoder:
    """A model and the rows it is writing. `begin` with texts, then `advance` by one token a row, again and again.

    The text of a row that has come to the model's `positions` slides: its last half is read again and continued.
    `windows[row]` are the tokens that the row's next one depends on, `slides[row]` how often it slid.
    """

    def __init__(self, model: GPT2LMHeadModel, *, relayout: bool = False, compile: bool = False) -> None:
        config = model.config
        self.device, self.dtype, self.positions = model.device, model.dtype, int(config.n_positions)
        self.heads, self.width = config.n_head, config.n_embd
        self.transformer: Any = model.transformer
        if relayout and model.device.type == "cpu":
            _relayout_head(model)
        self.head = model.lm_head.weight.detach().t()  # (width, vocabulary)
        self.act: Callable[..., Tensor] = model.get_submodule("transformer.h.0.mlp.act")
        if config.activation_function in _TANH_GELU:
            self.act = partial(F.gelu, approximate="tanh")  # the same formula as the library's, in one pass
        scale = (self.width // self.heads) ** -0.5 if config.scale_attn_weights else 1.0
        inverse = config.scale_attn_by_inverse_layer_idx
        self.scales = [scale / (layer + 1) if inverse else scale for layer in range(config.n_layer)]
        self.compiled = compile
        # inductor would take a batch of matmuls apart: 58 ms a token for 36
        splits = few_rows.helps(model.device, model.dtype) and not compile
        self.matmul = few_rows.split_matmul if splits else few_rows.matmul
        self._step: Callable[..., Tensor] = self._one_token
        if compile:
            # CUDA graphs replay a step without its 200 launches; on a CPU the element-wise work is fused
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self._step = torch.compile(self._one_token, mode=mode)  # type: ignore[call-overload,unused-ignore]
        self._keep_in_place(self.head)
        self.keys, self.values = list[Tensor](), list[Tensor]()  # of each layer, (rows, heads, columns, head width)
        self.windows, self.slides = list[list[int]](), list[int]()

    def begin(self, windows: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Read one text a row, each of 1 to `positions` tokens; returns the logits (rows, vocabulary) of what follows.

        Memory: 2 * layers * width values for each of rows * min(positions, longest text + `new_tokens`).
        """
        self.windows, self.slides = [list(window) for window in windows], [0] * len(windows)
        self.used = max(len(window) for window in windows)
        columns = min(self.positions, self.used + new_tokens)
        if self.compiled:
            columns = min(self.positions, -(-columns // _COMPILED_STEP) * _COMPILED_STEP)
        shape = (len(windows), self.heads, columns, self.width // self.heads)
        if not self.keys or self.keys[0].shape != shape:  # else a CUDA graph continues with the tensors it knows
            # a tensor for each layer: of a part of one, torch.compile would write back the whole to change a column
            self.keys, self.values = (
                [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.scales] for _ in range(2)
            )
            self._keep_in_place(*self.keys, *self.values)
        for part in (*self.keys, *self.values):
            part.zero_()
        return self._read(self.windows, slice(None))

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; returns the logits (rows, vocabulary) of the next."""
        for window, token in zip(self.windows, tokens, strict=True):
            window.append(token)
        full = [row for row, window in enumerate(self.windows) if len(window) > self.positions]
        for row in full:
            self.windows[row] = self.windows[row][-max(1, self.positions // 2) :]
            self.slides[row] += 1
        lengths = [len(window) for window in self.windows]
        if self.used == self._columns():  # only where a row slides can there be no column left
            self._shift(self.used + 1 - max(lengths))
        logits = self._next_column(tokens, lengths) if len(full) < len(lengths) else None
        self.used += 1
        if full:
            again = torch.cat([self._read([self.windows[row]], slice(row, row + 1)) for row in full])
            logits = again if logits is None else logits.index_copy(0, self._ids(full), again)
        assert logits is not None
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only, in this order."""
        self.windows, self.slides = [self.windows[row] for row in rows], [self.slides[row] for row in rows]
        chosen = self._ids(rows)
        self.keys, self.values = ([part[chosen] for part in cache] for cache in (self.keys, self.values))
        self._keep_in_place(*self.keys, *self.values)
        self._shift(self.used - max(len(window) for window in self.windows))

    def alone(self, row: int) -> Tensor:
        """The logits (1, vocabulary) after a row's window read by itself: independent of its neighbours."""
        return self._read([self.windows[row]], None)

    def _next_column(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        """The logits after one more column: row r's text is in its last `lengths[r]` columns."""
        used = self.used
        end = None if self.compiled else used + 1  # a compiled step has shapes that do not grow
        starts = self._ids([max(0, used + 1 - length) for length in lengths])[:, None]
        mask = None
        if self.compiled or min(lengths) < used + 1:
            columns = torch.arange(end or self._columns(), device=self.device)
            mask = ((columns >= starts) & (columns <= used))[:, None, None]
        position_ids = self._ids([length - 1 for length in lengths])[:, None]
        logits = self._step(
            self._ids(tokens)[:, None], position_ids, torch.arange(used, used + 1, device=self.device), mask, end
        )
        return logits.clone() if self.compiled else logits

    def _one_token(
        self, ids: Tensor, position_ids: Tensor, column: Tensor, mask: Tensor | None, end: int | None
    ) -> Tensor:
        """Write `column` (1,) of the cache, attend to its first `end` columns (None: all) by `mask`."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys = self.keys[layer].index_copy_(2, column, key)[:, :, :end]
            values = self.values[layer].index_copy_(2, column, value)[:, :, :end]
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=self.scales[layer])

        return self._forward(ids, position_ids, attend)

    def _read(self, windows: Sequence[Sequence[int]], rows: slice | None) -> Tensor:
        """The logits (rows, vocabulary) after windows padded on the left.

        Their keys and values fill the cache of `rows` up to column `used`; None stores nothing.
        """
        length = max(len(window) for window in windows)
        padding = [length - len(window) for window in windows]
        ids = self._ids([[0] * pad + list(window) for pad, window in zip(padding, windows, strict=True)])
        columns = torch.arange(length, device=self.device)
        starts = self._ids(padding)[:, None]
        mask = causal_mask(columns >= starts) if any(padding) else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if rows is not None:
                self.keys[layer][rows, :, self.used - length : self.used] = key
                self.values[layer][rows, :, self.used - length : self.used] = value
            causal = mask is None and length > 1
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=self.scales[layer])

        return self._forward(ids, (columns - starts).clamp(min=0), attend)

    def _forward(self, ids: Tensor, position_ids: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Logits (rows, vocabulary) in fp32 after the last of `ids` (rows, length).

        `attend(layer, query, key, value)`, each (rows, heads, length, head width), returns the attended values alike.
        """
        rows, length = ids.shape
        transformer, matmul = self.transformer, self.matmul
        hidden = (transformer.wte(ids) + transformer.wpe(position_ids)).view(rows * length, self.width)
        for layer, block in enumerate(transformer.h):
            attn, mlp = block.attn, block.mlp
            qkv = matmul(block.ln_1(hidden), attn.c_attn.weight, attn.c_attn.bias)
            query, key, value = qkv.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = attend(layer, query, key, value).transpose(1, 2).reshape(rows * length, self.width)
            hidden = hidden + matmul(attended, attn.c_proj.weight, attn.c_proj.bias)
            inner = self.act(matmul(block.ln_2(hidden), mlp.c_fc.weight, mlp.c_fc.bias))
            hidden = hidden + matmul(inner, mlp.c_proj.weight, mlp.c_proj.bias)
        last = transformer.ln_f(hidden.view(rows, length, self.width)[:, -1])
        return matmul(last, self.head).float()

    def _shift(self, columns: int) -> None:
        """Move the cache `columns` to the left, which hold no row's text."""
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


def _relayout_head(model: Any) -> None:
    """Lay the head in memory in the order in which a few rows read it, without a second copy."""
    model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
    if model.config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
