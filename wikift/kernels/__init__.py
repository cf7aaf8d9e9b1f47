"""An annex: faster ways to compute what torch computes, each beside its plain twin.

    loss.summed_loss      F.linear and F.cross_entropy
    attention.attention   F.scaled_dot_product_attention
    dropout.OwnDropout    nn.Dropout
    few_rows.matmul       torch.addmm

WIKIFT_PLAIN=1 in the environment takes the twins: the same losses to rounding (with dropout: other masks), slower.
"""

import os

plain = os.environ.get("WIKIFT_PLAIN", "0") not in ("", "0")
