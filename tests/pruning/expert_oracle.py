"""Mixtures pruned the slow and obvious way: whole forwards, and the tokens of an expert gathered by hand."""

from __future__ import annotations

import torch
from torch import nn

import sparsekern
from sparsekern import ops

# The layouts of transformers' experts, written out by hand, beside which the package's own must hold.


def fused_modules(model) -> dict[str, nn.Module]:
    """The experts modules by name, found by their classes."""
    names = ("MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "Llama4TextExperts", "DbrxExperts", "DeepseekV3Experts")
    return {name: module for name, module in model.named_modules() if type(module).__name__ in names}


def matrix(module, expert: int, part: str) -> torch.Tensor:
    """A view `[out, in]` of one matrix."""
    kind = type(module).__name__
    if kind == "DbrxExperts":
        w1, v1, w2 = (p.data.view(module.num_experts, 16, 32)[expert] for p in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
        return {"gate_proj": w1, "up_proj": v1, "down_proj": w2.T}[part]
    down, both = module.down_proj.data[expert], module.gate_up_proj.data[expert]
    if kind in ("GptOssExperts", "Llama4TextExperts"):
        down, both = down.T, both.T
    if part == "down_proj":
        return down
    if kind == "GptOssExperts":
        return both[0::2] if part == "gate_proj" else both[1::2]
    return both[: len(both) // 2] if part == "gate_proj" else both[len(both) // 2 :]


def hidden_of(module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's down projection reads."""
    gate, up = x @ matrix(module, expert, "gate_proj").T, x @ matrix(module, expert, "up_proj").T
    if type(module).__name__ == "GptOssExperts":
        bias = module.gate_up_proj_bias.data[expert]
        gate, up = (gate + bias[0::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    return nn.functional.silu(gate) * up


def routed_rows(module, args, mask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows that each expert sees in one call, without padding, and their routing weights."""
    hidden = args[0].reshape(-1, args[0].shape[-1])
    found = []
    if type(module).__name__ == "Llama4TextExperts":
        for x in hidden.view(module.num_experts, -1, hidden.shape[1]):
            seen = (x != 0).any(1) & mask
            found.append((x[seen], torch.ones(int(seen.sum()))))
        return found
    index, weights = args[1], args[2]
    for expert in range(module.num_experts):
        seen = (index == expert).any(1) & mask
        found.append((hidden[seen], (weights * (index == expert)).sum(1)[seen]))
    return found


def oracle(model, calls: list[dict], solve, block_list: str = "model.layers", weighting: str = "equal") -> dict[str, torch.Tensor]:
    """Prune `model` block by block by `solve(name, weight, gram)`, from whole forwards. Returns the Gram matrices in float64."""
    grams: dict[str, torch.Tensor] = {}
    fused = fused_modules(model)
    for index in range(len(model.get_submodule(block_list))):
        prefix = f"{block_list}.{index}."
        linears = {n: m for n, m in model.named_modules() if n.startswith(prefix) and type(m) is nn.Linear and m.out_features > 4}
        experts = {n: m for n, m in fused.items() if n.startswith(prefix)}
        own: dict[str, torch.Tensor] = {}

        def add(name, x, own=own):
            own[name] = own.get(name, 0) + x.double().T @ x.double()

        for call in calls:
            mask = call.get("attention_mask", torch.ones_like(call["input_ids"])).flatten().bool()
            hooks = [
                m.register_forward_pre_hook(lambda _, a, n=n, k=mask: add(n, a[0].reshape(-1, a[0].shape[-1])[k]))
                for n, m in linears.items()
            ]

            def visit(module, args, name, mask=mask):
                for expert, (x, weights) in enumerate(routed_rows(module, args, mask)):
                    scale = weights[:, None] if weighting == "routing" else 1
                    for part in ("gate_proj", "up_proj"):
                        add(f"{name}.{expert}.{part}", x * scale)
                    add(f"{name}.{expert}.down_proj", hidden_of(module, expert, x) * scale)

            hooks += [m.register_forward_pre_hook(lambda m, a, n=n: visit(m, a, n)) for n, m in experts.items()]
            with torch.no_grad():
                model(**call)
            for handle in hooks:
                handle.remove()
        views = {n: m.weight.data for n, m in linears.items()}
        for name, module in experts.items():
            for expert in range(module.num_experts):
                for part in ("gate_proj", "up_proj", "down_proj"):
                    views[f"{name}.{expert}.{part}"] = matrix(module, expert, part)
        for name, weight in views.items():
            weight.copy_(solve(name, weight, own[name]))
        grams |= own
    return grams


def sparsegpt(name, weight, gram):
    if not gram.any():  # unseen
        return magnitude(weight)
    return ops.obs_sweep(weight.clone(), ops.reverse_cholesky(gram.float(), 0.01), "2:4")[0]


def magnitude(weight):
    return weight.masked_fill(~ops.nm_mask(weight.abs().clone(), sparsekern.NM(2, 4)), 0)


def wanda(name, weight, gram):
    return weight.masked_fill(~ops.nm_mask((weight.abs() * gram.diagonal().sqrt().float()).clone(), sparsekern.NM(2, 4)), 0)
