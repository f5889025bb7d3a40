"""What a family of the zoo is: how to build it, what to feed it, and what pruning is to find in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf

VOCABULARY = 96
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
COMMON = dict(vocab_size=VOCABULARY, **IDS)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
LLAMA = dict(**COMMON, **SIZES, num_key_value_heads=2, head_dim=8)
Sample = dict[str, torch.Tensor]

ROUTER = "routes tokens to experts"
MIXING = "mixes a few streams"
HEADWISE = "one small matrix a head, in a parameter of three dimensions"
NOT_CALLED = "its weight is read, the module is not called"


def words(lengths: tuple[int, ...] = (12, 9, 10, 7), seed: int = 1) -> list[Sample]:
    """Samples of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, length), generator=generator)} for length in lengths]


@dataclass(frozen=True)
class Family:
    """A tiny model, stated by hand.

    Attributes:
        architecture: its class in transformers.
        config: makes its configuration.
        stacks: the lists of blocks that are pruned, in the order in which they run.
        dense: by the end of a name in a block, why that matrix stays dense.
        samples: makes the calibration samples, each a batch of one without padding.
        options: further arguments of `prune`.
        padded: False if samples cannot run together with padding, and calibrate one by one.
        interleaved: True if gate and up rows of its experts alternate.
        refused: the message of a family that `prune` refuses.
        unpacked: by the end of a name, why that linear is not packed.
    """

    architecture: str
    config: Callable[[], tf.PreTrainedConfig]
    stacks: tuple[str, ...] = ("model.layers",)
    dense: Mapping[str, str] = field(default_factory=dict)
    samples: Callable[[], list[Sample]] = words
    options: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = True
    interleaved: bool = False
    refused: str = ""
    unpacked: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> tf.PreTrainedModel:
        """The same random weights at each call, in evaluation mode; no bias is zero and no norm is one."""
        torch.manual_seed(0)
        model = getattr(tf, self.architecture)(self.config()).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # tables of sines are made again, not saved
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
        return model

    def calibration(self) -> list[Sample]:
        """The batches to calibrate with: two with padding, of other lengths, or one a sample."""
        samples = self.samples()
        return [together(samples[:2]), together(samples[2:])] if self.padded else samples


def together(samples: list[Sample]) -> Sample:
    """One batch of all samples, padded on the right where their lengths differ."""
    batch = {name: _padded([sample[name] for sample in samples]) for name in samples[0]}
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        lengths = [sample[ids].shape[1] for sample in samples if ids in sample]
        if len(set(lengths)) > 1:
            batch[mask] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _padded(values: list[torch.Tensor]) -> torch.Tensor:
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(values)
    longest = max(value.shape[1] for value in values)
    return torch.cat([torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values])
