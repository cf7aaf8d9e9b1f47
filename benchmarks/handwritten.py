"""GPT-2 as one writes it by hand, after the published design of nanoGPT's model.py: one module, the loss included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


class GPT(nn.Module):
    """Tied head, logits of a micro-batch in one piece. `rows`: of the embedding, the vocabulary or a little more."""

    def __init__(self, config: GPT2Config, rows: int) -> None:
        super().__init__()
        width = config.n_embd
        self.wte, self.wpe = nn.Embedding(rows, width), nn.Embedding(config.n_positions, width)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss; `inputs` and `targets` (micro_batch, block)."""
        hidden = self.drop(self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1], device=inputs.device)))
        for block in self.h:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.ln_f(hidden)).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def copy(self, model: GPT2LMHeadModel) -> GPT:
        """Take the weights of transformers' model, whose layers hold theirs transposed; rows beyond its own are 0."""
        theirs = model.transformer.state_dict()
        for name, parameter in self.named_parameters():
            value = theirs[name]
            if value.dim() == 2 and name.startswith("h."):
                value = value.T
            parameter.zero_()[: len(value)] = value
        return self


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(config.resid_pdrop)
        self.heads, self.rate = config.n_head, config.attn_pdrop

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        parts = self.attn.c_attn(self.ln_1(hidden)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate)
        hidden = hidden + self.drop(self.attn.c_proj(mixed.transpose(1, 2).reshape(hidden.shape)))
        inner = F.gelu(self.mlp.c_fc(self.ln_2(hidden)), approximate="tanh")
        return hidden + self.drop(self.mlp.c_proj(inner))
