"""BERT in PyTorch, written for speed: the strong peer of `bert_step.py`.

Queries, keys and values in one product, PyTorch's own attention, only the masked positions before the output layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.norm = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x_BTD: Tensor, mask_B11S: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.attention_in(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y_BNTH = F.scaled_dot_product_attention(q, k, v, mask_B11S, self.dropout)
        y_BTD = self.attention_out(y_BNTH.transpose(1, 2).reshape(B, T, D))
        x_BTD = self.attention_norm(x_BTD + F.dropout(y_BTD, self.dropout))
        return self.norm(x_BTD + F.dropout(self.down(F.gelu(self.up(x_BTD))), self.dropout))


class TorchBert(nn.Module):
    """Training loss of masked-LM, and of next-sentence prediction if the batch has its labels.

    Heads of 64, feed-forward of 4 × width.
    """

    def __init__(self, vocab_size: int, width: int, layers: int, positions: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.word, self.position = nn.Embedding(vocab_size, width), nn.Embedding(positions, width)
        self.token_type, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList([Block(width, width // 64, dropout) for _ in range(layers)])
        self.pooler, self.next_sentence = nn.Linear(width, width), nn.Linear(width, 2)
        self.transform, self.transform_norm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tokens_BT = batch["tokens"]
        x_BTD = (
            self.word(tokens_BT) + self.position.weight[: tokens_BT.shape[1]] + self.token_type(batch["token_types"])
        )
        x_BTD = F.dropout(self.norm(x_BTD), self.dropout)
        mask_B11S = (batch["segments"] != 0)[:, None, None]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B11S)
        rows_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None]
        masked_RD = x_BTD[rows_B1, batch["masked_positions"]].flatten(0, 1)
        masked_RD = self.transform_norm(F.gelu(self.transform(masked_RD)))
        logits_RV = F.linear(masked_RD, self.word.weight, self.bias)
        masked_loss = F.cross_entropy(logits_RV.float(), batch["masked_targets"].flatten())
        if "next_sentence_labels" not in batch:
            return masked_loss
        pooled_BD = torch.tanh(self.pooler(x_BTD[:, 0]))
        logits_B2 = self.next_sentence(pooled_BD).float()
        return masked_loss + F.cross_entropy(logits_B2, batch["next_sentence_labels"][:, 0])
