"""GPT-1 in PyTorch, written for speed: the strong peer of `gpt_step.py`.

Queries, keys and values in one product, PyTorch's causal attention, a vocabulary table padded to a multiple of 128
rows. As in most such programs, the padding takes part in the softmax.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.norm = nn.LayerNorm(width, 1e-5), nn.LayerNorm(width, 1e-5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            y_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for y_BTD in self.attention_in(x_BTD).split(D, 2)
        )
        y_BNTH = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        y_BTD = self.attention_out(y_BNTH.transpose(1, 2).reshape(B, T, D))
        x_BTD = self.attention_norm(x_BTD + F.dropout(y_BTD, self.dropout))
        y_BTD = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return self.norm(x_BTD + F.dropout(y_BTD, self.dropout))


class TorchGPT(nn.Module):
    """Training loss of next-token prediction; heads of 64, feed-forward of 4 × width."""

    def __init__(self, vocab_size: int, width: int, layers: int, positions: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.token = nn.Embedding(math.ceil(vocab_size / 128) * 128, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width, width // 64, dropout) for _ in range(layers)])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        x_BTD = F.dropout(x_BTD, self.dropout)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_GV = F.linear(x_BTD.flatten(0, 1), self.token.weight)
        return F.cross_entropy(logits_GV.float(), targets_BT.flatten())
