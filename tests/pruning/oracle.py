"""The pipeline done the slow and obvious way: for every block a forward of the whole model, one Gram matrix for every linear."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsekern import ops


def oracle_sparsegpt(model, calls: list[dict], block_list: str, pattern, damping: float = 0.01) -> dict[str, torch.Tensor]:
    """Prune `model` in place; `calls` are the model's keyword arguments, one dict for each sample. Returns the kept masks."""
    masks = {}
    model.eval()
    for index, block in enumerate(model.get_submodule(block_list)):
        linears = {
            f"{block_list}.{index}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        grams = {name: 0 for name in linears}

        def hook(name, grams, call):
            def record(module, args):
                x = args[0].reshape(-1, args[0].shape[-1])
                if "attention_mask" in call:
                    x = x[call["attention_mask"].flatten().bool()]
                grams[name] = grams[name] + x.float().T @ x.float()

            return record

        for call in calls:
            hooks = [m.register_forward_pre_hook(hook(name, grams, call)) for name, m in linears.items()]
            with torch.no_grad():
                model(**call)
            for handle in hooks:
                handle.remove()
        for name, module in linears.items():
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            factor = ops.reverse_cholesky(grams[name], damping)
            new_weight, masks[name], _ = ops.obs_sweep(weight, factor, pattern)
            weight.copy_(new_weight)
    return masks
