"""A DLRM-like recommendation model: dense features, categorical tables as EmbeddingBags, pairwise interactions.

Its eight tables hold nearly all of its 12 M parameters, as in practice.
"""

import itertools

import torch
from torch import Tensor, nn

TABLE_ROWS = (100_000, 50_000, 20_000, 10_000, 5_000, 1_000, 500, 100)
DIM = 64
DENSE_FEATURES = 13


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(sizes):
        layers += [nn.Linear(in_features, out_features), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Recommender(nn.Module):
    """Click probability logits from dense features and bags of categories."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = mlp(DENSE_FEATURES, 256, 128, DIM)
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in TABLE_ROWS)
        fields = len(TABLE_ROWS) + 1
        self.register_buffer("pairs", torch.triu_indices(fields, fields, offset=1))
        self.top = mlp(DIM + fields * (fields - 1) // 2, 256, 128, 1)

    def forward(self, dense: Tensor, indices: list[Tensor], offsets: list[Tensor]) -> Tensor:
        x = self.bottom(dense)
        bags = [table(i, o) for table, i, o in zip(self.tables, indices, offsets, strict=True)]
        fields = torch.stack([x, *bags], dim=1)
        products = fields @ fields.transpose(1, 2)
        interactions = products[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, interactions], dim=1)).squeeze(1)


def build_model() -> Recommender:
    return Recommender()


def example_inputs() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batch = 16
    dense = torch.randn(batch, DENSE_FEATURES, generator=generator)
    indices = [torch.randint(0, rows, (batch * 3,), generator=generator) for rows in TABLE_ROWS]
    offsets = [torch.arange(0, batch * 3, 3) for _ in TABLE_ROWS]
    return dense, indices, offsets
