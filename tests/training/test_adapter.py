"""Merging a LoRA adapter keeps the mask."""

import pytest
import torch
from torch import nn

import sparsekern


def half_zero(dtype=torch.float32) -> torch.Tensor:
    weight = torch.randn(6, 8).to(dtype)
    weight[:, ::2] = 0
    weight[0, 0] = -0.0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_adapter(dtype):
    weight, down, up = half_zero(dtype), torch.randn(2, 8).to(dtype), torch.randn(6, 2).to(dtype)
    expected = (weight.double() + 0.5 * up.double() @ down.double()) * (weight != 0)
    kept = weight != 0
    sparsekern.merge_adapter_(weight, down, up, scale=0.5)
    assert not weight[~kept].any()
    torch.testing.assert_close(weight, expected.to(dtype))


class Adapted(nn.Module):
    """As peft's LoRA layer: the pruned linear inside, merged by adding to its weight."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))

    def merge_and_unload(self) -> nn.Linear:
        self.base_layer.weight.data = self.base_layer.weight.data + 2 * self.lora_B.weight.data @ self.lora_A.weight.data
        return self.base_layer


def test_a_merge_inside_keep_sparsity():
    linear = nn.Linear(8, 6)
    linear.weight.data = half_zero()
    model = Adapted(linear)
    with sparsekern.keep_sparsity(model) as keeper:
        assert keeper.names == ("base_layer",)  # the adapter is free to train
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        expected = linear.weight.clone()
        sparsekern.merge_adapter_(expected.data, model.lora_A.weight, model.lora_B.weight, scale=2)
        model = model.merge_and_unload()  # the adapted model is gone before the block ends
    assert not model.weight[:, ::2].any() and model.weight[:, 1::2].all()
    torch.testing.assert_close(model.weight, expected)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"down": torch.ones(8, 2)}, ValueError, r"down: expected shape \('any', 8\), got \(8, 2\)"),
        ({"down": torch.ones(8)}, ValueError, r"down: expected 2 dimensions, got shape \(8,\)"),
        ({"up": torch.ones(2, 6)}, ValueError, r"up: expected shape \(6, 2\), got \(2, 6\)"),
        ({"up": torch.ones(6, 3)}, ValueError, r"up: expected shape \(6, 2\), got \(6, 3\)"),
        (
            {"weight": torch.ones(6, 8, dtype=torch.int32)},
            TypeError,
            "weight: expected dtype float32 or bfloat16 or float16, got int32",
        ),
        ({"down": [[1.0] * 8] * 2}, TypeError, "down: expected a tensor, got list"),
        ({"up": torch.ones(6, 2).double()}, TypeError, "up: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"scale": "x"}, TypeError, "scale: expected a number, got 'x'"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=f"^{message}"):
        sparsekern.merge_adapter_(**{"weight": half_zero(), "down": torch.ones(2, 8), "up": torch.ones(6, 2), **wrong})


def test_a_sum_that_overflows():
    weight = half_zero(torch.float16)
    before = weight.clone()
    with pytest.raises(ValueError, match="weight: expected a finite sum with the adapter in float16, got NaN or Inf"):
        sparsekern.merge_adapter_(weight, torch.full((1, 8), 6e4), torch.full((6, 1), 6e4))
    assert torch.equal(weight, before)
