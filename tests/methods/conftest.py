"""A layer to prune: weights, and inputs with correlated features of very different size."""

from typing import NamedTuple

import pytest
import torch

from sparsekern.methods.statistics import Gram


class Layer(NamedTuple):
    weight: torch.Tensor
    x: torch.Tensor

    def statistics(self) -> Gram:
        gram = Gram(self.x.shape[1], self.x.device)
        gram.add(self.x, None)
        return gram

    @property
    def gram64(self) -> torch.Tensor:
        return self.x.double().T @ self.x.double()


def make_layer(rows: int, columns: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) @ mix * scale
    return Layer(torch.randn(rows, columns, generator=generator).to(dtype), x)


@pytest.fixture
def layer() -> Layer:
    return make_layer(24, 64, 200)
