"""What may follow a method: tuning of each block's kept weights, and distillation of the whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ._fields import Settings, mixed_precision, number, settings_of, whole


@dataclass(frozen=True)
class Training(Settings, ABC):
    """Base of the settings of what trains a pruned model."""

    @property
    @abstractmethod
    def batch_tokens(self) -> int:
        """The minimum of tokens in an optimizer step."""

    def settings(self) -> dict[str, object]:
        """Return the settings by name, as values that JSON can hold."""
        return {name: getattr(self, name) for name in settings_of(type(self))}


@dataclass(frozen=True)
class BlockTuning(Training):
    """Tune the kept weights, norms and biases of each block once it is pruned, so that it computes what the dense model computes there.

    The block takes the hidden states of the pruned model. It is to return those of the dense model behind the same block. The error of
    a token is the squared distance of the two, as a share of the squared length of the dense one. AdamW minimises its mean over the
    calibration samples; the learning rate falls linearly to zero. Pruned weights stay zero.

    Of every eight samples one is held out. The weights with the smallest error on those are kept. They are never worse than those of
    the method.

    With `blocks=2` a block and the one in front of it are tuned together, towards the dense hidden states behind the second. Each
    block but the last is tuned twice, which takes twice the time. In the source this helped a model of 125 M parameters, and harmed one
    of 7 B.

    Example:
        >>> tune = sparsekern.BlockTuning(passes=2, batch_tokens=32)
        >>> report = sparsekern.prune(model, "wanda", "2:4", calibration=ids, tune=tune, progress=False)
        >>> all(block["after"] <= block["before"] for block in report.tuning)
        True

    Source: the dense model's hidden states as target, and two blocks together: Shin et al., Rethinking Pruning Large Language Models,
    2024, sections 3.1 to 3.3.
    """

    learning_rate: float = number(5e-4, above=0, help="highest learning rate of AdamW")
    passes: int = whole(4, at_least=1, help="passes over the samples that are not held out")
    batch_tokens: int = whole(512, at_least=1, help="minimum of tokens in an optimizer step; whole batches are accumulated")
    beta1: float = number(0.9, at_least=0, below=1, help="decay of AdamW's first moment")
    beta2: float = number(0.95, at_least=0, below=1, help="decay of AdamW's second moment")
    weight_decay: float = number(0.0, at_least=0, help="weight decay of AdamW, on matrices only")
    clip: float = number(1.0, above=0, help="largest norm of the gradient")
    mixed_precision: bool = mixed_precision()
    patience: int = whole(2, at_least=1, help="passes without a smaller held-out error after which a block is done")
    blocks: int = whole(1, at_least=1, at_most=2, help="blocks tuned together; 2 is for models below 0.5 B parameters")


@dataclass(frozen=True)
class Distill(Training):
    """Train the whole pruned model, once it is done, to predict what the dense one predicts.

    The loss is the Kullback-Leibler divergence of the next token's distribution from that of the dense model. Its hidden states in front
    of the head are computed once, before anything is pruned, and kept. A copy of the dense model is kept only where logits are more
    than the products with the head, as with a bias or a bound. No logits are stored.

    Pruned weights stay zero. Embeddings and the head are frozen, and experts that are not pruned. AdamW's learning rate rises linearly
    over the `warmup` share of the steps, and falls along half a cosine to zero.

    Where the text is short, `own_samples` adds windows that the dense model writes itself by the seed: the first eighth of each is a
    passage of the text. They are kept in a cache (`SPARSEKERN_CACHE`).

    Of every eight samples one is held out, of about 4,096 tokens together. Their divergence is reported as the training goes on. If it
    has not fallen at the end, the weights from before are kept. With `out` in `prune`, a killed run resumes to the same bits.

    Example:
        >>> text = {"calibration": "text.txt", "tokenizer": tokenizer, "samples": 32, "length": 16}
        >>> distill = sparsekern.Distill(steps=2, batch_tokens=128)
        >>> report = sparsekern.prune(model, "wanda", "2:4", distill=distill, progress=False, **text)
        >>> report.distillation[-1]["kl"] < report.distillation[0]["kl"]
        True

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    steps: int = whole(200, at_least=1, help="optimizer steps")
    samples: int | None = whole(None, at_least=2, help="windows of the calibration text to train on; None: those of the method")
    own_samples: int | None = whole(
        None, at_least=1, help="windows besides that the dense model writes itself, each behind a passage of the text; None: none"
    )
    learning_rate: float = number(1.2e-4, above=0, help="highest learning rate of AdamW")
    warmup: float = number(0.05, at_least=0, below=1, help="share of the steps in which the learning rate rises")
    batch_tokens: int = whole(2048, at_least=1, help="minimum of tokens in an optimizer step; whole batches are accumulated")
    temperature: float = number(1.0, above=0, help="divisor of the logits of both models")
    beta1: float = number(0.9, at_least=0, below=1, help="decay of AdamW's first moment")
    beta2: float = number(0.95, at_least=0, below=1, help="decay of AdamW's second moment")
    weight_decay: float = number(0.0, at_least=0, help="weight decay of AdamW, on matrices only")
    clip: float = number(1.0, above=0, help="largest norm of the gradient")
    mixed_precision: bool = mixed_precision()
