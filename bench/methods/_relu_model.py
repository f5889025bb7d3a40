"""A decoder with ReLU networks (OPT, 4 blocks of width 128), trained in minutes on the bytes of Python's language reference.

Bytes need no tokenizer, so that nothing is downloaded. It is evaluated on the held-out part of that text.
"""

from __future__ import annotations

import torch

from sparsekern.data import read_documents

LENGTH, BATCH, STEPS = 128, 8, 500
SAMPLES = 64


def trained(steps: int = STEPS, seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return the model, calibration ids `[samples, length]` of the training text, and evaluation ids `[tokens]` of the rest."""
    from transformers import OPTConfig, OPTForCausalLM

    training, evaluation = (_bytes(part) for part in ("calibration", "held-out"))
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=256, hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=LENGTH,
        word_embed_proj_dim=128, dropout=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        ids = _windows(training, BATCH)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), _windows(training, SAMPLES), evaluation[: 64 * LENGTH]


def _bytes(part: str) -> torch.Tensor:
    return torch.frombuffer(bytearray("\n".join(read_documents("builtin:python-docs", part)).encode()), dtype=torch.uint8).long()


def _windows(text: torch.Tensor, count: int) -> torch.Tensor:
    starts = torch.randint(len(text) - LENGTH, (count,))
    return torch.stack([text[start : start + LENGTH] for start in starts])
