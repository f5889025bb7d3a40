"""What may follow a method: tuning of each block's kept weights."""

from __future__ import annotations

from dataclasses import dataclass

from ._fields import Settings, number, settings_of, whole


@dataclass(frozen=True)
class BlockTuning(Settings):
    """Tune the kept weights, norms and biases of each block once it is pruned, so that it computes what the dense model computes there.

    The block takes the hidden states of the pruned model. It is to return those of the dense model behind the same block. The error of
    a token is the squared distance of the two, as a share of the squared length of the dense one. AdamW minimises its mean over the
    calibration samples; the learning rate falls linearly to zero. Pruned weights stay zero.

    Of every eight samples one is held out. The weights with the smallest error on those are kept. They are never worse than those of
    the method.

    Example:
        >>> tune = sparsekern.BlockTuning(passes=2, batch_tokens=32)
        >>> report = sparsekern.prune(model, "wanda", "2:4", calibration=ids, tune=tune, progress=False)
        >>> all(block["after"] <= block["before"] for block in report.tuning)
        True

    Source: the dense model's hidden states as target: Shin et al., Rethinking Pruning Large Language Models, 2024, sections 3.1 to 3.2.
    """

    learning_rate: float = number(5e-4, above=0, help="highest learning rate of AdamW")
    passes: int = whole(4, at_least=1, help="passes over the samples that are not held out")
    batch_tokens: int = whole(2048, at_least=1, help="minimum of tokens in an optimizer step; whole batches are accumulated")
    beta1: float = number(0.9, at_least=0, below=1, help="decay of AdamW's first moment")
    beta2: float = number(0.95, at_least=0, below=1, help="decay of AdamW's second moment")
    weight_decay: float = number(0.0, at_least=0, help="weight decay of AdamW, on matrices only")
    clip: float = number(1.0, above=0, help="largest norm of the gradient")
    patience: int = whole(2, at_least=1, help="passes without a smaller held-out error after which a block is done")

    def settings(self) -> dict[str, object]:
        """Return the settings by name, as values that JSON can hold."""
        return {name: getattr(self, name) for name in settings_of(type(self))}
