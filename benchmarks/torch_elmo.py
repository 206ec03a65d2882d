"""ELMo in PyTorch, after bilm-tf: the peer of `elmo_step.py`.

Encodes each distinct word of a batch once, clips cell and projection in both stacks (in a Python loop over positions,
because nn.LSTM cannot clip), and takes the softmax over the targets and shared negatives; over all words if there are
no negatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Word vectors [U, P] from character ids [U, C]."""

    def __init__(self, filters: tuple[tuple[int, int], ...], width: int, highways: int, projection: int):
        super().__init__()
        features = sum(number for _, number in filters)
        self.characters = nn.Embedding(261, width)
        self.convolutions = nn.ModuleList([nn.Conv1d(width, number, size) for size, number in filters])
        self.carries = nn.ModuleList([nn.Linear(features, features) for _ in range(highways)])
        self.transforms = nn.ModuleList([nn.Linear(features, features) for _ in range(highways)])
        self.projection = nn.Linear(features, projection)
        for layer in [*self.carries, *self.transforms, self.projection]:
            nn.init.normal_(layer.weight, std=features**-0.5)
            nn.init.zeros_(layer.bias)
        for layer in self.carries:
            nn.init.constant_(layer.bias, -2.0)
        nn.init.uniform_(self.characters.weight, -1, 1)

    def forward(self, characters_UC: Tensor) -> Tensor:
        x_UDC = self.characters(characters_UC).transpose(1, 2)
        x_UF = torch.relu(torch.cat([convolution(x_UDC).amax(2) for convolution in self.convolutions], 1))
        for carry, transform in zip(self.carries, self.transforms, strict=True):
            gate_UF = torch.sigmoid(carry(x_UF))
            x_UF = gate_UF * torch.relu(transform(x_UF)) + (1 - gate_UF) * x_UF
        return self.projection(x_UF)


class Layer(nn.Module):
    """An LSTM layer over [T, B, P] from a state (cell, hidden); the input is projected before the loop."""

    def __init__(self, projection: int, hidden: int, clip: float):
        super().__init__()
        self.input, self.clip = nn.Linear(projection, 4 * hidden), clip
        self.recurrent, self.projection = nn.Linear(projection, 4 * hidden, False), nn.Linear(hidden, projection, False)
        for layer in (self.input, self.recurrent):
            nn.init.uniform_(layer.weight, *(s * math.sqrt(6 / (2 * projection + 4 * hidden)) for s in (-1, 1)))
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.input.bias)

    def forward(self, x_TBP: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        (cell, hidden), outputs = state, []
        for z_BZ in self.input(x_TBP):
            i, j, f, o = (z_BZ + self.recurrent(hidden)).chunk(4, 1)
            cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(j)
            cell = cell.clamp(-self.clip, self.clip)
            hidden = self.projection(torch.sigmoid(o) * torch.tanh(cell)).clamp(-self.clip, self.clip)
            outputs.append(hidden)
        return torch.stack(outputs), (cell.detach(), hidden.detach())


class TorchELMo(nn.Module):
    """Training loss; the model keeps its states from step to step."""

    def __init__(self, config, rows: int):
        super().__init__()
        c = config
        self.config, self.encoder = (
            c,
            Encoder(c.filters, c.character_embedding_size, c.num_highways, c.projection_size),
        )
        self.stacks = nn.ModuleList(
            [
                nn.ModuleList([Layer(c.projection_size, c.hidden_size, c.cell_clip) for _ in range(c.num_layers)])
                for _ in range(2)
            ]
        )
        self.table, self.bias = (
            nn.Embedding(c.vocab_size, c.projection_size),
            nn.Parameter(torch.zeros(c.vocab_size)),
        )
        nn.init.normal_(self.table.weight, std=c.projection_size**-0.5)
        sizes = (c.hidden_size, c.projection_size)
        self.states = [[tuple(torch.zeros(rows, n) for n in sizes) for _ in range(c.num_layers)] for _ in range(2)]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        words_UP, total = self.encoder(batch["characters"]), 0.0
        for d, direction in enumerate(("forward", "backward")):
            x_TBP = words_UP[batch[f"{direction}_words"].T]
            for i, layer in enumerate(self.stacks[d]):
                x_TBP = F.dropout(x_TBP, self.config.dropout)
                y_TBP, self.states[d][i] = layer(x_TBP, self.states[d][i])
                x_TBP = x_TBP + y_TBP if i and self.config.use_skip_connections else y_TBP
            x_GP = F.dropout(x_TBP, self.config.dropout).flatten(0, 1)
            targets_G, weights_G = batch[f"{direction}_targets"].T.flatten(), batch[f"{direction}_weights"].T.flatten()
            if f"{direction}_negatives" in batch:
                nll_G = self.sampled(x_GP, targets_G, batch[f"{direction}_negatives"], batch[f"{direction}_tries"])
            else:
                nll_G = F.cross_entropy(F.linear(x_GP, self.table.weight, self.bias), targets_G, reduction="none")
            total = total + 0.5 * (nll_G * weights_G).sum() / weights_G.sum()
        return total

    def sampled(self, x_GP: Tensor, targets_G: Tensor, negatives_S: Tensor, tries: Tensor) -> Tensor:
        """tf.nn.sampled_softmax_loss, whose expected counts are others if no draw was repeated."""
        repeated = tries > len(negatives_S)

        def bias(ids: Tensor) -> Tensor:
            probabilities = torch.log1p(1 / (ids + 1)) / math.log1p(self.config.vocab_size)
            counts = torch.where(repeated, -torch.expm1(tries * torch.log1p(-probabilities)), tries * probabilities)
            return self.bias[ids] - torch.log(counts)

        true_G = (x_GP * self.table(targets_G)).sum(1) + bias(targets_G)
        sampled_GS = torch.addmm(bias(negatives_S), x_GP, self.table(negatives_S).T)
        sampled_GS = sampled_GS.masked_fill(targets_G[:, None] == negatives_S, -1e9)
        logits = torch.cat([true_G[:, None], sampled_GS], 1)
        return F.cross_entropy(logits, torch.zeros_like(targets_G), reduction="none")
